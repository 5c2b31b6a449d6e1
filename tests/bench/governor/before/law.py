"""The governor's law. Pure: no clock, no network, no Ray.

    signals --> errors --> the worst --> pressure in [0, 1] --> actuators in stages --> limits
             (gain x excess)           (fast up, slow down)                         \\-> roll back, stop

Pressure follows a PI controller in incremental form: it gains the worst error and a share of that error's rise, and the
clamped pressure is itself the only integrator, so nothing can wind up. It falls only after a healthy stretch, and after a
relapse it comes to rest half way between where it relapsed and where it had been safe, so that it does not oscillate.
Missing or stale signals hold everything; they never raise a cap and never release pressure.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from opd_governor.actors.trajectory import LengthLimits
from tests.bench.governor.before.limits import LIMIT_NAMES, propose, settle
from tests.bench.governor.before.policy import Policy
from tests.bench.governor.before.signals import Signals
from tests.bench.governor.before.state import Action, Command, Decision, Reading, State

KL_FLOOR_NATS = 0.03
"""Running levels of KL below this don't count: ratios to next to nothing are noise."""
IMPROVING = 4.0
"""A running level follows what gets better this many times as fast as what gets worse: a change for the worse stands out at once,
also in a run whose KL has just fallen from nats to hundredths."""
RELAPSE_ERROR = 0.1
"""Errors up to this pause the healthy stretch, larger ones end it: one long answer among many is no relapse."""
RESTING_RELEASE = 0.1
"""Share of the release rate below the resting pressure: what relapsed is tried again, but seldom."""
MAX_RATIO = 1e6
"""Ratios are recorded up to this; beyond it they say nothing more."""
MAX_STEPS_SPANNED = 1000.0
"""Bounds what one decision may make of a long gap."""
REQUIRED = frozenset({"tail_share", "truncation"})
"""Without these nobody can say that a run is healthy."""

WORDS = {
    "tail_share": "tail share",
    "length_max": "longest rollout over reference",
    "kl": "KL over its running level",
    "stop_mass": "missing stop mass",
    "loops": "loop rate",
    "truncation": "truncation",
    "density": "stop-supervision density over its running level",
    "short": "mean length over reference",
}
LOW_IS_BAD = frozenset({"density", "short"})


def start(policy: Policy, base: LengthLimits) -> State:
    """The state before the first decision: its limits hold until then."""
    return settle(State(pressure=policy.pressure_floor), State(), policy, base)


def decide(state: State, signals: Signals, policy: Policy, base: LengthLimits, step: int) -> tuple[State, LengthLimits, Decision]:
    """One decision at a step border.

    `base` are the job's own settings: what holds at zero pressure, and the upper bound of the cap. Returns the next state,
    the limits in force from here on and the record. Equal arguments give equal results, bit for bit.
    """
    signals = signals.cleaned()
    if policy.mode == "off":
        moved = State(rollbacks=state.rollbacks, limits=state.limits)
        return _conclude(step, policy, base, signals, state, moved, "the governor is off: the job's own settings hold")
    moved = replace(state, pressure=max(state.pressure, policy.pressure_floor))
    if signals.blind or signals.data_age_s is None or signals.data_age_s > policy.blind_after_s:
        return _grope(step, policy, base, signals, state, moved)
    if not signals.num_rollouts:
        return _conclude(step, policy, base, signals, state, moved, "no new rollouts since the last reading")

    steps = min(max(1.0, signals.steps_spanned or 1.0), MAX_STEPS_SPANNED)
    moved = _average(moved, signals, policy, signals.num_rollouts)
    readings = _measure(moved, signals, policy)
    missing = _missing(moved, readings, policy)
    moved, worst = _press(_remember(moved, signals, readings, policy, steps), readings, missing, policy, steps)
    moved, command = _judge(moved, readings, worst, policy, steps)
    growing = worst == "" and not missing and moved.healthy_steps > policy.healthy_steps
    return _conclude(
        step,
        policy,
        base,
        signals,
        state,
        moved,
        _describe(readings, worst, missing),
        readings=readings,
        worst=worst,
        command=command,
        healthy=worst == "" and not missing and moved.cooldown_steps == 0,
        growth_steps=steps if growing else 0.0,
        fresh=True,
    )


def _grope(
    step: int, policy: Policy, base: LengthLimits, signals: Signals, state: State, moved: State
) -> tuple[State, LengthLimits, Decision]:
    """Blind: hold, and after a while fall back. The pressure of a fall-back is released like any other."""
    age_s = signals.data_age_s
    why = signals.blind_reason or "the data are too old"
    moved = replace(moved, healthy_steps=0.0)
    if age_s is not None and age_s <= policy.blind_after_s:
        return _conclude(step, policy, base, signals, state, moved, f"blind, data {age_s:.0f} s old ({why}): everything holds")
    age = "of unknown age" if age_s is None else f"{age_s:.0f} s old"
    moved = replace(moved, pressure=max(moved.pressure, policy.blind_pressure))
    reason = f"blind, data {age} ({why}): conservative limits"
    return _conclude(step, policy, base, signals, state, moved, reason, fallback=True)


def _average(state: State, signals: Signals, policy: Policy, num_rollouts: float) -> State:
    """Shares averaged over about `window_rollouts` rollouts, from 0 on: a run is healthy until shown otherwise.

    KL, over `kl_window_rollouts`, begins with its first value.
    """
    weight = 1.0 - math.exp(-num_rollouts / policy.window_rollouts)
    kl_weight = 1.0 - math.exp(-num_rollouts / policy.kl_window_rollouts)

    def mix(old: float, new: float | None) -> float:
        return old if new is None else old + weight * (min(1.0, new) - old)

    kl_nats = signals.kl_nats
    if kl_nats is not None and state.kl_nats is not None:
        kl_nats = state.kl_nats + kl_weight * (kl_nats - state.kl_nats)

    cut = None if signals.truncation_rate is None else signals.truncation_rate + (signals.governor_cut_rate or 0.0)
    return replace(
        state,
        tail_share=mix(state.tail_share, signals.tail_share),
        truncation_rate=mix(state.truncation_rate, signals.truncation_rate),
        loop_rate=mix(state.loop_rate, signals.loop_rate),
        cut_rate=mix(state.cut_rate, cut),
        kl_nats=state.kl_nats if kl_nats is None else kl_nats,
        reference_mean_tokens=signals.reference_mean_tokens or state.reference_mean_tokens,
        reference_p99_tokens=signals.reference_p99_tokens or state.reference_p99_tokens,
    )


def _measure(state: State, signals: Signals, policy: Policy) -> dict[str, Reading]:
    """Each signal against its target; an averaged share only where this reading brought a new value."""
    kl_level = None if state.kl_level_nats is None else max(state.kl_level_nats, KL_FLOOR_NATS)
    stop_mass = _ratio(signals.stop_mass_student, signals.stop_mass_teacher)
    values = {
        "tail_share": (None if signals.tail_share is None else state.tail_share, policy.target_tail_share),
        "length_max": (_ratio(signals.length_max_tokens, state.reference_p99_tokens), policy.target_length_max_ratio),
        "kl": (None if signals.kl_nats is None else _ratio(state.kl_nats, kl_level), policy.target_kl_ratio),
        "stop_mass": (None if stop_mass is None else max(0.0, 1.0 - stop_mass), policy.target_stop_mass_deficit),
        "loops": (None if signals.loop_rate is None else state.loop_rate, policy.target_loop_rate),
        "truncation": (None if signals.truncation_rate is None else state.truncation_rate, policy.target_truncation),
        "density": (_ratio(signals.stop_density_per_token, state.density_level), policy.target_density_ratio),
        "short": (_ratio(signals.length_mean_tokens, state.reference_mean_tokens), policy.target_length_min_ratio),
    }
    readings = {}
    for name, (value, target) in values.items():
        gain = getattr(policy.gains, name)
        error = None
        if value is not None and gain > 0:
            excess = target - value if name in LOW_IS_BAD else value - target
            error = min(1.0, max(-1.0, gain * excess))
        readings[name] = Reading(value, target, error)
    return readings


def _missing(state: State, readings: Mapping[str, Reading], policy: Policy) -> list[str]:
    """Signals that are on and were measured before, or that nothing goes without, and have no value now."""
    wanted = REQUIRED.union(state.seen)
    return sorted(name for name in wanted if getattr(policy.gains, name) > 0 and readings[name].value is None)


def _remember(state: State, signals: Signals, readings: Mapping[str, Reading], policy: Policy, steps: float) -> State:
    """Running levels follow after they were compared with: slowly what gets worse, so that it stands out for many steps."""

    def follow(level: float | None, value: float | None, better: bool) -> float | None:
        if level is None or value is None:
            return level if value is None else value
        half_life_steps = policy.level_half_life_steps / (IMPROVING if better else 1.0)
        return level + (1.0 - 0.5 ** (steps / half_life_steps)) * (value - level)

    kl_nats = None if signals.kl_nats is None else state.kl_nats
    density = signals.stop_density_per_token

    return replace(
        state,
        kl_level_nats=follow(state.kl_level_nats, kl_nats, (kl_nats or 0.0) < (state.kl_level_nats or 0.0)),
        density_level=follow(state.density_level, density, (density or 0.0) > (state.density_level or 0.0)),
        seen=tuple(sorted({name for name, reading in readings.items() if reading.value is not None}.union(state.seen))),
    )


def _press(state: State, readings: Mapping[str, Reading], missing: list[str], policy: Policy, steps: float) -> tuple[State, str]:
    """Pressure from the worst error, and that signal's name, empty when none is over its target."""
    errors = {name: reading.error for name, reading in readings.items() if reading.error is not None}
    worst = max(errors, key=lambda name: errors[name], default="")
    error = errors.get(worst, 0.0)
    if error > 0:
        added = error * steps + policy.proportional_gain * max(0.0, error - state.error)
        relapse = error > RELAPSE_ERROR
        if relapse or state.pressure <= policy.pressure_floor:
            # Small errors don't change sides while pressure is held for the other one.
            state = replace(state, side=_side(state, errors, readings["short"], policy))
        state = replace(state, error=error)
        if not relapse:
            return replace(state, pressure=min(1.0, state.pressure + added)), worst
        resting = state.resting_pressure
        if state.released_from is not None:
            resting = max(resting, (state.pressure + state.released_from) / 2)
        pressure = min(1.0, max(resting, state.pressure + added))
        return replace(state, pressure=pressure, resting_pressure=resting, released_from=None, healthy_steps=0.0), worst
    state = replace(state, error=0.0)
    if missing:
        return state, ""
    state = replace(state, healthy_steps=state.healthy_steps + steps)
    if state.healthy_steps <= policy.healthy_steps or state.pressure <= policy.pressure_floor:
        return state, ""
    resting = state.pressure <= state.resting_pressure
    released = policy.release_per_step * steps * (RESTING_RELEASE if resting else 1.0)
    lowest = policy.pressure_floor if resting else max(policy.pressure_floor, state.resting_pressure)
    pressure = max(lowest, state.pressure - released)
    resting_pressure = min(state.resting_pressure, pressure)
    released_from = state.pressure if state.released_from is None else state.released_from
    return replace(state, pressure=pressure, resting_pressure=resting_pressure, released_from=released_from), ""


def _side(state: State, errors: Mapping[str, float], mean_ratio: Reading, policy: Policy) -> Literal["short", "long"]:
    """Which way lengths go wrong. KL rises either way: it says that something is wrong, not what.

    Where KL cries alone, answers already half way from the reference to too short say that they are on their way there.
    """
    short = max(0.0, errors.get("short", 0.0))
    long = max((error for name, error in errors.items() if name not in ("short", "kl")), default=0.0)
    if short > max(0.0, long):
        return "short"
    if long > 0:
        return "long"
    if mean_ratio.value is not None and mean_ratio.value < (1 + mean_ratio.target) / 2:
        return "short"
    return "long" if state.pressure <= policy.pressure_floor else state.side


def _judge(state: State, readings: Mapping[str, Reading], worst: str, policy: Policy, steps: float) -> tuple[State, Command | None]:
    """The last resort, once every other actuator has had its time."""
    confirmed = worst == "short" or (worst != "" and max(state.cut_rate, state.loop_rate) >= policy.confirm_truncation)
    saturated_steps = state.saturated_steps + steps if confirmed and state.pressure >= policy.rollback_pressure else 0.0
    resting = state.cooldown_steps > 0
    state = replace(state, cooldown_steps=max(0.0, state.cooldown_steps - steps), saturated_steps=saturated_steps)
    if resting or "rollback" not in policy.actuators:
        return state, None
    late = saturated_steps > policy.rollback_patience_steps
    tail_error = readings["tail_share"].error or 0.0
    early = policy.early_rollback and tail_error > 0 and state.pressure >= policy.early_rollback_pressure
    if not late and not early:
        return state, None
    if state.rollbacks >= policy.max_rollbacks:
        return state, "stop" if late else None
    state = replace(state, cooldown_steps=float(policy.rollback_cooldown_steps), saturated_steps=0.0)
    if policy.mode == "enforce":
        # The restored student starts with clean averages. The pressure that led here stays, and is released like any other.
        state = replace(state, rollbacks=state.rollbacks + 1, healthy_steps=0.0, error=0.0)
        state = replace(state, tail_share=0.0, truncation_rate=0.0, loop_rate=0.0, cut_rate=0.0, kl_nats=None)
    return state, "rollback"


def _conclude(
    step: int,
    policy: Policy,
    base: LengthLimits,
    signals: Signals,
    before: State,
    moved: State,
    observed: str,
    *,
    readings: Mapping[str, Reading] | None = None,
    worst: str = "",
    command: Command | None = None,
    healthy: bool = False,
    growth_steps: float = 0.0,
    fresh: bool = False,
    fallback: bool = False,
) -> tuple[State, LengthLimits, Decision]:
    """Limits, action and the sentence that says why."""
    after = settle(moved, before, policy, base, growth_steps, fresh)
    proposed = propose(after, policy, base)
    action: Action = "hold"
    if command is not None:
        action = command
    elif fallback:
        action = "fallback"
    elif after.pressure > before.pressure:
        action = "tighten"
    elif after.pressure < before.pressure or (before.cap_tokens or 0) < (after.cap_tokens or 0):
        action = "release"
    decision = Decision(
        step=step,
        mode=policy.mode,
        action=action,
        signal=worst,
        reason=observed + _consequence(before, after, propose(before, policy, base), proposed, command),
        healthy=healthy,
        readings=readings or {},
        signals=signals,
        before=before,
        after=after,
        proposed=proposed,
    )
    return after, decision.limits, decision


def _consequence(before: State, after: State, old: LengthLimits, new: LengthLimits, command: Command | None) -> str:
    if command == "stop":
        last = f"; {after.rollbacks} rollbacks did not help: the run stops"
    elif command == "rollback":
        last = "; roll back to the last healthy checkpoint"
    else:
        last = ""
    if after.pressure == before.pressure and old == new:
        return f": pressure stays {after.pressure:.2f}{last}"
    pairs = [(text, getattr(old, name), getattr(new, name)) for name, text in LIMIT_NAMES.items()]
    moves = ", ".join(f"{text} {a:.3g} -> {b:.3g}" for text, a, b in pairs if a != b)
    return f": pressure {before.pressure:.2f} -> {after.pressure:.2f}{'; ' + moves if moves else ''}{last}"


def _describe(readings: Mapping[str, Reading], worst: str, missing: list[str]) -> str:
    if worst:
        reading = readings[worst]
        return f"{WORDS[worst]} {reading.value:.3g} {'under' if worst in LOW_IS_BAD else 'over'} {reading.target:.3g}"
    if missing:
        return f"no value for {', '.join(WORDS[name] for name in missing)}, so nothing is released"
    return "all signals within their targets"


def _ratio(part: float | None, whole: float | None) -> float | None:
    return min(MAX_RATIO, max(-MAX_RATIO, part / whole)) if part is not None and whole is not None and whole > 0 else None
