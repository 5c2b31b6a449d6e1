"""From vLLM's flat log-probs to arrays."""

import numpy as np
import pytest

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("top_k", [0, 1, 4])
@pytest.mark.parametrize("num_tokens", [0, 1, 30])
def test_flat_logprobs_give_what_vllms_dictionaries_give(top_k: int, num_tokens: int) -> None:
    from vllm.logprobs import FlatLogprobs
    from vllm.outputs import CompletionOutput

    from opd_governor.actors.rollout.engine import _completion

    draw = np.random.default_rng(top_k)
    flat, sampled = FlatLogprobs(), draw.integers(0, 6, num_tokens).tolist()
    for token in sampled:
        likeliest = draw.permutation(6)[:top_k].tolist()
        flat.append_fast([token, *likeliest], draw.normal(size=1 + top_k).tolist(), range(1 + top_k), [None] * (1 + top_k))  # type: ignore[arg-type]
    completion = _completion(CompletionOutput(0, "", sampled, None, flat, finish_reason="stop"), 3)

    assert completion.token_ids == tuple(sampled)
    assert completion.logprobs_T.tolist() == [np.float32(flat.logprobs[start]) for start in flat.start_indices]
    assert completion.logprobs_T.dtype == np.float32
    rows = [list(flat[position]) for position in range(num_tokens)]  # dictionaries: an id once, the sampled one first
    if top_k == 0 or num_tokens == 0:
        assert completion.top_ids_TK is None
    else:
        assert completion.top_ids_TK is not None
        width = max(map(len, rows))
        assert completion.top_ids_TK.tolist() == [row + [-1] * (width - len(row)) for row in rows]
