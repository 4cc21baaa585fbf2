"""Write ``requirements.lock`` and ``requirements-bench.lock`` from ``pyproject.toml``.

Asks pip which versions it would install into an empty environment (nothing is
installed), and pins them all. CUDA's own packages are left out: PyTorch's wheel
for a CUDA machine names the exact versions it needs, and its CPU wheel needs
none, so one lock serves both. ``TORCH`` is pinned here by hand for the same
reason: a local version such as ``2.13.0+cpu`` exists on one index only.

    python .ci/lock.py         (or: make lock)
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROJECT = "orchestrate-loras"
TORCH = "torch==2.13.0"
CUDA_PREFIXES = ("nvidia-", "cuda-", "triton")

LOCK_HEADER = """\
# Every version that `make` installs: the project, its demo and its development tools.
# Written by `make lock` for Python 3.11 and newer; the reasons are in pyproject.toml.
"""
BENCH_HEADER = """\
# What the benchmarks install on top of requirements.lock, to measure other tools beside ours.
# Written by `make lock`.
"""


def resolve(extras: str, *more: str) -> dict[str, str]:
    """Return name -> version of everything that the project with these extras needs."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), TORCH, f"{ROOT}[{extras}]", *more]
        subprocess.run(command, check=True, cwd=folder)
        found = json.loads(report.read_text(encoding="utf-8"))["install"]
    pins: dict[str, str] = {}
    for package in found:
        name = str(package["metadata"]["name"]).lower().replace("_", "-")
        if name != PROJECT and not name.startswith(CUDA_PREFIXES):
            pins[name] = str(package["metadata"]["version"])
    pins["torch"] = TORCH.removeprefix("torch==")
    return pins


def write(path: Path, header: str, pins: dict[str, str]) -> None:
    lines = [f"{name}=={version}\n" for name, version in sorted(pins.items())]
    path.write_text(header + "".join(lines), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {len(pins)} packages")


def main() -> None:
    lock = ROOT / "requirements.lock"
    pins = resolve("demo,dev")
    write(lock, LOCK_HEADER, pins)
    # constrained by the lock just written, so that both files fit into one environment
    bench = resolve("demo,dev,bench", "--constraint", str(lock))
    write(
        ROOT / "requirements-bench.lock",
        BENCH_HEADER,
        {name: version for name, version in bench.items() if name not in pins},
    )


if __name__ == "__main__":
    main()
