"""scoring.py against loops written from the formula in float64."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.teacher.scoring import PAD_ID, score_positions


def identity(logits_CV: torch.Tensor) -> torch.Tensor:
    return logits_CV


def brute_logp(logits_NV: torch.Tensor) -> list[list[float]]:
    """log_softmax with nothing but float64 and loops."""
    rows = []
    for row in logits_NV.double().tolist():
        top = max(row)
        norm = top + math.log(sum(math.exp(x - top) for x in row))
        rows.append([x - norm for x in row])
    return rows


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**20),
    n=st.integers(1, 7),
    vocabulary=st.integers(3, 12),
    top_k=st.integers(0, 13),
    given_k=st.integers(0, 4),
    chunk=st.integers(1, 9),
    scale=st.sampled_from([0.1, 3.0, 60.0]),
)
def test_sampled_stop_and_support_match_the_formula(seed, n, vocabulary, top_k, given_k, chunk, scale):
    draw = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(n, vocabulary, generator=draw)
    sampled_N = torch.randint(vocabulary, (n,), generator=draw)
    given_NK = torch.randint(PAD_ID, vocabulary, (n, given_k), generator=draw)
    stop_ids = (0, vocabulary - 1)

    scores = score_positions(logits_NV, identity, sampled_N, stop_ids, top_k=top_k, given_ids_NK=given_NK, chunk_tokens=chunk)

    expected = brute_logp(logits_NV)
    assert scores.support_ids_NK.shape == scores.support_logp_NK.shape == (n, given_k + min(top_k, vocabulary))
    for i in range(n):
        assert scores.sampled_logp_N[i].item() == pytest.approx(expected[i][sampled_N[i]], rel=1e-5, abs=1e-5)
        stop = math.log(sum(math.exp(expected[i][s]) for s in stop_ids) or math.ulp(0))
        assert max(scores.stop_logp_N[i].item(), -600) == pytest.approx(max(stop, -600), rel=1e-5, abs=1e-5)
        assert scores.support_ids_NK[i, :given_k].tolist() == given_NK[i].tolist()
        best = sorted(range(vocabulary), key=lambda v: -logits_NV[i, v])[:top_k]
        wanted = [PAD_ID if v in given_NK[i] else v for v in best]
        assert scores.support_ids_NK[i, given_k:].tolist() == wanted
        for token, logp in zip(scores.support_ids_NK[i].tolist(), scores.support_logp_NK[i].tolist(), strict=True):
            assert logp == (pytest.approx(expected[i][token], rel=1e-5, abs=1e-5) if token != PAD_ID else -math.inf)


def test_a_chunk_is_the_most_that_ever_becomes_logits():
    seen = []

    def head(hidden_CD: torch.Tensor) -> torch.Tensor:
        seen.append(len(hidden_CD))
        return hidden_CD @ weight_DV

    weight_DV = torch.randn(4, 11)
    hidden_ND = torch.randn(10, 4)
    whole = score_positions(hidden_ND, lambda x: x @ weight_DV, torch.zeros(10, dtype=torch.long), (1,), top_k=3, chunk_tokens=10)
    chunked = score_positions(hidden_ND, head, torch.zeros(10, dtype=torch.long), (1,), top_k=3, chunk_tokens=4)
    assert seen == [4, 4, 2]
    torch.testing.assert_close(chunked.support_logp_NK, whole.support_logp_NK)
    torch.testing.assert_close(chunked.stop_logp_N, whole.stop_logp_N)


def test_bfloat16_logits_are_normalised_in_float32():
    logits_NV = torch.randn(3, 2000).bfloat16()
    scores = score_positions(logits_NV, identity, torch.tensor([0, 1, 2]), (5,))
    expected = torch.log_softmax(logits_NV.double(), -1)[torch.arange(3), torch.arange(3)]
    assert scores.sampled_logp_N.dtype == torch.float32
    torch.testing.assert_close(scores.sampled_logp_N.double(), expected, atol=1e-5, rtol=0)


def test_ids_outside_the_vocabulary_are_never_invented():
    """A student padded to a larger vocabulary may offer ids its teacher does not have."""
    logits_NV = torch.zeros(1, 4)
    scores = score_positions(logits_NV, identity, torch.tensor([6]), (3, 9), given_ids_NK=torch.tensor([[1, 5]]))
    assert scores.sampled_logp_N.tolist() == [-math.inf]
    assert scores.stop_logp_N.item() == pytest.approx(math.log(1 / 4))
    assert scores.support_ids_NK.tolist() == [[1, PAD_ID]]
    with pytest.raises(ValueError, match=r"stop ids \(9,\).*vocabulary of 4"):
        score_positions(logits_NV, identity, torch.tensor([0]), (9,))


def test_nan_logits_come_out_as_nan():
    scores = score_positions(torch.tensor([[0.0, np.nan, 1.0]]), identity, torch.tensor([0]), (2,))
    assert scores.sampled_logp_N.isnan().all()
    assert scores.stop_logp_N.isnan().all()


def test_no_positions_give_empty_scores_of_the_right_width():
    scores = score_positions(torch.zeros(0, 5), identity, torch.zeros(0, dtype=torch.long), (1,), top_k=2)
    assert scores.sampled_logp_N.shape == (0,)
    assert scores.support_logp_NK.shape == (0, 2)
