"""From two readings of a run's metrics to the governor's signals. Pure: no network, no clock.

The same code serves both sources, a Prometheus server and the run's own /metrics: each yields a Snapshot.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

Labels = tuple[tuple[str, str], ...]

TARGET_LABELS = frozenset({"run", "job", "instance"})
"""What a scrape adds, and the run itself: the same series carries them over a server and not over /metrics."""

LARGEST = 1e15
"""No length, count or rate of a run comes near this: beyond it a number is a fault of the source."""


@dataclass(frozen=True)
class Snapshot:
    """All series of one run at one moment.

    >>> Snapshot.of([("opd_rollouts_total", {"run": "a", "finish_reason": "stop"}, 31.0)]).total("opd_rollouts_total")
    31.0
    """

    series: Mapping[tuple[str, Labels], float] = field(default_factory=dict)
    taken_s: float | None = None
    """When a server scraped it, seconds since the epoch; None: read from the run itself, just now."""

    @classmethod
    def of(cls, samples: Iterable[tuple[str, Mapping[str, str], float]], taken_s: float | None = None) -> "Snapshot":
        """From (name, labels, value). Bucket edges are written as floats whatever form they came in."""
        series: dict[tuple[str, Labels], float] = {}
        for name, labels, value in samples:
            kept = {key: str(float(text)) if key == "le" else text for key, text in labels.items() if key not in TARGET_LABELS}
            series[name, tuple(sorted(kept.items()))] = value
        return cls(series, taken_s)

    def to_json(self) -> list[Any]:
        """[name, labels, value] of each series."""
        return [[name, dict(labels), value] for (name, labels), value in self.series.items()]

    @classmethod
    def from_json(cls, series: Iterable[Any]) -> "Snapshot":
        return cls.of((name, labels, value) for name, labels, value in series)

    @cached_property
    def _families(self) -> dict[str, list[tuple[dict[str, str], float]]]:
        families: dict[str, list[tuple[dict[str, str], float]]] = {}
        for (name, labels), value in sorted(self.series.items(), key=lambda item: item[0]):
            families.setdefault(name, []).append((dict(labels), value))
        return families

    def total(self, name: str, **labels: str) -> float | None:
        """Sum over the series of that name with these labels; None when the name is absent or the sum is not finite.

        A label value that has not occurred yet counts 0 as long as the name is there.
        """
        if name not in self._families:
            return None
        return _finite(sum(value for found, value in self._families[name] if labels.items() <= found.items()))

    def gauge(self, name: str, **labels: str) -> float | None:
        """The value with these labels; None without one or when it is not finite."""
        matching = [value for found, value in self._families.get(name, []) if labels.items() <= found.items()]
        return _finite(matching[0]) if matching else None

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulative counts by upper edge, in rising order."""
        edges: dict[float, float] = {}
        for found, value in self._families.get(f"{name}_bucket", []):
            if labels.items() <= found.items():
                edge = float(found["le"])
                edges[edge] = edges.get(edge, 0.0) + value
        return dict(sorted(edges.items()))


@dataclass(frozen=True, slots=True)
class Reference:
    """Lengths of golden or teacher answers, tokens."""

    mean_tokens: float | None = None
    p99_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Signals:
    """What the law decides on. None: not measured. Rates and means are over the rollouts since the reading before."""

    time_s: float | None = None
    """When it was read, seconds since the epoch."""
    data_age_s: float | None = 0.0
    """How long before that the run itself was last seen; None: unknown, which counts as too old."""
    blind: bool = False
    """The source gave nothing that can be trusted."""
    blind_reason: str = ""
    steps_spanned: float | None = None
    """Learner steps between the two readings."""
    num_rollouts: float | None = None
    """Rollouts that came to an end other than an error."""
    tail_share: float | None = None
    """Share longer than a multiple of the reference p99, rollouts cut by a lowered cap included."""
    length_mean_tokens: float | None = None
    length_p95_tokens: float | None = None
    length_max_tokens: float | None = None
    reference_mean_tokens: float | None = None
    reference_p99_tokens: float | None = None
    truncation_rate: float | None = None
    """Cut by the job's own cap or by the in-engine loop stop, before any filter."""
    governor_cut_rate: float | None = None
    """Cut by a cap that the governor had lowered."""
    loop_rate: float | None = None
    kl_nats: float | None = None
    stop_mass_student: float | None = None
    """Mean over positions of the student's summed probability of all stop ids."""
    stop_mass_teacher: float | None = None
    """The teacher's, at the same positions."""
    stop_density_per_token: float | None = None
    """Stop supervision: (1 - share cut by any cap) / mean length."""
    teacher_stop_logprob_nats: float | None = None
    """Median log-prob of the teacher's stop class at sampled stops."""
    eval_accuracy: float | None = None
    eval_truncation: float | None = None
    staleness_steps: float | None = None

    def cleaned(self) -> "Signals":
        """What is not finite, absurdly large, or negative where it cannot be, becomes None."""

        def clean(name: str, value: Any) -> Any:
            if not isinstance(value, int | float) or isinstance(value, bool):
                return value
            signed = name in ("kl_nats", "teacher_stop_logprob_nats")
            return value if math.isfinite(value) and abs(value) <= LARGEST and (signed or value >= 0) else None

        return Signals(**{name: clean(name, value) for name, value in asdict(self).items()})

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Signals":
        return cls(**values)


def read_reference(snapshot: Snapshot, held: Reference) -> Reference:
    """The published reference; what is missing or not positive keeps the value held before."""
    mean = snapshot.gauge("opd_length_reference_tokens", stat="mean")
    p99 = snapshot.gauge("opd_length_reference_tokens", stat="p99")
    return Reference(mean or held.mean_tokens, p99 or held.p99_tokens)


def compute(previous: Snapshot, current: Snapshot, reference: Reference, tail_multiple: float) -> Signals:
    """Signals of the rollouts between two snapshots of one run.

    A counter that went back (the run restarted) is read from zero. Between two bucket edges lengths are taken as evenly
    spread, as Prometheus' histogram_quantile does, so a threshold that falls inside a bucket counts that part of it above.
    """
    if _restarted(previous, current):
        previous = Snapshot()

    def growth(name: str, **labels: str) -> float | None:
        now = current.total(name, **labels)
        return None if now is None else _finite(now - (previous.total(name, **labels) or 0.0))

    ends = {reason: growth("opd_rollouts_total", finish_reason=reason) for reason in ("stop", "length", "repetition")}
    num_rollouts = _sum(*ends.values())
    cut = growth("opd_governor_cut_rollouts_total")
    cut_share = _ratio(cut or 0.0, num_rollouts)
    ended_early = _ratio(_sum(ends["length"], ends["repetition"]), num_rollouts)
    mean = _ratio(growth("opd_rollout_tokens_total"), num_rollouts)
    lengths = _bucket_growth(previous, current, "opd_rollout_length_tokens")
    stops = _bucket_growth(previous, current, "opd_stop_teacher_logprob", form="class")
    tail = None
    if reference.p99_tokens is not None and (over := _share_over(lengths, tail_multiple * reference.p99_tokens)) is not None:
        # A lowered cap stays above the threshold, so what it cut was on its way into the tail.
        tail = max(over, cut_share or 0.0)
    kept_share = None if ended_early is None else 1.0 - ended_early
    mass_tokens = growth("opd_stop_mass_tokens_total")
    has_rollouts = num_rollouts is not None and num_rollouts > 0
    return Signals(
        steps_spanned=growth("opd_learner_steps_total"),
        num_rollouts=num_rollouts,
        tail_share=tail,
        length_mean_tokens=mean,
        length_p95_tokens=_quantile(lengths, 0.95),
        length_max_tokens=_longest(lengths, current.gauge("opd_rollout_length_max_tokens")) if has_rollouts else None,
        reference_mean_tokens=reference.mean_tokens,
        reference_p99_tokens=reference.p99_tokens,
        truncation_rate=None if ended_early is None or cut_share is None else max(0.0, ended_early - cut_share),
        governor_cut_rate=cut_share,
        loop_rate=_ratio(growth("opd_rollout_loops_total"), num_rollouts),
        kl_nats=_ratio(growth("opd_kl_nats_total"), growth("opd_kl_tokens_total")),
        stop_mass_student=_ratio(growth("opd_stop_mass_student_total"), mass_tokens),
        stop_mass_teacher=_ratio(growth("opd_stop_mass_teacher_total"), mass_tokens),
        stop_density_per_token=_ratio(kept_share, mean),
        teacher_stop_logprob_nats=_quantile(stops, 0.5),
        eval_accuracy=current.gauge("opd_eval_accuracy_ratio", decoding="greedy"),
        eval_truncation=current.gauge("opd_eval_truncation_ratio", decoding="greedy"),
        staleness_steps=_ratio(growth("opd_sample_staleness_steps_sum"), growth("opd_sample_staleness_steps_count")),
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _sum(*values: float | None) -> float | None:
    present = [value for value in values if value is not None]
    return sum(present) if len(present) == len(values) else None


def _ratio(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole is not None and whole > 0 else None


def _restarted(previous: Snapshot, current: Snapshot) -> bool:
    for name in ("opd_rollouts_total", "opd_rollout_length_tokens_count"):
        before, now = previous.total(name), current.total(name)
        if before is not None and now is not None and now < before:
            return True
    return False


def _bucket_growth(previous: Snapshot, current: Snapshot, name: str, **labels: str) -> list[tuple[float, float, float]]:
    """(lower edge, upper edge, new observations) per bucket; empty when a count is not finite or nothing is new."""
    before = previous.buckets(name, **labels)
    grown, lower, below = [], -math.inf, 0.0
    for edge, value in current.buckets(name, **labels).items():
        new = value - before.get(edge, 0.0)
        if not math.isfinite(new):
            return []
        grown.append((lower, edge, max(0.0, new - below)))
        lower, below = edge, new
    return grown if sum(count for _, _, count in grown) > 0 else []


def _share_over(buckets: list[tuple[float, float, float]], threshold: float) -> float | None:
    if not buckets:
        return None
    over = 0.0
    for lower, upper, count in buckets:
        if lower >= threshold or (threshold < upper and math.isinf(upper)):
            # The open bucket has no upper edge to spread over: all of it counts, the cautious side.
            over += count
        elif threshold < upper:
            over += count * (upper - threshold) / (upper - max(lower, 0.0))
    return over / sum(count for _, _, count in buckets)


def _quantile(buckets: list[tuple[float, float, float]], share: float) -> float | None:
    """As Prometheus' histogram_quantile: linear inside a bucket; in an open bucket its finite edge."""
    if not buckets:
        return None
    rank = share * sum(count for _, _, count in buckets)
    for lower, upper, count in buckets:
        if count > 0 and rank <= count:
            start = max(lower, 0.0) if upper > 0 and math.isinf(lower) else lower
            if math.isinf(upper) or math.isinf(start):
                return _finite(start if math.isinf(upper) else upper)
            return start + (upper - start) * rank / count
        rank -= count
    return _finite(buckets[-1][0])


def _longest(buckets: list[tuple[float, float, float]], last_step: float | None) -> float | None:
    """The gauge covers the last step only; the highest bucket hit is a lower bound over all steps spanned."""
    hit = [lower for lower, _, count in buckets if count > 0 and lower > 0]
    known = [value for value in (hit[-1] if hit else None, last_step) if value is not None]
    return max(known) if known else None
