"""From a checkpoint to a file that other programs load, and the proof that they do.

    checkpoint -> Trained: its modules on their base -> a file in a form -> loaded anew and compared

diffusers   <folder>/pytorch_lora_weights.safetensors   load_lora_weights(<folder>)
kohya       <folder>/<name>.safetensors                 A1111, Forge, ComfyUI, and diffusers too

``bundle`` puts beside it what web interfaces, model managers and the hub show.
"""

from .files import Dtype, Form, write_weights
from .trained import Trained, trained_adapter
from .verify import ExportFailed, verify_export

__all__ = ["Dtype", "ExportFailed", "Form", "Trained", "trained_adapter", "verify_export", "write_weights"]
