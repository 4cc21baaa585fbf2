"""What the services of the clouds tell of a node's end."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.fake_metadata import INSTANCE, VM, FakeMetadata, announce, metadata_service, withdraw
from support.notices import NOWHERE

from orchestrator.grid.schema import Notices
from orchestrator.notices.clouds import Aws, Azure, Gcp
from orchestrator.notices.metadata import Unreachable, ask
from orchestrator.notices.notice import Kind, Notice
from orchestrator.notices.sources import AZURE_TAG, Auto, source_of, vendor

CLOUDS = {"aws": Aws, "gcp": Gcp, "azure": Azure}


@pytest.fixture(params=["aws", "gcp", "azure"])
def cloud(request: pytest.FixtureRequest, state: Path) -> Iterator[FakeMetadata]:
    with metadata_service(request.param, state) as service:
        yield service


@pytest.mark.parametrize("in_s", [120, 30, 5])
def test_each_cloud_tells_a_notice_and_its_end(cloud: FakeMetadata, state: Path, in_s: int) -> None:
    source = source_of(Notices(service=cloud.provider), cloud.url)  # type: ignore[arg-type]
    assert source is not None
    assert source.poll() is None
    announce(state, in_s)
    notice = source.poll()
    withdraw(state)
    after_it = source.poll()

    assert notice is not None
    assert notice.kind is Kind.TERMINATE
    assert notice.ends_node
    assert notice.left_s is not None
    if cloud.provider == "gcp":  # which tells no time
        assert notice.left_s == 30.0
    else:  # the service tells whole seconds, and its machine may be slow
        assert in_s - 60 < notice.left_s <= in_s + 1
    assert after_it is None


def test_the_time_left_is_by_the_clock_of_the_service(state: Path) -> None:
    with metadata_service("aws", state) as service:
        service.skew_s = 3 * 3600.0
        announce(state, 120)
        notice = Aws(service.url).poll()
    assert notice is not None
    assert notice.left_s is not None
    assert 60 < notice.left_s <= 121


def test_aws_is_asked_with_a_token_that_is_renewed_when_it_is_over(state: Path) -> None:
    with metadata_service("aws", state) as service:
        source = Aws(service.url)
        announce(state, 30)
        first = source.poll()
        service.tokens.clear()
        second = source.poll()
    assert first is not None
    assert second is not None
    assert first.detail == f"{INSTANCE}: terminate"
    assert service.requests.count("PUT /latest/api/token") == 2


def test_aws_tells_of_a_rebalance_which_ends_nothing(state: Path) -> None:
    with metadata_service("aws", state) as service:
        announce(state, 0, "rebalance")
        notice = Aws(service.url).poll()
    assert notice == Notice(kind=Kind.REBALANCE, source="AWS", detail=INSTANCE)
    assert not notice.ends_node


@pytest.mark.parametrize(
    ("provider", "detail"), [("gcp", "TERMINATE_ON_HOST_MAINTENANCE"), ("azure", "vm-7: Redeploy")]
)
def test_maintenance_that_nothing_survives_is_a_notice(provider: str, detail: str, state: Path) -> None:
    with metadata_service(provider, state) as service:
        announce(state, 600, "maintenance")
        notice = CLOUDS[provider](service.url).poll()
    assert notice is not None
    assert (notice.kind, notice.detail) == (Kind.MAINTENANCE, detail)


@pytest.mark.parametrize(("gpus", "left_s"), [(True, 3600.0), (False, 60.0)])
def test_google_tells_machines_with_gpus_an_hour_ahead(
    gpus: bool, left_s: float, state: Path, tmp_path: Path
) -> None:
    gpu = tmp_path / "nvidiactl"
    if gpus:
        gpu.touch()
    with metadata_service("gcp", state) as service:
        announce(state, 600, "maintenance")
        notice = Gcp(service.url, gpu=gpu).poll()
    assert notice is not None
    assert notice.left_s == left_s


@pytest.mark.parametrize(
    ("provider", "kind", "beside"),
    [("aws", "rebalance", "rebalance"), ("gcp", "maintenance", "maintenance-event")],
)
def test_what_cannot_be_asked_beside_a_termination_is_as_it_was_and_hides_none(
    provider: str, kind: str, beside: str, state: Path
) -> None:
    with metadata_service(provider, state) as service:
        source = CLOUDS[provider](service.url)
        service.broken_paths = (beside,)
        assert source.poll() is None
        service.broken_paths = ()
        announce(state, 60, kind)
        lesser = source.poll()
        service.broken_paths = (beside,)
        withdraw(state)
        assert source.poll() == lesser
        announce(state, 60)
        notice = source.poll()
    assert lesser is not None
    assert lesser.kind == kind
    assert notice is not None
    assert notice.kind is Kind.TERMINATE


def test_a_termination_counts_although_the_instance_has_no_name(state: Path) -> None:
    with metadata_service("aws", state) as service:
        service.silent_paths = ("instance-id",)
        announce(state, 60)
        notice = Aws(service.url).poll()
    assert notice is not None
    assert (notice.kind, notice.detail) == (Kind.TERMINATE, "this instance: terminate")


def test_azure_tells_every_machine_of_a_set_about_all_of_them(state: Path) -> None:
    with metadata_service("azure", state) as service:
        announce(state, 60, "somebody else's, and a freeze of ours")
        assert Azure(service.url).poll() is None
        announce(state, 60)
        notice = Azure(service.url).poll()
    assert notice is not None
    assert notice.detail == f"{VM}: Preempt"


def test_a_service_that_is_away_or_broken_says_nothing(cloud: FakeMetadata, state: Path) -> None:
    announce(state, 30)
    cloud.broken = True
    with pytest.raises(Unreachable):
        CLOUDS[cloud.provider](cloud.url).poll()
    with pytest.raises(Unreachable):
        CLOUDS[cloud.provider](NOWHERE).poll()


def test_a_proxy_is_never_asked(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, NOWHERE)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with metadata_service("aws", state) as service:
        assert Aws(service.url).poll() is None


def test_an_answer_in_drops_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.notices.metadata.LONGEST_S", 0.1)

    def drip(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, contextlib.suppress(OSError):
            connection.recv(1000)
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n")
            for _ in range(100):
                connection.sendall(b"x")
                time.sleep(0.02)

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=drip, args=(listening,))
        thread.start()
        try:
            with pytest.raises(Unreachable, match="not whole within"):
                ask(f"http://127.0.0.1:{listening.getsockname()[1]}/")
        finally:
            thread.join()


def test_a_redirect_is_an_answer_and_not_followed() -> None:
    asked: list[bytes] = []

    def redirect(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection:
            asked.append(connection.recv(1000))
            connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=redirect, args=(listening,))
        thread.start()
        try:
            answer = ask(f"http://127.0.0.1:{listening.getsockname()[1]}/here")
        finally:
            thread.join()
    assert (answer.status, len(asked)) == (302, 1)


def test_the_cloud_that_answers_is_found(cloud: FakeMetadata, state: Path, tmp_path: Path) -> None:
    source = Auto(cloud.url, dmi=tmp_path / "no-dmi")
    announce(state, 30)
    notice = source.poll()
    assert notice is not None
    assert notice.source == CLOUDS[cloud.provider].name


@pytest.mark.parametrize(
    ("files", "cloud"),
    [
        ({"sys_vendor": "Amazon EC2\n"}, "AWS"),
        ({"sys_vendor": "Xen\n", "bios_version": "4.11.amazon\n"}, "AWS"),
        ({"sys_vendor": "Google\n", "product_name": "Google Compute Engine\n"}, "Google Cloud"),
        ({"sys_vendor": "Microsoft Corporation\n", "chassis_asset_tag": AZURE_TAG}, "Azure"),
        ({"sys_vendor": "Microsoft Corporation\n"}, None),
        ({"sys_vendor": "Dell Inc.\n"}, None),
        ({}, None),
    ],
)
def test_a_machine_knows_whose_it_is(files: dict[str, str], cloud: str | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert vendor(tmp_path) == cloud


def test_where_no_cloud_answers_nothing_is_known(tmp_path: Path) -> None:
    with pytest.raises(Unreachable):
        Auto(NOWHERE, dmi=tmp_path).poll()
