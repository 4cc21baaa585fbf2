"""The rows of ``learnability.py``: what differs from plain LoRA in each, and what its model is to draw."""

from typing import Any, NamedTuple

OLD = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")
FORGETFUL = {"learning_rate": 3e-3}
"""So fast that the old digits suffer: what prior preservation is for."""
PRIOR = {"prompt": [f"a handwritten {word}" for word in OLD], "images": 72, "steps": 15, "cfg": 3.0}
ONLINE = {"prompt": PRIOR["prompt"], "online": True}

WORD = {
    "train": ["textual_inversion"],
    "tokens": [{"token": "<nine>", "words": "nine", "vectors": 4}],
    "token_learning_rate": 5e-3,
    "token_norm": "decay",
}
"""In captions and prompts instead of the word that the text encoder knows."""
IT = WORD | {"tokens": [{"token": "<it>", "init": "mean", "vectors": 4}]}
"""A word that begins as none in particular."""
Change = dict[str, Any]
ROWS: dict[str, tuple[str, Change]] = {
    "LoRA, attention": ("adapter", {}),
    "LoRA, all linear layers": ("adapter", {"base": {"targets": "linear"}}),
    "LoCon": ("adapter", {"base": {"targets": "linear", "conv_rank": 4}}),
    "DoRA": ("adapter", {"base": {"use_dora": True}}),
    "rsLoRA": ("adapter", {"base": {"use_rslora": True, "learning_rate": 5e-4}}),
    "LoHa": ("adapter", {"base": {"adapter": "loha", "targets": "linear", "learning_rate": 5e-3}}),
    "LoKr": ("adapter", {"base": {"adapter": "lokr", "targets": "linear", "learning_rate": 3e-3}}),
    "LoRA, text encoder too": (
        "adapter",
        {"base": {"train_text_encoder": True, "text_encoder_learning_rate": 2e-4}},
    ),
    "textual inversion": ("words", {"base": WORD}),
    "textual inversion of a digit that is known": ("words", {"digit": "seven", "base": IT}),
    "pivotal tuning": (
        "words",
        {
            "base": WORD
            | {"train": ["textual_inversion", "adapter"], "tokens_until": 0.5, "adapter_from": 0.5}
        },
    ),
    "words and LoRA together": ("words", {"base": WORD | {"train": ["textual_inversion", "adapter"]}}),
    "LoRA, int8 base": ("adapter", {"base": {"quantize": "int8"}}),
    "LoRA, nf4 base": ("adapter", {"base": {"quantize": "nf4"}}),
    "LoRA, fp8 base": ("adapter", {"base": {"quantize": "fp8"}}),
    "LoRA of all layers that stay, hollowed UNet": (
        "adapter",
        {"base": {"hollow": 1, "targets": "linear", "conv_rank": 8}},
    ),
    "hypernetwork": ("method", {"base": {"train": "hypernetwork", "hypernetwork_activation": "swish"}}),
    "full": ("method", {"base": {"train": "full", "learning_rate": 1e-4}}),
    "full, class images": ("method", {"base": {"train": "full", "learning_rate": 1e-4}, "prior": PRIOR}),
    "min-SNR": ("objective", {"base": {"loss_weighting": "min_snr"}}),
    "soft min-SNR": ("objective", {"base": {"loss_weighting": "soft_min_snr"}}),
    "debiased": ("objective", {"base": {"loss_weighting": "debiased"}}),
    "P2": ("objective", {"base": {"loss_weighting": "p2"}}),
    "pseudo-Huber": ("objective", {"base": {"loss": "huber"}}),
    "smooth L1": ("objective", {"base": {"loss": "smooth_l1"}}),
    "noise offset": ("objective", {"base": {"noise_offset": 0.05}}),
    "pyramid noise": ("objective", {"base": {"multires_noise_iterations": 3}}),
    "input perturbation": ("objective", {"base": {"input_perturbation": 0.1}}),
    "timesteps 200 to 1000": ("objective", {"base": {"min_timestep": 200}}),
    "x0 prediction": ("objective", {"taught": "sample"}),
    "v prediction": ("objective", {"taught": "v_prediction"}),
    "v prediction, min-SNR": ("objective", {"taught": "v_prediction", "base": {"loss_weighting": "min_snr"}}),
    "DreamBooth, no prior": ("DreamBooth", {"base": FORGETFUL}),
    "DreamBooth, class images": ("DreamBooth", {"base": FORGETFUL, "prior": PRIOR}),
    "DreamBooth, online prior": ("DreamBooth", {"base": FORGETFUL, "prior": ONLINE}),
}
WITHOUT_PRIOR = "DreamBooth, no prior"
MAY_FAIL = (WITHOUT_PRIOR, "textual inversion")
"""Rows that are there to be compared with: no prior is what forgets, and a word can only name what the base
draws already, which a nine is not; a row of its own teaches it a digit that is known."""
NINE = "nine"
ASKED = ("zero", "three", "four", "seven")
"""Of the old digits."""
SAMPLES = {
    "seeds": list(range(1, 13)),
    "steps": 15,
    "cfg": 3.0,
}


class Asked(NamedTuple):
    """What a model is asked to draw, of what it was taught and of old digits."""

    taught: str
    """What the base predicts."""
    digit: str
    """The one that is taught."""
    said: str
    """What captions and prompts call it."""

    @property
    def samples(self) -> dict[str, Any]:
        words = [self.said, *(word for word in ASKED if word != self.digit)]
        return SAMPLES | {"prompts": [f"a handwritten {word}" for word in words]}

    @property
    def folder(self) -> str:
        named = "" if self.said == NINE else "-" + self.said.strip("<>") + "-" + self.digit
        return f"control-{self.taught}{named}"


def asked_by(name: str) -> Asked:
    """Return what the model of a row is asked."""
    change = ROWS[name][1]
    digit = change.get("digit", NINE)
    (token,) = change.get("base", {}).get("tokens", [{"token": digit}])
    return Asked(change.get("taught", "epsilon"), digit, token["token"])
