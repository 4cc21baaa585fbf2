"""Every file under ``infra/`` is read by the tool that will read it in earnest, offline.

The cluster file goes through Ray's own preparation and schema, its instances through botocore's model of
EC2, its commands through bash; the container file through hadolint and a Dockerfile parser.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import botocore.session
import pytest
from botocore.exceptions import ParamValidationError
from botocore.validate import validate_parameters
from dockerfile_parse import DockerfileParser
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError

ROOT = Path(__file__).resolve().parents[2]
CLUSTER_FILE = ROOT / "infra" / "ray-aws-spot.yaml"
CONTAINER_FILE = ROOT / "infra" / "Containerfile"

READ_AS_RAY_UP_DOES = """
import json, sys, yaml
from ray.autoscaler._private.util import prepare_config, validate_config
config = prepare_config(yaml.safe_load(sys.stdin.read()))
validate_config(config)
print()
print(json.dumps(config))
"""


def read_with_ray(text: str) -> subprocess.CompletedProcess[str]:
    """What ``ray up`` does with a cluster file before it calls the cloud, in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", READ_AS_RAY_UP_DOES], input=text, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def cluster() -> dict[str, Any]:
    reading = read_with_ray(CLUSTER_FILE.read_text(encoding="utf-8"))
    assert reading.returncode == 0, reading.stderr
    config = json.loads(reading.stdout.splitlines()[-1])  # Ray logs on stdout too
    assert isinstance(config, dict)
    return config


def instances(cluster: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, node_type in cluster["available_node_types"].items():
        yield name, node_type["node_config"]


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("idle_timeout_minutes", "idle_timeout_min", "idle_timeout_min"),
        ("head_node_type: head", "head_node_type: haed", "head_node_type"),
        ("max_workers: 8\nupscaling", "max_workers: 1\nupscaling", "max_workers"),
    ],
)
def test_ray_refuses_a_cluster_file_with_a_mistake(right: str, wrong: str, complaint: str) -> None:
    text = CLUSTER_FILE.read_text(encoding="utf-8")
    assert text.count(right) == 1
    reading = read_with_ray(text.replace(right, wrong))
    assert reading.returncode != 0
    assert complaint in reading.stderr


def test_ray_accepts_the_cluster_file_with_bounded_workers_and_an_idle_timeout(
    cluster: dict[str, Any],
) -> None:
    bounds = {
        name: (node_type["min_workers"], node_type["max_workers"])
        for name, node_type in cluster["available_node_types"].items()
    }
    assert bounds == {"head": (0, 0), "spot-l4": (2, 8), "spot-a10g": (0, 4)}
    assert 0 < cluster["idle_timeout_minutes"] <= 30


def test_ec2_understands_every_instance(cluster: dict[str, Any]) -> None:
    operation = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances")
    shape = operation.input_shape
    assert shape is not None
    known_types = shape.members["InstanceType"].enum
    for _, node in instances(cluster):
        validate_parameters({**node, "MinCount": 1, "MaxCount": 1}, shape)
        assert node["InstanceType"] in known_types
        with pytest.raises(ParamValidationError, match="MarketOptions"):
            validate_parameters({**node, "MarketOptions": {}, "MinCount": 1, "MaxCount": 1}, shape)


def test_workers_are_spot_and_the_head_is_not(cluster: dict[str, Any]) -> None:
    spot = [name for name, node in instances(cluster) if "InstanceMarketOptions" in node]
    assert spot == ["spot-l4", "spot-a10g"]
    for name, node in instances(cluster):
        assert name not in spot or node["InstanceMarketOptions"]["MarketType"] == "spot"
    assert cluster["head_node_type"] == "head"
    assert cluster["available_node_types"]["head"]["resources"] == {"CPU": 0, "GPU": 0}


def test_every_instance_requires_session_tokens_for_its_metadata_and_encrypts_its_disk(
    cluster: dict[str, Any],
) -> None:
    for _, node in instances(cluster):
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["MetadataOptions"]["HttpPutResponseHopLimit"] == 1
        assert [disk["Ebs"]["Encrypted"] for disk in node["BlockDeviceMappings"]] == [True]


def test_the_dashboard_listens_locally_and_every_ray_node_demands_the_token(cluster: dict[str, Any]) -> None:
    head, worker = cluster["head_start_ray_commands"][-1], cluster["worker_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in head
    assert "0.0.0.0" not in CLUSTER_FILE.read_text(encoding="utf-8")
    for command in (head, worker):
        assert "RAY_AUTH_MODE=token" in command.split("ray start")[0]


def test_only_the_wheel_and_the_lock_file_are_copied_to_the_nodes(cluster: dict[str, Any]) -> None:
    assert set(cluster["file_mounts"].values()) == {"dist", "requirements.lock"}


def test_bash_can_read_every_command_of_the_cluster_file(cluster: dict[str, Any]) -> None:
    commands = [line for key in cluster if key.endswith("_commands") for line in cluster[key]]
    assert len(commands) > 8
    for command in commands:
        reading = subprocess.run(["bash", "-n"], input=command, capture_output=True, text=True)
        assert reading.returncode == 0, f"{command}\n{reading.stderr}"


def hadolint(text: str) -> subprocess.CompletedProcess[str]:
    program = str(Path(sys.executable).parent / "hadolint")
    command = [program, "--no-color", "--failure-threshold", "style", "-"]
    return subprocess.run(command, input=text, capture_output=True, text=True, timeout=60)


def test_hadolint_has_nothing_to_say_about_the_container_file() -> None:
    reading = hadolint(CONTAINER_FILE.read_text(encoding="utf-8"))
    assert (reading.returncode, reading.stdout) == (0, "")


@pytest.mark.parametrize(
    ("right", "wrong", "complaint"),
    [
        ("USER 10001:10001", "USER root", "DL3002"),
        ('ENTRYPOINT ["/usr/bin/tini", "--"]', "ENTRYPOINT tini --", "DL3025"),
        ("WORKDIR /src", "WORKDIRR /src", "missing whitespace"),
        ("COPY --from=build ", "COPY --from=built ", "DL3022"),
    ],
)
def test_hadolint_refuses_a_container_file_with_a_mistake(right: str, wrong: str, complaint: str) -> None:
    text = CONTAINER_FILE.read_text(encoding="utf-8")
    assert text.count(right) == 1
    reading = hadolint(text.replace(right, wrong))
    assert reading.returncode != 0
    assert complaint in reading.stdout + reading.stderr


@pytest.fixture(scope="module")
def container_lines() -> list[tuple[str, str]]:
    """Every instruction of the container file and its value, comments left out, in order."""
    with CONTAINER_FILE.open("rb") as file:
        parsed = DockerfileParser(fileobj=file)
        return [
            (line["instruction"], line["value"])
            for line in parsed.structure
            if line["instruction"] != "COMMENT"
        ]


def test_the_container_runs_as_nobody_special_under_an_init_that_passes_signals_on(
    container_lines: list[tuple[str, str]],
) -> None:
    last_stage = container_lines[max(i for i, (name, _) in enumerate(container_lines) if name == "FROM") :]
    assert [value for name, value in last_stage if name == "USER"] == ["10001:10001"]
    entrypoints = [json.loads(value) for name, value in last_stage if name == "ENTRYPOINT"]
    assert entrypoints == [["/usr/bin/tini", "--"]]


def test_one_container_file_serves_cpu_and_cuda_by_build_arguments(
    container_lines: list[tuple[str, str]],
) -> None:
    arguments = {value.split("=")[0] for name, value in container_lines if name == "ARG"}
    assert arguments == {"BASE_IMAGE", "TORCH_INDEX"}
    assert {value.split()[0] for name, value in container_lines if name == "FROM"} == {"${BASE_IMAGE}"}


def test_the_build_can_see_everything_that_the_container_file_copies(
    container_lines: list[tuple[str, str]],
) -> None:
    ignore_lines = (ROOT / "infra" / "Containerfile.dockerignore").read_text(encoding="utf-8").splitlines()
    visible = {line[1:] for line in ignore_lines if line.startswith("!")}
    assert "*" in ignore_lines
    copied = {
        source.rstrip("/")
        for name, value in container_lines
        if name == "COPY" and not value.startswith("--from")
        for source in value.split()[:-1]
    }
    assert copied == visible
    assert [source for source in copied if not (ROOT / source).exists()] == []


def test_no_key_of_the_cluster_file_is_given_twice() -> None:
    """Ray's reader silently keeps the last of two equal keys; this one refuses them."""
    text = CLUSTER_FILE.read_text(encoding="utf-8")
    assert YAML(typ="safe").load(text)["cluster_name"] == "orchestrate"
    with pytest.raises(DuplicateKeyError):
        YAML(typ="safe").load(text + "max_workers: 100\n")
