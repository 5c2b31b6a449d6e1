"""The border between two steps: when the learner may go on, what it waits for, what is left when it is closed."""

import asyncio
from collections.abc import Callable

import pytest

from opd_governor.services.record.batch import Sync
from opd_governor.services.run.border import Border
from opd_governor.services.run.terms import Command


class Work:
    """Sync, decision and conclusion that wait until they are told, and what was done in which order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.synced, self.decided = asyncio.Event(), asyncio.Event()
        self.error: Exception | None = None

    async def sync(self, on_taken: Callable[[], None]) -> Sync:
        on_taken()
        await self.synced.wait()
        if self.error:
            raise self.error
        self.log.append("synced")
        return Sync(weight_version=3)

    async def decide(self) -> Command:
        try:
            await self.decided.wait()
        except asyncio.CancelledError:
            self.log.append("decision cancelled")
            raise
        self.log.append("decided")
        return Command("rollback", "because")

    async def conclude(self, sync: Sync, command: Command, govern_s: float) -> None:
        assert govern_s >= 0
        self.log.append(f"concluded {sync.weight_version} {command.verb}")

    def border(self) -> Border:
        return Border(self.sync, self.decide, self.conclude)


async def test_the_learner_is_free_while_the_engines_still_load() -> None:
    work = Work()
    border = work.border()
    work.decided.set()
    assert await border.learner_free() == Command("rollback", "because")
    assert work.log == ["decided"]
    work.synced.set()
    await border.done()
    assert work.log == ["decided", "synced", "concluded 3 rollback"]


async def test_the_record_waits_for_the_decision() -> None:
    work = Work()
    border = work.border()
    work.synced.set()
    await asyncio.sleep(0.01)
    assert work.log == ["synced"]
    work.decided.set()
    await border.done()
    assert work.log[-1] == "concluded 3 rollback"


async def test_a_sync_that_fails_frees_the_learner_and_is_raised_at_the_end() -> None:
    work = Work()
    work.error = RuntimeError("gap")
    border = work.border()
    work.synced.set()
    work.decided.set()
    await border.learner_free()
    with pytest.raises(RuntimeError, match="gap"):
        await border.done()
    assert "concluded 3 rollback" not in work.log


async def test_a_closed_border_leaves_no_decision_behind() -> None:
    work = Work()
    border = work.border()
    await asyncio.sleep(0)
    await border.close()
    assert work.log == ["decision cancelled"]
