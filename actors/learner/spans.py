"""A teacher with another tokenizer speaks of spans of tokens, not of tokens: what that changes in the loss. Pure torch.

Shapes: N tokens of a micro-batch, C of a chunk.
"""

import torch
from torch import Tensor


def reward_to_go(gap_C: Tensor, action_logp_C: Tensor, start_C: Tensor | None) -> Tensor:
    """The advantage of each token from the log-ratio of its span. `start_C`: where spans begin; None: everywhere.

    A span's log-ratio D = log pT(span) - log pS(span), the sum of `gap_C` over it, is a reward at its end. What its earlier tokens
    have cost by then is past for a later one: its advantage is D plus the student's own log-probs of the tokens before it in the
    span. Its expected policy gradient is that of the exact reverse KL on the span's text, with less variance than D for each token
    of the span. Where every span is one token this is `gap_C` itself. Derivation: README of actors/teacher.
    """
    if start_C is None or bool(start_C.all()):
        return gap_C
    first_C = start_C.clone()
    first_C[:1] = True
    span_C = first_C.cumsum(0) - 1
    num_spans = int(span_C[-1]) + 1
    total_S = gap_C.new_zeros(num_spans, dtype=torch.float64).index_add_(0, span_C, gap_C.double())
    before_C = action_logp_C.double().cumsum(0) - action_logp_C.double()
    return (total_S[span_C] + before_C - before_C[first_C][span_C]).to(gap_C.dtype)


def chunks(num_tokens: int, chunk_tokens: int, start_N: Tensor | None) -> list[slice]:
    """Slices of at most `chunk_tokens`, or a little more where that would cut a span."""
    begins = [True] * num_tokens if start_N is None else start_N.tolist()
    slices, start = [], 0
    while start < max(num_tokens, 1):
        end = min(start + chunk_tokens, num_tokens)
        while end < num_tokens and not begins[end]:
            end += 1
        slices.append(slice(start, end))
        start = max(end, start + 1)
    return slices
