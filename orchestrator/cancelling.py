"""Asking runs to stop: through the controller where there is one, else straight into their logs."""

import time
from collections.abc import Sequence

from storage.log import run_log
from storage.object_store import ObjectStore

from .cluster import RemoteController
from .errors import OrchestrateError
from .lifecycle import CancelAsked, Policy, advance


def ask_to_cancel(
    store: ObjectStore, run_ids: Sequence[str], controller: RemoteController | None, *, atomic: bool
) -> dict[str, str]:
    """Ask; returns what became of each run, for a person. A run that is over stays as it is.

    Raises:
        OrchestrateError: Only the controller may write to this store (not ``atomic``), and none is here.
    """
    states = {run_id: run_log(store, run_id).refresh() for run_id in run_ids}
    if controller is None and not atomic and any(state.finished is None for state in states.values()):
        raise OrchestrateError(
            f"{store.url}: two writers could both win here, so only the controller may cancel — "
            "give its cluster's --address, or start one with: orchestrate resume"
        )
    if controller is not None:
        controller.cancel(run_ids)
    told = {}
    for run_id in run_ids:
        log = run_log(store, run_id)
        state = log.refresh()
        for record in () if controller else advance(state, CancelAsked(at=time.time()), Policy()):
            state = log.append(record)
        if state.finished:
            told[run_id] = state.finished.outcome.value
        else:
            told[run_id] = (
                "CANCELLING: its trainer saves itself and stops"
                if controller
                else "CANCELLING: no controller was found, the next one that works on it stops it"
            )
    return told
