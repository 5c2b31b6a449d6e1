"""A teacher's log-probs on sampled tokens, in chunks of positions (pure torch).

Shapes: N = response tokens of a whole batch, one after the other; D = hidden width; V = vocabulary; C = positions of one chunk;
K = support size. A [N, V] array never exists, only [C, V] in float32. All log-probs are natural logs at temperature 1.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from opd_governor.actors.trajectory import REST_ID, Rest

PAD_ID = -1
"""Fills ragged rows of a support; its log-prob is -inf."""


@dataclass(frozen=True, slots=True)
class PositionScores:
    """Scores of N positions, float32; the support has no columns where none was asked for."""

    sampled_logp_N: torch.Tensor
    stop_logp_N: torch.Tensor
    support_ids_NK: torch.Tensor
    support_logp_NK: torch.Tensor


@torch.inference_mode()
def score_positions(
    hidden_ND: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    sampled_N: torch.Tensor,
    stop_ids: Sequence[int],
    *,
    top_k: int = 0,
    given_ids_NK: torch.Tensor | None = None,
    chunk_tokens: int = 1024,
    rest: Rest | None = None,
) -> PositionScores:
    """Score each sampled token, the stop class and a support at every position.

    `head` maps [C, D] hidden states to [C, V] logits of any float type; with logits in hand pass them as `hidden_ND` and the
    identity as `head`. Row n must be the state that *predicts* sampled_N[n]. `stop_ids` count as one event: their probabilities
    are summed. The support has the columns of `given_ids_NK` first, unchanged, then the top `top_k` ids in falling order of
    probability (all V where the vocabulary is smaller); a top id that its row already gives is replaced by PAD_ID. Given ids that
    this vocabulary does not have become PAD_ID; a sampled id that it does not have scores -inf. `rest` adds a last column REST_ID: the
    log-prob of all ids that are neither sampled nor in the support (nor, without_stops, stop ids), summed id by id, so that it keeps its
    digits however small it is.

    >>> logits_NV = torch.tensor([[0.0, 0.0, 0.0, 0.0]])
    >>> scores = score_positions(logits_NV, lambda x: x, torch.tensor([2]), stop_ids=[0, 1])
    >>> scores.sampled_logp_N.exp().item(), scores.stop_logp_N.exp().item()
    (0.25, 0.5)
    """
    assert chunk_tokens > 0, chunk_tokens
    starts = range(0, max(len(hidden_ND), 1), chunk_tokens)  # an empty batch still passes once, for the shapes
    chunks = [
        _score_chunk(
            head(hidden_ND[start : start + chunk_tokens]).float(),
            sampled_N[start : start + chunk_tokens],
            stop_ids,
            top_k,
            None if given_ids_NK is None else given_ids_NK[start : start + chunk_tokens],
            rest,
        )
        for start in starts
    ]
    sampled, stop, ids, logps = zip(*chunks, strict=True)
    return PositionScores(torch.cat(sampled), torch.cat(stop), torch.cat(ids), torch.cat(logps))


def _score_chunk(
    logits_CV: torch.Tensor,
    sampled_C: torch.Tensor,
    stop_ids: Sequence[int],
    top_k: int,
    given_ids_CK: torch.Tensor | None,
    rest: Rest | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    vocabulary = logits_CV.shape[-1]
    known_stop_ids = [stop_id for stop_id in dict.fromkeys(stop_ids) if 0 <= stop_id < vocabulary]
    if not known_stop_ids:
        raise ValueError(f"stop ids {tuple(stop_ids)}: none is in the teacher's vocabulary of {vocabulary} tokens")
    logp_CV = logits_CV.log_softmax(-1)  # the learner's own arithmetic: equal logits give log-probs equal to the last bit

    def logp_at(ids_CK: torch.Tensor) -> torch.Tensor:
        logp_CK = logp_CV.gather(-1, ids_CK.clamp(0, vocabulary - 1))
        return logp_CK.masked_fill((ids_CK < 0) | (ids_CK >= vocabulary), -torch.inf)

    sampled_logp_C = logp_at(sampled_C[:, None])[:, 0]
    stop_logp_C = logp_CV[:, known_stop_ids].logsumexp(-1)
    ids_CK = sampled_C.new_empty(len(sampled_C), 0) if given_ids_CK is None else given_ids_CK.long()
    ids_CK = ids_CK.masked_fill(ids_CK >= vocabulary, PAD_ID)
    if top_k > 0:
        top_ids_CK = logits_CV.topk(min(top_k, vocabulary), dim=-1).indices
        repeated_CK = (top_ids_CK[:, :, None] == ids_CK[:, None, :]).any(-1)
        ids_CK = torch.cat([ids_CK, top_ids_CK.masked_fill(repeated_CK, PAD_ID)], dim=-1)
    support_logp_CK = logp_at(ids_CK)
    if rest is not None:
        inside_CX = torch.cat([ids_CK, sampled_C[:, None]], dim=-1)
        if rest == "without_stops":
            inside_CX = torch.cat([inside_CX, sampled_C.new_tensor(known_stop_ids).expand(len(sampled_C), -1)], dim=-1)
        # An id outside the vocabulary (padding too) has no log-prob to take out: the sampled one is taken out again instead.
        known_CX = torch.where((inside_CX >= 0) & (inside_CX < vocabulary), inside_CX, sampled_C[:, None].clamp(0, vocabulary - 1))
        rest_logp_C1 = logp_CV.scatter(-1, known_CX, -torch.inf).logsumexp(-1, keepdim=True)
        ids_CK = torch.cat([ids_CK, torch.full_like(sampled_C, REST_ID)[:, None]], dim=-1)
        support_logp_CK = torch.cat([support_logp_CK, rest_logp_C1], dim=-1)
    return sampled_logp_C, stop_logp_C, ids_CK, support_logp_CK
