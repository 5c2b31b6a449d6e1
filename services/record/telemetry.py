"""Every metric of a run, declared once.

They live in one prometheus_client registry of the run's own process: Ray's metrics lose gauges after two export intervals
and rebuild histogram sums from bucket midpoints, so nothing that people compare goes through them. All carry the label
`run`. Means are ratios of two counters; freshness is a heartbeat.
"""

import itertools
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from prometheus_client import CollectorRegistry, Gauge, Histogram, disable_created_metrics
from prometheus_client import Counter as PrometheusCounter
from prometheus_client.metrics import MetricWrapperBase

from opd_governor.actors.governor.actuators import metric_of, movable, value_of
from opd_governor.actors.governor.reference import Aim, LengthModel
from opd_governor.actors.learner.metrics import POSITION_BUCKETS
from opd_governor.actors.trajectory import FinishReason, LengthLimits, Trajectory
from opd_governor.services.inputs.golden import LengthReference
from opd_governor.services.inputs.verdicts import REASONS
from opd_governor.services.job.settings import JobError

Kind = Literal["counter", "gauge", "histogram"]
Series = list[Any]
"""[name, labels, value], JSON."""

LOGPROB_BUCKETS = (-64.0, -32.0, -16.0, -8.0, -4.0, -2.0, -1.0, -0.5, -0.25, -0.1, 0.0)
SECONDS_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)
LENGTH_BUCKETS = (*map(float, range(1, 16)), *(2.0**octave * (1 + part / 8) for octave in range(4, 20) for part in range(8)), 2.0**20)
"""An eighth wide or less, to a million tokens: they hold whatever cap a person sets while the run goes on."""
STALENESS_BUCKETS = (0.0, 1.0, 2.0, 4.0, 8.0)
LABEL_VALUES = {
    "finish_reason": get_args(FinishReason),
    "outcome": ("admitted", "masked_tail", "over_quota", "unscored", "undemonstrated"),
    "position": POSITION_BUCKETS,
    "form": ("raw", "class"),
    "phase": ("rollout", "score", "learn", "sync", "total"),
    "source": ("engine", "teacher", "learner"),
    "reason": REASONS,
    "role": ("rollout", "teacher", "learner", "governor", "environment", "service"),
}
"""Labels whose values are known beforehand."""


@dataclass(frozen=True, slots=True)
class Metric:
    """One declaration: name as scraped, kind, help with its unit, labels beside `run`."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] | None = None


METRICS: tuple[Metric, ...] = (
    Metric("opd_rollouts_total", "counter", "Rollouts by how they ended.", ("finish_reason",)),
    Metric("opd_rollout_tokens_total", "counter", "Response tokens sampled."),
    Metric("opd_rollout_length_tokens", "histogram", "Length of a rollout, tokens.", (), LENGTH_BUCKETS),
    Metric("opd_rollout_length_max_tokens", "gauge", "Longest rollout of the last step, tokens."),
    Metric("opd_rollout_loops_total", "counter", "Rollouts that end in a loop."),
    Metric("opd_rollout_loop_tokens_total", "counter", "Tokens after the onset of a loop."),
    Metric("opd_admitted_rollouts_total", "counter", "Rollouts by what the learner does with them.", ("outcome",)),
    Metric("opd_stop_teacher_logprob", "histogram", "Teacher log-prob at sampled stops, nats.", ("form",), LOGPROB_BUCKETS),
    Metric("opd_kl_nats_total", "counter", "Sum of the reverse KL estimate over tokens, floored at 0 per step.", ("position",)),
    Metric("opd_kl_tokens_total", "counter", "Tokens in opd_kl_nats_total: mean KL is the ratio.", ("position",)),
    Metric("opd_length_reference_tokens", "gauge", "Length of golden or teacher answers, tokens.", ("stat",)),
    Metric("opd_learner_steps_total", "counter", "Optimiser steps taken; skipped ones are not among them."),
    Metric("opd_learner_tokens_total", "counter", "Response tokens learned from."),
    Metric("opd_learner_skipped_steps_total", "counter", "Steps skipped because loss or gradient was not finite."),
    Metric("opd_learner_loss", "gauge", "Loss of the last step, nats."),
    Metric("opd_learner_grad_norm", "gauge", "Gradient norm of the last step before clipping."),
    Metric("opd_student_entropy_nats", "gauge", "Mean entropy of the student over the last batch's tokens."),
    Metric("opd_weight_version", "gauge", "Student version of the learner, of the engines, of a teacher that follows.", ("role",)),
    Metric("opd_weight_sync_seconds", "histogram", "Time to bring new weights into the engines.", (), SECONDS_BUCKETS),
    Metric("opd_weight_sync_gap_nats", "gauge", "Largest engine-learner log-prob difference on the probe after the last sync."),
    Metric("opd_sample_staleness_steps", "histogram", "Learner steps between sampling and learning.", (), STALENESS_BUCKETS),
    Metric("opd_teacher_requests_total", "counter", "Scoring requests.", ("teacher", "result")),
    Metric("opd_teacher_request_seconds", "histogram", "Time of a scoring request.", ("teacher",), SECONDS_BUCKETS),
    Metric("opd_scores", "gauge", "What the last step's scores say of themselves: fields of metrics.jsonl (see scores.py).", ("field",)),
    Metric("opd_actor_restarts_total", "counter", "Actors restarted.", ("role",)),
    Metric("opd_step_seconds", "histogram", "Time of a step by phase.", ("phase",), SECONDS_BUCKETS),
    Metric("opd_length_scored_total", "counter", "Rollouts measured against their prompts' reference lengths."),
    Metric("opd_length_expected_nats_total", "counter", "Sum over them of the log of their reference: it moves when prompts change."),
    Metric("opd_length_over_nats_total", "counter", "Sum over rollouts longer than their reference of the log of length over it."),
    Metric("opd_length_under_nats_total", "counter", "Sum over rollouts shorter than their reference of the log of it over length."),
    Metric("opd_length_squares_total", "counter", "Sum of the squares of those logs: their variance follows."),
    Metric("opd_length_tail_total", "counter", "Rollouts beyond the teacher's longest answers to the prompt, or cut before that."),
    Metric("opd_length_tail_expected_total", "counter", "As many as the teacher itself would have there, under the same caps."),
    Metric("opd_length_reference_spread_nats", "gauge", "Standard deviation of the log of the teacher's lengths on one prompt."),
    Metric("opd_length_reference_censored_ratio", "gauge", "Share of the teacher's answers that were cut."),
    Metric("opd_length_reference_loops_ratio", "gauge", "Share of the teacher's answers that end in a loop."),
    Metric("opd_governor_pressure", "gauge", "Pressure in [0, 1]."),
    Metric("opd_governor_evidence_nats", "gauge", "Evidence of each signal against health: pressure starts at its threshold.", ("signal",)),
    Metric("opd_governor_decisions_total", "counter", "Governor decisions.", ("action", "signal")),
    Metric("opd_governor_cut_rollouts_total", "counter", "Rollouts truncated by a cap that the governor had lowered."),
    Metric("opd_governor_metrics_age_seconds", "gauge", "Age of the data the governor last decided on."),
    Metric("opd_heartbeat_timestamp_seconds", "gauge", "Unix time of the last finished step, or of the end of a pause."),
    Metric("opd_run_paused", "gauge", "1 while a person has paused the run, else 0."),
    Metric("opd_config_generation", "gauge", "Newest generation of the tunable settings."),
    Metric("opd_config_observed_generation", "gauge", "Generation of the tunable settings in force."),
    Metric("opd_eval_accuracy_ratio", "gauge", "Held-out accuracy.", ("decoding",)),
    Metric("opd_eval_length_tokens", "gauge", "Mean held-out response length, tokens.", ("decoding",)),
    Metric("opd_eval_truncation_ratio", "gauge", "Share of held-out responses cut by the cap.", ("decoding",)),
    Metric("opd_nonfinite_samples_total", "counter", "Samples kept out because a number of theirs was NaN or infinite.", ("source",)),
    Metric("opd_rewards_judged_total", "counter", "Rollouts that a verifier gave a score."),
    Metric("opd_rewards_passed_total", "counter", "Those of them that it called right."),
    Metric("opd_reward_mean", "gauge", "Mean score of the last step's rollouts."),
    Metric("opd_reward_spread", "gauge", "Standard deviation of the last step's scores."),
    Metric("opd_verifier_failures_total", "counter", "Rollouts that a verifier gave no score.", ("reason",)),
    Metric("opd_signal_mean_nats", "gauge", "Mean of what a signal asks of a sampled token, last step.", ("signal",)),
    Metric("opd_signal_spread_nats", "gauge", "Standard deviation of it over tokens.", ("signal",)),
    Metric("opd_signal_share_ratio", "gauge", "A signal's part of the squares of both.", ("signal",)),
    Metric("opd_turns_total", "counter", "Turns of the student in conversations."),
    Metric("opd_observed_tokens_total", "counter", "Tokens that environments put between turns: read, never learned."),
    Metric("opd_repeated_calls_total", "counter", "Turns that say word for word what the turn before them said."),
    Metric("opd_environment_failures_total", "counter", "Conversations that the environment gave no answer to.", ("reason",)),
    Metric("opd_conversation_turns", "gauge", "Mean turns of a conversation, last step."),
    Metric("opd_stop_mass_student_total", "counter", "Sum over tokens of the student's probability to stop."),
    Metric("opd_stop_mass_teacher_total", "counter", "Sum over the same tokens of the teacher's probability to stop."),
    Metric("opd_stop_mass_tokens_total", "counter", "Tokens in the two stop-mass sums."),
)
ADDITIONS = frozenset(
    {
        "opd_length_scored_total",
        "opd_length_expected_nats_total",
        "opd_length_over_nats_total",
        "opd_length_under_nats_total",
        "opd_length_squares_total",
        "opd_length_tail_total",
        "opd_length_tail_expected_total",
        "opd_length_reference_spread_nats",
        "opd_length_reference_censored_ratio",
        "opd_length_reference_loops_ratio",
        "opd_governor_evidence_nats",
        "opd_scores",
        "opd_nonfinite_samples_total",
        "opd_governor_cut_rollouts_total",
        "opd_run_paused",
        "opd_stop_mass_student_total",
        "opd_stop_mass_teacher_total",
        "opd_stop_mass_tokens_total",
        "opd_rewards_judged_total",
        "opd_rewards_passed_total",
        "opd_reward_mean",
        "opd_reward_spread",
        "opd_verifier_failures_total",
        "opd_signal_mean_nats",
        "opd_signal_spread_nats",
        "opd_signal_share_ratio",
    }
)
"""Metrics beyond the published contract, gauges of actuators apart."""


REFERENCE_GAUGES = (
    "opd_length_reference_tokens",
    "opd_length_reference_spread_nats",
    "opd_length_reference_censored_ratio",
    "opd_length_reference_loops_ratio",
)


def declared() -> tuple[Metric, ...]:
    """All metrics: those above and a gauge for each actuator of the governor, those of extensions included.

    Raises JobError for an actuator whose gauge another metric has.
    """
    metrics = {metric.name: metric for metric in METRICS}
    for name, each in movable().items():
        gauge = metric_of(name)
        if gauge in metrics:
            raise JobError(f"extensions: actuator {name!r}: metric {gauge} exists already; give it another name, or set its `metric`")
        metrics[gauge] = Metric(gauge, "gauge", each.help)
    return tuple(metrics.values())


OWN_GAUGES = frozenset({*REFERENCE_GAUGES, "opd_run_paused", "opd_heartbeat_timestamp_seconds"})
"""Metrics that a run keeps when it goes back to a checkpoint: it has measured them again, or they describe the present."""


class Telemetry:
    """The registry of one run and the few verbs that fill it.

    >>> telemetry = Telemetry("sums")
    >>> telemetry.inc("opd_learner_steps_total")
    """

    def __init__(self, run: str) -> None:
        disable_created_metrics()  # no *_created series: nobody reads them, and they are not in the contract
        self.run = run
        self.registry = CollectorRegistry()
        self._declared = declared()
        self._reference: LengthModel | None = None
        self.aim: Aim | None = None
        """What lengths should be beside the reference; None: as the reference has them."""
        self._children: dict[tuple[Any, ...], Any] = {}
        self._metrics = {metric.name: _create(metric, metric.buckets, self.registry) for metric in self._declared}
        for metric in self._declared:
            # Counters start at 0, not absent: rate() and a governor's first look need a value to start from.
            if metric.kind != "gauge" and all(label in LABEL_VALUES for label in metric.labels):
                for values in itertools.product(*(LABEL_VALUES[label] for label in metric.labels)):
                    self._child(metric.name, dict(zip(metric.labels, values, strict=True)))

    def inc(self, name: str, amount: float = 1.0, **labels: str) -> None:
        """Add to a counter."""
        self._child(name, labels).inc(amount)

    def set(self, name: str, value: float, **labels: str) -> None:
        """Set a gauge."""
        self._child(name, labels).set(value)

    def drop(self, name: str, **labels: str) -> None:
        """Take a gauge's value away: what it told is not known any more."""
        key = (name, *labels.values()) if len(labels) < 2 else (name, *sorted(labels.items()))
        if self._children.pop(key, None) is not None:
            self._metrics[name].remove(self.run, *labels.values())

    def observe(self, name: str, *values: float, **labels: str) -> None:
        """Add observations to a histogram."""
        child = self._child(name, labels)
        for value in values:
            child.observe(value)

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        key = (name, *labels.values()) if len(labels) < 2 else (name, *sorted(labels.items()))
        if key not in self._children:  # labels() costs ten times what inc() does
            self._children[key] = self._metrics[name].labels(run=self.run, **labels)
        return self._children[key]

    def record_rollouts(self, trajectories: Sequence[Trajectory], cap_tokens: int, max_new_tokens: int) -> None:
        """Lengths, ends and loops of one step's rollouts, before any filter.

        `cap_tokens` was in force when they were launched, `max_new_tokens` the job's own then. A rollout cut by a lower cap was cut by
        the governor and is counted apart too; one whose budget was smaller still was cut by the context window.
        """
        for reason, number in Counter(t.finish_reason for t in trajectories).items():
            self.inc("opd_rollouts_total", number, finish_reason=reason)
        self.inc("opd_rollout_tokens_total", sum(len(t.token_ids) for t in trajectories))
        self.observe("opd_rollout_length_tokens", *(len(trajectory.token_ids) for trajectory in trajectories))
        onsets = [(len(t.token_ids), t.loop_onset) for t in trajectories if t.loop_onset is not None]
        self.inc("opd_rollout_loops_total", len(onsets))
        self.inc("opd_rollout_loop_tokens_total", sum(length - onset for length, onset in onsets))
        lowered = cap_tokens < max_new_tokens
        cut = sum(lowered and t.finish_reason == "length" and t.budget_tokens == cap_tokens for t in trajectories)
        self.inc("opd_governor_cut_rollouts_total", cut)
        self._measure([t for t in trajectories if t.finish_reason != "error"])
        self.set("opd_rollout_length_max_tokens", max((len(t.token_ids) for t in trajectories), default=0))

    def record_limits(self, limits: LengthLimits, pressure: float) -> None:
        """The governor's values in force."""
        self.set("opd_governor_pressure", pressure)
        for name in movable():
            if (value := value_of(limits, name)) is not None:
                self.set(metric_of(name), value)

    def record_evidence(self, evidence: Mapping[str, float]) -> None:
        """Nats by signal."""
        for signal, nats in evidence.items():
            self.set("opd_governor_evidence_nats", nats, signal=signal)

    def use_reference(self, reference: LengthReference) -> None:
        """What rollouts are measured against from here on."""
        self._reference = reference.model
        for stat, value in (("mean", reference.mean_tokens), ("p99", reference.p99_tokens)):
            self.set("opd_length_reference_tokens", value, stat=stat)
        self.set("opd_length_reference_censored_ratio", reference.censored_share)
        self.set("opd_length_reference_loops_ratio", reference.loop_share)
        if reference.model is not None:
            self.set("opd_length_reference_spread_nats", reference.model.spread_nats)

    def _measure(self, trajectories: Sequence[Trajectory]) -> None:
        if self._reference is None or not trajectories:
            return
        found = self._reference.excesses(trajectories, self.aim)
        self.inc("opd_length_scored_total", len(trajectories))
        self.inc("opd_length_expected_nats_total", float(found.expected_N.clip(min=0).sum()))
        self.inc("opd_length_over_nats_total", float(found.nats_N.clip(min=0).sum()))
        self.inc("opd_length_under_nats_total", float((-found.nats_N).clip(min=0).sum()))
        self.inc("opd_length_squares_total", float((found.nats_N**2).sum()))
        self.inc("opd_length_tail_total", int(found.in_tail_N.sum()))
        self.inc("opd_length_tail_expected_total", float(found.tail_probability_N.sum()))

    def beat(self) -> None:
        """A step has finished, or a pause has ended: what follows is timed from here."""
        self.set("opd_heartbeat_timestamp_seconds", time.time())

    def state(self) -> list[Series]:
        """Every series, for a checkpoint: the metric's name, its labels, a number or a histogram's counts by upper edge and its sum."""
        names = {metric.name: metric.labels for metric in self._declared}
        return [
            [
                name,
                dict(zip(names[name], values, strict=True)),
                _read_histogram(child) if hasattr(child, "_buckets") else child._value.get(),
            ]
            for name, values, child in self._series()
        ]

    def restore(self, state: Iterable[Series]) -> None:
        """Go on from a checkpoint's values, also in a process that has gone beyond it; restarts of actors are never forgotten.

        A histogram whose edges have changed starts from zero. The gauge of an actuator that the job has no more is left out.
        """
        known = {(name, tuple(labels.values())): value for name, labels, value in state if name in self._metrics}
        for name, values in known.keys() | {(name, values) for name, values, _ in self._series()}:
            metric: Any = self._metrics[name]
            value, child = known.get((name, values)), metric.labels(self.run, *values)
            if isinstance(metric, Histogram):
                edges, *_ = empty = _read_histogram(child)
                _, counts, total = value if value is not None and value[0] == edges else empty
                for bucket, count in zip(child._buckets, counts, strict=True):
                    bucket.set(count)
                child._sum.set(total)
            elif name == "opd_actor_restarts_total":
                child._value.set(max(child._value.get(), value or 0.0))
            elif isinstance(metric, PrometheusCounter):
                child._value.set(value or 0.0)
            elif value is not None and name not in OWN_GAUGES:
                child._value.set(value)

    def _series(self) -> Iterable[tuple[str, tuple[str, ...], Any]]:
        return [
            (m.name, tuple(values[1:]), child) for m in self._declared for values, child in dict(self._metrics[m.name]._metrics).items()
        ]


def _read_histogram(child: Any) -> list[Any]:
    """[edges, counts between them, sum]."""
    return [[str(edge) for edge in child._upper_bounds], [bucket.get() for bucket in child._buckets], child._sum.get()]


def _create(metric: Metric, buckets: tuple[float, ...] | None, registry: CollectorRegistry) -> MetricWrapperBase:
    labels = ("run", *metric.labels)
    if metric.kind == "counter":
        return PrometheusCounter(metric.name, metric.help, labels, registry=registry)
    if metric.kind == "gauge":
        return Gauge(metric.name, metric.help, labels, registry=registry)
    return Histogram(metric.name, metric.help, labels, registry=registry, buckets=buckets or SECONDS_BUCKETS)
