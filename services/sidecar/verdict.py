"""Is a run's length sick, since when, how sure, and what to try first. Pure: steps in, a Diagnosis out.

The commonest sick log comes first: answers cut from the first step on (the cap is too low, or the model never stops). Only a run
that began well can inflate, lock at its cap, loop, or shrink.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from opd_governor.actors.governor.policy import Policy
from opd_governor.services.sidecar.advice import ADVICE, Advice
from opd_governor.services.sidecar.governing import OutsideGovernor
from opd_governor.services.sidecar.seen import NUMBERS, StepSeen

Kind = Literal["cap_too_low", "never_stops", "truncated_from_start", "inflating", "collapsed", "looping", "shrinking", "healthy", "unknown"]
SICK = frozenset({"cap_too_low", "never_stops", "truncated_from_start", "inflating", "collapsed", "looping", "shrinking"})
HEADLINES: dict[Kind, str] = {
    "cap_too_low": "answers are cut from the first step on: the cap is too low for this model",
    "never_stops": "answers are cut from the first step on: most of them never stop by themselves",
    "truncated_from_start": "answers are cut from the first step on: the cap is too low, or the model never stops",
    "inflating": "answers inflate",
    "collapsed": "answers have inflated up to the cap: the run has collapsed in length",
    "looping": "answers end in loops",
    "shrinking": "answers collapse to very short ones",
    "healthy": "length is healthy",
    "unknown": "too few steps to judge",
}
MIN_STEPS = 4
START_TRUNCATION = 0.25
"""A run with more of its answers cut in its first steps was truncated from the start."""
FITS_TRUNCATION = 0.1
"""Up to this share of cut answers a cap fits."""
LOCKED_TRUNCATION = 0.5
NEVER_ENDS_TRUNCATION = 0.97
ENDED_LONG = 0.45
"""Answers that end by themselves at more than this share of the cap need more room; if they end earlier, room is not what the rest lack."""
SICK_LOOPS = 0.1
GROWTH = 1.6
"""Mean length over its level in the first steps from which on growth without truncation counts."""
SHRUNK = 0.4
AT_CAP = 0.995
"""A mean at this share of the cap is the cap: every answer was cut."""
SURE_Z, FAIRLY_SURE_Z = 6.0, 3.0


MAX_REPLAYED = 2000
"""Steps given to the law: about a second of work."""


@dataclass(frozen=True, slots=True)
class WouldAct:
    """The governor's first action on these steps, had it watched."""

    step: int
    signal: str
    reason: str
    reference: str
    steps_before: int | None
    """Before the trouble this diagnosis dates; None: nothing dated. Negative: after."""


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What is to be said about one run."""

    kind: Kind
    since_step: int | None
    sure: Literal["sure", "fairly sure", "not sure"]
    sentence: str
    evidence: tuple[str, ...]
    advice: tuple[Advice, ...]
    unknown: tuple[str, ...]
    """What this log cannot tell."""
    governor: WouldAct | None
    num_steps: int
    first_step: int | None
    last_step: int | None
    cap_tokens: float | None

    @property
    def sick(self) -> bool:
        return self.kind in SICK

    def to_json(self) -> dict[str, Any]:
        return {"sick": self.sick} | asdict(self)


@dataclass(frozen=True, slots=True)
class _Series:
    """One figure over its steps, and a running median of it that a single odd step does not move. [N] each."""

    steps: np.ndarray
    values: np.ndarray
    smooth: np.ndarray

    @classmethod
    def of(cls, steps: Sequence[StepSeen], name: str) -> "_Series":
        held = [(seen.step, value) for seen in steps if (value := getattr(seen, name)) is not None]
        values = np.array([value for _, value in held], dtype=float)
        return cls(np.array([step for step, _ in held]), values, _running_median(values))

    def __bool__(self) -> bool:
        return len(self.values) > 0

    @property
    def edge(self) -> int:
        """Steps at either end that stand for `start` and `end`."""
        return min(len(self.values), max(3, min(20, len(self.values) // 10)))

    @property
    def start(self) -> float:
        return float(np.median(self.values[: self.edge]))

    @property
    def end(self) -> float:
        return float(np.median(self.values[-self.edge :]))

    @property
    def peak(self) -> float:
        return float(self.smooth.max())

    @property
    def noise(self) -> float:
        """Robust scatter from one step to the next."""
        if len(self.values) < 3:
            return 0.0
        return float(1.4826 * np.median(np.abs(np.diff(self.values))) / np.sqrt(2))

    def z(self, change: float) -> float:
        """A change between start and end in units of what scatter alone makes."""
        scale = max(self.noise, 1e-3 * max(1e-9, float(np.abs(self.values).max()))) * np.sqrt(2 / max(1, self.edge))
        return abs(change) / scale

    def since(self, share: float = 0.25, down: bool = False) -> int:
        """Step from which the running median stays beyond `share` of the way from its start to its extreme."""
        smooth = -self.smooth if down else self.smooth
        start = -self.start if down else self.start
        top = int(smooth.argmax())
        line = start + share * (smooth[top] - start)
        below = np.flatnonzero(smooth[: top + 1] < line)
        return int(self.steps[below[-1] + 1 if len(below) and below[-1] < top else 0 if not len(below) else top])


def _running_median(values: np.ndarray) -> np.ndarray:
    width = 2 * min(7, max(1, len(values) // 30)) + 1
    if len(values) < width:
        return values
    padded = np.pad(values, width // 2, mode="edge")
    return np.median(np.lib.stride_tricks.sliding_window_view(padded, width), axis=-1)


def with_truncation(steps: Sequence[StepSeen], padded_clip_ratio: bool = False) -> tuple[list[StepSeen], float | None]:
    """The steps with truncation derived or corrected where lengths prove it, and the cap: logged, or inferred from lengths."""
    cap = _cap(steps, padded_clip_ratio)
    return [_with_truncation(seen, seen.cap_tokens or cap, padded_clip_ratio) for seen in steps], cap


def _cap(steps: Sequence[StepSeen], padded_clip_ratio: bool) -> float | None:
    """The logged cap; else a longest answer that many steps share; else a mean that stands at its highest value in many steps."""
    if caps := [seen.cap_tokens for seen in steps if seen.cap_tokens]:
        return max(caps)
    longest = [seen.length_max_tokens for seen in steps if seen.length_max_tokens]
    if longest:
        top = max(longest)
        held = sum(value == top for value in longest)
        cut = any(seen.truncation and seen.length_max_tokens == top for seen in steps)
        return top if held >= max(3, len(longest) // 10) or (cut and not padded_clip_ratio) else None
    means = [seen.length_mean_tokens for seen in steps if seen.length_mean_tokens]
    if len(means) < MIN_STEPS:
        return None
    top = max(means)
    return top if sum(value >= AT_CAP * top for value in means) >= 0.3 * len(means) and top == round(top) else None


def _with_truncation(seen: StepSeen, cap: float | None, padded_clip_ratio: bool) -> StepSeen:
    cut, mean, longest = seen.truncation, seen.length_mean_tokens, seen.length_max_tokens
    if padded_clip_ratio and cut is not None and longest is not None:
        derived = cut if cap is not None and longest >= cap else 0.0
    elif cut is not None or cap is None:
        return seen
    elif longest is not None and longest < cap:
        derived = 0.0
    elif mean is not None and mean >= AT_CAP * cap:
        derived = 1.0
    else:
        return seen
    return replace(seen, truncation=derived, truncation_trust="derived")


def diagnose(steps: Sequence[StepSeen], *, padded_clip_ratio: bool = False, notes: Sequence[str] = ()) -> Diagnosis:
    """`steps` in rising order; `notes`: what this trainer's figures cannot tell."""
    steps, cap = with_truncation(steps, padded_clip_ratio)
    series = {name: _Series.of(steps, name) for name in NUMBERS}
    finding = _judge(series, cap)
    would = _governor(steps, cap, finding.since)
    return Diagnosis(
        kind=finding.kind,
        since_step=finding.since,
        sure=finding.sure(series),
        sentence=_sentence(finding),
        evidence=tuple(finding.evidence),
        advice=ADVICE[finding.kind],
        unknown=(*_unknown(series, cap), *notes),
        governor=would,
        num_steps=len(steps),
        first_step=steps[0].step if steps else None,
        last_step=steps[-1].step if steps else None,
        cap_tokens=cap,
    )


@dataclass(frozen=True, slots=True)
class _Finding:
    kind: Kind
    since: int | None
    evidence: list[str]
    on: str = ""
    """The series the verdict rests on."""
    change: float = 0.0
    doubt: bool = False

    def sure(self, series: dict[str, _Series]) -> Literal["sure", "fairly sure", "not sure"]:
        if self.kind == "unknown" or self.doubt or self.on not in series or len(series[self.on].values) < 8:
            return "not sure"
        z = series[self.on].z(self.change) if self.change else SURE_Z
        return "sure" if z >= SURE_Z and len(series[self.on].values) >= 16 else "fairly sure" if z >= FAIRLY_SURE_Z else "not sure"


def _judge(series: dict[str, _Series], cap: float | None) -> _Finding:
    cut, mean, loops = series["truncation"], series["length_mean_tokens"], series["loops"]
    length = mean or series["length_p95_tokens"] or series["length_max_tokens"]
    if max(len(cut.values), len(length.values)) < MIN_STEPS:
        return _Finding("unknown", None, [f"{max(len(cut.values), len(length.values))} steps with lengths; {MIN_STEPS} are needed"])
    facts = _facts(series, cap)
    if cut and cut.start >= START_TRUNCATION and not (cut.start < LOCKED_TRUNCATION and cut.end - cut.start >= 0.25):
        return _from_start(series, cap, facts)
    if cut and (found := _rising(cut, loops, facts)) is not None:
        return found
    if loops and max(loops.end, loops.peak if loops.end >= SICK_LOOPS / 2 else 0.0) >= SICK_LOOPS:
        since = None if loops.start >= SICK_LOOPS else loops.since()
        return _Finding("looping", since, [f"loops {loops.start:.0%} -> {loops.end:.0%} of answers", *facts], "loops", loops.end)
    return _by_length(series, length, cut, facts)


def _from_start(series: dict[str, _Series], cap: float | None, facts: list[str]) -> _Finding:
    cut, loops = series["truncation"], series["loops"]
    if cut.end < FITS_TRUNCATION:
        evidence = [f"truncation fell from {cut.start:.0%} to {cut.end:.0%}: the model has learned to end inside the cap", *facts]
        return _Finding("healthy", None, evidence, "truncation", cut.start - cut.end)
    if (relapse := _relapse(cut, facts)) is not None:
        return relapse
    if cut.end < START_TRUNCATION and cut.end <= cut.start / 2:
        evidence = [f"truncation fell from {cut.start:.0%} to {cut.end:.0%}: watch that it falls on", *facts]
        return _Finding("healthy", None, evidence, "truncation", doubt=True)
    first = int(cut.steps[0])
    evidence = [f"truncation is {cut.start:.0%} in the first {cut.edge} steps and {cut.end:.0%} in the last", *facts]
    if loops and loops.start >= 0.3:
        return _Finding("never_stops", first, [f"{loops.start:.0%} of answers end in a loop from the start", *evidence], "truncation")
    ended = _ended_mean(series, cap)
    if cut.start >= NEVER_ENDS_TRUNCATION or ended is None or cap is None:
        why = "almost no answer ends, so nobody can see how long answers would be" if cut.start >= NEVER_ENDS_TRUNCATION else ""
        return _Finding("truncated_from_start", first, [*([why] if why else []), *evidence], "truncation")
    share = ended / cap
    told = f"answers that end take {ended:.0f} tokens, {share:.0%} of the cap of {cap:.0f}"
    if share >= ENDED_LONG:
        return _Finding("cap_too_low", first, [f"{told}: the rest need more room", *evidence], "truncation")
    return _Finding("never_stops", first, [f"{told}: room is not what the others lack", *evidence], "truncation")


def _relapse(cut: _Series, facts: list[str]) -> _Finding | None:
    """A run that began cut, learned to end its answers, and lost it again."""
    low = int(cut.smooth.argmin())
    after = cut.smooth[low:]
    if cut.smooth[low] >= START_TRUNCATION or cut.end < LOCKED_TRUNCATION:
        return None
    line = cut.smooth[low] + 0.25 * (float(after.max()) - cut.smooth[low])
    since = int(cut.steps[low + int(np.flatnonzero(after >= line)[0])])
    told = f"truncation {cut.start:.0%} at first, {cut.smooth[low]:.0%} at step {int(cut.steps[low])}, {cut.end:.0%} in the last steps"
    return _Finding("collapsed", since, [told, *facts], "truncation", cut.end - float(cut.smooth[low]))


def _ended_mean(series: dict[str, _Series], cap: float | None) -> float | None:
    """Mean length of the answers that ended in the first steps: logged, or the mean without those at the cap."""
    ended, mean, cut = series["terminated_mean_tokens"], series["length_mean_tokens"], series["truncation"]
    if ended:
        return ended.start
    if mean and cap is not None and cut.start < NEVER_ENDS_TRUNCATION:
        value = (mean.start - cut.start * cap) / (1.0 - cut.start)
        return value if value > 0 else None
    return None


def _rising(cut: _Series, loops: _Series, facts: list[str]) -> _Finding | None:
    rise = cut.peak - cut.start
    now = cut.end - cut.start
    if cut.peak < FITS_TRUNCATION or rise < max(0.05, 2 * cut.noise / np.sqrt(cut.edge)):
        return None
    since = cut.since()
    looping = [f"loops {loops.start:.0%} -> {loops.end:.0%} of answers"] if loops and loops.peak >= SICK_LOOPS else []
    told = f"truncation {cut.start:.0%} -> {cut.end:.0%}, highest {cut.peak:.0%} at step {int(cut.steps[int(cut.smooth.argmax())])}"
    if cut.end >= LOCKED_TRUNCATION:
        return _Finding("collapsed", since, [told, *looping, *facts], "truncation", now)
    if cut.end >= FITS_TRUNCATION and now >= 0.05:
        return _Finding("inflating", since, [told, *looping, *facts], "truncation", now)
    if cut.peak >= START_TRUNCATION:
        note = "it came back by itself; such an early spike returned in 40 of 46 runs of one published campaign"
        return _Finding("inflating", since, [told, note, *looping, *facts], "truncation", rise, doubt=True)
    return None


def _by_length(series: dict[str, _Series], length: _Series, cut: _Series, facts: list[str]) -> _Finding:
    reward = series["reward"]
    better = bool(reward) and reward.end - reward.start > max(0.02 * abs(reward.start), 2 * reward.noise / np.sqrt(reward.edge))
    if not length or length.start <= 0:
        return _Finding("healthy", None, facts, "truncation")
    ratio = length.end / length.start
    significant = length.z(length.end - length.start) >= FAIRLY_SURE_Z
    told = f"length {length.start:.0f} -> {length.end:.0f} tokens ({ratio:.2g} times)"
    change = length.end - length.start
    name = next(name for name, held in series.items() if held is length)
    if ratio >= GROWTH and significant:
        if better:
            note = f"{told} while the reward rises ({reward.start:.3g} -> {reward.end:.3g}): longer answers pay here; watch truncation"
            return _Finding("healthy", None, [note, *facts], name, doubt=True)
        return _Finding("inflating", length.since(), [told, *facts], name, change, doubt=not cut or ratio < 2)
    if ratio <= SHRUNK and significant:
        if better:
            note = f"{told} while the reward rises ({reward.start:.3g} -> {reward.end:.3g}): the model has become concise"
            return _Finding("healthy", None, [note, *facts], name, doubt=True)
        return _Finding("shrinking", length.since(down=True), [told, *facts], name, change, doubt=not reward)
    longest = series["length_max_tokens"]
    if longest and longest.end >= 2 * longest.start > 0:
        facts = [f"watch: the longest answer of a step has gone from {longest.start:.0f} to {longest.end:.0f} tokens", *facts]
    return _Finding("healthy", None, [told, *facts], name)


def _facts(series: dict[str, _Series], cap: float | None) -> list[str]:
    facts = []
    if cap is not None:
        facts.append(f"cap {cap:.0f} tokens")
    mean, kl, reward = series["length_mean_tokens"], series["kl_nats"], series["reward"]
    if mean:
        facts.append(f"mean length {mean.start:.0f} -> {mean.end:.0f} tokens")
    if kl:
        facts.append(f"KL {kl.start:.3g} -> {kl.end:.3g} nats (a low KL is no sign of health: loops are easy to agree on)")
    if reward:
        facts.append(f"reward {reward.start:.3g} -> {reward.end:.3g}")
    return facts


def _unknown(series: dict[str, _Series], cap: float | None) -> list[str]:
    told = []
    if not series["truncation"]:
        told.append("whether answers are cut: no truncation is logged, and no cap can be inferred")
    elif cap is None:
        told.append("the cap: it is not logged and no longest answer gives it away")
    if not series["length_mean_tokens"]:
        told.append("how long answers are: only their truncation is logged" if series["truncation"] else "the mean length")
    if not series["loops"]:
        told.append("whether long answers end in loops: no trainer's plain figures say so; look at a few texts")
    if not series["reward"]:
        told.append("whether answers got better or worse: no reward or accuracy is logged")
    return told


def _governor(steps: Sequence[StepSeen], cap: float | None, since: int | None) -> WouldAct | None:
    """The law over these steps, open loop: its first rise of pressure."""
    policy = Policy(mode="observe")
    governor = OutsideGovernor(policy, cap_tokens=None if cap is None else int(cap), now_s=lambda: 0.0)
    for seen in steps[:MAX_REPLAYED]:
        answer = governor.observe(seen)
        if answer.action in ("tighten", "rollback", "stop"):
            before = None if since is None else since - seen.step
            return WouldAct(seen.step, answer.signal, answer.reason, answer.reference, before)
    return None


def _sentence(finding: _Finding) -> str:
    head = HEADLINES[finding.kind]
    started = finding.since is not None and finding.kind not in ("cap_too_low", "never_stops", "truncated_from_start")
    return f"{head}, since step {finding.since}" if started else head
