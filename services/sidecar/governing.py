"""The governor of one run of another trainer: steps in, limits out. The only file of this room that talks to the law.

StepSeen --> reference (posted, or the run's own first steps) --> Signals --> law.decide --> Answer
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np

from opd_governor.actors.governor.actuators import ACTUATORS
from opd_governor.actors.governor.evidence import Observation
from opd_governor.actors.governor.law import decide, start
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.reference import TAIL_MARGIN, TAIL_SHARE, LengthModel, fit_lengths
from opd_governor.actors.governor.reference import Answer as TeacherAnswer
from opd_governor.actors.governor.signals import KL_FLOOR_NATS, Signals
from opd_governor.actors.governor.state import Decision, State
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.sidecar.seen import StepSeen, quantile

BASELINE_STEPS = 8
"""Steps of a run without posted reference lengths whose own answers serve as its reference."""
BASELINE_TRUNCATION = 0.3
"""A step with more of its answers cut says nothing about how long answers ought to be."""
USUAL_ROLLOUTS = 32
"""A step's, where a trainer does not tell how many there were."""
USUAL_SPREAD_NATS = 0.6
"""Spread of log lengths, where only their mean is told."""
MAX_REFERENCES = 4096
"""Reference lengths kept; beyond it the oldest go."""
UNKNOWN_CAP_TOKENS = 1_000_000
"""Stands for the cap of a trainer that does not tell it: such a cap is never moved."""
IGNORED_STEPS = 2
"""Steps in a row with an answer longer than the cap in force after which the trainer is said to ignore it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """How long answers ought to be, tokens, and who says so."""

    posted: tuple[float, ...] = ()
    """Lengths of the teacher's or of golden answers."""
    baseline: tuple[float, ...] = ()
    """Lengths (or, where a trainer logs none, the longest one of each step) in the first steps."""
    baseline_means: tuple[float, ...] = ()
    """Mean length in each of those steps."""
    given_p99_tokens: float | None = None
    """Given outright: by the policy file, or by a trainer that posts the figure alone."""
    given_mean_tokens: float | None = None

    def learn(self, seen: StepSeen) -> "Reference":
        """With what this step adds."""
        if seen.reference_p99_tokens is not None:
            return replace(self, given_p99_tokens=seen.reference_p99_tokens, given_mean_tokens=seen.reference_mean_tokens)
        if self.posted or self.given_p99_tokens is not None or len(self.baseline_means) >= BASELINE_STEPS:
            return self
        mean, longest = seen.length_mean_tokens, seen.length_max_tokens
        if mean is None or longest is None or (seen.truncation or 0.0) > BASELINE_TRUNCATION:
            return self
        lengths = tuple(map(float, seen.lengths)) or (longest,)
        return replace(self, baseline=(*self.baseline, *lengths)[-MAX_REFERENCES:], baseline_means=(*self.baseline_means, mean))

    def post(self, lengths: Sequence[float]) -> "Reference":
        return replace(self, posted=(*self.posted, *map(float, lengths))[-MAX_REFERENCES:]) if lengths else self

    @property
    def mean_tokens(self) -> float | None:
        if self.posted:
            return sum(self.posted) / len(self.posted)
        if self.given_p99_tokens is not None:
            return self.given_mean_tokens
        return sum(self.baseline_means) / len(self.baseline_means) if len(self.baseline_means) >= BASELINE_STEPS else None

    @property
    def p99_tokens(self) -> float | None:
        if self.posted:
            return quantile(sorted(self.posted), 0.99)
        if self.given_p99_tokens is not None:
            return self.given_p99_tokens
        # A tenth more: a few hundred answers seldom hold the longest one of a hundred thousand.
        return 1.1 * quantile(sorted(self.baseline), 0.99) if len(self.baseline_means) >= BASELINE_STEPS else None

    @property
    def model(self) -> LengthModel | None:
        """Lengths as one distribution: an outside run does not tell which prompt an answer belongs to."""
        whole = self.posted or (self.baseline if len(self.baseline_means) >= BASELINE_STEPS else ())
        return fit_lengths([TeacherAnswer(index, 1, "", int(length), True) for index, length in enumerate(whole)]) if whole else None

    @property
    def words(self) -> str:
        if self.posted:
            return f"{len(self.posted)} posted reference lengths"
        if self.given_p99_tokens is not None:
            return "the reference length that was given"
        held = len(self.baseline_means)
        return f"the run's own first {BASELINE_STEPS} steps" if held >= BASELINE_STEPS else f"none yet ({held} of {BASELINE_STEPS} steps)"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a trainer is told after a step."""

    step: int
    pressure: float
    limits: LengthLimits
    cap_known: bool
    action: str
    signal: str
    reason: str
    healthy: bool
    reference: str
    ignored: str | None
    """What the trainer was told and did not do; None: nothing of the kind seen."""

    def to_json(self) -> dict[str, Any]:
        limits = asdict(self.limits)
        if not self.cap_known:
            limits["cap_tokens"] = None
        kept = {name: getattr(self, name) for name in ("step", "pressure", "action", "signal", "reason", "healthy", "reference", "ignored")}
        return kept | {"limits": limits}


@dataclass
class OutsideGovernor:
    """Decides after each step of a run that is not ours. Equal steps give equal answers.

    >>> governor = OutsideGovernor(Policy(), cap_tokens=512)
    >>> governor.observe(StepSeen.of_completions(1, [40, 55, 61], ["stop"] * 3)).limits.cap_tokens
    512
    """

    policy: Policy = field(default_factory=Policy)
    cap_tokens: int | None = None
    """The trainer's own cap: holds at zero pressure, never exceeded. None: taken from what it posts."""
    now_s: Callable[[], float] = time.time
    reference: Reference = field(default_factory=Reference)
    last: Answer | None = field(default=None, init=False)
    decision: Decision | None = field(default=None, init=False)
    """Of the newest step, for the record."""
    _state: State | None = field(default=None, init=False)
    _ignored_steps: int = field(default=0, init=False)

    @property
    def limits(self) -> LengthLimits:
        """In force now."""
        return self._started().limits or self._base()

    def observe(self, seen: StepSeen, reference_lengths: Sequence[float] = ()) -> Answer:
        """Decide on one more step. A step that brings nothing about length holds everything."""
        if self.cap_tokens is None and seen.cap_tokens:
            self.cap_tokens, self._state = int(seen.cap_tokens), None
        policy, base = self._policy(), self._base()
        before = self._started()
        ignored = self._check_cap(seen, before)
        self.reference = self.reference.post(reference_lengths).learn(seen)
        signals = self._signals(seen, before, base)
        self._state, limits, self.decision = decide(before, signals, policy, base, seen.step)
        self.last = Answer(
            step=seen.step,
            pressure=self._state.pressure,
            limits=limits,
            cap_known=self.cap_tokens is not None,
            action=self.decision.action,
            signal=self.decision.signal,
            reason=self.decision.reason,
            healthy=self.decision.healthy,
            reference=self.reference.words,
            ignored=ignored,
        )
        return self.last

    def record(self) -> dict[str, Any]:
        """The newest decision, one line of decisions.jsonl: what our own runs write, without the law's memory before and after."""
        decision = self.decision
        assert decision is not None
        return {
            "step": decision.step,
            "time_s": decision.signals.time_s,
            "mode": decision.mode,
            "action": decision.action,
            "signal": decision.signal,
            "reason": decision.reason,
            "healthy": decision.healthy,
            "pressure": decision.after.pressure,
            "limits": asdict(decision.limits),
            "proposed": asdict(decision.proposed),
            "readings": {name: asdict(reading) for name, reading in decision.readings.items()},
            "signals": {name: value for name, value in decision.signals.to_json().items() if value is not None},
            "reference": self.reference.words,
        }

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values."""
        return {
            "law": self._started().to_json(),
            "cap_tokens": self.cap_tokens,
            "reference": {each.name: getattr(self.reference, each.name) for each in fields(self.reference)},
            "ignored_steps": self._ignored_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.cap_tokens = state["cap_tokens"]
        self._state = State.from_json(state["law"])
        held: dict[str, Any] = state["reference"]
        self.reference = Reference(**held | {name: tuple(held[name]) for name in ("posted", "baseline", "baseline_means")})
        self._ignored_steps = state["ignored_steps"]

    def _policy(self) -> Policy:
        if self.cap_tokens is not None or not self.policy.may_move("cap_tokens"):
            return self.policy
        movable = tuple(name for name in ACTUATORS if self.policy.may_move(name) and name != "cap_tokens")
        return self.policy.model_copy(update={"actuators": movable})

    def _base(self) -> LengthLimits:
        return LengthLimits(cap_tokens=self.cap_tokens or UNKNOWN_CAP_TOKENS)

    def _started(self) -> State:
        if self._state is None:
            self._state = start(self._policy(), self._base())
        return self._state

    def _check_cap(self, seen: StepSeen, before: State) -> str | None:
        """Whether the trainer keeps to the cap it was given."""
        held = before.limits.cap_tokens if before.limits else None
        told = self.cap_tokens is not None and held is not None and held < self.cap_tokens
        longer = told and seen.length_max_tokens is not None and held is not None and seen.length_max_tokens > held
        self._ignored_steps = self._ignored_steps + 1 if longer else 0
        if self._ignored_steps < IGNORED_STEPS:
            return None
        return f"the cap: told {held} tokens, answers of {seen.length_max_tokens:.0f} for {self._ignored_steps} steps"

    def _signals(self, seen: StepSeen, before: State, base: LengthLimits) -> Signals:
        cut = seen.truncation
        applied = seen.cap_tokens or (before.limits.cap_tokens if before.limits else base.cap_tokens)
        by_governor = cut is not None and applied < base.cap_tokens and self._ignored_steps == 0
        mean = seen.length_mean_tokens
        has_length = cut is not None or mean is not None or seen.length_max_tokens is not None
        observed = self._observations(seen, int(applied), 0.0 if by_governor else cut)
        return Signals(
            time_s=self.now_s(),
            steps_spanned=1.0,
            num_rollouts=(seen.num_rollouts or USUAL_ROLLOUTS) if has_length else 0.0,
            observations=observed,
            length_mean_tokens=mean,
            length_p95_tokens=seen.length_p95_tokens,
            length_max_tokens=seen.length_max_tokens,
            reference_mean_tokens=self.reference.mean_tokens,
            reference_p99_tokens=self.reference.p99_tokens,
            truncation_rate=0.0 if by_governor else cut,
            governor_cut_rate=(cut or 0.0) if by_governor else 0.0,
            expected_cut_rate=observed["tail"].expected if "tail" in observed else None,
            loop_rate=seen.loops,
            kl_nats=seen.kl_nats,
            stop_density_per_token=None if cut is None or not mean else (1.0 - cut) / mean,
        )

    def _observations(self, seen: StepSeen, cap_tokens: int, truncation: float | None) -> dict[str, Observation]:
        """What the law's tests read: from the lengths themselves where they are told, otherwise from their summary."""
        num, model = float(seen.num_rollouts or USUAL_ROLLOUTS), self.reference.model
        found: dict[str, Observation] = {}
        if seen.lengths and model is not None:
            found |= _of_lengths(seen, cap_tokens, model)
        elif seen.length_mean_tokens and self.reference.mean_tokens:
            spread = USUAL_SPREAD_NATS if model is None else model.spread_nats
            excess = Observation(math.log(seen.length_mean_tokens / self.reference.mean_tokens), num, spread=spread)
            found |= {"length": excess, "short": excess}
        if "tail" not in found and (p99 := self.reference.p99_tokens) is not None:
            share = _tail_share(seen, TAIL_MARGIN * p99)
            found |= {} if share is None else {"tail": Observation(share, num, TAIL_SHARE)}
        if "tail" not in found and truncation is not None:
            found["truncation"] = Observation(truncation, num)
        if seen.loops is not None:
            found["loops"] = Observation(seen.loops, num)
        if seen.kl_nats is not None:
            found["kl"] = Observation(math.log(max(KL_FLOOR_NATS, seen.kl_nats)), 1.0)
        return found


def _of_lengths(seen: StepSeen, cap_tokens: int, model: LengthModel) -> dict[str, Observation]:
    tokens_N = np.array(seen.lengths)
    cut_N = (tokens_N >= cap_tokens) & bool(seen.truncation)
    found = model.measure(tokens_N, np.full(len(tokens_N), cap_tokens), cut_N, np.full(len(tokens_N), model.mu(-1, 1, "")))
    num = float(len(tokens_N))
    variance = float(found.nats_N.var()) if num > 1 else None
    excess = Observation(float(found.nats_N.mean()), num, spread=model.spread_nats, variance=variance)
    tail = Observation(float(found.in_tail_N.mean()), num, float(found.tail_probability_N.mean()))
    return {"length": excess, "short": excess, "tail": tail}


def _tail_share(seen: StepSeen, threshold_tokens: float) -> float | None:
    """Share of answers longer than the threshold, at least: where lengths are not told, what their summary proves.

    A cut answer would have gone on, so it counts where the threshold lies at or above the longest answer seen.
    """
    if seen.lengths:
        share = sum(length > threshold_tokens for length in seen.lengths) / len(seen.lengths)
        return max(share, (seen.truncation or 0.0) if max(seen.lengths) <= threshold_tokens else 0.0)
    longest = seen.length_max_tokens
    if longest is None:
        return None
    if longest <= threshold_tokens:
        return seen.truncation or 0.0
    proven = 1.0 / seen.num_rollouts if seen.num_rollouts else 0.0
    if seen.length_p95_tokens is not None and seen.length_p95_tokens > threshold_tokens:
        proven = max(proven, 0.05)
    return max(proven, seen.truncation or 0.0)


def flat(record: Any) -> dict[str, Any]:
    """A dataclass's fields as they are: `asdict` copies every value, which costs more than the law."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
