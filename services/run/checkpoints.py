"""The checkpoints of a run: written beside its steps, found again.

border --take(state)--> learner's snapshot --> a folder beside its place --> sealed, renamed --> old ones pruned --> copied elsewhere
"""

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from opd_governor.actors.deadlines import ActorLostError
from opd_governor.actors.learner.checkpoint import newest_checkpoint, partial_folder, prune_checkpoints, remove_partials, seal_checkpoint
from opd_governor.services.record.rundir import Record


class Saver(Protocol):
    """What is needed of the learner."""

    async def snapshot(self) -> None: ...

    async def save(self, folder: str) -> None: ...


class Checkpoints:
    """One is written at a time. An error costs that checkpoint and is told to `note`; those before it are whole."""

    def __init__(
        self, root: Path, saver: Saver, *, keep: int, note: Callable[[str], None], mirror: Callable[[Path], None] | None = None
    ) -> None:
        """`keep` newest ones are kept, and the last one written in health. `mirror` copies each to a second place."""
        self._root, self._saver, self._keep, self._note, self._mirror = root, saver, keep, note, mirror
        self._last_healthy: Path | None = None
        self._writing: asyncio.Task[None] | None = None
        self.taken_step: int | None = None
        """Step of the last state taken, while nothing has changed since; else None."""

    def changed(self) -> None:
        """The run's state is another one than when the last checkpoint was taken, though the step may be the same."""
        self.taken_step = None

    async def take(self, state: Record) -> None:
        """Have the learner copy what it has at this border, and write it, with `state`, while the run goes on."""
        await self.written()
        await self._saver.snapshot()
        self.taken_step = state["step"]
        self._writing = asyncio.create_task(self._write(state))

    async def written(self) -> None:
        """Wait for the one being written, if there is one."""
        if self._writing is not None:
            await self._writing

    async def close(self) -> None:
        """Cancel the one being written."""
        if self._writing is not None:
            self._writing.cancel()
            await asyncio.gather(self._writing, return_exceptions=True)

    async def newest(self, *, healthy: bool = False) -> tuple[Path | None, Record]:
        """The newest one that verifies (and, if asked, was written in health), and its state. Removes unfinished ones."""
        await self.written()
        await asyncio.to_thread(remove_partials, self._root)
        folder, state, refused = await asyncio.to_thread(newest_checkpoint, self._root, healthy=healthy)
        for line in refused:
            self._note(line)
        return folder, state

    async def resume(self) -> tuple[Path | None, Record]:
        """The one to go on from: `newest`, whose state is now the run's."""
        folder, state = await self.newest()
        self.taken_step = state["step"] if folder else None
        if folder:
            self._last_healthy = folder if state["healthy"] else (await self.newest(healthy=True))[0]
        return folder, state

    async def _write(self, state: Record) -> None:
        step = state["step"]
        try:
            partial = await asyncio.to_thread(partial_folder, self._root, step)
            await self._saver.save(str(partial))
            written = await asyncio.to_thread(seal_checkpoint, self._root, step, state)
        except (OSError, ActorLostError) as error:  # the checkpoints before are whole, and the run goes on
            self._note(f"checkpoint of step {step} not written: {error}; the run goes on, with the one before")
            await asyncio.to_thread(remove_partials, self._root)
            self.taken_step = None
            return
        if state["healthy"]:
            self._last_healthy = written
        always = [self._last_healthy] if self._last_healthy else []
        await asyncio.to_thread(prune_checkpoints, self._root, self._keep, always)
        try:
            if self._mirror is not None:
                await asyncio.to_thread(self._mirror, written)
        except Exception as error:  # the back ends raise errors of their own; the checkpoint itself is written
            self._note(f"checkpoint of step {step} not copied: {error}")
