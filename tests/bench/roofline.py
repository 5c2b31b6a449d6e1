"""Time over floor of each phase of a step: FLOPs and bytes counted from the models' configs, against this machine's own peaks.

    python tests/bench/roofline.py RUN_DIR [RUN_DIR ...]    # writes roofline.json and roofline.md beside this file
    python tests/bench/roofline.py --smoke RUN_DIR          # a short look at the peaks; writes nothing

A run directory gives job.yaml and metrics.jsonl: lengths, weights in force and seconds of each phase. Counted per step:
    rollout  2 FLOP per weight and token, prompt and response; every weight is read once for each token of the longest rollout
    score    2 FLOP per teacher weight and token
    learn    6 FLOP per student weight and token (forward 2, backward 4), 2 more for the reference where its weight is above 0
and attention's products under the causal mask on top. Floor of a phase: the larger of FLOPs / matmul rate and bytes / bandwidth.
Seconds in the run are those of its metrics; of scoring they have only what the rollouts did not hide. Seconds alone are those of
speed/speed.json, where it has the job: the phase with one thread and nothing beside it.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig

sys.path.insert(0, str(Path(__file__).parents[2]))

from opd_governor.services.inputs.models import resolve_model
from opd_governor.services.inputs.prune import resolve_student
from opd_governor.services.record.rundir import read_records

HERE = Path(__file__).parent
SPEED = HERE / "speed/speed.json"
WARM_UP_STEPS = 2
LEFT = """## What is left, and why

- The floor of a phase gives it every core. In a run each role has one thread, and all roles share the cores: with as many busy roles as
  cores no phase comes near its own floor, and what can be asked for is that the step as a whole comes near the sum of the floors.
- Rollouts: every pass over the model (one token of each sequence) costs the engine 2 to 5 ms of Python and sampling whatever the model's
  size. A tiny model's rollouts are nothing else. A larger one reads all its weights in each pass: more sequences at once cost little.
- Learning and scoring: a tiny model's matrices are too small for the matmul peak, and dispatching an operation costs more than computing
  it. A larger one's run near the peak of one thread when they are alone; beside the others they share caches and memory with them.
- The step beyond its phases: a weight update copies all weights four times (out of the learner, into the object store, to the engine's
  process, into its layout), and driver, Ray and the engine's front end take their part of the cores.
"""
BYTES = {"float32": 4, "bfloat16": 2}


def best_s(run: Callable[[], Any], rounds: int) -> float:
    """Of several: what the machine can do, not what it does beside other work."""
    times = []
    for _ in range(rounds + 1):
        started = time.perf_counter()
        run()
        times.append(time.perf_counter() - started)
    return min(times[1:])


def peaks(rounds: int, num_threads: int) -> dict[str, float]:
    """Matmul FLOP/s by precision and bytes/s of a copy, with this many threads."""
    torch.set_num_threads(num_threads)
    found = {}
    for dtype in BYTES:
        first, second = (torch.randn(2048, 2048).to(getattr(torch, dtype)) for _ in range(2))
        found[dtype] = 2 * 2048**3 / best_s(lambda first=first, second=second: first @ second, rounds)
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    found["bytes_per_s"] = 2 * source.nbytes / best_s(lambda: target.copy_(source), rounds)
    return found


def weights_and_width(model: str) -> tuple[int, int]:
    """Number of weights multiplied per token, and layers x hidden width, which attention needs."""
    config = AutoConfig.from_pretrained(model).get_text_config()
    hidden, inner, layers = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    attention = hidden * head * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    return layers * (attention + 3 * hidden * inner) + hidden * config.vocab_size, layers * hidden


def forward_flops(model: tuple[int, int], lengths: list[int], prompt_tokens: float) -> float:
    weights, width = model
    return sum(2 * weights * (prompt_tokens + n) + 2 * width * (prompt_tokens + n) ** 2 for n in lengths)


def page(directory: Path, peak: dict[str, float]) -> dict[str, Any]:
    """Seconds, FLOPs, bytes and floor of each phase, medians over the steps after warm-up."""
    job = yaml.safe_load((directory / "job.yaml").read_text())
    prompts = [json.loads(line) for line in Path(job["data"]["prompts"]["path"]).read_text().splitlines()]
    column = job["data"]["prompts"]["column"]
    characters = statistics.mean(len(str(prompt[column])) for prompt in prompts)
    student_path = job["student"]["model"]
    if student_path.startswith("pruned:"):
        from opd_governor.services.job.settings import PromptSource

        student_path = resolve_student(student_path, PromptSource(**job["data"]["prompts"]))
    student, teacher = weights_and_width(student_path), weights_and_width(resolve_model(job["teacher"][0]["model"]))
    # Characters are tokens in the quickstart; about four make one in a real vocabulary. Prompts are the small part.
    prompt_tokens = characters if student[0] < 10**6 else characters / 4
    steps = [r for r in read_records(directory / "metrics.jsonl") if r["num_rollouts"]][WARM_UP_STEPS:]
    rows: dict[str, list[dict[str, float]]] = {"rollout": [], "score": [], "learn": []}
    dtypes = {"rollout": job["rollout"]["dtype"], "score": job["teacher"][0]["dtype"], "learn": job["learner"]["dtype"]}
    for step in steps:
        forward, theirs = (forward_flops(model, step["lengths"], prompt_tokens) for model in (student, teacher))
        flops = {"rollout": forward, "score": theirs, "learn": (4 if step["reference_kl_weight"] > 0 else 3) * forward}
        read = {
            "rollout": step["length_max"] * student[0] * BYTES[dtypes["rollout"]],
            "score": teacher[0] * BYTES[dtypes["score"]],
            "learn": student[0] * 4 * 10,  # weights thrice, gradient twice, two moments and the weights read and written
        }
        for phase in rows:
            floor_s = max(flops[phase] / peak[dtypes[phase]], read[phase] / peak["bytes_per_s"])
            row = {"flop": flops[phase], "bytes": read[phase], "seconds": step[f"{phase}_s"], "floor_s": floor_s}
            rows[phase].append(row)
    phases = {
        phase: {key: statistics.median(row[key] for row in own) for key in own[0]} | {"dtype": dtypes[phase]} for phase, own in rows.items()
    }
    speed = json.loads(SPEED.read_text()) if SPEED.exists() else {}
    for phase, seconds in speed.get(job["name"], {}).get("alone", {}).get("seconds", {}).items():
        if phase in phases:
            phases[phase]["alone_s"] = seconds
    total_floor_s = sum(phase["floor_s"] for phase in phases.values())
    return {
        "run": job["name"], "steps": len(steps), "phases": phases, "step_s": statistics.mean(step["step_s"] for step in steps),
        "sync_s": statistics.median(step["sync_s"] for step in steps), "floor_s": total_floor_s,
    }  # fmt: skip


def markdown(results: dict[str, Any]) -> str:
    peak = results["peaks"]
    lines = [
        "# Time over floor", "", "Made by `python tests/bench/roofline.py`; the counting is described in its head.", "",
        f"Machine: {results['machine']['cores']} cores, matmul {peak['float32'] / 1e9:.0f} GF/s float32 and {peak['bfloat16'] / 1e9:.0f} "
        f"bfloat16, memory {peak['bytes_per_s'] / 1e9:.1f} GB/s (best of several, {results['threads']} threads).", "",
    ]  # fmt: skip
    for run in results["runs"]:
        lines += [f"## {run['run']} (medians of {run['steps']} steps, the step's mean)", ""]
        lines += ["| phase | GFLOP | MB | in the run, s | alone, s | floor, s | alone / floor |", "|---|---|---|---|---|---|---|"]
        for phase, row in run["phases"].items():
            alone = row.get("alone_s")
            alone_s, over = (f"{alone:.3f}", f"{alone / row['floor_s']:.1f}") if alone else ("", "")
            seconds = "hidden behind rollouts" if phase == "score" else f"{row['seconds']:.3f}"
            lines.append(
                f"| {phase} ({row['dtype']}) | {row['flop'] / 1e9:.2f} | {row['bytes'] / 1e6:.1f} | {seconds} | "
                f"{alone_s} | {row['floor_s']:.4f} | {over} |"
            )
        over = f"{run['step_s'] / run['floor_s']:.1f} (in the run)"
        lines += [f"| step (sync {run['sync_s']:.3f}) | | | {run['step_s']:.3f} | | {run['floor_s']:.4f} | {over} |", ""]
    lines.append(LEFT)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    peak = peaks(1 if arguments.smoke else 10, arguments.threads)
    results = {
        "peaks": peak, "threads": arguments.threads, "runs": [page(run, peak) for run in arguments.runs],
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
    }  # fmt: skip
    text = markdown(results)
    print(text)
    if not arguments.smoke:
        (HERE / "roofline.json").write_text(json.dumps(results, indent=1) + "\n")
        (HERE / "roofline.md").write_text(text)


if __name__ == "__main__":
    main()
