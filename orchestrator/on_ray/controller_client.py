"""The controller actor from outside: finding it, starting it, asking it."""

from collections.abc import Sequence
from typing import Any, cast

import ray
from ray.exceptions import GetTimeoutError, RayError

from ..control.cluster import Work
from ..control.placing import Outlook, SlotNote
from ..errors import NoAnswer, OrchestrateError
from .agent import NAMESPACE
from .controller_actor import ControllerActor, ControllerSetup, controller_name

# Every head has one of this resource, by Ray's convention, and no worker has. The controller must not go with
# a worker, which a soft node affinity allows when the head is busy for a moment, and must start again on a
# head that came back as another node, which a hard one forbids.
_ON_THE_HEAD = {"node:__internal_head__": 0.0001}


class ControllerClient:
    """Implements ``cluster.RemoteController`` over the actor, which may die and come back at any time."""

    def __init__(self, handle: Any, sweep: str) -> None:
        self._handle = handle
        self._sweep = sweep

    def training(self) -> dict[str, Work]:
        try:
            return cast(dict[str, Work], ray.get(self._handle.training.remote(), timeout=5.0))
        except RayError:
            return {}

    def cancel(self, run_ids: Sequence[str]) -> None:
        self._call("cancel", list(run_ids))

    def notes(self) -> tuple[SlotNote, ...]:
        try:
            return cast("tuple[SlotNote, ...]", ray.get(self._handle.notes.remote(), timeout=5.0))
        except RayError:
            return ()

    def outlook(self, run_id: str) -> Outlook | None:
        try:
            return cast("Outlook | None", ray.get(self._handle.outlook.remote(run_id), timeout=5.0))
        except RayError:
            return None

    def drain(self, node: str, grace_s: float | None) -> None:
        self._call("drain", node, grace_s)

    def append(self, run_id: str, body: bytes) -> str | None:
        return cast("str | None", self._call("append", run_id, body))

    def pid(self) -> int:
        """The actor's process."""
        return int(self._call("pid"))

    def setup(self) -> ControllerSetup:
        """What the actor was told when it was started."""
        return cast(ControllerSetup, self._call("setup"))

    def failure(self) -> str | None:
        """Wait until the controller works; returns why it never will, or None.

        Raises:
            OrchestrateError: It lives and does not work yet, for example because its store is away.
        """
        return cast("str | None", self._call("failure", waits=True))

    def _call(self, method: str, *arguments: object, waits: bool = False) -> Any:
        """``waits``: the method returns once it has something to say, so its silence means nothing."""
        try:
            return ray.get(getattr(self._handle, method).remote(*arguments), timeout=60.0)
        except RayError as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            # Any other error is Ray's own word, or the controller's: a new head would mend nothing.
            kind = NoAnswer if isinstance(error, GetTimeoutError) and not waits else OrchestrateError
            raise kind(
                f"the controller of {self._sweep} does not answer ({reason}) — try again in a minute"
            ) from error


def find_controller(sweep: str) -> ControllerClient | None:
    """Return the sweep's controller on the connected cluster, if there is one."""
    try:
        return ControllerClient(ray.get_actor(controller_name(sweep), namespace=NAMESPACE), sweep)
    except (ValueError, RayError):
        return None


def start_controller(setup: ControllerSetup) -> ControllerClient:
    """Start the sweep's controller, or find the one that is already there, and wait until it works.

    Raises:
        OrchestrateError: It does not come up, or the one that is there works on another store.
    """
    handle = (
        ray.remote(ControllerActor)
        .options(
            name=controller_name(setup.sweep),
            namespace=NAMESPACE,
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            max_concurrency=32,
            num_cpus=0,
            resources=_ON_THE_HEAD,
        )
        .remote(setup)
    )
    client = ControllerClient(handle, setup.sweep)
    there = client.setup()
    if there.store_url != setup.store_url:
        raise OrchestrateError(
            f"a sweep {setup.sweep} of another store ({there.store_url}) runs on this cluster — "
            "give this one another --name"
        )
    if there.scoped != setup.scoped:
        has = "scoped" if there.scoped else "env"
        raise OrchestrateError(
            f"the controller of {setup.sweep} that runs on this cluster was started with "
            f"storage.credentials: {has} — wait until it ends, or cancel it"
        )
    if failure := client.failure():
        raise OrchestrateError(f"the controller of {setup.sweep} cannot work: {failure}")
    return client
