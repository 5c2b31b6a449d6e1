"""Pressure -> limits: the actuators in stages, each between the job's own setting and the policy's bound. Pure."""

import math
from dataclasses import replace

from opd_governor.actors.trajectory import LengthLimits
from tests.bench.governor.before.policy import Policy
from tests.bench.governor.before.state import State

LIMIT_NAMES = {
    "cap_tokens": "cap",
    "golden_weight": "golden weight",
    "lr_scale": "learning rate x",
    "reference_kl_weight": "reference KL",
    "stop_tilt_nats": "stop tilt",
    "loop_tail_weight": "loop tail weight",
    "admission_quota": "admission quota",
    "unfinished_quota": "unfinished quota",
}
"""Field of LengthLimits -> what a person calls it, in reasons and plots."""


def propose(state: State, policy: Policy, base: LengthLimits) -> LengthLimits:
    """The limits that this state's pressure asks for. A bound on the loose side of the job's own setting moves nothing."""

    def toward(name: str, resting: float, bound: float) -> float:
        return resting + _reach(name, state, policy) * (bound - resting)

    asked = LengthLimits(
        cap_tokens=state.cap_tokens or base.cap_tokens,
        golden_weight=toward("golden_weight", base.golden_weight, max(base.golden_weight, policy.max_golden_weight)),
        lr_scale=toward("lr_scale", base.lr_scale, min(base.lr_scale, policy.min_lr_scale)),
        reference_kl_weight=toward(
            "reference_kl_weight", base.reference_kl_weight, max(base.reference_kl_weight, policy.max_reference_kl_weight)
        ),
        stop_tilt_nats=toward("stop_tilt_nats", base.stop_tilt_nats, max(base.stop_tilt_nats, policy.max_stop_tilt_nats)),
        loop_tail_weight=toward("loop_tail_weight", base.loop_tail_weight, min(base.loop_tail_weight, policy.min_loop_tail_weight)),
        admission_quota=toward("admission_quota", base.admission_quota, min(base.admission_quota, policy.min_admission_quota)),
        unfinished_quota=None
        if base.unfinished_quota is None
        else toward("unfinished_quota", base.unfinished_quota, min(base.unfinished_quota, policy.min_unfinished_quota)),
    )
    if state.side == "long":
        return asked
    # Answers are too short: nothing may shorten them further, and a tilt toward stopping is taken back.
    return replace(
        asked,
        stop_tilt_nats=toward("stop_tilt_nats", base.stop_tilt_nats, 0.0),
        loop_tail_weight=base.loop_tail_weight,
        admission_quota=base.admission_quota,
        unfinished_quota=base.unfinished_quota,
    )


def settle(moved: State, before: State, policy: Policy, base: LengthLimits, growth_steps: float = 0.0, fresh: bool = False) -> State:
    """`moved` with its cap and the limits in force. Their generation rises by one when any value differs from `before`.

    `growth_steps`: healthy steps in which the cap may rise; `fresh`: whether the data say anything new.
    """
    moved = _with_cap(moved, before, policy, base, growth_steps, fresh)
    wanted = propose(moved, policy, base) if policy.mode == "enforce" else base
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
        # A person raised the job's own cap while the governor held nothing back.
        held = max(held, base.cap_tokens)
    held_base = base.cap_tokens if fresh else min(held_base, base.cap_tokens)
    if growth_steps > 0:
        factor = policy.cap_growth_per_step ** min(growth_steps, 100.0)
        held = max(held + 1, math.floor(min(held * factor, base.cap_tokens)))
    lowest = min(policy.min_cap_tokens, base.cap_tokens)
    target = base.cap_tokens
    if moved.reference_p99_tokens is not None:
        floor = min(policy.cap_floor_ratio * moved.reference_p99_tokens, base.cap_tokens)
        floor = max(lowest, math.ceil(floor))
        if moved.side == "long":
            target = round(base.cap_tokens + _reach("cap_tokens", moved, policy) * (floor - base.cap_tokens))
        # A reference that grew lifts the cap too, on fresh data only.
        lowest = floor if fresh else lowest
    return replace(moved, cap_tokens=max(lowest, min(held, target)), base_cap_tokens=held_base)


def _reach(name: str, state: State, policy: Policy) -> float:
    """How far an actuator is moved: 0 at rest, 1 at its bound."""
    if name not in policy.actuators:
        return 0.0
    start, full = getattr(policy.stages, name)
    return min(1.0, max(0.0, (state.pressure - start) / (full - start)))
