"""All series of a run at one moment, whichever source they come from. Pure: no network, no clock."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Labels = tuple[tuple[str, str], ...]

TARGET_LABELS = frozenset({"run", "job", "instance"})
"""What a scrape adds, and the run itself: the same series carries them over a server and not over /metrics."""


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
        return finite(sum(value for found, value in self._families[name] if labels.items() <= found.items()))

    def gauge(self, name: str, **labels: str) -> float | None:
        """The value with these labels; None without one or when it is not finite."""
        matching = [value for found, value in self._families.get(name, []) if labels.items() <= found.items()]
        return finite(matching[0]) if matching else None

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Cumulative counts by upper edge, in rising order."""
        edges: dict[float, float] = {}
        for found, value in self._families.get(f"{name}_bucket", []):
            if labels.items() <= found.items():
                edge = float(found["le"])
                edges[edge] = edges.get(edge, 0.0) + value
        return dict(sorted(edges.items()))


class Growth:
    """What a run did between two snapshots. A counter that went back (the run restarted) is read from zero."""

    def __init__(self, previous: Snapshot, current: Snapshot) -> None:
        self.current = current
        self._previous = Snapshot() if _restarted(previous, current) else previous

    def of(self, name: str, **labels: str) -> float | None:
        """Growth of a counter; None when it is absent or not finite."""
        now = self.current.total(name, **labels)
        return None if now is None else finite(now - (self._previous.total(name, **labels) or 0.0))

    def ratio(self, part: str, whole: str) -> float | None:
        """Growth of one counter over that of another; None when nothing is new."""
        return ratio(self.of(part), self.of(whole))

    def buckets(self, name: str, **labels: str) -> list[tuple[float, float, float]]:
        """(lower edge, upper edge, new observations) per bucket; empty when a count is not finite or nothing is new."""
        before = self._previous.buckets(name, **labels)
        grown, lower, below = [], -math.inf, 0.0
        for edge, value in self.current.buckets(name, **labels).items():
            new = value - before.get(edge, 0.0)
            if not math.isfinite(new):
                return []
            grown.append((lower, edge, max(0.0, new - below)))
            lower, below = edge, new
        return grown if sum(count for _, _, count in grown) > 0 else []

    def quantile(self, name: str, share: float, **labels: str) -> float | None:
        """As Prometheus' histogram_quantile: linear inside a bucket; in an open bucket its finite edge."""
        buckets = self.buckets(name, **labels)
        rank = share * sum(count for _, _, count in buckets)
        for lower, upper, count in buckets:
            if count > 0 and rank <= count:
                start = max(lower, 0.0) if upper > 0 and math.isinf(lower) else lower
                if math.isinf(upper) or math.isinf(start):
                    return finite(start if math.isinf(upper) else upper)
                return start + (upper - start) * rank / count
            rank -= count
        return finite(buckets[-1][0]) if buckets else None

    def longest(self, name: str, last_step_max_tokens: float | None) -> float | None:
        """The gauge covers the last step only; the highest bucket hit is a lower bound over all steps spanned."""
        hit = [lower for lower, _, count in self.buckets(name) if count > 0 and lower > 0]
        known = [value for value in (hit[-1] if hit else None, last_step_max_tokens) if value is not None]
        return max(known) if known else None


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def added(*values: float | None) -> float | None:
    """The sum; None when a part is unknown."""
    present = [value for value in values if value is not None]
    return sum(present) if len(present) == len(values) else None


def ratio(part: float | None, whole: float | None) -> float | None:
    """part / whole; None when a part is unknown or the whole is not positive."""
    return part / whole if part is not None and whole is not None and whole > 0 else None


def _restarted(previous: Snapshot, current: Snapshot) -> bool:
    for name in ("opd_rollouts_total", "opd_rollout_length_tokens_count"):
        before, now = previous.total(name), current.total(name)
        if before is not None and now is not None and now < before:
            return True
    return False
