"""What a run takes of memory: planned before it starts, and watched while it runs.

``host`` is about a process's main memory; the rest is the plan of what a GPU must hold. Nothing is imported
here: ``host`` and ``plan`` are used where torch is not.
"""
