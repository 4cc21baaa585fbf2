"""The processes of one node that compute one run together: one to a GPU, or with gloo to some CPU threads.

Each holds a whole copy of what is trained and takes every n-th forward pass of a step. The gradients are
gathered and added up in the order of ranks, so every process makes the same move, and equal numbers of
processes give equal bits. Rank 0 is the training process that the supervisor knows: only it validates, saves,
tells and is asked to stop. It starts the others, which own nothing, cannot outlive it, and go when it does.

When one of the others dies, however it dies, rank 0 ends in the same way at once: a run's exit code says what
happened to whichever process it happened to. accelerate forms the group and places each process.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn

from .errors import NodeUnfit
from .rundir import Options, RunDir, append_event
from .training_process import TRAINER, TrainingProcess

RANK = "TRAINER_RANK"
"""Environment variable of a training process that is not the first of its run."""

PATIENCE = timedelta(days=1)
"""For the others to come: hangs are the supervisor's to find, and samples and uploads may take their time."""
POLL_S = 0.1
END_S = 10.0
"""A lost connection comes of a lost process, whose end is known within this time."""

T = TypeVar("T")


class Ranks:
    """A run that one process computes alone; what several do is in ``Team``."""

    rank = 0
    count = 1

    def meet(self) -> None:
        """Wait for all the others."""

    def share(self, batches: Sequence[T]) -> Sequence[T]:
        """Return what this process computes of a step's forward passes."""
        return batches[self.rank :: self.count]

    def summed(self, parameters: Sequence[nn.Parameter], total: Tensor) -> Tensor:
        """Give each parameter the sum of its gradients over all processes, and return that of ``total``."""
        return total

    def close(self) -> None:
        """End the others."""


ALONE = Ranks()


def team(run_dir: RunDir, options: Options) -> Ranks:
    """Return the processes that compute the run of a run directory, of which this is one.

    Rank 0 starts the others, which then import what they need while it prepares.

    Raises:
        NodeUnfit: There are fewer GPUs than processes.
    """
    if options.processes == 1:
        return ALONE
    gpus = torch.cuda.device_count()
    if gpus and gpus < options.processes:
        raise NodeUnfit(
            f"{options.processes} processes train this run together, but there are {gpus} GPUs here",
            "lower resources.gpus, or use nodes with as many",
        )
    return Team(run_dir, int(os.environ.get(RANK, "0")), options.processes)


class Team(Ranks):
    """Several processes."""

    def __init__(self, run_dir: RunDir, rank: int, count: int) -> None:
        self.rank, self.count = rank, count
        self._run_dir = run_dir
        self._over = threading.Event()
        self._others: list[TrainingProcess] = []
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # rank 0 decides when it is over
            return
        self._others = [TrainingProcess(TRAINER, {RANK: str(other)}) for other in range(1, count)]
        for process in self._others:
            process.begin(run_dir.root)
        threading.Thread(target=self._watch, name="ranks", daemon=True).start()

    def meet(self) -> None:
        from accelerate import PartialState
        from accelerate.utils import check_cuda_p2p_ib_support

        on_cpu = not torch.cuda.is_available()
        if not on_cpu and not check_cuda_p2p_ib_support():  # some consumer cards; accelerate insists on this
            os.environ |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
        with self._told():
            # Through a file: a free port is anybody's until it is taken.
            PartialState(
                cpu=on_cpu,
                init_method=f"file://{self._run_dir.root.absolute() / 'ranks'}",
                rank=self.rank,
                world_size=self.count,
                timeout=PATIENCE,
            )

    def summed(self, parameters: Sequence[nn.Parameter], total: Tensor) -> Tensor:
        from accelerate.utils import gather

        own = torch.cat([*(_gradient(parameter).reshape(-1) for parameter in parameters), total.reshape(1)])
        try:
            every = gather(own).reshape(self.count, -1)
        except RuntimeError:
            if self.rank == 0:
                time.sleep(END_S)  # meanwhile the end of the process that is gone becomes ours
            raise
        summed = every[0].clone()
        for other in every[1:]:
            summed += other
        *gradients, total = summed.split([*(parameter.numel() for parameter in parameters), 1])
        for parameter, gradient in zip(parameters, gradients, strict=True):
            _gradient(parameter).copy_(gradient.view_as(parameter))
        return total.reshape(())

    def close(self) -> None:
        from accelerate import PartialState

        self._over.set()
        for process in self._others:
            process.kill()
        # NCCL would wait for processes that are gone; its group ends with this process.
        if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
            torch.distributed.destroy_process_group()
        PartialState._reset_state()

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Tell accelerate who this is, as its launcher does; and not what this process starts later."""
        words = {
            "RANK": self.rank,
            "LOCAL_RANK": self.rank,
            "WORLD_SIZE": self.count,
            "LOCAL_WORLD_SIZE": self.count,
            "OMP_NUM_THREADS": torch.get_num_threads(),
        }
        told = {name: str(value) for name, value in words.items()}
        if sys.platform == "linux":
            told["GLOO_SOCKET_IFNAME"] = "lo"  # a host's own name may lead nowhere
        before = {name: os.environ.get(name) for name in told}
        os.environ |= told
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def _watch(self) -> None:
        while not self._over.wait(POLL_S):
            for rank, process in enumerate(self._others, 1):
                if code := process.exit_code:
                    self._end_as(rank, code)

    def _end_as(self, rank: int, code: int) -> None:
        """End this process as another one ended."""
        if self._over.is_set():
            return
        if code > 0:  # it said itself why
            os._exit(code)
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        message = f"process {rank + 1} of the {self.count} that train together was killed by {name}"
        append_event(self._run_dir.events, "error", type="ProcessLost", message=message, hint="")
        os.kill(os.getpid(), -code)
        time.sleep(POLL_S)
        os.kill(os.getpid(), signal.SIGKILL)


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad
