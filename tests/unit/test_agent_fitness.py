"""An agent that finds its node unfit: what it reports, and what becomes of an order. Ray takes no part."""

import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from support import light_trainer
from support.runs import claimed, incarnation
from support.waiting import DEADLINE_S, wait_until

from orchestrator.control.cluster import Order
from orchestrator.grid.schema import Notices
from orchestrator.on_ray import agent as agents
from orchestrator.on_ray.agent import Agent, AgentSetup
from orchestrator.on_ray.canary import Canary
from orchestrator.on_ray.spare import WarmSpare
from storage import layout
from storage.errors import Unavailable
from storage.log import run_log
from storage.memory import MemoryStore
from storage.url import open_store
from trainer.config import Base, Dataset, RunSpec
from trainer.rundir import EXIT_COMPLETE, EXIT_PREEMPTED, EXIT_UNFIT, GPU_CHECK, Options
from trainer.training_process import TrainingProcess

RUN = "cat-0-00000000"
NO_GPU = f"import os; open(os.environ['{GPU_CHECK}'], 'w').write('no GPU'); os._exit({EXIT_UNFIT})"
ORDER = Order(run_id=RUN, attempt=1, incarnation=incarnation(1))
Start = Callable[..., Agent]


@pytest.fixture
def store(tmp_path: Path) -> MemoryStore:
    store = open_store(f"memory://{tmp_path.name.replace('_', '-')[:40]}")
    assert isinstance(store, MemoryStore)
    spec = RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data"))
    store.put(layout.run_spec(RUN), spec.model_dump_json().encode())
    run_log(store, RUN).append(claimed(1))
    return store


@pytest.fixture
def start(store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    context = SimpleNamespace(get_node_id=lambda: "node")
    metrics = SimpleNamespace(
        **dict.fromkeys(("attempt_started", "stepped", "stored", "fenced"), lambda *anything: None)
    )
    monkeypatch.setattr(agents.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(agents, "AgentMetrics", lambda sweep: metrics)
    monkeypatch.setattr(agents, "own_scratch", lambda: tmp_path)
    monkeypatch.setattr(agents, "TEND_S", 0.01)
    monkeypatch.setattr(agents, "Canary", partial(Canary, pause_s=0.01))
    begun: list[Agent] = []

    def make(
        *arguments: str,
        check_gpu: bool = False,
        notices: Notices = Notices(service="none"),  # noqa: B008
    ) -> Agent:
        def process(extra: dict[str, str]) -> TrainingProcess:
            return TrainingProcess((sys.executable, *arguments), extra)

        monkeypatch.setattr(agents, "WarmSpare", partial(WarmSpare, make=process))
        setup = AgentSetup(
            sweep="cat",
            name="slot",
            store_url=store.url,
            options=Options(),
            arbiter=None,
            check_gpu=check_gpu,
            notices=notices,
        )
        begun.append(Agent(setup))
        return begun[-1]

    yield make
    for agent in begun:
        agent.close()


def unfit(agent: Agent) -> str:
    return agent.report(-1, 0.0).unfit


def ended(agent: Agent) -> int | None:
    work = agent.report(-1, 0.0).work
    return work.exit_code if work else None


def trains(agent: Agent) -> bool:
    work = agent.report(-1, 0.0).work
    return work is not None and (work.first_step_at is not None or work.exit_code is not None)


def asked(agent: Agent) -> bool:
    work = agent.report(-1, 0.0).work
    return work is not None and work.asked


def test_an_agent_says_why_its_node_is_unfit_and_trains_once_it_is_not(
    start: Start, store: MemoryStore
) -> None:
    agent = start(light_trainer.__file__, "steps")
    wait_until(lambda: "sees no sweep cat" in unfit(agent), "the store is found wanting")
    version = agent.report(-1, 0.0).version

    store.put(layout.sweep_spec("cat"), b"{}")
    wait_until(lambda: unfit(agent) == "", "it is fit again")
    assert agent.report(-1, 0.0).version > version, "a controller hears of it at once"

    agent.start(ORDER)
    wait_until(lambda: ended(agent) == EXIT_COMPLETE, "it has trained")
    assert run_log(store, RUN).refresh().result is not None


def test_a_stop_reaches_an_attempt_that_waits_for_its_spec(
    start: Start, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(layout.sweep_spec("cat"), b"{}")
    tries: list[str] = []

    def away(store: MemoryStore, run_id: str) -> RunSpec:
        tries.append(run_id)
        raise Unavailable("no route to host")

    monkeypatch.setattr(agents, "read_spec", away)
    agent = start(light_trainer.__file__, "forever")
    assert unfit(agent) == ""
    agent.start(ORDER)
    wait_until(lambda: bool(tries), "it asks for the spec")
    agent.stop(RUN, 2, 600.0)
    assert not agent._stopping.is_set(), "another attempt is meant"

    agent.stop(RUN, 1, 600.0)

    wait_until(lambda: ended(agent) is not None, "it ends")
    assert ended(agent) == EXIT_PREEMPTED


def test_a_stop_that_comes_before_the_supervisor_is_there_is_kept_for_it(
    start: Start, store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.put(layout.sweep_spec("cat"), b"{}")
    entered, go_on = threading.Event(), threading.Event()
    ordinary = agents.read_spec

    def slow(store: MemoryStore, run_id: str) -> RunSpec:
        entered.set()
        assert go_on.wait(DEADLINE_S)
        return ordinary(store, run_id)

    monkeypatch.setattr(agents, "read_spec", slow)
    agent = start(light_trainer.__file__, "forever")
    assert unfit(agent) == ""
    agent.start(ORDER)
    assert entered.wait(DEADLINE_S)

    agent.stop(RUN, 1, 600.0)
    go_on.set()

    wait_until(lambda: ended(agent) is not None, "it ends")
    assert ended(agent) == EXIT_PREEMPTED


def test_an_order_for_a_node_without_a_gpu_ends_at_once_and_says_why(
    start: Start, store: MemoryStore
) -> None:
    store.put(layout.sweep_spec("cat"), b"{}")
    agent = start("-c", NO_GPU, check_gpu=True)
    assert unfit(agent) == "no GPU", "the first answer waits for the verdict"
    agent.start(ORDER)

    wait_until(lambda: ended(agent) == EXIT_UNFIT, "the order is given back")

    work = agent.report(-1, 0.0).work
    assert work is not None
    assert work.error == "no GPU"
    assert unfit(agent) == "no GPU"


def test_an_attempt_trains_on_under_a_notice_for_later_until_it_is_brought_forward(
    start: Start, store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.notices.watcher.POLL_S", 0.01)
    store.put(layout.sweep_spec("cat"), b"{}")
    notice = tmp_path / "ending"
    notice.write_text("3600")
    agent = start(light_trainer.__file__, "forever", notices=Notices(file=str(notice)))
    wait_until(lambda: agent.report(-1, 0.0).notice is not None, "the notice is heard")
    wait_until(lambda: unfit(agent) == "", "the node is fit")
    agent.start(ORDER)

    wait_until(lambda: trains(agent), "it trains")
    assert ended(agent) is None, "it was stopped an hour before the end of its node"

    nearer = tmp_path / "nearer"
    nearer.write_text("60")
    nearer.rename(notice)
    wait_until(lambda: ended(agent) is not None, "it has saved itself")
    work = agent.report(-1, 0.0).work
    assert work is not None
    assert work.exit_code == EXIT_PREEMPTED
    assert work.notice is not None
    assert work.notice.warning_s is not None
    assert work.notice.warning_s > 3000


def test_an_agent_says_that_it_asked_an_attempt_to_stop(start: Start, store: MemoryStore) -> None:
    store.put(layout.sweep_spec("cat"), b"{}")
    agent = start(light_trainer.__file__, "forever")
    wait_until(lambda: unfit(agent) == "", "the node is fit")
    agent.start(ORDER)
    wait_until(lambda: trains(agent), "it trains")
    assert not asked(agent)

    agent.stop(ORDER.run_id, ORDER.attempt + 1, 60.0)
    assert not asked(agent), "that was another attempt"
    agent.stop(ORDER.run_id, ORDER.attempt, 60.0)
    wait_until(lambda: ended(agent) == EXIT_PREEMPTED, "it has saved itself")
    assert asked(agent)


def test_what_ends_before_it_is_asked_to_was_not_asked(start: Start, store: MemoryStore) -> None:
    store.put(layout.sweep_spec("cat"), b"{}")
    agent = start(light_trainer.__file__, "steps")
    wait_until(lambda: unfit(agent) == "", "the node is fit")
    agent.start(ORDER)
    wait_until(lambda: ended(agent) == EXIT_COMPLETE, "it has trained")

    agent.stop(ORDER.run_id, ORDER.attempt, 0.0)

    assert not asked(agent)


def test_an_agent_reports_that_it_hears_no_notices(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.notices.watcher.POLL_S", 0.01)
    monkeypatch.setattr("orchestrator.notices.watcher.UNHEARD_S", 0.0)
    agent = start(light_trainer.__file__, "steps", notices=Notices(command=(str(tmp_path / "missing"),)))
    wait_until(lambda: "cannot be started" in agent.report(-1, 0.0).unheard, "it says so")
