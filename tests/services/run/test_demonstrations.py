"""A right answer of the student's own beside its others: which one is shown, where it stands, who is left out."""

import asyncio
from collections.abc import AsyncIterator, Sequence

import numpy as np
import pytest

from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from opd_governor.services.inputs.check_machine import check_objective
from opd_governor.services.inputs.resolve import Models
from opd_governor.services.job.settings import Job
from opd_governor.services.record.batch import Launch
from opd_governor.services.run.collect import collect
from opd_governor.services.run.demonstrations import Demonstrations, demonstrations_of
from tests.tiny import tiny_tokenizer

STOP = 1


def is_right(response: str, answer: str) -> bool:
    return response.endswith(answer)


def demonstrations(context_tokens: int = 64, bos_id: int | None = None) -> Demonstrations:
    return Demonstrations((50,), (51, 52), is_right, lambda ids: " ".join(map(str, ids)), (STOP,), context_tokens, bos_id)


def rollout(prompt: Prompt, sample: int, *ids: int, reason: str = "stop") -> Trajectory:
    return Trajectory(prompt, ids, np.zeros(len(ids), np.float32), reason, 32, 1, 0, 0, sample)  # type: ignore[arg-type]


def test_the_shortest_other_right_answer_stands_before_the_teachers_view() -> None:
    prompt = Prompt(0, (7, 8), answer="9 1")
    long, short, wrong = rollout(prompt, 0, 5, 5, 9, STOP), rollout(prompt, 1, 6, 9, STOP), rollout(prompt, 2, 4, STOP)
    found = demonstrations().prompts([long, short, wrong])
    assert found[id(long)].teacher_token_ids == (50, 6, 9, 51, 52, 7, 8)
    assert found[id(short)].teacher_token_ids == (50, 5, 5, 9, 51, 52, 7, 8)  # never its own
    assert found[id(wrong)].teacher_token_ids == (50, 6, 9, 51, 52, 7, 8)
    assert found[id(wrong)].privileged_ids == (6, 9)
    assert all(seen.token_ids == (7, 8) for seen in found.values())


def test_one_without_a_right_sibling_or_without_room_for_it_is_left_out() -> None:
    alone = Prompt(0, (7, 8), answer="9 1")
    right, wrong = rollout(alone, 0, 6, 9, STOP), rollout(alone, 1, 4, STOP)
    other = rollout(Prompt(1, (7, 8), answer="9 1"), 0, 4, STOP)
    cut = rollout(alone, 2, 9, 9, 9, reason="length")
    assert set(demonstrations().prompts([right, wrong, other, cut])) == {id(wrong), id(cut)}
    assert set(demonstrations(context_tokens=9).prompts([right, wrong])) == {id(wrong)}
    assert demonstrations(context_tokens=8).prompts([right, wrong]) == {}


def test_it_stands_behind_the_bos_and_before_a_context() -> None:
    prompt = Prompt(0, (2, 7), answer="9 1", teacher_token_ids=(2, 40, 7), privileged_ids=(40,))
    right, wrong = rollout(prompt, 0, 9, STOP), rollout(prompt, 1, 4, STOP)
    seen = demonstrations(bos_id=2).prompts([right, wrong])[id(wrong)]
    assert seen.teacher_token_ids == (2, 50, 9, 51, 52, 40, 7)
    assert seen.privileged_ids == (40, 9)


def test_a_step_scores_each_beside_another_and_counts_those_left_out() -> None:
    class Fleet:
        async def rollout(
            self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: RolloutSettings
        ) -> AsyncIterator[list[Trajectory]]:
            for prompt, sample in requests:
                await asyncio.sleep(0)
                yield [rollout(prompt, sample, 9 if prompt.index == 0 and sample == 0 else 4, STOP)]

    class Pool:
        asked: list[Trajectory] = []  # noqa: RUF012

        async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
            self.asked += trajectories
            return [TokenScores("t", np.zeros(2, np.float32), np.zeros(2, np.float32)) for _ in trajectories]

    prompts = [Prompt(index, (7, 8), answer="9 1") for index in range(2)]
    launch = Launch(1, prompts, LengthLimits(32), RolloutSettings(samples_per_prompt=2), 1)
    batch = asyncio.run(collect(Fleet(), Pool(), launch, demonstrations=demonstrations()))  # type: ignore[arg-type]
    assert [(one.trajectory.prompt.index, one.trajectory.sample) for one in batch.scored] == [(0, 1)]
    assert batch.scored[0].trajectory.prompt.teacher_token_ids is None  # the student's own, as it was sampled
    assert [t.prompt.teacher_token_ids for t in Pool.asked] == [(50, 9, 51, 52, 7, 8)]
    assert (batch.num_undemonstrated, batch.num_unscored) == (3, 0)


def test_a_job_that_cannot_have_them_is_refused() -> None:
    def job(template: str | None, samples: int = 2) -> Job:
        groups = {"teacher": {"model": "t", "demonstration": template}, "rollout": {"samples_per_prompt": samples}}
        return Job.model_validate({"name": "t", "student": {"model": "s"}, "data": {"prompts": {"path": "p"}}} | groups)

    def of(template: str | None) -> Demonstrations | None:
        return demonstrations_of(job(template), Models("s", ("t",), (STOP,), 64), tiny_tokenizer(), str)

    assert of(None) is None
    one = of("Right: {demonstration}\n")
    assert one is not None
    assert tiny_tokenizer().decode(one.before_ids) == "Right: "
    with pytest.raises(ValueError, match=r"must hold \{demonstration\} once"):
        of("none")
    (refused,) = (check for check in check_objective(job("{demonstration}", samples=1)) if check.name == "demonstration")
    assert (refused.status, refused.exit_code) == ("fail", 2)
    assert "samples_per_prompt is 1" in refused.detail
