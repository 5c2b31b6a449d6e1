"""Which actor of which teacher scores what: routing, retry, hedging, blending. Knows asyncio, not Ray.

    score(trajectories) --> teachers of the prompt's domain --> least loaded live member --> its queue --> one call at a time
                                     |                                  ^                                        |
                                     +-- blend of several               +--- retry elsewhere, hedge <-- failure -+

A score that never arrives, or is not finite, comes back as None: the caller masks and counts it. Nothing is invented.
"""

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from actors.deadlines import FLOOR_S, Say
from actors.teacher.member import COOLDOWN_S, Member, OnRestart, TeacherHandle
from actors.teacher.scorers import GenerateOptions, ScoreRequest
from actors.teacher.settings import TeacherSettings
from actors.trajectory import Prompt, TokenScores, Trajectory

Result = Literal["ok", "nonfinite", "error", "timeout", "unscored"]
"""error and timeout end one attempt, which is retried; unscored: the request was given up."""
OnRequest = Callable[[str, Result, float], None]
"""Called with (teacher, result, seconds)."""

GOLDEN_GROUP = 16
"""Prompts in one generate call. Groups are cut by position, so an answer does not depend on which actor writes it."""


@dataclass(frozen=True, slots=True)
class Support:
    """What the objective needs beside the sampled token and the stop class."""

    student: bool = False
    """Log-probs at the trajectory's own `support_ids_TK`."""
    top_k: int = 0
    """The teacher's own most likely ids; 0: none."""
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
        on_request: OnRequest = lambda teacher, result, seconds: None,
        on_restart: OnRestart = lambda teacher, reason: None,
        on_nonfinite: Callable[[Trajectory, TokenScores], None] = lambda trajectory, scores: None,
        cooldown_s: float = COOLDOWN_S,
        floor_s: float = FLOOR_S,
        say: Say = lambda line: None,
        alone: bool = False,
    ) -> None:
        """`alone`: every response goes through its teacher by itself, so scores are the same whoever else waits, retried or not."""
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
        return list(await asyncio.gather(*(self._score_trajectory(trajectory) for trajectory in trajectories)))

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

    async def _score_trajectory(self, trajectory: Trajectory) -> TokenScores | None:
        teachers = self.teachers_of(trajectory.prompt.domain)
        if self.support.student and trajectory.support_ids_TK is None:
            raise ValueError("the objective's support needs the student's own top ids, but the trajectory carries no support_ids_TK")
        request = ScoreRequest(
            prompt_token_ids=teacher_view(trajectory.prompt),
            token_ids=trajectory.token_ids,
            support_ids_TK=trajectory.support_ids_TK if self.support.student else None,
            top_k=self.support.top_k,
            hidden=self.support.hidden,
        )
        if len(teachers) == 1:  # a task less for each of a run's trajectories
            scores = [await self._score_request(teachers[0], request)]
        else:
            scores = await asyncio.gather(*(self._score_request(teacher, request) for teacher in teachers))
        arrived = [score for score in scores if score is not None]
        odd = [score for score in arrived if not is_finite(score)]
        for score in odd:
            self._on_nonfinite(trajectory, score)
        if odd or len(arrived) < len(scores):
            return None
        return blend_scores(arrived, [teacher.settings.weight for teacher in teachers])

    async def _score_request(self, teacher: Teacher, request: ScoreRequest) -> TokenScores | None:
        started, tried = time.monotonic(), set[Member]()
        for _ in range(teacher.settings.max_attempts):
            member = await self._pick(teacher, tried)
            if member is None:
                break
            try:
                scores = await self._attempt(teacher, member, tried, request)
            except ValueError:
                raise
            except Exception:  # already reported; retried on another actor
                continue
            if scores is None:
                break
            return replace(scores, teacher=teacher.settings.name)
        self._on_request(teacher.settings.name, "unscored", time.monotonic() - started)
        return None

    async def _attempt(self, teacher: Teacher, member: Member, tried: set[Member], request: ScoreRequest) -> TokenScores | None:
        """First success of one member and, when it is slow, a second one. Raises the last failure where both fail."""
        tried.add(member)
        if teacher.settings.hedge_after_s is None:
            return await self._report(teacher, member.submit(request))
        pending = {asyncio.create_task(self._report(teacher, member.submit(request)))}
        try:
            done, pending = await asyncio.wait(pending, timeout=teacher.settings.hedge_after_s, return_when=asyncio.FIRST_COMPLETED)
            other = least_loaded(teacher.members, tried)
            if not done and other is not None:
                tried.add(other)
                pending.add(asyncio.create_task(self._report(teacher, other.submit(request))))
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

    async def _report(self, teacher: Teacher, reply: asyncio.Future[TokenScores | None]) -> TokenScores | None:
        started = time.monotonic()
        try:
            scores = await reply
        except Exception as error:
            self._on_request(teacher.settings.name, "timeout" if isinstance(error, TimeoutError) else "error", time.monotonic() - started)
            raise
        if scores is not None:
            self._on_request(teacher.settings.name, "ok" if is_finite(scores) else "nonfinite", time.monotonic() - started)
        return scores

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
    for member in members:  # once a trajectory, so no list of the live ones
        if (best is None or member.load_tokens < best.load_tokens) and member.live.is_set() and member not in tried:
            best = member
    return best


def teacher_view(prompt: Prompt) -> tuple[int, ...]:
    """What the teacher sees before the response: its own prompt where it has one (concise teacher), else the student's."""
    return prompt.teacher_token_ids or prompt.token_ids


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
