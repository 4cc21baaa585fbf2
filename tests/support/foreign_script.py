"""A training program that knows nothing of us, without torch: writes ``checkpoint-N`` folders, then a result.

    python foreign_script.py MODE OUT STEPS [--every N] [--resume latest] [--gate FILE]

``steps``: a checkpoint every ``--every`` steps. ``slow``: pauses in the middle of its second file, which it
keeps open, for longer than a folder has to be quiet. ``halfway``: is killed in the middle of the second file
of its second checkpoint. ``polite``: saves itself when it gets SIGTERM and exits 75. ``deaf``: does not
listen to it. ``fails``: dies of an exception after its first checkpoint. ``nothing``: exits 0 without a
result. ``far``: numbers its checkpoints beyond STEPS.

Where ``--gate`` is given it makes no step after its first checkpoint until that file is there.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

PAUSE_S = 0.01
SLOW_S = 1.0


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mode")
    parser.add_argument("out", type=Path)
    parser.add_argument("steps", type=int)
    parser.add_argument("--every", type=int, default=2)
    parser.add_argument("--resume")
    parser.add_argument("--gate", type=Path)
    args = parser.parse_args()
    asked: list[int] = []
    if args.mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    elif args.mode == "polite":
        signal.signal(signal.SIGTERM, lambda number, frame: asked.append(number))
    done: list[int] = []
    found = sorted(args.out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    if args.resume == "latest" and found:
        done = json.loads((found[-1] / "steps.json").read_text())
        print(f"Resuming from {found[-1].name}", flush=True)
    while len(done) < args.steps:
        done.append(len(done) + 1)
        print(json.dumps({"step": done[-1], "loss": 1 / done[-1]}), flush=True)
        if asked:
            save(args, done)
            return 75
        if len(done) % args.every == 0:
            save(args, done)
            if args.mode == "fails":
                raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")
            while args.gate and not args.gate.exists() and not asked:
                time.sleep(PAUSE_S)
        time.sleep(PAUSE_S)
    if args.mode != "nothing":
        (args.out / "lora.safetensors").write_text(json.dumps(done))
    print("Steps: 100%|####| " + json.dumps({"error": 0.25}), flush=True)
    return 0


def save(args: argparse.Namespace, done: list[int]) -> None:
    step = len(done) + (1000 if args.mode == "far" else 0)
    folder = args.out / f"checkpoint-{step}"
    folder.mkdir()
    (folder / "optimizer.bin").write_bytes(b"not to be opened: a pickle" * 10)
    text = json.dumps(done)
    with (folder / "steps.json").open("w") as file:
        file.write(text[: len(text) // 2])
        file.flush()
        if args.mode == "halfway" and step > args.every:
            os.kill(os.getpid(), signal.SIGKILL)
        if args.mode == "slow":
            time.sleep(SLOW_S)
        file.write(text[len(text) // 2 :])
    (folder / "last.pkl").touch()


if __name__ == "__main__":
    sys.exit(main())
