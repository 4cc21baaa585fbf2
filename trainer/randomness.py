"""The only source of randomness: every random number is a pure function of ``(seed, purpose, n)``.

``n`` is the global index of a sample, or of whatever the purpose counts. Nothing random is therefore part of
a checkpoint: a resumed run asks for the same numbers and gets them, on every kind of machine, because they
are always drawn on the CPU.
"""

import os
from hashlib import blake2b

import torch
from torch import Tensor


def key(seed: int, purpose: str, n: int) -> int:
    """Return 64 bits that look random and depend on nothing but the arguments."""
    return int.from_bytes(blake2b(repr((seed, purpose, n)).encode()).digest()[:8], "big")


def generator(seed: int, purpose: str, n: int) -> torch.Generator:
    """Return a fresh CPU generator for the ``n``-th use of this purpose.

    torch's CPU engine keeps 32 bits of its seed, so two of a run's streams may coincide by chance (one in
    four milliards per pair); a stream is never shared on purpose.
    """
    return torch.Generator("cpu").manual_seed(key(seed, purpose, n))


def seed_layers(seed: int, purpose: str, n: int) -> None:
    """Seed the global generators of all devices, which layers such as dropout draw from."""
    torch.manual_seed(key(seed, purpose, n))


def make_deterministic(threads: int | None) -> None:
    """Let the same operations give the same bits on the same kind of machine.

    Args:
        threads: CPU threads of torch; sums are split by thread, so equal results need equal numbers.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if threads:
        torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.deterministic = True
    # Of the fused attention kernels only flash has a deterministic backward pass on every device.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def own_memory(tensor: Tensor) -> Tensor:
    """Return a contiguous copy in memory of torch's own alignment.

    CPU kernels split a sum by the address they start at, and a tensor that is mapped from a file starts
    wherever the file's header ends: the same numbers from another place can give another last bit.
    """
    return tensor.detach().clone(memory_format=torch.contiguous_format)


def platform_fingerprint(device: torch.device) -> str:
    """Name what decides the last bits of a result: torch, the device and the CPU threads."""
    if device.type == "cuda":
        return f"torch {torch.__version__}, {torch.cuda.get_device_name(device)}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"torch {torch.__version__}, cpu {capability}, {torch.get_num_threads()} threads"
