"""The governor of one run of another trainer: steps in, limits out. The only file of this room that talks to the law.

StepSeen --> reference (posted, or the run's own first steps) --> Signals --> law.decide --> Answer
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_governor.actors.governor.law import decide, start
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import Signals
from opd_governor.actors.governor.state import Decision, State
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.sidecar.seen import StepSeen, quantile

BASELINE_STEPS = 8
"""Steps of a run without posted reference lengths whose own answers serve as its reference."""
BASELINE_TRUNCATION = 0.3
"""A step with more of its answers cut says nothing about how long answers ought to be."""
BASELINE_MARGIN = 1.1
"""A few hundred answers seldom hold the longest one of a hundred thousand."""
MAX_REFERENCES = 1024
"""Reference lengths kept; beyond it the oldest go."""
UNKNOWN_CAP_TOKENS = 1_000_000
"""Stands for the cap of a trainer that does not tell it: such a cap is never moved."""
IGNORED_STEPS = 2
"""Steps in a row with an answer longer than the cap in force after which the trainer is said to ignore it."""


@dataclass(frozen=True, slots=True)
class Reference:
    """How long answers ought to be, tokens, and who says so."""

    mean_tokens: float | None = None
    p99_tokens: float | None = None
    """None: nobody has said yet."""
    source: str = "none yet"
    posted: tuple[float, ...] = ()
    """Lengths of the teacher's or of golden answers."""
    baseline: tuple[float, ...] = ()
    """Lengths (or, where a trainer logs none, the longest one of each step) in the first steps, until they are enough."""
    baseline_means: tuple[float, ...] = ()
    """Mean length in each of those steps."""

    def learn(self, seen: StepSeen) -> "Reference":
        """With what this step adds."""
        if seen.reference_p99_tokens is not None:
            return Reference(seen.reference_mean_tokens, seen.reference_p99_tokens, "the reference length that was given")
        if self.p99_tokens is not None:
            return self
        mean, longest = seen.length_mean_tokens, seen.length_max_tokens
        if mean is None or longest is None or (seen.truncation or 0.0) > BASELINE_TRUNCATION:
            return self
        baseline = (*self.baseline, *(seen.lengths or (longest,)))[-MAX_REFERENCES:]
        means = (*self.baseline_means, mean)
        if len(means) < BASELINE_STEPS:
            return replace(self, source=f"none yet ({len(means)} of {BASELINE_STEPS} steps)", baseline=baseline, baseline_means=means)
        p99 = BASELINE_MARGIN * quantile(sorted(baseline), 0.99)
        return Reference(sum(means) / len(means), p99, f"the run's own first {BASELINE_STEPS} steps")

    def post(self, lengths: Sequence[float]) -> "Reference":
        """With reference lengths that the trainer sent beside a step."""
        if not lengths:
            return self
        posted = (*self.posted, *lengths)[-MAX_REFERENCES:]
        return Reference(sum(posted) / len(posted), quantile(sorted(posted), 0.99), f"{len(posted)} posted reference lengths", posted)


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
        limits = flat(self.limits)
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
        signals = self._signals(seen, before, base, policy)
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
            reference=self.reference.source,
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
            "limits": flat(decision.limits),
            "proposed": flat(decision.proposed),
            "readings": {name: flat(reading) for name, reading in decision.readings.items()},
            "signals": {name: value for name, value in flat(decision.signals).items() if value is not None},
            "reference": self.reference.source,
        }

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values."""
        law = self._started()
        return {
            "law": flat(law) | {"limits": law.limits and flat(law.limits)},
            "cap_tokens": self.cap_tokens,
            "reference": flat(self.reference),
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
        if self.cap_tokens is not None or "cap_tokens" not in self.policy.actuators:
            return self.policy
        return self.policy.model_copy(update={"actuators": tuple(name for name in self.policy.actuators if name != "cap_tokens")})

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

    def _signals(self, seen: StepSeen, before: State, base: LengthLimits, policy: Policy) -> Signals:
        cut = seen.truncation
        applied = seen.cap_tokens or (before.limits.cap_tokens if before.limits else base.cap_tokens)
        by_governor = cut is not None and applied < base.cap_tokens and self._ignored_steps == 0
        mean = seen.length_mean_tokens
        p99 = self.reference.p99_tokens
        has_length = cut is not None or mean is not None or seen.length_max_tokens is not None
        return Signals(
            time_s=self.now_s(),
            steps_spanned=1.0,
            num_rollouts=(seen.num_rollouts or policy.window_rollouts) if has_length else 0.0,
            tail_share=None if p99 is None else _tail_share(seen, policy.tail_multiple * p99),
            length_mean_tokens=mean,
            length_p95_tokens=seen.length_p95_tokens,
            length_max_tokens=seen.length_max_tokens,
            reference_mean_tokens=self.reference.mean_tokens,
            reference_p99_tokens=p99,
            truncation_rate=0.0 if by_governor else cut,
            governor_cut_rate=(cut or 0.0) if by_governor else 0.0,
            loop_rate=seen.loops,
            kl_nats=seen.kl_nats,
            stop_density_per_token=None if cut is None or not mean else (1.0 - cut) / mean,
        )


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
