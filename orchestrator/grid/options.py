"""What kohya's sd-scripts and diffusers' training scripts call things, and where each is in a sweep file.

A name whose value means the same here is an alias: it may stand in the block of our key, under ``parameters``
and after ``--set``. ``python -m orchestrator.grid.options`` prints the tables of ``docs/options.md``.
"""

from typing import NamedTuple


class Option(NamedTuple):
    """One option of another program."""

    names: tuple[str, ...]
    """As kohya or diffusers write it, without dashes."""
    ours: str = ""
    """``block.key`` in a sweep file; empty: there is no counterpart."""
    note: str = ""
    """What is different. Without one, and with ``ours``, the name is an alias or the same."""


MODEL = (
    Option(("pretrained_model_name_or_path",), "base.model"),
    Option(("revision",), "base.revision"),
    Option(("variant",), "", "the files of the repository or folder as they are"),
    Option(
        ("vae", "pretrained_vae_model_name_or_path"),
        "",
        "the VAE of the model, which always computes in fp32",
    ),
    Option(
        ("v_parameterization",), "base.prediction_type", "`v_prediction`; usually the model says so itself"
    ),
    Option(("prediction_type",), "base.prediction_type"),
    Option(("v2",), "", "the family is read from the model's configuration"),
    Option(("mixed_precision",), "base.mixed_precision"),
    Option(("full_fp16", "full_bf16"), "", "what is trained is always fp32"),
    Option(("clip_skip",), "base.clip_skip"),
    Option(("zero_terminal_snr",), "base.zero_terminal_snr"),
    Option(("base_weights", "base_weights_multiplier"), "base.merged_adapters", "`[{path: …, weight: …}]`"),
    Option(("gradient_checkpointing",), "base.gradient_checkpointing"),
    Option(("torch_compile",), "base.compile"),
    Option(
        ("xformers", "sdpa", "mem_eff_attn", "enable_xformers_memory_efficient_attention"), "", "torch's own"
    ),
    Option(("lowram", "highvram", "cache_latents", "cache_latents_to_disk"), "", "latents are always cached"),
)

ADAPTER = (
    Option(("network_module",), "base.adapter", "`lora`, `loha` or `lokr`; kohya's `algo=` of LyCORIS"),
    Option(("network_dim",), "base.rank"),
    Option(("rank",), "base.rank"),
    Option(("network_alpha",), "base.alpha"),
    Option(("lora_alpha",), "base.alpha"),
    Option(("conv_dim",), "base.conv_rank"),
    Option(("conv_alpha",), "base.conv_alpha"),
    Option(("network_dropout",), "base.lora_dropout"),
    Option(("lora_dropout",), "base.lora_dropout"),
    Option(("rank_dropout", "module_dropout"), "", "use `base.lora_dropout`"),
    Option(("dora_wd",), "base.use_dora"),
    Option(("use_dora",), "base.use_dora"),
    Option(("rs_lora",), "base.use_rslora"),
    Option(("factor",), "base.lokr_factor"),
    Option(("lora_layers",), "base.targets", "a list of module name endings"),
    Option(("network_weights",), "base.initial_adapter"),
    Option(("network_train_unet_only",), "base.train_text_encoder", "`false`, the default"),
    Option(("train_text_encoder",), "base.train_text_encoder"),
    Option(("unet_lr",), "base.learning_rate"),
    Option(("text_encoder_lr",), "base.text_encoder_learning_rate"),
    Option(("fused_backward_pass",), "", "`base.optimizer` `adamw8bit` or `adafactor` save memory"),
    Option(("train_text_encoder_ti", "token_abstraction"), "", "textual inversion is not trained"),
)

OBJECTIVE = (
    Option(("loss_type",), "base.loss"),
    Option(("huber_c",), "base.huber_c"),
    Option(("huber_schedule",), "base.huber_schedule"),
    Option(("min_snr_gamma",), "base.snr_gamma", "with `loss_weighting: min_snr`"),
    Option(("snr_gamma",), "base.snr_gamma", "with `loss_weighting: min_snr`"),
    Option(("debiased_estimation_loss",), "base.loss_weighting", "`debiased`"),
    Option(("scale_v_pred_loss_like_noise_pred", "v_pred_like_loss"), "", "choose a `base.loss_weighting`"),
    Option(("noise_offset",), "base.noise_offset"),
    Option(("adaptive_noise_scale",), "base.adaptive_noise_scale"),
    Option(("multires_noise_iterations",), "base.multires_noise_iterations"),
    Option(("multires_noise_discount",), "base.multires_noise_discount"),
    Option(("ip_noise_gamma",), "base.input_perturbation"),
    Option(("input_perturbation",), "base.input_perturbation"),
    Option(("min_timestep",), "base.min_timestep"),
    Option(("max_timestep",), "base.max_timestep"),
    Option(("weighting_scheme",), "base.timestep_sampling", "`logit_normal` or `uniform`; for SD3"),
    Option(("reg_data_dir",), "prior.path"),
    Option(("class_data_dir",), "prior.path"),
    Option(("class_prompt",), "prior.prompt"),
    Option(("num_class_images",), "prior.images"),
    Option(("prior_loss_weight",), "prior.weight"),
    Option(("with_prior_preservation",), "prior.prompt", "a `prior` block turns it on"),
)

LOOP = (
    Option(("resolution",), "base.resolution", "one number: the side of the square, or of the bucket's area"),
    Option(("max_train_steps",), "base.max_train_steps"),
    Option(("max_train_epochs", "num_train_epochs"), "base.max_train_steps", "steps, counted by yourself"),
    Option(("train_batch_size",), "base.train_batch_size"),
    Option(("gradient_accumulation_steps",), "base.gradient_accumulation_steps"),
    Option(("learning_rate",), "base.learning_rate"),
    Option(("scale_lr",), "base.learning_rate", "multiply it by yourself"),
    Option(("lr_scheduler",), "base.lr_scheduler"),
    Option(("lr_warmup_steps",), "base.lr_warmup_steps"),
    Option(("lr_scheduler_num_cycles",), "base.lr_num_cycles"),
    Option(("lr_num_cycles",), "base.lr_num_cycles"),
    Option(("lr_scheduler_power",), "base.lr_power"),
    Option(("lr_power",), "base.lr_power"),
    Option(("optimizer_type",), "base.optimizer", "in lower case: `adamw8bit`"),
    Option(("optimizer",), "base.optimizer"),
    Option(("use_8bit_adam",), "base.optimizer", "`adamw8bit`"),
    Option(("adam_beta1",), "base.adam_beta1"),
    Option(("adam_beta2",), "base.adam_beta2"),
    Option(("adam_epsilon",), "base.adam_epsilon"),
    Option(("adam_weight_decay",), "base.weight_decay"),
    Option(
        ("optimizer_args",),
        "base.weight_decay",
        "`weight_decay`, `adam_…` and `prodigy_…` are keys of `base`",
    ),
    Option(("max_grad_norm",), "base.max_grad_norm", "`null` instead of 0: not clipped"),
    Option(("use_ema", "ema_decay"), "base.ema_decay", "a number turns it on"),
    Option(("seed",), "base.seed"),
    Option(("allow_tf32", "max_data_loader_n_workers", "dataloader_num_workers"), "", "not needed"),
)

DATA = (
    Option(("train_data_dir",), "dataset.path"),
    Option(("instance_data_dir",), "dataset.path"),
    Option(("dataset_name",), "dataset.path", "`hub://owner/name`"),
    Option(("image_column",), "dataset.image_column"),
    Option(("caption_column",), "dataset.caption_column"),
    Option(("class_tokens",), "dataset.caption"),
    Option(("instance_prompt",), "dataset.caption"),
    Option(("caption_extension",), "", "`.txt` beside the image"),
    Option(
        ("num_repeats", "repeats"), "dataset.concepts", "`{name: {repeats: 10}}`, or folders named `10_name`"
    ),
    Option(("caption_dropout_rate",), "dataset.caption_dropout"),
    Option(("caption_tag_dropout_rate",), "dataset.tag_dropout"),
    Option(("shuffle_caption",), "dataset.shuffle_caption"),
    Option(("keep_tokens",), "dataset.keep_tokens"),
    Option(("caption_separator",), "dataset.caption_separator"),
    Option(("cache_text_encoder_outputs",), "dataset.cache_text"),
    Option(("flip_aug",), "dataset.random_flip"),
    Option(("random_flip",), "dataset.random_flip"),
    Option(("center_crop",), "dataset.center_crop"),
    Option(("random_crop",), "dataset.center_crop", "the opposite: `false`"),
    Option(("enable_bucket",), "dataset.buckets"),
    Option(("min_bucket_reso",), "dataset.bucket_min"),
    Option(("max_bucket_reso",), "dataset.bucket_max"),
    Option(("bucket_reso_steps",), "dataset.bucket_step"),
    Option(("alpha_mask", "masked_loss"), "dataset.masks", "`alpha` or `files`"),
    Option(("color_aug", "face_crop_aug_range", "wildcard"), "", "images are flipped and cropped only"),
    Option(("max_train_samples",), "", "put fewer images into the folder"),
)

LOOKING = (
    Option(("sample_prompts", "validation_prompt"), "samples.prompts", "a list"),
    Option(("sample_every_n_steps",), "samples.every"),
    Option(("num_validation_images",), "samples.seeds", "a list of seeds"),
    Option(("validation_epochs", "sample_every_n_epochs"), "samples.every", "in steps"),
    Option(("validation_split",), "dataset.val_fraction"),
    Option(("validate_every_n_steps",), "validation.every"),
    Option(("report_to", "log_with"), "", "`orchestrate track NAME --to tensorboard`, or `wandb`"),
    Option(("logging_dir", "wandb_run_name", "log_tracker_name"), "", "named after the run"),
)

SAVING = (
    Option(("checkpointing_steps", "save_every_n_steps"), "checkpoint.every", "steps, or a time: `120s`"),
    Option(
        ("checkpoints_total_limit", "save_last_n_steps"), "checkpoint.keep_last", "checkpoints, not steps"
    ),
    Option(("save_state", "resume", "resume_from_checkpoint"), "", "always: every run resumes by itself"),
    Option(("output_dir",), "storage.url", "the store of all sweeps"),
    Option(("output_name",), "name", "of the sweep; of a file: `orchestrate export --name`"),
    Option(("save_precision",), "", "`orchestrate export --dtype`"),
    Option(("save_model_as", "no_metadata"), "", "`orchestrate export --to … --metadata …`"),
    Option(
        ("push_to_hub", "hub_model_id", "hub_token"), "", "`orchestrate export --to hf`, then `hf upload`"
    ),
    Option(("multi_gpu", "num_processes"), "resources.gpus", "GPUs of one run"),
)

SUBJECTS: dict[str, tuple[Option, ...]] = {
    "The model": MODEL,
    "The adapter": ADAPTER,
    "The objective": OBJECTIVE,
    "The loop": LOOP,
    "The data": DATA,
    "Looking at it": LOOKING,
    "Saving": SAVING,
}


def aliases() -> dict[str, tuple[str, str]]:
    """Return each name that is accepted for one of ours, and the block and key that it stands for."""
    found: dict[str, tuple[str, str]] = {}
    for option in (option for subject in SUBJECTS.values() for option in subject):
        block, _, key = option.ours.partition(".")
        if key and not option.note:
            found |= {name: (block, key) for name in option.names if name != key}
    return found


def tables() -> str:
    """Return the tables of ``docs/options.md``, in Markdown."""
    parts = []
    for subject, options in SUBJECTS.items():
        rows = [_row(option) for option in options]
        parts.append("\n".join([f"## {subject}", "", "| there | here | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _row(option: Option) -> str:
    ours = f"`{option.ours}`" if option.ours else "–"
    known = aliases()
    note = option.note or ("alias" if option.names[0] in known else "the same name")
    return f"| {', '.join(f'`{name}`' for name in option.names)} | {ours} | {note} |"


if __name__ == "__main__":
    print(tables(), end="")
