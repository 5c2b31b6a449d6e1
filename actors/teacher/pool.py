"""Which actor of which teacher scores what: routing, retry, hedging, blending. Knows asyncio, not Ray.

    score(trajectories) --> teachers of the prompt's domain --> least loaded live member --> its queue --> one call at a time
                                     |                                  ^                                        |
                                     +-- blend of several               +--- retry elsewhere, hedge <-- failure -+

A score that never arrives, or is not finite, comes back as None: the caller masks and counts it. Nothing is invented.
"""

import asyncio
import heapq
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, Literal, TypeVar

import numpy as np

from opd_governor.actors.deadlines import FLOOR_S, Say
from opd_governor.actors.teacher.member import COOLDOWN_S, Member, OnRestart, TeacherHandle
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest
from opd_governor.actors.teacher.settings import TeacherSettings
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


@dataclass(frozen=True)
class Teacher:
    """A teacher's settings and the actors that serve it."""

    settings: TeacherSettings
    members: tuple[Member, ...]

    def serves(self, domain: str) -> bool:
        return not self.settings.domains or domain in self.settings.domains


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
        on_request: OnRequest = lambda teacher, result, seconds, num: None,
        on_restart: OnRestart = lambda teacher, reason: None,
        on_nonfinite: Callable[[Trajectory, TokenScores], None] = lambda trajectory, scores: None,
        cooldown_s: float = COOLDOWN_S,
        floor_s: float = FLOOR_S,
        say: Say = lambda line: None,
        alone: bool = False,
    ) -> None:
        """`alone`: every response goes through its teacher by itself, so scores are the same whoever else waits, retried or not."""
        self._alone = alone
        members: dict[int, Member] = {}
        for settings, handles in teachers:
            for handle in handles:
                members.setdefault(id(handle), Member(handle, settings, on_restart, cooldown_s, floor_s, say, alone=alone))
        self.members = tuple(members.values())
        self.teachers = tuple(Teacher(settings, tuple(members[id(handle)] for handle in handles)) for settings, handles in teachers)
        self.support = support
        self._on_request, self._on_nonfinite = on_request, on_nonfinite
        for domain in sorted(set(domains)):
            self.teachers_of(domain)

    def teachers_of(self, domain: str) -> tuple[Teacher, ...]:
        """All teachers that score this domain. Raises ValueError where there is none, or where their supports cannot be blended."""
        serving = tuple(teacher for teacher in self.teachers if teacher.serves(domain))
        if not serving:
            offered = {teacher.settings.name: teacher.settings.domains for teacher in self.teachers}
            raise ValueError(f"domain {domain!r} has no teacher (teacher.domains: {offered}); add it to one, or leave one's domains empty")
        if len(serving) > 1 and self.support.top_k > 0:
            names = [teacher.settings.name for teacher in serving]
            raise ValueError(f"domain {domain!r}: teachers {names} blend only on the same ids; set objective.support to sampled or student")
        return serving

    async def start(self) -> None:
        """Wait until every actor has its model. Raises what a constructor raised, or TimeoutError."""
        await asyncio.gather(*(member.start() for member in self.members))

    def num_live(self) -> dict[str, int]:
        """Teacher -> actors that take work now; 0 while all of them restart or fail."""
        return {teacher.settings.name: sum(member.live.is_set() for member in teacher.members) for teacher in self.teachers}

    async def close(self) -> None:
        await asyncio.gather(*(member.close() for member in self.members))

    async def score(self, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        """One entry per trajectory, in order; None: no score arrived or it was not finite.

        Raises ValueError for a mistake that no other actor would cure (context window, back end without the support asked for).
        """
        by_domain: dict[str, list[int]] = {}
        for place, trajectory in enumerate(trajectories):
            by_domain.setdefault(trajectory.prompt.domain, []).append(place)
        parts = await _all([self._score_domain(domain, [trajectories[p] for p in places]) for domain, places in by_domain.items()])
        return _in_place(list(by_domain.values()), parts)

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
            except ValueError:
                raise
            except Exception:  # retried on another actor
                continue
        return [None] * len(prompts)

    async def _score_domain(self, domain: str, trajectories: Sequence[Trajectory]) -> list[TokenScores | None]:
        teachers = self.teachers_of(domain)
        if self.support.student and any(trajectory.support_ids_TK is None for trajectory in trajectories):
            raise ValueError("the objective's support needs the student's own top ids, but the trajectory carries no support_ids_TK")
        requests = [
            ScoreRequest(
                prompt_token_ids=teacher_view(trajectory.prompt),
                token_ids=trajectory.token_ids,
                support_ids_TK=trajectory.support_ids_TK if self.support.student else None,
                top_k=self.support.top_k,
                rest=self.support.rest,
                hidden=self.support.hidden,
            )
            for trajectory in trajectories
        ]
        by_teacher = await _all([self._score_requests(teacher, requests) for teacher in teachers])
        spoiled = set[int]()
        for scores in by_teacher:
            for place, odd in odd_ones(scores):
                self._on_nonfinite(trajectories[place], odd)
                spoiled.add(place)
        weights = [teacher.settings.weight for teacher in teachers]
        blends: list[TokenScores | None] = []
        for place, parts in enumerate(zip(*by_teacher, strict=True)):
            arrived = [part for part in parts if part is not None]
            whole = len(arrived) == len(parts) and place not in spoiled
            blends.append(blend_scores(arrived, weights) if whole else None)
        return blends

    async def _score_requests(self, teacher: Teacher, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        shares = self._share(teacher, requests)
        parts = [[requests[place] for place in places] for _, places in shares]
        # All issued before the first wait, so that whoever comes next sees the load.
        issued = [None if member is None else (member, member.submit(part)) for (member, _), part in zip(shares, parts, strict=True)]
        try:
            scored = await _all([self._score_share(teacher, first, part) for first, part in zip(issued, parts, strict=True)])
        finally:
            for first in issued:
                if first is not None:
                    first[1].cancel()
        return _in_place([places for _, places in shares], scored)

    def _share(self, teacher: Teacher, requests: Sequence[ScoreRequest]) -> list[tuple[Member | None, list[int]]]:
        """Requests, by their places, to the least loaded live members, in shares that fit one call; None: no member is live.

        An idle member starts at once with what it is given, so idle ones get one request each in turn. A busy one takes all that
        waits for it in its next call, so there requests stay together: one message for many.
        """
        lengths = [request.num_tokens for request in requests]
        room_tokens = 0 if self._alone else teacher.settings.batch_tokens
        loads = [(member.load_tokens, index) for index, member in enumerate(teacher.members) if member.live.is_set()]
        if not loads:
            return [(None, share) for share in cut(range(len(requests)), lengths, room_tokens)]
        heapq.heapify(loads)
        given: dict[int, list[int]] = {}
        load, index = heapq.heappop(loads)
        together_tokens = room_tokens if load else 0
        """What may still stay together with the request before."""
        for place, length in enumerate(lengths):
            if place and length > together_tokens:
                load, index = heapq.heappushpop(loads, (load, index))
                together_tokens = room_tokens if teacher.members[index].load_tokens else 0
            given.setdefault(index, []).append(place)
            load, together_tokens = load + length, together_tokens - length
        return [(teacher.members[index], share) for index, places in given.items() for share in cut(places, lengths, room_tokens)]

    async def _score_share(self, teacher: Teacher, issued: Issued | None, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        name, started, tried = teacher.settings.name, time.monotonic(), set[Member]()
        scores: list[TokenScores | None] = [None] * len(requests)
        for _ in range(teacher.settings.max_attempts):
            issued = issued or await self._issue(teacher, tried, requests)
            if issued is None:
                break
            try:
                scores = await self._attempt(teacher, issued, tried, requests)
                break
            except ValueError:
                raise
            except Exception:  # already reported; retried on another actor
                issued = None
        if num_unscored := sum(score is None for score in scores):
            self._on_request(name, "unscored", time.monotonic() - started, num_unscored)
        # Actors that serve several teachers name but one of them.
        return [score if score is None or score.teacher == name else replace(score, teacher=name) for score in scores]

    async def _attempt(
        self, teacher: Teacher, issued: Issued, tried: set[Member], requests: Sequence[ScoreRequest]
    ) -> list[TokenScores | None]:
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

    async def _report(self, teacher: Teacher, reply: asyncio.Future[list[TokenScores | None]], num: int) -> list[TokenScores | None]:
        name, started = teacher.settings.name, time.monotonic()
        try:
            scores = await reply
        except Exception as error:
            self._on_request(name, "timeout" if isinstance(error, TimeoutError) else "error", time.monotonic() - started, num)
            raise
        num_odd = len(odd_ones(scores))
        results: tuple[tuple[Result, int], ...] = ("nonfinite", num_odd), ("ok", num - num_odd - sum(score is None for score in scores))
        for result, number in results:
            if number:
                self._on_request(name, result, time.monotonic() - started, number)
        return scores

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


def least_loaded(members: Iterable[Member], tried: Iterable[Member] = ()) -> Member | None:
    """The live member outside `tried` with the fewest tokens queued and in flight; None where there is none."""
    best = None
    for member in members:
        if (best is None or member.load_tokens < best.load_tokens) and member.live.is_set() and member not in tried:
            best = member
    return best


def teacher_view(prompt: Prompt) -> tuple[int, ...]:
    """What the teacher sees before the response: its own prompt where it has one (concise teacher), else the student's."""
    return prompt.teacher_token_ids or prompt.token_ids


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; of a single one without a task of its own."""
    return [await coroutines[0]] if len(coroutines) == 1 else list(await asyncio.gather(*coroutines))


def _in_place(places: Sequence[Sequence[int]], parts: Sequence[Sequence[TokenScores | None]]) -> list[TokenScores | None]:
    """Parts put together: each one's scores at its places."""
    found = dict(zip(chain.from_iterable(places), chain.from_iterable(parts), strict=True))
    return [found[place] for place in range(len(found))]


def cut(places: Iterable[int], lengths: Sequence[int], room_tokens: int) -> list[list[int]]:
    """In order, where the padded size stays within the room; what is longer than that goes by itself."""
    shares: list[list[int]] = []
    widest = 0
    for place in places:
        widest = max(widest, lengths[place])
        if shares and (len(shares[-1]) + 1) * widest <= room_tokens:
            shares[-1].append(place)
        else:
            shares.append([place])
            widest = lengths[place]
    return shares


def odd_ones(scores: Sequence[TokenScores | None]) -> list[tuple[int, TokenScores]]:
    """Scores that are not finite, and their places."""
    arrived = [(place, score) for place, score in enumerate(scores) if score is not None]
    rows = [score for _, score in arrived if score.support_ids_TK is None]
    plain = [array_T for score in rows for array_T in (score.sampled_logp_T, score.stop_logp_T)]
    if len(rows) == len(arrived) and plain and np.isfinite(np.concatenate(plain)).all():  # one look at all of them: most often it is enough
        return []
    return [(place, score) for place, score in arrived if not is_finite(score)]


def is_finite(scores: TokenScores) -> bool:
    """Whether every number can enter a loss; padded support entries (id -1) are -inf by definition."""
    if (hidden_TH := scores.hidden_TH) is not None:
        exponent = np.uint16(0x7F80)  # of bfloat16: all its bits are set in what is no number
        return bool((hidden_TH & exponent != exponent).all() if hidden_TH.dtype == np.uint16 else np.isfinite(hidden_TH).all())
    if not (np.isfinite(scores.sampled_logp_T).all() and np.isfinite(scores.stop_logp_T).all()):
        return False
    if scores.support_ids_TK is None or scores.support_logp_TK is None:
        return True
    return bool(np.isfinite(scores.support_logp_TK[scores.support_ids_TK >= 0]).all())


def blend_scores(scores: Sequence[TokenScores], weights: Sequence[float]) -> TokenScores:
    """The log-probs of the mixture sum_i w_i p_i, weights normalised; supports must stand on the same ids.

    An id that one teacher's vocabulary lacks (-1) has probability 0 there.
    """
    if len(scores) == 1:
        return scores[0]
    log_weights = np.log(np.asarray(weights, np.float32) / sum(weights))

    def mix(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.logaddexp.reduce([weight + array for weight, array in zip(log_weights, arrays, strict=True)]).astype(np.float32)

    supports = [(s.support_ids_TK, s.support_logp_TK) for s in scores if s.support_ids_TK is not None and s.support_logp_TK is not None]
    assert len(supports) in (0, len(scores)), "some teachers returned a support, others none"
    ids_TK = np.maximum.reduce([ids for ids, _ in supports]) if supports else None
    assert all(((ids == ids_TK) | (ids < 0)).all() for ids, _ in supports), "supports on different ids"
    return TokenScores(
        teacher="+".join(s.teacher for s in scores),
        sampled_logp_T=mix([s.sampled_logp_T for s in scores]),
        stop_logp_T=mix([s.stop_logp_T for s in scores]),
        support_ids_TK=ids_TK,
        support_logp_TK=mix([logp for _, logp in supports]) if supports else None,
    )
