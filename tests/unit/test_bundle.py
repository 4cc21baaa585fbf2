"""What lies beside exported weights for those who read it, and images drawn from an export."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from PIL import Image
from support.adapters import adapted_checkpoint
from support.runs import claimed, incarnation
from support.tiny_world import tiny_spec

from orchestrator.cli import main
from orchestrator.grid.schema import Storage
from orchestrator.grid.submission import submit
from orchestrator.grid.sweep import PlannedRun, Sweep
from storage import layout
from storage.checkpoints import CheckpointStore
from storage.directory import DirectoryStore
from storage.local import read_checkpoint
from storage.log import run_log
from trainer.config import Base, MergedAdapter, RunSpec
from trainer.errors import BadInput
from trainer.export import Trained, trained_adapter
from trainer.export.bundle import Target, read_samples, usage, write_bundle
from trainer.export.card import card
from trainer.export.headers import BASE_MODEL, BASE_REVISION, description
from trainer.generate import Wish, adapter_file, base_of, generate
from trainer.sample import sample_images

# diffusers' schedulers hand torch tensors to numpy in the old way.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SAMPLES = {"prompts": ["a [trigger] on a beach"], "negative": "blurry", "seeds": [1, 2], "steps": 2}


@pytest.fixture(scope="module")
def spec(world: Path) -> RunSpec:
    base = {"alpha": 12.0, "lora_dropout": 0.0}
    return tiny_spec(
        world / "base", world / "images", base=base, dataset={"trigger": "rufus"}, samples=SAMPLES
    )


@pytest.fixture(scope="module")
def checkpoint(spec: RunSpec, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return adapted_checkpoint(spec, tmp_path_factory.mktemp("checkpoint"), size=0.1)


@pytest.fixture(scope="module")
def trained(spec: RunSpec, checkpoint: Path) -> Trained:
    return trained_adapter(checkpoint, spec)


@pytest.fixture(scope="module")
def samples(spec: RunSpec, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample_images(spec, checkpoint, tmp_path_factory.mktemp("drawn") / "samples")


@pytest.mark.parametrize(
    ("to", "files"),
    [
        ("diffusers", ["pytorch_lora_weights.safetensors"]),
        ("comfyui", ["cat.metadata.json", "cat.png", "cat.safetensors"]),
        ("a1111", ["cat.json", "cat.png", "cat.safetensors"]),
        ("hf", ["README.md", "images/p00-s1.png", "images/p00-s2.png", "pytorch_lora_weights.safetensors"]),
    ],
)
def test_each_reader_gets_what_it_reads(
    to: Target, files: list[str], trained: Trained, samples: Path, tmp_path: Path
) -> None:
    write_bundle(trained, tmp_path / "cat", to, samples=read_samples(samples))

    found = [path for path in (tmp_path / "cat").rglob("*") if path.is_file()]
    assert sorted(path.relative_to(tmp_path / "cat").as_posix() for path in found) == files


def test_the_bundle_says_how_to_use_the_adapter_and_not_where_it_was_trained(
    trained: Trained, samples: Path, world: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cat"
    write_bundle(trained, folder, "dir", samples=read_samples(samples))

    a1111 = json.loads((folder / "cat.json").read_text())
    assert list(a1111) == [
        *("description", "sd version", "activation text"),
        *("preferred weight", "negative text", "notes"),
    ]
    assert (a1111["sd version"], a1111["activation text"]) == ("SD1", "rufus")
    manager = json.loads((folder / "cat.metadata.json").read_text())
    assert (manager["base_model"], manager["preview_url"]) == ("SD 1.5", "cat.png")
    assert manager["civitai"]["trainedWords"] == ["rufus"]
    with Image.open(folder / "cat.png") as image:
        assert image.text["parameters"].splitlines() == [
            "a rufus on a beach <lora:cat:1>",
            "Negative prompt: blurry",
            "Steps: 2, Sampler: DPM++ 2M, CFG scale: 7.5, Seed: 1, Size: 32x32, Model: base",
        ]
    card = (folder / "README.md").read_text()
    assert "base_model: base\n" in card
    assert "instance_prompt: rufus\n" in card
    assert usage(trained, "cat") == "<lora:cat:0.8> rufus"
    for path in folder.rglob("*"):
        assert path.is_dir() or str(world).encode() not in path.read_bytes(), f"{path} tells a path"


@pytest.mark.parametrize(
    ("family", "prediction", "version", "architecture"),
    [
        ("sd1", "epsilon", "sd_v1", "stable-diffusion-v1/lora"),
        ("sd2", "v_prediction", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        ("sdxl", "epsilon", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    ],
)
def test_headers_name_the_family(
    family: str, prediction: str, version: str, architecture: str, trained: Trained
) -> None:
    said = description(replace(trained, family=family, prediction_type=prediction), "cat", "minimal")

    assert said["ss_base_model_version"] == version
    assert said["modelspec.architecture"] == architecture
    assert description(trained, "cat", "none") == {}
    assert "orchestrate.spec" in description(trained, "cat", "full")


def test_what_was_merged_into_the_base_is_said(trained: Trained, tmp_path: Path) -> None:
    merged = {"merged_adapters": (MergedAdapter(path="/home/me/style.safetensors", weight=0.5),)}
    spec = trained.spec.model_copy(update={"base": trained.spec.base.model_copy(update=merged)})
    over_style = replace(trained, spec=spec)

    header = description(over_style, "cat", "minimal")
    assert "with style.safetensors × 0.5 merged into it" in card(over_style, "cat", "x.safetensors", [])
    with pytest.raises(BadInput, match=r"onto base with style\.safetensors × 0\.5 merged"):
        base_of(tmp_path / "cat.safetensors", header)


def test_images_are_drawn_from_a_file_with_the_base_that_is_named(
    spec: RunSpec, trained: Trained, samples: Path, tmp_path: Path
) -> None:
    """At full scale and with the run's settings they are the run's own samples."""
    write_bundle(trained, tmp_path / "cat", "kohya")
    wish = Wish(
        prompts=("a [trigger] on a beach",), negative="blurry", seeds=(1, 2), steps=2, cfg=7.5, scale=1.0
    )
    with pytest.raises(BadInput, match="trained on a local model called base"):
        generate(tmp_path / "cat", None, wish, tmp_path / "nowhere")

    drawn = generate(tmp_path / "cat", spec.base, wish, tmp_path / "drawn")

    assert [path.read_bytes() for path in drawn] == [
        path.read_bytes() for path in sorted(samples.glob("*.png"))
    ]
    with pytest.raises(BadInput, match="is not empty"):
        generate(tmp_path / "cat", spec.base, wish, tmp_path / "drawn")


def test_the_base_is_found_in_the_header_or_in_the_card(tmp_path: Path) -> None:
    file = tmp_path / "cat.safetensors"
    header = {BASE_REVISION: "abc", "ss_clip_skip": "2", "ss_base_model_version": "sd_v1"}
    named = base_of(file, {BASE_MODEL: "owner/model", **header})
    assert (named.model, named.revision, named.clip_skip) == ("owner/model", "abc", 2)
    with pytest.raises(BadInput, match="says only v1-5"):
        base_of(file, {"ss_sd_model_name": "v1-5"})
    (tmp_path / "README.md").write_text(
        '---\ntags: [a]\nbase_model: "owner/other"\n---\n\nbase_model: no/no\n'
    )
    assert base_of(file, {}).model == "owner/other"
    with pytest.raises(BadInput, match=r"found none"):
        adapter_file(tmp_path)


def test_a_base_that_lies_elsewhere_is_used_as_in_training(trained: Trained, tmp_path: Path) -> None:
    """Else its schedule or its text states would be others, and no error would say so."""
    used = {"clip_skip": 2, "prediction_type": "v_prediction", "zero_terminal_snr": True}
    base = trained.spec.base.model_copy(update={**used, "merged_adapters": (MergedAdapter(path="/x"),)})
    as_v = replace(
        trained, prediction_type="v_prediction", spec=trained.spec.model_copy(update={"base": base})
    )
    for amount in ("minimal", "full"):
        found = base_of(tmp_path / "cat.safetensors", description(as_v, "cat", amount), "here/model")
        assert found.model_dump(include={"model", "merged_adapters", *used}) == {
            "model": "here/model",
            "merged_adapters": (),
            **used,
        }
    foreign = {"ss_base_model_version": "sdxl_base_v1-0", "ss_clip_skip": "2", "ss_zero_terminal_snr": "True"}
    assert base_of(tmp_path / "cat.safetensors", foreign, "here/xl") == Base(model="here/xl")


def test_a_trigger_that_nothing_tells_is_no_word(trained: Trained, tmp_path: Path) -> None:
    write_bundle(trained, tmp_path / "cat", "kohya", metadata="none")
    with pytest.raises(BadInput, match=r"does not say what \[trigger\] stands for"):
        generate(tmp_path / "cat", trained.spec.base, Wish(prompts=("a [trigger]",)), tmp_path / "drawn")


def test_a_run_is_exported_with_its_samples_and_drawn_from(
    spec: RunSpec, checkpoint: Path, samples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store = DirectoryStore(tmp_path / "store")
    run = PlannedRun(run_id="cat-000-00000000", index=0, parameters={}, spec=spec)
    submit(Sweep(name="cat", storage=Storage(url=store.url), runs=(run,)), store)
    log = run_log(store, run.run_id)
    log.append(claimed())
    local = read_checkpoint(checkpoint)
    assert local is not None
    CheckpointStore(store, run.run_id, log).publish(local, 1, incarnation(1))
    for file in samples.iterdir():
        store.create(layout.sample_key(run.run_id, 3, file.name), file.read_bytes())

    def orchestrate(*words: str) -> Result:
        return CliRunner().invoke(main, [*words, "--store", store.url])

    exported = orchestrate("export", "cat/0", "--to", "a1111", "--dtype", "fp16", "--name", "rufus-v1")
    drawn = orchestrate("generate", "cat/0", "--prompt", "a [trigger]", "--steps", "1", "--seed", "4")
    nothing = orchestrate("generate", "dog/0", "--prompt", "a")

    assert exported.exit_code == 0, exported.output
    file = Path("exports/cat-000-00000000-step00000003-a1111/rufus-v1.safetensors")
    assert exported.stdout == f"{file}\n"
    assert "in a prompt: <lora:rufus-v1:0.8> rufus" in exported.stderr
    assert sorted(path.name for path in file.parent.iterdir()) == [
        *("rufus-v1.json", "rufus-v1.png", "rufus-v1.safetensors")
    ]
    assert (drawn.exit_code, drawn.stdout) == (0, "generated/001/p00-s4.png\n"), drawn.output
    assert json.loads(Path("generated/001/index.json").read_text())[0]["prompt"] == "a rufus"
    assert nothing.exit_code == 4
    assert "dog/0 is no file or folder here" in nothing.stderr
