"""Runs somebody else's training script as it is: ``python run_script.py SCRIPT ARGUMENTS…``.

Where torchvision is missing, the stand-in beside this file takes its place for the script alone: the
libraries have looked for torchvision before, found none, and do without. All that is imported here the script
imports anyway.
"""

import importlib.util
import runpy
import sys
from pathlib import Path


def main() -> None:
    script = sys.argv[1]
    if importlib.util.find_spec("torchvision") is None:
        import datasets.config  # noqa: F401
        import diffusers.utils  # noqa: F401
        from transformers.utils import is_torchvision_available, is_torchvision_v2_available

        assert not is_torchvision_available()
        assert not is_torchvision_v2_available()
        sys.path.insert(0, str(Path(__file__).resolve().parent / "torchvision_stand_in"))
    sys.argv = sys.argv[1:]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
