"""A batch: every rollout accounted for, in the order of its prompts, truncated ones under the quota."""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from opd_governor.services.inputs.verdicts import Verdict, failed
from opd_governor.services.record.batch import Batch, Launch
from opd_governor.services.record.rewards import reward_fields
from opd_governor.services.record.steps import record_batch
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.run.collect import collect


class FakeFleet:
    """Hands rollouts on in the reverse order of their prompts, one at a time."""

    def __init__(self, ends: dict[int, str]) -> None:
        self.ends = ends

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: RolloutSettings
    ) -> AsyncIterator[list[Trajectory]]:
        for prompt, sample in reversed(requests):
            await asyncio.sleep(0)
            length = 4 + prompt.index
            reason: Any = self.ends.get(prompt.index, "stop")
            yield [Trajectory(prompt, (7,) * length, np.zeros(length, np.float32), reason, limits.cap_tokens, step, 0, 0, sample)]


class FakePool:
    """Scores all but the prompts it is told to fail; remembers what it was asked."""

    def __init__(self, fails: set[int]) -> None:
        self.fails, self.asked = fails, []

    async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        self.asked += [t.prompt.index for t in trajectories]
        zeros = [np.zeros(len(t.token_ids), np.float32) for t in trajectories]
        return [None if t.prompt.index in self.fails else TokenScores("t", zero, zero) for t, zero in zip(trajectories, zeros, strict=True)]


def run(ends: dict[int, str], fails: set[int] = frozenset(), quota: float = 1.0, samples: int = 1) -> tuple[Batch, FakePool]:  # type: ignore[assignment]
    pool = FakePool(fails)
    prompts = [Prompt(index, (1, 2)) for index in range(6)]
    launch = Launch(3, prompts, LengthLimits(64, admission_quota=quota), RolloutSettings(samples_per_prompt=samples), 1)
    return asyncio.run(collect(FakeFleet(ends), pool, launch)), pool  # type: ignore[arg-type]


def test_rollouts_come_back_in_the_order_of_their_prompts() -> None:
    batch, _ = run({}, samples=2)
    assert [(t.prompt.index, t.sample) for t in batch.trajectories] == [(i, s) for i in range(6) for s in range(2)]
    assert [s.trajectory.prompt.index for s in batch.scored] == [i for i in range(6) for _ in range(2)]


def test_a_cut_is_judged_by_the_cap_of_its_launch_whatever_a_person_sets_meanwhile() -> None:
    """Launched under 64, which the governor had not lowered; a job that has a larger cap by now makes it no cut of the governor's."""
    launch = Launch(3, [Prompt(0, (1, 2))], LengthLimits(64), RolloutSettings(max_new_tokens=64), 1)
    batch = asyncio.run(collect(FakeFleet({0: "length"}), FakePool(set()), launch))  # type: ignore[arg-type]
    telemetry = Telemetry("x")
    record_batch(telemetry, batch, None, LengthLimits(128))
    assert telemetry.registry.get_sample_value("opd_rollouts_total", {"run": "x", "finish_reason": "length"}) == 1
    assert telemetry.registry.get_sample_value("opd_governor_cut_rollouts_total", {"run": "x"}) == 0


def test_a_rollout_without_a_score_is_counted_and_left_out() -> None:
    batch, _ = run({}, fails={2, 5})
    assert [s.trajectory.prompt.index for s in batch.scored] == [0, 1, 3, 4]
    assert batch.num_unscored == 2


def test_a_quota_refuses_truncated_rollouts_before_the_teacher_sees_them() -> None:
    batch, pool = run({1: "length", 2: "length", 4: "repetition"}, quota=0.25)
    truncated = [s.trajectory.prompt.index for s in batch.scored if s.trajectory.truncated]
    assert len(truncated) == 1
    assert batch.num_over_quota == 2
    assert sorted(pool.asked) == sorted(s.trajectory.prompt.index for s in batch.scored)


def test_without_a_quota_truncated_rollouts_are_learned_from() -> None:
    batch, _ = run({1: "length"})
    assert len(batch.scored) == 6


def test_a_rollout_that_failed_is_neither_scored_nor_lost_from_the_count() -> None:
    batch, pool = run({3: "error"})
    assert 3 not in pool.asked
    assert (len(batch.trajectories), len(batch.scored), batch.num_unscored) == (6, 5, 1)


def test_a_rollout_with_a_log_prob_that_is_no_number_is_kept_from_teacher_and_learner() -> None:
    class Spoiled(FakeFleet):
        async def rollout(self, *arguments: Any) -> AsyncIterator[list[Trajectory]]:
            async for group in super().rollout(*arguments):
                for trajectory in group:
                    if trajectory.prompt.index == 2:
                        trajectory.logprobs_T[1] = np.nan
                yield group

    pool = FakePool(set())
    launch = Launch(3, [Prompt(index, (1, 2)) for index in range(6)], LengthLimits(64), RolloutSettings(), 1)
    batch = asyncio.run(collect(Spoiled({}), pool, launch))  # type: ignore[arg-type]
    assert 2 not in pool.asked
    assert [t.prompt.index for t in batch.nonfinite] == [2]
    assert (len(batch.trajectories), len(batch.scored), batch.num_unscored) == (6, 5, 1)


def test_a_failure_of_the_engine_reaches_the_caller() -> None:
    class Broken(FakeFleet):
        async def rollout(self, *arguments: Any) -> AsyncIterator[list[Trajectory]]:
            raise RuntimeError("engine dead")
            yield []

    launch = Launch(1, [Prompt(0, (1,))], LengthLimits(8), RolloutSettings(), 1)
    with pytest.raises(RuntimeError, match="engine dead"):
        asyncio.run(collect(Broken({}), FakePool(set()), launch))  # type: ignore[arg-type]


def test_a_teachers_error_ends_the_batch_at_once_and_not_when_the_slowest_rollout_is_in() -> None:
    cancelled = []

    class Slow(FakeFleet):
        async def rollout(self, *arguments: Any) -> AsyncIterator[list[Trajectory]]:
            async for group in super().rollout(*arguments):
                yield group
                try:
                    await asyncio.sleep(30)
                except asyncio.CancelledError:
                    cancelled.append(True)
                    raise

    class Refuses(FakePool):
        async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
            raise CallerError("context window 16")

    launch = Launch(1, [Prompt(index, (1,)) for index in range(3)], LengthLimits(8), RolloutSettings(), 1)
    started = time.monotonic()
    with pytest.raises(CallerError, match="context window 16"):
        asyncio.run(collect(Slow({}), Refuses(set()), launch))  # type: ignore[arg-type]
    assert time.monotonic() - started < 5
    assert cancelled


def test_where_every_rollout_is_truncated_a_quotas_share_of_them_is_learned_from() -> None:
    """An empty batch would stop the run at the worst moment: a collapse under full pressure."""
    batch, _ = run(dict.fromkeys(range(6), "length"), quota=0.1)
    assert (len(batch.scored), batch.num_over_quota) == (1, 5)
    batch, _ = run(dict.fromkeys(range(6), "length"), quota=0.0)
    assert (len(batch.scored), batch.num_over_quota) == (0, 6)


def test_a_verdict_goes_with_its_rollout_and_one_without_a_score_costs_that_rollout_alone() -> None:
    async def judge(trajectories: Sequence[Trajectory]) -> list[Verdict]:
        await asyncio.sleep(0)
        return [failed("timeout", "4", "no verdict") if t.prompt.index == 1 else Verdict(t.prompt.index / 8) for t in trajectories]

    prompts = [Prompt(index, (1, 2), answer="4") for index in range(6)]
    launch = Launch(3, prompts, LengthLimits(64), RolloutSettings(samples_per_prompt=2), 1)
    batch = asyncio.run(collect(FakeFleet({3: "error"}), FakePool({4}), launch, judge=judge))  # type: ignore[arg-type]
    rewards = {t.prompt.index: t.reward for t in batch.trajectories}
    assert rewards == {0: 0.0, 1: None, 2: 0.25, 3: None, 4: 0.5, 5: 0.625}
    assert [s.trajectory.reward for s in batch.scored[::2]] == [0.0, None, 0.25, 0.625]
    assert [verdict.reason for verdict in batch.unjudged] == ["timeout", "timeout"]
    fields = reward_fields(batch, None)
    assert (fields["unjudged"], fields["reward_passed"], fields["reward_mixed"]) == ({"timeout": 2}, 0.5, 0.0)
    telemetry = Telemetry("x")
    record_batch(telemetry, batch, None, LengthLimits(64))
    sample = partial(telemetry.registry.get_sample_value, labels={"run": "x"})
    assert sample("opd_reward_mean") == fields["reward_mean"] == np.mean([0.0, 0.25, 0.5, 0.625])
    assert (sample("opd_rewards_judged_total"), sample("opd_rewards_passed_total")) == (8, 4)
    assert telemetry.registry.get_sample_value("opd_verifier_failures_total", {"run": "x", "reason": "timeout"}) == 2


def test_what_no_verifier_judged_is_absent_and_never_0() -> None:
    async def judge(trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [failed("died", "4", "gone") for _ in trajectories]

    launch = Launch(3, [Prompt(0, (1, 2))], LengthLimits(64), RolloutSettings(), 1)
    batch = asyncio.run(collect(FakeFleet({}), FakePool(set()), launch, judge=judge))  # type: ignore[arg-type]
    assert reward_fields(batch, None) == {"unjudged": {"died": 1}}
    assert reward_fields(run({})[0], None) == {}
    telemetry = Telemetry("x")
    telemetry.set("opd_reward_mean", 0.5)
    record_batch(telemetry, batch, None, LengthLimits(64))
    assert telemetry.registry.get_sample_value("opd_reward_mean", {"run": "x"}) is None
