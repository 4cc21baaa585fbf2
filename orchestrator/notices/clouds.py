"""The notices of AWS, Google Cloud and Azure, as their metadata services tell them to their machines.

Each class is asked by ``poll()``, which returns the gravest thing that is announced, or None. They begin with
what proves that it is this cloud which answers, see ``is_here``. A termination is asked for first; where the
lesser notice beside it cannot be asked for, it is taken to be as it was.
"""

import contextlib
import json
from datetime import datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

from .metadata import LINK_LOCAL, Answer, Unreachable, ask
from .notice import Kind, Notice

TOKEN_TTL_S = 21_600
GCP_WARNING_S = 30.0
"""What Google Cloud gives a preempted machine; it does not say when that began."""
GCP_MAINTENANCE_S = 60.0
"""How long ahead a machine is told that its host's maintenance ends it; it does not say when that began."""
GCP_MAINTENANCE_GPU_S = 3600.0
"""The same of a machine with GPUs."""
GPU = Path("/dev/nvidiactl")
"""Is there where this process may use an NVIDIA GPU."""


class Aws:
    """Spot interruption and rebalance notices of EC2, by IMDSv2: every request carries a session's token."""

    name = "AWS"

    def __init__(self, base: str = LINK_LOCAL) -> None:
        self._base = base
        self._token: str | None = None
        self._instance = ""
        self._beside: Notice | None = None

    def is_here(self) -> bool:
        return bool(self._new_token())

    def poll(self) -> Notice | None:
        action = self._get("spot/instance-action")
        if action.status == 200:
            told = _object(action)
            left_s = _left_s(action, str(told.get("time")))
            detail = f"{self._instance_id()}: {told.get('action', 'terminate')}"
            return Notice(kind=Kind.TERMINATE, source=self.name, detail=detail, left_s=left_s)
        _expect(action, 404)
        with contextlib.suppress(Unreachable):
            self._beside = self._rebalance()
        return self._beside

    def _rebalance(self) -> Notice | None:
        rebalance = self._get("events/recommendations/rebalance")
        if rebalance.status == 200:
            return Notice(kind=Kind.REBALANCE, source=self.name, detail=self._instance_id())
        _expect(rebalance, 404)
        return None

    def _get(self, path: str) -> Answer:
        answer = self._with_token(path)
        if answer.status == 401:  # the token is over
            self._token = None
            answer = self._with_token(path)
        return answer

    def _with_token(self, path: str) -> Answer:
        self._token = self._token or self._new_token()
        return ask(f"{self._base}/latest/meta-data/{path}", {"X-aws-ec2-metadata-token": self._token})

    def _new_token(self) -> str:
        header = {"X-aws-ec2-metadata-token-ttl-seconds": str(TOKEN_TTL_S)}
        answer = ask(f"{self._base}/latest/api/token", header, method="PUT")
        _expect(answer, 200)
        if not answer.text.isascii() or not answer.text.isprintable() or not answer.text:
            raise Unreachable(f"{self._base} gave something that is no token")
        return answer.text

    def _instance_id(self) -> str:
        if not self._instance:
            with contextlib.suppress(Unreachable):  # the notice counts without a name
                answer = self._get("instance-id")
                self._instance = answer.text if answer.status == 200 else ""
        return self._instance or "this instance"


class Gcp:
    """Preemption and host maintenance of Compute Engine."""

    name = "Google Cloud"

    def __init__(self, base: str = LINK_LOCAL, gpu: Path = GPU) -> None:
        self._base = base
        self._ahead_s = GCP_MAINTENANCE_GPU_S if gpu.exists() else GCP_MAINTENANCE_S
        self._beside: Notice | None = None

    def is_here(self) -> bool:
        return self._get("name").status == 200

    def poll(self) -> Notice | None:
        preempted = self._get("preempted")
        _expect(preempted, 200)
        if preempted.text == "TRUE":
            return Notice(kind=Kind.TERMINATE, source=self.name, detail="preempted", left_s=GCP_WARNING_S)
        with contextlib.suppress(Unreachable):
            self._beside = self._maintenance()
        return self._beside

    def _maintenance(self) -> Notice | None:
        event = self._get("maintenance-event")
        _expect(event, 200)
        if event.text != "TERMINATE_ON_HOST_MAINTENANCE":  # a machine that is moved alive notices nothing
            return None
        return Notice(kind=Kind.MAINTENANCE, source=self.name, detail=event.text, left_s=self._ahead_s)

    def _get(self, path: str) -> Answer:
        answer = ask(f"{self._base}/computeMetadata/v1/instance/{path}", {"Metadata-Flavor": "Google"})
        if answer.headers.get("metadata-flavor") != "Google":
            raise Unreachable(f"{self._base} is not Google Cloud's")
        return answer


class Azure:
    """Scheduled events of Azure: eviction, restarts, moves. The machines of a set see those of all."""

    name = "Azure"

    def __init__(self, base: str = LINK_LOCAL) -> None:
        self._base = base
        self._vm = ""

    def is_here(self) -> bool:
        return bool(self._name())

    def poll(self) -> Notice | None:
        name = self._name()
        answer = self._get("scheduledevents?api-version=2020-07-01")
        _expect(answer, 200)
        events = _object(answer).get("Events")
        if not isinstance(events, list):
            raise Unreachable("the metadata service answers without a list of events")
        mine = [e for e in events if isinstance(e, dict) and name in (e.get("Resources") or ())]
        announced = [notice for event in mine if (notice := self._notice(event, answer))]
        return min(announced, key=lambda n: (n.kind is not Kind.TERMINATE, n.left_s or 0.0), default=None)

    def _notice(self, event: dict[str, Any], answer: Answer) -> Notice | None:
        kinds = {
            "Preempt": Kind.TERMINATE,
            "Terminate": Kind.TERMINATE,
            "Reboot": Kind.MAINTENANCE,
            "Redeploy": Kind.MAINTENANCE,
        }  # not Freeze: a pause of some seconds
        kind = kinds.get(str(event.get("EventType")))
        if kind is None:
            return None
        not_before = str(event.get("NotBefore") or "")  # empty once it has begun
        left_s = _left_s(answer, not_before) if not_before else 0.0
        detail = f"{self._vm}: {event.get('EventType')}"
        return Notice(kind=kind, source=self.name, detail=detail, left_s=left_s)

    def _name(self) -> str:
        if not self._vm:
            answer = self._get("instance/compute/name?api-version=2021-02-01&format=text")
            _expect(answer, 200)
            self._vm = answer.text
        return self._vm

    def _get(self, path: str) -> Answer:
        return ask(f"{self._base}/metadata/{path}", {"Metadata": "true"})


def _expect(answer: Answer, status: int) -> None:
    if answer.status != status:
        raise Unreachable(f"the metadata service answers with status {answer.status}")


def _object(answer: Answer) -> dict[str, Any]:
    try:
        told = json.loads(answer.text)
    except ValueError as error:
        raise Unreachable(f"the metadata service answers with something else than JSON: {error}") from error
    if not isinstance(told, dict):
        raise Unreachable("the metadata service answers with something else than an object")
    return told


def _left_s(answer: Answer, text: str) -> float | None:
    """Seconds to a moment in either of the two usual forms; None, and the notice counts all the same, if it
    is in neither."""
    for read in (datetime.fromisoformat, parsedate_to_datetime):
        with contextlib.suppress(ValueError):
            return answer.left_s(read(text))
    return None
