"""The runs that `opd govern` governs: each a folder of records, a governor, and what its live page shows.

post --observe--> governor --> metrics.jsonl, decisions.jsonl, then a line of state.jsonl, which commits both --> answer
"""

import hashlib
import json
import os
import threading
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_governor.services.control.app import MAX_RECORDS, Verb
from opd_governor.services.job.generations import Store
from opd_governor.services.sidecar.governing import OutsideGovernor, flat
from opd_governor.services.sidecar.policy_file import OutsideSettings, PolicyFile
from opd_governor.services.sidecar.post import StepPost
from opd_governor.services.sidecar.seen import StepSeen
from opd_governor.services.sidecar.totals import Totals

Record = dict[str, Any]
QUIET_S = 600.0
"""A run that has not posted for this long is shown as finished."""
TAIL_BYTES = 32 << 20
"""What is read of a records file for the live page."""
STATE = "state.jsonl"
"""Its last whole line is the run's state."""
MAX_STATE_BYTES = 1 << 20
"""Beyond it the file begins again with its last line."""
WANTED = ("stop", "checkpoint", "rollback")
"""Verbs that are passed on with the next answer: a trainer elsewhere cannot be held from here."""


class OutsideRun:
    """One run of somebody's trainer. `post` is called from one thread; HTTP reads from others."""

    def __init__(self, name: str, folder: Path, policy: PolicyFile) -> None:
        """Goes on from what the folder holds."""
        self.name, self.folder = name, folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._policy = policy
        self._lock = threading.RLock()
        self._store: Store[OutsideSettings] | None = None
        self.governor = OutsideGovernor(policy.governor, policy.cap_tokens)
        self.totals = Totals(name)
        self._sizes = {"metrics.jsonl": 0, "decisions.jsonl": 0}
        self._answer: Record | None = None
        self._digest = ""
        self._state_bytes = 0
        self._asked: deque[str] = deque()
        self._seen_at_s = 0.0
        self.step = 0
        self._load()
        if (folder / "config.jsonl").exists():
            self._open_store()

    # ---- the trainer's side

    def post(self, post: StepPost, body: bytes) -> Record:
        """Decide on a step. The same body posted again gets the same answer and counts once."""
        digest = hashlib.blake2b(body, digest_size=12).hexdigest()
        with self._lock:
            if self._answer is not None and digest == self._digest:
                return self._answer
            return self.observe(post.seen(), post.reference_lengths or (), digest, post.reference_cut_lengths or ())

    def observe(self, seen: StepSeen, reference_lengths: Any = (), digest: str = "", reference_cut: Any = ()) -> Record:
        """Decide on a step, keep it, answer."""
        with self._lock:
            generation, news = self._take_config()
            if self._answer is not None and seen.step < self.step:
                news = f"the trainer went back to step {seen.step}"
            answer = self.governor.observe(seen, reference_lengths, news, reference_cut)
            asked = list(self._asked)
            document = answer.to_json() | {"asked": asked}
            decision = self.governor.record() | {"config_generation": generation}
            self._append("metrics.jsonl", _step_record(seen, answer.pressure, flat(answer.limits), self.governor.cap_tokens))
            self._append("decisions.jsonl", decision)
            self._asked.clear()
            self._answer, self._digest, self.step, self._seen_at_s = document, digest, seen.step, time.time()
            self._commit()
            self.totals.add(seen, answer, self.governor)
            return document

    def _take_config(self) -> tuple[int, str]:
        """The generation in force, and what a person changed since the last step, in words."""
        if self._store is None:
            return 0, ""
        generation, settings = self._store.in_force()
        news = "settings changed" if self._store.observed_generation not in (0, generation) else ""
        self.governor.policy = settings.governor
        self.governor.cap_tokens = settings.cap_tokens or self.governor.cap_tokens
        self._store.observe(generation)
        return generation, news

    # ---- the records

    def _append(self, name: str, record: Record) -> None:
        data = (json.dumps(record, allow_nan=False, separators=(",", ":")) + "\n").encode()
        _write(self.folder / name, data, os.O_APPEND)
        self._sizes[name] += len(data)

    def _commit(self) -> None:
        state = {
            "sizes": self._sizes,
            "step": self.step,
            "answer": self._answer,
            "digest": self._digest,
            "seen_at_s": self._seen_at_s,
            "governor": self.governor.state(),
        }
        line = json.dumps(state, separators=(",", ":")).encode() + b"\n"
        path = self.folder / STATE
        self._state_bytes += len(line)
        if self._state_bytes < MAX_STATE_BYTES:
            _write(path, line, os.O_APPEND)
            return
        # Seldom, for a rename waits for the disk.
        written = path.with_suffix(".new")
        _write(written, line, os.O_TRUNC)
        os.replace(written, path)
        self._state_bytes = len(line)

    def _load(self) -> None:
        """What lies beyond the committed sizes was being written when the service died: its step is posted again."""
        path = self.folder / STATE
        # A last line without its end was being written when the service died.
        lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        if not lines:
            for name in self._sizes:
                (self.folder / name).unlink(missing_ok=True)
            return
        self._state_bytes = sum(map(len, lines)) + len(lines)
        os.truncate(path, self._state_bytes)
        state = json.loads(lines[-1])
        self._sizes = state["sizes"]
        for name, size in self._sizes.items():
            os.truncate(self.folder / name, size)
        self.step, self._answer, self._digest = state["step"], state["answer"], state["digest"]
        self._seen_at_s = state["seen_at_s"]
        self.governor.restore(state["governor"])

    # ---- HTTP's side (RunView)

    @property
    def store(self) -> Store[OutsideSettings]:
        """The tunable settings; made when somebody first looks at them."""
        with self._lock:
            return self._store or self._open_store()

    def _open_store(self) -> Store[OutsideSettings]:
        base = OutsideSettings(cap_tokens=self.governor.cap_tokens, governor=self._policy.governor)
        self._store = Store(base, self.folder / "config.jsonl")
        return self._store

    def status(self) -> Record:
        with self._lock:
            phase = "running" if time.time() - self._seen_at_s < QUIET_S else "finished" if self._answer else "starting"
            return {
                "name": self.name,
                "phase": phase,
                "step": self.step,
                "total_steps": self.step,
                "weight_version": self.step,
                "limits": self._limits(),
                "links": {},
                "waiting_for": None if self._answer else "the first step that the trainer posts",
                "events": [],
            }

    def steps(self, after: int) -> list[Record]:
        return self._records("metrics.jsonl", after)

    def samples(self) -> list[Record]:
        """None: texts are never posted."""
        return []

    def governor_document(self) -> Record:
        with self._lock:
            decision = self.governor.decision
            signals = {} if decision is None else decision.signals.to_json()
            pressure = (self._answer or {}).get("pressure", 0.0)
            return {"mode": self.governor.policy.mode, "pressure": pressure, "signals": signals, "limits": self._limits()}

    def decisions(self, after: int) -> list[Record]:
        return self._records("decisions.jsonl", after)

    def request(self, verb: Verb) -> Record:
        if verb not in WANTED:
            raise ValueError(f"a trainer elsewhere cannot be told to {verb} from here; {', '.join(WANTED)} go out with the next answer")
        with self._lock:
            if verb not in self._asked:
                self._asked.append(verb)
        return {"verb": verb, "phase": self.status()["phase"], "step": self.step}

    def _limits(self) -> Record:
        return flat(self.governor.limits)

    def _records(self, name: str, after: int) -> list[Record]:
        """The first ones after this step that the end of the file holds."""
        path = self.folder / name
        if not path.exists():
            return []
        with path.open("rb") as file:
            start = max(0, self._sizes[name] - TAIL_BYTES)
            file.seek(start)
            lines = file.read(self._sizes[name] - start).split(b"\n")
        found: list[Record] = []
        for line in lines[1 if start else 0 : -1]:
            record = json.loads(line)
            if record["step"] > after:
                found.append(record)
            if len(found) > MAX_RECORDS:
                break
        return found


class RunPage:
    """`RunView` of an OutsideRun: the same verbs, and the governor as a document."""

    def __init__(self, run: OutsideRun) -> None:
        self._run = run
        self.status, self.steps, self.samples = run.status, run.steps, run.samples
        self.decisions, self.request, self.governor = run.decisions, run.request, run.governor_document


class Runs:
    """All runs of a service, by name. Raises KeyError for one that never posted, and ValueError beyond `max_runs`."""

    def __init__(self, folder: Path, policy: PolicyFile) -> None:
        self._folder, self._policy = folder / "runs", policy
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = threading.Lock()
        self._runs = {path.name: OutsideRun(path.name, path, policy) for path in sorted(self._folder.iterdir()) if path.is_dir()}

    def __getitem__(self, name: str) -> OutsideRun:
        return self._runs[name]

    def __len__(self) -> int:
        return len(self._runs)

    def all(self) -> Mapping[str, OutsideRun]:
        with self._lock:
            return dict(self._runs)

    def open(self, name: str) -> OutsideRun:
        """The run, begun where it is new."""
        if (run := self._runs.get(name)) is not None:
            return run
        with self._lock:
            if name not in self._runs:
                if len(self._runs) >= self._policy.max_runs:
                    raise ValueError(
                        f"{len(self._runs)} runs are kept, and max_runs is {self._policy.max_runs}; raise it in the policy file"
                    )
                self._runs[name] = OutsideRun(name, self._folder / name, self._policy)
            return self._runs[name]


def _write(path: Path, data: bytes, how: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | how, 0o600)
    try:
        os.write(descriptor, data)
    finally:
        os.close(descriptor)


def _step_record(seen: StepSeen, pressure: float, limits: Mapping[str, Any], cap_tokens: int | None) -> Record:
    """A line of metrics.jsonl with the names that our own runs use. `limits` are those decided after the step."""
    told = {
        "num_rollouts": seen.num_rollouts,
        "length_mean": seen.length_mean_tokens,
        "length_p95": seen.length_p95_tokens,
        "length_max": seen.length_max_tokens,
        "truncation": seen.truncation,
        "loops": seen.loops,
        "kl_nats": seen.kl_nats,
        "entropy_nats": seen.entropy_nats,
        "loss": seen.loss,
        "grad_norm": seen.grad_norm,
        "learning_rate": seen.learning_rate,
        "eval_accuracy": seen.reward,
        "cap_tokens": seen.cap_tokens or (limits["cap_tokens"] if cap_tokens else None),
    }
    record: Record = {"step": seen.step, "time": time.time()} | {name: value for name, value in told.items() if value is not None}
    kept = ("golden_weight", "lr_scale", "reference_kl_weight", "stop_tilt_nats", "loop_tail_weight", "admission_quota")
    return record | {"pressure": pressure} | {name: limits[name] for name in kept if name in limits}
