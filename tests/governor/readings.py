"""Readings of made-up steps, and the law run over them."""

import math
from dataclasses import replace

from opd_governor.actors.governor.evidence import Observation
from opd_governor.actors.governor.law import decide, start
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import Signals
from opd_governor.actors.governor.state import Decision, State
from opd_governor.actors.trajectory import LengthLimits

BASE = LengthLimits(cap_tokens=192, golden_weight=0.1, reference_kl_weight=0.01, unfinished_quota=1.0)
TILTED = replace(BASE, stop_tilt_nats=2.0)


def signals(
    tail: float = 0.0, length: float = 0.0, loops: float = 0.0, kl: float = -1.0, cut: float = 0.0, num: int = 32, steps: float = 1.0
) -> Signals:
    """Of a step of `num` rollouts: shares in the tail, looping and cut; mean log excess; log KL."""
    excess = Observation(length, num, spread=0.4, variance=0.16)
    seen = {
        "tail": Observation(tail, num, 0.01), "length": excess, "short": excess, "loops": Observation(loops, num),
        "kl": Observation(kl, 1.0), "stop_mass": Observation(0.0, 1.0),
    }  # fmt: skip
    return Signals(
        steps_spanned=steps, num_rollouts=num, observations=seen, truncation_rate=cut, governor_cut_rate=0.0, expected_cut_rate=0.01,
        loop_rate=loops, reference_mean_tokens=40, reference_p99_tokens=80, length_mean_tokens=40 * math.exp(length),
    )  # fmt: skip


HEALTHY = signals()
LOST_RUN = signals(tail=0.9, length=1.2, loops=0.5, cut=0.8)
SHORT = signals(length=-2.0)
BLIND = Signals(blind=True, blind_reason="down", data_age_s=1.0)


def run(seen: list[Signals], policy: Policy | None = None, base: LengthLimits = BASE, state: State | None = None) -> list[Decision]:
    policy = policy or Policy()
    state = state or start(policy, base)
    decisions = []
    for step, each in enumerate(seen):
        state, _, decision = decide(state, each, policy, base, step)
        decisions.append(decision)
    return decisions
