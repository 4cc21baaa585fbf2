"""The agent: one long-lived Ray actor per slot, that supervises training processes one after the other.

It keeps a *warm spare*, a training process that has already imported torch and waits for work, so that a run
starts without the seconds of importing. It answers ``report`` as a long poll: at once when something that a
controller acts on has changed, else after ``wait_s`` with the latest progress. It survives controllers, and
ends itself and its processes when its raylet is gone.

Only this module and ``ray_cluster``, ``controller_actor`` and ``local_ray`` know Ray.
"""

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

import ray

from storage.errors import AccessDenied, Fenced, Unavailable
from storage.ledger import Ledger
from storage.object_store import ObjectStore
from storage.scoped.grants import Caller
from storage.scoped.store import Ask, ScopedLedger, ScopedStore
from storage.snapshots import hinted_log
from storage.url import open_store
from trainer.config import RunSpec
from trainer.patience import one_line, patiently
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, EXIT_STORE_UNREACHABLE, EXIT_UNFIT, Options
from trainer.supervisor import Assignment, Progress, Supervisor

from ..control.appending import ArbitratedLedger
from ..control.cluster import Order, StoreSpeed, Work
from ..grid.schema import Notices
from ..grid.submission import read_spec
from ..notices.notice import Notice
from ..notices.sources import source_of
from ..notices.watcher import NoticeWatcher
from .canary import LOOKING, Canary, look, unfit
from .lineage import end_with_parent
from .metrics import AgentMetrics
from .scratch import own_scratch
from .spare import WarmSpare

NAMESPACE = "orchestrate"
TEND_S = 1.0
LOOK_S = 200.0
"""How long a first report waits until it is known whether the node is fit."""
_HARMLESS = frozenset({"AWS_CA_BUNDLE", "AWS_EC2_METADATA_DISABLED"})


@dataclass(frozen=True, slots=True, kw_only=True)
class AgentSetup:
    """What an agent is told once: nothing here is secret, Ray's dashboard may show it."""

    sweep: str
    name: str
    store_url: str
    options: Options
    arbiter: str | None
    """Name of the controller actor that appends for this agent: on stores without create-only, and if it is
    scoped."""
    scoped: bool = False
    """This agent holds no credentials: it reads and writes by what the controller grants."""
    notices: Notices = field(default_factory=Notices)
    """Who tells this node of its end."""
    check_gpu: bool = False
    """A run has a GPU for itself: it is tried before the first run gets it."""
    checkpoint_bytes: int = 0
    """The size of the largest checkpoint that the sweep has made so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """An agent's answer: ``version`` grows whenever something changed that a controller acts on."""

    version: int
    work: Work | None
    node_id: str
    up_since: float
    notice: Notice | None = None
    """What the node was told of its own end."""
    unheard: str = ""
    """Why it cannot hear what is announced of it."""
    unfit: str = ""
    """Why nothing can be trained here now."""
    speed: StoreSpeed | None = None
    """Between this node and the store, as it was last tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Asked:
    """The attempt that is held was asked to stop, for this reason if it is a notice."""

    at: float
    notice: Notice | None = None


class _Unfit(Exception):
    """Nothing can be trained on this node now."""


def attempt_name(sweep: str, of: Order | Work) -> str:
    """What an attempt is called wherever Ray shows it."""
    return f"lora/{sweep}/{of.run_id}#a{of.attempt}"


class Agent:
    """One slot. Its methods return at once, but for ``report``."""

    def __init__(self, setup: AgentSetup) -> None:
        self._setup = setup
        self._order: Order | None = None  # first: Ray asks for our name also when what follows fails
        if setup.scoped:
            forget_credentials()
        self._store = None if setup.scoped else open_store(setup.store_url)
        self._scratch = own_scratch()
        self._node_id: str = ray.get_runtime_context().get_node_id()
        self._up_since = time.time()
        self._changed = threading.Condition()
        self._version = 0
        self._supervisor: Supervisor | None = None
        self._final: Progress | None = None
        self._spare = WarmSpare(self._scratch, check_gpu=setup.check_gpu)
        self._metrics = AgentMetrics(setup.sweep)
        self._training: Order | None = None
        """The last order that was seen to make its first step."""
        self._orders: list[Order] = []
        self._closed = False
        self._asked: _Asked | None = None
        self._stop_by: dict[tuple[str, int], float] = {}
        """Attempts that were asked to stop before there was a supervisor to tell."""
        self._stopping = threading.Event()
        """The attempt that is held is to end."""
        self._notices = NoticeWatcher(source_of(setup.notices), self._on_notice)
        self._speed: StoreSpeed | None = None
        self._canary = Canary(self._ask_canary, self._on_fitness)
        # One thread starts every process: a training process dies with the pipe we hold, not with a thread,
        # but an orderly hand-over from spare to run needs a single owner.
        threading.Thread(target=self._serve, name="serve", daemon=True).start()
        # A worker of a killed raylet may run on, and would train unseen.
        threading.Thread(target=end_with_parent, args=(os.getppid(),), name="raylet", daemon=True).start()
        self._notices.start()
        self._canary.start()

    def __repr__(self) -> str:
        # Ray's Actors page asks once, when there is no order yet.
        return attempt_name(self._setup.sweep, self._order) if self._order else self._setup.name

    def start(self, order: Order) -> None:
        """Train this attempt, unless it is the one already held."""
        with self._changed:
            if order == self._order or order in self._orders:
                return
            self._orders.append(order)
            self._changed.notify_all()

    def stop(self, run_id: str, attempt: int, grace_s: float) -> None:
        """Ask the attempt to save itself and end. One that is not held any more is left alone."""
        asked = (run_id, attempt)
        with self._changed:
            order = self._order
            if order and self._final is None and (order.run_id, order.attempt) == asked:
                self._asked = self._asked or _Asked(at=time.time())
                self._stopping.set()
                if self._supervisor:
                    self._supervisor.stop(grace_s)
                    return
            elif not any((order.run_id, order.attempt) == asked for order in self._orders):
                return
            by = time.monotonic() + grace_s
            self._stop_by[asked] = min(by, self._stop_by.get(asked, by))

    def report(self, known_version: int, wait_s: float) -> Report:
        """Return the work held, waiting up to ``wait_s`` for something newer than ``known_version``.

        The first waits until this node was looked at: who has not reported gets no run.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._unfit != LOOKING, timeout=LOOK_S)
            self._changed.wait_for(lambda: self._version != known_version, timeout=wait_s)
            return Report(
                version=self._version,
                work=self._work(),
                node_id=self._node_id,
                up_since=self._up_since,
                notice=self._notices.notice,
                unheard=self._notices.unheard,
                unfit=self._unfit,
                speed=self._speed,
            )

    def close(self) -> None:
        """End whatever runs; the actor itself is killed by its cluster afterwards."""
        with self._changed:
            self._closed = True
            supervisor = self._supervisor
        if supervisor:
            supervisor.stop(0.0)
        self._spare.kill()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _serve(self) -> None:
        try:
            self._spare.renew()
            while True:
                while not self._ordered():
                    if self._closed:
                        return
                    self._tend_spare()
                with self._changed:
                    order = self._orders.pop(0)
                    self._order, self._final, self._supervisor, self._asked = order, None, None, None
                    self._stopping = threading.Event()
                    if (order.run_id, order.attempt) in self._stop_by:
                        self._asked = _Asked(at=time.time())
                        self._stopping.set()
                    self._bump()
                self._say("begins")
                self._train(order)
        except BaseException:  # no process can be started or reaped: a slot that serves nobody must not live
            logging.getLogger(__name__).exception("the agent ends")
            os._exit(1)

    def _train(self, order: Order) -> None:
        self._metrics.attempt_started()
        try:
            if self._unfit:
                raise _Unfit(self._unfit)
            self._obey_notice()
            store, ledger = self._access(order)
            spec = patiently(lambda: read_spec(store, order.run_id), self._stopping)
            supervisor = self._supervise(order, spec, store, ledger)
            with self._changed:
                self._supervisor = supervisor
                by = self._stop_by.pop((order.run_id, order.attempt), None)
                if by is not None:
                    supervisor.stop(max(0.0, by - time.monotonic()))
            self._obey_notice()  # which may have come while the order was on its way
            final = self._judged(supervisor.run())
        except _Unfit as error:  # the order was on its way when that was found
            final = Progress(exit_code=EXIT_UNFIT, error=one_line(str(error)))
        except (Unavailable, AccessDenied) as error:
            said = one_line(f"{type(error).__name__}: {error}")
            final = Progress(exit_code=EXIT_STORE_UNREACHABLE, error=said)
            if self._stopping.is_set():  # that is why it was given up
                final = Progress(exit_code=EXIT_PREEMPTED)
        except Fenced as error:  # a late order: what a scoped agent asks for is refused at once
            final = Progress(exit_code=EXIT_PREEMPTED, error=one_line(str(error)), superseded=True)
        except Exception as error:  # the slot must survive whatever one run does to it
            final = Progress(exit_code=1, error=one_line(f"{type(error).__name__}: {error}"))
        if final.superseded:
            self._metrics.fenced()
        self._say(f"ends with code {final.exit_code} at step {final.step} {final.error}".rstrip())
        if final.exit_code not in (EXIT_COMPLETE, EXIT_PREEMPTED):
            self._canary.again()
        if final.exit_code != EXIT_UNFIT:
            self._spare.renew()  # imports while the controller decides what comes next
        with self._changed:
            self._final = final
            self._stop_by.pop((order.run_id, order.attempt), None)
            self._bump()

    def _judged(self, final: Progress) -> Progress:
        """The node is at fault if the process never came to say that its GPU works, or cannot be killed."""
        assert final.exit_code is not None
        if final.exit_code != EXIT_UNFIT and (final.superseded or self._stopping.is_set()):
            return final
        if not (problem := self._spare.ended(final.exit_code)):
            return final
        said = final.error if final.exit_code == EXIT_UNFIT and final.error else problem
        return replace(final, exit_code=EXIT_UNFIT, error=one_line(said))

    def _say(self, what: str) -> None:
        """Write a line to this actor's log, whose lines Ray labels by the last ``:actor_name:`` in it."""
        print(f":actor_name:{self!r}\n{self!r} {what}", flush=True)

    def _supervise(self, order: Order, spec: RunSpec, store: ObjectStore, ledger: Ledger) -> Supervisor:
        process = self._spare.take()
        if process is None:
            raise _Unfit("the process that tried its GPU has ended")
        return Supervisor(
            store,
            Assignment(run_id=order.run_id, attempt=order.attempt, incarnation=order.incarnation),
            spec,
            self._setup.options,
            scratch=self._scratch,
            ledger=ledger,
            process=process,
            on_change=self._on_progress,
            find=store.find if isinstance(store, ScopedStore) else None,
        )

    def _ordered(self) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._orders), timeout=TEND_S)

    def _tend_spare(self) -> None:
        before = self._unfit
        self._spare.tend(time.monotonic())
        if self._unfit != before:
            self._on_fitness()

    def _ask_canary(self) -> str:
        sight = look(self._store, self._setup.sweep, self._scratch)
        self._speed = sight.speed
        return unfit(sight, self._setup.checkpoint_bytes)

    @property
    def _unfit(self) -> str:
        problems = [problem for problem in (self._spare.problem, self._canary.problem) if problem]
        return min(problems, key=lambda problem: problem == LOOKING, default="")  # rather what is known

    def _on_fitness(self) -> None:
        with self._changed:
            self._bump()

    def _access(self, order: Order) -> tuple[ObjectStore, Ledger]:
        """The store and the run's log, as this agent may use them for one attempt."""
        arbiter, run_id = self._setup.arbiter, order.run_id
        if self._store is None:
            assert arbiter is not None
            ask = asking(arbiter)
            caller = Caller(
                run_id=run_id,
                attempt=order.attempt,
                incarnation=order.incarnation,
                slot=self._setup.name,
            )
            scoped = ScopedStore(self._setup.store_url, ask, caller)
            return scoped, ScopedLedger(ask, caller, scoped)
        if arbiter is None:
            return self._store, hinted_log(self._store, run_id)
        return self._store, ArbitratedLedger(hinted_log(self._store, run_id), run_id, appending(arbiter))

    def _on_notice(self, notice: Notice | None) -> None:
        self._obey_notice()
        with self._changed:
            self._bump()

    def _obey_notice(self) -> None:
        """Let the attempt that is held save itself and end, if the node is about to."""
        notice = self._notices.notice
        if notice is None or not notice.soon:
            return
        with self._changed:
            supervisor = self._supervisor
            if self._order is None or self._final:
                return
            self._stopping.set()
            if supervisor is None:
                return
            self._asked = self._asked or _Asked(at=time.time(), notice=notice)
        supervisor.stop(notice.grace_s)

    def _on_progress(self, progress: Progress) -> None:
        with self._changed:
            order = self._order
            if order is None:
                return
            if progress.first_step_at is not None and self._training != order:
                self._training = order
                self._bump()
        self._metrics.stepped(order.run_id, progress.step, progress.resumed_from, progress.loss)
        self._metrics.stored(order.run_id, progress.storing)

    def _work(self) -> Work | None:
        if self._order is None:
            return None
        progress = self._final or (self._supervisor.progress if self._supervisor else Progress())
        asked, saved_at = self._asked, progress.storing.committed_at
        return Work(
            run_id=self._order.run_id,
            attempt=self._order.attempt,
            step=progress.step,
            resumed_from=progress.resumed_from,
            first_step_at=progress.first_step_at,
            step_s=progress.step_s,
            loss=progress.loss,
            exit_code=self._final.exit_code if self._final else None,
            error=progress.error,
            evidence=progress.evidence,
            superseded=progress.superseded,
            asked=asked is not None,
            notice=asked.notice if asked else None,
            saved_s=saved_at - asked.at if asked and saved_at >= asked.at else None,
        )

    def _bump(self) -> None:
        self._version += 1
        self._changed.notify_all()


def appending(arbiter: str) -> Callable[[str, bytes], str | None]:
    """Asks the controller to append. One that does not answer is ``Unavailable``: the caller tries again."""
    return lambda run_id, body: cast("str | None", _called(arbiter, "append", run_id, body, timeout_s=60.0))


def asking(arbiter: str) -> Ask:
    """Carries a scoped agent's requests to the controller. Verifying a commit may take it a while."""
    return lambda body: bytes(_called(arbiter, "grant", body, timeout_s=300.0))


def forget_credentials() -> None:
    """Remove what names or holds a bucket's keys from this process, and from those that it starts.

    A node that nobody trusts has none to begin with. On a machine that has some, as a test's, nothing falls
    back on them.
    """
    for name in [name for name in os.environ if name.startswith("AWS_") and name not in _HARMLESS]:
        del os.environ[name]


def _called(arbiter: str, method: str, *arguments: object, timeout_s: float) -> Any:
    try:
        controller = ray.get_actor(arbiter, namespace=NAMESPACE)
        return ray.get(getattr(controller, method).remote(*arguments), timeout=timeout_s)
    except (ray.exceptions.RayError, ValueError, TimeoutError) as error:
        raise Unavailable(f"the controller {arbiter} cannot be reached: {type(error).__name__}") from error
