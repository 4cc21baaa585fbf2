"""What a run's trainer wrote, from the batches that its agent shipped to the store."""

from storage import layout
from storage.object_store import ObjectStore
from storage.redaction import printable, redacted

from ..errors import Unknown


def read_lines(
    store: ObjectStore, run_id: str, *, attempt: int | None = None, events: bool = False, tail: int = 0
) -> list[str]:
    """Return the last ``tail`` lines (0: all) of an attempt's output or events, safe to print.

    Raises:
        Unknown: The attempt shipped nothing; the message lists those that did.
    """
    prefix = layout.events_prefix(run_id) if events else layout.logs_prefix(run_id)
    keys = [info.key for info in store.list(prefix)]
    parsed = [(batch, key) for key in keys if (batch := layout.parse_batch(key))]
    attempts = sorted({batch.attempt for batch, _ in parsed})
    if not attempts:
        raise Unknown(f"no attempt of {run_id} has written anything yet")
    if attempt is not None and attempt not in attempts:
        known = ", ".join(map(str, attempts))
        raise Unknown(f"attempt {attempt} of {run_id} has written nothing; these have: {known}")
    wanted = attempts[-1] if attempt is None else attempt
    batches = sorted((batch.n, key) for batch, key in parsed if batch.attempt == wanted)
    lines: list[str] = []
    for _, key in reversed(batches):
        text = store.get(key).decode(errors="replace")
        lines = [redacted(printable(line)) for line in text.splitlines()] + lines
        if tail and len(lines) >= tail:
            break
    return lines[-tail:] if tail else lines
