"""A training script as diffusers' examples are: accelerate, checkpoint-N folders, --resume_from_checkpoint.

It knows nothing of orchestrate. What it learns is small: a rank-2 update of a frozen linear layer, from the
pairs of numbers in --train_data_dir.
"""

import argparse
import json
import os
import shutil
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from safetensors.torch import save_file
from tqdm.auto import tqdm


class LowRank(torch.nn.Module):
    """A frozen layer with a trainable update of a low rank."""

    def __init__(self, size: int, rank: int) -> None:
        super().__init__()
        self.base = torch.nn.Linear(size, size, bias=False).requires_grad_(False)
        self.down = torch.nn.Linear(size, rank, bias=False)
        self.up = torch.nn.Linear(rank, size, bias=False)
        torch.nn.init.zeros_(self.up.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.up(self.down(x))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("--train_data_dir", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--max_train_steps", type=int, default=500)
    parser.add_argument("--checkpointing_steps", type=int, default=50)
    parser.add_argument("--checkpoints_total_limit", type=int)
    parser.add_argument("--resume_from_checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--step_s", type=float, default=0.0, help="Sleep after each step, to be watched.")
    return parser.parse_args()


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def main() -> None:
    args = arguments()
    accelerator = Accelerator()
    set_seed(args.seed)
    pairs = json.loads((args.train_data_dir / "pairs.json").read_text())
    x, y = torch.tensor(pairs["x"]), torch.tensor(pairs["y"])
    model = LowRank(x.shape[1], rank=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.learning_rate)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=args.max_train_steps)
    model, optimizer, scheduler = accelerator.prepare(model, optimizer, scheduler)
    step = 0
    if args.resume_from_checkpoint:
        found = checkpoints(args.output_dir)
        if args.resume_from_checkpoint != "latest":
            found = [args.output_dir / os.path.basename(args.resume_from_checkpoint)]
        if found:
            accelerator.print(f"Resuming from checkpoint {found[-1].name}")
            accelerator.load_state(str(found[-1]))
            step = int(found[-1].name.split("-")[1])
    bar = tqdm(range(args.max_train_steps), initial=step, desc="Steps")
    while step < args.max_train_steps:
        chosen = torch.randint(len(x), (4,))  # its randomness is in the checkpoint, too
        loss = torch.nn.functional.mse_loss(model(x[chosen]), y[chosen])
        accelerator.backward(loss)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        step += 1
        bar.update(1)
        bar.set_postfix(loss=loss.item(), lr=scheduler.get_last_lr()[0])
        if step % args.checkpointing_steps == 0:
            if args.checkpoints_total_limit:
                for old in checkpoints(args.output_dir)[: 1 - args.checkpoints_total_limit or None]:
                    shutil.rmtree(old)
            accelerator.save_state(str(args.output_dir / f"checkpoint-{step}"))
        time.sleep(args.step_s)
    trained = accelerator.unwrap_model(model)
    with torch.no_grad():
        error = torch.nn.functional.mse_loss(trained(x), y).item()
    weights = {name: value for name, value in trained.state_dict().items() if not name.startswith("base")}
    save_file(weights, args.output_dir / "pytorch_lora_weights.safetensors")
    print(json.dumps({"error": error}))


if __name__ == "__main__":
    main()
