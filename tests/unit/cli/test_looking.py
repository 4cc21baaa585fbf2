"""``status``, ``why`` and ``logs``: what they print, and what they exit with."""

import json

import pytest
from support.command_line import CAT, R0, R1, Orchestrate, succeeded
from support.runs import claimed, committed, ended, lived

from orchestrator.commands.session import EXIT_DETACHED
from orchestrator.grid.submission import submit
from orchestrator.usual_store import store_flag
from storage import layout
from storage.directory import DirectoryStore
from storage.records import EndReason, Started


def test_status_as_json_is_one_stable_object(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))

    code, printed, said = orchestrate("status", "cat", "-o", "json")

    assert (code, said) == (0, "")
    told = json.loads(printed)
    assert {key: told[key] for key in ("schema", "sweep", "metric", "goal", "best")} == {
        "schema": 1,
        "sweep": "cat",
        "metric": "val/loss",
        "goal": "minimize",
        "best": R0,
    }
    assert [(row["run"], row["status"], row["step"]) for row in told["runs"]] == [
        (R0, "SUCCEEDED", 6),
        (R1, "PENDING", 0),
    ]


def test_status_off_a_terminal_cuts_nothing_off(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))

    code, printed, said = orchestrate("status", "cat")

    assert (code, said) == (0, "")
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines[0] == "RUN PARAMS STATUS STEP % LOSS VAL/LOSS ATTEMPTS LOST LAST-CKPT NODE"
    assert lines[1].startswith(f"{R0} ★ seed=0 SUCCEEDED 6/6 100 0.5000 0.5000 1 0 ")
    assert lines[2] == f"{R1} seed=1 PENDING 0/6 0 0 0"
    assert "…" not in printed


def test_watching_a_sweep_that_is_over_returns_at_once(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    for run_id in (R0, R1):
        lived(store, run_id, *succeeded(0.5))

    code, printed, said = orchestrate("status", "cat", "-w")

    assert code == 0
    assert said.splitlines() == [f"{run_id}: SUCCEEDED step 6/6" for run_id in (R0, R1)]
    assert len(printed.splitlines()) == 3


def test_ctrl_c_while_watching_detaches_and_says_what_next(
    orchestrate: Orchestrate, store: DirectoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit(CAT, store)

    def interrupted(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("orchestrator.reports.watch.time.sleep", interrupted)

    code, printed, said = orchestrate("status", "cat", "-w")

    assert (code, printed) == (EXIT_DETACHED, "")
    assert said.splitlines()[-5:] == [
        "Detached. The sweep goes on.",
        "  orchestrate status cat -w     watch it again",
        "  orchestrate explain cat/0     why a run waits, or is where it is",
        "  orchestrate why cat/0         why a run was interrupted",
        "  orchestrate cancel cat        stop it; checkpoints stay",
    ]

    monkeypatch.delenv("ORCHESTRATE_STORE")
    _, _, said = orchestrate("status", "cat", "-w", "--store", "file://./store")
    flag = f"--store {store.url}"
    assert said.splitlines()[-4:] == [
        f"  orchestrate status cat -w {flag}     watch it again",
        f"  orchestrate explain cat/0 {flag}     why a run waits, or is where it is",
        f"  orchestrate why cat/0 {flag}         why a run was interrupted",
        f"  orchestrate cancel cat {flag}        stop it; checkpoints stay",
    ]


def test_a_store_in_a_hint_is_quoted_for_the_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    url = "s3://bucket/loras?endpoint=http://127.0.0.1:9000&region=eu"
    monkeypatch.setenv("ORCHESTRATE_STORE", "ftp://no/store")
    assert store_flag(url) == f" --store '{url}'"
    monkeypatch.setenv("ORCHESTRATE_STORE", url)
    assert store_flag(url) == ""


def test_why_tells_what_an_interruption_cost(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lost = ended(1, EndReason.NODE_LOST).model_copy(update={"step": 5, "step_s": 2.0, "at": 0.0})
    lived(store, R0, claimed(), Started(attempt=1, step=0, at=0.0), committed(4), lost)

    code, printed, said = orchestrate("why", "cat/0")

    first, second = printed.splitlines()
    assert (code, said) == (0, "")
    assert first == f"{R0}: Interrupted once; waiting for a slot, step 4 of 6 committed."
    assert second.endswith("node n1 was lost (no notice): reached step 5, lost 1 step = 2.0 s.")


def test_why_with_the_timeline_tells_every_record(orchestrate: Orchestrate, store: DirectoryStore) -> None:
    submit(CAT, store)
    lived(store, R0, *succeeded(0.5))

    code, printed, _ = orchestrate("why", R0, "--timeline")

    lines = printed.splitlines()
    assert (code, lines[0]) == (0, f"{R0}: Never interrupted; SUCCEEDED at step 6 of 6.")
    assert [line.split("  ", 1)[1] for line in lines[1:]] == [
        "attempt 1 placed on n1",
        "attempt 1 training, from step 0",
        "step 6 committed by attempt 1, 0.00 MB (final)",
        "SUCCEEDED at step 6",
    ]


def ship(store: DirectoryStore, run_id: str, attempt: int, *batches: str) -> None:
    for n, text in enumerate(batches):
        store.put(layout.log_text_key(run_id, attempt, n), text.encode())


def test_logs_are_those_of_the_newest_attempt_that_wrote_any(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    ship(store, R0, 1, "old\n")
    ship(store, R0, 2, "one\ntwo\n", "three\nfour\n", "five\n")
    store.put(layout.events_key(R0, 2, 0), b'{"event": "step"}\n')

    assert orchestrate("logs", "cat/0") == (0, "one\ntwo\nthree\nfour\nfive\n", "")
    assert orchestrate("logs", "cat/0", "-n", "2") == (0, "four\nfive\n", "")
    assert orchestrate("logs", "cat/0", "-n", "0", "--attempt", "1") == (0, "old\n", "")
    assert orchestrate("logs", "cat/0", "--events") == (0, '{"event": "step"}\n', "")


def test_logs_that_are_not_there_are_exit_4_with_those_that_are(
    orchestrate: Orchestrate, store: DirectoryStore
) -> None:
    submit(CAT, store)
    ship(store, R0, 1, "old\n")
    ship(store, R0, 3, "new\n")

    said = f"attempt 2 of {R0} has written nothing; these have: 1, 3\n"
    assert orchestrate("logs", "cat/0", "--attempt", "2") == (4, "", said)
    assert orchestrate("logs", "cat/1") == (4, "", f"no attempt of {R1} has written anything yet\n")
    assert orchestrate("logs", "cat/0", "--attempt", "0")[0] == 2
