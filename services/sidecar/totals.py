"""The metrics of governed runs, under the names of our own: dashboards and alerts read both. Sums are kept, text is made at a scrape."""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

from opd_governor.actors.governor.actuators import metric_of, movable, value_of
from opd_governor.services.sidecar.governing import Answer, OutsideGovernor
from opd_governor.services.sidecar.seen import StepSeen

NUM_BUCKETS = 64
COUNTERS = {
    "opd_rollout_tokens_total": "Response tokens sampled.",
    "opd_rollout_loops_total": "Rollouts that end in a loop.",
    "opd_governor_cut_rollouts_total": "Rollouts cut by a cap that the governor had lowered.",
    "opd_learner_steps_total": "Steps posted.",
}


class Totals:
    """The sums of one run since the service began."""

    def __init__(self, run: str) -> None:
        self.run = run
        self.ends: Counter[str] = Counter()
        self.sums: Counter[str] = Counter()
        self.decisions: Counter[tuple[str, str]] = Counter()
        self.gauges: dict[str, float] = {}
        self.reference: dict[str, float] = {}
        self.edges: list[float] = []
        self.lengths: Counter[int] = Counter()
        self.num_lengths = 0

    def add(self, seen: StepSeen, answer: Answer, governor: OutsideGovernor) -> None:
        """One step more."""
        number = seen.num_rollouts or 0.0
        cut = (seen.truncation or 0.0) * number
        self.ends["stop"] += number - cut  # type: ignore[assignment]
        self.ends["length"] += cut  # type: ignore[assignment]
        self.sums["opd_rollout_tokens_total"] += number * (seen.length_mean_tokens or 0.0)  # type: ignore[assignment]
        self.sums["opd_rollout_loops_total"] += number * (seen.loops or 0.0)  # type: ignore[assignment]
        self.sums["opd_learner_steps_total"] += 1
        signals = governor.decision.signals if governor.decision else None
        if signals is not None and signals.governor_cut_rate:
            self.sums["opd_governor_cut_rollouts_total"] += signals.governor_cut_rate * number  # type: ignore[assignment]
        self.decisions[answer.action, answer.signal] += 1
        self._observe(seen, governor.cap_tokens)
        self.gauges |= {"opd_governor_pressure": answer.pressure, "opd_heartbeat_timestamp_seconds": time.time()}
        for name in movable():
            value = value_of(answer.limits, name)
            if value is not None and (name != "cap_tokens" or answer.cap_known):
                self.gauges[metric_of(name)] = value
        for gauge, figure in (
            ("opd_rollout_length_max_tokens", seen.length_max_tokens),
            ("opd_student_entropy_nats", seen.entropy_nats),
            ("opd_learner_loss", seen.loss),
            ("opd_learner_grad_norm", seen.grad_norm),
        ):
            if figure is not None:
                self.gauges[gauge] = figure
        for stat, reference in (("mean", governor.reference.mean_tokens), ("p99", governor.reference.p99_tokens)):
            if reference is not None:
                self.reference[stat] = reference

    def _observe(self, seen: StepSeen, cap_tokens: int | None) -> None:
        if not seen.lengths:
            return
        if not self.edges:
            top = cap_tokens or max(seen.lengths)
            width = max(1, -(-top // NUM_BUCKETS))
            self.edges = [float(edge) for edge in range(width, top + width, width)] + [2.0 * top]
            self._width = width
        for length in seen.lengths:
            bucket = min(len(self.edges) - 1, max(0, (length - 1) // self._width))
            self.lengths[bucket if length <= self.edges[bucket] else len(self.edges)] += 1
        self.num_lengths += len(seen.lengths)


class RunsCollector(Collector):
    """Every run's totals as Prometheus families."""

    def __init__(self, totals: Callable[[], Iterable[Totals]]) -> None:
        self._totals = totals

    def collect(self) -> Iterator[Any]:
        all_totals = list(self._totals())
        ends = CounterMetricFamily("opd_rollouts", "Rollouts by how they ended.", labels=("run", "finish_reason"))
        decisions = CounterMetricFamily("opd_governor_decisions", "Decisions by action and signal.", labels=("run", "action", "signal"))
        reference = GaugeMetricFamily("opd_length_reference_tokens", "Reference length.", labels=("run", "stat"))
        histogram = HistogramMetricFamily("opd_rollout_length_tokens", "Length of a rollout, tokens.", labels=("run",))
        sums = {name: CounterMetricFamily(name.removesuffix("_total"), text, labels=("run",)) for name, text in COUNTERS.items()}
        gauges: dict[str, GaugeMetricFamily] = {}
        for totals in all_totals:
            for reason in ("stop", "length"):
                ends.add_metric((totals.run, reason), totals.ends[reason])
            for (action, signal), count in list(totals.decisions.items()):
                decisions.add_metric((totals.run, action, signal), count)
            for stat, value in list(totals.reference.items()):
                reference.add_metric((totals.run, stat), value)
            for name, family in sums.items():
                family.add_metric((totals.run,), totals.sums[name])
            for name, value in list(totals.gauges.items()):
                gauges.setdefault(name, GaugeMetricFamily(name, name, labels=("run",))).add_metric((totals.run,), value)
            if totals.num_lengths:
                histogram.add_metric((totals.run,), _cumulative(totals), totals.sums["opd_rollout_tokens_total"])
        yield from (ends, decisions, reference, histogram, *sums.values(), *gauges.values())


def _cumulative(totals: Totals) -> list[tuple[str, float]]:
    running, buckets = 0, []
    for index, edge in enumerate([*totals.edges, float("inf")]):
        running += totals.lengths[index]
        buckets.append((str(edge) if edge != float("inf") else "+Inf", float(running)))
    return buckets
