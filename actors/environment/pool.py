"""The processes of an environment: who asks which, and what happens when one dies or hangs. Knows asyncio, not Ray.

answer(conversation, message) --> its process, one message at a time --> Reply
                                          |
                                          +-- dies: a new one, to which the conversation is played again
                                          +-- silent for timeout_s: that conversation fails; a new one for the others
"""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from opd_governor.actors.deadlines import Say, first_line
from opd_governor.actors.environment.protocol import Failure, Message, Reply
from opd_governor.actors.environment.settings import EnvironmentSettings

START_S = 300.0
"""For a process to load the environment."""
MAX_TRIES = 3
"""A conversation that its process died of so often fails: it may be what kills."""


class EnvironmentHandle(Protocol):
    """What the pool needs of an actor."""

    async def ready(self) -> None: ...

    async def answer(self, ticket: int, row: Mapping[str, Any], before: list[Message], message: Message) -> Reply | Failure: ...

    def drop(self, ticket: int) -> None: ...

    def end(self) -> None: ...


@dataclass(eq=False, slots=True)
class _Seat:
    """The place of a process."""

    handle: EnvironmentHandle | None = None
    num_open: int = 0
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


@dataclass(eq=False, slots=True)
class Conversation:
    """One task: its row, and the student's messages so far."""

    ticket: int
    row: Mapping[str, Any]
    seat: _Seat
    before: list[Message] = field(default_factory=list)


class EnvironmentPool:
    """Processes start with the first conversations."""

    def __init__(
        self,
        settings: EnvironmentSettings,
        create: Callable[[], EnvironmentHandle],
        *,
        on_restart: Callable[[str], None] = lambda reason: None,
        say: Say = lambda line: None,
    ) -> None:
        self.settings = settings
        self._create, self._on_restart, self._say = create, on_restart, say
        self._seats = [_Seat() for _ in range(settings.concurrency)]
        self._tickets = itertools.count()

    def open(self, row: Mapping[str, Any]) -> Conversation:
        """A conversation, at the process that has the fewest. `close` it."""
        seat = min(self._seats, key=lambda seat: seat.num_open)
        seat.num_open += 1
        return Conversation(next(self._tickets), row, seat)

    def close(self, conversation: Conversation) -> None:
        """It asks nothing more."""
        conversation.seat.num_open -= 1
        if conversation.seat.handle is not None:
            conversation.seat.handle.drop(conversation.ticket)

    async def answer(self, conversation: Conversation, message: Message) -> Reply | Failure:
        """The environment's answer to the student's message."""
        seat = conversation.seat
        async with seat.turn:
            found = await self._asked(seat, conversation, message)
        conversation.before.append(message)
        return found

    async def _asked(self, seat: _Seat, conversation: Conversation, message: Message) -> Reply | Failure:
        words = ""
        for _ in range(MAX_TRIES):
            try:
                handle = await self._ready(seat)
                # Played again to a new process, every message takes its time.
                allowed_s = self.settings.timeout_s * (1 + len(conversation.before))
                asked = handle.answer(conversation.ticket, conversation.row, conversation.before, message)
                return await _within(asked, allowed_s)
            except TimeoutError:
                self._lost(seat, "hang", f"no answer within {self.settings.timeout_s:g} s (environment.timeout_s)")
                return Failure("timeout", f"no answer within {self.settings.timeout_s:g} s (environment.timeout_s)")
            except asyncio.CancelledError:
                raise
            except Exception as error:  # the process is gone: another one
                words = first_line(error)
                self._lost(seat, "crash", words)
        return Failure("died", f"its process died {MAX_TRIES} times at this message: {words}")

    async def _ready(self, seat: _Seat) -> EnvironmentHandle:
        if seat.handle is None:
            seat.handle = self._create()
            try:
                await _within(seat.handle.ready(), START_S)
            except TimeoutError:
                raise RuntimeError(f"it does not load within {START_S:g} s") from None
        return seat.handle

    def _lost(self, seat: _Seat, reason: str, words: str) -> None:
        if seat.handle is not None:
            seat.handle.end()
            seat.handle = None
        self._say(f"environment process {self._seats.index(seat)} lost ({reason}): {words}")
        self._on_restart(reason)

    def end(self) -> None:
        """End the processes."""
        for seat in self._seats:
            if seat.handle is not None:
                seat.handle.end()
                seat.handle = None


async def _within(call: Awaitable[Any], seconds: float) -> Any:
    return await asyncio.wait_for(call, seconds)
