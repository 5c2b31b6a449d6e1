"""One teacher actor as its pool sees it: a queue, one call at a time, and a breaker. Knows asyncio, not Ray."""

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol, TypeVar

from opd_governor.actors.deadlines import FLOOR_S, CallerError, Pace, Reason, Say, first_line, within
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, generate_timeout_s
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import TokenScores

OnRestart = Callable[[str, str], None]
"""Called with (teacher, reason) when an actor answers as another process than before: reason is crash or hang."""
T = TypeVar("T")

COOLDOWN_S = 1.0
"""Wait before a member that failed twice in a row is asked again; doubles with every further failure."""
MAX_COOLDOWN_S = 60.0
CALL_BATCHES = 4
"""Most batches of a teacher in one call, where so much waits: it costs the driver one message, and the teacher pads less."""
START_TIMEOUT_S = 600.0
"""How long a process may take to load its model before its silence counts as a hang."""


class TeacherHandle(Protocol):
    """What the pool needs of an actor: `RayTeacher`, or a fake with the same methods."""

    async def score(self, requests: Sequence[ScoreRequest]) -> tuple[str, list[TokenScores | None]]:
        """The scores, and what `ping` gives of the process that made them."""
        ...

    async def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]: ...

    def follow(self, name: str, weights: Any) -> None:
        """Only asked of teachers that follow the student: score with these weights from the next call on."""
        ...

    async def ping(self) -> str:
        """Names the actor's process: no other one has had the name."""
        ...

    async def restart(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Asked:
    """Requests that stay together, and who waits for their scores."""

    requests: Sequence[ScoreRequest]
    scores: asyncio.Future[list[TokenScores | None]]
    num_tokens: int


class Member:
    """Batches what queues up while its actor is busy; set aside (not `live`) from a failed call until a ping answers again."""

    def __init__(
        self,
        handle: TeacherHandle,
        settings: TeacherSettings,
        on_restart: OnRestart,
        cooldown_s: float = COOLDOWN_S,
        floor_s: float = FLOOR_S,
        say: Say = lambda line: None,
        *,
        strict: bool = False,
    ) -> None:
        """`strict`: one share a call, so that a score does not depend on what else waits (it differs in the last bits)."""
        self.handle = handle
        self._strict = strict
        self.settings = settings
        self.load_tokens = 0
        """Tokens queued and in flight."""
        self.live = asyncio.Event()
        self.live.set()
        self._on_restart = on_restart
        self._cooldown_s = cooldown_s
        self._say = say
        self._queue: list[Asked] = []
        self._busy = asyncio.Lock()
        self._failures = 0
        self._process: str | None = None
        """Worker id of the last reply."""
        self._pace = Pace(floor_s)
        self._worker: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Wait until the actor has its model. Raises what its constructor raised, or HungError."""
        self._note_process(await self._ping(), "crash")

    async def _ping(self) -> str:
        return await within(
            self.handle.ping(), START_TIMEOUT_S, lambda: f"the start of an actor of teacher {self.settings.name}", self._say
        )

    def submit(self, requests: Sequence[ScoreRequest]) -> asyncio.Future[list[TokenScores | None]]:
        """Queue requests for one call: their scores, None where the back end gives one up; HungError or what the actor raised.

        The load rises at once, so that the next pick sees it. Cancelling the future takes a waiting share from the queue.
        """
        num_tokens = sum(request.num_tokens for request in requests)
        share = Asked(requests, asyncio.get_running_loop().create_future(), num_tokens)
        self._queue.append(share)
        self._add_load(share.num_tokens)
        share.scores.add_done_callback(lambda _: self._add_load(-share.num_tokens))
        if self._worker is None or self._worker.done():
            self._worker = self._spawn(self._drain())
        return share.scores

    async def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        tokens = sum(len(prompt) + options.max_new_tokens for prompt in prompts)
        self._add_load(tokens)
        timeout_s = generate_timeout_s(self.settings, options)
        try:
            async with self._busy:
                return await self._call(self.handle.generate(prompts, options), timeout_s, f"{len(prompts)} golden answers")
        finally:
            self._add_load(-tokens)

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _add_load(self, tokens: int) -> None:
        self.load_tokens += tokens

    async def _drain(self) -> None:
        while self._queue:
            async with self._busy:
                batch = self._take_batch()
                if not batch:  # nobody waits any more
                    continue
                requests = [request for share in batch for request in share.requests]
                tokens, started = sum(share.num_tokens for share in batch), time.monotonic()
                timeout_s = min(self.settings.timeout_s, self._pace.deadline_s(tokens))
                try:
                    reply = self.handle.score(requests)
                    process, scores = await self._call(reply, timeout_s, f"{len(requests)} scores ({tokens} tokens)")
                    self._note_process(process, "crash")
                    assert len(scores) == len(requests), (len(scores), len(requests))
                    self._pace.observe(tokens, time.monotonic() - started)
                except Exception as error:  # handed to the waiting calls: they retry elsewhere or raise it
                    if not self.live.is_set():
                        batch += self._queue
                        self._queue = []
                    for share in batch:
                        if not share.scores.done():
                            share.scores.set_exception(error)
                    continue
            answers = iter(scores)
            for share in batch:
                own = list(islice(answers, len(share.requests)))
                if not share.scores.done():
                    share.scores.set_result(own)

    def _take_batch(self) -> list[Asked]:
        """The oldest shares, CALL_BATCHES' worth of tokens; shares that nobody waits for any more are dropped."""
        waiting = [share for share in self._queue if not share.scores.done()]
        num_taken, room_tokens = 0, 0 if self._strict else CALL_BATCHES * self.settings.batch_tokens
        for share in waiting:
            room_tokens -= share.num_tokens
            if num_taken and room_tokens < 0:
                break
            num_taken += 1
        self._queue = waiting[num_taken:]
        return waiting[:num_taken]

    async def _call(self, reply: Coroutine[Any, Any, T], timeout_s: float, what: str) -> T:
        """Any error but a CallerError sets the member aside."""
        try:
            result = await within(reply, timeout_s, lambda: f"{what} from teacher {self.settings.name}", self._say)
        except CallerError:
            raise
        except Exception as error:
            self._failures += 1
            if self.live.is_set():
                self.live.clear()
                self._say(f"an actor of teacher {self.settings.name} is set aside until it answers: {first_line(error)}")
                self._spawn(self._recover(hangs=isinstance(error, TimeoutError)))
            raise
        self._failures = 0
        return result

    async def _recover(self, hangs: bool) -> None:
        """End a process that hangs (Ray restarts it), then ping until one answers."""
        reason: Reason = "hang" if hangs else "crash"
        while not self.live.is_set():
            if self._failures > 1:
                await asyncio.sleep(min(self._cooldown_s * 2 ** (self._failures - 2), MAX_COOLDOWN_S))
            try:
                if hangs:
                    await self.handle.restart()
                process = await self._ping()
            except Exception as error:  # still sick: asked again after a longer wait
                self._failures += 1
                hangs = isinstance(error, TimeoutError)
                continue
            self._note_process(process, reason)
            self.live.set()

    def _note_process(self, process: str, reason: Reason) -> None:
        """Each reply carries its process id: Ray may have restarted the actor, more than once, while nothing was asked."""
        if self._process not in (None, process):
            self._on_restart(self.settings.name, reason)
        self._process = process

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
