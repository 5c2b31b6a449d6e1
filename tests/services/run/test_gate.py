"""The gate before a step: a person's verbs, in order, and teachers that are gone."""

import asyncio
from pathlib import Path
from typing import Any

from opd_governor.services.run.gate import Gate
from tests.services.run.loop import Loop


class Gated:
    """A gate with the journal and the pool of a test loop, and what it asked for."""

    def __init__(self, tmp_path: Path, outage_s: float = 60.0) -> None:
        self.loop = Loop(tmp_path)
        self.gate = Gate(self.loop.pool, self.loop.journal, outage_s)  # type: ignore[arg-type]
        self.asked: list[str] = []

    async def checkpoint(self) -> None:
        self.gate.checkpoint_wanted = False
        self.asked.append("checkpoint")

    async def roll_back(self, reason: str) -> None:
        self.asked.append(f"rollback: {reason}")

    def passing(self) -> asyncio.Task[Any]:
        return asyncio.create_task(self.gate.pass_through(self.checkpoint, self.roll_back))

    def status(self, name: str) -> Any:
        return self.loop.monitor.status()[name]


async def test_a_rollback_is_obeyed_before_the_step_and_a_checkpoint_left_to_its_border(tmp_path: Path) -> None:
    gated = Gated(tmp_path)
    gated.loop.monitor.request("rollback")
    gated.loop.monitor.request("checkpoint")
    await gated.passing()
    assert gated.asked == ["rollback: asked for over HTTP"]
    assert gated.gate.checkpoint_wanted


async def test_a_paused_run_takes_the_checkpoint_at_once_and_goes_on_when_told(tmp_path: Path) -> None:
    gated = Gated(tmp_path)
    gated.loop.monitor.request("pause")
    passing = gated.passing()
    await asyncio.sleep(0.05)
    assert gated.status("phase") == "paused"
    gated.loop.monitor.request("checkpoint")
    await asyncio.sleep(0.25)
    assert gated.asked == ["checkpoint"]
    assert not passing.done()
    gated.loop.monitor.request("resume")
    await asyncio.wait_for(passing, 2)
    assert gated.status("phase") == "running"


async def test_a_stop_wins_over_a_pause(tmp_path: Path) -> None:
    gated = Gated(tmp_path)
    gated.loop.monitor.request("pause")
    gated.loop.monitor.request("stop")
    await asyncio.wait_for(gated.passing(), 2)
    assert gated.gate.stopping
    assert gated.status("phase") == "stopping"


async def test_a_wait_for_rollouts_ends_with_a_stop_and_leaves_no_task_behind(tmp_path: Path) -> None:
    gated = Gated(tmp_path)
    batch = asyncio.create_task(asyncio.sleep(60))
    waiting = asyncio.create_task(gated.gate.wait_for(batch))
    await asyncio.sleep(0.01)
    gated.gate.stop()
    assert await asyncio.wait_for(waiting, 2) is None
    assert not batch.done(), "who launched it drops it"
    batch.cancel()
    again = asyncio.create_task(gated.gate.wait_for(asyncio.create_task(asyncio.sleep(60))))
    await asyncio.sleep(0)
    again.cancel()
    await asyncio.gather(again, return_exceptions=True)
    assert not [task for task in asyncio.all_tasks() if "Event.wait" in repr(task)]


async def test_without_a_teacher_the_run_waits_by_name_and_counts_as_paused_after_a_while(tmp_path: Path) -> None:
    gated = Gated(tmp_path, outage_s=0.15)
    gated.loop.pool.down = True
    passing = gated.passing()
    await asyncio.sleep(0.02)
    assert (gated.status("phase"), gated.status("waiting_for")) == ("running", "teacher t: no actor answers")
    await asyncio.sleep(0.4)
    assert gated.status("phase") == "paused"
    gated.loop.pool.down = False
    await asyncio.wait_for(passing, 2)
    assert (gated.status("phase"), gated.status("waiting_for")) == ("running", None)
