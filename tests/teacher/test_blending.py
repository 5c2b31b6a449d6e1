"""Several teachers of one domain: their mixture, or no score at all."""

from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from opd_governor.actors.teacher.blending import blend_scores
from opd_governor.actors.teacher.pool import Support
from opd_governor.actors.teacher.scorers import TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import Prompt, TokenScores
from tests.teacher.fake_teacher import FakeTeacher, build, settings, trajectory
from tests.tiny import build_tiny


async def test_several_teachers_of_a_domain_are_blended_as_a_mixture():
    one, two = FakeTeacher(logp=-1), FakeTeacher(logp=-3)
    pool = build([(settings(name="a", weight=3), [one]), (settings(name="b", weight=1), [two])], support=Support(student=True))
    (scores,) = await pool.score([trajectory()])
    mixture = np.log(0.75 * np.exp(-1) + 0.25 * np.exp(-3))
    assert scores.teacher == "a+b"
    np.testing.assert_allclose(scores.sampled_logp_T, mixture, rtol=1e-6)
    np.testing.assert_allclose(scores.stop_logp_T, mixture - 1, rtol=1e-6)
    np.testing.assert_allclose(scores.support_logp_TK, mixture, rtol=1e-6)
    assert scores.support_logp_TK.dtype == np.float32


async def test_half_a_blend_is_unscored():
    one, two = FakeTeacher(), FakeTeacher(faults=[np.nan])
    pool = build([(settings(name="a"), [one]), (settings(name="b"), [two])])
    assert await pool.score([trajectory()]) == [None]


async def test_teachers_own_supports_are_blended_on_the_ids_of_all(tmp_path):
    """The mixture's log-prob at every id that one of them gave, against both models' own float64 distributions."""
    folders = [build_tiny(tmp_path / name, seed=seed) for name, seed in (("a", 1), ("b", 2))]
    weights, stops, response, prompt = (3.0, 1.0), (1,), (5, 9, 30, 1), (7, 8)

    class Local:
        def __init__(self, folder):
            self.scorer = TorchScorer(TeacherSettings(model=str(folder)), stops)

        async def score(self, requests):
            return "process", self.scorer.score(requests)

        async def ping(self):
            return "process"

    teachers = [
        (TeacherSettings(name=folder.name, model=str(folder), weight=weight), [Local(folder)])
        for folder, weight in zip(folders, weights, strict=True)
    ]
    pool = build(teachers, support=Support(top_k=4), domains={""})
    (scores,) = await pool.score([replace(trajectory(), prompt=Prompt(0, prompt), token_ids=response, logprobs_T=np.zeros(4, np.float32))])

    whole = []
    for folder in folders:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        with torch.inference_mode():
            whole.append(model(torch.tensor([prompt + response])).logits[0, 1:5].log_softmax(-1).numpy())
    mixture = np.log(0.75 * np.exp(whole[0]) + 0.25 * np.exp(whole[1]))
    top = [set(np.argsort(-logp_TV[row])[:4].tolist()) for logp_TV in whole for row in range(4)]
    for row in range(4):
        named = [i for i in scores.support_ids_TK[row].tolist() if i >= 0]
        assert set(named) == top[row] | top[4 + row]
        assert len(named) == len(set(named))
        given = scores.support_logp_TK[row][scores.support_ids_TK[row] >= 0]
        np.testing.assert_allclose(given, mixture[row, named], atol=1e-4)
    np.testing.assert_allclose(scores.sampled_logp_T, mixture[np.arange(4), response], atol=1e-4)


def test_teachers_with_other_tokenizers_are_mixed_token_by_token_where_all_can_compare():
    def scores(span, logps, sampled_only):
        stop = np.full(5, -4, np.float32)
        return TokenScores("t", np.array(logps, np.float32), stop, span_T=np.array(span, np.int32), sampled_only_T=np.array(sampled_only))

    one = scores([0, 0, 1, 2, 3], [-1, -1, -2, -3, -1], [True, True, False, False, False])
    two = scores([0, 1, 1, -1, 2], [-2, -0.5, -0.5, 0, -3], [False, True, True, True, False])
    same = TokenScores("s", np.full(5, -1, np.float32), np.full(5, -4, np.float32))
    mixed = blend_scores([one, two, same], [1, 1, 2])
    assert mixed.span_T.tolist() == [0, 1, 1, -1, 2]
    assert mixed.sampled_only_T.tolist() == [True, True, True, True, False]
    expected = np.log(np.exp(one.sampled_logp_T) / 4 + np.exp(two.sampled_logp_T) / 4 + np.exp(-1) / 2)
    np.testing.assert_allclose(mixed.sampled_logp_T, expected, rtol=1e-6)


def test_an_id_one_vocabulary_lacks_has_no_probability_there():
    def scores(ids, logps):
        return TokenScores("t", np.zeros(1, np.float32), np.zeros(1, np.float32), np.array([ids], np.int32), np.array([logps], np.float32))

    blended = blend_scores([scores([4, -1], [-1, -np.inf]), scores([4, 6], [-1, -2])], [1, 1])
    assert blended.support_ids_TK.tolist() == [[4, 6]]
    np.testing.assert_allclose(blended.support_logp_TK, [[-1, -2 + np.log(0.5)]], rtol=1e-6)


async def test_a_prompts_own_weights_come_before_the_teachers_and_a_weight_of_0_asks_nobody():
    one, two = FakeTeacher(logp=-1), FakeTeacher(logp=-3)
    pool = build([(settings(name="a"), [one]), (settings(name="b"), [two])])
    first, second = (trajectory(), trajectory())
    first = replace(first, prompt=replace(first.prompt, teacher_weights=(("a", 3.0),)))
    second = replace(second, prompt=replace(second.prompt, teacher_weights=(("a", 0.0),)))
    blend, alone = await pool.score([first, second])
    np.testing.assert_allclose(blend.sampled_logp_T, np.log(0.75 * np.exp(-1) + 0.25 * np.exp(-3)), rtol=1e-6)
    assert alone.teacher == "b"
    np.testing.assert_allclose(alone.sampled_logp_T, -3, rtol=1e-6)
