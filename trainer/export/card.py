"""The model card of an exported adapter: ``README.md`` with the header that the hub reads."""

from collections.abc import Sequence

from huggingface_hub import ModelCard, ModelCardData

from .headers import is_local, merged_names, public_name
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
        tags=["text-to-image", "diffusers", spec.base.adapter, "template:sd-lora"],
        instance_prompt=trigger,
        widget=[{"text": prompt, "output": {"url": url}} for prompt, url in images] or None,
    )
    parts = [f"# {name}"]
    if images:
        parts.append("<Gallery />")
    parts.append(
        f"An adapter ({spec.base.adapter}, rank {spec.base.rank}, alpha {spec.base.lora_alpha:g}) for "
        f"{f'[{base}](https://huggingface.co/{base})' if not is_local(spec.base.model) else base}, "
        f"trained for {trained.step} steps at {spec.base.resolution} pixels."
    )
    if merged := merged_names(spec):
        parts.append(f"It belongs onto that model with {merged} merged into it.")
    if trigger:
        parts.append(f"Use **{trigger}** in the prompt.")
    prompt = images[0][0] if images else f"a photo of {trigger or 'a cat'}"
    parts.append(_snippet(trained, base, weights, prompt))
    content = f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"
    return str(ModelCard(content))


def _snippet(trained: Trained, base: str, weights: str, prompt: str) -> str:
    if trained.kind != "lora":
        return f'```sh\norchestrate generate {weights} --prompt "{prompt}"\n```'
    pipeline = _PIPELINES[trained.family]
    return "\n".join(
        [
            "```python",
            f"from diffusers import {pipeline}",
            "",
            f'pipeline = {pipeline}.from_pretrained("{base}").to("cuda")',
            f'pipeline.load_lora_weights("<this folder>", weight_name="{weights}")',
            f"image = pipeline({prompt!r}).images[0]",
            "```",
        ]
    )
