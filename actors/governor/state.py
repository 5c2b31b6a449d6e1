"""What the law remembers and what it says: State, Reading, Decision. Pure, and JSON bit for bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from opd_governor.actors.governor.evidence import Track, known
from opd_governor.actors.governor.signals import Disease, Signals
from opd_governor.actors.trajectory import LengthLimits

Action = Literal["hold", "tighten", "release", "fallback", "rollback", "stop"]
Command = Literal["rollback", "stop"]
Course = Literal["prevent", "push", "brake"]
"""prevent: before an onset, and after a rollback, limits follow pressure. Where an inflation cannot be rolled back, push: full golden rate,
tilt, short cap and no brake, so that the student learns its way out; or brake: what pressure asks for, where pushing did not help."""


def together(*shares: float) -> float:
    """What several say together: more than each alone, never more than 1."""
    rest = 1.0
    for share in shares:
        rest *= 1.0 - share
    return 1.0 - rest


@dataclass(frozen=True, slots=True)
class State:
    """All that the law remembers.

    >>> State.from_json(State().to_json()) == State()
    True
    """

    tracks: Mapping[str, Track] = field(default_factory=dict)
    """Signal -> its test's memory."""
    pressure_long: float = 0.0
    """Of evidence that answers are too long; the next two: too short, and that the student leaves its teacher."""
    pressure_short: float = 0.0
    pressure_drift: float = 0.0
    healthy_steps: float = 0.0
    """Since any signal was over its threshold."""
    patience_steps: float = 0.0
    """Healthy steps before pressure is released; it doubles with each relapse. 0: not set yet."""
    released_from: Mapping[str, float] = field(default_factory=dict)
    """Disease -> its pressure when the release began, from then until a relapse returns to it or a long healthy stretch is over."""
    course: Course = "prevent"
    course_steps: float = 0.0
    recovery_steps: float = 0.0
    """Of all courses since the onset."""
    course_severity: float = 0.0
    """Severity when the course began: a course that does not lower it is changed."""
    severity: float = 0.0
    """Share of rollouts beyond the teacher's longest or looping, less what the reference expects, over about 32 rollouts."""
    settled: bool = False
    """A healthy stretch was seen since the start or the last rollback: there is something to go back to when an onset comes."""
    short_steps: float = 0.0
    """Steps at full pressure for answers that are too short."""
    cap_tokens: int | None = None
    """The cap asked for: falls at once, rises in healthy stretches. None: not started."""
    base_cap_tokens: int | None = None
    """The job's own cap that `cap_tokens` was last set against."""
    reference_mean_tokens: float | None = None
    reference_p99_tokens: float | None = None
    """The last reference seen: it steers while none is published."""
    engaged: float = 1.0
    """Share of the proposed change that is in force: 1 but for the steps after observe became enforce."""
    cooldown_steps: float = 0.0
    """Steps left until another rollback may be decided."""
    rollbacks: int = 0
    limits: LengthLimits | None = None
    """In force."""

    @property
    def pressure(self) -> float:
        """Of all evidence together, in [0, 1]."""
        return together(self.pressure_long, self.pressure_short, self.pressure_drift)

    def pressure_of(self, disease: Disease) -> float:
        return float(getattr(self, f"pressure_{disease}"))

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tracks": {name: track.to_json() for name, track in self.tracks.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "State":
        limits = LengthLimits(**known(LengthLimits, values["limits"])) if values["limits"] else None
        tracks = {name: Track.from_json(each) for name, each in values["tracks"].items()}
        return cls(**known(cls, {**values, "tracks": tracks, "limits": limits}))


@dataclass(frozen=True, slots=True)
class Reading:
    """One signal against its bound, and the evidence so far against its threshold. None: not measured."""

    value: float | None
    bound: float | None
    """The worst that a healthy run may have."""
    evidence: float
    """Nats."""
    threshold: float
    pressure: float
    """That this evidence asks for."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided at one step, on what, and why."""

    step: int
    mode: str
    action: Action
    """In mode observe: what would have been done."""
    signal: str
    """The one with the most evidence over its threshold, empty when none is."""
    reason: str
    """A plain sentence."""
    news: str
    """A change known beforehand, which made the tests restart their baselines; empty without one."""
    healthy: bool
    """Fresh, complete data without evidence: a checkpoint written now may be rolled back to."""
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
            "news": self.news,
            "healthy": self.healthy,
            "pressure": self.after.pressure,
            "limits": asdict(self.limits),
            "proposed": asdict(self.proposed),
            "readings": {name: asdict(reading) for name, reading in self.readings.items()},
            "signals": self.signals.to_json(),
            "before": self.before.to_json(),
            "after": self.after.to_json(),
        }
