"""A teacher actor that needs no model: the methods of RayTeacher and a script of what goes wrong."""

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import numpy as np

from opd_governor.actors.teacher.attempts import Events
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.teacher.scorers import GenerateOptions
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import Prompt, TokenScores, Trajectory


@dataclass(eq=False)
class FakeTeacher:
    """Scores every token with `logp`; each entry of `faults` spoils one call: an exception, seconds to hang, or nan."""

    logp: float = -1.0
    faults: list[Exception | float] = field(default_factory=list)
    pace_s: float = 0.0
    pid: int = 1
    calls: list[int] = field(default_factory=list)
    prompts: list[tuple[int, ...]] = field(default_factory=list)
    restarts: int = 0

    async def score(self, requests):
        self.calls.append(len(requests))
        self.prompts += [request.prompt_token_ids for request in requests]
        logp = self.logp
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                self.pid += isinstance(fault, ConnectionError)  # the process died and Ray started another
                raise fault
            if np.isnan(fault):
                logp = fault
            else:
                await asyncio.sleep(fault)
        await asyncio.sleep(self.pace_s)
        return str(self.pid), [
            TokenScores(
                teacher="fake",
                sampled_logp_T=np.full(len(request.token_ids), logp, np.float32),
                stop_logp_T=np.full(len(request.token_ids), logp - 1, np.float32),
                support_ids_TK=request.support_ids_TK,
                support_logp_TK=None if request.support_ids_TK is None else np.full(request.support_ids_TK.shape, logp, np.float32),
            )
            for request in requests
        ]

    async def generate(self, prompts, options: GenerateOptions):
        if self.faults:
            raise self.faults.pop(0)
        await asyncio.sleep(self.pace_s)
        self.prompts += prompts
        return [(options.seed, *prompt, options.beams) for prompt in prompts]

    async def ping(self):
        return str(self.pid)

    async def restart(self):
        self.restarts += 1
        self.pid += 1


def trajectory(domain: str = "", prompt_length: int = 3, length: int = 4, index: int = 0, **prompt) -> Trajectory:
    return Trajectory(
        prompt=Prompt(index=index, token_ids=(5,) * prompt_length, domain=domain, **prompt),
        token_ids=(7,) * length,
        logprobs_T=np.zeros(length, np.float32),
        finish_reason="stop",
        budget_tokens=64,
        step=1,
        weight_version=0,
        limits_generation=0,
        support_ids_TK=np.full((length, 2), 9, np.int32),
    )


def settings(**values) -> TeacherSettings:
    return TeacherSettings(model="m", **values)


class Log(Counter):
    """Counts (teacher, result) and (teacher, reason)."""

    def request(self, teacher, result, seconds, num):
        assert seconds >= 0
        self[teacher, result] += num

    def restart(self, teacher, reason):
        self[teacher, reason] += 1


def build(teachers, log=None, *, on_nonfinite=lambda trajectory, scores: None, say=lambda line: None, **options) -> TeacherPool:
    log = log if log is not None else Log()
    return TeacherPool(teachers, events=Events(log.request, log.restart, on_nonfinite, say), cooldown_s=0.01, **options)
