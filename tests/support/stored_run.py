"""A run in a store, the checkpoint store over it, the disk of its node, and a link of a known speed."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from support.runs import RUN, claimed, incarnation, write_checkpoint

from storage import layout
from storage.checkpoints import CheckpointStore
from storage.errors import Unavailable
from storage.log import RunLog, run_log
from storage.memory import MemoryStore
from storage.records import Committed


@dataclass
class World:
    """A run in a store, one checkpoint store over it, and a node's disk."""

    store: MemoryStore
    log: RunLog
    checkpoints: CheckpointStore
    disk: Path
    seconds: float = 0.0

    def publish(self, step: int, attempt: int = 1, *, final: bool = False) -> Committed:
        local = write_checkpoint(self.disk / "out", step, final=final)
        return self.checkpoints.publish(local, attempt, incarnation(attempt))

    def data(self) -> list[str]:
        return [info.key for info in self.store.list(layout.data_prefix(RUN))]

    def key(self, checkpoint: Committed, file: str = "adapter.safetensors") -> str:
        return layout.committed_file(RUN, checkpoint, file)


def begun_in(store: MemoryStore, disk: Path, *, clock: Callable[[], float] = time.time) -> World:
    """A run whose first attempt is running."""
    log = run_log(store, RUN)
    log.append(claimed())
    made = World(store, log, CheckpointStore(store, RUN, log), disk)
    made.checkpoints = CheckpointStore(store, RUN, log, clock=clock, monotonic=lambda: made.seconds)
    return made


def flip_a_byte(store: MemoryStore, key: str) -> None:
    body = bytearray(store.get(key))
    body[len(body) // 2] ^= 1
    store.put(key, bytes(body))


class Uplink(MemoryStore):
    """Takes its time, as the world's clock tells it, and notes what is put."""

    def __init__(self, bytes_s: float) -> None:
        super().__init__()
        self.bytes_s = bytes_s
        self.puts: list[str] = []
        self.fails_at: str | None = None
        self.world: World

    def put(self, key: str, body: bytes | Path) -> None:
        if "/data/" in key:
            name = key.rpartition("/")[2]
            if self.fails_at and self.fails_at in name:
                raise Unavailable("cut")
            self.puts.append(name)
            self.world.seconds += (
                body.stat().st_size if isinstance(body, Path) else len(body)
            ) / self.bytes_s
        super().put(key, body)


def linked(tmp_path: Path, bytes_s: float = 1e6) -> tuple[World, Uplink]:
    """A world whose store lies behind a link of so many bytes a second."""
    store = Uplink(bytes_s)
    store.world = begun_in(store, tmp_path)
    return store.world, store


def trained(step: int, *, numbers: int = 100_000) -> dict[str, bytes]:
    """Files as training leaves them: of real numbers, in the safetensors format."""
    random = np.random.default_rng(step)

    def tensor() -> bytes:
        body = (random.standard_normal(numbers) * 1e-3).astype(np.float32).tobytes()
        header = json.dumps({"w": {"dtype": "F32", "shape": [numbers], "data_offsets": [0, len(body)]}})
        return len(header).to_bytes(8, "little") + header.encode() + body

    return {
        "adapter.safetensors": tensor(),
        "optimizer.safetensors": tensor() + tensor(),
        "state.json": b"{}",
    }


def publish(world: World, step: int, *, only: tuple[str, ...] | None = None) -> Committed:
    local = write_checkpoint(world.disk / "out", step, files=trained(step))
    return world.checkpoints.publish(local, 1, incarnation(1), only=only)
