"""The run directory: what a run leaves behind, appended line by line so that a crash loses nothing before it.

job.yaml  metrics.jsonl  decisions.jsonl  config.jsonl  samples.jsonl  events.jsonl  nonfinite.jsonl  checkpoints/  final/
report.html  length.png
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from opd_governor.services.job.settings import Job, JobError

Record = dict[str, Any]

ADDRESS = "address"
"""There while the run lives: the URL of its HTTP service, one line. The token lies beside it."""


class RunDirectory:
    """Paths and append-only records of one run. Raises JobError when the folder cannot be written or holds another run."""

    def __init__(self, path: Path, *, resume: bool) -> None:
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / ".writable"
            probe.touch()
            probe.unlink()
        except OSError as error:
            raise JobError(f"--out {path}: not writable ({error.strerror}); choose another folder") from None
        self._waiting: dict[Path, list[str]] = {}
        self.trouble: str | None = None
        """Why records wait in memory; None if they do not."""
        if not resume and (self.metrics.exists() or any(self.checkpoints.glob("step-*"))):
            raise JobError(f"--out {path}: holds a run already; add --resume to go on with it, or choose another folder")

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def decisions(self) -> Path:
        return self.path / "decisions.jsonl"

    @property
    def samples(self) -> Path:
        return self.path / "samples.jsonl"

    @property
    def config(self) -> Path:
        return self.path / "config.jsonl"

    @property
    def events(self) -> Path:
        """What happened to the run: actors lost and back, waits, rollbacks."""
        return self.path / "events.jsonl"

    @property
    def nonfinite(self) -> Path:
        """Samples whose log-probs, scores, loss or gradient were not finite, to be looked at."""
        return self.path / "nonfinite.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def write_job(self, job: Job) -> None:
        """job.yaml as resolved; it holds no secret, for settings have none."""
        (self.path / "job.yaml").write_text(yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False))

    def append(self, path: Path, record: Record) -> None:
        """One line, written immediately (not fsynced). On a full disk the line waits (see `trouble`) and goes with the next one."""
        self._waiting.setdefault(path, []).append(to_json(record) + "\n")
        try:
            self._flush(path)
        except OSError as error:
            self.trouble = str(error)
        else:
            if not any(self._waiting.values()):
                self.trouble = None

    def record_sizes(self) -> dict[str, int]:
        """Bytes of each records file up to here, all of it on the disk, for `cut_to`. Raises OSError."""
        for path in self._waiting:
            self._flush(path)
        sizes = {}
        for path in self.of_steps():
            if path.exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    sizes[path.name] = os.fstat(file.fileno()).st_size
        return sizes

    def cut_to(self, sizes: Mapping[str, int]) -> None:
        """Forget what was recorded since: the steps are taken again, and written again."""
        self._waiting.clear()
        for path in self.of_steps():
            if path.exists():
                os.truncate(path, min(sizes.get(path.name, 0), path.stat().st_size))

    def of_steps(self) -> tuple[Path, ...]:
        """The records files that a resume cuts back."""
        return self.metrics, self.decisions, self.samples, self.nonfinite

    def _flush(self, path: Path) -> None:
        data = "".join(self._waiting[path]).encode()
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        size = os.fstat(descriptor).st_size
        try:
            while data:
                data = data[os.write(descriptor, data) :]
        except OSError:
            os.ftruncate(descriptor, size)  # whole lines or none
            raise
        finally:
            os.close(descriptor)
        self._waiting[path].clear()


def read_records(path: Path) -> list[Record]:
    """Every whole line of a records file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def to_json(record: Record) -> str:
    """One line; NaN and infinities are null."""
    try:
        return json.dumps(record, allow_nan=False)
    except ValueError:  # rare, and looking beforehand costs as much as writing
        return json.dumps(finite(record), allow_nan=False)


def finite(value: Any) -> Any:
    """The same tree with NaN and infinities as null: JSON has no name for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
