"""Texts of trainers on their way to the store and to a terminal: nothing to obey, nothing secret."""

import json
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.fake_cluster import small_sweep
from support.runs import claimed

from orchestrator.cli import main
from orchestrator.reports.trainer_logs import read_lines
from orchestrator.reports.why import timeline, why
from storage import layout
from storage.directory import DirectoryStore
from storage.log import run_log
from storage.memory import MemoryStore
from storage.records import Ended, EndReason, Entry
from storage.run_state import RunState, apply
from trainer.config import Evaluate
from trainer.evaluate import evaluate
from trainer.patience import one_line
from trainer.rundir import RunDir
from trainer.shipper import Shipper
from trainer.stop import Stop

RUN = "cat"
SECRET = "hf_abcdefghijklmnopqrstuvwx"
RED = f"\x1b[31m\ttoken\x1b[0m {SECRET}"
CLEAN = "\ttoken [redacted]"


def test_a_record_carries_neither_secrets_nor_escape_sequences() -> None:
    assert one_line(f"OSError:\n{RED}") == "OSError: token [redacted]"


def test_what_is_shipped_has_no_secrets_and_events_stay_events(tmp_path: Path) -> None:
    store, run_dir = MemoryStore(), RunDir(tmp_path)
    event = {"event": "error", "type": "E", "message": f'"https://h/?X-Amz-Signature={SECRET}"'}
    run_dir.events.write_text(json.dumps(event) + "\n")
    run_dir.log.write_bytes(f"{SECRET}\n".encode() + b"\xff\n")
    shipper = Shipper(store, RUN, 1, run_dir, every_s=600.0)
    shipper.start()
    shipper.finish(timeout_s=60.0)

    assert store.get(layout.log_text_key(RUN, 1, 0)) == b"[redacted]\n\xff\n"
    shipped = json.loads(store.get(layout.events_key(RUN, 1, 0)))
    assert shipped == {**event, "message": '"https://h/?[redacted]"'}


def test_log_lines_are_safe_to_print() -> None:
    store = MemoryStore()
    store.put(layout.log_text_key(RUN, 1, 0), f"{RED}\nsecond\r\n".encode())

    assert read_lines(store, RUN) == [CLEAN, "second"]


def test_an_explanation_is_safe_to_print() -> None:
    end = Ended(attempt=1, reason=EndReason.APP_ERROR, detail=f"a\n{RED}", at=0.0)
    history = (claimed(node="n1\x1b]0;title\x07"), end)
    state = RunState()
    for record in history:
        state = apply(state, record)
    entries = [Entry(seq=n, nonce="0" * 32, prev="", record=r) for n, r in enumerate(history)]

    told = "\n".join([why(state, 10), *timeline(entries)])

    assert "the trainer failed on n1: " in told
    assert f"APP_ERROR, a {CLEAN}" in told
    assert "\x1b" not in told
    assert SECRET not in told


def test_an_evaluate_command_sees_no_credentials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HF_TOKEN", "OPENAI_API_KEY", "CLIENT_SECRET", "DB_PASSWORD"):
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("HARMLESS", "1")
    program = "import json, os; print(json.dumps({'seen': list(os.environ.values()).count('canary'), "
    program += "'harmless': float(os.environ['HARMLESS'])}))"

    scores = evaluate(Evaluate(command=(sys.executable, "-c", program)), tmp_path, Stop())

    assert scores == {"seen": 0.0, "harmless": 1.0}


def test_the_previous_attempts_log_is_there_when_its_node_is_gone(tmp_path: Path) -> None:
    store, sweep = DirectoryStore(tmp_path), small_sweep(runs=1)
    store.create(layout.sweep_spec(sweep.name), sweep.to_json())
    run_id = sweep.runs[0].run_id
    log = run_log(store, run_id)
    log.append(claimed(1))

    def logs(*options: str) -> Result:
        return CliRunner().invoke(main, ["logs", "cat/0", *options, "--store", store.url])

    assert (logs("--previous").exit_code, "no attempt before its newest" in logs("--previous").output) == (
        4,
        True,
    )
    store.put(layout.log_text_key(run_id, 1, 0), b"the first\n")
    log.append(Ended(attempt=1, reason=EndReason.NODE_LOST, at=0.0))
    log.append(claimed(2))
    assert (logs("--previous").output, logs().output) == ("the first\n", "the first\n")
    store.put(layout.log_text_key(run_id, 2, 0), b"the second\n")
    assert (logs("--previous").output, logs().output) == ("the first\n", "the second\n")
    assert logs("--previous", "--attempt", "1").exit_code == 2
