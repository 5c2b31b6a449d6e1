"""The thinking part of a response, and the budget that ends it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams

from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.weights import token_mask
from opd_governor.actors.rollout.logits import ThinkingBudget
from opd_governor.actors.rollout.thinking import Parts, parts_of
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.inputs.thinking import thinking_ids
from opd_governor.services.record.batch import Batch
from opd_governor.services.record.thinking import thinking_fields
from tests.rollout.test_logits import CPU, NUM_ROWS, VOCAB, batch

BEGIN, END = 7, 8
MARKS = (BEGIN, END)


@pytest.mark.parametrize(
    ("prompt", "response", "parts"),
    [
        ([1, BEGIN], [5, 5, END, 9], Parts(3)),
        ([1], [BEGIN, 5, END, 9], Parts(3)),
        ([1], [5, 6, 9], Parts(None)),
        ([1, BEGIN], [5, 5], Parts(2)),
        ([1, BEGIN, 5, END], [5, 6], Parts(None)),  # an earlier turn's, or one that the template leaves empty
        ([1], [5, END, 9], Parts(2)),
        ([1, BEGIN], [5, 5, 5, 5, END, 9, END], Parts(5, forced=4)),
        ([1], [BEGIN, 5, 5, 5, 5, END, 9], Parts(6, forced=5)),
        ([1], [5, 5, 5, 5, 5, END, 9], Parts(6)),
    ],
)
def test_the_thinking_part_ends_with_its_mark_wherever_it_began(prompt, response, parts) -> None:
    assert parts_of(MARKS, 4, prompt, response) == parts
    assert parts_of(MARKS, None, prompt, response) == Parts(parts.num_thinking)
    assert parts_of(None, 4, prompt, response) == Parts(None)


@given(st.lists(st.integers(0, 11), max_size=30), st.integers(1, 6), st.booleans())
def test_a_budget_is_never_exceeded_and_only_its_own_end_is_forced(sampled, budget, prompt_begins) -> None:
    prompt = [1, BEGIN] if prompt_begins else [1]
    processor, output_ids = ThinkingBudget(None, CPU, False), []
    params = SamplingParams(extra_args={"thinking_budget": (BEGIN, END, budget)})
    processor.update_state(batch(added=[(2, params, output_ids)]))
    processor._watched[2][0]._start = 0 if prompt_begins else None  # the batch of these tests has a prompt of its own
    forced_at = []
    for token in sampled:
        logits = processor.apply(torch.zeros(NUM_ROWS, VOCAB))
        assert not logits[[0, 1, 3]].any()
        forced = logits[2].isinf().any()
        if forced:
            assert (logits[2] == 0).nonzero().flatten().tolist() == [END]
            forced_at.append(len(output_ids))
        output_ids.append(END if forced else token)
    parts = parts_of(MARKS, budget, prompt, output_ids)
    assert forced_at == ([] if parts.forced is None else [parts.forced])
    start = 0 if prompt_begins else output_ids.index(BEGIN) + 1 if BEGIN in output_ids else None
    if start is not None and parts.num_thinking is not None and parts.num_thinking > start:
        assert parts.num_thinking - start <= budget + 1


def trajectory(ids: tuple[int, ...], parts: Parts, finish: str = "stop", onset: int | None = None) -> Trajectory:
    logprobs_T = np.zeros(len(ids), np.float32)
    num, forced = parts.num_thinking, parts.forced
    return Trajectory(Prompt(0, (1,)), ids, logprobs_T, finish, 16, 1, 0, 0, loop_onset=onset, num_thinking=num, forced=forced)  # type: ignore[arg-type]


def test_a_forced_token_is_not_learned_from() -> None:
    mask_T = token_mask(trajectory((5, 5, END, 9), Parts(3, forced=2)), ObjectiveSettings(), 1.0)
    assert mask_T.tolist() == [1, 1, 0, 1]


def test_thinking_and_answer_are_told_apart() -> None:
    rollouts = [
        trajectory((5, END, 9, 9), Parts(2)),
        trajectory((5, 5, 5, 5, 5, 5), Parts(6), "length", onset=1),
        trajectory((5, 5, END, 9, 9, 9), Parts(3, forced=2), "length", onset=3),
        trajectory((5, 9), Parts(None)),
    ]
    found = thinking_fields(Batch(1, rollouts, [], [], 0, 0, LengthLimits(16), 16, 0, 0.0, 0.0))
    assert found == pytest.approx(
        {
            "thinking_share": 0.75, "thinking_mean": 11 / 3, "thinking_p95": np.quantile([2, 6, 3], 0.95), "answer_mean": 2.5,
            "thinking_truncation": 1 / 3, "answer_truncation": 1 / 3, "thinking_loops": 1 / 3, "answer_loops": 1 / 3,
            "thinking_forced": 1 / 3,
        }
    )  # fmt: skip
    assert thinking_fields(Batch(1, rollouts[3:], [], [], 0, 0, LengthLimits(16), 16, 0, 0.0, 0.0)) == {}


def test_marks_are_known_by_the_tokenizer_s_own_tokens() -> None:
    assert thinking_ids(SimpleNamespace(get_vocab=lambda: {"a": 0, "<think>": 4, "</think>": 5})) == (4, 5)
    assert thinking_ids(SimpleNamespace(get_vocab=lambda: {"a": 0, "<think>": 4})) is None
