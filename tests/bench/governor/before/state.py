"""What the law remembers and what it says: State, Reading, Decision. Pure, and JSON bit for bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from opd_governor.actors.trajectory import LengthLimits
from tests.bench.governor.before.signals import Reference, Signals

Action = Literal["hold", "tighten", "release", "fallback", "rollback", "stop"]
Command = Literal["rollback", "stop"]
Side = Literal["long", "short"]


@dataclass(frozen=True, slots=True)
class State:
    """All that the law remembers.

    >>> State.from_json(State().to_json()) == State()
    True
    """

    pressure: float = 0.0
    side: Side = "long"
    """Which failure the pressure answers: inflation, or answers that are too short."""
    error: float = 0.0
    """Worst error of the last decision on fresh data, 0 when healthy."""
    healthy_steps: float = 0.0
    released_from: float | None = None
    """Pressure at which the release under way began; None: none under way."""
    resting_pressure: float = 0.0
    """Below this, pressure is released ten times more slowly: it relapsed there."""
    cap_tokens: int | None = None
    """The cap asked for: falls at once, rises in healthy stretches. None: not started."""
    base_cap_tokens: int | None = None
    """The job's own cap that `cap_tokens` was last set against."""
    tail_share: float = 0.0
    """This and the next three are averaged over about `window_rollouts`."""
    truncation_rate: float = 0.0
    loop_rate: float = 0.0
    cut_rate: float = 0.0
    """Share cut by any cap, the governor's own included: confirms inflation."""
    kl_nats: float | None = None
    """Averaged over about `kl_window_rollouts`; its running level is what it is compared with."""
    kl_level_nats: float | None = None
    density_level: float | None = None
    reference_mean_tokens: float | None = None
    reference_p99_tokens: float | None = None
    """The last reference seen: it steers while none is published."""
    seen: tuple[str, ...] = ()
    """Signals measured before; one of them missing is no sign of health."""
    saturated_steps: float = 0.0
    """Steps of high pressure with inflation confirmed."""
    cooldown_steps: float = 0.0
    """Steps left until another rollback may be decided."""
    rollbacks: int = 0
    limits: LengthLimits | None = None
    """In force."""

    @property
    def reference(self) -> Reference:
        return Reference(self.reference_mean_tokens, self.reference_p99_tokens)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"seen": list(self.seen)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "State":
        limits = LengthLimits(**values["limits"]) if values["limits"] else None
        return cls(**{**values, "seen": tuple(values["seen"]), "limits": limits})


@dataclass(frozen=True, slots=True)
class Reading:
    """One signal against its target. error = gain x excess, in [-1, 1]; None: not measured, or the signal is off."""

    value: float | None
    target: float
    error: float | None


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided at one step, on what, and why."""

    step: int
    mode: str
    action: Action
    """In mode observe: what would have been done."""
    signal: str
    """The worst signal, empty when none is over its target."""
    reason: str
    """One plain sentence."""
    healthy: bool
    """Fresh, complete data without an error: a checkpoint written now may be rolled back to."""
    readings: Mapping[str, Reading]
    signals: Signals
    before: State
    after: State
    proposed: LengthLimits
    """What the pressure asks for; in force in mode enforce only."""

    @property
    def limits(self) -> LengthLimits:
        """In force from the next step on."""
        assert self.after.limits is not None
        return self.after.limits

    @property
    def command(self) -> Command | None:
        """What the loop must do beside obeying the limits; always None outside mode enforce."""
        if self.mode != "enforce":
            return None
        return "rollback" if self.action == "rollback" else "stop" if self.action == "stop" else None

    def to_json(self) -> dict[str, Any]:
        """The record, one line of decisions.jsonl."""
        return {
            "step": self.step,
            "time_s": self.signals.time_s,
            "mode": self.mode,
            "action": self.action,
            "signal": self.signal,
            "reason": self.reason,
            "healthy": self.healthy,
            "pressure": self.after.pressure,
            "limits": asdict(self.limits),
            "proposed": asdict(self.proposed),
            "readings": {name: asdict(reading) for name, reading in self.readings.items()},
            "signals": self.signals.to_json(),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }
