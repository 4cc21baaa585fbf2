"""Programs and the store that a sweep names work before anything is launched, and how all of it is told."""

from collections.abc import Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.preflight import GRID, Check, lose_captions

from orchestrator.cli import main
from orchestrator.errors import PreflightFailed, Problem
from orchestrator.grid.sweep import load
from orchestrator.launching.preflight import check, refuse
from storage.errors import AccessDenied, NotFound, StorageError, Unavailable
from storage.memory import MemoryStore
from storage.url import open_store


class Refusing(MemoryStore):
    """A store in memory that fails one kind of call."""

    def __init__(self, call: str, error: StorageError) -> None:
        super().__init__("refusing")
        self.call, self.error = call, error

    def put(self, key: str, body: bytes | Path) -> None:
        self._refuse("put")
        super().put(key, body)

    def get(self, key: str) -> bytes:
        self._refuse("get")
        return super().get(key)

    def delete(self, keys: Iterable[str]) -> None:
        self._refuse("delete")
        super().delete(keys)

    def _refuse(self, call: str) -> None:
        if call == self.call:
            raise self.error


def test_a_sweep_with_nothing_wrong_passes(problems_of: Check) -> None:
    assert problems_of() == []


@pytest.mark.parametrize(
    ("old", "new", "warning"),
    [
        ("2e-4", "2", "base.learning_rate W2312 learning rate 2 is above 1"),
        (
            "dataset:",
            "checkpoint: {every: 1000}\ndataset:",
            "checkpoint.every W2313 runs of 1000 steps save nothing",
        ),
        (
            "resolution",
            "train_batch_size: 2, gradient_accumulation_steps: 2, resolution",
            "base.train_batch_size W2314 a step sees 4 images, but",
        ),
        ("path: data", "path: data, val_fraction: 0", "metric W2315 nothing will rank the runs"),
        ("dataset:", "run_cap: 1\ndataset:", "run_cap W2316 run_cap leaves out 1 of 2 runs"),
    ],
    ids=["32", "40", "batch", "metric", "run_cap"],
)
def test_what_may_be_meant_is_a_warning(old: str, new: str, warning: str, problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace(old, new))
    assert problem.startswith(warning)


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        ("[python, ./score.py, '{samples}']", []),
        ("[pyhton, score.py, '{samples}']", ["E2321 'pyhton' is not a program on this machine"]),
        ("[score.py, '{samples}']", [" is not executable — e.g. [python, score.py, '{samples}']"]),
        ("[python, scor.py, '{samples}']", ["E2322 there is no file 'scor.py'"]),
        ("[python, score.py]", ["W2323 the command is not told where the samples are"]),
    ],
)
def test_an_evaluate_command_that_cannot_run_is_named(
    command: str, expected: list[str], data: Path, problems_of: Check
) -> None:
    (data.parent / "score.py").write_text("print('{}')")
    found = problems_of(f"{GRID}samples: {{prompts: [x]}}\nevaluate: {{command: {command}}}\n")
    assert len(found) == len(expected)
    for problem, message in zip(found, expected, strict=True):
        assert problem.startswith("evaluate.command ")
        assert message in problem


@pytest.mark.parametrize(
    ("store", "message", "exit_code"),
    [
        (Refusing("put", AccessDenied("no")), "E2402 memory://refusing: cannot write to the store: no", 5),
        (Refusing("get", AccessDenied("no")), "E2402 memory://refusing: cannot read from the store: no", 5),
        (
            Refusing("delete", AccessDenied("no")),
            "E2402 memory://refusing: cannot delete from the store: no",
            5,
        ),
        (
            Refusing("put", Unavailable("timeout")),
            "E2403 memory://refusing: cannot write to the store: timeout",
            6,
        ),
        (
            Refusing("put", NotFound("no bucket")),
            "E2401 memory://refusing: cannot write to the store: no buck",
            3,
        ),
    ],
    ids=["52-put", "52-get", "52-delete", "unreachable", "51"],
)
def test_a_store_that_cannot_be_used_is_named_with_what_failed(
    store: Refusing, message: str, exit_code: int, data: Path
) -> None:
    file = data.parent / "grid.yaml"
    file.write_text(GRID)
    found = check(load(file), store)
    assert [str(problem)[: len(message)] for problem in found] == [message]
    with pytest.raises(PreflightFailed) as caught:
        refuse(found)
    assert caught.value.exit_code == exit_code


@pytest.mark.parametrize("error", [AccessDenied("no"), Unavailable("no")])
def test_of_a_folder_no_endpoint_and_no_credentials_are_named(error: StorageError, data: Path) -> None:
    class Folder(Refusing):
        @property
        def url(self) -> str:
            return "file:///srv/loras"

    file = data.parent / "grid.yaml"
    file.write_text(GRID)
    (found,) = check(load(file), Folder("put", error))
    assert (found.hint or "").startswith("name a folder")


def test_55_a_store_over_plain_http_is_a_warning(data: Path) -> None:
    class Remote(MemoryStore):
        @property
        def url(self) -> str:
            return "s3://bucket/prefix?endpoint=http://10.0.0.1:9000"

    class Local(MemoryStore):
        @property
        def url(self) -> str:
            return "s3://bucket/prefix?endpoint=http://127.0.0.1:9000"

    file = data.parent / "grid.yaml"
    file.write_text(GRID)
    assert [problem.code for problem in check(load(file), Remote("remote"))] == ["W2405"]
    assert check(load(file), Local("local")) == []


def test_warnings_alone_do_not_refuse_but_are_shown_with_errors() -> None:
    warning, error = Problem("W2312", "odd", "base"), Problem("E2201", "absent", "dataset.path", "look")
    refuse([warning])
    with pytest.raises(PreflightFailed) as caught:
        refuse([warning, error])
    assert caught.value.exit_code == 3
    assert str(caught.value) == (
        "base         W2312 odd\ndataset.path E2201 absent — look\n1 error, 1 warning."
    )


def test_the_command_line_says_it_and_launches_nothing(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lose_captions(data)
    Path("grid.yaml").write_text(GRID)

    result = CliRunner().invoke(main, ["sweep", "grid.yaml", "--yes"])

    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == (
        f"dataset {data}: 4 images, 1 caption, 2 missing; 1 held out, 1 sample an epoch; "
        "2 enlarged more than 2 times\n"
        f"dataset E2202 dataset {data}: 2 of 4 images have no caption: 1.png, 3.png\n"
        "1 error. Nothing was launched.\n"
    )
    assert list(open_store("./orchestrate-store").list("")) == []


def test_everything_is_reported_at_once(problems_of: Check, data: Path) -> None:
    lose_captions(data)
    text = GRID.replace("owner/model", "./absent").replace("2e-4", "5")
    found = problems_of(text, store=Refusing("put", AccessDenied("no")))
    assert [problem.split()[1] for problem in found] == ["E2202", "E2301", "W2312", "E2402"]
