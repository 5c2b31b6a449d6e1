"""Which engine samples what, and what happens when one dies or hangs. Knows asyncio, not Ray.

    rollout(requests) --> least loaded live engine --> finished trajectories, each handed on once
                                 |                                  ^
                                 +-- dies, hangs --> replaced       |
                                 +-- requests still open -----------+ issued again: elsewhere at once, or on the replacement

A request carries its own seed, so a second issue asks for the same sample. Half-finished rollouts are lost with their engine.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any, Protocol, TypeVar

from opd_governor.actors.deadlines import FIRST_S, FLOOR_S, ActorLostError, CallerError, Pace, Reason, Say, first_line, reason_of, within
from opd_governor.actors.rollout.refusals import Refusals, unanswered
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.rollout.slots import Request, Slot, share_out
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory

T = TypeVar("T")

MAX_ISSUES = 3
"""Requests issued this often without one of them finishing are answered with finish reason "error": they may be what kills."""
MAX_FAILURES = 5
"""An engine that fails this often without finishing one rollout in between is not replaced again."""


class EngineHandle(Protocol):
    """What the pool needs of a rollout actor: `RayEngine`, or a fake with the same methods."""

    async def start(self) -> None: ...

    def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, greedy: bool
    ) -> AsyncIterator[list[Trajectory]]: ...

    async def end(self) -> None:
        """End its processes, whatever state it is in."""
        ...


class RolloutPool:
    """The engines of a run; lives in one event loop.

    `create` starts an actor for a slot and returns its handle; `equip` brings what a new engine needs before its first rollout
    (the present weights). Both may be called at any time, for a replacement.

    >>> pool = RolloutPool(2, create, equip)
    >>> await pool.start()
    >>> async for group in pool.rollout(requests, limits, step, settings): ...
    """

    def __init__(
        self,
        num_engines: int,
        create: Callable[[int], Any],
        equip: Callable[[Any], Awaitable[None]],
        *,
        strict: bool = False,
        floor_s: float = FLOOR_S,
        on_restart: Callable[[str], None] = lambda reason: None,
        say: Say = lambda line: None,
    ) -> None:
        self._create, self._equip, self._on_restart, self._say = create, equip, on_restart, say
        self._floor_s, self._strict = floor_s, strict
        self._num_engines = num_engines
        self._slots: list[Slot] = []
        self._error: Exception | None = None
        self._waiters: set[asyncio.Future[None]] = set()
        self._refusals = Refusals(say)

    async def start(self) -> None:
        """Returns when every engine answers. Raises what a constructor raised, or HungError."""
        self._slots = [Slot(index, self._create(index), self._floor_s) for index in range(self._num_engines)]
        await asyncio.gather(*(self._started(slot) for slot in self._slots))
        for slot in self._slots:
            slot.live = True

    async def _started(self, slot: Slot) -> None:
        await within(slot.handle.start(), FIRST_S, lambda: f"the start of {slot.name}", self._say)

    @property
    def handles(self) -> list[Any]:
        """Of the live engines."""
        return [slot.handle for slot in self._slots if slot.live]

    @property
    def every_handle(self) -> list[Any]:
        """Also of those that are coming up."""
        return [slot.handle for slot in self._slots]

    def load_tokens(self) -> list[int]:
        """Tokens allowed to the requests in flight, by engine."""
        return [slot.load_tokens for slot in self._slots]

    async def close(self) -> None:
        """Start no more replacements."""
        tasks = [slot.replacing for slot in self._slots if slot.replacing is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def retry(self) -> None:
        """Replace the engines that could not be replaced while the learner was dead."""
        self._error = None
        for slot in self._slots:
            waits = slot.replacing is not None and slot.replacing.done()
            if waits and not slot.live and slot.failures < MAX_FAILURES:
                slot.replacing = asyncio.create_task(self._replace(slot, "crash"))

    async def on_each(self, what: str, call: Callable[[Any], Awaitable[T]]) -> list[T]:
        """One call to every live engine; one that fails is replaced and has no entry."""

        async def one(slot: Slot) -> T | None:
            handle, pace = slot.handle, slot.calls.setdefault(what, Pace(self._floor_s))
            try:
                return await pace.watch(call(handle), f"{what} by {slot.name}", self._say)
            except CallerError:
                raise
            except Exception as error:  # the engine's: it is replaced
                self._fail(slot, handle, error, what)
                return None

        return [answer for answer in await asyncio.gather(*(one(slot) for slot in self._slots if slot.live)) if answer is not None]

    async def any_live(self) -> Slot:
        """The live engine with the least to do; waits for a replacement. Raises what keeps all of them down."""
        while True:
            live = [slot for slot in self._slots if slot.live]
            if live:
                return min(live, key=lambda slot: slot.load_tokens)
            if self._error is not None:
                raise self._error
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)

    async def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """Sample a response for each request, handed on in groups as they finish; each exactly once, whichever engine dies meanwhile.

        Raises CallerError, and the last failure of an engine that fails MAX_FAILURES times over this work.
        """
        await self.any_live()
        queue: asyncio.Queue[list[Trajectory] | Exception | None] = asyncio.Queue()

        async def serve(slot: Slot, share: list[Request]) -> None:
            stalled = 0
            waiting = {_key(prompt, sample): (prompt, sample) for prompt, sample in share}
            try:
                while waiting and stalled < MAX_ISSUES:
                    if not slot.live:
                        slot = await self.any_live()
                    num_waiting = len(waiting)
                    # A strict engine's answers depend on everything it is asked at once: asked again for all, it answers the same.
                    asked = share if self._strict else list(waiting.values())
                    await self._stream(slot, asked, waiting, (limits, step, settings, greedy), queue)
                    stalled = stalled + 1 if len(waiting) == num_waiting else 0
                if waiting:
                    self._say(f"{len(waiting)} rollouts of step {step} given up: no engine finished any of them in {MAX_ISSUES} tries")
                    queue.put_nowait([unanswered(prompt, sample, limits, step) for prompt, sample in waiting.values()])
                queue.put_nowait(None)
            except Exception as error:  # handed to the consumer, which raises it
                queue.put_nowait(error)

        tasks = [
            asyncio.create_task(serve(slot, share))
            for slot, share in share_out(self._slots, requests, limits.cap_tokens, strict=self._strict)
        ]
        try:
            running = len(tasks)
            while running:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                if item is None:
                    running -= 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _stream(
        self,
        slot: Slot,
        share: list[Request],
        open_requests: dict[tuple[int, int, int], Request],
        terms: tuple[Any, ...],
        queue: asyncio.Queue,
    ) -> None:
        """One engine's share into the queue, where still open. Requests stay open only if the engine fails."""
        limits, step, settings, greedy = terms
        handle, started = slot.handle, time.monotonic()
        budget_tokens = len(share) * limits.cap_tokens
        slot.load_tokens += budget_tokens
        num_tokens = 0

        def waited_for() -> str:
            return f"{len(open_requests)} of {len(share)} rollouts of step {step} from {slot.name}"

        async def consume() -> None:
            nonlocal num_tokens
            async with aclosing(handle.rollout(share, limits, step, settings, greedy)) as groups:
                async for group in groups:
                    # Answers to requests that are no longer open were handed on before.
                    fresh = [t for t in group if open_requests.pop(_key(t.prompt, t.sample), None) is not None]
                    num_tokens += sum(len(t.token_ids) for t in fresh)
                    slot.failures = 0
                    self._refusals.tell(fresh, step)
                    if fresh:
                        queue.put_nowait(fresh)
            if open_requests:
                raise RuntimeError("the stream ended early")

        try:
            # Its other work comes first.
            await within(consume(), slot.pace.deadline_s(slot.load_tokens), waited_for, self._say)
            slot.pace.observe(num_tokens, time.monotonic() - started)
        except CallerError:
            raise
        except Exception as error:  # the engine's: it is replaced
            self._fail(slot, handle, error, f"{waited_for()}, which are issued again")
        finally:
            slot.load_tokens -= budget_tokens

    def _fail(self, slot: Slot, handle: Any, error: Exception, during: str) -> None:
        """Take the engine out and replace it, once, however many of its calls failed."""
        if slot.handle is not handle or not slot.live:
            return
        slot.live = False
        slot.failures += 1
        reason = reason_of(error)
        self._say(f"{slot.name} lost ({reason}) with {during}: {first_line(error)}")
        if slot.failures >= MAX_FAILURES:
            self._give_up(slot, error)
        else:
            slot.replacing = asyncio.create_task(self._replace(slot, reason))

    async def _replace(self, slot: Slot, reason: Reason) -> None:
        started = time.monotonic()
        while True:
            try:
                await slot.handle.end()
                slot.handle = self._create(slot.index)
                await self._started(slot)
                await self._equip(slot.handle)
            except ActorLostError as error:  # another's fault: `retry` once it is back
                self._error = error
                self._wake()
                return
            except Exception as error:  # tried again, within bounds
                slot.failures += 1
                self._say(f"{slot.name} did not come back: {first_line(error)}")
                if slot.failures >= MAX_FAILURES:
                    self._give_up(slot, error)
                    return
                continue
            slot.live = True
            self._say(f"{slot.name} is back after {time.monotonic() - started:.1f} s")
            self._on_restart(reason)
            self._wake()
            return

    def _give_up(self, slot: Slot, error: Exception) -> None:
        self._say(f"{slot.name} is given up: it failed {slot.failures} times without a finished rollout in between")
        if all(one.failures >= MAX_FAILURES for one in self._slots):
            self._error = ActorLostError("rollout", error)
            self._wake()

    def _wake(self) -> None:
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)


def _key(prompt: Prompt, sample: int) -> tuple[int, int, int]:
    return prompt.epoch, prompt.index, sample
