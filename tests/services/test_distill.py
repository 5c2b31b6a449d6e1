"""The main loop over fakes with the same methods: what is done at a step border, and how a run goes back or gives up."""

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.deadlines import ActorLostError
from actors.learner.actor import StepReport
from actors.learner.metrics import POSITION_BUCKETS, BatchMetrics
from actors.trajectory import LengthLimits, Prompt, TokenScores, Trajectory
from services.distill import Distillation, GuardRailError, LearnerError, SyncError, base_limits
from services.fleet import Sync
from services.job import Job
from services.mirror import Mirror
from services.monitor import RunMonitor
from services.rundir import Record, RunDirectory, read_records
from services.telemetry import Telemetry
from services.tunables import ConfigStore


class FakeStream:
    """Prompts numbered from 0; the cursor is the next number."""

    def __init__(self) -> None:
        self.position = 0

    def next(self, n: int, unfinished_quota: float) -> list[Prompt]:
        self.position += n
        return [Prompt(index, (1, 2)) for index in range(self.position - n, self.position)]

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def restore(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class FakeFleet:
    """Rollouts of four tokens or the cap, whichever is less; remembers what it was asked."""

    def __init__(self) -> None:
        self.version, self.restored, self.prompts, self.skips = 0, [], [], False
        self.deaths: set[tuple[str, int]] = set()
        """The learner dies during this call, counted from 1."""
        self.calls: Counter[str] = Counter()
        self.dead, self.saved, self.num_back, self.learned = False, False, 0, []
        self.disk_s = 0.0
        """How long a checkpoint takes to write."""
        self.sync = Sync(0.01, 1e-5, 1e-2)
        self.engine_version, self.load_s, self.loading = 0, 0.0, False
        """What the engines sample with, and how long they take to load; meanwhile they have the version before."""
        self.learned_while_loading = 0

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: Any
    ) -> AsyncIterator[list[Trajectory]]:
        self.prompts += [prompt.index for prompt, _ in requests]
        length = min(4, limits.cap_tokens)
        version = self.engine_version
        for prompt, sample in requests:
            logprobs_T = np.zeros(length, np.float32)
            yield [Trajectory(prompt, (7,) * length, logprobs_T, "stop", limits.cap_tokens, step, version, 0, sample)]

    async def learn(self, rollouts: Any, golden: Any, limits: LengthLimits, reference: float, rate: float) -> StepReport:
        while ("learn", self.calls["learn"] + 1) in self.deaths and self.calls["save"] < self.calls["snapshot"]:
            await asyncio.sleep(0.001)  # it dies amid the step: a checkpoint's writing has begun, however busy the machine
        await self._ask("learn")
        await asyncio.sleep(0.005)  # as a real one: what was launched begins meanwhile, on the weights before
        self.learned_while_loading += self.loading
        self.learned.append([rollout.trajectory.prompt.index for rollout in rollouts])
        self.version += 1
        zeros, none = np.zeros(len(POSITION_BUCKETS)), np.zeros(0, np.float32)
        metrics = BatchMetrics(0.1, zeros.astype(int), zeros, 0, 0, 0.0, 0.0, 0.0, 0.0, 0, 0.0, none, none)
        return StepReport(0.1, 1.0, rate, self.skips, self.version, metrics)

    async def _ask(self, call: str) -> None:
        """Every call to the learner: once it has died, only a new one answers."""
        self.calls[call] += 1
        self.dead |= (call, self.calls[call]) in self.deaths
        if self.dead:
            raise ActorLostError("learner", RuntimeError("gone"))

    async def restart_learner(self) -> None:
        self.dead, self.version = False, -1 if self.saved else 0  # nothing may come of it before a restore
        await self._ask("restart")

    def learner_is_back(self) -> None:
        self.num_back += 1

    async def sync_weights(self, on_taken: Callable[[], None] = lambda: None) -> Sync:
        await self._ask("sync")
        assert self.version >= 0, "the weights of a learner that was not restored"
        assert not self.loading, "an update begins before the one before has ended"
        version, self.loading = self.version, True
        on_taken()
        await asyncio.sleep(self.load_s)
        self.engine_version, self.loading = version, False
        return replace(self.sync, weight_version=version)

    async def snapshot(self) -> None:
        await self._ask("snapshot")
        self.taken = self.version

    async def save(self, folder: str) -> None:
        await self._ask("save")
        self.saved = True
        await asyncio.sleep(self.disk_s)
        (Path(folder) / "weights").write_text(str(self.taken))

    async def restore(self, folder: str, *, rollback: bool = False) -> int:
        await self._ask("restore")
        self.restored.append((Path(folder).name, rollback))
        if not rollback:
            self.version = int((Path(folder) / "weights").read_text())
        return self.version


class FakePool:
    """Scores at once; with `down` set no actor is live and no score arrives."""

    def __init__(self) -> None:
        self.down, self.pace_s = False, 0.0

    def num_live(self) -> dict[str, int]:
        return {"t": 0 if self.down else 1}

    async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        await asyncio.sleep(self.pace_s)
        if self.down:
            return [None] * len(trajectories)
        zeros = [np.zeros(len(t.token_ids), np.float32) for t in trajectories]
        return [TokenScores("t", zero, zero) for zero in zeros]


class FakeGovernor:
    """Follows a script of step -> command; unhealthy from `sick_from` on; out of reach at the steps in `lost_at`."""

    def __init__(self, base: LengthLimits, commands: dict[int, str], sick_from: int = 10**6) -> None:
        self.base, self.commands, self.sick_from = base, commands, sick_from
        self.lost_at = ()

    async def limits(self) -> LengthLimits:
        return self.base

    async def state(self) -> dict[str, Any]:
        return {}

    async def restore(self, state: dict[str, Any]) -> None: ...

    async def set_policy(self, policy: Any, base: LengthLimits, generation: int) -> None:
        self.base = replace(base, generation=self.base.generation + 1)

    async def tick(self, step: int) -> tuple[Any, Record]:
        if step in self.lost_at:
            raise ActorLostError("governor", RuntimeError("gone"))
        command = self.commands.get(step)
        decision = SimpleNamespace(
            limits=self.base, after=SimpleNamespace(pressure=0.0), healthy=step < self.sick_from, signals=SimpleNamespace(data_age_s=0.0),
            action=command or "hold", signal="", mode="enforce", command=command, reason="because",
        )  # fmt: skip
        return decision, {"step": step, "mode": "enforce", "pressure": 0.0, "signals": {}, "limits": {}}


class Loop:
    """A loop of ten steps over the fakes, in a directory."""

    def __init__(
        self,
        tmp_path: Path,
        commands: dict[int, str] | None = None,
        sick_from: int = 10**6,
        staleness: int = 0,
        mirror_url: str | None = None,
    ) -> None:
        self.job = Job.model_validate(
            {
                "name": "x",
                "student": {"model": "a"},
                "teacher": {"model": "b", "timeout_s": 0.3},
                "data": {"prompts": {"path": "p"}},
                "rollout": {"prompts_per_step": 3, "max_new_tokens": 8, "max_staleness": staleness},
                "learner": {"total_steps": 10, "max_skipped_steps": 3},
                "checkpoint": {"every_steps": 2, "keep": 1},
            }
        )
        self.directory = RunDirectory(tmp_path, resume=True)
        self.store = ConfigStore(self.job, self.directory.config)
        self.telemetry, self.monitor = Telemetry("x", 8), RunMonitor("x", 10, base_limits(self.job))
        self.fleet, self.stream, self.warnings = FakeFleet(), FakeStream(), []
        self.on_step: Any = lambda record: None
        self.pool, self.governor = FakePool(), FakeGovernor(base_limits(self.job), commands or {}, sick_from)
        self.restarts, self.nonfinite, self.num_finished = [], [], 0
        self.distillation = Distillation(
            self.job, stream=self.stream, golden=[], golden_key="g", reference_tokens=4.0, fleet=self.fleet, pool=self.pool,
            governor=self.governor, directory=self.directory, store=self.store,
            telemetry=self.telemetry, monitor=self.monitor, evaluate=None, decode=lambda ids: "", on_step=lambda r: self.on_step(r),
            on_warning=self.warnings.append, on_restart=lambda role, reason: self.restarts.append((role, reason)),
            on_nonfinite=lambda source, trajectory, scores: self.nonfinite.append((source, trajectory.prompt.index)),
            finish=self._finish, mirror=Mirror(mirror_url, self.directory).push if mirror_url else None,
        )  # type: ignore[arg-type]  # fmt: skip

    async def _finish(self) -> None:
        await self.fleet._ask("finish")
        self.num_finished += 1

    def run(self, resume: bool = False) -> list[Record]:
        asyncio.run(self.distillation.run(resume))
        return read_records(self.directory.metrics)


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
    loop.fleet.load_s = 0.02
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
