"""What a person sees of a run in the terminal: one line a step, plain where it is no terminal."""

import sys
import time
from pathlib import Path

from rich.console import Console

from opd_governor.services.record.rundir import Record, read_records
from opd_governor.services.report.report import summarise_run

HEADER = "  step      kl   length mean/p95   trunc  loops    cap  press   tok/s  stale  accuracy"


class Progress:
    """Prints to stdout; `step` is called once per step record.

    >>> Progress(120).step({"step": 1, ...})
         1/120   0.412      38/61        0.0%   0.0%   192   0.00    3120    0.0
    """

    def __init__(self, total_steps: int) -> None:
        self._total_steps = total_steps
        self._console = Console(highlight=False, soft_wrap=True, file=sys.stdout)
        self._started = time.monotonic()
        self._lines = 0

    def say(self, text: str) -> None:
        """A line about the run as a whole, with the time since its start."""
        self._console.print(f"[{time.monotonic() - self._started:6.1f} s] {text}", markup=False)

    def step(self, record: Record) -> None:
        """One line for one step; a record without rollouts is the evaluation before the first."""
        if not record["num_rollouts"]:
            accuracy = record.get("eval_accuracy")
            self.say(f"held-out accuracy before the first step: {'not known' if accuracy is None else format(accuracy, '.3f')}")
            return
        if self._lines % 25 == 0:
            self._console.print(HEADER, style="bold")
        self._lines += 1
        worry = record["truncation"] > 0.1 or record["pressure"] > 0
        self._console.print(format_step(record, self._total_steps), style="yellow" if worry else None, markup=False)

    def finish(self, directory: Path) -> None:
        """The summary a person scrolls back for."""
        for line in summarise_run(directory, read_records(directory / "metrics.jsonl")):
            self._console.print(line, markup=False)


def format_step(record: Record, total_steps: int) -> str:
    """`step, KL, length mean/p95, truncated %, loops %, cap, pressure, tokens/s, staleness` and, at evaluations, accuracy."""
    kl = f"{record['kl_nats']:7.3f}" if "kl_nats" in record else "      -"
    staleness = f"{record['staleness_mean']:5.1f}" if "staleness_mean" in record else "    -"
    accuracy = f"  {record['eval_accuracy']:.3f}" if record.get("eval_accuracy") is not None else ""
    return (
        f"{record['step']:>6}/{total_steps} {kl}  {record['length_mean']:8.1f}/{record['length_p95']:<6.0f} "
        f"{record['truncation']:6.1%} {record['loops']:6.1%} {record['cap_tokens']:6d} {record['pressure']:6.2f} "
        f"{record['tokens_per_s']:7.0f} {staleness}{accuracy}"
    )
