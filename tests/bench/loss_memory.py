"""Peak memory of the full-vocabulary loss, in chunks and plain: T = 2048 tokens, V = 50,000, one sequence, forward and backward.

    python tests/bench/loss_memory.py            # prints the figures, writes tests/bench/loss_memory.json beside itself

Each version runs in a process of its own; peak = the process' largest resident size less its size just before the loss.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from opd_governor.actors.learner.fields import LazyLogits, TokenFields
from opd_governor.actors.learner.objective import chunked_objective
from opd_governor.actors.learner.settings import ObjectiveSettings

NUM_TOKENS, VOCABULARY, HIDDEN, CHUNK_TOKENS, SEED = 2048, 50_000, 64, 128, 0
STOP_IDS = torch.tensor([2, 7])


def plain_loss(student: LazyLogits, teacher: LazyLogits) -> torch.Tensor:
    """Reverse KL over the vocabulary with the stop ids as one class, written plainly: every array is [T, V]."""
    keep_V = torch.ones(VOCABULARY, dtype=torch.bool)
    keep_V[STOP_IDS] = False

    def logp(logits: LazyLogits) -> torch.Tensor:
        logp_TV = logits.head(logits.hidden_NH).log_softmax(-1)
        return torch.cat([logp_TV[:, keep_V], logp_TV[:, STOP_IDS].logsumexp(-1, keepdim=True)], -1)

    with torch.no_grad():
        teacher_TX = logp(teacher)
    student_TX = logp(student)
    return (student_TX.exp() * (student_TX - teacher_TX)).sum(-1).mean()


def chunked_loss(student: LazyLogits, teacher: LazyLogits) -> torch.Tensor:
    zero_N = torch.zeros(NUM_TOKENS)
    fields = TokenFields(
        sampled_ids_N=torch.arange(NUM_TOKENS),
        position_N=torch.arange(NUM_TOKENS),
        rollout_N=zero_N == 0,
        weight_N=zero_N + 1 / NUM_TOKENS,
        golden_weight_N=zero_N,
        behaviour_logp_N=zero_N,
        teacher_logp_N=zero_N,
        teacher_stop_logp_N=zero_N,
        tilt_N=zero_N,
        overlong_N=zero_N,
    )
    settings = ObjectiveSettings(support="full")
    return chunked_objective(student, fields, settings, STOP_IDS, chunk_tokens=CHUNK_TOKENS, teacher=teacher)[0]


def measure(version: str) -> dict[str, object]:
    """Peak and loss of one version, in this process. Gradients are written to `{version}.npy` in the working directory."""
    torch.manual_seed(SEED)
    hidden_TH = torch.randn(NUM_TOKENS, HIDDEN, requires_grad=True)
    heads = [torch.nn.Linear(HIDDEN, VOCABULARY, bias=False) for _ in range(2)]
    student = LazyLogits(hidden_TH, heads[0], tuple(heads[0].parameters()))
    teacher = LazyLogits(torch.randn(NUM_TOKENS, HIDDEN), heads[1], ())
    for tensor in (hidden_TH, heads[0].weight):
        tensor.grad = torch.zeros_like(tensor)  # gradients belong to the model, not to the loss
    before = resident_mib()
    loss = {"plain": plain_loss, "chunked": chunked_loss}[version](student, teacher)
    loss.backward()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    np.save(f"{version}.npy", torch.cat([hidden_TH.grad.flatten(), heads[0].weight.grad.flatten()]).numpy())
    return {"peak_mib": round(peak - before), "process_peak_mib": round(peak), "loss": float(loss.detach())}


def resident_mib() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * resource.getpagesize() / 2**20


def main(folder: Path) -> None:
    results = {}
    for version in ("plain", "chunked"):
        run = subprocess.run([sys.executable, __file__, version], cwd=folder, env=environment(), check=True, capture_output=True, text=True)
        results[version] = json.loads(run.stdout)
    plain, chunked = (np.load(folder / f"{version}.npy") for version in ("plain", "chunked"))
    results |= {
        "peak_ratio": results["chunked"]["peak_mib"] / results["plain"]["peak_mib"],
        "loss_relative_error": abs(results["chunked"]["loss"] / results["plain"]["loss"] - 1),
        "gradient_relative_error": float(np.linalg.norm(chunked - plain) / np.linalg.norm(plain)),
        "setting": {"tokens": NUM_TOKENS, "vocabulary": VOCABULARY, "hidden": HIDDEN, "chunk_tokens": CHUNK_TOKENS, "seed": SEED},
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__},
    }
    text = json.dumps(results, indent=2)
    print(text)
    assert results["peak_ratio"] < 0.25
    assert results["loss_relative_error"] < 1e-5
    assert results["gradient_relative_error"] < 1e-5
    Path(__file__).with_suffix(".json").write_text(text + "\n")


def environment() -> dict[str, str]:
    # glibc keeps freed blocks under 32 MiB (a chunk's logits are 25) in its heap; handed back at once, resident size is what is in use.
    return os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(2**20)}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(measure(sys.argv[1])))
    else:
        with tempfile.TemporaryDirectory() as folder:
            main(Path(folder))
