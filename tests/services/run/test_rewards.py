"""Advantages from scores, and a whole batch's gradient from them, against formulas of their own in float64."""

from dataclasses import replace
from functools import reduce
from operator import add

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.learner.batching import build_micro_batches
from opd_governor.actors.learner.fields import LazyLogits
from opd_governor.actors.learner.metrics import summarise
from opd_governor.actors.learner.objective import chunked_objective
from opd_governor.actors.learner.settings import ObjectiveSettings, RewardSettings
from opd_governor.actors.learner.weights import distillation_weight
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.inputs.golden import GoldenSet
from opd_governor.services.job.settings import VerifierProcesses
from opd_governor.services.run.judges import Judges, judge_teacher
from opd_governor.services.run.rewards import Rewards

VOCABULARY, STOP_IDS = 11, [2, 7]


def rollout(index: int, sample: int, reward: float | None, ids: tuple[int, ...] = (3,), domain: str = "", **other) -> Trajectory:
    noise = np.random.default_rng([index, sample, len(ids)])
    prompt = Prompt(index, (1, 4), domain=domain)
    logprobs_T = noise.normal(-2.0, 0.5, len(ids)).astype(np.float32)
    finish = other.pop("finish_reason", "stop")
    return Trajectory(prompt, ids, logprobs_T, finish, 16, 1, 0, 0, sample, reward=reward, **other)


def scored(trajectories: list[Trajectory]) -> list[ScoredRollout]:
    out = []
    for t in trajectories:
        noise = np.random.default_rng([7, t.prompt.index, t.sample])
        values = [noise.normal(-2.0, 1.0, len(t.token_ids)).astype(np.float32) for _ in range(2)]
        out.append(ScoredRollout(t, TokenScores("t", values[0], values[1].clip(max=-0.1))))
    return out


def advantages(trajectories: list[Trajectory], **settings) -> list[float]:
    rewards = Rewards(RewardSettings(verifier="exact", **settings))
    return [one.advantage for one in rewards.weigh(trajectories, scored(trajectories))]


@given(st.lists(st.floats(-2, 2), min_size=2, max_size=6))
def test_a_group_s_advantage_is_over_the_mean_of_the_others(rewards) -> None:
    group = [rollout(0, sample, reward) for sample, reward in enumerate(rewards)] + [rollout(1, 0, 9.0), rollout(0, 99, None)]
    wanted = [r - np.mean([other for j, other in enumerate(rewards) if j != i]) for i, r in enumerate(rewards)]
    assert advantages(group) == pytest.approx([*wanted, 0.0, 0.0], abs=1e-9)
    assert sum(advantages(group)) == pytest.approx(0, abs=1e-9)


def test_a_group_is_divided_by_its_spread_only_where_asked_and_one_without_spread_by_nothing() -> None:
    mixed, same = [rollout(0, s, r) for s, r in enumerate((0, 0, 0, 1))], [rollout(1, s, 1.0) for s in range(4)]
    plain, divided = advantages(mixed + same), advantages(mixed + same, normalise=True)
    assert plain[:4] == pytest.approx([-1 / 3, -1 / 3, -1 / 3, 1])
    assert divided[:4] == pytest.approx([a / np.std([0, 0, 0, 1]) for a in plain[:4]])
    assert plain[4:] == divided[4:] == [0.0] * 4


def test_rollouts_that_are_not_learned_from_count_in_the_baseline() -> None:
    group = [rollout(0, 0, 1.0), rollout(0, 1, 0.0)]
    (learned,) = Rewards(RewardSettings(verifier="exact")).weigh(group, scored(group)[:1])
    assert learned.advantage == 1.0


def test_a_running_mean_follows_each_domain_and_goes_on_from_its_state() -> None:
    settings = RewardSettings(verifier="exact", baseline="running")
    first = [rollout(0, 0, 1.0, domain="a"), rollout(1, 0, 0.0, domain="a"), rollout(2, 0, 0.2, domain="b")]
    second = [rollout(3, 0, 1.0, domain="a"), rollout(4, 0, 1.0, domain="c")]
    rewards = Rewards(settings)
    assert [one.advantage for one in rewards.weigh(first, scored(first))] == pytest.approx([0.5, -0.5, 0.0])
    kept = rewards.state()
    assert [one.advantage for one in rewards.weigh(second, scored(second))] == pytest.approx([0.5, 0.0])
    assert rewards.state()["running"]["a"][0] == pytest.approx(0.55)
    again = Rewards(settings)
    again.restore(kept)
    again.weigh(second, scored(second))
    assert again.state() == rewards.state()


# ---- the gradient


BATCH = [
    rollout(0, 0, 1.0, (3, 5, 2)),
    rollout(0, 1, 0.0, (4, 7)),
    rollout(0, 2, 0.0, (1, 8, 6, 9, 9, 9), finish_reason="length", loop_onset=3, loop_period=1),
    rollout(1, 0, 1.0, (5, 2)),
    rollout(1, 1, None, (6, 6, 7)),
    rollout(1, 2, 0.25, (3, 3, 3, 7)),
]


def gradient(settings: ObjectiveSettings, logits: dict[int, torch.Tensor], trajectories=BATCH):
    """Of every rollout's logits, by the code under test; and the batch's metrics."""
    rewards = Rewards(settings.reward) if settings.reward else None
    rollouts = rewards.weigh(trajectories, scored(trajectories)) if rewards else scored(trajectories)
    limits = LengthLimits(16, loop_tail_weight=0.0)
    micros = build_micro_batches(rollouts, [], settings, limits, micro_batch_tokens=10_000, max_new_tokens=16, stop_ids=STOP_IDS)
    order = sorted(range(len(trajectories)), key=lambda i: -len(trajectories[i].token_ids))
    lengths = [len(trajectories[i].token_ids) for i in order]
    flat = torch.cat([logits[i] for i in order]).detach().requires_grad_()
    stop_ids, parts = torch.tensor(STOP_IDS), []
    for micro, part in zip(micros, torch.split(flat, [len(micro.fields) for micro in micros]), strict=True):
        fields = micro.fields._map(lambda value: value.double() if value.is_floating_point() else value)
        loss, losses = chunked_objective(LazyLogits(part, lambda hidden: hidden, ()), fields, settings, stop_ids, chunk_tokens=5)
        loss.backward()
        parts.append(summarise(losses, fields, stop_ids))
    assert flat.grad is not None
    return dict(zip(order, torch.split(flat.grad, lengths), strict=True)), reduce(add, parts)


def random_logits() -> dict[int, torch.Tensor]:
    torch.manual_seed(4)
    return {i: torch.randn(len(t.token_ids), VOCABULARY, dtype=torch.float64) for i, t in enumerate(BATCH)}


def leave_one_out(logits: dict[int, torch.Tensor], weight: float, cap: float | None) -> dict[int, torch.Tensor]:
    """-sum_i sum_t w A_i grad log pi(a_t) / number of tokens, a stop being one action, from scratch."""
    num_tokens = sum(len(t.token_ids) for t in BATCH)
    found = {}
    for i, t in enumerate(BATCH):
        others = [o.reward for j, o in enumerate(BATCH) if j != i and o.prompt.index == t.prompt.index and o.reward is not None]
        advantage = 0.0 if t.reward is None else t.reward - sum(others) / len(others)
        leaf = logits[i].clone().requires_grad_()
        total = torch.zeros((), dtype=torch.float64)
        for step, token in enumerate(t.token_ids):
            p = torch.exp(leaf[step]) / torch.exp(leaf[step]).sum()
            mass = sum(p[stop] for stop in STOP_IDS) if token in STOP_IDS else p[token]
            ratio = 1.0 if cap is None else min(cap, float(p[token].detach()) / float(np.exp(np.float64(t.logprobs_T[step]))))
            total = total - weight * advantage * ratio * torch.log(mass) / num_tokens
        total.backward()
        found[i] = leaf.grad
    return found


@pytest.mark.parametrize("cap", [None, 2.0])
def test_the_reward_alone_gives_leave_one_out_policy_gradients(cap) -> None:
    """Also of a loop's tokens, which are masked from distillation, and of the stop, whichever id was sampled."""
    settings = ObjectiveSettings(reward={"verifier": "exact", "weight": 3.0}, distillation_weight=0.0, importance_cap=cap)
    logits = random_logits()
    found, _ = gradient(settings, logits)
    wanted = leave_one_out(logits, 3.0, cap)
    for i in found:
        assert torch.allclose(found[i], wanted[i], rtol=1e-6, atol=1e-9), i


def test_both_signals_add_up_and_either_end_is_the_signal_alone() -> None:
    logits = random_logits()
    reward = {"verifier": "exact", "weight": 2.0}
    both, metrics = gradient(ObjectiveSettings(reward=reward, distillation_weight=0.5), logits)
    teacher, _ = gradient(ObjectiveSettings(distillation_weight=0.5), logits)
    alone, _ = gradient(ObjectiveSettings(reward=reward, distillation_weight=0.0), logits)
    plain, _ = gradient(ObjectiveSettings(), logits)
    for i in both:
        assert torch.allclose(both[i], teacher[i] + alone[i], rtol=1e-9, atol=1e-12)
        assert torch.allclose(teacher[i], 0.5 * plain[i], rtol=1e-9, atol=1e-12)
    assert metrics.reward_signal.num_tokens == sum(len(t.token_ids) for t in BATCH)
    assert metrics.teacher_signal.num_tokens == metrics.reward_signal.num_tokens - 2  # the loop's tail
    assert metrics.reward_signal.pull > 0
    assert metrics.teacher_signal.pull > 0


@pytest.mark.parametrize(("when", "distilled"), [("failed", {1, 2, 5}), ("passed", {0, 3})])
def test_a_gate_distils_what_failed_or_passed_and_nothing_without_a_verdict(when, distilled) -> None:
    logits = random_logits()
    reward = {"verifier": "exact", "when": when}
    both, _ = gradient(ObjectiveSettings(reward=reward), logits)
    alone, _ = gradient(ObjectiveSettings(reward=reward, distillation_weight=0.0), logits)
    plain, _ = gradient(ObjectiveSettings(), logits)
    for i in both:
        wanted = plain[i] if i in distilled else torch.zeros_like(plain[i])
        assert torch.allclose(both[i] - alone[i], wanted, rtol=1e-9, atol=1e-12)
        assert (wanted.norm() > 0) == (i in distilled)


def test_a_gate_distils_where_the_teacher_is_right_or_nobody_knows() -> None:
    settings = ObjectiveSettings(reward={"verifier": "exact", "when": "teacher_right"}, distillation_weight=0.5)
    on = [replace(BATCH[0], prompt=replace(BATCH[0].prompt, teacher_right=right)) for right in (True, False, None)]
    assert [distillation_weight(rollout, settings) for rollout in on] == [0.5, 0.0, 0.5]


async def test_the_teachers_answers_are_judged_once_an_answer_that_did_not_end_is_not_right() -> None:
    golden = GoldenSet(
        answers={0: (4,), 1: (5,), 4: (9,)},
        finished={0: True, 1: True, 2: False, 3: True},
        reference=None,
        cached=True,
        key="",  # type: ignore[arg-type]
    )
    judges = Judges("exact", VerifierProcesses())
    try:
        right = await judge_teacher(judges, lambda ids: str(ids[0]), golden, {0: "4", 1: "4", 2: "4"}.get)
    finally:
        await judges.close()
    assert right == {0: True, 1: False, 2: False}, "of 3 no answer was kept, and 4 was not the teacher's"


def test_nothing_to_learn_from_is_refused() -> None:
    with pytest.raises(ValueError, match="distillation_weight 0 leaves nothing to learn from"):
        ObjectiveSettings(distillation_weight=0.0)
    with pytest.raises(ValueError, match="normalise divides by the spread"):
        RewardSettings(verifier="exact", baseline="none", normalise=True)
