"""Who tells of a node's end, as a sweep file says it."""

from pathlib import Path

import pytest

from orchestrator.errors import InvalidFile
from orchestrator.grid.schema import Notices, Resources
from orchestrator.grid.sweep import validate
from orchestrator.notices.sources import source_of

GRID = "parameters: {rank: {values: [4]}}\nbase: {model: owner/model}\ndataset: {path: photos}\n"


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("none", Notices(service="none")),
        ("aws", Notices(service="aws")),
        ("{file: /run/ending}", Notices(file="/run/ending")),
        ("{command: [check, --now]}", Notices(command=("check", "--now"))),
        ("{url: http://10.0.0.1/ending}", Notices(url="http://10.0.0.1/ending")),
    ],
)
def test_a_sweep_file_names_who_tells(written: str, expected: Notices, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(f"{GRID}resources: {{notices: {written}}}\n")
    resources = validate(file).grid.resources
    assert resources.notices == expected
    assert Resources.model_validate_json(resources.model_dump_json()) == resources
    assert source_of(Notices()) is not None


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        (
            "awss",
            "4:22 E2111 resources.notices.service must be 'auto', 'none', 'aws', 'gcp' or 'azure', got 'awss'"
            " — did you mean 'aws'?",
        ),
        (
            "{file: run/ending}",
            "4:29 E2111 resources.notices.file must be an absolute path on the node, got 'run/ending'",
        ),
        (
            "{url: ftp://x}",
            "4:28 E2111 resources.notices.url must begin with http:// or https://, got 'ftp://x'",
        ),
        (
            "{url: 'https://somebody@10.0.0.1/x'}",
            "4:28 E2111 resources.notices.url must not contain a user or a password:"
            " the file is kept, and shown, as it is",
        ),
        ("{fil: /x}", "4:23 E2103 unknown key 'fil' in resources.notices — did you mean 'file'?"),
        (
            "{file: /x, command: [y]}",
            "4:22 E2111 resources.notices must name one of service, file, command and url",
        ),
        ("{command: check}", "4:32 E2110 'command: check' must be a list — write command: [check]"),
    ],
)
def test_a_mistake_is_told_where_it_is(written: str, complaint: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.yaml"
    file.write_text(f"{GRID}resources: {{notices: {written}}}\n")
    with pytest.raises(InvalidFile) as error:
        validate(file)
    assert str(error.value).splitlines()[0] == f"{file}:{complaint}"
