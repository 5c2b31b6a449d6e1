"""A run whose models bring code of their own and whose held-out file has a problem beyond the window."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from opd_governor.services.record.rundir import read_records
from tests.doors.models import llama_of_own_code
from tests.tiny import build_tiny, tiny_tokenizer

pytestmark = pytest.mark.integration

EXTRA = tuple("äöüßéèê")
"""Of the models' embeddings, not of their tokenizer."""


def run(folder: Path, name: str, models: dict[str, Path], *problems: dict[str, str]) -> Path:
    """One step of a run; its directory."""
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"What is {n}+{n}?"}) + "\n" for n in range(16)))
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    job = {
        "name": name,
        "student": {"model": str(models["student"]), "trust_remote_code": True},
        "teacher": {"model": str(models["teacher"]), "trust_remote_code": True},
        "data": {
            "prompts": {"path": str(folder / "prompts.jsonl")},
            "golden": {"num_prompts": 4, "max_new_tokens": 8},
            "eval": {"path": str(folder / f"{name}.jsonl"), "verifier": "regex", "every_steps": 1, "on_bad_row": "refuse"},
        },
        "rollout": {"prompts_per_step": 8, "max_new_tokens": 16, "max_staleness": 0},
        "learner": {"total_steps": 1},
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(job))
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules")}
    command = [sys.executable, "-m", "opd_governor", "run", str(folder / f"{name}.yaml"), "--out", str(folder / name)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=400)
    assert answer.returncode == 0, answer.stdout[-1500:] + answer.stderr[-3000:]
    return folder / name


def test_code_of_a_models_own_and_a_problem_beyond_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Engine, learner, teacher, golden pass and final/ take the models. The refused problem changes nothing for the others."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    models = {name: build_tiny(tmp_path / name, seed=seed, extra=EXTRA) for name, seed in (("student", 1), ("teacher", 2))}
    for folder in models.values():
        tiny_tokenizer().save_pretrained(folder)
        llama_of_own_code(folder, base=True)
    problems = [{"prompt": f"Say {n}.", "answer": f"[{letters}]"} for n, letters in enumerate(("a-m", "q", "A-M", "X", "0-4", "%"))]
    short = run(tmp_path, "short", models, *problems)
    long = run(tmp_path, "long", models, *problems[:3], {"prompt": "x" * 300, "answer": "[a-z]"}, *problems[3:])
    greedy = ("eval_accuracy", "eval_length", "eval_truncation")
    found = [[[record[name] for name in greedy] for record in read_records(out / "metrics.jsonl")] for out in (short, long)]
    assert found[0] == found[1]
    assert 0 < found[0][0][0] < 1, "all or none right would prove nothing"
    final = AutoModelForCausalLM.from_pretrained(short / "final", trust_remote_code=True)
    assert type(final).__name__ == "OwnModel"
    assert final.config.vocab_size == len(tiny_tokenizer()) + len(EXTRA)
