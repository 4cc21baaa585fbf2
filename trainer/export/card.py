"""The model card of what was exported: ``README.md`` with the header that the hub reads."""

from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

from .headers import described, is_local, merged_names, public_name
from .token_files import explained, loading
from .trained import Trained

_PIPELINES = {
    "sd1": "StableDiffusionPipeline",
    "sd2": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "sd3": "StableDiffusion3Pipeline",
}


def card(trained: Trained, name: str, weights: str, images: Sequence[tuple[str, str]]) -> str:
    """Return the card.

    Args:
        weights: The file's name.
        images: Prompt and path of each sample.
    """
    spec = trained.spec
    trigger, base = spec.dataset.trigger, public_name(spec.base.model)
    data = ModelCardData(
        base_model=base,
        library_name="diffusers",
        tags=["text-to-image", "diffusers", trained.kind, *(["template:sd-lora"] if trained.modules else [])],
        instance_prompt=trigger,
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in images] or None,
    )
    parts = [f"# {name}"]
    if images:
        parts.append("<Gallery />")
    parts.append(
        f"A {described(trained)}, {'of' if trained.kind == 'full' else 'for'} "
        f"{f'[{base}](https://huggingface.co/{base})' if not is_local(spec.base.model) else base}, "
        f"trained for {trained.step} steps at {spec.base.resolution} pixels."
    )
    if merged := merged_names(spec):
        before = f"It began from that model with {merged} merged into it."
        onto = f"It belongs onto that model with {merged} merged into it."
        parts.append(before if trained.kind == "full" else onto)
    if trigger:
        parts.append(f"Use **{trigger}** in the prompt.")
    taught = [token.token for token in spec.base.tokens]
    prompt = images[0][0] if images else f"a photo of {trigger or ' '.join(taught) or 'a cat'}"
    parts.append(_snippet(trained, name, base, weights, prompt))
    if spec.base.tokens:
        parts.append(explained(spec.base, name))
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    return str(ModelCard(content))


def _snippet(trained: Trained, name: str, base: str, weights: str, prompt: str) -> str:
    pipeline = _PIPELINES[trained.family]
    if trained.kind == "full":
        lines = [
            f"from diffusers import {pipeline}",
            "",
            f'pipeline = {pipeline}.from_pretrained("<this folder>").to("cuda")',
            f"image = pipeline({prompt!r}).images[0]",
        ]
        return "\n".join(["```python", *lines, "```"])
    if trained.kind not in ("lora", "textual_inversion"):
        return f'```sh\norchestrate generate {weights} --prompt "{prompt}"\n```'
    words, adapter = loading(trained.spec.base, name, trained.family), trained.kind == "lora"
    return "\n".join(
        [
            "```python",
            f"from diffusers import {pipeline}",
            *(["from safetensors.torch import load_file"] if trained.family == "sdxl" and words else []),
            "",
            f'pipeline = {pipeline}.from_pretrained("{base}").to("cuda")',
            *([f'pipeline.load_lora_weights("<this folder>", weight_name="{weights}")'] if adapter else []),
            *words,
            f"image = pipeline({prompt!r}).images[0]",
            "```",
        ]
    )
