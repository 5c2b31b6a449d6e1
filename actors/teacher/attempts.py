"""One call's requests at one teacher: tried on its members until one answers, hedged when slow. Knows asyncio, not Ray."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

from opd_governor.actors.deadlines import CallerError, Say
from opd_governor.actors.teacher.blending import odd_ones
from opd_governor.actors.teacher.member import Member, OnRestart
from opd_governor.actors.teacher.scorers import ScoreRequest
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.teacher.shares import least_loaded
from opd_governor.actors.trajectory import TokenScores, Trajectory

Result = Literal["ok", "nonfinite", "error", "timeout", "unscored"]
"""error and timeout end one attempt, which is retried; unscored: the request was given up."""
OnRequest = Callable[[str, Result, float, int], None]
"""Called with (teacher, result, seconds, number of requests)."""
Issued = tuple[Member, asyncio.Future[list[TokenScores | None]]]
"""Who was asked for a share of the requests, and the answers to come."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """A teacher's settings and the actors that serve it."""

    settings: TeacherSettings
    members: tuple[Member, ...]

    def serves(self, domain: str) -> bool:
        return not self.settings.domains or domain in self.settings.domains


@dataclass(frozen=True, slots=True)
class Events:
    """Where a pool tells what happens."""

    on_request: OnRequest = lambda teacher, result, seconds, num: None
    on_restart: OnRestart = lambda teacher, reason: None
    on_nonfinite: Callable[[Trajectory, TokenScores], None] = lambda trajectory, scores: None
    """A sample whose scores are not finite, with one teacher's scores."""
    say: Say = lambda line: None
    """A line for a person."""


class Answer(NamedTuple):
    """One teacher's scores of one response."""

    scores: TokenScores
    finite: bool


class Attempts:
    """Asks members, one after the other or two at a time, and counts every attempt."""

    def __init__(self, events: Events) -> None:
        self._events = events

    async def score(self, teacher: Teacher, issued: Issued | None, part: Mapping[int, ScoreRequest]) -> dict[int, Answer]:
        """Up to max_attempts tries of the requests of one call, each on another member if there is one."""
        name, started, requests = teacher.settings.name, time.monotonic(), list(part.values())
        tried: set[Member] = set()
        found: dict[int, Answer] = {}
        for _ in range(teacher.settings.max_attempts):
            issued = issued or await self._issue(teacher, tried, requests)
            if issued is None:
                break
            try:
                answers = await self._attempt(teacher, issued, tried, requests)
                found = {place: answer for place, answer in zip(part, answers, strict=True) if answer is not None}
                break
            except CallerError:
                raise
            except Exception:  # already reported; retried on another actor
                issued = None
        if num_unscored := len(part) - len(found):
            self._events.on_request(name, "unscored", time.monotonic() - started, num_unscored)
        return found

    async def _attempt(self, teacher: Teacher, issued: Issued, tried: set[Member], requests: Sequence[ScoreRequest]) -> list[Answer | None]:
        """First success of one member and, when it is slow, a second one. Raises the last failure where both fail."""
        member, reply = issued
        tried.add(member)
        if teacher.settings.hedge_after_s is None:
            return await self._report(teacher, reply, len(requests))
        pending = {asyncio.create_task(self._report(teacher, reply, len(requests)))}
        try:
            done, pending = await asyncio.wait(pending, timeout=teacher.settings.hedge_after_s, return_when=asyncio.FIRST_COMPLETED)
            other = least_loaded(teacher.members, tried)
            if not done and other is not None:
                tried.add(other)
                pending.add(asyncio.create_task(self._report(teacher, other.submit(requests), len(requests))))
            while True:
                winner = next((task for task in done if task.exception() is None), None)
                if winner is not None:
                    return winner.result()
                if not pending:
                    return done.pop().result()
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in pending:
                task.cancel()

    async def _report(self, teacher: Teacher, reply: asyncio.Future[list[TokenScores | None]], num: int) -> list[Answer | None]:
        """The answers of one attempt, counted. Raises what the attempt raised, counted too."""
        name, started = teacher.settings.name, time.monotonic()
        try:
            scores = await reply
        except Exception as error:
            self._events.on_request(name, "timeout" if isinstance(error, TimeoutError) else "error", time.monotonic() - started, num)
            raise
        odd = odd_ones(scores)
        results: tuple[tuple[Result, int], ...] = ("nonfinite", len(odd)), ("ok", num - len(odd) - sum(score is None for score in scores))
        for result, number in results:
            if number:
                self._events.on_request(name, result, time.monotonic() - started, number)

        def named(score: TokenScores) -> TokenScores:
            """Actors that serve several teachers name but one of them."""
            return score if score.teacher == name else replace(score, teacher=name)

        return [None if score is None else Answer(named(score), place not in odd) for place, score in enumerate(scores)]

    async def _issue(self, teacher: Teacher, tried: set[Member], requests: Sequence[ScoreRequest]) -> Issued | None:
        member = await self.pick(teacher, tried)
        return None if member is None else (member, member.submit(requests))

    async def pick(self, teacher: Teacher, tried: set[Member]) -> Member | None:
        """The least loaded live member, one not tried yet where there is one; waits up to timeout_s for one to come back."""
        member = least_loaded(teacher.members, tried) or least_loaded(teacher.members)
        if member is not None:
            return member
        waits = {asyncio.create_task(member.live.wait()) for member in teacher.members}
        try:
            await asyncio.wait(waits, timeout=teacher.settings.timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        return least_loaded(teacher.members, tried) or least_loaded(teacher.members)
