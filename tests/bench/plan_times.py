"""The times of `opd plan` against phases that runs on CPUs measured: per phase a table of forecast over measured.

    python -m tests.bench.plan_times            # kept runs under collapse/, and scoring measured here (half a minute); prints the table
    python -m tests.bench.plan_times --write    # also writes plan_times.json beside this file

Rollouts, learning and syncs: runs of the quickstart's models whose answers grow from 30 tokens to as many as 190, recorded with the phases
one after the other. What a machine does (seconds a pass, a token, a micro-batch, FLOP/s) is fitted on every other step of a run, and the
other half, in three parts by length, is forecast by the plan's own formulas. Of scoring, records have only what rollouts did not hide: it
is measured here in processor seconds of one thread, fitted on some batches and forecast for others.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import Job
from opd_governor.services.plan.shapes import Shape, shape_of
from opd_governor.services.plan.times import Load, Rates, learn_s, rollout_s, score_s, sync_s

HERE = Path(__file__).parent
JOB = HERE.parents[1] / "deploy/jobs/sums-collapse.yaml"
PROMPT_TOKENS = 14.0
"""Of the curriculum's prompts."""
GROWS = 2.5
"""Runs whose longest mean length is so many times their shortest are held against the plan."""
WARM_UP_STEPS = 3
FREE = Rates(1e18, 1e18, 1e18, 1e18, pass_s=0.0)
"""A machine on which nothing takes time: one term is set to 1 to find what it is multiplied with."""
SCORED = ((8, 24), (8, 48), (16, 48), (16, 96), (32, 96), (32, 144))
"""(responses, tokens of each) of a scoring batch."""
ROUNDS = 7

Terms = dict[str, Callable[[Rates, float], Rates]]
ROLLOUT: Terms = {"pass_s": lambda r, v: replace(r, pass_s=v), "token_s": lambda r, v: replace(r, token_s=v)}
LEARN: Terms = {"micro_batch_s": lambda r, v: replace(r, micro_batch_s=v), "learn_flops": lambda r, v: replace(r, learn_flops=1 / v)}
SCORE: Terms = {"scoring_s": lambda r, v: replace(r, scoring_s=v), "score_flops": lambda r, v: replace(r, score_flops=1 / v)}
SYNC: Terms = {"sync_s": lambda r, v: replace(r, sync_s=v)}
Forecast = Callable[[Load, Rates], float]


def fit(forecast: Forecast, terms: Terms, loads: Sequence[Load], seconds: Sequence[float]) -> Rates:
    """The terms' values that come nearest in relative error, none below 0: every formula is a sum of them."""
    measured = np.array(seconds)
    columns = {name: np.array([forecast(load, set_(FREE, 1.0)) for load in loads]) / measured for name, set_ in terms.items()}
    names = list(columns)
    while True:
        values = dict(
            zip(names, np.linalg.lstsq(np.stack([columns[n] for n in names], 1), np.ones(len(loads)), rcond=None)[0], strict=True)
        )
        if len(names) == 1 or min(values.values()) >= 0:
            break
        names.remove(min(values, key=lambda name: values[name]))
    rates = FREE
    for name, value in values.items():
        rates = terms[name](rates, max(float(value), 1e-30))
    return rates


def phases(job: Job, student: Shape) -> dict[str, tuple[Forecast, Terms]]:
    return {
        "rollout": (lambda load, rates: rollout_s(job, student, load, rates, 1, 1), ROLLOUT),
        "learn": (lambda load, rates: learn_s(job, student, load, rates, 1), LEARN),
        "sync": (lambda load, rates: sync_s(job, student, rates), SYNC),
    }


def kept_runs() -> list[dict[str, Any]]:
    """Rows of the table for every kept run whose answers grow."""
    job = load_job(JOB)
    student = shape_of(job.student.model)
    rows = []
    for path in sorted((HERE / "collapse").glob("*/0/metrics.jsonl")):
        run = path.parts[-3]
        records = [json.loads(line) for line in path.read_text().splitlines()]
        steps = [step for step in records if step["num_rollouts"]][WARM_UP_STEPS:]
        lengths = [step["length_mean"] for step in steps]
        overrides = json.loads((path.parent / "machine.json").read_text()).get("overrides", [])
        if run.startswith("smollm2") or max(lengths) < GROWS * min(lengths) or any("support" in o or "reference" in o for o in overrides):
            continue
        for phase, (forecast, terms) in phases(job, student).items():
            rows += held(run, phase, forecast, terms, steps)
    return rows


def held(run: str, phase: str, forecast: Forecast, terms: Terms, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    known, unknown = steps[::2], sorted(steps[1::2], key=lambda step: step["length_mean"])
    rates = fit(forecast, terms, [load_of(step) for step in known], [step[f"{phase}_s"] for step in known])
    rows = []
    for part in np.array_split(np.arange(len(unknown)), 3):
        chosen = [unknown[i] for i in part]
        measured = statistics.median(step[f"{phase}_s"] for step in chosen)
        told = statistics.median(forecast(load_of(step), rates) for step in chosen)
        tokens = statistics.median(step["length_mean"] for step in chosen)
        rows.append(
            {"run": run, "phase": phase, "answer_tokens": tokens, "measured_s": measured, "forecast_s": told, "ratio": told / measured}
        )
    return rows


def load_of(step: dict[str, Any]) -> Load:
    return Load(step["num_rollouts"], PROMPT_TOKENS, step["length_mean"], float(step["length_max"]))


def scoring() -> list[dict[str, Any]]:
    """Scoring with the quickstart's teacher, processor seconds of one thread."""
    torch.set_num_threads(1)
    job = load_job(JOB)
    teacher = job.teacher[0]
    scorer, shape = TorchScorer(TeacherSettings(model=teacher.model), (1,)), shape_of(teacher.model)
    rng = np.random.default_rng(0)

    def once(num: int, tokens: int) -> float:
        requests = [ScoreRequest(tuple(rng.integers(4, 14, int(PROMPT_TOKENS))), tuple(rng.integers(4, 14, tokens))) for _ in range(num)]
        started = time.process_time()
        scorer.score(requests)
        return time.process_time() - started

    once(*SCORED[0])
    measured = {size: statistics.median(once(*size) for _ in range(ROUNDS)) for size in SCORED}
    loads = {size: Load(size[0], PROMPT_TOKENS, float(size[1])) for size in SCORED}

    def forecast(load: Load, rates: Rates) -> float:
        return score_s(shape, load, rates, 1, teacher.batch_tokens)

    known, unknown = SCORED[::2], SCORED[1::2]
    rates = fit(forecast, SCORE, [loads[size] for size in known], [measured[size] for size in known])
    return [
        {
            "run": f"{size[0]} responses", "phase": "score", "answer_tokens": float(size[1]), "measured_s": measured[size],
            "forecast_s": forecast(loads[size], rates), "ratio": forecast(loads[size], rates) / measured[size],
        }
        for size in unknown
    ]  # fmt: skip


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| run | phase | answer tokens | measured, s | forecast, s | forecast / measured |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r['run']} | {r['phase']} | {r['answer_tokens']:.0f} | {r['measured_s']:.4f} | {r['forecast_s']:.4f} | {r['ratio']:.2f} |"
        for r in rows
    ]
    for phase in dict.fromkeys(row["phase"] for row in rows):
        off = [abs(row["ratio"] - 1) for row in rows if row["phase"] == phase]
        lines.append(
            f"{phase}: {sum(x <= 0.3 for x in off)} of {len(off)} within 30 percent, worst {max(off):.0%}, mean {np.mean(off):.0%}"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write plan_times.json")
    write = parser.parse_args().write
    rows = kept_runs() + scoring()
    print(table(rows))
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    found = {"rows": rows, "seed": 0, "machine": {"cores": os.cpu_count(), "cpu": platform.machine()}, "versions": versions}
    if write:
        (HERE / "plan_times.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
