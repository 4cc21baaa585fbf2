"""How ``python -m trainer run`` writes to a store: with create-only wherever that has one winner."""

import pytest
from support.s3_servers import S3Server

from storage.s3.store import S3Store
from trainer import __main__ as command


def test_a_store_with_real_create_only_is_used_with_it(radosgw: S3Server) -> None:
    store = command.open_probed(radosgw.url_of("alone"))

    assert isinstance(store, S3Store)
    assert not store.check_then_put


def test_a_store_without_it_is_looked_at_before_each_write_and_a_person_is_told(
    rclone: S3Server, capsys: pytest.CaptureFixture[str]
) -> None:
    store = command.open_probed(rclone.url_of("alone"))

    assert isinstance(store, S3Store)
    assert store.check_then_put
    assert "never start the same run twice at once" in capsys.readouterr().err
