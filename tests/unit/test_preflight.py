"""What a sweep names must be there before anything is launched: data, models, programs, the store."""

import json
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from orchestrator.cli import main
from orchestrator.errors import PreflightFailed, Problem
from orchestrator.grid.sweep import load
from orchestrator.launching.data import surveys
from orchestrator.launching.preflight import check, refuse
from storage.errors import (
    AccessDenied,
    NotFound,
    StorageError,
    Unavailable,
)
from storage.memory import MemoryStore
from storage.url import open_store

GRID = """\
parameters: {learning_rate: {values: [1e-4, 2e-4]}}
base: {model: owner/model, revision: abc, resolution: 32}
dataset: {path: data}
"""
NO_REVISION = "W2306 base model owner/model is not pinned"

Check = Callable[..., list[str]]


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


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A dataset of four captioned images, beside which sweep files are written."""
    folder = tmp_path / "data"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text("a caption")
    return folder


@pytest.fixture
def problems_of(data: Path) -> Check:
    """Check a sweep file; return its problems as "where code message"."""

    def problems(text: str = GRID, store: MemoryStore | None = None, **options: object) -> list[str]:
        file = data.parent / "grid.yaml"
        file.write_text(text)
        kept = store or MemoryStore("kept")
        found = check(load(file), kept, **options)  # type: ignore[arg-type]
        assert list(kept.list("")) == []
        return [f"{problem.where} {problem}" for problem in found]

    return problems


def test_a_sweep_with_nothing_wrong_passes(problems_of: Check) -> None:
    assert problems_of() == []


def write_metadata(data: Path, *rows: object) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    (data / "metadata.jsonl").write_text("\n".join(lines))


def lose_captions(data: Path) -> None:
    (data / "1.txt").unlink()
    (data / "3.txt").unlink()


def damage(data: Path) -> None:
    whole = (data / "2.png").read_bytes()
    (data / "2.png").write_bytes(whole[: len(whole) // 2])


def inflate(data: Path) -> None:
    Image.new("1", (10_000, 10_000)).save(data / "2.png")


def empty(data: Path) -> None:
    for path in data.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        pytest.param(lambda data: data.rename(data.parent / "gone"), "E2201", "data does not exist", id="41"),
        pytest.param(
            lambda data: (empty(data), data.rmdir(), data.touch()), "E2201", "is not a folder", id="41-file"
        ),
        pytest.param(empty, "E2202", "no PNG, JPEG or WebP image in it", id="42"),
        pytest.param(damage, "E2202", "2.png: not a PNG, JPEG or WebP image, or damaged", id="43"),
        pytest.param(
            lambda data: (data / "2.png").write_text("<html>"), "E2202", "2.png: not a PNG", id="43-html"
        ),
        pytest.param(inflate, "E2202", "2.png: more than 64 megapixels; scale it down", id="44"),
        pytest.param(lose_captions, "E2202", "2 of 4 images have no caption: 1.png, 3.png", id="45"),
        pytest.param(
            lambda data: write_metadata(data, {"file_name": "0.png", "text": "x"}, "{"),
            "E2202",
            "metadata.jsonl line 2: not JSON",
            id="46-line",
        ),
        pytest.param(
            lambda data: write_metadata(data, {"file_name": "../0.png", "text": "x"}),
            "E2202",
            "metadata.jsonl line 1: file_name '../0.png' leaves the dataset folder",
            id="46-escape",
        ),
        pytest.param(
            lambda data: write_metadata(data, {"file_name": "9.png", "text": "x"}),
            "E2202",
            "metadata.jsonl line 1: 9.png is not an image in the folder",
            id="46-missing",
        ),
        pytest.param(
            lambda data: Image.new("RGB", (8, 8)).save(data / "2.jpg"),
            "E2202",
            "share one caption file, 2.txt: rename one",
            id="47",
        ),
    ],
)
def test_a_bad_dataset_is_named(
    spoil: Callable[[Path], object], code: str, message: str, data: Path, problems_of: Check
) -> None:
    spoil(data)
    [problem] = problems_of()
    assert code in problem
    assert message in problem
    assert str(data) in problem


def test_48_a_dataset_of_which_nothing_is_left_to_train_on(data: Path, problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("path: data", "path: data, val_fraction: 0.9"))
    assert "E2202" in problem
    assert "val_fraction 0.9 of 4 images leaves none to train on" in problem


def test_49_a_dataset_that_changed_since_its_digest_was_stated(problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("path: data", f"path: data, digest: {'a' * 64}"))
    assert problem.startswith("dataset.digest E2203 ")
    assert "has other content than the sweep was made for" in problem


def test_49_a_dataset_that_changes_while_it_is_submitted(data: Path) -> None:
    file = data.parent / "grid.yaml"
    file.write_text(GRID)
    sweep = load(file)
    (data / "0.txt").write_text("another caption")
    assert [problem.code for problem in check(sweep, MemoryStore("kept"))] == ["E2203"]


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("ftp://data", "E2201 dataset ftp://…: nothing is read from there — dataset.path is a local folder"),
        ("hub://a/b/c", "E2201 dataset hub://…: not of the form hub://owner/name"),
        ("s3://bucket/data?region=Mars", "E2201 dataset: url: 'Mars' is not a region"),
    ],
)
def test_a_remote_dataset_that_cannot_be_read_is_named(path: str, expected: str, problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("path: data", f"path: '{path}'"))
    assert problem.startswith(f"dataset.path {expected}")


def test_a_hub_dataset_needs_a_package_of_its_own(
    problems_of: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    [problem] = problems_of(GRID.replace("path: data", "path: hub://owner/name"))
    assert problem.startswith("dataset.path E2205 data sets on the hub need the package datasets")
    assert "pip install 'orchestrate-loras[hub]'" in problem


def write_model(
    folder: Path, pipeline: str = "StableDiffusionPipeline", weights: str = "x.safetensors"
) -> None:
    (folder / "unet").mkdir(parents=True)
    (folder / "unet" / weights).write_bytes(b"")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline}))


def test_a_local_model_passes(data: Path, problems_of: Check) -> None:
    write_model(data.parent / "model")
    assert problems_of(GRID.replace("owner/model", "model")) == []


@pytest.mark.parametrize(
    ("model", "code", "message"),
    [
        ("./absent", "E2301", "absent does not exist"),
        ("absent.safetensors", "E2301", "'absent.safetensors' is neither a file nor a hub id"),
        ("a/b/c", "E2301", "'a/b/c' is neither a file nor a hub id"),
        ("sd.ckpt", "E2302", "may contain code that runs when it is loaded — convert it to .safetensors"),
        ("owner/sd.bin", "E2302", "may contain code"),
        ("data/0.txt", "E2302", "0.txt is not a .safetensors file"),
        ("flux", "E2303", "flux is a FluxPipeline — the trainer loads StableDiffusionPipeline, Stable"),
        ("data", "E2303", "data has no readable model_index.json: it is not a diffusers model"),
        ("pickled", "E2304", "pickled has no safetensors weights in unet/"),
        ("sd3", "E2304", "sd3 has no safetensors weights in transformer/"),
    ],
)
def test_39_a_bad_base_model_is_named(
    model: str, code: str, message: str, data: Path, problems_of: Check
) -> None:
    write_model(data.parent / "flux", pipeline="FluxPipeline")
    write_model(data.parent / "pickled", weights="diffusion_pytorch_model.bin")
    write_model(data.parent / "sd3", pipeline="StableDiffusion3Pipeline")
    [problem] = problems_of(GRID.replace("owner/model", model))
    assert problem.startswith(f"base.model {code} ")
    assert message in problem


@pytest.mark.parametrize(
    ("pipeline", "stated", "asked", "said"),
    [
        ("StableDiffusionPipeline", "v_prediction", "prediction_type: epsilon", "that it predicts v_pred"),
        ("StableDiffusionPipeline", "v_prediction", "zero_terminal_snr: true", None),
        ("StableDiffusionPipeline", None, "prediction_type: v_prediction, zero_terminal_snr: true", None),
        ("StableDiffusionPipeline", None, "zero_terminal_snr: true", "take a model with v-prediction"),
        ("StableDiffusionPipeline", None, "clip_skip: 2", None),
        ("StableDiffusionXLPipeline", "epsilon", "clip_skip: 2", "one fixed layer of each"),
        ("StableDiffusion3Pipeline", None, "zero_terminal_snr: true", "leave zero_terminal_snr out"),
        ("StableDiffusion3Pipeline", None, "hollow: auto", "leave hollow out"),
        ("StableDiffusionPipeline", "epsilon", "hollow: up_blocks.1", None),
    ],
)
def test_what_a_base_model_does_not_do_is_refused(
    pipeline: str, stated: str | None, asked: str, said: str | None, data: Path, problems_of: Check
) -> None:
    model = data.parent / "model"
    write_model(model, pipeline)
    (model / "transformer").mkdir()
    (model / "transformer" / "x.safetensors").write_bytes(b"")
    (model / "scheduler").mkdir()
    config = {} if stated is None else {"prediction_type": stated}
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))

    found = problems_of(
        GRID.replace("owner/model", "model").replace("resolution: 32", f"resolution: 32, {asked}")
    )

    assert len(found) == (said is not None)
    assert all("E2305" in problem and said is not None and said in problem for problem in found)


def test_timesteps_that_a_base_model_has_not_are_refused(data: Path, problems_of: Check) -> None:
    model = data.parent / "model"
    write_model(model)
    (model / "scheduler").mkdir()
    (model / "scheduler" / "scheduler_config.json").write_text(json.dumps({"num_train_timesteps": 500}))
    good = GRID.replace("owner/model", "model")

    assert problems_of(good.replace("resolution: 32", "resolution: 32, max_timestep: 500")) == []
    [problem] = problems_of(good.replace("resolution: 32", "resolution: 32, max_timestep: 501"))
    assert problem.startswith("base.max_timestep E2305")
    assert problem.endswith("has 500 timesteps, 0 to 499 — at most 500")


def test_class_images_are_looked_at(data: Path, problems_of: Check) -> None:
    folder = data.parent / "dogs"
    text = GRID + "prior: {prompt: a dog, path: dogs}\n"

    [missing] = problems_of(text)
    folder.mkdir()
    [empty] = problems_of(text)
    shutil.copy(data / "0.png", folder / "0.png")
    good = problems_of(text)
    (folder / "1.png").write_bytes(b"no image")
    [damaged] = problems_of(text)

    assert good == []
    for problem, said in ((missing, "does not exist"), (empty, "holds no PNG"), (damaged, "not a PNG")):
        assert problem.startswith("prior.path E2208")
        assert said in problem


def test_a_hub_model_without_revision_is_a_warning(problems_of: Check) -> None:
    [problem] = problems_of(GRID.replace("revision: abc, ", ""))
    assert problem.startswith(f"base.revision {NO_REVISION}")


def test_37_adamw8bit_needs_bitsandbytes(problems_of: Check) -> None:
    text = GRID.replace("resolution: 32", "resolution: 32, optimizer: adamw8bit")
    [problem] = problems_of(text, installed=lambda package: False)
    assert problem.startswith("base.optimizer E2311 optimizer adamw8bit needs bitsandbytes")
    assert problems_of(text, installed=lambda package: package == "bitsandbytes") == []


def test_fewer_images_than_a_batch_are_refused_with_what_would_work(problems_of: Check, data: Path) -> None:
    text = GRID.replace("resolution", "train_batch_size: 4, resolution")
    assert problems_of(text) == [
        "base.train_batch_size E2206 a batch has 4 images, but an epoch has 3 to train on — lower "
        "train_batch_size (and raise gradient_accumulation_steps), add images, or let them repeat"
    ]
    assert problems_of(text.replace("data}", "data, concepts: {.: {repeats: 2}}}")) == []


def test_what_the_data_sets_hold_is_told_before_anything_starts(data: Path) -> None:
    Image.new("RGB", (40, 24)).save(data / "0.png")
    (data / "1.txt").unlink()
    file = data.parent / "grid.yaml"
    file.write_text(
        GRID.replace("data}", "data, buckets: true, bucket_min: 16, bucket_step: 8, val_fraction: 0}")
    )

    assert surveys(run.spec for run in load(file).runs) == [
        f"dataset {data}: 4 images, 1 caption, 1 missing; 0 held out, 3 samples an epoch; "
        "2 enlarged more than 2 times",
        "  32×32: 2 images",
        "  40×24: 1 image",
    ]


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
