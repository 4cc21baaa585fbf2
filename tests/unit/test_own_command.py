"""``command:`` in a sweep file, and the decisions about a program's folders and lines."""

import os
import re
from pathlib import Path

import pytest
from support.runs import claimed, incarnation, write_checkpoint

from orchestrator.commands.exporting import export_run
from orchestrator.errors import InvalidFile
from orchestrator.grid.sweep import Sweep, load
from orchestrator.launching.preflight import check
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.log import run_log
from trainer.command.folders import (
    Seen,
    entries,
    is_being_written,
    is_complete,
    listing,
    looked,
    step_of,
)
from trainer.command.output import Lines, Output, Told
from trainer.command.taking import files_of, result_files, take
from trainer.command.words import arguments, environment, input_content
from trainer.config import Command
from trainer.errors import BadInput, CommandFailed
from trainer.rundir import CheckpointPolicy, Options

GRID = """\
parameters:
  lr: {values: [1e-4, 0.5]}
command:
  words: python train.py --lr=${parameters.lr} --out {out} --data={data} --resume=latest
  steps: 500
  result: [lora.safetensors]
  inputs: {data: photos}
checkpoint: {every: 50}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    home = tmp_path / "home"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "cat.png").write_bytes(b"a cat")
    (home / "train.py").write_text("print('training')")
    return home


def sweep(folder: Path, text: str = GRID) -> Sweep:
    (folder / "grid.yaml").write_text(text)
    return load(folder / "grid.yaml")


def test_parameters_of_any_name_go_into_the_words_and_files_are_pinned(folder: Path, tmp_path: Path) -> None:
    first, second = sweep(folder).runs
    assert first.parameters == {"lr": 1e-4}
    assert first.spec.command is not None
    assert first.spec.command.words[:4] == ("python", str(folder / "train.py"), "--lr=0.0001", "--out")
    assert second.spec.command is not None
    assert second.spec.command.words[2] == "--lr=0.5"
    assert first.spec.max_steps == 500
    assert first.spec.command.inputs["data"].digest == input_content(folder / "photos").digest
    there = tmp_path / "there"
    folder.rename(there)
    assert [run.run_id for run in sweep(there).runs] == [first.run_id, second.run_id], "content, not paths"
    (there / "train.py").write_text("print('something else')")
    changed = [run.run_id for run in sweep(there).runs]
    assert first.run_id not in changed
    (there / "photos" / "cat.png").write_bytes(b"a dog")
    assert not {*changed} & {run.run_id for run in sweep(there).runs}


def test_how_it_is_watched_names_no_other_runs(folder: Path) -> None:
    watched = GRID.replace("  steps: 500\n", "  steps: 500\n  quiet_s: 20\n  complete: '*.pkl'\n")
    assert [run.run_id for run in sweep(folder, watched).runs] == [run.run_id for run in sweep(folder).runs]


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ("  steps: 500", "  steps: 500\n  checkpoints: checkpoint", "E2111", "exactly one '*'"),
        ("  steps: 500", "  steps: 500\n  checkpoints: ../c-*", "E2111", "below the command's output folder"),
        ("  steps: 500", "  steps: 500\n  progress: 'step [0-9]+'", "E2111", "a group named step"),
        ("  steps: 500\n", "", "E2104", "command.steps is missing"),
        ("--out {out}", "--out {output}", "E2111", "placeholder {output}"),
        ("--lr=${parameters.lr}", "--lr=1", "E2126", "nothing in command uses the parameter 'lr'"),
        ("--lr=", "--hub_token=abcdefgh --lr=", "E2120", "--hub_token"),
        ("--lr=", "--wandb_api_key abcdefgh --lr=", "E2120", "--wandb_api_key"),
        ("--lr=", "--key=hf_abcdefghijklmnopqrstuvwxyz --lr=", "E2120", "looks like a secret"),
        ("checkpoint:", "base: {model: owner/model}\ncheckpoint:", "E2111", "base is for our own trainer"),
        ("${parameters.lr}", "${parameters.rl}", "E2118", "names no parameter"),
        ("command:", "command: [python, train.py]\nother:", "E2111", "must be a block"),
        ("{data: photos}", "{out: photos}", "E2111", "means something else"),
        ("python train.py", 'python "train.py', "E2111", "a quote that is not closed"),
    ],
)
def test_a_mistake_in_the_block_is_named(folder: Path, old: str, new: str, code: str, said: str) -> None:
    assert GRID.count(old) >= 1
    with pytest.raises(InvalidFile) as refused:
        sweep(folder, GRID.replace(old, new, 1))
    assert any(problem.code == code and said in problem.message for problem in refused.value.problems), (
        refused.value.problems
    )


@pytest.mark.parametrize(
    ("old", "new", "code", "said"),
    [
        ("python train.py", "pyhton train.py", "E2321", "is not a program"),
        ("train.py", "trian.py", "E2322", "there is no file"),
        ("data: photos", "data: fotos", "E2207", "does not exist"),
        ("every: 50", "every: 60s", "E2324", "checkpoint.every is a time"),
        (" --resume=latest", "", "W2325", "tells it to resume"),
    ],
)
def test_what_a_command_names_is_looked_at_first(
    folder: Path, old: str, new: str, code: str, said: str
) -> None:
    text = GRID.replace("--lr=", "--every={every} --lr=")
    store = DirectoryStore(folder / "store")
    assert {problem.code for problem in check(sweep(folder, text), store)} == {"W2315"}
    found = check(sweep(folder, text.replace(old, new, 1)), store)
    assert any(problem.code == code and said in problem.message for problem in found), found


def test_its_result_is_exported_as_it_is(folder: Path, tmp_path: Path) -> None:
    run = sweep(folder).runs[0]
    store = DirectoryStore(tmp_path / "store")
    log = run_log(store, run.run_id)
    log.append(claimed())
    files = {
        "lora.safetensors": b"weights",
        "unet/optimizer.pkl": b"never opened",
        "c-1/manifest.json": b"{}",
    }
    local = write_checkpoint(tmp_path / "local", 500, final=True, files=files)
    CheckpointStore(store, run.run_id, log).publish(local, 1, incarnation(1))

    def exported(form: str) -> Path:
        return export_run(store, run, step=None, form=form, out=tmp_path / "out", force=False)

    with pytest.raises(InvalidFile, match="copied as they are"):
        exported("kohya")
    out = exported("diffusers")
    there = {file.relative_to(out).as_posix(): file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert there == files


@pytest.mark.parametrize(
    ("name", "pattern", "step"),
    [
        ("checkpoint-50", "checkpoint-*", 50),
        ("checkpoint-50.tmp", "checkpoint-*", None),
        ("tmp-checkpoint-50", "checkpoint-*", None),
        ("checkpoint-", "checkpoint-*", None),
        ("checkpoint-last", "checkpoint-*", None),
        ("epoch=3-step=400", "epoch=*", 400),
        ("cat-step00000100-state", "cat-step*-state", 100),
        ("cat-state", "cat-*-state", None),
        ("checkpoint-1234567890", "checkpoint-*", None),
    ],
)
def test_the_step_is_the_last_number_in_the_name(name: str, pattern: str, step: int | None) -> None:
    assert step_of(name, pattern) == step


def test_entries_are_found_below_the_output_folder(tmp_path: Path) -> None:
    for name in ("state/step-20", "state/step-3", "state/step-x", "step-1"):
        (tmp_path / name).mkdir(parents=True)
    assert [entry.step for entry in entries(tmp_path, "state/step-*")] == [3, 20]
    assert entries(tmp_path, "elsewhere/step-*") == []


def test_quiet_counts_only_while_somebody_looks_on() -> None:
    there = (("a", 1, 1, 1),)
    seen = looked(None, there, 0.0, written=False, longest_s=1.0)
    for now in (1.0, 2.0):
        seen = looked(seen, there, now, written=False, longest_s=1.0)
    assert seen.quiet_s == 2.0
    assert looked(seen, there, 100.0, written=False, longest_s=1.0).quiet_s == 3.0, "97 s nobody looked"
    assert looked(seen, (("a", 2, 1, 1),), 3.0, written=False, longest_s=1.0).quiet_s == 0.0
    assert looked(seen, there, 3.0, written=True, longest_s=1.0).quiet_s == 0.0


@pytest.mark.parametrize(
    ("there", "quiet_s", "marker", "complete"),
    [
        ((("a", 1, 1, 1),), 5.0, None, True),
        ((("a", 1, 1, 1),), 4.9, None, False),
        ((), 9.0, None, False),
        ((("a", 1, 1, 1),), 9.0, "random_states_*.pkl", False),
        ((("a", 1, 1, 1), ("random_states_0.pkl", 1, 1, 1)), 9.0, "random_states_*.pkl", True),
    ],
)
def test_complete_is_quiet_and_whole(
    there: tuple[tuple[str, int, int, int], ...], quiet_s: float, marker: str | None, complete: bool
) -> None:
    assert is_complete(Seen(there, 0.0, quiet_s), quiet_s=5.0, marker=marker) is complete


def test_an_open_file_is_being_written(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w"):
        assert is_being_written(tmp_path, [os.getpid()])
    with (tmp_path / "a").open():
        assert not is_being_written(tmp_path, [os.getpid()]), "only read"
    assert not is_being_written(tmp_path, [os.getpid(), 2**22])


def test_what_changes_while_it_is_hashed_is_not_taken(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-1").mkdir(parents=True)
    file = tmp_path / "out" / "checkpoint-1" / "a"
    file.write_bytes(b"before")
    before = listing(file.parent)

    def changed() -> bool:
        file.write_bytes(b"after it")
        return listing(file.parent) == before

    root = tmp_path / "checkpoints"
    files = files_of(file.parent, tmp_path / "out")
    assert not take(root, 1, files, metrics={}, final=False, unchanged=changed)
    assert list(root.iterdir()) == []
    assert take(root, 1, files, metrics={"loss": float("nan")}, final=False)


def test_a_link_out_of_the_output_folder_is_refused_and_one_within_is_followed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "checkpoint-1").mkdir(parents=True)
    (out / "weights").write_bytes(b"w")
    (out / "checkpoint-1" / "w").symlink_to("../weights")
    assert files_of(out / "checkpoint-1", out) == {"checkpoint-1/w": out / "weights"}
    (out / "checkpoint-1" / "secret").symlink_to("/etc/hostname")
    with pytest.raises(BadInput, match="outside of"):
        files_of(out / "checkpoint-1", out)


def test_a_result_is_not_looked_for_in_checkpoints(tmp_path: Path) -> None:
    for name in ("checkpoint-1/lora.safetensors", "final/lora.safetensors"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    assert [*result_files(tmp_path, ("**/*.safetensors",), "checkpoint-*")] == ["final/lora.safetensors"]
    assert [*result_files(tmp_path, ("final",), "checkpoint-*")] == ["final/lora.safetensors"]


def test_steps_are_found_in_a_progress_bar_in_json_or_by_an_expression() -> None:
    bar = " 50%|#####     | 250/500 [00:10<00:10, 24.50it/s, loss=0.0123, lr=1e-4]"
    assert Output(None, 500).line(bar) == Told(step=250, loss=0.0123, lr=1e-4)
    assert Output(None, 400).line(bar) is None, "another bar"
    assert Output(None, 500).line('{"step": 7, "loss": 0.5}') == Told(step=7, loss=0.5)
    own = Output(r"it (?P<step>\d+): l=(?P<loss>\S+)", 500)
    assert own.line("it 9: l=0.25") == Told(step=9, loss=0.25)
    assert own.line("it 900: l=0.25") is None


def test_the_last_json_line_holds_the_metrics_and_a_launcher_hides_no_exception() -> None:
    output = Output(None, 5)
    for line in (
        '{"error": 1}',
        '100%|##| 5/5 [00:01<00:00]{"error": 0.5}',
        '{"name": "cat"}',
        "[rank0]: Traceback (most recent call last):",
        '[rank0]:   File "train.py", line 1, in <module>',
        "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried",
        "Traceback (most recent call last):",
        '  File "launch.py", line 1, in <module>',
        "subprocess.CalledProcessError: Command '[...]' returned non-zero exit status 1.",
    ):
        output.line(line)
    assert output.metrics == {"error": 0.5}
    assert output.exception == ("OutOfMemoryError", "CUDA out of memory. Tried")


def test_of_a_progress_bar_few_lines_reach_the_log() -> None:
    lines = Lines(every_s=10.0)
    assert lines.cut(b"\r 1/9\r 2/9", 0.0) == (["", " 1/9"], b" 1/9\n")
    assert lines.cut(b"\r 3/9\r", 1.0) == ([" 2/9"], b"")
    assert lines.cut(b"\ndone\r\nhalf", 2.0) == ([" 3/9", "done"], b" 3/9\ndone\n")
    assert lines.cut(b"", 3.0, ended=True) == (["half"], b"half\n")


def test_the_line_that_a_progress_bar_shows_is_read_though_it_has_no_end() -> None:
    lines = Lines()
    lines.cut(b"loading 1/9", 0.0)
    assert lines.standing() == []  # more of it may come
    lines.cut(b"\r 1/9\r 2/9", 1.0)
    assert lines.standing() == [" 2/9"]
    lines.cut(b"\nhalf", 2.0)
    assert lines.standing() == []


def test_words_are_filled_and_what_is_missing_is_said(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    given = {
        "words": ["python", "--o={out}", "--n={steps}", "--every={every}", "{data}/x", "${HOME}"],
        "resume": ["--from", "{checkpoint}"],
        "steps": 9,
        "result": ["a"],
        "inputs": {"data": str(tmp_path / "photos")},
    }
    command = Command.model_validate(given)
    options = Options(checkpoint=CheckpointPolicy(every_steps=3, every_s=None), cache_dir=str(tmp_path))
    words = arguments(command, options, Path("/o"), None)
    assert words[1:] == ["--o=/o", "--n=9", "--every=3", f"{tmp_path}/photos/x", "${HOME}"]
    assert arguments(command, options, Path("/o"), Path("/o/c-3"))[-2:] == ["--from", "/o/c-3"]
    with pytest.raises(BadInput, match="in steps"):
        arguments(command, Options(cache_dir=str(tmp_path)), Path("/o"), None)
    (tmp_path / "photos").rmdir()
    with pytest.raises(BadInput, match="is not on this node"):
        arguments(command, options, Path("/o"), None)
    nowhere = Command.model_validate({**given, "words": ["no-such-program"], "inputs": {}})
    with pytest.raises(CommandFailed, match="not a program on this node"):
        arguments(nowhere, options, Path("/o"), None)


def test_programs_beside_our_interpreter_are_found_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = environment(
        {"PATH": "/usr/bin", "TRAINER_GPU_CHECK": "/x", "OMP_NUM_THREADS": "7"}, Options(threads=2)
    )
    assert re.fullmatch(r".+/bin:/usr/bin", found["PATH"])
    assert found["OMP_NUM_THREADS"] == "7"
    assert "TRAINER_GPU_CHECK" not in found
