"""Where each thing that a run does is told: metrics, records files, the live page, the terminal.

step, decision, sync, evaluation --> Journal --> Telemetry, RunDirectory, RunMonitor, on_step
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from opd_governor.actors.governor.reference import Aim
from opd_governor.actors.governor.state import Decision
from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.trajectory import LengthLimits, TokenScores, Trajectory
from opd_governor.services.inputs.verifiers import Evaluation
from opd_governor.services.record.batch import Batch, Sync
from opd_governor.services.record.monitor import RunMonitor
from opd_governor.services.record.rundir import Record, RunDirectory, read_records
from opd_governor.services.record.scores import SCORE_FIELDS
from opd_governor.services.record.steps import Source, StepTimes, evaluation_fields, nonfinite_record, record_batch, sample_records
from opd_governor.services.record.telemetry import Series, Telemetry

MAX_NONFINITE = 200
"""Non-finite samples kept per process of a run: enough to find the cause, and no full disk if every sample is spoiled."""


class Journal:
    """Told by the run what it does; passes it on to everyone who watches. Records that cannot be written wait in memory."""

    def __init__(
        self,
        directory: RunDirectory,
        telemetry: Telemetry,
        monitor: RunMonitor,
        *,
        samples_per_step: int,
        decode: Callable[[Sequence[int]], str],
        on_step: Callable[[Record], None] = lambda record: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        """`on_step` gets each step's record, `say` each line about the run."""
        self._directory, self._telemetry, self.monitor = directory, telemetry, monitor
        self._samples_per_step, self._decode, self._on_step, self._say = samples_per_step, decode, on_step, say
        self._trouble: str | None = None
        self._num_nonfinite = 0
        self._verifier_failures: set[str | None] = set()
        """Kinds that were told."""

    # ---- what happens to the run

    def note(self, text: str) -> None:
        """A line about the run: terminal, events.jsonl, live page."""
        self._say(text)
        event = {"time": time.time(), "step": self.monitor.status()["step"], "text": text}
        self._directory.append(self._directory.events, event)
        self.monitor.add_event(event)

    def restarted(self, role: str, reason: str) -> None:
        """An actor is back; reason: crash or hang."""
        self._telemetry.inc("opd_actor_restarts_total", role=role)
        self.note(f"restarted: {role} ({reason})")

    def nonfinite(self, source: Source, trajectory: Trajectory, scores: TokenScores | None) -> None:
        """A sample with NaN or infinite values: counted, and the first MAX_NONFINITE kept for inspection."""
        self._telemetry.inc("opd_nonfinite_samples_total", source=source)
        if self._num_nonfinite < MAX_NONFINITE:
            self._num_nonfinite += 1
            self._directory.append(self._directory.nonfinite, nonfinite_record(source, trajectory, scores))
        if self._num_nonfinite == 1:
            self.note(f"step {trajectory.step}: a sample with NaN or infinite values ({source}); see {self._directory.nonfinite}")

    def teacher_requests(self, teacher: str, result: str, seconds: float, num: int) -> None:
        self._telemetry.inc("opd_teacher_requests_total", num, teacher=teacher, result=result)
        self._telemetry.observe("opd_teacher_request_seconds", *[seconds] * num, teacher=teacher)

    def waiting_for(self, what: str | None) -> None:
        """What keeps the run from going on, in words; None: nothing."""
        self.monitor.update(waiting_for=what)

    def paused(self, paused: bool) -> None:
        self._telemetry.set("opd_run_paused", float(paused))

    def beat(self) -> None:
        """A sign of life beside the end of a step."""
        self._telemetry.beat()

    def config(self, generation: int) -> None:
        """Generation of the settings that a person asked for last."""
        self._telemetry.set("opd_config_generation", generation)

    def config_observed(self, generation: int) -> None:
        """Generation that the newest rollouts were launched under."""
        self._telemetry.set("opd_config_observed_generation", generation)

    # ---- steps

    def begin(self, evaluations: Mapping[str, Evaluation]) -> None:
        """The student as it came: a line of metrics.jsonl for step 0, so that a rise has a beginning."""
        if evaluations:
            self._add({"step": 0, "time": time.time(), "num_rollouts": 0, "lengths": []} | evaluation_fields(evaluations))

    def learned(self, batch: Batch, report: StepReport | None, limits: LengthLimits) -> None:
        """The learner has had this batch: its metrics. `limits`: those it learned under."""
        record_batch(self._telemetry, batch, report, limits)
        for verdict in batch.unjudged:
            if verdict.reason not in self._verifier_failures:  # the first of each kind; the others are counted
                self._verifier_failures.add(verdict.reason)
                self.note(f"step {batch.step}: the verifier gave a rollout no score ({verdict.trouble}); it is counted, and not rewarded")
        self._telemetry.beat()
        if report is not None:
            self.learner_version(report.weight_version)

    def step(self, record: Record, batch: Batch, times: StepTimes) -> None:
        """The step is over: its record, a few of its samples, its seconds."""
        for phase, seconds in times.by_phase().items():
            self._telemetry.observe("opd_step_seconds", seconds, phase=phase)
        for field in SCORE_FIELDS:
            if field in record:
                self._telemetry.set("opd_scores", record[field], field=field)
        samples = sample_records(batch, self._samples_per_step, self._decode)
        for sample in samples:
            self._directory.append(self._directory.samples, sample)
        self.monitor.add_samples(samples)
        self._add(record)
        if self._directory.trouble != self._trouble:
            self._trouble = self._directory.trouble
            if self._trouble:
                self.note(f"step {batch.step}: records wait in memory: {self._trouble}; free the disk, the run goes on")

    def decision(self, decision: Decision, record: Record) -> None:
        self._telemetry.record_limits(decision.limits, decision.after.pressure)
        self._telemetry.record_evidence({name: reading.evidence for name, reading in decision.readings.items()})
        if decision.signals.data_age_s is not None:
            self._telemetry.set("opd_governor_metrics_age_seconds", decision.signals.data_age_s)
        self._telemetry.inc("opd_governor_decisions_total", action=decision.action, signal=decision.signal)
        self._directory.append(self._directory.decisions, record)
        self.monitor.add_decision(record)
        self.monitor.update(limits=decision.limits)

    def learner_version(self, weight_version: int) -> None:
        """What the learner has now; the engines follow with the next sync."""
        self._telemetry.set("opd_weight_version", weight_version, role="learner")

    def followed(self, weight_version: int) -> None:
        """The student's version whose step last changed a teacher that follows it."""
        self._telemetry.set("opd_weight_version", weight_version, role="teacher")

    def aim(self, aim: Aim) -> None:
        """What rollouts are measured against from here on."""
        self._telemetry.aim = aim

    def sync(self, sync: Sync) -> None:
        self._telemetry.observe("opd_weight_sync_seconds", sync.seconds)
        self._telemetry.set("opd_weight_sync_gap_nats", sync.gap_nats)
        self._telemetry.set("opd_weight_version", sync.weight_version, role="rollout")
        self.monitor.update(weight_version=sync.weight_version)

    def evaluation(self, evaluations: Mapping[str, Evaluation]) -> None:
        """Held-out results; a value that could not be made is absent from /metrics, and said."""
        for decoding, evaluation in evaluations.items():
            for name, value in (
                ("opd_eval_accuracy_ratio", evaluation.accuracy_ratio),
                ("opd_eval_length_tokens", evaluation.length_tokens),
                ("opd_eval_truncation_ratio", evaluation.truncation_ratio),
            ):
                if value is None:
                    self._telemetry.drop(name, decoding=decoding)
                else:
                    self._telemetry.set(name, value, decoding=decoding)
            if shortfall := evaluation.shortfall():
                self.note(f"held-out evaluation, {decoding}: {shortfall}")

    # ---- checkpoints

    def telemetry_state(self) -> list[Series]:
        """All totals, for a checkpoint."""
        return self._telemetry.state()

    def record_sizes(self) -> dict[str, int]:
        """Bytes of each records file, all of them on the disk. Raises OSError."""
        return self._directory.record_sizes()

    def restore(self, telemetry: Iterable[Series], sizes: Mapping[str, int]) -> None:
        """Back to a checkpoint: its totals, its part of the records files (`sizes` in bytes), and on the page what they hold."""
        self._telemetry.restore(telemetry)
        self._directory.cut_to(sizes)
        self.monitor.forget()
        for record in read_records(self._directory.metrics):
            self.monitor.add_step(record)
        for record in read_records(self._directory.decisions):
            self.monitor.add_decision(record)
        self.monitor.add_samples(read_records(self._directory.samples))

    def _add(self, record: Record) -> None:
        self._directory.append(self._directory.metrics, record)
        self.monitor.add_step(record)
        self._on_step(record)
