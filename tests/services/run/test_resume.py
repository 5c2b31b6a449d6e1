"""The main loop over fakes: what a checkpoint holds, that writing it delays no step, and that a run resumes from any moment."""

import asyncio
import contextlib
import itertools
import json
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from opd_governor.actors.learner.checkpoint import newest_checkpoint, read_state
from opd_governor.services.record.rundir import Record, read_records
from opd_governor.services.record.steps import CLOCK_FIELDS
from opd_governor.services.run.errors import LearnerError
from tests.disks import remount, small_disk
from tests.services.run.loop import Loop


def timeless(records: list[Record]) -> list[Record]:
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in records]


def copies_of(loop: Loop, tmp_path: Path) -> list[Path]:
    """The loop run to its end, and its directory as it lay on the disk when each step's line was written, and a little later."""
    copies: list[Path] = []

    def copy(name: str) -> None:
        copies.append(tmp_path / "copies" / name)
        copies[-1].parent.mkdir(exist_ok=True)
        # What is renamed or removed meanwhile is missing then, as it may be after a crash.
        subprocess.run(["cp", "-a", str(loop.directory.path), str(copies[-1])], capture_output=True, check=False)

    async def run() -> None:
        async def later(step: int) -> None:
            await asyncio.sleep(0.004)
            copy(f"{step}-later")

        tasks = []

        def on_step(record: Record) -> None:
            copy(f"{record['step']}")
            tasks.append(asyncio.create_task(later(record["step"])))

        loop.on_step = on_step
        await loop.distillation.run(False)
        await asyncio.gather(*tasks)

    asyncio.run(run())
    return copies


@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_whenever_the_run_dies_it_resumes_without_a_step_or_a_prompt_lost_or_used_twice(tmp_path: Path, staleness: int) -> None:
    whole = Loop(tmp_path / "whole", staleness=staleness)
    whole.fleet.disk_s = 0.003
    copies = copies_of(whole, tmp_path)
    expected = timeless(read_records(whole.directory.metrics))
    assert len(copies) == 20
    begun_at = set()
    for path in copies:
        resumed = Loop(path, staleness=staleness)
        records = resumed.run(resume=True)
        begun_at |= set(resumed.fleet.restored)
        assert [record["step"] for record in records] == list(range(1, 11)), path.name
        assert [index for record in records for _, index in record["prompts"]] == list(range(30)), path.name
        decisions = read_records(resumed.directory.decisions)
        assert [record["step"] for record in decisions] == list(range(1, 11)), path.name
        if staleness == 0:
            assert timeless(records) == expected
        for name, total in (("opd_learner_steps_total", 10.0), ("opd_rollout_length_tokens_count", 30.0)):
            assert resumed.telemetry.registry.get_sample_value(name, {"run": "x"}) == total
        assert len(resumed.monitor.steps(-1)) == len(resumed.monitor.decisions(-1)) == 10
    assert len(begun_at) > 2  # from several checkpoints; which ones were whole at each copy is the disk's affair


def test_a_step_does_not_wait_for_the_checkpoint_before_it(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    loop.fleet.disk_s = 0.2
    seen: dict[int, bool] = {}
    loop.on_step = lambda record: seen.update({record["step"]: (loop.directory.checkpoints / "step-2").exists()})
    loop.run()
    assert not seen[3]
    assert (loop.directory.checkpoints / "step-10").exists()
    # What was written is the state at its own border, whatever the learner had become meanwhile.
    for folder in loop.directory.checkpoints.iterdir():
        assert (folder / "weights").read_text() == folder.name.removeprefix("step-")


def test_a_stop_does_not_wait_for_rollouts_and_their_prompts_are_drawn_again(tmp_path: Path) -> None:
    first = Loop(tmp_path, staleness=1)
    rollout = first.fleet.rollout

    async def hangs_at_step_4(requests: Any, limits: Any, step: int, settings: Any) -> AsyncIterator[Any]:
        if step == 4:
            await asyncio.sleep(60)
        async for group in rollout(requests, limits, step, settings):
            yield group

    first.fleet.rollout = hangs_at_step_4  # type: ignore[method-assign]

    async def interrupted() -> float:
        run = asyncio.create_task(first.distillation.run(False))
        while first.monitor.status()["step"] < 3:
            await asyncio.sleep(0.01)
        started = time.monotonic()
        first.distillation.stop()
        await run
        return time.monotonic() - started

    assert asyncio.run(interrupted()) < 2
    assert read_state(tmp_path / "checkpoints/step-3")["step"] == 3
    records = Loop(tmp_path, staleness=1).run(resume=True)
    assert [index for record in records for _, index in record["prompts"]] == list(range(30))


def test_skipped_steps_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.fleet.skips = True
    first.on_step = lambda record: record["step"] == 2 and first.distillation.stop()
    first.run()
    second = Loop(tmp_path)
    second.fleet.skips = True
    with pytest.raises(LearnerError, match="3 steps in a row"):
        second.run(resume=True)
    assert len(second.fleet.learned) == 1


def test_a_resume_before_the_first_step_does_not_begin_twice(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.distillation.stop()
    first.run()
    assert newest_checkpoint(tmp_path / "checkpoints")[0] == tmp_path / "checkpoints/step-0"
    second = Loop(tmp_path)
    assert [record["step"] for record in second.run(resume=True)] == list(range(1, 11))
    assert second.fleet.restored == [("step-0", False)]


def test_a_persons_change_after_the_checkpoint_holds_from_the_first_step_after_a_resume(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.on_step = lambda record: record["step"] == 4 and first.distillation.stop()
    first.run()
    first.store.change({"rollout": {"max_new_tokens": 2}}, expected=None, source="test")
    records = Loop(tmp_path).run(resume=True)
    assert [record["length_max"] for record in records] == [4] * 4 + [2] * 6


def test_other_golden_answers_than_the_checkpoints_are_said(tmp_path: Path) -> None:
    first = Loop(tmp_path)
    first.on_step = lambda record: record["step"] == 2 and first.distillation.stop()
    first.run()
    second = Loop(tmp_path, golden_key="other")
    second.run(resume=True)
    assert any("golden answers" in warning for warning in second.warnings)


def test_a_torn_checkpoint_is_said_by_name_and_the_one_before_is_used(tmp_path: Path) -> None:
    Loop(tmp_path, sick_from=7).run()
    torn = tmp_path / "checkpoints/step-10/weights"
    torn.write_text("9")
    resumed = Loop(tmp_path)
    records = resumed.run(resume=True)
    assert resumed.fleet.restored == [("step-6", False)]
    assert any(str(torn) in warning for warning in resumed.warnings)
    assert [index for record in records for _, index in record["prompts"]] == list(range(30))


def test_a_rollback_passes_over_a_torn_checkpoint_too(tmp_path: Path) -> None:
    loop = Loop(tmp_path, {8: "rollback"}, sick_from=5)
    loop.on_step = lambda record: record["step"] == 8 and (tmp_path / "checkpoints/step-4/weights").write_text("x")
    loop.run()
    assert loop.fleet.restored == []
    assert any("step-4/weights" in warning for warning in loop.warnings)
    assert any("no healthy checkpoint" in warning for warning in loop.warnings)


def test_a_disk_that_fills_up_costs_checkpoints_but_neither_the_run_nor_a_record(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        loop = Loop(disk)
        filler = disk / "filler"

        def on_step(record: Record) -> None:
            if record["step"] == 3:
                with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
                    while True:
                        file.write(bytes(4096))
            elif record["step"] == 8:
                assert newest_checkpoint(loop.directory.checkpoints)[0] == loop.directory.checkpoints / "step-2"
                filler.unlink()

        loop.on_step = on_step
        records = loop.run()
        assert [record["step"] for record in records] == list(range(1, 11))
        assert [record["step"] for record in read_records(loop.directory.decisions)] == list(range(1, 11))
        assert sum("not written" in warning for warning in loop.warnings) in (2, 3)
        assert sum("records wait in memory" in warning for warning in loop.warnings) == 1
        assert newest_checkpoint(loop.directory.checkpoints)[0] == loop.directory.checkpoints / "step-10"
        assert not list(loop.directory.checkpoints.glob(".*"))


def test_a_disk_that_goes_read_only_costs_checkpoints_but_not_the_run(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 512) as disk:
        loop = Loop(disk)
        loop.on_step = lambda record: {5: lambda: remount(disk, "ro"), 8: lambda: remount(disk, "rw")}.get(record["step"], lambda: None)()
        records = loop.run()
        assert [record["step"] for record in records] == list(range(1, 11))
        assert any("Read-only file system" in warning for warning in loop.warnings)
        assert newest_checkpoint(loop.directory.checkpoints)[0] == loop.directory.checkpoints / "step-10"


def test_a_clock_that_jumps_bends_no_duration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, now = Loop(tmp_path), time.time
    jumps = iter([0.0, -86_400.0, 86_400.0] * 40)
    monkeypatch.setattr(time, "time", lambda: now() + next(jumps, 0.0))
    records = loop.run()
    assert max(abs(a["time"] - b["time"]) for a, b in itertools.pairwise(records)) > 80_000
    assert all(0 <= record[name] < 60 for record in records for name in CLOCK_FIELDS - {"time", "tokens_per_s"})


def test_the_state_names_everything_that_a_step_depends_on(tmp_path: Path) -> None:
    Loop(tmp_path).run()
    state = json.loads((tmp_path / "checkpoints/step-10/state.json").read_text())
    names = "step cursor governor pressure healthy skipped_in_a_row config_generation golden_key reads rewards telemetry records"
    assert state.keys() == set(names.split())
