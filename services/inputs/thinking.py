"""The marks between which a model thinks, by its tokenizer."""

from collections.abc import Iterator
from typing import Any

from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.job.settings import Job

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Of known families: Qwen, DeepSeek and GLM; Magistral; Seed; others."""


def thinking_ids(tokenizer: Any) -> tuple[int, int] | None:
    """Ids that begin and end the thinking part; None where the tokenizer has no such pair of single tokens."""
    vocabulary = tokenizer.get_vocab()
    for begin, end in MARKS:
        if begin in vocabulary and end in vocabulary:
            return vocabulary[begin], vocabulary[end]
    return None


def check_thinking(job: Job, student: ModelFacts) -> Iterator[Check]:
    """Whether a thinking part can be told and bounded."""
    named, budget = job.rollout.thinking_ids, job.rollout.thinking_budget_tokens
    remedy = "set rollout.thinking_ids to the ids of its marks, or unset the budget"
    if budget is not None and named is None and thinking_ids(student.tokenizer) is None:
        detail = "rollout.thinking_budget_tokens: the student's tokenizer has none of the known marks of thinking, such as </think>"
        yield Check("thinking", "fail", detail, remedy, exit_code=2)
    if named is not None and (wrong := _wrong_marks(named, job, student)):
        yield Check("thinking", "fail", f"rollout.thinking_ids: {wrong}", "name the ids of its two marks", exit_code=2)
    if budget is not None and budget >= job.rollout.max_new_tokens:
        detail = f"rollout.thinking_budget_tokens: {budget} is never reached, rollout.max_new_tokens is {job.rollout.max_new_tokens}"
        yield Check("thinking", "warn", detail, "lower the budget, so that there is room for an answer")


def _wrong_marks(named: tuple[int, int], job: Job, student: ModelFacts) -> str:
    if odd := [mark for mark in named if not 0 <= mark < student.num_ids]:
        return f"{odd[0]} is no id of the student's tokenizer, which has {student.num_ids}"
    if named[0] == named[1]:
        return f"{named[0]} both begins and ends the thinking part"
    stops = student.stops.keys() if job.rollout.stop_token_ids is None else job.rollout.stop_token_ids
    if odd := [mark for mark in named if mark in stops]:
        return f"{odd[0]} is a stop id: the response would end with its thinking"
    return ""
