"""Spans of a teacher with another tokenizer in the loss, against enumeration in float64."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor

from opd_governor.actors.learner.batching import build_micro_batches
from opd_governor.actors.learner.objective import token_losses
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.spans import chunks, reward_to_go
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory

VOCABULARY, LENGTH = 3, 3


def test_its_expected_gradient_is_that_of_the_exact_kl_of_the_text() -> None:
    """A span of three tokens of a vocabulary of three, all 27 texts; the teacher is any distribution over texts."""
    torch.manual_seed(0)
    tables = [torch.randn(*[VOCABULARY] * (i + 1), dtype=torch.float64, requires_grad=True) for i in range(LENGTH)]
    teacher = torch.randn(VOCABULARY**LENGTH, dtype=torch.float64).log_softmax(0)
    texts = list(product(range(VOCABULARY), repeat=LENGTH))

    def student(text: tuple[int, ...]) -> Tensor:
        return torch.stack([tables[i][text[:i]].log_softmax(-1)[text[i]] for i in range(LENGTH)])

    logps = [student(text) for text in texts]
    exact = sum((logp.sum().exp() * (logp.sum() - teacher[n])) for n, logp in enumerate(logps))
    wanted = torch.autograd.grad(exact, tables, retain_graph=True)

    start = torch.tensor([True, False, False])
    surrogate = torch.zeros((), dtype=torch.float64)
    for n, logp in enumerate(logps):
        gap = teacher[n] / LENGTH - logp.detach()  # the teacher's log-prob of the text, shared out
        advantage = reward_to_go(gap, logp.detach(), start)
        surrogate = surrogate - logp.sum().exp().detach() * (advantage * logp).sum()
    found = torch.autograd.grad(surrogate, tables)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_each_span_for_itself_and_single_tokens_untouched() -> None:
    gap, logp = torch.randn(6, dtype=torch.float64), -torch.rand(6, dtype=torch.float64)
    start = torch.tensor([True, True, False, False, True, True])
    found = reward_to_go(gap, logp, start)
    middle = gap[1:4].sum() + torch.stack([torch.zeros(()), logp[1], logp[1] + logp[2]])
    torch.testing.assert_close(found, torch.cat([gap[:1], middle, gap[4:]]).double())
    assert reward_to_go(gap, logp, torch.ones(6, dtype=torch.bool)) is gap
    assert reward_to_go(gap, logp, None) is gap


@pytest.mark.parametrize("chunk_tokens", [1, 2, 3, 7, 100])
def test_no_chunk_cuts_a_span_and_none_is_lost(chunk_tokens: int) -> None:
    start = torch.tensor([True, False, True, True, False, False, False, True, True, False])
    cut = chunks(len(start), chunk_tokens, start)
    assert [i for index in cut for i in range(index.start, index.stop)] == list(range(len(start)))
    assert all(start[index.start] for index in cut)
    assert chunks(0, 4, None) == [slice(0, 0)]
    assert chunks(5, 2, None) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def scored(span: list[int], sampled_only: list[bool], seed: int = 0) -> ScoredRollout:
    draw = np.random.default_rng(seed)
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
    )
    return ScoredRollout(trajectory, scores)


def losses_of(rollout: ScoredRollout, settings: ObjectiveSettings) -> tuple[Tensor, Tensor, Tensor]:
    (micro,) = build_micro_batches([rollout], [], settings, LengthLimits(64), micro_batch_tokens=1024, max_new_tokens=64)
    torch.manual_seed(1)
    logits = torch.randn(len(micro.fields), 9, dtype=torch.float64)
    losses = token_losses(logits, micro.fields, settings, torch.tensor([1]))
    return losses.loss_N, micro.fields.weight_N, losses.kl_N


def test_a_dense_loss_gives_way_to_the_estimator_where_a_span_is_several_tokens() -> None:
    rollout = scored([0, 1, 1, 2, 3], [False, True, True, True, False])
    no_weight = {"importance_cap": None}
    dense, _, _ = losses_of(rollout, ObjectiveSettings(support="teacher", **no_weight))
    sampled, _, kl = losses_of(rollout, ObjectiveSettings(support="sampled", **no_weight))
    torch.testing.assert_close(dense[1:4], sampled[1:4])
    assert not torch.isclose(dense[[0, 4]], sampled[[0, 4]]).any()
    # what the metric adds up is each span's log-ratio, told once
    torch.testing.assert_close(kl[1:3].sum(), sampled[1])


def test_what_cannot_be_compared_is_left_out_of_the_loss_and_of_its_mean() -> None:
    _, weight, _ = losses_of(scored([0, -1, -1, 1], [True] * 4), ObjectiveSettings())
    assert weight.tolist() == [0.5, 0, 0, 0.5]
