"""``python -m trainer``: one run without any cluster, killed and started again, and what it refuses."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import reduce
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import light_trainer
from support.gate import Gate
from support.runs import claimed, committed, ended, finished, ref
from support.tiny_world import tiny_spec
from support.training import contents, lay_out, newest

from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.records import (
    Ended,
    EndReason,
    Finished,
    Outcome,
    Quarantined,
    Record,
)
from storage.run_state import RunState, apply
from trainer import __main__ as command
from trainer.attempt import run_attempt
from trainer.config import Base, Dataset, RunSpec
from trainer.rundir import EXIT_BAD_CHECKPOINT, EXIT_BAD_CONFIG, EXIT_COMPLETE
from trainer.stop import Stop
from trainer.supervisor import Progress
from trainer.training_process import TrainingProcess

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

DEADLINE_S = 90.0
NO_RAY = """
import sys

class NoRay:
    def find_spec(self, name, path=None, target=None):
        assert name.partition(".")[0] not in ("ray", "orchestrator"), name

sys.meta_path.insert(0, NoRay())
"""
"""A ``sitecustomize`` for every process below: importing Ray, or the orchestrator, ends it."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(NO_RAY)
    return folder


@pytest.fixture(scope="module")
def environment(world: Path, site: Path) -> dict[str, str]:
    """Caches apart from the person's own, and no Ray."""
    paths = os.pathsep.join([str(site), str(Path(__file__).parents[2])])
    (world / "tmp").mkdir()  # what a killed process leaves behind
    own = {"PYTHONPATH": paths, "HOME": str(world / "home"), "TMPDIR": str(world / "tmp")}
    return {**os.environ, **own, "OMP_NUM_THREADS": "1"}


def write(spec: RunSpec, folder: Path) -> Path:
    path = folder / "spec.json"
    path.write_text(spec.model_dump_json())
    return path


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def state(store: DirectoryStore, run_id: str = "run") -> RunState:
    return run_log(store, run_id).refresh()


def test_killed_then_replaced_by_hand_equals_never_interrupted_and_imports_no_ray(
    world: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    gate = Gate(tmp_path)  # the second is at work until the third is there, however late that is
    base = {"max_train_steps": 12, "lr_warmup_steps": 0}
    spec = tiny_spec(world / "base", world / "images", base=base, **gate.blocks)
    store = DirectoryStore(tmp_path / "store")
    command = [sys.executable, "-m", "trainer", "run", "--spec", str(write(spec, tmp_path))]
    command += ["--store", str(tmp_path / "store"), "--every-steps", "1", "--threads", "1"]

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)

    with start() as first:
        wait_until(lambda: state(store).committed_step >= 2, first)
        first.send_signal(signal.SIGKILL)
        assert first.wait(DEADLINE_S) == -signal.SIGKILL

    with start() as second:
        wait_until(lambda: state(store).attempt == 2, second)
        with start() as third:
            wait_until(lambda: state(store).attempt == 3, third)
            gate.open()
            _, replaced = second.communicate(timeout=DEADLINE_S)
            _, said = third.communicate(timeout=DEADLINE_S)

    assert (second.returncode != 0, third.returncode, said) == (True, 0, ""), replaced
    assert "is fenced" in replaced or "is over" in replaced
    over = state(store)
    assert (over.outcome, over.attempts[-1].ended) == (Outcome.SUCCEEDED, None)
    assert [a.ended.reason for a in over.attempts[:-1] if a.ended] == [EndReason.SUPERSEDED] * 2

    ray = subprocess.run([sys.executable, "-c", "import ray"], env=environment, capture_output=True)
    assert ray.returncode != 0, "the processes above could have imported Ray"
    straight = lay_out(tmp_path / "straight", spec, cache=world / "cache")
    assert run_attempt(straight, Stop()) == EXIT_COMPLETE
    fetched = fetch_result(store, tmp_path)
    assert contents(fetched) == contents(newest(straight))

    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (again.returncode, again.stderr) == (0, "run is over: SUCCEEDED\n")


def fetch_result(store: DirectoryStore, folder: Path) -> Path:
    log = run_log(store, "run")
    result = log.refresh().result
    assert result is not None
    return CheckpointStore(store, "run", log).fetch(result, folder / f"step-{result.step:09d}")


LIGHT_SPEC = RunSpec(base=Base(model="owner/model"), dataset=Dataset(path="/data"))


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A training process without torch in place of ours, and this process's signals as they were."""
    use(monkeypatch, "steps")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield monkeypatch
    for number, handler in handlers.items():
        signal.signal(number, handler)


def use(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    program = (sys.executable, light_trainer.__file__, mode)
    monkeypatch.setattr("trainer.supervisor.TrainingProcess", lambda *given: TrainingProcess(program))


def invoke(folder: Path, *more: str, spec: RunSpec = LIGHT_SPEC) -> tuple[int, str]:
    arguments = ["run", "--spec", str(write(spec, folder)), "--store", str(folder / "store"), *more]
    result = CliRunner().invoke(command.main, arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stderr


def kinds(folder: Path) -> list[str]:
    log = run_log(DirectoryStore(folder / "store"), "run")
    log.refresh()
    return [entry.record.kind for entry in log.entries()]


@pytest.mark.usefixtures("light")
def test_a_run_completes_and_is_then_over(tmp_path: Path) -> None:
    assert invoke(tmp_path) == (0, "")
    assert kinds(tmp_path)[-1] == "finished"
    assert invoke(tmp_path) == (0, "run is over: SUCCEEDED\n")


def test_a_result_that_is_not_in_the_store_is_no_success(light: pytest.MonkeyPatch, tmp_path: Path) -> None:
    use(light, "damaged")

    code, _ = invoke(tmp_path)

    assert code == 1
    ended = state(DirectoryStore(tmp_path / "store")).attempts[0].ended
    assert ended is not None
    assert (ended.reason, ended.exit_code) == (EndReason.APP_ERROR, 0)


def test_a_trainer_that_fails_says_why_and_can_be_tried_again(
    light: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    use(light, "broken")
    code, said = invoke(tmp_path)
    assert (code, said[:15]) == (1, "OSError: no fil")

    use(light, "steps")
    assert invoke(tmp_path) == (0, "")


@pytest.mark.usefixtures("light")
def test_a_run_that_failed_or_was_cancelled_is_not_begun_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "store")
    log = run_log(store, "run")
    log.append(claimed())
    log.append(finished(Outcome.CANCELLED))

    assert invoke(tmp_path) == (1, "run is over: CANCELLED\n")


@pytest.mark.usefixtures("light")
def test_another_spec_under_the_same_name_is_refused(tmp_path: Path) -> None:
    assert invoke(tmp_path)[0] == 0
    before = kinds(tmp_path)

    other = LIGHT_SPEC.model_copy(update={"base": Base(model="owner/other")})
    code, said = invoke(tmp_path, spec=other)

    assert (code, kinds(tmp_path)) == (1, before)
    assert said == "Error: run run is in the store with another spec: give another --run-id\n"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "Invalid JSON"),
        ('{"base": {"model": "m", "rnk": 4}, "dataset": {"path": "d"}}', "base.rnk: Extra inputs"),
        ('{"base": {"model": "m"}}', "dataset is missing, and there is no command either"),
        ('{"version": 2, "base": {"model": "m"}, "dataset": {"path": "d"}}', "version: Input should be 1"),
    ],
)
def test_a_bad_spec_is_code_78_and_touches_no_store(text: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(text)
    arguments = ["run", "--spec", str(tmp_path / "bad.json"), "--store", str(tmp_path / "store")]

    result = CliRunner().invoke(command.main, arguments)

    assert result.exit_code == EXIT_BAD_CONFIG
    assert said in result.stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--store", "ftp://host/x"], 1, "store url with scheme 'ftp'"),
        (["--store", "x", "--run-id", "../up"], 1, "run name '../up'"),
        (["--store", "x", "--every-steps", "0"], 2, "--every-steps"),
        (["--store", "x", "--every-s", "0"], 2, "--every-s"),
        (["--store", "x", "--threads", "0"], 2, "--threads"),
        ([], 2, "Missing option '--store'"),
    ],
)
def test_bad_arguments_are_refused(
    arguments: list[str], code: int, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(command.main, ["run", "--spec", str(write(LIGHT_SPEC, tmp_path)), *arguments])

    assert result.exit_code == code, result.exception
    assert said in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["spec.json"]


def test_a_checkpoint_or_spec_that_is_not_there_is_refused(tmp_path: Path) -> None:
    spec_path = str(write(LIGHT_SPEC, tmp_path))
    missing = str(tmp_path / "missing")
    for arguments in (
        ["run", "--spec", missing, "--store", "x"],
        ["export", "--checkpoint", missing, "--spec", spec_path, "--out", "o"],
        ["sample", "--checkpoint", missing, "--spec", spec_path, "--out", "o"],
    ):
        result = CliRunner().invoke(command.main, arguments)
        assert (result.exit_code, "does not exist" in result.stderr) == (2, True)


def ends(*history: Record, attempt: int = 1, **progress: object) -> list[Record]:
    """What is appended when an attempt ended, with no times in it."""
    state = reduce(apply, history, RunState())
    records = command._end(state, attempt, Progress(**progress))  # type: ignore[arg-type]
    return [record.model_copy(update={"at": 0.0}) for record in records]


def end(reason: EndReason, code: int, *, attempt: int = 1, detail: str = "") -> Ended:
    return Ended(attempt=attempt, reason=reason, detail=detail, exit_code=code, step=7, step_s=0.5, at=0.0)


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (1, EndReason.APP_ERROR),
        (0, EndReason.APP_ERROR),
        (75, EndReason.DRAINED),
        (-9, EndReason.KILLED),
        (68, EndReason.HUB_DOWN),
        (69, EndReason.STORAGE_DOWN),
        (65, EndReason.CKPT_INVALID),
    ],
)
def test_an_exit_code_means_what_it_means_to_the_orchestrator(code: int, reason: EndReason) -> None:
    assert ends(claimed(), exit_code=code, step=7, step_s=0.5, error="why") == [
        end(reason, code, detail="why")
    ]


def test_a_complete_run_is_finished_and_a_refused_configuration_too() -> None:
    assert ends(claimed(), committed(9, final=True), exit_code=0, step=9) == [
        Finished(outcome=Outcome.SUCCEEDED, step=9, at=0.0)
    ]
    assert ends(claimed(), exit_code=78, error="no images") == [
        Finished(outcome=Outcome.FAILED, detail="no images", at=0.0)
    ]


def test_a_checkpoint_that_cannot_be_used_is_set_aside_or_the_next_start_would_meet_it_again() -> None:
    history = (claimed(), committed(3), ended(), claimed(2))

    assert ends(*history, attempt=2, exit_code=EXIT_BAD_CHECKPOINT, step=7, step_s=0.5, error="torn") == [
        Quarantined(checkpoint=ref(3), attempt=2, reason="torn", at=0.0),
        end(EndReason.CKPT_INVALID, 65, attempt=2, detail="torn"),
    ]


@pytest.mark.parametrize("code", [1, 0, 75, 78, -9])
def test_an_attempt_that_was_replaced_never_ends_the_one_that_replaced_it(code: int) -> None:
    history = (claimed(), ended(1, EndReason.SUPERSEDED), claimed(2))

    assert ends(*history, attempt=1, exit_code=code, superseded=True) == []


@pytest.mark.usefixtures("light")
def test_a_result_whose_attempt_died_before_saying_so_is_said_by_the_next(tmp_path: Path) -> None:
    """Row 5 of the crash matrix for the last commit: from a final checkpoint nothing could resume."""
    assert invoke(tmp_path)[0] == 0
    log = tmp_path / "store" / "runs" / "run" / "log"
    sorted(log.iterdir())[-1].unlink()  # as if "finished" had never been written
    assert kinds(tmp_path)[-1] == "committed"

    assert invoke(tmp_path) == (0, "run is over: SUCCEEDED\n")
    assert kinds(tmp_path)[-3:] == ["committed", "ended", "finished"]
