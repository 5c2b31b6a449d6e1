"""A conversation under way, turn by turn, and the one trajectory that it becomes. Pure."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from opd_governor.actors.environment.pool import Conversation
from opd_governor.actors.environment.protocol import Failure
from opd_governor.actors.rollout.loops import find_loop
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.rollout.slots import Request
from opd_governor.actors.trajectory import FinishReason, LengthLimits, Prompt, Trajectory


class Turns:
    """What was sampled and what came between."""

    def __init__(self, prompt: Prompt, sample: int, task: Conversation) -> None:
        self.prompt, self.sample, self.task = prompt, sample, task
        self.num_sampled = 0
        self._turns: list[Trajectory] = []
        self._between: list[tuple[int, ...]] = []
        """Behind each turn but the last."""
        self._reward: float | None = None
        self._last_text: str | None = None
        self._num_repeated = 0

    @property
    def num_turns(self) -> int:
        return len(self._turns)

    @property
    def num_ids(self) -> int:
        """Behind the prompt, the environment's too."""
        return self.num_sampled + sum(map(len, self._between))

    def request(self, limits: LengthLimits, most_turn_tokens: int | None) -> Request:
        """For the next turn: all that stands so far is its prompt."""
        left_tokens = limits.cap_tokens - self.num_sampled
        most_tokens = left_tokens if most_turn_tokens is None else min(left_tokens, most_turn_tokens)
        if not self._turns:
            return (self.prompt if most_turn_tokens is None else replace(self.prompt, most_tokens=most_tokens)), self.sample
        ids: list[int] = []
        for turn, between in zip(self._turns, self._between, strict=True):
            ids += turn.token_ids
            ids += between
        teacher_ids = self.prompt.teacher_token_ids
        return replace(
            self.prompt,
            token_ids=(*self.prompt.token_ids, *ids),
            teacher_token_ids=None if teacher_ids is None else (*teacher_ids, *ids),
            turn=self.num_turns,
            most_tokens=most_tokens,
        ), self.sample

    def add(self, turn: Trajectory, text: str) -> None:
        """A turn as it was sampled."""
        self._num_repeated += text == self._last_text
        self._last_text = text
        self._turns.append(turn)
        self.num_sampled += len(turn.token_ids)

    def observe(self, ids: Sequence[int]) -> None:
        """What stands between the last turn and the next."""
        self._between.append(tuple(ids))

    def earn(self, reward: float | None) -> None:
        """Rewards of a conversation add up."""
        if reward is not None:
            self._reward = (self._reward or 0.0) + reward

    def failed(self, failure: Failure) -> Trajectory:
        """Counted, never learned from."""
        last = self._turns[-1]
        nothing = np.zeros(0, np.float32)
        return Trajectory(
            self.prompt,
            (),
            nothing,
            "error",
            last.budget_tokens,
            last.step,
            self._turns[0].weight_version,
            last.limits_generation,
            self.sample,
            refusal=f"environment: {failure.reason}: {failure.words}",
            failure=failure.reason,
            num_turns=self.num_turns,
        )

    def whole(self, finish_reason: FinishReason, settings: RolloutSettings) -> Trajectory:
        """The conversation. Of a single turn it is that turn's trajectory."""
        first, last = self._turns[0], self._turns[-1]
        counts = {"finish_reason": finish_reason, "reward": self._reward, "num_turns": self.num_turns, "repeated_calls": self._num_repeated}
        if self.num_turns == 1:
            return replace(first, prompt=self.prompt, **counts)  # type: ignore[arg-type]
        observed: list[tuple[int, tuple[int, ...]]] = []
        kept: list[np.ndarray] = []
        num_sampled = 0
        for place, turn in enumerate(self._turns):
            if place:
                observed.append((num_sampled, self._between[place - 1]))
            keep_T = np.ones(len(turn.token_ids), bool)
            if turn.forced is not None:  # the engine's token, not the student's: it stands between, too
                keep_T[turn.forced] = False
                observed.append((num_sampled + turn.forced, (turn.token_ids[turn.forced],)))
            kept.append(keep_T)
            num_sampled += int(keep_T.sum())
        keep_T = np.concatenate(kept)
        token_ids = tuple(np.concatenate([np.array(turn.token_ids, np.int64) for turn in self._turns])[keep_T].tolist())
        loop = find_loop(
            token_ids[:-1] if last.finish_reason == "stop" else token_ids,
            min_repeats=settings.loop_min_repeats,
            min_tokens=settings.loop_min_tokens,
        )
        supports = [turn.support_ids_TK for turn in self._turns if turn.support_ids_TK is not None]
        return replace(
            first,
            prompt=self.prompt,
            token_ids=token_ids,
            logprobs_T=np.concatenate([turn.logprobs_T for turn in self._turns])[keep_T],
            budget_tokens=self.num_sampled - len(last.token_ids) + last.budget_tokens,
            loop_onset=loop.onset if loop else None,
            loop_period=loop.period if loop else None,
            support_ids_TK=np.concatenate(supports)[keep_T] if len(supports) == self.num_turns else None,
            num_thinking=None,
            forced=None,
            observed=tuple(observed),
            **counts,  # type: ignore[arg-type]
        )
