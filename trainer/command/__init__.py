"""Somebody else's training program, played under the contract of ``trainer.rundir``.

    program ─► {out}/checkpoint-50/ ─► complete? ─► checkpoints/step-000000050/checkpoint-50/ ─► replicator
            ─► its output           ─► log.txt, and events.jsonl as far as steps and losses are found in it

``python -m trainer.command`` plays one. ``words`` says what is started, ``folders`` which of its
checkpoints are complete, ``taking`` makes ours of them, ``output`` reads what it prints, ``program`` holds
its processes, ``play`` brings them together. Nothing here opens what it wrote: the
bytes are moved as they are, whatever they are. Imports no torch.
"""
