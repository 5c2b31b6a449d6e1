"""What a batch makes of scores from a teacher with another tokenizer: which tokens count, and which take the sampled estimator."""

import numpy as np
import torch
from torch import Tensor

from opd_governor.actors.learner.batching import build_micro_batches
from opd_governor.actors.learner.objective import token_losses
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory


def scored(span: list[int], sampled_only: list[bool], copied: list[bool] | None = None) -> ScoredRollout:
    draw = np.random.default_rng(0)
    num = len(span)
    trajectory = Trajectory(
        Prompt(0, (3,)), tuple(draw.integers(2, 8, num).tolist()), -draw.random(num).astype(np.float32), "length", 64, 1, 0, 0
    )
    support = draw.integers(0, 8, (num, 3)).astype(np.int32)
    scores = TokenScores(
        "t",
        -draw.random(num).astype(np.float32),
        np.full(num, -5, np.float32),
        support_ids_TK=support,
        support_logp_TK=np.full(support.shape, -2.5, np.float32),
        span_T=np.array(span, np.int32),
        sampled_only_T=np.array(sampled_only),
        copied_T=None if copied is None else np.array(copied),
    )
    return ScoredRollout(trajectory, scores)


def losses_of(rollout: ScoredRollout, settings: ObjectiveSettings) -> tuple[Tensor, Tensor]:
    (micro,) = build_micro_batches([rollout], [], settings, LengthLimits(64), micro_batch_tokens=1024, max_new_tokens=64)
    torch.manual_seed(1)
    losses = token_losses(torch.randn(len(micro.fields), 9, dtype=torch.float64), micro.fields, settings, torch.tensor([1]))
    return losses.loss_N, micro.fields.weight_N


def test_a_dense_loss_gives_way_to_the_estimator_where_a_span_is_several_tokens() -> None:
    rollout = scored([0, 1, 1, 2, 3], [False, True, True, True, False])
    dense, _ = losses_of(rollout, ObjectiveSettings(support="teacher", importance_cap=None))
    sampled, _ = losses_of(rollout, ObjectiveSettings(support="sampled", importance_cap=None))
    torch.testing.assert_close(dense[1:4], sampled[1:4])
    assert not torch.isclose(dense[[0, 4]], sampled[[0, 4]]).any()


def test_what_cannot_be_compared_is_left_out_of_the_loss_and_of_its_mean() -> None:
    _, weight = losses_of(scored([0, -1, -1, 1], [True] * 4), ObjectiveSettings())
    assert weight.tolist() == [0.5, 0, 0, 0.5]


def test_copies_are_kept_or_masked() -> None:
    rollout = scored([0, 1, 2, 3], [False] * 4, copied=[False, True, True, False])
    assert losses_of(rollout, ObjectiveSettings())[1].tolist() == [0.25] * 4
    assert losses_of(rollout, ObjectiveSettings(copied="mask"))[1].tolist() == [0.5, 0, 0, 0.5]
