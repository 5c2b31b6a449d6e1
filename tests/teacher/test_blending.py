"""Several teachers of one domain: their mixture, or no score at all."""

import numpy as np
import pytest

from opd_governor.actors.teacher.blending import blend_scores
from opd_governor.actors.teacher.pool import Support
from opd_governor.actors.trajectory import TokenScores
from tests.teacher.fake_teacher import FakeTeacher, build, settings, trajectory


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


async def test_teachers_own_supports_cannot_be_blended():
    teachers = [(settings(name="a"), [FakeTeacher()]), (settings(name="b"), [FakeTeacher()])]
    with pytest.raises(ValueError, match=r"\['a', 'b'\] blend only on the same ids"):
        build(teachers, support=Support(top_k=8), domains={""})


def test_an_id_one_vocabulary_lacks_has_no_probability_there():
    def scores(ids, logps):
        return TokenScores("t", np.zeros(1, np.float32), np.zeros(1, np.float32), np.array([ids], np.int32), np.array([logps], np.float32))

    blended = blend_scores([scores([4, -1], [-1, -np.inf]), scores([4, 6], [-1, -2])], [1, 1])
    assert blended.support_ids_TK.tolist() == [[4, 6]]
    np.testing.assert_allclose(blended.support_logp_TK, [[-1, -2 + np.log(0.5)]], rtol=1e-6)
