"""Held-out problems: answered by the engines with the student's present weights, judged by the job's verifier."""

import asyncio
from dataclasses import dataclass

from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.inputs.verifiers import Evaluation, Response, tally
from opd_governor.services.job.settings import Job
from opd_governor.services.run.fleet import Fleet
from opd_governor.services.run.judges import Judge
from opd_governor.services.run.sources import Sources
from opd_governor.services.run.terms import base_limits


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An evaluation that can be made at any step."""

    sources: Sources
    judge: Judge
    fleet: Fleet

    async def __call__(self, job: Job, step: int) -> dict[str, Evaluation]:
        """Decoding -> how it went: greedy and, unless turned off, sampled; on the settings in force.

        The cap is a person's (rollout.max_new_tokens), whatever the governor's is now.
        """
        greedy_of = {"greedy": True} | ({"sampled": False} if job.data.eval.sampled else {})
        runs = [self._answers(job, step, greedy=greedy) for greedy in greedy_of.values()]
        num = len(self.sources.problems)
        return {
            name: tally(responses, await self.judge([(r.text, r.answer) for r in responses]), num_unanswered=num - len(responses))
            for name, responses in zip(greedy_of, await asyncio.gather(*runs), strict=True)
        }

    async def _answers(self, job: Job, step: int, *, greedy: bool) -> list[Response]:
        """Of the problems whose request was served: an answer that an engine refused is no answer of the student."""
        limits: LengthLimits = base_limits(job)
        requests = [(problem, 0) for problem in self.sources.problems]
        return [
            Response(self.sources.decode(t.answer_ids), t.prompt.answer or "", len(t.token_ids), t.truncated)
            async for group in self.fleet.rollout(requests, limits, step, job.rollout, greedy=greedy)
            for t in group
            if t.finish_reason != "error"
        ]
