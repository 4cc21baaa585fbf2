"""What an attempt's end says about why it ended, as pure functions of what was seen.

An exit code alone leaves open whether a killed process was too large, hung, or in somebody's way. The rest
is ``Evidence``: the last exception, how long nothing had happened, whom the kernel killed for want of memory,
and how full the disk was. ``attributed`` makes one bounded reason of it, ``told`` a sentence.
"""

import signal
from dataclasses import dataclass, replace

from storage.records import EndReason

from .config import Base
from .rundir import (
    EXIT_COMPLETE,
    EXIT_HUB_UNREACHABLE,
    EXIT_PREEMPTED,
    EXIT_STORE_UNREACHABLE,
    EXIT_UNFIT,
    end_reason,
)

ROOM_BYTES = 1_000_000
"""A disk with less room than this is full."""

LOW_RESOLUTION, LOW_RANK = 256, 4
"""Below these there is little to gain."""
LESS_MEMORY = "to need less memory, in order of effect: "

ADVICE = {
    EndReason.OOM_GPU: LESS_MEMORY
    + "base.gradient_checkpointing true, resources.micro_batch 1, base.mixed_precision bf16, "
    "base.quantize fp8 (SDXL: nf4), a lower base.resolution, base.optimizer adamw8bit, a lower base.rank, "
    "or a larger GPU",
    EndReason.OOM_HOST: "give each run a larger resources.cpus, so that fewer share a node, lower "
    "base.resolution or the number of images, or use nodes with more memory",
    EndReason.CUDA_ERROR: "set CUDA_LAUNCH_BLOCKING=1 and train it alone to see which operation it is; if "
    "only one node shows it, the GPU or its driver is at fault",
    EndReason.STALLED: "the stacks of all threads are in its log (orchestrate logs); if it was only slow, "
    "raise recovery.stall_timeout",
    EndReason.NAN_LOSS: "lower base.learning_rate, set base.max_grad_norm, or train in bf16 or fp32 instead "
    "of fp16",
    EndReason.DISK_FULL: "make room on the nodes' disks, or point TMPDIR to a larger one",
}
"""What a person can do about an end that is the run's own doing."""


def less_memory(base: Base, micro_batch: int | None) -> str:
    """Return what makes a run need less GPU memory, in order of effect, without what is done already.

    Args:
        micro_batch: The most images of one forward pass on this node; None: ``train_batch_size``.
    """
    states = base.optimizer in ("adamw", "prodigy")
    is_full, has_adapter = "full" in base.train, "adapter" in base.train
    steps = (
        (is_full and states, "base.optimizer adamw8bit"),  # its state is larger than all else
        (not base.gradient_checkpointing, "base.gradient_checkpointing true"),
        ((micro_batch or base.train_batch_size) > 1, "resources.micro_batch 1"),
        (base.mixed_precision == "no", "base.mixed_precision bf16"),
        (base.quantize == "none" and "full" not in base.train, "base.quantize fp8 (SDXL: nf4)"),
        (base.train_text_encoder, "base.train_text_encoder false"),
        (base.resolution > LOW_RESOLUTION, f"base.resolution below {base.resolution}"),
        (states and not is_full, "base.optimizer adamw8bit"),
        (base.ema_decay is not None, "no base.ema_decay"),
        (has_adapter and base.rank > LOW_RANK, f"base.rank below {base.rank}"),
        (is_full, "an adapter instead of base.train full"),
    )
    return LESS_MEMORY + ", ".join([*(said for helps, said in steps if helps), "or a larger GPU"])


_BY_CLASS = {
    "OutOfMemoryError": EndReason.OOM_GPU,
    "MemoryError": EndReason.OOM_HOST,
    "Diverged": EndReason.NAN_LOSS,
    "AcceleratorError": EndReason.CUDA_ERROR,
}
_BY_WORDS = (
    ("CUDA out of memory", EndReason.OOM_GPU),
    ("CUDA error: out of memory", EndReason.OOM_GPU),
    ("CUBLAS_STATUS_ALLOC_FAILED", EndReason.OOM_GPU),
    ("DefaultCPUAllocator: can't allocate memory", EndReason.OOM_HOST),
    ("DefaultCPUAllocator: not enough memory", EndReason.OOM_HOST),
    ("Cannot allocate memory", EndReason.OOM_HOST),
    ("No space left on device", EndReason.DISK_FULL),
    ("CUDA error", EndReason.CUDA_ERROR),
    ("CUBLAS_STATUS", EndReason.CUDA_ERROR),
    ("CUDNN_STATUS", EndReason.CUDA_ERROR),
    ("cuDNN error", EndReason.CUDA_ERROR),
    ("CUDA driver", EndReason.CUDA_ERROR),
)
"""What libraries say in exceptions of no class of their own; the first that fits."""
_FROM_BELOW = frozenset(
    {"RuntimeError", "OSError", "AcceleratorError", "SafetensorError", "DeferredCudaCallError"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What was seen of an attempt's end, besides its exit code and its message."""

    error_type: str = ""
    """The class of the exception that the trainer told of."""
    memory_bytes: int | None = None
    """The size of the memory that it ran out of, where that is known."""
    hung_s: float = 0.0
    """Above 0: it was killed because nothing had happened for so long."""
    oom_kills: int = 0
    """How many processes beside it the kernel had just killed for want of memory, itself among them."""
    disk_free_bytes: int | None = None
    """Room under its run directory."""


NO_EVIDENCE = Evidence()


def attributed(code: int, evidence: Evidence, error: str = "") -> EndReason:
    """Return why an attempt ended.

    Args:
        code: Its exit code, negative for a signal.
        error: The message of the last exception.
    """
    if code in (EXIT_COMPLETE, EXIT_PREEMPTED, EXIT_HUB_UNREACHABLE, EXIT_STORE_UNREACHABLE, EXIT_UNFIT):
        return end_reason(code)
    if evidence.hung_s > 0:
        return EndReason.STALLED
    if code == -signal.SIGKILL and evidence.oom_kills > 0:
        return EndReason.OOM_HOST
    free = evidence.disk_free_bytes
    if code == -signal.SIGBUS and free is not None and free < ROOM_BYTES:
        return EndReason.DISK_FULL  # a mapped file that could not grow
    reason = end_reason(code)
    return by_exception(evidence.error_type, error) or reason if reason is EndReason.APP_ERROR else reason


def plausible(evidence: Evidence) -> Evidence:
    """What a node reported, made such that a record can hold it: it may say anything."""
    size = evidence.memory_bytes
    error_type = evidence.error_type[:100].encode(errors="replace").decode()
    memory_bytes = size if size is not None and 0 <= size < 2**63 else None
    if (error_type, memory_bytes) == (evidence.error_type, size):
        return evidence
    return replace(evidence, error_type=error_type, memory_bytes=memory_bytes)


def by_exception(error_type: str, message: str) -> EndReason | None:
    """Return what an exception means; None if it is just an error of the program."""
    if error_type in _FROM_BELOW:
        for words, reason in _BY_WORDS:
            if words in message:
                return reason
    return _BY_CLASS.get(error_type)


def told(code: int, evidence: Evidence, error: str = "") -> str:
    """Return how an attempt ended, in a sentence about "the trainer"."""
    said = f": {error}" if error else ""
    reason = attributed(code, evidence, error)
    if reason is EndReason.STALLED:
        return f"the trainer hung and was killed{said}"
    if reason is EndReason.OOM_HOST and code < 0:
        of = f" of {evidence.memory_bytes / 1e9:.1f} GB" if evidence.memory_bytes else ""
        return f"the trainer was killed by the kernel: the memory{of} was full"
    if code < 0:
        return f"the trainer was killed by {_signal_name(-code)}"
    if code == EXIT_PREEMPTED:
        return "the trainer was asked to stop and saved its state"
    if code == EXIT_COMPLETE:
        return f"the trainer exited with code 0 but no final checkpoint was committed{said}"
    if code == EXIT_HUB_UNREACHABLE:
        return f"the trainer's node could not fetch the base model{said}"
    if code == EXIT_STORE_UNREACHABLE:
        return f"the trainer's node could not reach the store{said}"
    if code == EXIT_UNFIT:
        return f"the trainer's node is not fit to train{said}"
    return f"the trainer exited with code {code}{said}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # real-time signals have no names
        return f"signal {number}"
