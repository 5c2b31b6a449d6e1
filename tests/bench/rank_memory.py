"""Host memory of a learner's ranks over gloo: the peak at load, and at a checkpoint, and at a resume.

    python -m tests.bench.rank_memory            # 4 ranks, a tenth of a billion parameters: about 4 GiB, a minute or two
    python -m tests.bench.rank_memory --smoke    # tiny

The student has random weights: memory does not depend on them. What is printed is each rank's highest anonymous memory (what the kernel
cannot take back; a mapped file's pages it can) above what the process had before, in bytes a parameter of the student.
"""

import argparse
import json
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "learner"))
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import ranks as processes
import torch
import transformers
from tiny import tiny_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM

from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory

SIZES = {False: {"hidden": 768, "layers": 12, "vocabulary": 32000}, True: {"hidden": 64, "layers": 2, "vocabulary": 512}}
NUM_RANKS = 4
SAMPLE_S = 0.005


def build(folder: Path, hidden: int, layers: int, vocabulary: int) -> int:
    """A random Llama with its tokenizer; returns its number of parameters."""
    config = AutoConfig.for_model(
        "llama", hidden_size=hidden, intermediate_size=8 * hidden // 3, num_hidden_layers=layers, num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32, vocab_size=vocabulary, max_position_embeddings=256, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.to(torch.bfloat16).save_pretrained(folder)  # as students come: loading makes float32 of it
    tiny_tokenizer().save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def batch() -> list[ScoredRollout]:
    scores = np.full(8, -1.0, np.float32)
    trajectory = Trajectory(Prompt(0, (5, 6, 7)), (8, 9, 10, 11, 12, 13, 14, 1), scores, "stop", 32, 1, 0, 0)
    return [ScoredRollout(trajectory, TokenScores("t", scores, scores - 1))] * 4


class Watch:
    """The highest anonymous memory of each process while something runs."""

    def __init__(self, pids: list[int]) -> None:
        self._pids = pids

    def over(self, run: Callable[[], Any]) -> list[int]:
        before, peak, done = [anonymous_bytes(pid) for pid in self._pids], [0] * len(self._pids), threading.Event()

        def sample() -> None:
            while not done.is_set():
                for place, pid in enumerate(self._pids):
                    peak[place] = max(peak[place], anonymous_bytes(pid))
                time.sleep(SAMPLE_S)

        thread = threading.Thread(target=sample)
        thread.start()
        try:
            run()
        finally:
            done.set()
            thread.join()
        return [highest - held for highest, held in zip(peak, before, strict=True)]


def anonymous_bytes(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) * 1024


def measure(smoke: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as scratch:
        root = Path(scratch)
        parameters = build(root / "student", **SIZES[smoke])
        processes.PATIENCE_S = 600.0
        ranks = processes.Ranks(NUM_RANKS)
        try:
            watch = Watch([process.pid for process in ranks._processes])
            settings = LearnerSettings(num_ranks=NUM_RANKS, micro_batch_tokens=64, chunk_tokens=16)
            arguments = (LearnerModels(str(root / "student")), settings, ObjectiveSettings())
            options: dict[str, Any] = {"stop_ids": (1,), "max_new_tokens": 32}
            warm = str(root / "warm")
            build(Path(warm), **SIZES[True])
            ranks.new(LearnerModels(warm), settings, ObjectiveSettings(), **options)  # imports are done before anything is measured
            found = {"load": watch.over(lambda: ranks.new(*arguments, **options))}
            ranks.step(batch(), [], LengthLimits(32), 4.0)
            started = time.monotonic()
            found["checkpoint"] = watch.over(lambda: ranks.save(str(root / "saved")))
            seconds = time.monotonic() - started
            found["resume"] = watch.over(lambda: ranks.call("restore", str(root / "saved")))
            files = {str(f.relative_to(root / "saved")): f.stat().st_size for f in sorted((root / "saved").rglob("*")) if f.is_file()}
        finally:
            ranks.close()
    return {
        "parameters": parameters, "ranks": NUM_RANKS, "checkpoint_s": seconds, "checkpoint_bytes": sum(files.values()),
        "bytes_per_parameter": {what: [round(size / parameters, 2) for size in sizes] for what, sizes in found.items()},
        "gib_in_all": {what: round(sum(sizes) / 2**30, 2) for what, sizes in found.items()},
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes")
    found = measure(parser.parse_args().smoke)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps(found | {"versions": versions, "machine": platform.machine(), "seed": 0}, indent=1))


if __name__ == "__main__":
    main()
