"""The governor of one run of another trainer: steps in, limits out. The only file of this room that talks to the law.

StepSeen --> counters of that step against the reference (yardstick.py) --> Signals --> law.decide --> Answer
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from opd_governor.actors.governor.actuators import ACTUATORS
from opd_governor.actors.governor.law import decide, start
from opd_governor.actors.governor.limits import propose, settle
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import Signals, compute
from opd_governor.actors.governor.snapshot import Snapshot
from opd_governor.actors.governor.state import Decision, State
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.sidecar.seen import StepSeen
from opd_governor.services.sidecar.yardstick import ASSUMED_ROLLOUTS, Yardstick

UNKNOWN_CAP_TOKENS = 1_000_000
"""Stands for the cap of a trainer that does not tell it: such a cap is never moved."""
IGNORED_STEPS = 2
"""Steps in a row with an answer longer than the cap in force after which the trainer is said to ignore it."""


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
    reference: Yardstick = field(default_factory=Yardstick)
    last: Answer | None = field(default=None, init=False)
    decision: Decision | None = field(default=None, init=False)
    """Of the newest step, for the record."""
    _state: State | None = field(default=None, init=False)
    _ignored_steps: int = field(default=0, init=False)

    @property
    def limits(self) -> LengthLimits:
        """In force now."""
        return self._started().limits or self._base()

    def observe(
        self, seen: StepSeen, reference_lengths: Sequence[float] = (), news: str = "", reference_cut: Sequence[float] = ()
    ) -> Answer:
        """Decide on one more step. A step that brings nothing about length holds everything.

        `reference_lengths`: of the teacher's or golden answers, tokens; `reference_cut`: where those that did not end were cut.
        `news`: a change known beforehand.
        """
        if self.cap_tokens is None and seen.cap_tokens:
            self.cap_tokens, self._state = int(seen.cap_tokens), None
        policy, base = self._policy(), self._base()
        before = self._started()
        ignored = self._check_cap(seen, before)
        self.reference = self.reference.post(reference_lengths, reference_cut).learn(seen)
        signals = self._signals(seen, before, base)
        self._state, _, self.decision = decide(before, signals, policy, base, seen.step, news)
        if self._state.course == "push" and not policy.may_move("golden_weight"):
            self._keep_braking(before, policy, base)
        self.last = Answer(
            step=seen.step,
            pressure=self._state.pressure,
            limits=self.limits,
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
            "signals": {name: value for name, value in flat(decision.signals).items() if value is not None and name != "observations"},
            "reference": self.reference.source,
        }

    def state(self) -> dict[str, Any]:
        """All that `restore` needs, as JSON values."""
        law = self._started()
        return {
            "law": flat(law)
            | {"limits": law.limits and flat(law.limits), "tracks": {name: track.to_json() for name, track in law.tracks.items()}},
            "cap_tokens": self.cap_tokens,
            "reference": self.reference.to_json(),
            "ignored_steps": self._ignored_steps,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was taken."""
        self.cap_tokens = state["cap_tokens"]
        self._state = State.from_json(state["law"])
        self.reference = Yardstick.from_json(state["reference"])
        self._ignored_steps = state["ignored_steps"]

    def _policy(self) -> Policy:
        return self.policy if self.cap_tokens is not None else without(self.policy, "cap_tokens")

    def _base(self) -> LengthLimits:
        return LengthLimits(cap_tokens=self.cap_tokens or UNKNOWN_CAP_TOKENS)

    def _started(self) -> State:
        if self._state is None:
            self._state = start(self._policy(), self._base())
        return self._state

    def _keep_braking(self, before: State, policy: Policy, base: LengthLimits) -> None:
        """Pushing a student out of an inflation lets the brake go and counts on golden answers, which this trainer has not."""
        assert self._state is not None
        assert self.decision is not None
        self._state = settle(replace(self._state, course="brake"), before, policy, base, fresh=True)
        reason = f"{self.decision.reason}; no golden answers to push with here, so the brake stays"
        self.decision = replace(self.decision, after=self._state, proposed=propose(self._state, policy, base), reason=reason)

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
        """As if this step were all that a run of ours had counted."""
        told = seen.truncation is not None or seen.length_mean_tokens is not None or seen.length_max_tokens is not None
        number = (seen.num_rollouts or ASSUMED_ROLLOUTS) if told else 0.0
        cut = number * (seen.truncation or 0.0)
        applied = seen.cap_tokens or (before.limits.cap_tokens if before.limits else base.cap_tokens)
        by_governor = applied < base.cap_tokens and self._ignored_steps == 0
        counted: dict[str, float | None] = {
            "opd_learner_steps_total": 1.0,
            "opd_rollout_tokens_total": None if seen.length_mean_tokens is None else number * seen.length_mean_tokens,
            "opd_rollout_length_max_tokens": seen.length_max_tokens,
            "opd_rollout_loops_total": None if seen.loops is None else number * seen.loops,
            "opd_governor_cut_rollouts_total": cut if by_governor else 0.0,
            "opd_kl_nats_total": seen.kl_nats,
            "opd_kl_tokens_total": None if seen.kl_nats is None else 1.0,
            **self.reference.counts(seen, number, applied),
        }
        samples: list[tuple[str, Mapping[str, str], float]] = [(name, {}, value) for name, value in counted.items() if value is not None]
        samples += [
            ("opd_rollouts_total", {"finish_reason": "stop"}, number - cut),
            ("opd_rollouts_total", {"finish_reason": "length"}, cut),
        ]
        for stat, tokens in (("mean", self.reference.mean_tokens), ("p99", self.reference.p99_tokens)):
            if tokens is not None:
                samples.append(("opd_length_reference_tokens", {"stat": stat}, tokens))
        signals = replace(compute(Snapshot(), Snapshot.of(samples)), time_s=self.now_s(), length_p95_tokens=seen.length_p95_tokens)
        if seen.truncation is not None:
            return signals
        kept = {name: each for name, each in signals.observations.items() if name != "truncation"}
        return replace(signals, observations=kept, truncation_rate=None, stop_density_per_token=None)


def without(policy: Policy, *names: str) -> Policy:
    """The policy with these actuators left alone."""
    return policy.model_copy(update={"actuators": tuple(name for name in ACTUATORS if policy.may_move(name) and name not in names)})


def flat(record: Any) -> dict[str, Any]:
    """A dataclass's fields as they are: `asdict` copies every value, which costs more than the law."""
    return {name: getattr(record, name) for name in record.__dataclass_fields__}
