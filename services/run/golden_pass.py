"""The golden pass on the job's own teachers: complete answers, generated once, read from a cache afterwards."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from opd_governor.actors.environment.pool import EnvironmentPool
from opd_governor.actors.rollout.loops import find_loop
from opd_governor.actors.teacher.pool import TeacherPool
from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.environments import environment_identity
from opd_governor.services.inputs.golden import GoldenSet, choose_prompts, collect_golden, golden_key
from opd_governor.services.inputs.models import weights_identity
from opd_governor.services.job.settings import Job
from opd_governor.services.run.environments import teacher_lengths
from opd_governor.services.run.sources import Sources

PROGRESS_S = 5.0
"""Between two lines of progress."""
FEW_ANSWERS_SHARE = 0.5
"""Fewer answers kept than this are said: what healthy lengths are is then known badly."""


async def golden_pass(
    job: Job, sources: Sources, pool: TeacherPool, runs: Path, say: Callable[[str], None], environments: EnvironmentPool | None = None
) -> GoldenSet:
    """What the teachers answer to the prompts chosen for it. The cache lies in data.golden.cache_dir, otherwise in `runs`/golden.

    With an environment they hold whole conversations, which say how long healthy ones are and are no golden answers.
    """
    settings, rollout = job.data.golden, job.rollout
    prompts = choose_prompts(sources.stream, settings, job.seed)
    max_new_tokens = settings.max_new_tokens or rollout.max_new_tokens
    folder = Path(settings.cache_dir) if settings.cache_dir else runs / "golden"

    async def generate(asked: Sequence[Prompt]) -> Sequence[tuple[int, ...] | None]:
        say(f"golden pass: {len(asked)} prompts to the teacher")
        if environments is not None:
            return await teacher_lengths(job, sources, pool, environments, asked, max_new_tokens)
        num_answered, spoke = 0, time.monotonic()

        def told(num_prompts: int) -> None:
            nonlocal num_answered, spoke
            num_answered += num_prompts
            if num_answered < len(asked) and time.monotonic() - spoke > PROGRESS_S:
                spoke = time.monotonic()
                say(f"golden pass: {num_answered} of {len(asked)} answered")

        return await pool.golden(asked, max_new_tokens=max_new_tokens, temperature=settings.temperature, seed=job.seed, told=told)

    def loop_in(token_ids: Sequence[int]) -> object | None:
        return find_loop(token_ids[:-1], min_repeats=rollout.loop_min_repeats, min_tokens=rollout.loop_min_tokens)

    key = _key(job, sources, prompts, max_new_tokens)
    needed = job.objective.golden_weight > 0
    file, num_ids = folder / f"{key}.parquet", sources.models.num_ids
    golden = await collect_golden(prompts, settings, generate, sources.models.stop_ids, loop_in, file, needed=needed, num_ids=num_ids)
    if golden.num_silent:
        say(f"golden pass: the teacher gave no answer to {golden.num_silent} of {len(prompts)} prompts; the next run asks again")
    if golden.reference.kept_share < FEW_ANSWERS_SHARE:
        say(
            f"golden pass: only {golden.reference.kept_share:.0%} of the answers end by themselves and without a loop; "
            "the reference length is a guess: raise data.golden.max_new_tokens, or check the stop ids with opd check"
        )
    return golden if environments is None else replace(golden, answers={})


def _key(job: Job, sources: Sources, prompts: Sequence[Prompt], max_new_tokens: int) -> str:
    """Of everything that shapes an answer or decides whether it is kept."""
    teachers = {
        t.name: [weights_identity(model), t.beams, t.length_penalty, t.no_repeat_ngram, t.domains]
        for t, model in zip(job.teacher, sources.models.teachers, strict=True)
    }
    loops = [job.rollout.loop_min_repeats, job.rollout.loop_min_tokens]
    terms = {"teachers": teachers, "stop_ids": sources.models.stop_ids, "loops": loops, "num_ids": sources.models.num_ids}
    if job.environment is not None:
        terms["environment"] = environment_identity(job.environment)
    return golden_key(prompts, job.data.golden.model_copy(update={"max_new_tokens": max_new_tokens}), terms, job.seed)
