"""Eight writers with random stalls, for a few seconds on each store. ``make race`` gives them a minute."""

from pathlib import Path

import pytest
from proof.race import Result, race, race_on
from support.s3_servers import S3Server

SECONDS = 4.0
MOST_TRIES = 8


def assert_fair(result: Result) -> None:
    assert result.violations == []
    assert result.claims > 0
    assert result.records > result.claims, "nobody did anything but claim"


def test_processes_race_for_runs_in_a_folder(tmp_path: Path) -> None:
    assert_fair(race((tmp_path / "store").as_uri(), SECONDS, tmp_path / "disk", direct=True))


def test_processes_race_for_runs_on_a_server_whose_create_is_atomic(
    radosgw: S3Server, tmp_path: Path
) -> None:
    result = race_on(radosgw, SECONDS, tmp_path, "race")

    assert result.direct, "the probe finds create-only atomic here"
    assert_fair(result)


@pytest.mark.parametrize("kind", ["rclone", "swift"])
def test_where_create_is_not_atomic_the_probe_says_so_and_one_appender_makes_it_safe(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    server: S3Server = request.getfixturevalue(kind)

    result = race_on(server, SECONDS, tmp_path, "race")

    assert not result.direct
    assert_fair(result)


def test_without_the_appender_the_same_race_is_found_out(rclone: S3Server, tmp_path: Path) -> None:
    for n in range(MOST_TRIES):
        if race(rclone.url_of(f"lying-{n}"), SECONDS, tmp_path / str(n), direct=True).violations:
            return
    pytest.fail("a store that ignores create-only went through unnoticed")
