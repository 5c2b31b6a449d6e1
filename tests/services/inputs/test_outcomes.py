"""Prompts drawn by verdicts: what is left out, what is preferred, and that a resumed stream draws the same."""

import json

import numpy as np
import pytest

from opd_governor.actors.trajectory import Prompt, Trajectory
from opd_governor.services.inputs.outcomes import Outcomes
from opd_governor.services.inputs.prompts import PromptStream, Survey
from opd_governor.services.job.settings import SelectSettings
from tests.services.control.fake_run import make_job
from tests.services.inputs.test_prompts import table_of


def verdicts(index: int, *rewards: float | None) -> list[Trajectory]:
    logprobs_T = np.zeros(1, np.float32)
    return [Trajectory(Prompt(index, (1,)), (3,), logprobs_T, "stop", 8, 1, 0, 0, s, reward=r) for s, r in enumerate(rewards)]


def stream_of(num: int, **settings) -> PromptStream:
    stream = PromptStream(table_of([{"prompt": "x"}] * num), Survey(tuple(range(num))), seed=1)
    stream.outcomes = Outcomes(SelectSettings.model_validate(settings))
    return stream


def test_a_prompt_is_left_out_after_so_many_samples_that_were_all_right_or_all_wrong_and_comes_back_with_another() -> None:
    stream = stream_of(6, drop_always_right=4, drop_always_wrong=2)
    for found in (verdicts(0, 1, 1, 1), verdicts(1, 1, 1, 1, 1), verdicts(2, 0, 0.1), verdicts(3, 0, 1), verdicts(4, 0, None)):
        stream.outcomes.note(found)
    assert {prompt.index for prompt in stream.next(12)} == {0, 3, 4, 5}
    stream.outcomes.note(verdicts(1, 0))
    assert {prompt.index for prompt in stream.next(12)} == {0, 1, 3, 4, 5}


def test_where_nothing_is_left_all_are_drawn() -> None:
    stream = stream_of(3, drop_always_right=1)
    for index in range(3):
        stream.outcomes.note(verdicts(index, 1))
    assert len(stream.next(6)) == 6


def test_mixed_prompts_and_new_ones_are_preferred() -> None:
    stream = stream_of(8, prefer="mixed")
    for index in range(8):
        stream.outcomes.note(verdicts(index, *((1, 0) if index in (2, 5) else (1, 1))) if index != 7 else [])
    assert {prompt.index for prompt in stream.next(4)} >= {2, 5, 7}


def test_a_resumed_stream_draws_the_same() -> None:
    stream, again = (stream_of(40, drop_always_right=2, prefer="mixed") for _ in range(2))
    stream.outcomes.note([t for index in range(0, 40, 3) for t in verdicts(index, 1, index % 2)])
    stream.next(5)
    kept = json.loads(json.dumps([stream.state(), stream.outcomes.state()]))
    again.restore(kept[0])
    again.outcomes.restore(kept[1])
    assert stream.next(9) == again.next(9)
    assert again.outcomes.pass_rate(3) == stream.outcomes.pass_rate(3) == 1.0
    assert again.outcomes.pass_rate(6) == 0.5


def test_selecting_without_verdicts_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.select draws prompts by verdicts"):
        make_job(data={"prompts": {"path": "x"}, "select": {"prefer": "mixed"}})
