"""How long answers ought to be in a run that is not ours, and what a step counts against that. Pure.

Posted reference lengths (a teacher's or golden answers) are the best; a figure given outright comes next; else the run's own first steps
with little truncation serve. Where only a mean and a longest answer are logged the same is done with these.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from opd_governor.actors.governor.reference import MIN_SPREAD_NATS, TAIL_MARGIN, TAIL_SHARE, Answer, LengthModel, fit_lengths
from opd_governor.services.sidecar.seen import StepSeen, quantile

BASELINE_STEPS = 8
"""Steps of a run without posted reference lengths whose own answers serve as its reference."""
BASELINE_TRUNCATION = 0.3
"""A step with more of its answers cut says nothing about how long answers ought to be."""
MAX_REFERENCES = 1024
"""Reference lengths kept; beyond it the oldest go."""
ASSUMED_ROLLOUTS = 16.0
"""Answers in a step of a trainer that does not tell how many."""
ANSWER_SPREAD_NATS = 0.4
"""Spread of the log of single answers' lengths where only a mean is known: what a teacher's answers to one data set mostly have."""


@dataclass(frozen=True, slots=True)
class Yardstick:
    """The reference so far."""

    mean_tokens: float | None = None
    p99_tokens: float | None = None
    """None: nobody has said yet."""
    source: str = "none yet"
    centre: float | None = None
    """Expected log length."""
    spread_nats: float = ANSWER_SPREAD_NATS
    tail_nats: float = 0.0
    by_means: bool = False
    """Whether `centre` is of steps' means, not of single answers."""
    posted: tuple[float, ...] = ()
    posted_cut: tuple[float, ...] = ()
    """Lengths at which a teacher's answers were cut: they would have been longer."""
    baseline: tuple[float, ...] = ()
    """Lengths (or, where a trainer logs none, the longest one of each step) in the first steps, until they are enough."""
    baseline_means: tuple[float, ...] = ()

    def learn(self, seen: StepSeen) -> "Yardstick":
        """With what this step adds."""
        if seen.reference_p99_tokens is not None:
            return _given(seen.reference_mean_tokens, seen.reference_p99_tokens)
        if self.p99_tokens is not None:
            return self
        mean, longest = seen.length_mean_tokens, seen.length_max_tokens
        if mean is None or longest is None or mean <= 0 or (seen.truncation or 0.0) > BASELINE_TRUNCATION:
            return self
        baseline, means = (*self.baseline, *(seen.lengths or (longest,)))[-MAX_REFERENCES:], (*self.baseline_means, mean)
        if len(means) < BASELINE_STEPS:
            return replace(self, source=f"none yet ({len(means)} of {BASELINE_STEPS} steps)", baseline=baseline, baseline_means=means)
        source = f"the run's own first {BASELINE_STEPS} steps"
        if seen.lengths and (fitted := _fitted(baseline, source)) is not None:
            return fitted
        centre = statistics.fmean(math.log(each) for each in means)
        spread = max(MIN_SPREAD_NATS, statistics.pstdev(math.log(each) for each in means))
        tail = math.log(TAIL_MARGIN * max(baseline)) - centre
        return Yardstick(statistics.fmean(means), max(baseline), source, centre, spread, tail, by_means=True)

    def post(self, lengths: Sequence[float], cut: Sequence[float] = ()) -> "Yardstick":
        """With reference lengths that the trainer sent beside a step; `cut`: of answers that did not end, where they were cut."""
        if not lengths and not cut:
            return self
        posted, posted_cut = (*self.posted, *lengths)[-MAX_REFERENCES:], (*self.posted_cut, *cut)[-MAX_REFERENCES:]
        source = f"{len(posted)} posted reference lengths" + (f" and {len(posted_cut)} that were cut" if posted_cut else "")
        fitted = _fitted(posted, source, posted_cut) or self
        return replace(fitted, posted=posted, posted_cut=posted_cut)

    def counts(self, seen: StepSeen, number: float, cap_tokens: float) -> dict[str, float]:
        """What our own runs count of a step against its reference: metric -> value. Empty without a reference or a length."""
        if self.centre is None:
            return {}
        if seen.lengths and not self.by_means:
            lengths_N = np.array(seen.lengths)
            cut_N = (lengths_N >= cap_tokens) & bool(seen.truncation)
            budgets_N, centres_N = np.full(len(lengths_N), cap_tokens), np.full(len(lengths_N), self.centre)
            found = self._model().measure(lengths_N, budgets_N, cut_N, centres_N)
            scored = float(len(lengths_N))
            over, under = float(found.nats_N.clip(min=0).sum()), float((-found.nats_N).clip(min=0).sum())
            squares = float((found.nats_N**2).sum())
            tail, expected = float(found.in_tail_N.sum()), float(found.tail_probability_N.sum())
        elif seen.length_mean_tokens:
            scored = max(1.0, number)
            nats = math.log(seen.length_mean_tokens) - self.centre
            over, under = scored * max(0.0, nats), scored * max(0.0, -nats)
            squares = scored * (nats**2 + self.spread_nats**2)  # a mean hides how answers scatter
            tail, expected = scored * _tail_share(seen, math.exp(self.centre + self.tail_nats)), scored * TAIL_SHARE
        else:
            return {}
        return {
            "opd_length_scored_total": scored,
            "opd_length_over_nats_total": over,
            "opd_length_under_nats_total": under,
            "opd_length_squares_total": squares,
            "opd_length_tail_total": min(scored, tail),
            "opd_length_tail_expected_total": expected,
            "opd_length_reference_spread_nats": self.spread_nats,
        }

    def _model(self) -> LengthModel:
        assert self.centre is not None
        return LengthModel(self.centre, 0.0, 0.0, self.spread_nats, self.tail_nats)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Yardstick":
        kept = dict(values)
        for name in ("posted", "posted_cut", "baseline", "baseline_means"):
            kept[name] = tuple(kept[name])
        return cls(**kept)


def _fitted(lengths: Sequence[float], source: str, cut: Sequence[float] = ()) -> Yardstick | None:
    """None for fewer than five lengths of answers that ended."""
    answers = [Answer(index, 1, "", max(1, round(length)), index < len(lengths)) for index, length in enumerate((*lengths, *cut))]
    model = fit_lengths(answers)
    if model is None:
        return None
    p99 = model.quantile_tokens(answers, 0.99) if cut else quantile(sorted(lengths), 0.99)
    mean = math.exp(model.intercept + model.spread_nats**2 / 2) if cut else statistics.fmean(lengths)
    return Yardstick(mean, p99, source, model.intercept, model.spread_nats, model.tail_nats)


def _given(mean_tokens: float | None, p99_tokens: float) -> Yardstick:
    """From a p99 and, where it is known, a mean: log lengths taken as normal."""
    p99_tokens = max(1.0, p99_tokens)
    mean = max(1.0, mean_tokens or p99_tokens / math.exp(2.33 * ANSWER_SPREAD_NATS))
    spread = max(MIN_SPREAD_NATS, math.log(max(1.0, p99_tokens / mean)) / 2.33)
    tail = math.log(TAIL_MARGIN * p99_tokens / mean)
    return Yardstick(mean, p99_tokens, "the reference length that was given", math.log(mean), spread, tail)


def _tail_share(seen: StepSeen, threshold_tokens: float) -> float:
    """Share of answers longer than the threshold, at least: what a step's summary proves. A cut answer would have gone on."""
    longest = seen.length_max_tokens
    if longest is None or longest <= threshold_tokens:
        return seen.truncation or 0.0
    proven = 1.0 / (seen.num_rollouts or ASSUMED_ROLLOUTS)
    if seen.length_p95_tokens is not None and seen.length_p95_tokens > threshold_tokens:
        proven = max(proven, 0.05)
    return max(proven, seen.truncation or 0.0)
