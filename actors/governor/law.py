"""The governor's law. Pure: no clock, no network, no Ray.

    signals --> tests --> evidence --> pressure per disease --> actuators --> limits
                (e-values, one a step)   (fast up, slow down)      \\-> another course, roll back, stop

Each signal is a sequential test against what the teacher does on the same prompts (evidence.py). Evidence over the threshold is
pressure, at once; pressure falls only after a healthy stretch. A relapse takes back what was released, and the next stretch asked for is
longer. What the evidence is of (answers too long, too short, a student that leaves its teacher) decides what moves. Missing or stale
signals hold everything.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import get_args

from opd_governor.actors.governor.actuators import movable, value_of
from opd_governor.actors.governor.evidence import Track, pressure_of, threshold_nats
from opd_governor.actors.governor.limits import propose, settle
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import SIGNALS, Disease, Signals
from opd_governor.actors.governor.state import Action, Command, Decision, Reading, State, together
from opd_governor.actors.trajectory import LengthLimits

CEILING = 1.5
"""Evidence is held at this many thresholds, where pressure is 1."""
PATIENCE_STEPS = 12.0
"""Healthy steps before pressure falls or a longer cap is granted: early recoveries relapse."""
MAX_PATIENCE_STEPS = 96.0
RELEASE_PER_STEP = 0.03
SEVERITY_ROLLOUTS = 32.0
"""Severity is averaged over about this many."""
ONSET = 0.15
"""Severity from which inflation is there: before it, prevent; from it on, recover."""
RECOVERED = 0.05
LOST = 0.5
"""Severity at which a course that fails is followed by a rollback."""
TRIAL_STEPS = 8.0
"""Time that a course gets to show that it helps."""
LONG_TRIAL_STEPS = 32.0
"""The same where severity is at least no worse than when it began."""
HELPS = 0.8
"""A course helps that lowers severity to this share in its time."""
AFTER_PUSH = 0.5
"""Pressure of long answers once a push or a brake has cured them: the rest is released like any other."""
COOLDOWN_STEPS = 12.0
"""After a rollback, before another."""
MAX_STEPS_SPANNED = 1000.0
"""Bounds what one decision may make of a long gap."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a decision came to, before limits are set and it is written down."""

    state: State
    observed: str
    readings: Mapping[str, Reading] = field(default_factory=dict)
    worst: str = ""
    command: Command | None = None
    healthy: bool = False
    growth_steps: float = 0.0
    fresh: bool = False
    fallback: bool = False
    steps: float = 0.0


def start(policy: Policy, base: LengthLimits) -> State:
    """The state before the first decision: its limits hold until then."""
    return settle(State(patience_steps=PATIENCE_STEPS, engaged=1.0), State(), policy, base)


def decide(
    state: State, signals: Signals, policy: Policy, base: LengthLimits, step: int, news: str = ""
) -> tuple[State, LengthLimits, Decision]:
    """One decision at a step border.

    `base` are the job's own settings: what holds at zero pressure, and the upper bound of the cap. `news`: a change known beforehand, in
    words: the tests restart their baselines and no evidence is made of it. Returns the next state, the limits in force from here on and
    the record. Equal arguments give equal results, bit for bit.
    """
    signals = signals.cleaned()
    if policy.mode == "off":
        off = State(patience_steps=PATIENCE_STEPS, rollbacks=state.rollbacks, limits=state.limits)
        outcome = Outcome(off, "the governor is off: the job's own settings hold")
        return _conclude(step, policy, base, signals, state, outcome, news)
    moved = state
    if news:
        moved = replace(state, tracks={name: track.restarted() for name, track in state.tracks.items()})
    if signals.blind or signals.data_age_s is None or signals.data_age_s > policy.blind_after_s:
        outcome = _blind(moved, signals, policy)
    elif not signals.num_rollouts:
        outcome = Outcome(moved, "no new rollouts since the last reading")
    else:
        outcome = _weigh(moved, signals, policy)
    return _conclude(step, policy, base, signals, state, outcome, news)


def _blind(state: State, signals: Signals, policy: Policy) -> Outcome:
    """Hold, and after a while fall back. The pressure of a fall-back is released like any other."""
    age_s = signals.data_age_s
    why = signals.blind_reason or "the data are too old"
    state = replace(state, healthy_steps=0.0)
    if age_s is not None and age_s <= policy.blind_after_s:
        return Outcome(state, f"blind, data {age_s:.0f} s old ({why}): everything holds")
    age = "of unknown age" if age_s is None else f"{age_s:.0f} s old"
    state = replace(state, pressure_long=max(state.pressure_long, policy.blind_pressure))
    return Outcome(state, f"blind, data {age} ({why}): conservative limits", fallback=True)


def _weigh(state: State, signals: Signals, policy: Policy) -> Outcome:
    steps = min(max(1.0, signals.steps_spanned or 1.0), MAX_STEPS_SPANNED)
    tracks, readings = _test(state, signals, policy, steps)
    missing = [name for name in sorted(tracks) if SIGNALS[name].required and name not in signals.observations]
    worst = max(readings, key=lambda name: readings[name].pressure, default="")
    worst = worst if worst and readings[worst].pressure > 0 else ""
    moved = replace(
        state,
        tracks=tracks,
        reference_mean_tokens=signals.reference_mean_tokens or state.reference_mean_tokens,
        reference_p99_tokens=signals.reference_p99_tokens or state.reference_p99_tokens,
    )
    moved, released_steps = _press(moved, readings, missing, steps)
    share = _sick_share(signals)
    weight = 1.0 - math.exp(-(signals.num_rollouts or 0.0) / SEVERITY_ROLLOUTS)
    moved = replace(moved, severity=moved.severity + weight * (share - moved.severity))
    moved = replace(moved, settled=moved.settled or moved.healthy_steps >= PATIENCE_STEPS)
    moved, command = _steer(moved, policy, steps, stands=min(state.severity, share) >= ONSET, known=not missing)
    quiet = worst == "" and not missing
    return Outcome(
        moved,
        _describe(readings, worst, missing, signals) + "".join(f"; {name} not read ({why})" for name, why in signals.faults.items()),
        readings=readings,
        worst=worst,
        command=command,
        healthy=quiet and moved.cooldown_steps == 0,
        growth_steps=released_steps if moved.pressure == 0 else 0.0,
        fresh=True,
        steps=steps,
    )


def _test(state: State, signals: Signals, policy: Policy, steps: float) -> tuple[dict[str, Track], dict[str, Reading]]:
    """Each signal's test, brought up to date where it was measured."""
    threshold = threshold_nats(policy.false_alarm_steps, len(SIGNALS))
    # A resumed run may have lost a signal: its job names the extension no more.
    tracks, readings = {name: track for name, track in state.tracks.items() if name in SIGNALS}, {}
    for name, signal in SIGNALS.items():
        track, seen = tracks.get(name, Track()), signals.observations.get(name)
        bound = None
        if seen is not None:
            bound = signal.test.bound(track, seen)
            track = tracks[name] = signal.test.update(track, seen, steps, CEILING * threshold)
        if name in tracks:
            pressure = min(signal.alone, pressure_of(track.evidence, threshold))
            readings[name] = Reading(seen.value if seen else None, bound, track.evidence, threshold, pressure)
    return tracks, readings


def _press(state: State, readings: Mapping[str, Reading], missing: list[str], steps: float) -> tuple[State, float]:
    """Pressure of each disease from its signals together: up at once, down after a healthy stretch. Also the steps spent beyond it."""
    asked = {
        disease: together(*(reading.pressure for name, reading in readings.items() if SIGNALS[name].disease == disease))
        for disease in get_args(Disease)
    }
    held = {disease: state.pressure_of(disease) for disease in asked}
    if any(asked.values()):
        patience_steps = state.patience_steps
        if state.released_from:  # a relapse: what was released is taken back
            held |= {d: max(held[d], state.released_from.get(d, 0.0)) for d in asked if asked[d] > 0}
            patience_steps = min(MAX_PATIENCE_STEPS, 2 * patience_steps)
        raised = {f"pressure_{d}": max(held[d], asked[d]) for d in asked}
        return replace(state, **raised, healthy_steps=0.0, released_from={}, patience_steps=patience_steps), 0.0  # type: ignore[arg-type]
    if missing:
        return state, 0.0
    healthy_steps = state.healthy_steps + steps
    beyond = max(0.0, healthy_steps - state.patience_steps) - max(0.0, state.healthy_steps - state.patience_steps)
    lowered = {f"pressure_{d}": max(0.0, held[d] - RELEASE_PER_STEP * beyond) for d in held}
    released_from = state.released_from or (held if beyond > 0 and any(held.values()) else {})
    patience_steps = state.patience_steps
    if healthy_steps > MAX_PATIENCE_STEPS and not any(lowered.values()):
        patience_steps, released_from = PATIENCE_STEPS, {}
    state = replace(state, **lowered, healthy_steps=healthy_steps, patience_steps=patience_steps)  # type: ignore[arg-type]
    return replace(state, released_from=released_from), beyond


def _sick_share(signals: Signals) -> float:
    """Of this reading's rollouts: beyond the teacher's longest or looping, less what the reference expects."""
    tail = signals.observations.get("tail")
    cut = (signals.truncation_rate or 0.0) + (signals.governor_cut_rate or 0.0)
    return min(1.0, max(0.0, cut if tail is None else tail.value - tail.expected, signals.loop_rate or 0.0))


def _steer(state: State, policy: Policy, steps: float, *, stands: bool, known: bool) -> tuple[State, Command | None]:
    """Which course is taken, and rollbacks. `stands`: inflation is in this reading and was there before it. `known`: nothing is missing.

    A brake after an onset preserves the sickness, so an onset is answered by going back to before it, with the brake on. Where that
    cannot be (no rollback is allowed, or the student was no sounder after one) the courses are tried in turn.
    """
    cooling = state.cooldown_steps > 0
    short_steps = state.short_steps + steps if state.pressure_short >= 1.0 else 0.0
    state = replace(state, cooldown_steps=max(0.0, state.cooldown_steps - steps), short_steps=short_steps)
    if short_steps > TRIAL_STEPS and not cooling:
        return _last_resort(state, policy, lost=True)
    if state.severity < RECOVERED or not state.pressure_long:
        return (_recovered(state, policy) if known else state), None
    if state.course == "prevent":
        if state.severity < ONSET or state.pressure_long < 0.5 or cooling or not stands:
            return state, None
        if state.settled and policy.may_move("rollback") and state.rollbacks < policy.max_rollbacks:
            return _roll_back(state, policy), "rollback"
        return replace(state, course="push", course_steps=0.0, course_severity=state.severity), None
    state = replace(state, course_steps=state.course_steps + steps, recovery_steps=state.recovery_steps + steps)
    if state.course_steps < TRIAL_STEPS:
        return state, None
    if state.severity <= HELPS * state.course_severity:
        return replace(state, course_steps=0.0, course_severity=state.severity), None
    if state.severity < min(LOST, state.course_severity) and state.course_steps < LONG_TRIAL_STEPS:
        return state, None  # no worse: what is learned slowly takes time
    other = replace(state, course="brake" if state.course == "push" else "push", course_steps=0.0, course_severity=state.severity)
    if cooling or state.severity < LOST:
        return other, None
    resorted, command = _last_resort(state, policy, lost=state.course == "brake")
    return (other, None) if command is None else (resorted, command)


def _recovered(state: State, policy: Policy) -> State:
    """Limits follow pressure again. Once courses had their time, what led to it is answered: a student that is well again is not left
    under the brake, yet anything new presses at once."""
    if state.recovery_steps >= TRIAL_STEPS:
        threshold = threshold_nats(policy.false_alarm_steps, len(SIGNALS))
        tracks = {n: t.held_at(threshold) if SIGNALS[n].disease == "long" else t for n, t in state.tracks.items()}
        state = replace(state, tracks=tracks, pressure_long=min(AFTER_PUSH, state.pressure_long))
    return replace(state, course="prevent", course_steps=0.0, recovery_steps=0.0)


def _last_resort(state: State, policy: Policy, *, lost: bool) -> tuple[State, Command | None]:
    """Another rollback; once there were enough of them, and all is `lost`, the end of the run."""
    if not policy.may_move("rollback"):
        return state, None
    if state.rollbacks >= policy.max_rollbacks:
        return state, "stop" if lost else None
    return _roll_back(state, policy), "rollback"


def _roll_back(state: State, policy: Policy) -> State:
    """The restored student starts with clean tests and with the brake on; pressure is released like any other."""
    state = replace(state, cooldown_steps=COOLDOWN_STEPS, short_steps=0.0)
    if policy.mode != "enforce":
        return state
    state = replace(state, rollbacks=state.rollbacks + 1, tracks={}, severity=0.0, healthy_steps=0.0, released_from={}, settled=False)
    return replace(state, course="prevent", course_steps=0.0, recovery_steps=0.0, pressure_long=1.0 if state.pressure_long else 0.0)


def _conclude(
    step: int, policy: Policy, base: LengthLimits, signals: Signals, before: State, outcome: Outcome, news: str
) -> tuple[State, LengthLimits, Decision]:
    """Limits, action and the sentence that says why."""
    after = settle(outcome.state, before, policy, base, growth_steps=outcome.growth_steps, fresh=outcome.fresh, steps=outcome.steps)
    proposed = propose(after, policy, base)
    action: Action = "hold"
    if outcome.command is not None:
        action = outcome.command
    elif outcome.fallback:
        action = "fallback"
    elif after.pressure > before.pressure:
        action = "tighten"
    elif after.pressure < before.pressure or (before.cap_tokens or 0) < (after.cap_tokens or 0):
        action = "release"
    reason = outcome.observed + _consequence(before, after, propose(before, policy, base), proposed, outcome.command)
    decision = Decision(
        step=step,
        mode=policy.mode,
        action=action,
        signal=outcome.worst,
        reason=f"{news}: baselines start again; {reason}" if news else reason,
        news=news,
        healthy=outcome.healthy,
        readings=outcome.readings,
        signals=signals,
        before=before,
        after=after,
        proposed=proposed,
    )
    return after, decision.limits, decision


def _consequence(before: State, after: State, old: LengthLimits, new: LengthLimits, command: Command | None) -> str:
    last = ""
    if command == "stop":
        last = f"; {after.rollbacks} rollbacks did not help: the run stops"
    elif command == "rollback":
        last = "; roll back to the last healthy checkpoint"
    elif after.course != before.course:
        last = f"; {COURSES[after.course]}"
    if after.pressure == before.pressure and old == new:
        return f": pressure stays {after.pressure:.2f}{last}"
    pairs = [(actuator.title, value_of(old, name), value_of(new, name)) for name, actuator in movable().items()]
    moves = ", ".join(f"{title} {a:.3g} -> {b:.3g}" for title, a, b in pairs if a != b and a is not None and b is not None)
    return f": pressure {before.pressure:.2f} -> {after.pressure:.2f}{'; ' + moves if moves else ''}{last}"


COURSES = {
    "prevent": "no inflation is left: limits follow pressure",
    "push": "inflation is there: push toward complete answers, brake off",
    "brake": "pushing did not help: brake on",
}


def _describe(readings: Mapping[str, Reading], worst: str, missing: list[str], signals: Signals) -> str:
    if worst:
        reading, signal = readings[worst], SIGNALS[worst]
        once = math.exp(reading.evidence) / len(SIGNALS)
        others = [SIGNALS[name].title for name, each in readings.items() if name != worst and each.pressure > 0]
        agreed = f" ({', '.join(others)} agree{'s' if len(others) == 1 else ''})" if others else ""
        return f"{signal.title} {_measured(worst, reading, signals)}; a healthy run shows this once in {once:,.0f} steps{agreed}"
    if missing:
        return f"no value for {', '.join(SIGNALS[name].title for name in missing)}, so nothing is released"
    return "no signal has evidence over its threshold"


def _measured(name: str, reading: Reading, signals: Signals) -> str:
    """Value and bound in a person's units: shares as counts of rollouts, log ratios as factors."""
    if reading.value is None or reading.bound is None:
        return "had evidence before and are not measured now"
    num = signals.num_rollouts or 0.0
    if SIGNALS[name].unit == "share":
        return f"were {reading.value * num:.0f} of the last {num:.0f}, where a healthy run has at most {reading.bound:.1%}"
    if SIGNALS[name].unit == "nats":
        factor, most = (math.exp(min(50.0, max(-50.0, nats))) for nats in (reading.value, reading.bound))
        return f"by a factor of {factor:.3g} over {num:.0f} rollouts (bound {most:.3g})"
    if SIGNALS[name].unit == "log nats":
        return f"is {math.exp(reading.value):.3g} nats a token, where a healthy run has at most {math.exp(reading.bound):.3g}"
    return f"{reading.value:.3g} {SIGNALS[name].unit} against {reading.bound:.3g}"
