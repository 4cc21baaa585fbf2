"""The controller as a detached, named Ray actor, which Ray starts again when it dies."""

import gc
import logging
import os
import threading
import time
from dataclasses import dataclass

import ray

from storage.errors import (
    AccessDenied,
    Fenced,
    StorageError,
    Unavailable,
)
from storage.records import RECORD
from storage.scoped.desk import GrantDesk
from storage.url import open_store
from trainer.interval import Lifetimes, learned, lives
from trainer.rundir import Options

from ..control.cluster import Work
from ..control.controller import Controller
from ..control.placing import Outlook, SlotNote
from ..control.term import SteppedDown, Term
from ..errors import OrchestrateError
from ..grid.submission import load_submitted
from .agent import AgentSetup
from .granting import Unenforced, check_store, desk_for
from .metrics import ControllerMetrics
from .ray_cluster import RayCluster

LINGER_S = 3.0
"""Between the last run's end, or a failed start, and the actor's: whoever waits gets the last word."""

RETRY_S = 2.0
LONGEST_REST_S = 0.5
"""However long a tick was: at the start it reads every log."""
METRICS_EVERY_S = 5.0

logger = logging.getLogger(__name__)


def controller_name(sweep: str) -> str:
    return f"lora/{sweep}/controller"


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerSetup:
    """What the controller is told: where the truth is, and who may append to it."""

    sweep: str
    store_url: str
    arbitrated: bool
    """The store has no dependable create-only: this actor appends for all agents."""
    scoped: bool = False
    """Agents hold no credentials: they get signed requests here, and their commits are verified here."""


class ControllerActor:
    """Ticks until every run of the sweep is over, then dismisses its agents and itself.

    What can fail happens on its thread: an actor whose constructor raises would be started again for ever.
    """

    def __init__(self, setup: ControllerSetup) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
        self._setup = setup
        self._cluster: RayCluster | None = None
        self._controller: Controller | None = None
        self._desk: GrantDesk | None = None
        self._price_per_hour: float | None = None
        self._failure: str | None = None
        self._ready = threading.Event()
        context = ray.get_runtime_context()
        self._handle = context.current_actor
        self._address = str(context.gcs_address)
        self._restarted = context.was_current_actor_reconstructed
        threading.Thread(target=self._run, name="controller", daemon=True).start()

    def __repr__(self) -> str:
        return controller_name(self._setup.sweep)  # Ray's Actors page asks once, before there is news

    def setup(self) -> ControllerSetup:
        """What this controller was told."""
        return self._setup

    def failure(self) -> str | None:
        """Wait until the controller works; returns why it never will, or None."""
        self._ready.wait()
        return self._failure

    def append(self, run_id: str, body: bytes) -> str | None:
        """Append an agent's record; returns why the log refuses it, or None."""
        if self._setup.scoped:
            return "storage.credentials is scoped: what a node says is verified before it is appended"
        try:
            self._working().append(run_id, RECORD.validate_json(body))
        except Fenced as error:
            return str(error)
        return None

    def grant(self, body: bytes) -> bytes:
        """Answer a scoped agent (``storage.scoped.grants``). What goes back may be secret: nobody logs it."""
        self._working()
        if self._desk is None:
            raise OrchestrateError("storage.credentials is not scoped: nothing is granted here")
        return self._desk.answer(body)

    def cancel(self, run_ids: list[str]) -> None:
        self._working().cancel(run_ids)

    def notes(self) -> tuple[SlotNote, ...]:
        """What is thought of each slot."""
        return self._controller.notes() if self._controller else ()

    def outlook(self, run_id: str) -> Outlook | None:
        """What is thought of a run."""
        return self._controller.outlook(run_id) if self._controller else None

    def drain(self, node: str, grace_s: float | None) -> None:
        self._working().drain(node, grace_s)

    def training(self) -> dict[str, Work]:
        """What slots hold right now, by run, as last heard."""
        slots = self._cluster.slots if self._cluster else ()
        return {slot.work.run_id: slot.work for slot in slots if slot.work}

    def pid(self) -> int:
        """This process, for tests."""
        return os.getpid()

    def _working(self) -> Controller:
        self._ready.wait()
        if self._controller is None:
            raise OrchestrateError(self._failure or "the controller has not started")
        return self._controller

    def _run(self) -> None:
        try:
            controller, cluster = self._prepare()
        except (OrchestrateError, StorageError) as error:
            logger.error("%s", error)
            self._failure = str(error)
        except Exception as error:  # whoever waits for this actor would wait for ever
            logger.exception("the controller cannot start")
            self._failure = f"{type(error).__name__}: {error}"
        else:
            self._ready.set()
            try:
                self._work(controller)
                cluster.close()
            except Exception:
                logger.exception("the controller ends")
        self._ready.set()
        time.sleep(LINGER_S)
        ray.kill(self._handle)

    def _prepare(self) -> tuple[Controller, RayCluster]:
        """Take office and read the sweep, waiting for a store that is away."""
        setup = self._setup
        store = open_store(setup.store_url, check_then_put=setup.arbitrated)
        while True:
            try:
                sweep = load_submitted(store, setup.sweep)
                if setup.scoped:
                    check_store(store)
                term = Term(store, setup.sweep, self._address)
                break
            except Unavailable as error:
                logger.warning("%s; trying again", error)
            except (AccessDenied, Unenforced) as error:
                if not self._restarted:
                    raise
                # Agents train on, and nothing is granted: a person may renew credentials, and a store that
                # passed when the sweep began may have given one strange answer.
                logger.warning("%s; trying again", error)
            time.sleep(RETRY_S)
        self._price_per_hour = sweep.resources.price_per_hour
        options = Options(
            checkpoint=sweep.checkpoint.policy,
            threads=int(sweep.resources.cpus),
            micro_batch=sweep.resources.micro_batch,
            processes=sweep.resources.processes,
            stall_timeout_s=sweep.recovery.stall_timeout_s,
        )

        def agent_setup(name: str) -> AgentSetup:
            return AgentSetup(
                sweep=setup.sweep,
                name=name,
                store_url=setup.store_url,
                options=options.model_copy(update={"lifetimes": self._lifetimes()}),
                arbiter=controller_name(setup.sweep) if setup.arbitrated or setup.scoped else None,
                scoped=setup.scoped,
                notices=sweep.resources.notices,
                check_gpu=sweep.resources.gpus >= 1,
                checkpoint_bytes=self._checkpoint_bytes(),
            )

        self._cluster = RayCluster(setup.sweep, sweep.resources, agent_setup)
        controller = Controller(sweep, store, self._cluster, term=term)
        self._cluster.unused = controller.unused
        self._desk = desk_for(sweep, controller, store) if setup.scoped else None
        self._controller = controller
        return self._controller, self._cluster

    def _checkpoint_bytes(self) -> int:
        """The size of the largest of the runs' newest checkpoints."""
        states = self._controller.states.values() if self._controller else ()
        newest = (state.newest for state in states if state.newest)
        return max((sum(file.size_bytes for file in c.files) for c in newest), default=0)

    def _lifetimes(self) -> Lifetimes:
        """How long nodes live, for an agent that starts now."""
        states = self._controller.states.values() if self._controller else ()
        return learned(lives(states, time.time()))

    def _work(self, controller: Controller) -> None:
        metrics, measured_at = ControllerMetrics(self._setup.sweep, self._price_per_hour), float("-inf")
        settled = False
        while not controller.done:
            try:
                used_s = time.thread_time()
                controller.tick()
                # With a thousand agents there always is news: half of a core, and no more, is for hearing it.
                time.sleep(min(time.thread_time() - used_s, LONGEST_REST_S))
                if controller.begun and not settled:
                    settled = True
                    gc.collect()
                    gc.freeze()  # thousands of runs stay: looking through them again held up a tick for 0.1 s
                if time.monotonic() - measured_at >= METRICS_EVERY_S:
                    measured_at = time.monotonic()
                    metrics.observe(controller.states, controller.notes(), time.time())
            except SteppedDown as error:
                logger.warning("%s: this one steps down", error)
                return
            except Exception:  # a bug must not end a sweep that others could still finish
                logger.exception("tick failed; trying again")
                time.sleep(1.0)
        metrics.observe(controller.states, controller.notes(), time.time())
        logger.info("every run of %s is over", self._setup.sweep)
