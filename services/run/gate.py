"""Whether the next step may begin: a person's verbs, and teachers that do not answer.

POST /v1/run/verbs, SIGTERM --> Gate --> pause, resume, checkpoint, rollback, stop
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.services.record.journal import Journal

T = TypeVar("T")
PAUSE_POLL_S = 0.1
"""How often a paused run looks for a verb."""
STATUS_S = 1.0
"""How often a run that waits for a batch looks for the reason."""


class Gate:
    """Holds the loop between two steps while the run is paused or has no teacher."""

    def __init__(self, pool: TeacherPool, journal: Journal, outage_s: float) -> None:
        """`outage_s`: how long teachers may be gone before the run counts as paused."""
        self._pool, self._journal, self._monitor, self._outage_s = pool, journal, journal.monitor, outage_s
        self._paused = False
        self._stop = asyncio.Event()
        self.checkpoint_wanted = False
        """A person asked for a checkpoint at the next border."""

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """End the run at the next border; a wait for rollouts ends at once."""
        self._stop.set()
        self._monitor.enter("stopping")

    def pause(self, paused: bool) -> None:
        if self._paused and not paused:
            self._journal.beat()  # otherwise the pause would look like a stall until the next step ends
        self._paused = paused
        self._journal.paused(paused)

    async def pass_through(self, checkpoint: Callable[[], Awaitable[None]], roll_back: Callable[[str], Awaitable[None]]) -> None:
        """Obey the verbs that came over HTTP. Returns when the run may go on or is to stop.

        A run whose teacher is gone waits. After `outage_s` it counts as paused, and it goes on by itself when the teacher is back.
        """
        missing_since: float | None = None
        while True:
            await self._obey_verbs(roll_back)
            missing = self.missing_teachers()
            missing_since = (missing_since or time.monotonic()) if missing else None
            waited_out = missing_since is not None and time.monotonic() - missing_since > self._outage_s
            if self.checkpoint_wanted and (self._paused or missing):
                await checkpoint()
            if self.stopping:
                self._monitor.enter("stopping")
                return
            self._monitor.enter("paused" if self._paused or waited_out else "running")
            self._monitor.update(waiting_for=missing)
            if not self._paused and not missing:
                return
            await asyncio.sleep(PAUSE_POLL_S)

    async def _obey_verbs(self, roll_back: Callable[[str], Awaitable[None]]) -> None:
        for verb in self._monitor.take_verbs():
            match verb:
                case "pause" | "resume":
                    self.pause(verb == "pause")
                case "stop":
                    self._stop.set()
                case "checkpoint":
                    self.checkpoint_wanted = True
                case "rollback":
                    await roll_back("asked for over HTTP")

    async def wait_for(self, batch: asyncio.Task[T]) -> T | None:
        """The batch, or None once the run is to stop. Meanwhile the status names a teacher that is gone."""
        stop = asyncio.create_task(self._stop.wait())
        try:
            while not (await asyncio.wait([batch, stop], timeout=STATUS_S, return_when=asyncio.FIRST_COMPLETED))[0]:
                self._monitor.update(waiting_for=self.missing_teachers())
        finally:
            stop.cancel()
        self._monitor.update(waiting_for=None)
        return None if self.stopping else batch.result()

    def missing_teachers(self) -> str | None:
        """Teachers without one actor that takes work now, in words; None if every teacher has one."""
        names = [name for name, num_live in self._pool.num_live().items() if not num_live]
        return f"teacher {', '.join(names)}: no actor answers" if names else None
