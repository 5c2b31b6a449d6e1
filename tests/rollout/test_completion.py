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


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 9])
@pytest.mark.parametrize("num_prompt", [1, 5])
async def test_the_students_own_top_ids_are_those_of_each_position_of_the_response(num_prompt: int, num_tokens: int) -> None:
    """From vLLM's flat log-probs of a prompt that ends before the response's last token, and of the token that follows."""
    from types import SimpleNamespace
    from typing import Any

    from vllm.logprobs import append_logprobs_for_next_position, create_prompt_logprobs, create_sample_logprobs

    from opd_governor.actors.rollout.engine import Engine

    draw = np.random.default_rng(0)
    prompt, response = ([int(i) for i in draw.integers(0, 9, n)] for n in (num_prompt, num_tokens))
    likeliest = [draw.permutation(9)[:3].tolist() for _ in range(num_prompt + num_tokens)]
    """Of the token at each place, the first of all excluded."""

    def row(flat: Any, token: int, place: int) -> None:
        append_logprobs_for_next_position(flat, [token, *likeliest[place]], [-1.0] * 4, [None] * 4, 1, 3)

    async def answer(ids: list[int], params: Any) -> Any:
        assert (params.prompt_logprobs, params.logprobs, params.temperature, params.max_tokens) == (3, 3, 1.0, 1)
        assert ids == [*prompt, *response[:-1]]
        within, last = create_prompt_logprobs(True), create_sample_logprobs(True)
        for place in range(1, len(ids)):
            row(within, ids[place], place)
        row(last, 0, len(ids))

        async def output() -> Any:
            return SimpleNamespace(prompt_logprobs=within, outputs=[SimpleNamespace(logprobs=last)])

        return output()

    engine = object.__new__(Engine)
    engine._add = answer  # type: ignore[method-assign]
    ids_TK = await engine.top_ids(prompt, response, 3)
    assert ids_TK.shape == (num_tokens, 3)
    assert ids_TK.tolist() == likeliest[num_prompt : num_prompt + num_tokens]
