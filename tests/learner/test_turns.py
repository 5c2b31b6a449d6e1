"""Conversations in the learner and before the teacher: what the environment said is read, never learned, never counted."""

from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from opd_governor.actors.learner.batching import build_micro_batches
from opd_governor.actors.learner.fields import LazyLogits
from opd_governor.actors.learner.objective import chunked_objective
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.teacher.conversation import of_sampled, spread_support
from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import LengthLimits, TokenScores
from tests.made_up import random_batch
from tests.tiny import build_tiny

BETWEEN = ((5, (40, 41, 42)), (11, (43,)))
LIMITS = LengthLimits(cap_tokens=32)


def conversations():
    return [replace(r, trajectory=replace(r.trajectory, observed=BETWEEN, num_turns=3)) for r in random_batch(3)]


@given(st.data())
@settings(max_examples=50, deadline=None)
def test_the_mask_finds_the_sampled_tokens_again(data):
    trajectory = random_batch(1)[0].trajectory
    places = sorted(data.draw(st.sets(st.integers(1, 16), max_size=5)))
    between = tuple((place, tuple(data.draw(st.lists(st.integers(90, 99), min_size=1, max_size=4)))) for place in places)
    held = replace(trajectory, observed=between)
    if held.mask_T is None:
        assert not between
        assert held.conversation_ids == trajectory.token_ids
        return
    ids_C = np.array(held.conversation_ids)
    assert tuple(ids_C[held.mask_T]) == trajectory.token_ids
    assert tuple(ids_C[~held.mask_T]) == tuple(token for _, ids in between for token in ids)
    assert held.conversation_ids[: places[0]] == trajectory.token_ids[: places[0]], "a turn's ids stay as the engine sampled them"
    assert held.answer_ids == trajectory.token_ids[places[-1] :]


def test_no_gradient_comes_from_what_the_environment_said(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(build_tiny(tmp_path / "student", seed=2), dtype=torch.float64)
    objective, rollouts = ObjectiveSettings(), conversations()
    (micro,) = build_micro_batches(rollouts, (), objective, LIMITS, micro_batch_tokens=4096, max_new_tokens=32)
    logits_BLV = model(micro.student.input_ids_BL).logits
    logits_BLV.retain_grad()
    own = LazyLogits(logits_BLV.flatten(0, 1)[micro.student.predictor_N], lambda logits: logits, ())
    loss, _ = chunked_objective(own, micro.fields, objective, torch.tensor([1]), chunk_tokens=7)
    loss.backward()
    mask_C = rollouts[0].trajectory.mask_T
    moved_BC = logits_BLV.grad[:, 2 : 2 + len(mask_C)].abs().sum(-1) > 0
    assert moved_BC[:, mask_C].all(), "every sampled token is learnt"
    assert not moved_BC[:, ~mask_C].any(), "no other one is"
    assert not logits_BLV.grad[:, :2].any()


def test_a_teacher_scores_a_conversation_in_one_pass_as_word_for_word(tmp_path):
    folder = build_tiny(tmp_path / "teacher", seed=3)
    trajectory = conversations()[0].trajectory
    trajectory = replace(trajectory, support_ids_TK=np.arange(32, dtype=np.int32).reshape(16, 2) + 4)
    request = ScoreRequest(trajectory.prompt.token_ids, trajectory.conversation_ids, spread_support(trajectory), top_k=3)
    (whole,) = TorchScorer(TeacherSettings(model=str(folder)), (1,)).score([request])
    scores = of_sampled(whole, trajectory.mask_T)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = trajectory.prompt.token_ids + trajectory.conversation_ids
    places = 3 + np.flatnonzero(trajectory.mask_T)
    for t, place in enumerate(places):
        with torch.inference_mode():
            logp_V = torch.log_softmax(model(torch.tensor([ids[:place]])).logits[0, -1], -1)
        assert abs(scores.sampled_logp_T[t] - logp_V[trajectory.token_ids[t]]) < 1e-4
        assert abs(scores.stop_logp_T[t] - logp_V[1]) < 1e-4
        assert list(scores.support_ids_TK[t, :2]) == list(trajectory.support_ids_TK[t])
        np.testing.assert_allclose(scores.support_logp_TK[t], logp_V[scores.support_ids_TK[t]], atol=1e-4)


def test_a_span_that_reaches_into_the_environments_text_compares_nothing():
    zeros = np.zeros(5, np.float32)
    scores = TokenScores("t", zeros, zeros, span_T=np.array([0, 1, 1, 2, 3], np.int32))
    kept = of_sampled(scores, np.array([True, True, False, True, True]))
    assert kept.span_T.tolist() == [0, -1, 2, 3]
