"""Held-out problems: answered by the engines with the student's present weights, judged by the job's verifier."""

import asyncio
from dataclasses import dataclass

from opd_governor.actors.trajectory import BY_ENVIRONMENT, LengthLimits
from opd_governor.services.inputs.verdicts import Verdict, failed
from opd_governor.services.inputs.verifiers import Evaluation, Response, tally
from opd_governor.services.job.settings import Job
from opd_governor.services.run.conversations import Sampler
from opd_governor.services.run.judges import Judge
from opd_governor.services.run.sources import Sources
from opd_governor.services.run.terms import base_limits

NO_REWARD = "the environment gave no reward"


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An evaluation that can be made at any step."""

    sources: Sources
    judge: Judge
    sampler: Sampler

    async def __call__(self, job: Job, step: int) -> dict[str, Evaluation]:
        """Decoding -> how it went: greedy and, unless turned off, sampled; on the settings in force.

        The cap is a person's (rollout.max_new_tokens), whatever the governor's is now.
        """
        greedy_of = {"greedy": True} | ({"sampled": False} if job.data.eval.sampled else {})
        runs = [self._evaluation(job, step, greedy=greedy) for greedy in greedy_of.values()]
        return dict(zip(greedy_of, await asyncio.gather(*runs), strict=True))

    async def _evaluation(self, job: Job, step: int, *, greedy: bool) -> Evaluation:
        """An answer that an engine or the environment refused is no answer of the student."""
        limits: LengthLimits = base_limits(job)
        requests = [(problem, 0) for problem in self.sources.problems]
        served = [
            t
            async for group in self.sampler.rollout(requests, limits, step, job.rollout, greedy=greedy)
            for t in group
            if t.finish_reason != "error"
        ]
        responses = [Response(self.sources.decode(t.answer_ids), t.prompt.answer or "", len(t.token_ids), t.truncated) for t in served]
        if job.data.eval.verifier == BY_ENVIRONMENT:
            verdicts = [
                Verdict(t.reward) if t.reward is not None else failed("nonsense", r.answer, NO_REWARD)
                for t, r in zip(served, responses, strict=True)
            ]
        else:
            verdicts = await self.judge([(response.text, response.answer) for response in responses])
        return tally(responses, verdicts, num_unanswered=len(requests) - len(responses))
