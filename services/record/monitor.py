"""What the HTTP threads and the loop share about a run: status and records out, verbs in."""

import json
import threading
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from typing import Any

from opd_governor.actors.governor.actuators import describe
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.control.app import MAX_RECORDS, Phase, Verb
from opd_governor.services.record.rundir import Record

MAX_KEPT = 20_000
"""Steps and decisions kept in memory for the live page: about 100 MB of JSON (as objects they take five times that). The files have
all of them, and what belongs to single rollouts."""
PER_ROLLOUT = ("lengths", "prompts")
MAX_SAMPLES = 50
MAX_EVENTS = 50
"""Newest ones, in every answer of GET /v1/run."""
Kept = deque[tuple[int, bytes]]
"""(step, the record as JSON)."""


class RunMonitor:
    """The loop writes, HTTP reads; verbs go the other way and are taken at the next step border."""

    def __init__(self, name: str, total_steps: int, limits: LengthLimits) -> None:
        self._lock = threading.Lock()
        self._status: dict[str, Any] = {
            "name": name,
            "phase": "starting",
            "step": 0,
            "total_steps": total_steps,
            "weight_version": 0,
            "limits": asdict(limits),
            "links": {},
            "waiting_for": None,
            "events": [],
        }
        self._events: deque[Record] = deque(maxlen=MAX_EVENTS)
        self._steps: Kept = deque(maxlen=MAX_KEPT)
        self._samples: deque[Record] = deque(maxlen=MAX_SAMPLES)
        self._decisions: Kept = deque(maxlen=MAX_KEPT)
        self._governor: dict[str, Any] = {"mode": None, "pressure": 0.0, "signals": {}, "readings": {}, "limits": asdict(limits)}
        self._evidence: dict[str, float] = {}
        """Signal -> evidence over its threshold, at the last decision."""
        self._asked: list[Verb] = []

    # ---- the loop's side

    def update(self, **status: Any) -> None:
        """Change status fields; `limits` may be a LengthLimits."""
        if isinstance(status.get("limits"), LengthLimits):
            status["limits"] = asdict(status["limits"])
        with self._lock:
            self._status |= status

    def enter(self, phase: Phase) -> None:
        self.update(phase=phase)

    def add_step(self, record: Record) -> None:
        with self._lock:
            shown = {key: value for key, value in record.items() if key not in PER_ROLLOUT}
            self._steps.append(_kept(shown | {f"evidence:{name}": value for name, value in self._evidence.items()}))
            self._status["step"] = record["step"]

    def forget(self) -> None:
        """The steps shown are about to be taken again, from a checkpoint on; the steps that remain are added again."""
        with self._lock:
            self._steps.clear()
            self._samples.clear()
            self._decisions.clear()
            self._status["step"] = 0

    def add_event(self, record: Record) -> None:
        """What is neither a step nor a decision: an actor lost, a restart, a wait."""
        with self._lock:
            self._events.append(record)
            self._status["events"] = list(self._events)

    def add_samples(self, records: list[Record]) -> None:
        with self._lock:
            self._samples.extend(records)

    def add_decision(self, record: Record) -> None:
        with self._lock:
            self._decisions.append(_kept(record))
            self._evidence = {name: each["evidence"] / each["threshold"] for name, each in record.get("readings", {}).items()}
            self._governor = {key: record.get(key, {}) for key in ("mode", "pressure", "signals", "readings", "limits")}

    def take_verbs(self) -> list[Verb]:
        """Verbs asked for since the last border, in order."""
        with self._lock:
            asked, self._asked = self._asked, []
            return asked

    # ---- HTTP's side (RunView)

    def status(self) -> dict[str, Any]:
        with self._lock:
            return dict(self._status)

    def steps(self, after: int) -> list[Record]:
        with self._lock:
            kept = list(self._steps)
        return _after(kept, after)

    def samples(self) -> list[Record]:
        with self._lock:
            return list(self._samples)

    def governor(self) -> dict[str, Any]:
        with self._lock:
            return self._governor | {"declared": describe()}

    def decisions(self, after: int) -> list[Record]:
        with self._lock:
            kept = list(self._decisions)
        return _after(kept, after)

    def request(self, verb: Verb) -> dict[str, Any]:
        with self._lock:
            if self._status["phase"] in ("finished", "failed"):
                raise ValueError(f"the run is {self._status['phase']}")
            if verb not in self._asked:
                self._asked.append(verb)
            return {"verb": verb, "phase": self._status["phase"], "step": self._status["step"]}


def _kept(record: Record) -> tuple[int, bytes]:
    return record["step"], json.dumps(record, separators=(",", ":")).encode()


def _after(kept: Iterable[tuple[int, bytes]], step: int) -> list[Record]:
    """The first ones after this step: no more than an answer holds, and one that tells there are more."""
    return [json.loads(text) for _, text in islice((one for one in kept if one[0] > step), MAX_RECORDS + 1)]
