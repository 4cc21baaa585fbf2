"""From a checkpoint to a file that other programs load, and the proof that they do.

diffusers   <folder>/pytorch_lora_weights.safetensors   load_lora_weights(<folder>)
kohya       <folder>/<name of the folder>.safetensors   A1111, Forge, ComfyUI, and diffusers too
"""

from .files import Dtype, Form, export_adapter
from .verify import ExportFailed, verify_export

__all__ = ["Dtype", "ExportFailed", "Form", "export_adapter", "verify_export"]
