"""From a sweep in the store to a controller that works on it: connecting, probing, starting."""

import os
from typing import TYPE_CHECKING

from storage.object_store import ObjectStore

from ..errors import NoAnswer, PreflightFailed, Problem
from ..grid.sweep import Sweep
from ..on_ray import local_ray

if TYPE_CHECKING:
    from ..on_ray.controller_client import ControllerClient


def connect(address: str | None, *, insecure: bool = False) -> str:
    """Connect to the Ray cluster at ``address``, else to the local one, which is started if need be.

    Returns:
        The address, for messages.

    Raises:
        PreflightFailed: There is no cluster at that address, or anybody could use it.
        NoAnswer: There is something, which does nothing.
    """
    address = local_ray.meant(address) if address else None
    if address is None:
        address = local_ray.find_or_start().address
    elif not (insecure or local_ray.is_local(address) or os.environ.get("RAY_AUTH_MODE") == "token"):
        hint = "set RAY_AUTH_MODE=token there and here (docs.ray.io, token authentication), or say --insecure"
        message = f"the Ray cluster at {address} would run anybody's code: authentication is off"
        raise PreflightFailed([Problem(code="E2603", message=message, hint=hint)])
    try:
        local_ray.connect(address)
    except local_ray.Deaf as error:
        raise NoAnswer(
            f"the Ray cluster at {address} does not answer: {error} — start its head anew"
        ) from error
    except (ConnectionError, RuntimeError, ValueError) as error:
        hint = "check the address and the token (RAY_AUTH_MODE=token), or leave --address out"
        problem = Problem(code="E2601", message=f"no Ray cluster answers at {address}: {error}", hint=hint)
        raise PreflightFailed([problem]) from error
    return address


def unseen_folder(store: ObjectStore) -> Problem | None:
    """Return a warning if the store is a folder, and the connected cluster spans machines."""
    from ..on_ray.ray_cluster import machines

    count = machines()
    if not store.url.startswith("file:") or count < 2:
        return None
    message = f"{store.url} is a folder, and the cluster has {count} machines"
    return Problem(code="W2604", message=message, hint="all of them must see it, by NFS for example")


def check_resources(sweep: Sweep) -> None:
    """Refuse a sweep that no node of the connected cluster could ever run.

    Raises:
        PreflightFailed: With what a run needs and what the nodes have.
    """
    if problem := missing_resources(sweep):
        raise PreflightFailed([problem])


def missing_resources(sweep: Sweep) -> Problem | None:
    """Return what a run needs and what the nodes have, if no node there is now has room for one."""
    from ..on_ray.ray_cluster import shortfall

    have = shortfall(sweep.resources)
    if have is None:
        return None
    need = f"gpus: {sweep.resources.gpus:g}, cpus: {sweep.resources.cpus:g}"
    hint = "set resources.gpus to 0 to train on CPUs" if sweep.resources.gpus else "lower resources.cpus"
    message = f"no node has what a run needs ({need}); there is {have or 'none'}"
    return Problem(code="E2602", message=message, hint=hint)


def refuse_scoped(sweep: Sweep, store_url: str, *, arbitrated: bool) -> None:
    """Refuse a sweep whose nodes are to hold no credentials, on a store that cannot do without.

    Raises:
        PreflightFailed: With what the store lacks.
    """
    if arbitrated and sweep.storage.credentials == "scoped":
        message = f"credentials: scoped needs a store with create-only, which {store_url} does not keep"
        hint = "use another store, or credentials: env"
        raise PreflightFailed([Problem(code="E2605", message=message, hint=hint)])


def start(sweep: Sweep, store_url: str, *, arbitrated: bool) -> "ControllerClient":
    """Start the sweep's controller on the connected cluster, or find the one there.

    Raises:
        PreflightFailed: Nodes are to hold no credentials, and the store cannot do without.
        OrchestrateError: See ``controller_client.start_controller``.
    """
    refuse_scoped(sweep, store_url, arbitrated=arbitrated)
    scoped = sweep.storage.credentials == "scoped"
    from ..on_ray.controller_actor import ControllerSetup
    from ..on_ray.controller_client import start_controller

    return start_controller(
        ControllerSetup(sweep=sweep.name, store_url=store_url, arbitrated=arbitrated, scoped=scoped)
    )


def find_controller(sweep: str) -> "ControllerClient | None":
    """Return the sweep's controller on the connected cluster, if there is one."""
    from ..on_ray.controller_client import find_controller as find

    return find(sweep)
