"""The main loop over fakes: what happens at a step border, and how a run rolls back or ends."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.trajectory import TokenScores, Trajectory
from opd_governor.services.record.batch import Sync
from opd_governor.services.record.rundir import Record, read_records
from opd_governor.services.run.errors import GuardRailError, LearnerError, SyncError
from tests.services.run.loop import Loop


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_every_step_is_taken_once_and_no_prompt_is_lost(tmp_path: Path, staleness: int) -> None:
    loop = Loop(tmp_path, staleness=staleness)
    records = loop.run()
    assert [record["step"] for record in records] == list(range(1, 11))
    assert loop.fleet.prompts == list(range(30))
    assert max(record["staleness_mean"] for record in records) == staleness


@pytest.mark.parametrize("staleness", [0, 1, 2])
def test_the_learner_does_not_wait_for_the_engines_to_load_and_no_rollout_is_staler_than_asked_for(tmp_path: Path, staleness: int) -> None:
    loop = Loop(tmp_path, staleness=staleness)
    loop.fleet.load_s = 0.1  # a learning takes 0.005: the rest is for a busy machine
    records = loop.run()
    assert [record["step"] for record in records] == list(range(1, 11))
    assert max(record["staleness_mean"] for record in records) == staleness
    assert loop.fleet.learned_while_loading == (0 if staleness == 0 else 5), "each step but those after the five checkpoints' borders"


def test_the_seconds_of_overlapping_steps_add_up_to_no_more_than_the_run_took(tmp_path: Path) -> None:
    loop = Loop(tmp_path, staleness=1)
    loop.fleet.load_s = 0.02
    started = time.monotonic()
    records = loop.run()
    assert 10 * 0.02 < sum(record["step_s"] for record in records) < time.monotonic() - started


def test_a_gap_found_while_the_next_step_is_learned_ends_the_run_all_the_same(tmp_path: Path) -> None:
    loop = Loop(tmp_path, staleness=1)
    loop.fleet.load_s = 0.02
    good = loop.fleet.sync

    def spoil(record: Record) -> None:
        loop.fleet.sync = replace(good, gap_nats=11.4) if record["step"] == 2 else loop.fleet.sync

    loop.on_step = spoil
    with pytest.raises(SyncError, match=r"differ by 11\.4 nats"):
        loop.run()
    assert [record["step"] for record in read_records(loop.directory.metrics)] == [1, 2], "its step has no record"


def test_a_rollback_takes_the_last_healthy_checkpoint_and_the_run_goes_on(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {8: "rollback"}, sick_from=5, staleness=1)
    records = loop.run()
    assert loop.fleet.restored == [("step-4", True)]
    assert [record["step"] for record in records] == list(range(1, 11))
    assert any("rolled back to step 4" in warning for warning in loop.warnings)


def test_the_student_as_it_came_can_be_rolled_back_to(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {1: "rollback"}, sick_from=1)
    loop.run()
    assert loop.fleet.restored == [("step-0", True)]


def test_rollouts_dropped_by_a_rollback_are_drawn_again(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {3: "rollback"}, staleness=2)
    loop.run()
    assert set(loop.fleet.prompts) == set(range(30))
    assert loop.stream.position == 30


def test_a_stop_of_the_governor_leaves_a_checkpoint_and_says_why(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {3: "stop"})
    with pytest.raises(GuardRailError, match="because"):
        loop.run()
    assert (loop.directory.checkpoints / "step-3").is_dir()


def test_a_gap_after_a_sync_is_a_metric_and_ends_the_run(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.sync = Sync(0.01, 11.4, 1e-2)
    with pytest.raises(SyncError, match=r"differ by 11\.4 nats"):
        loop.run()
    assert loop.telemetry.registry.get_sample_value("opd_weight_sync_gap_nats", {"run": "x"}) == 11.4


def test_a_gap_that_is_not_a_number_ends_the_run_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.sync = Sync(0.01, float("nan"), 1e-2)
    with pytest.raises(SyncError):
        loop.run()


def test_steps_that_cannot_be_learned_from_are_counted_and_end_the_run_in_a_row(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.skips = True
    with pytest.raises(LearnerError, match="3 steps in a row"):
        loop.run()


def test_a_run_that_gives_up_has_the_records_of_all_steps_before(tmp_path: Path) -> None:
    loop = Loop(tmp_path, staleness=1)
    loop.fleet.load_s, learn = 0.02, loop.fleet.learn

    async def learn_once(*terms: Any) -> StepReport:
        loop.fleet.skips = bool(loop.fleet.learned)
        return await learn(*terms)

    loop.fleet.learn = learn_once
    with pytest.raises(LearnerError):  # in step 4, while the engines take the weights of step 3
        loop.run()
    assert [record["step"] for record in read_records(loop.directory.metrics)] == [1, 2, 3]


def test_a_persons_cap_holds_from_the_launch_that_is_observed(tmp_path: Path) -> None:
    loop = Loop(tmp_path)

    def patch_at_4(record: Record) -> None:
        if record["step"] == 4:
            loop.store.change({"rollout": {"max_new_tokens": 2}}, expected=None, source="test")

    loop.on_step = patch_at_4
    records = loop.run()
    # Seen at the border between steps 4 and 5, before the launch of step 5: nothing is launched ahead without staleness.
    assert [record["length_max"] for record in records] == [4] * 4 + [2] * 6
    assert [record["config_generation"] for record in records] == [1] * 4 + [2] * 6
    assert loop.store.observed_generation == 2


def test_stop_ends_at_the_next_border_and_resume_goes_on_from_there(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.on_step = lambda record: record["step"] == 5 and first.monitor.request("stop")
    first.run()
    second = Loop(tmp_path)
    records = second.run(resume=True)
    assert [record["step"] for record in records] == list(range(1, 11))
    assert first.fleet.prompts + second.fleet.prompts == list(range(30))
    assert len(second.monitor.steps(-1)) == 10


def test_a_paused_run_says_so_in_its_metrics_and_is_timed_anew_from_its_end(tmp_path: Path) -> None:
    loop, seen = Loop(tmp_path), []

    def value(name: str) -> float | None:
        return loop.telemetry.registry.get_sample_value(name, {"run": "x"})

    async def pause_after_4() -> None:
        running = asyncio.create_task(loop.distillation.run(resume=False))
        while loop.monitor.status()["phase"] != "paused":
            await asyncio.sleep(0.01)
        seen.append((value("opd_run_paused"), value("opd_heartbeat_timestamp_seconds"), time.time()))
        loop.monitor.request("resume")
        await running

    loop.on_step = lambda record: record["step"] == 4 and loop.monitor.request("pause")
    asyncio.run(pause_after_4())
    ((paused, last_step_s, now_s),) = seen
    assert paused == 1
    assert last_step_s <= now_s <= value("opd_heartbeat_timestamp_seconds")
    assert value("opd_run_paused") == 0
    assert len(read_records(loop.directory.metrics)) == 10


def test_a_full_disk_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    loop = Loop(tmp_path)

    async def fail(folder: str) -> None:
        raise OSError(28, "No space left on device")

    loop.fleet.save = fail  # type: ignore[method-assign]
    assert len(loop.run()) == 10
    assert any("No space left" in warning for warning in loop.warnings)


def test_every_record_is_json_and_every_sample_belongs_to_a_step(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.run()
    assert {json.loads(line)["step"] for line in loop.directory.samples.read_text().splitlines()} == set(range(1, 11))


# ---- deaths


@pytest.mark.parametrize("staleness", [0, 2])
@pytest.mark.parametrize(
    "death",
    [("learn", 1), ("learn", 7), ("sync", 1), ("sync", 5), ("save", 1), ("save", 3), ("save", 6), ("finish", 1)],
    ids=lambda death: f"{death[0]}-{death[1]}",
)
def test_a_learner_that_dies_goes_back_to_a_checkpoint_and_every_prompt_is_learned_from_once(
    tmp_path: Path, staleness: int, death: tuple[str, int]
) -> None:
    loop = Loop(tmp_path, staleness=staleness)
    loop.fleet.deaths = {death}
    records = loop.run()
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [record["weight_version"] for record in records] == list(range(1, 11))
    # What was learned after the checkpoint went with the learner: the later batch of a step is the one in the weights.
    final = dict(zip(_steps_learned(loop), loop.fleet.learned, strict=True))
    assert [prompt for step in sorted(final) for prompt in final[step]] == list(range(30))
    assert loop.restarts == [("learner", "crash")]
    assert loop.fleet.num_back == 1
    assert loop.num_finished == 1
    assert [record["step"] for record in loop.monitor.steps(-1)] == list(range(1, 11))
    assert loop.monitor.status()["waiting_for"] is None


def _steps_learned(loop: Loop) -> list[int]:
    """The step of each batch the learner took, by the prompts in it: three a step, from 0."""
    return [batch[0] // 3 + 1 for batch in loop.fleet.learned]


def test_counters_go_back_with_the_learner_so_that_totals_count_each_step_once(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.deaths = {("learn", 6)}
    loop.run()
    value = loop.telemetry.registry.get_sample_value
    assert value("opd_learner_steps_total", {"run": "x"}) == 10
    assert value("opd_rollouts_total", {"run": "x", "finish_reason": "stop"}) == 30


def test_a_new_learner_that_dies_while_it_is_restored_is_replaced_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.deaths = {("learn", 5), ("restart", 1), ("restore", 1)}
    assert [record["step"] for record in loop.run()] == list(range(1, 11))
    assert loop.restarts == [("learner", "crash")]


def test_a_learner_that_keeps_dying_at_the_same_step_ends_the_run_with_the_reason(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.deaths = {("learn", n) for n in range(5, 20)}
    with pytest.raises(LearnerError, match="died 3 times before step 5"):
        loop.run()


def test_deaths_at_different_steps_do_not_add_up(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.deaths = {("learn", n) for n in (2, 5, 8, 11, 14)}
    assert [record["step"] for record in loop.run()] == list(range(1, 11))
    assert len(loop.restarts) == 5


def test_without_a_governor_the_last_limits_hold_and_the_run_goes_on(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.governor.lost_at = (4, 5)
    records = loop.run()
    assert [record["step"] for record in records] == list(range(1, 11))
    assert {record["cap_tokens"] for record in records} == {8}
    assert sum("the last limits hold" in warning for warning in loop.warnings) == 2
    assert [record["step"] for record in read_records(loop.directory.decisions)] == [1, 2, 3, 6, 7, 8, 9, 10]


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


def test_with_all_teachers_gone_the_run_says_so_then_pauses_and_goes_on_when_one_is_back(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.on_step = lambda record: setattr(loop.pool, "down", record["step"] == 3)

    async def watch() -> list[dict[str, Any]]:
        run = asyncio.create_task(loop.distillation.run(False))
        await _until(lambda: loop.monitor.status()["waiting_for"])
        seen = [loop.monitor.status()]
        await _until(lambda: loop.monitor.status()["phase"] == "paused")
        seen.append(loop.monitor.status())
        loop.pool.down = False
        await run
        return seen

    waiting, paused = asyncio.run(watch())
    assert (waiting["phase"], waiting["waiting_for"]) == ("running", "teacher t: no actor answers")
    assert (paused["step"], paused["waiting_for"]) == (3, "teacher t: no actor answers")
    records = read_records(loop.directory.metrics)
    assert [record["num_unscored"] for record in records] == [0] * 10
    assert loop.monitor.status()["waiting_for"] is None


def test_samples_that_no_teacher_scored_are_counted_and_not_learned_from(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    score = loop.pool.score

    async def fails_at_step_4(trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        loop.pool.down = trajectories[0].step == 4
        return await score(trajectories)

    loop.pool.score = fails_at_step_4  # type: ignore[method-assign]

    async def come_back() -> None:
        run = asyncio.create_task(loop.distillation.run(False))
        await _until(lambda: loop.monitor.status()["step"] == 4)
        loop.pool.down = False
        await run

    asyncio.run(come_back())
    records = read_records(loop.directory.metrics)
    assert [record["num_unscored"] for record in records] == [0, 0, 0, 3, 0, 0, 0, 0, 0, 0]
    assert [batch[0] // 3 + 1 for batch in loop.fleet.learned] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert loop.telemetry.registry.get_sample_value("opd_admitted_rollouts_total", {"run": "x", "outcome": "unscored"}) == 3


def test_what_scores_say_of_themselves_is_a_gauge_as_well(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    score = loop.pool.score

    async def with_copies(trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        return [found and replace(found, copied_T=np.arange(len(found.sampled_logp_T)) == 0) for found in await score(trajectories)]

    loop.pool.score = with_copies  # type: ignore[method-assign]
    assert loop.run()[-1]["copied"] == 0.25
    assert loop.telemetry.registry.get_sample_value("opd_scores", {"run": "x", "field": "copied"}) == 0.25
    assert loop.telemetry.registry.get_sample_value("opd_scores", {"run": "x", "field": "unaligned"}) is None


@pytest.mark.parametrize("staleness", [0, 2])
def test_a_slow_teacher_slows_the_rollouts(tmp_path: Path, staleness: int) -> None:
    loop = Loop(tmp_path, staleness=staleness)
    loop.pool.pace_s = 0.02
    ahead = []
    loop.on_step = lambda record: ahead.append(len(loop.fleet.prompts) - 3 * record["step"])
    loop.run()
    assert max(ahead) <= 3 * staleness


def test_samples_with_numbers_that_are_none_are_handed_on_for_inspection(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    rollout, learn = loop.fleet.rollout, loop.fleet.learn

    async def spoil(*arguments: Any) -> AsyncIterator[list[Trajectory]]:
        async for group in rollout(*arguments):
            if group[0].prompt.index == 4:
                group[0].logprobs_T[0] = np.inf
            yield group

    async def skip_step_5(*arguments: Any) -> StepReport:
        report = await learn(*arguments)
        return replace(report, skipped=True, suspects=(1,)) if arguments[0][0].trajectory.step == 5 else report

    loop.fleet.rollout, loop.fleet.learn = spoil, skip_step_5  # type: ignore[method-assign]
    records = loop.run()
    assert loop.nonfinite == [("engine", 4), ("learner", 13)]
    assert [record["num_unscored"] for record in records] == [0, 1, 0, 0, 0, 0, 0, 0, 0, 0]
    assert [record["step"] for record in records if record["skipped"]] == [5]


def test_while_the_engines_load_they_are_a_version_behind_the_learner_in_the_metrics_too(tmp_path: Path) -> None:
    loop, seen = Loop(tmp_path, staleness=1), set()
    sync_weights = loop.fleet.sync_weights

    async def watched(*arguments: Any) -> Sync:
        versions = [loop.telemetry.registry.get_sample_value("opd_weight_version", {"run": "x", "role": r}) for r in ("learner", "rollout")]
        seen.add(tuple(versions))
        return await sync_weights(*arguments)

    loop.fleet.sync_weights = watched  # type: ignore[method-assign]
    loop.run()
    assert {(float(version), float(version - 1)) for version in range(1, 11)} <= seen
    assert loop.telemetry.registry.get_sample_value("opd_weight_version", {"run": "x", "role": "rollout"}) == 10


def test_a_skipped_step_is_not_counted_as_taken(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    learn = loop.fleet.learn

    async def skip_step_5(*arguments: Any) -> StepReport:
        report = await learn(*arguments)
        return replace(report, skipped=arguments[0][0].trajectory.step == 5)

    loop.fleet.learn = skip_step_5  # type: ignore[method-assign]
    loop.run()
    value = loop.telemetry.registry.get_sample_value
    assert value("opd_learner_steps_total", {"run": "x"}) == 9
    assert value("opd_learner_skipped_steps_total", {"run": "x"}) == 1
