"""The border between two steps: new weights to the engines, the governor's decision, the step's record.

learner's step --> sync weights --+--> evaluate, launch, record --> done
                   decide --------+
        the learner may go on as soon as it has given its weights away and the decision is there
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from opd_governor.services.record.batch import Sync
from opd_governor.services.run.terms import Command
from opd_governor.services.run.weights import OnTaken


class Border:
    """One border, begun when it is made. It owns two tasks: the decision, and everything else."""

    def __init__(
        self,
        sync: Callable[[OnTaken], Awaitable[Sync]],
        decide: Callable[[], Coroutine[Any, Any, Command]],
        conclude: Callable[[Sync, Command, float], Awaitable[None]],
    ) -> None:
        """`decide` runs beside `sync`; `conclude(sync, command, govern_s)` follows both.

        govern_s: seconds waited for the decision beyond the sync.
        """
        self._free = asyncio.Event()
        self._deciding = asyncio.create_task(decide())
        self._crossing = asyncio.create_task(self._cross(sync, conclude))

    async def learner_free(self) -> Command:
        """The governor's command, once the learner may go on; the engines may still be loading. Raises what `decide` raised."""
        await self._free.wait()
        return await self._deciding

    async def done(self) -> None:
        """Wait until the engines have the weights and the step its record. Raises what went wrong on the way."""
        await self._crossing

    async def close(self) -> None:
        """Cancel what is not done yet."""
        tasks = (self._deciding, self._crossing)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _cross(self, sync: Callable[[OnTaken], Awaitable[Sync]], conclude: Callable[[Sync, Command, float], Awaitable[None]]) -> None:
        try:
            synced = await sync(self._free.set)
        finally:
            self._free.set()
        waited_from = time.monotonic()
        command = await asyncio.shield(self._deciding)  # `close` ends it, not a cancelled wait
        await conclude(synced, command, time.monotonic() - waited_from)
