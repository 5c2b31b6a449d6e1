"""Which actor of which teacher scores what: routing, retry, hedging, blending. Knows asyncio, not Ray.

    score(trajectories) --> teachers of the prompt's domain --> least loaded live member --> its queue --> one call at a time
                                     |                                  ^                                        |
                                     +-- blend of several               +--- retry elsewhere, hedge <-- failure -+

A score that never arrives, or is not finite, comes back as None: the caller masks and counts it. Nothing is invented.
"""

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from opd_governor.actors.deadlines import FLOOR_S, CallerError
from opd_governor.actors.teacher.attempts import Answer, Attempts, Events, Teacher
from opd_governor.actors.teacher.blending import blend_scores, union_of_supports
from opd_governor.actors.teacher.conversation import of_sampled, spread_support
from opd_governor.actors.teacher.copied import copied_tokens
from opd_governor.actors.teacher.member import COOLDOWN_S, Member, TeacherHandle
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.teacher.shares import share_out
from opd_governor.actors.trajectory import Prompt, Rest, TokenScores, Trajectory

T = TypeVar("T")
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
        self._strict, self._events, self._attempts = strict, events, Attempts(events)
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
        """All teachers that score this domain. Raises CallerError where there is none."""
        serving = tuple(teacher for teacher in self.teachers if teacher.serves(domain))
        if not serving:
            offered = {teacher.settings.name: teacher.settings.domains for teacher in self.teachers}
            raise CallerError(f"domain {domain!r} has no teacher (teacher.domains: {offered}); add it to one, or leave one's domains empty")
        return serving

    def weights_on(self, prompt: Prompt) -> dict[Teacher, float]:
        """The teachers that score a prompt, with their shares in the blend. Raises CallerError as `teachers_of` does."""
        own = dict(prompt.teacher_weights)
        weights = {teacher: own.get(teacher.settings.name, teacher.settings.weight) for teacher in self.teachers_of(prompt.domain)}
        return {teacher: weight for teacher, weight in weights.items() if weight > 0}

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
            for teacher in self.weights_on(trajectory.prompt):
                asked.setdefault(teacher, {})[place] = request
        found = await _all([self._score(teacher, requests) for teacher, requests in asked.items()])
        answers: dict[Teacher, Mapping[int, Answer]] = dict(zip(asked, found, strict=True))
        if self.support.top_k > 0:
            await self._put_on_common_ids(asked, answers)
        return [self._blend(place, trajectory, answers) for place, trajectory in enumerate(trajectories)]

    async def _put_on_common_ids(
        self, asked: Mapping[Teacher, Mapping[int, ScoreRequest]], answers: dict[Teacher, Mapping[int, Answer]]
    ) -> None:
        """Where several teachers gave their own likeliest ids, ask each of them again for those of all: a mixture needs every one's
        probability of every id."""
        places = Counter(place for requests in asked.values() for place in requests)
        again: dict[Teacher, dict[int, ScoreRequest]] = {}
        for place in (place for place, num_teachers in places.items() if num_teachers > 1):
            first = [found[place].scores for found in answers.values() if place in found]
            if len(first) < places[place]:
                continue  # one has not answered: there will be no blend
            ids_TK = union_of_supports(first)
            for teacher, requests in asked.items():
                if place in requests:
                    again.setdefault(teacher, {})[place] = replace(requests[place], support_ids_TK=ids_TK, top_k=0)
        found = await _all([self._score(teacher, requests) for teacher, requests in again.items()])
        for (teacher, requests), second in zip(again.items(), found, strict=True):
            kept = {place: answer for place, answer in answers[teacher].items() if place not in requests}
            answers[teacher] = kept | dict(second)

    def _request(self, trajectory: Trajectory) -> ScoreRequest:
        if self.support.student and trajectory.support_ids_TK is None:
            raise CallerError("the objective's support needs the student's own top ids, but the trajectory carries no support_ids_TK")
        return ScoreRequest(
            prompt_token_ids=teacher_view(trajectory.prompt),
            token_ids=trajectory.conversation_ids,
            support_ids_TK=spread_support(trajectory) if self.support.student else None,
            top_k=self.support.top_k,
            rest=self.support.rest,
            hidden=self.support.hidden,
        )

    def _blend(self, place: int, trajectory: Trajectory, answers: Mapping[Teacher, Mapping[int, Answer]]) -> TokenScores | None:
        """Every teacher of the domain has to have answered, with finite scores."""
        teachers = self.weights_on(trajectory.prompt)
        arrived = [answers[teacher][place] for teacher in teachers if place in answers[teacher]]
        odd = [answer.scores for answer in arrived if not answer.finite]
        for scores in odd:
            self._events.on_nonfinite(trajectory, scores)
        if odd or len(arrived) < len(teachers):
            return None
        blend = of_sampled(blend_scores([answer.scores for answer in arrived], list(teachers.values())), trajectory.mask_T)
        prompt = trajectory.prompt
        if not prompt.privileged_ids:
            return blend
        run_tokens = max(teacher.settings.copied_run_tokens for teacher in teachers)
        copied_T = copied_tokens(trajectory.token_ids, prompt.privileged_ids, prompt.token_ids, run_tokens)
        return replace(blend, copied_T=copied_T)

    async def golden(
        self,
        prompts: Sequence[Prompt],
        *,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        told: Callable[[int], None] = lambda num_prompts: None,
    ) -> list[tuple[int, ...] | None]:
        """Answers by each domain's heaviest teacher, cut after their stop id; one without a stop id ran to `max_new_tokens`.

        None: the actors failed. `told` hears of each group that has its answers, in prompts.

        The same prompts and seed give the same answers with any number of actors.
        """
        answers: list[tuple[int, ...] | None] = [None] * len(prompts)
        positions: dict[str, list[int]] = {teacher.settings.name: [] for teacher in self.teachers}
        for position, prompt in enumerate(prompts):
            weights = self.weights_on(prompt)
            heaviest = max(weights, key=weights.__getitem__)
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
            told(len(group))

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
            member = await self._attempts.pick(teacher, tried)
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
            answers = await _all([self._attempts.score(teacher, first, part) for first, part in zip(issued, parts, strict=True)])
        finally:
            for first in issued:
                if first is not None:
                    first[1].cancel()
        return {place: answer for part in answers for place, answer in part.items()}


def teacher_view(prompt: Prompt) -> tuple[int, ...]:
    """What the teacher sees before the response: its own prompt where it has one (concise teacher), else the student's."""
    return prompt.teacher_token_ids or prompt.token_ids


async def _all(coroutines: Sequence[Coroutine[Any, Any, T]]) -> list[T]:
    """All results in order; of a single one without a task of its own."""
    return [await coroutines[0]] if len(coroutines) == 1 else list(await asyncio.gather(*coroutines))
