"""The systemd unit and the Kubernetes manifest say what the programs that they start understand."""

import configparser
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from orchestrator.commands.supervise_command import supervise
from orchestrator.on_ray.detection import PROFILES
from orchestrator.supervise.supervision import EXIT_TAKEN_OVER, HOPELESS

INFRA = Path(__file__).resolve().parents[2] / "infra"
UNIT = INFRA / "systemd" / "orchestrate-supervise@.service"
ENVIRONMENT = INFRA / "systemd" / "sweep.env.example"
WORKER = INFRA / "orchestrate-worker"
MANIFEST = INFRA / "kubernetes" / "sweep.yaml"
NEVER_AGAIN = {*HOPELESS, EXIT_TAKEN_OVER, 100}

PARSED_BY_RAY = """
import json, sys
from ray.scripts.scripts import start
for words in json.load(sys.stdin):
    start.make_context("ray start", words)
"""


def read_unit() -> configparser.ConfigParser:
    unit = configparser.ConfigParser(interpolation=None, strict=True)
    unit.optionxform = str  # type: ignore[assignment, method-assign]
    unit.read_string(UNIT.read_text())
    return unit


def environment() -> dict[str, str]:
    lines = [line for line in ENVIRONMENT.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)


@pytest.fixture(scope="module")
def manifest() -> dict[str, Any]:
    """The documents of the manifest, by kind."""
    documents = list(YAML(typ="safe").load_all(MANIFEST.read_text()))
    assert len({d["kind"] for d in documents}) == len(documents)
    return {d["kind"]: d for d in documents}


def pod(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    return dict(manifest[kind]["spec"]["template"]["spec"])


def container(manifest: dict[str, Any], kind: str) -> dict[str, Any]:
    (only,) = pod(manifest, kind)["containers"]
    return dict(only)


def ray_starts(manifest: dict[str, Any]) -> list[list[str]]:
    """Every ``ray start`` of the two forms, with placeholders filled in, from its third word on."""
    (head,) = [a for a in container(manifest, "Job")["args"] if a.startswith("--head=")]
    name, *worker = container(manifest, "Deployment")["args"]
    assert name == WORKER.name
    texts = [head.removeprefix("--head="), shlex.join(worker), environment()["ORCHESTRATE_HEAD"]]
    commands = [shlex.split(text.replace("$(POD_IP)", "10.0.0.7")) for text in texts]
    assert [(Path(words[0]).name, words[1]) for words in commands] == [("ray", "start")] * 3
    assert all("--block" in words for words in commands)
    return [words[2:] for words in commands]


def test_ray_understands_every_start_command(manifest: dict[str, Any]) -> None:
    starts = ray_starts(manifest)
    for words, code in ((starts, 0), ([[*starts[0], "--dashbord-host=x"]], 2)):
        done = subprocess.run(
            [sys.executable, "-c", PARSED_BY_RAY], input=json.dumps(words), capture_output=True, text=True
        )
        assert (done.returncode == 0) == (code == 0), done.stderr


def test_supervise_understands_its_options_in_both_forms(manifest: dict[str, Any]) -> None:
    args = [a.replace("$(POD_IP)", "10.0.0.7") for a in container(manifest, "Job")["args"]]
    assert args[:2] == ["orchestrate", "supervise"]
    given = supervise.make_context("supervise", args[2:]).params
    assert given["sweep"].endswith(".yaml")
    assert (given["address"], given["detection"]) == ("10.0.0.7:6379", "patient")

    words = shlex.split(read_unit()["Service"]["ExecStart"].replace("%i", "cat"))
    assert (Path(words[0]).name, words[1]) == ("orchestrate", "supervise")
    assert supervise.make_context("supervise", words[2:]).params["sweep"] == "/etc/orchestrate/cat.yaml"


def test_the_environment_file_names_variables_that_are_read_and_no_secret(manifest: dict[str, Any]) -> None:
    known = environment()
    options = {name for p in supervise.params for name in [getattr(p, "envvar", None)] if name}
    assert options <= set(known), "an option of the supervisor is not shown"
    assert known["ORCHESTRATE_DETECTION"] in PROFILES
    assert known["RAY_ADDRESS"].split(":")[0] in known["ORCHESTRATE_HEAD"]
    assert known["RAY_AUTH_MODE"] == "token"
    assert "AWS_SECRET_ACCESS_KEY" not in known
    for kind in ("Job", "Deployment"):
        variables = {v["name"]: v.get("value") for v in container(manifest, kind)["env"]}
        assert variables["RAY_AUTH_MODE"] == "token"
        mounts = [m["mountPath"] for m in container(manifest, kind)["volumeMounts"]]
        assert str(Path(variables["RAY_AUTH_TOKEN_PATH"]).parent) in mounts
    assert not re.search(r"(?i)(secret|password|token|key):\s*['\"]?[A-Za-z0-9/+]{16,}", MANIFEST.read_text())


def test_neither_form_tries_again_what_no_retry_can_help(manifest: dict[str, Any]) -> None:
    service = read_unit()["Service"]
    assert set(map(int, service["RestartPreventExitStatus"].split())) == NEVER_AGAIN
    assert service["Restart"] == "on-failure"
    rules = manifest["Job"]["spec"]["podFailurePolicy"]["rules"]
    (codes,) = [rule["onExitCodes"] for rule in rules if rule["action"] == "FailJob"]
    assert set(codes["values"]) == NEVER_AGAIN
    assert codes["containerName"] == container(manifest, "Job")["name"]
    assert pod(manifest, "Job")["restartPolicy"] == "Never", "what a pod failure policy asks for"


def test_a_worker_has_time_to_save_itself_before_ray_is_stopped(manifest: dict[str, Any]) -> None:
    assert "lifecycle" not in container(manifest, "Deployment"), "SIGTERM would come after it"
    variables = {v["name"]: v.get("value") for v in container(manifest, "Deployment")["env"]}
    file = variables["ORCHESTRATE_NOTICE_FILE"]
    assert int(variables["ORCHESTRATE_STOP_S"]) < pod(manifest, "Deployment")["terminationGracePeriodSeconds"]
    assert str(Path(file).parent) in [
        m["mountPath"] for m in container(manifest, "Deployment")["volumeMounts"]
    ]
    assert f"notices: {{file: {file}}}" in MANIFEST.read_text()


def test_everything_in_a_pod_is_mounted_from_a_volume_that_it_has(manifest: dict[str, Any]) -> None:
    for kind in ("Job", "Deployment"):
        volumes = {volume["name"] for volume in pod(manifest, kind)["volumes"]}
        assert {m["name"] for m in container(manifest, kind)["volumeMounts"]} == volumes
        assert pod(manifest, kind)["securityContext"]["runAsNonRoot"] is True
        assert container(manifest, kind)["securityContext"]["allowPrivilegeEscalation"] is False
        assert manifest[kind]["spec"]["template"]["metadata"]["labels"]["app"] == "orchestrate"
    labels = manifest["Job"]["spec"]["template"]["metadata"]["labels"]
    assert manifest["Service"]["spec"]["selector"] == labels
    head = f"--address={manifest['Service']['metadata']['name']}:6379"
    assert head in container(manifest, "Deployment")["args"]
    selected = manifest["Deployment"]["spec"]["selector"]["matchLabels"]
    assert selected == manifest["Deployment"]["spec"]["template"]["metadata"]["labels"]


def test_systemd_accepts_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("systemd-analyze is not installed")
    text = UNIT.read_text().replace("/opt/orchestrate/venv/bin/orchestrate", "/bin/true")
    text = re.sub(r"(?m)^(User|EnvironmentFile|Documentation)=.*\n", "", text)
    for unit, right in ((text, True), (text.replace("KillMode=mixed", "KillModus=mixed"), False)):
        file = tmp_path / "orchestrate-supervise@cat.service"
        file.write_text(unit)
        done = subprocess.run([analyze, "verify", str(file)], capture_output=True, text=True, timeout=60)
        ours = [line for line in done.stderr.splitlines() if "orchestrate-supervise@" in line]
        assert (ours == []) == right, done.stderr
