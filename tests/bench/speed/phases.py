"""Each phase of a step alone, on a job's own models and prompts: rollout, teacher scoring, learner step.

    python tests/bench/speed/phases.py deploy/jobs/smollm2.yaml --threads 1 --set rollout.dtype=bfloat16

The very classes the actors run, without Ray and without one another; medians over `--repeats` after one warm-up. Prints JSON: seconds,
core-seconds of CPU (the engine is two processes), padding of the micro-batches.
"""

import argparse
import asyncio
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--threads", type=int, default=1, help="of each phase")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="also print where the learner's and teacher's time goes")
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # before torch is imported
    print(json.dumps(asyncio.run(measure(options.job, tuple(options.set), options.threads, options.repeats, options.profile)), indent=1))


async def measure(path: Path, overrides: tuple[str, ...], threads: int, repeats: int, profile: bool) -> dict[str, Any]:
    import numpy as np
    import psutil
    import torch

    from opd_governor.actors.learner.actor import Learner
    from opd_governor.actors.learner.batching import build_micro_batches
    from opd_governor.actors.learner.models import LearnerModels
    from opd_governor.actors.packing import like_lengths
    from opd_governor.actors.rollout.actor import RolloutActor
    from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer
    from opd_governor.actors.trajectory import ScoredRollout, Trajectory
    from opd_governor.services.inputs.prompts import open_prompts
    from opd_governor.services.inputs.resolve import resolve
    from opd_governor.services.job.load import load_job
    from opd_governor.services.run.terms import base_limits

    torch.set_num_threads(threads)
    job = load_job(path, overrides)
    models, tokenizer = resolve(job)
    stream = open_prompts(job, tokenizer, models.context_tokens)
    limits, rollout, objective = base_limits(job), job.rollout, job.objective
    learner = Learner(
        LearnerModels(
            models.student,
            with_reference=objective.reference_kl_weight > 0,
            teacher=models.teachers[0] if objective.needs.hidden else None,
        ),
        job.learner,
        objective,
        stop_ids=models.stop_ids,
        max_new_tokens=rollout.max_new_tokens,
        seed=job.seed,
    )
    teacher = TorchScorer(job.teacher[0].model_copy(update={"model": models.teachers[0]}), models.stop_ids)
    actor = RolloutActor(
        models.student,
        rollout,
        stop_ids=models.stop_ids,
        reference_tokens=None,
        weight_transfer="file",
        seed=job.seed,
        top_k=objective.needs.student_top_k,
    )
    await actor.start()
    await actor.load_weights(learner.weights(rollout.dtype)[1], 0, [1, 2])

    me = psutil.Process()
    tree = [me, *me.children(recursive=True)]

    def clock() -> np.ndarray:
        """Wall seconds, CPU seconds of this process, and CPU seconds of the engine."""
        return np.array([time.perf_counter(), sum(sum(process.cpu_times()[:2]) for process in tree)])

    batches: list[list[Trajectory]] = []
    rollout_s = []
    for step in range(repeats + 1):
        requests = [(p, s) for p in stream.next(rollout.prompts_per_step) for s in range(rollout.samples_per_prompt)]
        started = clock()
        batches.append([t async for group in actor.rollout(requests, limits, step, rollout) for t in group])
        rollout_s.append(clock() - started)
    sync_s = []
    for version in range(1, repeats + 1):
        started = clock()
        await actor.load_weights(learner.weights(rollout.dtype)[1], version, [1, 2])
        sync_s.append(clock() - started)
    await actor.shutdown()
    tree = [me]

    def request(t: Trajectory) -> ScoreRequest:
        top_k = objective.top_k if objective.support in ("teacher", "union") else 0
        return ScoreRequest(t.prompt.token_ids, t.token_ids, t.support_ids_TK, top_k, hidden=objective.support == "full")

    score_s, learn_s, padding, teacher_padding = [], [], [], []
    for batch in batches:
        asked = [request(t) for t in batch]
        started = clock()
        scores = teacher.score(asked)
        score_s.append(clock() - started)
        lengths = [r.num_tokens for r in asked]
        padded = sum(len(rows) * max(lengths[row] for row in rows) for rows in like_lengths(lengths, teacher.settings.batch_tokens))
        teacher_padding.append(1 - sum(lengths) / padded)
        scored = [ScoredRollout(t, s) for t, s in zip(batch, scores, strict=True) if s is not None]
        started = clock()
        learner.step(scored, [], limits, 50.0)
        learn_s.append(clock() - started)
        micro = build_micro_batches(
            scored,
            [],
            objective,
            limits,
            micro_batch_tokens=job.learner.micro_batch_tokens,
            max_new_tokens=rollout.max_new_tokens,
            reference_length_tokens=50.0,
        )
        padding.append(1 - sum(lengths) / sum(m.student.input_ids_BL.numel() for m in micro))
    if profile:
        explain("teacher", lambda: teacher.score([request(t) for t in batches[-1]]))
        explain("learner", lambda: learner.step(scored, [], limits, 50.0))
    phases = {"rollout": rollout_s[1:], "score": score_s[1:], "learn": learn_s[1:], "sync": sync_s}
    tokens = [sum(len(t.token_ids) for t in batch) for batch in batches]
    return {
        "job": job.name,
        "threads": threads,
        "rollout_dtype": rollout.dtype,
        "learner_dtype": job.learner.dtype,
        "teacher_dtype": job.teacher[0].dtype,
        "support": objective.support,
        "completion_tokens": statistics.median(tokens[1:]),
        "prompt_tokens": statistics.median(sum(len(t.prompt.token_ids) for t in batch) for batch in batches[1:]),
        "seconds": {name: float(np.median(times, axis=0)[0]) for name, times in phases.items()},
        "cpu_s": {name: float(np.median(times, axis=0)[1]) for name, times in phases.items()},
        "learner_padding_ratio": statistics.median(padding),
        "teacher_padding_ratio": statistics.median(teacher_padding),
        "micro_batches": len(micro),
    }


def explain(name: str, work: Callable[[], Any]) -> None:
    import sys

    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as trace:
        work()
    print(name, trace.key_averages().table(sort_by="self_cpu_time_total", row_limit=16, max_name_column_width=40), file=sys.stderr)


if __name__ == "__main__":
    main()
