"""Calls to another process: how long they may take, and what they raise when it dies. Knows asyncio, not Ray.

A deadline is what the same work took before, times a generous factor.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Say = Callable[[str], None]
Reason = Literal["crash", "hang"]

FLOOR_S = 60.0
"""Nothing is given up sooner: a busy machine stalls for seconds, and a restart costs half a minute."""
FACTOR = 10.0
"""Work that takes ten times the slowest seen lately does not come back."""
FADE = 0.9
"""How much of a slow measurement the next one leaves: a single stall is forgotten after some twenty calls."""
FIRST_S, FIRST_TOKENS_PER_S = 600.0, 10.0
"""Before anything was measured: the time to load a large model, and a pace below any engine's."""


class HungError(TimeoutError):
    """A call that did not come back within its deadline; says what was waited for, how long, and how long it was allowed."""


class CallerError(ValueError):
    """The request itself is wrong: no other actor would answer it. Any other error of an actor counts as the actor's fault."""


class TransferError(RuntimeError):
    """Weights did not reach every engine, though the learner has them: an engine, or the way to it, is at fault."""


class ActorLostError(RuntimeError):
    """An actor is gone, and with it a state that others need."""

    def __init__(self, role: str, error: Exception) -> None:
        self.role, self.reason = role, reason_of(error)
        super().__init__(f"{role} lost ({self.reason}): {first_line(error)}")


class Pace:
    """Deadlines for one kind of work. The unit is tokens where the work grows with them, else one call.

    >>> pace = Pace(floor_s=60.0)
    >>> pace.observe(tokens=6000, seconds=9.0)
    >>> pace.deadline_s(60_000)
    900.0
    """

    def __init__(self, floor_s: float = FLOOR_S) -> None:
        self._floor_s = floor_s
        self._s_per_token: float | None = None

    def observe(self, tokens: int, seconds: float) -> None:
        """What a call of this size took."""
        if tokens > 0:
            self._s_per_token = max(seconds / tokens, FADE * (self._s_per_token or 0.0))

    def deadline_s(self, tokens: int = 1) -> float:
        """What a call of this size may take."""
        if self._s_per_token is None:
            return max(self._floor_s, FIRST_S + tokens / FIRST_TOKENS_PER_S)
        return max(self._floor_s, FACTOR * tokens * self._s_per_token)

    async def watch(self, reply: Awaitable[T], what: str, say: Say, *, tokens: int = 1) -> T:
        """The reply within its deadline; the time it took counts for the next one's."""
        started = time.monotonic()
        result = await within(reply, self.deadline_s(tokens), lambda: what, say)
        self.observe(tokens, time.monotonic() - started)
        return result


async def within(reply: Awaitable[T], deadline_s: float, what: Callable[[], str], say: Say) -> T:
    """The reply, or HungError after `deadline_s`; warns when half of it has passed. Cancelling cancels the reply.

    `what` tells what is waited for and from whom, as it stands when the line is written.
    """
    task: asyncio.Future[T] = asyncio.ensure_future(reply)
    started = time.monotonic()
    try:
        done: set[Any]
        done, _ = await asyncio.wait([task], timeout=deadline_s / 2)
        if not done:
            say(f"watchdog: waiting {time.monotonic() - started:.1f} s for {what()}; given up at {deadline_s:.1f} s")
            done, _ = await asyncio.wait([task], timeout=deadline_s / 2)
        if not done:
            raise HungError(f"waited {time.monotonic() - started:.1f} s for {what()}, deadline {deadline_s:.1f} s")
        return task.result()
    finally:
        task.cancel()


def reason_of(error: Exception) -> Reason:
    """Label of a restart."""
    return "hang" if isinstance(error, HungError) else "crash"


def first_line(error: Exception) -> str:
    """For a person's one line: Ray's messages run over a page, and name what happened in an actor last."""
    cause = getattr(error, "cause", None)
    error = cause if isinstance(cause, Exception) else error
    return f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
