"""Where each thing that a run does is told: metrics, records files, the live page, the terminal.

step, decision, sync, evaluation --> Journal --> Telemetry, RunDirectory, RunMonitor, on_step
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from opd_governor.actors.governor.state import Decision
from opd_governor.services.inputs.verifiers import Evaluation
from opd_governor.services.record.batch import Batch, Sync
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import Record, RunDirectory, read_records
from opd_governor.services.record.steps import StepTimes, evaluation_fields, sample_records
from opd_governor.services.record.telemetry import Series, Telemetry


class Journal:
    """`on_step` gets each step's record, `warn` a line where records cannot be written; they wait in memory then."""

    def __init__(
        self,
        directory: RunDirectory,
        telemetry: Telemetry,
        monitor: RunMonitor,
        *,
        samples_per_step: int,
        decode: Callable[[Sequence[int]], str],
        on_step: Callable[[Record], None],
        warn: Callable[[str], None],
    ) -> None:
        self._directory, self._telemetry, self._monitor = directory, telemetry, monitor
        self._samples_per_step, self._decode, self._on_step, self._warn = samples_per_step, decode, on_step, warn
        self._trouble: str | None = None

    def begin(self, evaluations: Mapping[str, Evaluation]) -> None:
        """The student as it came: a line of metrics.jsonl for step 0, so that a rise has a beginning."""
        if evaluations:
            self._add({"step": 0, "time": time.time(), "num_rollouts": 0, "lengths": []} | evaluation_fields(evaluations))

    def step(self, record: Record, batch: Batch, times: StepTimes) -> None:
        for phase, seconds in times.by_phase().items():
            self._telemetry.observe("opd_step_seconds", seconds, phase=phase)
        samples = sample_records(batch, self._samples_per_step, self._decode)
        for sample in samples:
            self._directory.append(self._directory.samples, sample)
        self._monitor.add_samples(samples)
        self._add(record)
        if self._directory.trouble != self._trouble:
            self._trouble = self._directory.trouble
            if self._trouble:
                self._warn(f"step {batch.step}: records wait in memory: {self._trouble}; free the disk, the run goes on")

    def decision(self, decision: Decision, record: Record) -> None:
        self._telemetry.record_limits(decision.limits, decision.after.pressure)
        if decision.signals.data_age_s is not None:
            self._telemetry.set("opd_governor_metrics_age_seconds", decision.signals.data_age_s)
        self._telemetry.inc("opd_governor_decisions_total", action=decision.action, signal=decision.signal)
        self._directory.append(self._directory.decisions, record)
        self._monitor.add_decision(record)
        self._monitor.update(limits=decision.limits)

    def sync(self, sync: Sync) -> None:
        self._telemetry.observe("opd_weight_sync_seconds", sync.seconds)
        self._telemetry.set("opd_weight_sync_gap_nats", sync.gap_nats)
        for role in ("learner", "rollout"):
            self._telemetry.set("opd_weight_version", sync.weight_version, role=role)
        self._monitor.update(weight_version=sync.weight_version)

    def evaluation(self, evaluations: Mapping[str, Evaluation]) -> None:
        for decoding, evaluation in evaluations.items():
            self._telemetry.set("opd_eval_accuracy_ratio", evaluation.accuracy_ratio, decoding=decoding)
            self._telemetry.set("opd_eval_length_tokens", evaluation.length_tokens, decoding=decoding)
            self._telemetry.set("opd_eval_truncation_ratio", evaluation.truncation_ratio, decoding=decoding)

    def restore(self, telemetry: Iterable[Series], sizes: Mapping[str, int]) -> None:
        """Back to a checkpoint: its totals, its part of the records files (`sizes` in bytes), and on the page what they hold."""
        self._telemetry.restore(telemetry)
        self._directory.cut_to(sizes)
        self._monitor.forget()
        for record in read_records(self._directory.metrics):
            self._monitor.add_step(record)
        for record in read_records(self._directory.decisions):
            self._monitor.add_decision(record)
        self._monitor.add_samples(read_records(self._directory.samples))

    def _add(self, record: Record) -> None:
        self._directory.append(self._directory.metrics, record)
        self._monitor.add_step(record)
        self._on_step(record)
