"""Asking runs to stop: through the controller where there is one, else straight into their logs."""

import time
from collections.abc import Sequence

from storage.errors import StorageError
from storage.ledger import append_until_said
from storage.log import RunLog, run_log
from storage.object_store import ObjectStore

from ..control.cluster import RemoteController
from ..control.lifecycle import CancelAsked, Policy, advance
from ..errors import OrchestrateError
from ..usual_store import store_flag


def ask_to_cancel(
    store: ObjectStore, run_ids: Sequence[str], controller: RemoteController | None, *, atomic: bool
) -> dict[str, str]:
    """Ask; returns what became of each run, for a person. A run that is over stays as it is.

    Raises:
        OrchestrateError: Only the controller may write to this store (not ``atomic``), and none is here.
        StorageError: One run could not be asked; all others were.
    """
    if controller is not None:
        controller.cancel(run_ids)
    elif not atomic and any(run_log(store, run_id).refresh().finished is None for run_id in run_ids):
        raise OrchestrateError(
            f"{store.url}: two writers could both win here, so only the controller may cancel — "
            f"give its cluster's --address, or start one with: orchestrate resume NAME{store_flag(store.url)}"
        )
    told, failed = {}, None
    for run_id in run_ids:
        try:
            told[run_id] = _asked(run_log(store, run_id), here=controller is not None)
        except StorageError as error:
            failed = failed or error
    if failed:
        raise failed
    return told


def _asked(log: RunLog, *, here: bool) -> str:
    """Ask a run, unless its controller is ``here`` and did; what became of it."""
    asked = CancelAsked(at=time.time())
    for _ in () if here else append_until_said(log, lambda state: advance(state, asked, Policy())):
        pass
    state = log.refresh()
    if state.finished:
        return state.finished.outcome.value
    return (
        "CANCELLING: its trainer saves itself and stops"
        if here
        else "CANCELLING: no controller was found, the next one that works on it stops it"
    )
