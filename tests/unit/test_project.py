"""What the project promises about itself: what is shipped, what is never unpickled, how fast it answers."""

import ast
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("orchestrator", "storage", "trainer")


def package_files() -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names in a wheel built without network, from a copy: setuptools leaves a build folder behind."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index"]
    building = subprocess.run([*command, "--wheel-dir", target, source], capture_output=True, text=True)
    assert building.returncode == 0, building.stdout + building.stderr
    (wheel,) = target.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_holds_every_file_of_the_three_packages_and_nothing_else(wheel_names: set[str]) -> None:
    shipped = {name for name in wheel_names if ".dist-info/" not in name}
    assert shipped == package_files()
    assert {f"{package}/py.typed" for package in PACKAGES} <= shipped


def test_the_wheel_carries_the_licence_and_the_command(wheel_names: set[str]) -> None:
    inside = {name.split(".dist-info/")[1] for name in wheel_names if ".dist-info/" in name}
    assert {"licenses/LICENSE", "entry_points.txt", "METADATA"} <= inside


def pins(name: str) -> dict[str, str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_the_lock_pins_everything_the_project_names_and_none_of_cudas_own_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    named = [*project["dependencies"], *extras["demo"], *extras["dev"]]
    names = {requirement.split("[")[0].split(">")[0].split("<")[0] for requirement in named}
    locked = pins("requirements.lock")
    assert names <= locked.keys()
    assert [name for name in locked if name.startswith(("nvidia", "cuda", "triton"))] == []
    assert "+" not in locked["torch"]


def test_the_two_lock_files_can_be_installed_together() -> None:
    assert pins("requirements.lock").keys() & pins("requirements-bench.lock").keys() == set()


UNSAFE_MODULES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
A1111_FILES = "trainer/methods/hypernetwork_files.py"
"""The one place that may: A1111 knows hypernetworks as pickles only, see docs/decisions/0023."""
UNSAFE_CALLS = {"torch.load", "torch.save", "numpy.load", "np.load", "yaml.load", "yaml.unsafe_load"}


def unsafe_reads(source: str) -> Iterator[str]:
    """Every place where the source could turn bytes into running code, or restore more than named tensors."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found = [alias.name for alias in names if alias.name.split(".")[0] in UNSAFE_MODULES]
            case ast.ImportFrom(module=str(module)):
                found = [module] if module.split(".")[0] in UNSAFE_MODULES else []
            case ast.Call(func=ast.Attribute(attr="load_state")):
                found = ["load_state"]
            case ast.Call(func=ast.Attribute() as called):
                found = [ast.unparse(called)] if ast.unparse(called) in UNSAFE_CALLS else []
            case _:
                found = []
        yield from (f"line {getattr(node, 'lineno', 0)}: {name}" for name in found)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from cloudpickle import loads",
        "x = torch.load(path, weights_only=True)",
        "accelerator.load_state(folder)",
    ],
)
def test_a_pickle_in_any_dress_is_noticed(source: str) -> None:
    assert len(list(unsafe_reads(source))) == 1


def test_a_state_dict_of_named_tensors_is_no_pickle() -> None:
    assert list(unsafe_reads("model.load_state_dict(safetensors.torch.load_file(path))")) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_no_package_reads_pickles(package: str) -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / package).rglob("*.py"))}
    assert sources
    found = [
        f"{name} {place}"
        for path, text in sources.items()
        if (name := path.relative_to(ROOT).as_posix()) != A1111_FILES
        for place in unsafe_reads(text)
    ]
    assert found == []


def test_where_pickles_are_read_they_hold_tensors_only() -> None:
    source = (ROOT / A1111_FILES).read_text(encoding="utf-8")
    names = sorted(place.partition(": ")[2] for place in unsafe_reads(source))
    assert names == ["pickle", "torch.load", "torch.save"]  # the first for the name of an exception
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    (load,) = (call for call in calls if ast.unparse(call.func) == "torch.load")
    assert "weights_only=True" in {ast.unparse(keyword) for keyword in load.keywords}
    assert {ast.unparse(call.func) for call in calls if "pickle" in ast.unparse(call.func)} == set()


HEAVY = {"torch", "ray", "boto3", "diffusers", "transformers", "numpy"}

TRACE_IMPORTS = """
import sys
from orchestrator.cli import main
try:
    main(sys.argv[1:])
except SystemExit as leaving:
    assert leaving.code == 0
print("imported:", *sorted({name.split(".")[0] for name in sys.modules}))
"""


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        pytest.param(["--help"], "sweep", id="help"),
        pytest.param(["validate", "examples/digits/grid.yaml"], "4 runs", id="validate"),
    ],
)
def test_orchestrate_answers_without_torch_or_ray(arguments: list[str], answer: str) -> None:
    command = [sys.executable, "-c", TRACE_IMPORTS, *arguments]
    traced = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    said, _, imported = traced.stdout.rpartition("imported:")
    assert answer in said
    assert HEAVY & set(imported.split()) == set()
