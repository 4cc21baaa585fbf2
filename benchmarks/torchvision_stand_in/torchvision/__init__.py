"""As much of torchvision as diffusers' ``train_text_to_image_lora.py`` uses, over PIL.

torchvision has no wheel for every build of torch; with this folder on the path the script runs unchanged
without it. Only ``benchmarks/run_script.py`` uses it.
"""

from . import transforms as transforms

__version__ = "0.0.0"
