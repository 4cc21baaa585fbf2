"""The checkpoints of one run in the store.

A checkpoint exists exactly when a record says so: ``publish`` uploads the files first and appends
``Committed`` last. Deleting goes the other way: ``retire`` in the log, then, after a grace period, ``reap``
deletes the data. A process may die at any point of either without a reader ever resolving to half a
checkpoint; what it left without a record is found by ``sweep_orphans``.
"""

import logging
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from . import layout, packing
from .errors import (
    Corrupt,
    Fenced,
    InvalidName,
    NotFound,
    StorageError,
    Unavailable,
)
from .garbage import rules as garbage
from .ledger import Ledger
from .local import (
    LocalCheckpoint,
    Manifest,
    check_listing,
    read_checkpoint,
    remove,
    seal,
    step_dir,
    temporary_dir,
    unreadable,
    verify,
)
from .object_store import FETCH_TRIES, ObjectStore
from .records import (
    CheckpointRef,
    Committed,
    Quarantined,
    Reaped,
    Retired,
    StoredFile,
)
from .run_state import RunState
from .uploading import Uploader

logger = logging.getLogger(__name__)


class CheckpointStore:
    """Publishes, fetches and deletes the checkpoints of one run.

    Args:
        ledger: The run's log, or whoever appends to it for this process.
        clock: Unix seconds for the records; shown to people, orders nothing.
        monotonic: Seconds, for the grace period and to measure the link by.
    """

    def __init__(
        self,
        store: ObjectStore,
        run_id: str,
        ledger: Ledger,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._run_id = layout.check_name("run", run_id)
        self._ledger = ledger
        self._clock = clock
        self._monotonic = monotonic
        self._retired_since: dict[CheckpointRef, float] = {}
        self._uploader = Uploader(store, monotonic=monotonic)

    @property
    def sent_bytes(self) -> int:
        """What was uploaded so far, as it was sent."""
        return self._uploader.sent_bytes

    def publish(
        self, local: LocalCheckpoint, attempt: int, incarnation: str, *, only: Collection[str] | None = None
    ) -> Committed:
        """Upload a local checkpoint and commit it. Publishing the same one twice commits it once.

        Args:
            only: Names of files to salvage: these alone are committed, and nothing will resume from them.
                Publishing the checkpoint as a whole afterwards sends the others, and takes its place.

        Raises:
            Corrupt: A file is not what its manifest says; nothing was committed.
            InvalidName: A name, the number of files or a tensor file is refused; nothing was uploaded.
            Fenced: The attempt may not commit (any more).
            AccessDenied, Unavailable: Not committed, or, after the upload, not known to be: publish it again.
        """
        manifest = local.manifest
        files = tuple(f for f in manifest.files if only is None or f.name in only)
        committed = Committed(
            attempt=attempt,
            incarnation=incarnation,
            step=manifest.step,
            files=files,
            metrics=manifest.metrics,
            final=manifest.final and only is None,
            resumable=only is None,
            at=self._clock(),
        )
        _check(local.path, committed)
        prefix = layout.checkpoint_prefix(self._run_id, attempt, incarnation, manifest.step)
        stored = self._uploader.upload(local, files, prefix)
        committed = committed.model_copy(update={"files": stored})
        try:
            self._ledger.append(committed)
        except Fenced:
            withdraw(self._store, self._run_id, self._ledger, prefix)
            raise
        if only is None:
            self._uploader.forget(prefix)
        return committed

    def upload_s(
        self, local: LocalCheckpoint, attempt: int, incarnation: str, *, only: Collection[str] | None = None
    ) -> float | None:
        """How long publishing will take by the uploads so far; None if there was none to measure."""
        files = [f for f in local.manifest.files if only is None or f.name in only]
        prefix = layout.checkpoint_prefix(self._run_id, attempt, incarnation, local.step)
        return self._uploader.expected_s(files, prefix)

    def fetch(self, checkpoint: Committed, target: Path) -> Path:
        """Download a checkpoint to a directory, which appears whole and verified, or not at all.

        A directory that is already there is used if it holds the same bytes, and replaced otherwise.

        Raises:
            Corrupt: A file is not what the record says, also when fetched again.
            NotFound: A file is not in the store.
            AccessDenied, Unavailable
        """
        layout.check_files(file.name for file in checkpoint.files)
        if _holds(target, checkpoint):
            return target
        try:
            self._fetch(checkpoint, target)
        except OSError as error:
            raise Unavailable(f"{error.filename or target}: {error.strerror or error}") from error
        return target

    def fetch_newest(
        self, state: RunState, target_root: Path, *, attempt: int | None = None
    ) -> tuple[Committed | None, Path | None]:
        """Fetch the checkpoint to resume from into ``target_root``; (None, None) if the run has none.

        One that cannot be used is quarantined in the name of ``attempt``, and the one before it is taken; but
        once only, for a second one rather shows that this node is damaged. One that was retired after
        ``state`` was read is no fault: the log is read again and what it says now is taken.

        Raises:
            Corrupt, NotFound, InvalidName: It cannot be used, and this attempt alone may not give it up:
                another node is to try. Without an attempt, nothing is ever given up.
            Fenced: The attempt is over.
            AccessDenied, Unavailable
        """
        while (newest := state.newest) is not None:
            try:
                return newest, self.fetch(newest, target_root / step_dir(newest.step))
            except (Corrupt, NotFound, InvalidName) as error:
                state = self._without(newest, error, attempt)
        return None, None

    def find(self, state: RunState, step: int) -> Committed:
        """Return the stored checkpoint of a step: the restorable one, or else what was salvaged of it.

        Raises:
            NotFound: There is none; the message lists the steps that there are. A checkpoint asked for by its
                step is never a fresh start.
        """
        for checkpoint in (*reversed(state.checkpoints), *reversed(state.salvaged)):
            if checkpoint.step == step:
                return checkpoint
        steps = ", ".join(str(c.step) for c in state.stored) or "none"
        raise NotFound(f"run {self._run_id} has no checkpoint of step {step}; there are: {steps}")

    def fetch_step(self, state: RunState, step: int, target_root: Path) -> tuple[Committed, Path]:
        """Fetch the checkpoint of a step into ``target_root``.

        Raises:
            Corrupt, NotFound, AccessDenied, Unavailable: See ``find`` and ``fetch``.
        """
        checkpoint = self.find(state, step)
        return checkpoint, self.fetch(checkpoint, target_root / step_dir(step))

    def retire(self, refs: Iterable[CheckpointRef]) -> RunState | None:
        """Record that these checkpoints may never be read again. Their data stays until ``reap``.

        Raises:
            Fenced: One is the newest, or not restorable.
        """
        checkpoints = tuple(refs)
        if not checkpoints:
            return None
        return self._ledger.append(Retired(checkpoints=checkpoints, at=self._clock()))

    def reap(self, state: RunState, *, grace_s: float = 0.0) -> RunState:
        """Delete the data of checkpoints retired for at least ``grace_s``, then record it.

        The time counts from when this object first saw them retired: a controller that restarts waits again,
        which costs space for a while and never cuts off a reader.
        """
        now = self._monotonic()
        self._retired_since = {c.ref: self._retired_since.get(c.ref, now) for c in state.retired}
        due = [c for c in state.retired if now - self._retired_since[c.ref] >= grace_s]
        if not due:
            return state
        self._store.delete(layout.committed_file(self._run_id, c, f.name) for c in due for f in c.files)
        return self._ledger.append(Reaped(checkpoints=tuple(c.ref for c in due), at=self._clock()))

    def sweep_orphans(self, state: RunState) -> int:
        """Delete uploaded data that no record names and none ever can; return how many objects that were.

        See ``garbage.rules.orphans``. Uploads that a dead node left half done are not objects yet, but cost
        as much: they go once the run is over.
        """
        listed = self._store.list(layout.data_prefix(self._run_id))
        orphans = [info.key for info in garbage.orphans(self._run_id, state, listed)]
        self._store.delete(orphans)
        if state.finished:
            self._store.abort_uploads(layout.data_prefix(self._run_id))
        return len(orphans)

    def _fetch(self, checkpoint: Committed, target: Path) -> None:
        temporary = temporary_dir(target.parent)
        try:
            for file in checkpoint.files:
                self._download(checkpoint, file, temporary)
            if target.exists():
                remove(target)
            seal(temporary, _manifest(checkpoint), target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _download(self, checkpoint: Committed, file: StoredFile, directory: Path) -> None:
        path = directory / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        key = layout.committed_file(self._run_id, checkpoint, file.name)
        for tries_left in reversed(range(FETCH_TRIES)):
            try:
                self._download_once(key, path, directory, file)
                return
            except Corrupt as error:
                if not tries_left:
                    raise Corrupt(f"{key} in {self._store.url}: {_reason(error, path)}") from error

    def _download_once(self, key: str, path: Path, directory: Path, file: StoredFile) -> None:
        if file.packed is None:
            self._store.download(key, path)
            verify(directory, [file])
            return
        scratch = temporary_dir(directory.parent)
        packed = scratch / file.packed.sha256
        try:
            self._store.download(key, packed)
            packing.unpack(packed, path, file)
        except Corrupt as error:  # a folder that is gone by now is no place
            raise Corrupt(_reason(error, packed)) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    def _without(self, unusable: Committed, error: StorageError, attempt: int | None) -> RunState:
        """Return the state after giving up on a checkpoint, or after learning that it was retired.

        Raises:
            Fenced: The attempt is over.
            StorageError: ``error``, if the checkpoint stays.
        """
        present = self._ledger.refresh()
        if attempt is not None and present.restorable(unusable.ref):
            said = Quarantined(checkpoint=unusable.ref, attempt=attempt, reason=str(error), at=self._clock())
            try:
                present = self._ledger.append(said)
            except Fenced:
                present = self._ledger.refresh()
                if present.running is None or present.running.number != attempt:
                    raise
        if present.restorable(unusable.ref):
            raise error
        logger.warning("%s: %s is not used: %s", self._run_id, unusable.ref, error)
        return present


def withdraw(store: ObjectStore, run_id: str, ledger: Ledger, prefix: str) -> None:
    """Delete what was uploaded under ``prefix`` and can never be committed any more, if that is possible.

    The controllers that tidied the run may all have looked before it arrived. What nobody can delete here, or
    whoever uploaded it did not live to, is left for ``gc``.
    """
    for _ in range(FETCH_TRIES):
        try:
            state = ledger.refresh()
            store.delete(info.key for info in garbage.orphans(run_id, state, store.list(prefix)))
        except Unavailable:
            continue
        except StorageError:
            return
        else:
            return


def _check(directory: Path, committed: Committed) -> None:
    """Refuse a checkpoint that no record could name, before anything of it is sent.

    Raises:
        InvalidName
    """
    try:
        check_listing(directory, [file.name for file in committed.files], committed.metrics)
    except OSError as error:
        raise unreadable(directory, error) from error


def _manifest(checkpoint: Committed) -> Manifest:
    """What the checkpoint's directory states, where every file is as it was written."""
    return Manifest(
        step=checkpoint.step,
        final=checkpoint.final,
        metrics=checkpoint.metrics,
        files=tuple(file.model_copy(update={"packed": None}) for file in checkpoint.files),
    )


def _holds(target: Path, checkpoint: Committed) -> bool:
    """Whether a directory already is this checkpoint, byte for byte."""
    try:
        there = read_checkpoint(target)
        if there is None or there.manifest != _manifest(checkpoint):
            return False
        verify(target, checkpoint.files)
    except (Corrupt, Unavailable, OSError):
        return False
    return True


def _reason(error: Corrupt, path: Path) -> str:
    return str(error).removeprefix(f"{path}: ")
