"""Rollouts of several turns: the engines sample a turn, the environment answers, the engines go on behind it.

requests --sample--> a turn --environment--> messages --bridge--> ids behind it --sample--> ... --> one Trajectory a conversation

The ids of a conversation only grow: each turn's prompt is, id for id, what the engine read and sampled before, with the bridge behind it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Protocol

from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.environment.protocol import Failure, Message
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.rollout.slots import Request
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.job.errors import JobError
from opd_governor.services.run.turns import Turns

Key = tuple[int, int, int]


class Sampler(Protocol):
    """Who samples rollouts: a fleet's engines, or conversations on top of them."""

    def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """One trajectory for each request, in groups as they finish."""
        ...


@dataclass(frozen=True, slots=True)
class Conversations:
    """A sampler whose rollouts are conversations."""

    turns: Sampler
    environments: EnvironmentPool
    bridge: Callable[[Sequence[Message]], Sequence[int]]
    decode: Callable[[Sequence[int]], str]
    context_tokens: int
    strict: bool = False
    """The turns of all requests go to the engines together, one turn after another: the same in every run of the same job."""

    async def rollout(
        self, requests: Sequence[Request], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        """One trajectory for each request, in groups as they finish."""
        played = {_key(prompt, sample): Turns(prompt, sample, self.environments.open(_row(prompt))) for prompt, sample in requests}
        places = {key: place for place, key in enumerate(played)}
        finished: asyncio.Queue[list[Trajectory] | Exception] = asyncio.Queue()
        running: set[asyncio.Task[None]] = set()

        async def guarded(work: Coroutine[Any, Any, None]) -> None:
            try:
                await work
            except Exception as error:  # handed to the consumer, which raises it
                finished.put_nowait(error)

        def begin(work: Coroutine[Any, Any, None]) -> None:
            running.add(task := asyncio.create_task(guarded(work)))
            task.add_done_callback(running.discard)

        async def sample(asked: Sequence[Request]) -> None:
            held: list[Trajectory] = []
            async with aclosing(self.turns.rollout(asked, limits, step, settings, greedy=greedy)) as groups:  # type: ignore[type-var]
                async for group in groups:
                    if self.strict:
                        held += group
                    else:
                        begin(follow(group))
            if held:
                await follow(sorted(held, key=lambda turn: places[_key(turn.prompt, turn.sample)]))

        async def follow(group: Sequence[Trajectory]) -> None:
            plays = [played[_key(turn.prompt, turn.sample)] for turn in group]
            ends = await asyncio.gather(*(self._after(play, turn, limits, settings) for play, turn in zip(plays, group, strict=True)))
            if whole := [end for end in ends if end is not None]:
                finished.put_nowait(whole)
            if again := [play.request(limits, self._most_turn_tokens) for play, end in zip(plays, ends, strict=True) if end is None]:
                await sample(again)

        begin(sample([play.request(limits, self._most_turn_tokens) for play in played.values()]))
        try:
            num_open = len(requests)
            while num_open:
                group = await finished.get()
                if isinstance(group, Exception):
                    raise group
                num_open -= len(group)
                yield group
        finally:
            for task in tuple(running):
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            for play in played.values():
                self.environments.close(play.task)

    @property
    def _most_turn_tokens(self) -> int | None:
        return self.environments.settings.max_turn_tokens

    async def _after(self, play: Turns, turn: Trajectory, limits: LengthLimits, settings: RolloutSettings) -> Trajectory | None:
        """The whole conversation where it is over behind this turn, None where it goes on."""
        if turn.finish_reason == "error":
            return replace(turn, prompt=play.prompt)
        message = {"role": "assistant", "content": self.decode(turn.token_ids)}
        play.add(turn, message["content"])
        reply = await self.environments.answer(play.task, message)
        if isinstance(reply, Failure):
            return play.failed(reply)
        play.earn(reply.reward)
        if reply.done or turn.finish_reason != "stop":
            return play.whole(turn.finish_reason, settings)
        if play.num_turns >= self.environments.settings.max_turns:
            return play.whole("turns", settings)
        try:
            between = await asyncio.to_thread(self.bridge, reply.messages)
        except JobError as error:
            return play.failed(Failure("nonsense", str(error)))
        num_read = max(len(play.prompt.token_ids), len(play.prompt.teacher_token_ids or ())) + play.num_ids + len(between)
        if play.num_sampled >= limits.cap_tokens or num_read + settings.min_new_tokens > self.context_tokens:
            return play.whole("length", settings)
        play.observe(between)
        return None


def _key(prompt: Prompt, sample: int) -> Key:
    return prompt.epoch, prompt.index, sample


def _row(prompt: Prompt) -> dict[str, Any]:
    """What an environment opens its task from."""
    return {"prompt": prompt.text, "answer": prompt.answer, "domain": prompt.domain, "index": prompt.index}
