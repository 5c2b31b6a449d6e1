"""Pressure -> limits: the actuators, each between the job's own setting and the policy's bound. Pure."""

import math
from dataclasses import fields, replace

from opd_governor.actors.governor.actuators import ACTUATORS, movable, value_of
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.state import State, together
from opd_governor.actors.trajectory import LengthLimits

CAP_GROWTH = 1.05
"""Largest factor by which the cap grows in one healthy step."""
CAP_MARGIN = 1.1
"""Times the reference's p99: the lowest cap. A lower one would cut what the teacher itself says."""
ENGAGE_STEPS = 10.0
"""From observe to enforce the limits follow in over this many steps."""
FIELDS = frozenset(field.name for field in fields(LengthLimits))


def propose(state: State, policy: Policy, base: LengthLimits) -> LengthLimits:
    """The limits that this state's pressure asks for. A bound on the loose side of the job's own setting moves nothing."""
    asked = {name: _asked(name, state, policy, base) for name in movable() if name != "cap_tokens"}
    return _with_values(replace(base, cap_tokens=state.cap_tokens or base.cap_tokens), asked)


def _asked(name: str, state: State, policy: Policy, base: LengthLimits) -> float | None:
    resting = value_of(base, name)
    if resting is None:
        return None
    if ACTUATORS[name].shortens and ACTUATORS[name].tighter == "up":
        resting *= 1.0 - state.pressure_short  # a tilt toward stopping that the job itself set is taken back too
    bound = tightest(name, resting, policy.bound(name))
    return resting + reach(name, state, policy) * (bound - resting)


def reach(name: str, state: State, policy: Policy) -> float:
    """How far an actuator is moved: 0 at rest, 1 at its bound."""
    if not policy.may_move(name):
        return 0.0
    actuator = ACTUATORS[name]
    if state.course == "push" and actuator.in_recovery is not None:
        return actuator.in_recovery
    start, full = actuator.stage
    pressure = together(*(state.pressure_of(disease) for disease in actuator.moved_by))
    reached = min(1.0, max(0.0, (pressure - start) / (full - start)))
    return reached * (1.0 - state.pressure_short) if actuator.shortens else reached


def tightest(name: str, *values: float) -> float:
    """Of values of one actuator."""
    return max(values) if ACTUATORS[name].tighter == "up" else min(values)


def settle(
    moved: State, before: State, policy: Policy, base: LengthLimits, *, growth_steps: float = 0.0, fresh: bool = False, steps: float = 0.0
) -> State:
    """`moved` with its cap and the limits in force. Their generation rises by one when any value differs from `before`.

    `growth_steps`: healthy steps in which the cap may rise; `fresh`: whether the data say anything new: without, nothing loosens.
    """
    moved = _with_cap(moved, before, policy, base, growth_steps, fresh)
    if policy.mode == "enforce":
        moved = replace(moved, engaged=min(1.0, before.engaged + steps / ENGAGE_STEPS))
        wanted = _blend(base, propose(moved, policy, base), moved.engaged)
        if not fresh and before.limits is not None and before.engaged > 0:
            wanted = _no_looser(wanted, before.limits)
    else:
        moved, wanted = replace(moved, engaged=0.0), base
    generation = before.limits.generation if before.limits else 0
    wanted = replace(wanted, generation=generation)
    if before.limits is not None and wanted != before.limits:
        wanted = replace(wanted, generation=generation + 1)
    return replace(moved, limits=wanted)


def _with_cap(moved: State, before: State, policy: Policy, base: LengthLimits, growth_steps: float, fresh: bool) -> State:
    if policy.mode == "off":
        return replace(moved, cap_tokens=None, base_cap_tokens=None)
    held, held_base = before.cap_tokens, before.base_cap_tokens
    if held is None or held_base is None:
        held, held_base = min(base.cap_tokens, policy.initial_cap_tokens or base.cap_tokens), base.cap_tokens
    if fresh and held >= held_base:
        held = max(held, base.cap_tokens)  # a person raised the job's own cap while the governor held nothing back
    held_base = base.cap_tokens if fresh else min(held_base, base.cap_tokens)
    if growth_steps > 0:
        held = max(held + 1, math.floor(min(held * CAP_GROWTH ** min(growth_steps, 100.0), base.cap_tokens)))
    lowest, target = min(policy.min_cap_tokens, base.cap_tokens), base.cap_tokens
    if moved.reference_p99_tokens is not None:
        floor = max(lowest, math.ceil(min(CAP_MARGIN * moved.reference_p99_tokens, base.cap_tokens)))
        target = round(base.cap_tokens + reach("cap_tokens", moved, policy) * (floor - base.cap_tokens))
    return replace(moved, cap_tokens=max(lowest, min(held, target)), base_cap_tokens=held_base)


def _with_values(limits: LengthLimits, values: dict[str, float | None]) -> LengthLimits:
    own = {name: value for name, value in values.items() if name in FIELDS}
    extra = {name: value for name, value in values.items() if name not in FIELDS and value is not None}
    return replace(limits, **own, extra=extra)  # type: ignore[arg-type]


def _blend(base: LengthLimits, asked: LengthLimits, share: float) -> LengthLimits:
    if share >= 1.0:
        return asked
    values = {}
    for name in movable():
        resting, wanted = value_of(base, name), value_of(asked, name)
        values[name] = None if resting is None or wanted is None else resting + share * (wanted - resting)
    cap = values.pop("cap_tokens")
    assert cap is not None
    return replace(_with_values(asked, values), cap_tokens=round(cap))


def _no_looser(wanted: LengthLimits, held: LengthLimits) -> LengthLimits:
    values = {}
    for name in movable():
        new, old = value_of(wanted, name), value_of(held, name)
        values[name] = new if new is None or old is None else tightest(name, new, old)
    cap = values.pop("cap_tokens")
    assert cap is not None
    return replace(_with_values(wanted, values), cap_tokens=int(cap))
