"""A run whose second attempt holds no keys, and what it may ask for."""

from support.granting import caller_of, data_key
from support.runs import claimed, committed, ended, state_after

from storage.scoped.grants import Limits, Write

MD5 = "0" * 32
DIGEST = "d" * 64
LIMITS = Limits(max_checkpoint_bytes=1000, last_step=100, inputs=frozenset({DIGEST}))
ME = caller_of(2)

STATE = state_after(claimed(1), committed(10), committed(20), ended(1), claimed(2))


def write(key: str, size: int = 10) -> Write:
    return Write(key=key, size_bytes=size, md5=MD5)


def mine(step: int, name: str = "adapter.safetensors") -> str:
    return data_key(step, name, attempt=2)
