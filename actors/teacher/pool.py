"""Which actor of which teacher scores what: routing, retry, hedging, blending. Knows asyncio, not Ray.

    score(trajectories) --> teachers of the prompt's domain --> least loaded live member --> its queue --> one call at a time
                                     |                                  ^                                        |
                                     +-- blend of several               +--- retry elsewhere, hedge <-- failure -+

A score that never arrives, or is not finite, comes back as None: the caller masks and counts it. Nothing is invented.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, TypeVar

from opd_governor.actors.deadlines import FLOOR_S, CallerError, Say
from opd_governor.actors.teacher.blending import blend_scores, odd_ones
from opd_governor.actors.teacher.member import COOLDOWN_S, Member, OnRestart, TeacherHandle
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.teacher.shares import least_loaded, share_out
from opd_governor.actors.trajectory import Prompt, Rest, TokenScores, Trajectory

T = TypeVar("T")
Result = Literal["ok", "nonfinite", "error", "timeout", "unscored"]
"""error and timeout end one attempt, which is retried; unscored: the request was given up."""
OnRequest = Callable[[str, Result, float, int], None]
"""Called with (teacher, result, seconds, number of requests)."""
Issued = tuple[Member, asyncio.Future[list[TokenScores | None]]]
"""Who was asked for a share of the requests, and the answers to come."""

GOLDEN_GROUP = 16
"""Prompts in one generate call. Groups are cut by position, so an answer does not depend on which actor writes it."""


@dataclass(frozen=True, slots=True)
class Support:
    """What the objective needs beside the sampled token and the stop class."""

    student: bool = False
    """Log-probs at the trajectory's own `support_ids_TK`."""
    top_k: int = 0
    """The teacher's own most likely ids; 0: none."""
    rest: Rest | None = None
    """The log-prob of all that is not listed."""
    hidden: bool = False
    """The teacher's hidden states instead: the learner has its head, and with it the whole vocabulary."""


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


class TeacherPool:
    """Scores trajectories under the teachers of a job; lives in one event loop.

    Actors given to several teachers (equal weights, loaded once) are one member: their load and health are shared.

    >>> pool = TeacherPool([(settings, start_teacher(settings, stop_ids, seed))], domains={"maths"})
    >>> await pool.start()
    >>> scores = await pool.score(trajectories)  # None where no score arrived
    """

    def __init__(
        self,
        teachers: Sequence[tuple[TeacherSettings, Sequence[TeacherHandle]]],
        *,
        support: Support = Support(),
        domains: Iterable[str] = (),
        events: Events = Events(),
        cooldown_s: float = COOLDOWN_S,
        floor_s: float = FLOOR_S,
        strict: bool = False,
    ) -> None:
        """`domains`: those of the prompts to come; CallerError if one has no teacher.

        `strict`: every response goes through its teacher by itself, so scores are the same whatever else waits, retried or not.
        """
        self._strict, self._events = strict, events
        members: dict[int, Member] = {}
        for settings, handles in teachers:
            for handle in handles:
                if id(handle) not in members:
                    members[id(handle)] = Member(handle, settings, events.on_restart, cooldown_s, floor_s, events.say, strict=strict)
        self.members = tuple(members.values())
        self.teachers = tuple(Teacher(settings, tuple(members[id(handle)] for handle in handles)) for settings, handles in teachers)
        self.support = support
        for domain in sorted(set(domains)):
            self.teachers_of(domain)

    def teachers_of(self, domain: str) -> tuple[Teacher, ...]:
        """All teachers that score this domain. Raises CallerError where there is none, or where their supports cannot be blended."""
        serving = tuple(teacher for teacher in self.teachers if teacher.serves(domain))
        if not serving:
            offered = {teacher.settings.name: teacher.settings.domains for teacher in self.teachers}
            raise CallerError(f"domain {domain!r} has no teacher (teacher.domains: {offered}); add it to one, or leave one's domains empty")
        if len(serving) > 1 and self.support.top_k > 0:
            names = [teacher.settings.name for teacher in serving]
            raise CallerError(
                f"domain {domain!r}: teachers {names} blend only on the same ids; set objective.support to sampled or student"
            )
        return serving

    async def start(self) -> None:
        """Wait until every actor has its model. Raises what a constructor raised, or HungError."""
        await asyncio.gather(*(member.start() for member in self.members))

    def num_live(self) -> dict[str, int]:
        """Teacher -> actors that take work now; 0 while all of them restart or fail."""
        return {teacher.settings.name: sum(member.live.is_set() for member in teacher.members) for teacher in self.teachers}

    async def close(self) -> None:
        await asyncio.gather(*(member.close() for member in self.members))

    async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        """One entry per trajectory, in order; None: no score arrived or it was not finite.

        Raises CallerError for a mistake that no other actor would cure (context window, back end without the support asked for).
        """
        asked: dict[Teacher, dict[int, ScoreRequest]] = {}
        """Teacher -> place of a trajectory -> what it is asked there."""
        for place, trajectory in enumerate(trajectories):
            request = self._request(trajectory)
            for teacher in self.teachers_of(trajectory.prompt.domain):
                asked.setdefault(teacher, {})[place] = request
        found = await _all([self._score(teacher, requests) for teacher, requests in asked.items()])
        answers = dict(zip(asked, found, strict=True))
        return [self._blend(place, trajectory, answers) for place, trajectory in enumerate(trajectories)]

    def _request(self, trajectory: Trajectory) -> ScoreRequest:
        if self.support.student and trajectory.support_ids_TK is None:
            raise CallerError("the objective's support needs the student's own top ids, but the trajectory carries no support_ids_TK")
        return ScoreRequest(
            prompt_token_ids=teacher_view(trajectory.prompt),
            token_ids=trajectory.token_ids,
            support_ids_TK=trajectory.support_ids_TK if self.support.student else None,
            top_k=self.support.top_k,
            rest=self.support.rest,
            hidden=self.support.hidden,
        )

    def _blend(self, place: int, trajectory: Trajectory, answers: Mapping[Teacher, Mapping[int, Answer]]) -> TokenScores | None:
        """Every teacher of the domain has to have answered, with finite scores."""
        teachers = self.teachers_of(trajectory.prompt.domain)
        arrived = [answers[teacher][place] for teacher in teachers if place in answers[teacher]]
        odd = [answer.scores for answer in arrived if not answer.finite]
        for scores in odd:
            self._events.on_nonfinite(trajectory, scores)
        if odd or len(arrived) < len(teachers):
            return None
        return blend_scores([answer.scores for answer in arrived], [teacher.settings.weight for teacher in teachers])

    async def golden(
        self, prompts: Sequence[Prompt], *, max_new_tokens: int, temperature: float, seed: int
    ) -> list[tuple[int, ...] | None]:
        """Answers by each domain's heaviest teacher, cut after their stop id; one without a stop id ran to `max_new_tokens`.

        None: the actors failed. The same prompts and seed give the same answers with any number of actors.
        """
        answers: list[tuple[int, ...] | None] = [None] * len(prompts)
        positions: dict[str, list[int]] = {teacher.settings.name: [] for teacher in self.teachers}
        for position, prompt in enumerate(prompts):
            heaviest = max(self.teachers_of(prompt.domain), key=lambda teacher: teacher.settings.weight)
            positions[heaviest.settings.name].append(position)

        async def answer(teacher: Teacher, group: list[int]) -> None:
            options = GenerateOptions(
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                seed=seed + group[0],
                beams=teacher.settings.beams,
                length_penalty=teacher.settings.length_penalty,
                no_repeat_ngram=teacher.settings.no_repeat_ngram,
            )
            written = await self._generate(teacher, [teacher_view(prompts[position]) for position in group], options)
            for position, token_ids in zip(group, written, strict=True):
                answers[position] = token_ids

        groups = []
        for teacher in self.teachers:
            own = positions[teacher.settings.name]
            groups += [(teacher, own[start : start + GOLDEN_GROUP]) for start in range(0, len(own), GOLDEN_GROUP)]
        await asyncio.gather(*(answer(teacher, group) for teacher, group in groups))
        return answers

    async def _generate(
        self, teacher: Teacher, prompts: list[tuple[int, ...]], options: GenerateOptions
    ) -> Sequence[tuple[int, ...] | None]:
        tried: set[Member] = set()
        for _ in range(teacher.settings.max_attempts):
            member = await self._pick(teacher, tried)
            if member is None:
                break
            tried.add(member)
            try:
                return await member.generate(prompts, options)
            except CallerError:
                raise
            except Exception:  # retried on another actor
                continue
        return [None] * len(prompts)

    async def _score(self, teacher: Teacher, requests: Mapping[int, ScoreRequest]) -> dict[int, Answer]:
        """One teacher's answers by place; a place without one was given up."""
        lengths = {place: request.num_tokens for place, request in requests.items()}
        shares = share_out(teacher.members, lengths, 0 if self._strict else teacher.settings.batch_tokens)
        parts = [{place: requests[place] for place in places} for _, places in shares]
        # All issued before the first wait, so that the next call sees the load.
        asked = zip(shares, parts, strict=True)
        issued = [None if member is None else (member, member.submit(list(part.values()))) for (member, _), part in asked]
        try:
            answers = await _all([self._score_part(teacher, first, part) for first, part in zip(issued, parts, strict=True)])
        finally:
            for first in issued:
                if first is not None:
                    first[1].cancel()
        return {place: answer for part in answers for place, answer in part.items()}

    async def _score_part(self, teacher: Teacher, issued: Issued | None, part: Mapping[int, ScoreRequest]) -> dict[int, Answer]:
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
        member = await self._pick(teacher, tried)
        return None if member is None else (member, member.submit(requests))

    async def _pick(self, teacher: Teacher, tried: set[Member]) -> Member | None:
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


def teacher_view(prompt: Prompt) -> tuple[int, ...]:
    """What the teacher sees before the response: its own prompt where it has one (concise teacher), else the student's."""
    return prompt.teacher_token_ids or prompt.token_ids


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; of a single one without a task of its own."""
    return [await coroutines[0]] if len(coroutines) == 1 else list(await asyncio.gather(*coroutines))
