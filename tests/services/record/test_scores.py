"""What a step's record says of teachers with other tokens or with something only they see."""

import numpy as np

from opd_governor.actors.trajectory import Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.record.scores import score_fields


def scored(num: int, **more) -> ScoredRollout:
    zeros = np.zeros(num, np.float32)
    trajectory = Trajectory(Prompt(0, (1,)), (5,) * num, zeros, "stop", 64, 1, 0, 0)
    return ScoredRollout(trajectory, TokenScores("t", zeros, zeros, **more))


def test_a_plain_teacher_adds_no_field():
    assert score_fields([scored(3), scored(2)]) == {}
    assert score_fields([]) == {}


def test_shares_are_over_all_tokens():
    one = scored(4, span_T=np.array([0, 0, 1, -1]), canonical=False, num_unaligned_bytes=3)
    two = scored(4, span_T=np.arange(4), copied_T=np.array([True, False, False, True]))
    assert score_fields([one, two, scored(5)]) == {
        "copied": 0.5,
        "spans_per_token": 6 / 8,
        "unaligned": 1 / 8,
        "unaligned_bytes": 1.5,
        "noncanonical": 0.5,
    }
