"""Which tokens count: the horizon, weights by position, and the overlong penalty on the loop that earned it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError
from test_batching import learn, rollout

from opd_governor.actors.learner.batching import MicroBatch, build_micro_batches
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.weights import overlong_terms, position_weights, token_mask, token_weights, within_horizon
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout

STOP_IDS = (3, 4)


def build(rollouts: list[ScoredRollout], objective: ObjectiveSettings, golden: list[Prompt] | None = None, **limits) -> list[MicroBatch]:
    given = LengthLimits(cap_tokens=40, **limits)
    return build_micro_batches(rollouts, golden or [], objective, given, micro_batch_tokens=64, max_new_tokens=40, stop_ids=STOP_IDS)


@given(ids=st.lists(st.integers(0, 9), max_size=30), horizon=st.none() | st.integers(1, 40))
@hypothesis_settings(deadline=None)
def test_a_horizon_keeps_the_first_tokens_and_every_stop(ids, horizon):
    kept = within_horizon(ids, horizon, STOP_IDS)
    assert kept.tolist() == [float(horizon is None or t < horizon or token in STOP_IDS) for t, token in enumerate(ids)]


def test_a_step_with_a_horizon_learns_from_those_tokens_alone():
    """A late stop is among them, and of a golden answer too: its weight is a share of the golden tokens that are left."""
    stopped = rollout(1, 3, 12)
    assert stopped.trajectory.token_ids[-1] in STOP_IDS
    golden = [Prompt(0, (5,), golden_ids=(6, 7, 8, 9, 4))]
    objective = ObjectiveSettings(horizon_tokens=4)
    fields = [m.fields for m in build([stopped], objective, golden, golden_weight=0.5)]
    weights = torch.cat([f.weight_N[f.rollout_N] for f in fields]).tolist()
    assert weights == pytest.approx([1 / 5] * 4 + [0] * 7 + [1 / 5])
    shares = torch.cat([f.golden_weight_N[~f.rollout_N] for f in fields]).tolist()
    assert shares == pytest.approx([0.5 / 5] * 4 + [0.5 / 5])
    shorter = replace(stopped, trajectory=replace(stopped.trajectory, loop_onset=2, loop_period=1))
    assert token_mask(shorter.trajectory, objective, 0.0, STOP_IDS).tolist() == [1.0] * 3 + [0.0] * 9


def test_position_weights_follow_the_papers_formula():
    scored = rollout(2, 3, 20)
    gap = [abs(float(t) - float(s)) for t, s in zip(scored.scores.sampled_logp_T, scored.trajectory.logprobs_T, strict=True)]
    expected = [1 + 0.5 * (1 - sum(gap[:t]) / sum(gap)) for t in range(20)]
    weights = position_weights(scored.scores, scored.trajectory, 0.5)
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    assert (np.diff(weights) <= 1e-12).all()
    assert weights[0] == pytest.approx(1.5)
    plain = torch.cat([m.fields.weight_N for m in build([scored], ObjectiveSettings())])
    weighed = torch.cat([m.fields.weight_N for m in build([scored], ObjectiveSettings(position_gamma=0.5))])
    torch.testing.assert_close(weighed, (plain * torch.tensor(expected)).float(), rtol=1e-5, atol=1e-7)
    with pytest.raises(ValidationError, match="position_gamma needs log-probs"):
        ObjectiveSettings(support="full", position_gamma=0.5)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
def test_a_loop_pays_for_the_length_it_made_and_what_came_before_does_not(reduction):
    looped, plain = rollout(1, 3, 40, reason="repetition", onset=8, period=2).trajectory, rollout(2, 3, 40, reason="length").trajectory
    objective = ObjectiveSettings(overlong_weight=0.7, reduction=reduction)
    weights, whole = (token_weights([token_mask(t, objective, tail) for t in (looped, plain)], reduction, 40.0) for tail in (0.0, 1.0))
    overlong, tail = overlong_terms(looped, objective, weights[0], whole[0])
    assert overlong.tolist() == [0.0] * 10 + [-0.7] * 30
    assert tail[:10].tolist() == [0.0] * 10
    np.testing.assert_allclose(weights[0][10:] + tail[10:], whole[0][10:])
    overlong, tail = overlong_terms(plain, objective, weights[1], whole[1])
    assert overlong.tolist() == [-0.7] * 40
    assert not tail.any()


def test_the_gradient_of_a_masked_loop_is_that_of_the_penalty_alone():
    looped = rollout(1, 3, 40, reason="repetition", onset=8, period=2)
    objective = ObjectiveSettings(overlong_weight=0.7, importance_cap=None)
    with_tail, grad = learn(build([looped], objective, loop_tail_weight=0.0), objective)
    without, other = learn(build([looped], ObjectiveSettings(importance_cap=None), loop_tail_weight=0.0), objective)
    # ratio 1: the penalty adds 0.7 x weight for each of the 30 tokens of the tail, each 1/40 of the batch
    assert with_tail - without == pytest.approx(0.7 * 30 / 40, rel=1e-5)
    assert (grad - other).norm() > 1e-3
