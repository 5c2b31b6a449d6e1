"""The Ray shell of one teacher: a process that holds a scorer, and the handle the pool talks to."""

import asyncio
import os
from collections.abc import Sequence
from typing import Any

import ray
import torch

from opd_governor.actors.teacher.cross_tokenizer import CrossTokenizerScorer, Vocabularies
from opd_governor.actors.teacher.scorers import Follows, GenerateOptions, ScoreRequest, digest_weights
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import TokenScores
from opd_governor.actors.wire import pack, rows_of, tabulate, unpack

Followed = tuple[str, list[Any]]
"""Weights that a teacher should have: a name that no others had, and a reference to them (in a list, which Ray does not fetch)."""


class TeacherActor:
    """One teacher in a process of its own, frozen unless it follows. `settings.model` is a folder or an id that transformers resolves."""

    def __init__(self, settings: TeacherSettings, stop_ids: tuple[int, ...], seed: int, tokens: Vocabularies | None = None) -> None:
        """`tokens`: of a teacher with another tokenizer."""
        # More threads than cores for this actor can be 10-20 times slower; Ray sets the variable from the CPUs it grants.
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        self.settings = settings
        scorer = settings.means.load(settings, stop_ids if tokens is None else tokens.teacher_stop_ids, seed)
        self.scorer = scorer if tokens is None else CrossTokenizerScorer(scorer, tokens)
        self._followed = ""
        """Name of the weights that it has; empty: those of its model's folder."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        return self.scorer.score(requests)

    def score_packed(self, message: bytes, followed: Followed | None = None) -> bytes:
        """`score` as the driver calls it, with the process's name. `followed`: with these weights, also in a process that was restarted."""
        if followed is not None and followed[0] != self._followed:
            assert isinstance(self.scorer, Follows), "a check lets only such back ends follow"
            self.scorer.follow(ray.get(followed[1][0]).tobytes())
            self._followed = followed[0]
        return pack((self.ping(), tabulate(self.score(rows_of(unpack(message))))))

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        return self.scorer.generate(prompts, options)

    def ping(self) -> str:
        """Ray's id of this process: another one than before means Ray restarted the actor. Two nodes may give the same process id."""
        return ray.get_runtime_context().get_worker_id()

    def weights_digest(self) -> str:
        """SHA-256 of the weight files; of a server's teacher only its address and name are known."""
        if self.settings.means.local:
            return digest_weights(self.settings.model)
        return f"{self.settings.url}#{self.settings.model}"


class RayTeacher:
    """A teacher actor as the pool sees it: coroutines instead of object references."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._followed: Followed | None = None

    def follow(self, name: str, weights: Any) -> None:
        """Score with these weights from the next call on. `weights`: a reference to the bytes of a safetensors file."""
        self._followed = name, [weights]

    async def score(self, requests: Sequence[ScoreRequest]) -> tuple[str, list[TokenScores | None]]:
        process, scores = unpack(await self.actor.score_packed.remote(pack(tabulate(requests)), self._followed))
        return process, rows_of(scores)

    async def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        return await self.actor.generate.remote(prompts, options)

    async def ping(self) -> str:
        return await self.actor.ping.remote()

    async def restart(self) -> None:
        """End a process that hangs; Ray starts it again."""
        await asyncio.to_thread(ray.kill, self.actor, no_restart=False)


def start_teacher(
    settings: TeacherSettings,
    stop_ids: tuple[int, ...],
    seed: int,
    places: Sequence[dict[str, Any]] | None = None,
    tokens: Vocabularies | None = None,
) -> list[RayTeacher]:
    """Start `settings.num_actors` actors of one teacher on the connected cluster. They load in the background: ping them to wait.

    `places`: Ray options of each actor, what it reserves and where; None: nothing, anywhere. Ray restarts one that dies, without
    limit: it holds nothing but its weights, and each call says which these should be. `tokens`: of a teacher with another tokenizer.
    """
    teacher_type = ray.remote(TeacherActor)
    places = places or [{"num_cpus": 0}] * settings.num_actors
    return [RayTeacher(teacher_type.options(max_restarts=-1, **place).remote(settings, stop_ids, seed, tokens)) for place in places]
