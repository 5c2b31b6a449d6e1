"""Conversations where a run uses them: the golden pass by teachers, held-out problems, records and metrics."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from opd_governor.actors.environment.settings import EnvironmentSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout
from opd_governor.services.inputs.bridge import Bridge
from opd_governor.services.inputs.environments import environment_identity
from opd_governor.services.job.settings import Job
from opd_governor.services.record.batch import Batch
from opd_governor.services.record.conversations import conversation_fields, record_conversations
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.run.environments import teacher_lengths
from opd_governor.services.run.held_out import HeldOut
from opd_governor.services.run.reads import changes
from tests.environment.worlds import pool_here
from tests.made_up import random_batch
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)
GIVEN: dict[str, Any] = {
    "name": "a",
    "student": {"model": "a"},
    "teacher": {"model": "b"},
    "data": {"prompts": {"path": "c"}, "eval": {"path": "d", "verifier": "environment", "sampled": False}},
    "environment": {"entry": "tests.environment.worlds:Countdown"},
}


def sources(problems: Sequence[Prompt] = ()) -> Any:
    models = SimpleNamespace(stop_ids=(3,), context_tokens=256)
    decode = lambda ids: TOKENIZER.decode([token for token in ids if token != 3])  # noqa: E731
    return SimpleNamespace(models=models, decode=decode, bridge=Bridge(TOKENIZER, {}), problems=problems)


class Teachers:
    """Says `ab` in every turn, and never ends its second one on prompt 1."""

    async def golden(self, prompts: Sequence[Prompt], **_: Any) -> list[tuple[int, ...] | None]:
        return [(5, 6, 3) if prompt.index != 1 or not prompt.turn else (5, 6) for prompt in prompts]


def test_the_golden_pass_measures_whole_conversations_of_the_teacher():
    job, prompts = Job.model_validate(GIVEN), [Prompt(index, (4, 5), text="q") for index in range(2)]
    pool: Any = Teachers()
    found = asyncio.run(teacher_lengths(job, sources(), pool, pool_here("Countdown"), prompts, 64))
    assert found == [(5, 6, 3) * 3, (5, 6, 3, 5, 6)], "its own tokens only; a cut one has no stop at its end"
    found = asyncio.run(teacher_lengths(job, sources(), pool, pool_here("Countdown"), prompts[:1], 8))
    assert found == [(5, 6, 3, 5, 6, 3, 5, 6)], "no longer than the cap"


def test_held_out_problems_are_judged_by_the_environments_reward():
    class Sampler:
        async def rollout(self, requests: Any, *_: Any, **__: Any) -> AsyncIterator[Any]:
            for (prompt, _), reward in zip(requests, (1.0, 0.0, None), strict=True):
                yield [replace(random_batch(1)[0].trajectory, prompt=prompt, reward=reward, observed=((4, (50,)),))]

    problems = [Prompt(index, (4,)) for index in range(3)]
    sampler: Any = Sampler()
    held_out = HeldOut(sources(problems), None, sampler)  # type: ignore[arg-type]
    evaluation = asyncio.run(held_out(Job.model_validate(GIVEN), 0))["greedy"]
    assert (evaluation.accuracy_ratio, evaluation.num_problems, evaluation.num_unjudged) == (0.5, 3, 1)
    assert evaluation.length_tokens == 16, "sampled tokens"


def batch_of(rollouts: Sequence[ScoredRollout]) -> Batch:
    return Batch(1, [r.trajectory for r in rollouts], [], [], 0, 0, LengthLimits(32), 32, 1, 0.0, 0.0)


def test_records_tell_of_turns_and_failures_and_nothing_of_single_turns():
    plain = random_batch(1)
    assert conversation_fields(batch_of(plain)) == {}
    ends = [
        {"num_turns": 3, "observed": ((4, (50, 51)), (8, (52,))), "repeated_calls": 2},
        {"num_turns": 1},
        {"num_turns": 2, "observed": ((4, (50,)),), "finish_reason": "turns"},
        {"finish_reason": "error", "failure": "timeout", "token_ids": ()},
    ]
    held = [replace(r, trajectory=replace(r.trajectory, **end)) for r, end in zip(plain, ends, strict=True)]  # type: ignore[arg-type]
    fields = conversation_fields(batch_of(held))
    assert fields == {
        "environment_failures": {"timeout": 1},
        "turns_mean": 2.0,
        "turns_max": 3,
        "observed_mean": 4 / 3,
        "out_of_turns": 1 / 3,
        "repeated_calls": 2 / 6,
    }
    telemetry = Telemetry("a")
    record_conversations(telemetry, batch_of(held))
    counted = {(name, *labels.values()): value for name, labels, value in telemetry.state()}
    assert counted["opd_environment_failures_total", "timeout"] == 1
    assert counted["opd_repeated_calls_total",] == 2
    alone = Telemetry("alone")
    record_conversations(alone, batch_of(plain))
    told = {name: value for name, _, value in alone.state()}
    assert (told["opd_turns_total"], told["opd_conversation_turns"]) == (4, 1), "a panel has data in every run"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"environment": None}, "data.eval.verifier: environment takes the environment's reward, and there is none"),
        ({"objective": {"golden_weight": 0.1}}, "set objective.golden_weight to 0"),
        ({"environment": {"tools": ["a.py:b"]}}, "environment.tools give no reward"),
        ({"environment": {}}, "name an entry, or tools"),
    ],
)
def test_what_does_not_go_together_is_one_line(change, words):
    with pytest.raises(ValidationError, match=words):
        Job.model_validate(GIVEN | change)


def test_an_environment_is_what_its_code_says_wherever_its_file_lies(tmp_path: Path) -> None:
    def identity(folder: str, code: str, **settings: Any) -> dict[str, Any]:
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "world.py").write_text(code)
        return environment_identity(EnvironmentSettings(entry=f"{tmp_path / folder}/world.py:World", **settings))

    was = identity("a", "class World: ...")
    assert identity("b", "class World: ...", concurrency=7) == was
    for other in (identity("a", "class World: pass"), identity("b", "class World: ...", max_turns=3)):
        assert changes({"environment": was}, {"environment": other}) == ["environment (other content)"]
