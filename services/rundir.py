"""The run directory: what a run leaves behind, appended line by line so that a crash loses nothing before it.

job.yaml  metrics.jsonl  decisions.jsonl  config.jsonl  samples.jsonl  events.jsonl  nonfinite.jsonl  checkpoints/  final/
report.html  length.png
"""

import json
import math
import os
from pathlib import Path
from typing import Any

import yaml

from services.job import Job, JobError

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
        if self.metrics.exists() and not resume:
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
        """One line, at once on its way to the disk."""
        with path.open("a") as file:
            file.write(json.dumps(finite(record), allow_nan=False) + "\n")

    def cut_after(self, step: int) -> None:
        """Forget records of later steps: a resumed run writes them again."""
        for path in (self.metrics, self.decisions, self.samples):
            kept = [record for record in read_records(path) if record["step"] <= step]
            replacement = path.with_suffix(".tmp")
            replacement.write_text("".join(json.dumps(record) + "\n" for record in kept))
            os.replace(replacement, path)


def read_records(path: Path) -> list[Record]:
    """Every whole line of a records file; a last line that a crash cut short is left out."""
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def finite(value: Any) -> Any:
    """The same tree with NaN and infinities as null: JSON has no name for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
