"""Sequential tests: from one step's observation to accumulated evidence against health. Pure.

Each test is an e-detector (Shin, Ramdas, Rinaldo, "E-detectors", 2022). A step brings an e-value: a number whose mean is at most 1 while
the run is healthy, whatever came before. Evidence is the log of M, where M <- (1 + M) x e: the sum, over all steps at which a change may
have begun, of the evidence since. An alarm at M >= A then has an average run length of at least A steps between false alarms. Several
alternatives (a small, a middle, a large departure) each keep their own M, and the evidence is that of their mean, which has the same
property.

What is fed in is bounded and averaged over the step, so that heavy tails and batches of any size are the same to it. Rollouts of one
step resemble each other: shares are read as those of fewer rollouts (a design effect), means by their scatter from step to step.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

WITHIN_STEP_CORRELATION = 0.01
"""Between two rollouts of a step: n rollouts count as n / (1 + (n - 1) x this)."""
MAX_STEP_NATS = 13.0
"""Most evidence that one step may bring to one alternative: a single step begins to press, a second one decides."""
MAX_RELIEF_NATS = 2.0
"""Most evidence that one step may take away."""
MOST_SHARE = 0.9
"""Where a healthy run has at least this share, more of it proves nothing: under a short cap nearly every rollout is cut."""
PROMPTS_MOVED_NATS = 0.15
"""Prompts have changed where the answers expected of them are longer or shorter than the running level by this much."""
MOVED_STEPS = 8.0
"""After a step with changed prompts, the next steps count as changed too: the prompts of single steps scatter."""
MOVED_STEP_NATS = 2.0
"""Most evidence that one step may bring against a running level while prompts have changed: the jump may come from them."""
BASELINE_ROLLOUTS = 128
BASELINE_STEPS = 4
"""A baseline is learned over at least this many rollouts and steps; it excuses a student that begins otherwise than its teacher."""
SCATTER_MEMORY = 0.95
"""Share of the scatter's memory that a step keeps."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What a signal read between two snapshots."""

    value: float
    num: float
    """Rollouts (or, for a mean over tokens, 1) behind it."""
    expected: float = 0.0
    """Share: what the reference expects under the caps that applied. Mean: what it expects."""
    spread: float = 0.0
    """Mean: standard deviation of one value in the reference; 0: unknown."""
    variance: float | None = None
    """Mean: of one value, as measured in this step."""
    prompts: float | None = None
    """Mean log of what the reference expects of the step's prompts, whether `value` is measured against it or not: it moves with them."""


@dataclass(frozen=True, slots=True)
class Track:
    """What a test remembers."""

    logs: tuple[float, ...] = ()
    """log M of each alternative."""
    baseline: float = 0.0
    baseline_weight: float = 0.0
    baseline_steps: int = 0
    last: float | None = None
    scatter: float | None = None
    """Mean of half squared differences between neighbouring steps, x rollouts: variance of one value with all that a step shares."""
    variance: float | None = None
    """Of one value, smoothed: what the next step's mean is expected to scatter by."""
    prompts: float | None = None
    """Running level of `Observation.prompts`."""
    moved_steps: float = 0.0
    """Steps for which prompts still count as changed."""

    @property
    def evidence(self) -> float:
        """Nats."""
        if not self.logs:
            return 0.0
        top = max(self.logs)
        return max(0.0, top + math.log(sum(math.exp(each - top) for each in self.logs) / len(self.logs)))

    def restarted(self) -> "Track":
        """Baseline and scatter are learned again; evidence so far stays, so that a change releases nothing."""
        return Track(logs=self.logs)

    def held_at(self, nats: float) -> "Track":
        """With at most this much evidence."""
        return replace(self, logs=tuple(min(nats, log) for log in self.logs))

    def to_json(self) -> dict[str, Any]:
        return {
            "logs": list(self.logs), "baseline": self.baseline, "baseline_weight": self.baseline_weight,
            "baseline_steps": self.baseline_steps, "last": self.last, "scatter": self.scatter, "variance": self.variance,
            "prompts": self.prompts, "moved_steps": self.moved_steps,
        }  # fmt: skip

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Track":
        return cls(**known(cls, {**values, "logs": tuple(values["logs"])}))


def known(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that this version of a dataclass has: a state written by another version goes on, with defaults for what it lacks."""
    names = {field.name for field in fields(kind)}
    return {name: value for name, value in values.items() if name in names}


class Test(Protocol):
    """One observation after the other."""

    def bound(self, track: Track, seen: Observation) -> float:
        """The worst value that a healthy run may have."""
        ...

    def update(self, track: Track, seen: Observation, steps: float, ceiling: float) -> Track:
        """`steps`: that the observation spans. `ceiling`: evidence is held at it, so that it can be taken back in time."""
        ...


@dataclass(frozen=True, slots=True)
class ShareTest:
    """A share of rollouts against what the reference expects: a likelihood ratio of binomials, one-sided.

    Healthy: at most `ratio` x the expected share + `slack`, where a baseline up to `max_baseline` may stand for the expected.
    """

    slack: float
    ratio: float = 1.5
    max_baseline: float = 0.0

    def bound(self, track: Track, seen: Observation) -> float:
        learned = min(self.max_baseline, track.baseline) if track.baseline_weight else 0.0
        return min(MOST_SHARE, self.ratio * max(seen.expected, learned) + self.slack)

    def update(self, track: Track, seen: Observation, steps: float, ceiling: float) -> Track:
        track = _learn(track, seen)
        healthy = self.bound(track, seen)
        if healthy >= MOST_SHARE:
            return track
        num = seen.num / (1.0 + (seen.num - 1.0) * WITHIN_STEP_CORRELATION)
        hits = min(1.0, max(0.0, seen.value)) * num
        gains = []
        for sick in (1.5 * healthy + 0.02, 3.0 * healthy + 0.05, 0.2 + healthy, 0.5 + healthy / 2):
            share = min(0.95, max(sick, healthy + 0.02))
            gains.append(hits * math.log(share / healthy) + (num - hits) * math.log((1 - share) / (1 - healthy)))
        return replace(track, logs=_accumulate(track.logs, gains, ceiling))


@dataclass(frozen=True, slots=True)
class MeanTest:
    """The mean of a log quantity against what the reference expects, in nats: a likelihood ratio of normal means, one-sided.

    Healthy: beyond the expected by at most `slack` + `slack_spreads` x the reference's spread, where a baseline that begins beyond it by
    up to `max_baseline` may stand for the expected. The variance is the larger of the rollouts' own and the scatter between steps
    before this one.
    """

    sign: float
    """+1: high is bad; -1: low is bad."""
    slack: float = 0.0
    slack_spreads: float = 0.0
    max_baseline: float = 0.0
    half_life_steps: float | None = None
    """The expected is a running level that follows what is worse with this half-life, what is better with a fifth of it; None: the
    reference."""
    max_step_nats: float = MAX_STEP_NATS
    """Most evidence of one step: a small one asks for many steps in a row. Where prompts moved: MOVED_STEP_NATS."""
    floor: float = 0.02
    """Smallest standard deviation of a step's mean that is believed, nats."""
    alternatives: tuple[float, ...] = (0.1, 0.3, 1.0)
    """Departures beyond the bound that are looked for, nats."""

    def bound(self, track: Track, seen: Observation) -> float:
        beyond = self.slack + self.slack_spreads * seen.spread
        if self.half_life_steps is not None:
            return self._level(track, seen) + self.sign * beyond
        learned = self.sign * (track.baseline - seen.expected) if track.baseline_weight else 0.0
        if not _is_learned(track):
            learned = self.max_baseline  # whatever the student begins with, until that is known
        elif learned > 0:
            learned += math.sqrt(self._variance(track, seen) / max(1.0, track.baseline_weight / max(1.0, seen.num)))
        return seen.expected + self.sign * (min(self.max_baseline, max(0.0, learned)) + beyond)

    def update(self, track: Track, seen: Observation, steps: float, ceiling: float) -> Track:
        variance = self._variance(track, seen)
        if self.half_life_steps is None:
            track = _learn(track, seen)
        excess = self.sign * (seen.value - self.bound(track, seen))
        gains = [(delta * excess - delta * delta / 2) / variance for delta in self.alternatives]
        most = self.max_step_nats
        if self.half_life_steps is not None and _prompts_moved(track, seen):
            most = min(most, MOVED_STEP_NATS)
        track = replace(track, logs=_accumulate(track.logs, [min(most, gain) for gain in gains], ceiling))
        if self.half_life_steps is not None:
            level = self._level(track, seen)
            worse = self.sign * (seen.value - level) > 0
            half_life_steps = self.half_life_steps if worse else self.half_life_steps / 5
            level += (1.0 - 0.5 ** (steps / half_life_steps)) * (seen.value - level)
            track = _follow_prompts(replace(track, baseline=level, baseline_weight=1.0), seen, steps, steps / self.half_life_steps)
        return self._remember(track, seen, variance)

    def _level(self, track: Track, seen: Observation) -> float:
        return track.baseline if track.baseline_weight else seen.value

    def _variance(self, track: Track, seen: Observation) -> float:
        """Of this step's mean, from what came before it."""
        single = max(track.variance or 0.0, 0.25 * seen.spread**2) if track.variance is not None else seen.spread**2
        own = 1.2 * max(single, 1e-4) / max(1.0, seen.num)
        return float(max(own, track.scatter or 0.0, self.floor**2))

    def _remember(self, track: Track, seen: Observation, variance: float) -> Track:
        scatter = track.scatter
        if track.last is not None:
            jump = min(9.0 * variance, (seen.value - track.last) ** 2 / 2)
            scatter = jump if scatter is None else SCATTER_MEMORY * scatter + (1 - SCATTER_MEMORY) * jump
        single = track.variance
        if seen.variance is not None:
            start = seen.spread**2 if single is None else single
            single = SCATTER_MEMORY * start + (1 - SCATTER_MEMORY) * seen.variance
        return replace(track, last=seen.value, scatter=scatter, variance=single)


def threshold_nats(false_alarm_steps: float, num_tests: int) -> float:
    """Evidence at which one of `num_tests` alarms together raise a false one in `false_alarm_steps` at most (on average)."""
    return math.log(max(2.0, false_alarm_steps) * max(1, num_tests))


def pressure_of(evidence: float, threshold: float) -> float:
    """0 up to the threshold, 1 from one and a half times of it on."""
    return min(1.0, max(0.0, (evidence - threshold) / (0.5 * threshold)))


def _prompts_moved(track: Track, seen: Observation) -> bool:
    """True as well where it is not known: a level that was learned on other prompts says little of these."""
    if seen.prompts is None or track.prompts is None:
        return True
    return track.moved_steps > 0 or abs(seen.prompts - track.prompts) > PROMPTS_MOVED_NATS


def _follow_prompts(track: Track, seen: Observation, steps: float, half_lives: float) -> Track:
    if seen.prompts is None or track.prompts is None:
        return replace(track, prompts=seen.prompts)
    beyond = seen.prompts - track.prompts
    moved_steps = MOVED_STEPS if abs(beyond) > PROMPTS_MOVED_NATS else max(0.0, track.moved_steps - steps)
    return replace(track, prompts=track.prompts + (1.0 - 0.5**half_lives) * beyond, moved_steps=moved_steps)


def _is_learned(track: Track) -> bool:
    return track.baseline_weight >= BASELINE_ROLLOUTS and track.baseline_steps >= BASELINE_STEPS


def _learn(track: Track, seen: Observation) -> Track:
    if _is_learned(track):
        return track
    weight = track.baseline_weight + seen.num
    baseline = track.baseline + (seen.num / weight) * (seen.value - track.baseline) if weight > 0 else track.baseline
    return replace(track, baseline=baseline, baseline_weight=weight, baseline_steps=track.baseline_steps + 1)


def _accumulate(logs: tuple[float, ...], gains: list[float], ceiling: float) -> tuple[float, ...]:
    gains = [min(MAX_STEP_NATS, max(-MAX_RELIEF_NATS, gain)) for gain in gains]
    if logs and len(logs) != len(gains):  # written by a version with other alternatives
        logs = (max(logs),) * len(gains)
    started = [float(np.logaddexp(0.0, log)) for log in logs] or [0.0] * len(gains)
    return tuple(min(ceiling, log + gain) for log, gain in zip(started, gains, strict=True))
