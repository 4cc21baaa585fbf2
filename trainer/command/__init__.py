"""Somebody else's training program, played under the contract of ``trainer.rundir``.

    program ─► {out}/checkpoint-50/ ─► complete? ─► checkpoints/step-000000050/checkpoint-50/ ─► replicator
            ─► its output           ─► log.txt, and events.jsonl as far as steps and losses are found in it

``python -m trainer.command`` plays one. ``words`` says what is started, ``program`` holds its processes,
``output`` reads what it prints, ``folders`` says which of its checkpoints are complete, ``watch`` looks at
them, ``taking`` makes ours of them, and ``play`` brings these together. Nothing here opens what it wrote: the
bytes are moved as they are, whatever they are. Imports no torch.
"""
