"""Learner step and teacher scoring in bfloat16 on one GPU against the floor of the arithmetic, and the loss's memory.

    python tests/bench/gpu.py            # needs torch and transformers only; writes gpu-<device>.json beside this file
    python tests/bench/gpu.py --smoke    # tiny sizes, on the CPU where there is no GPU; writes nothing

The model has random weights: time and memory do not depend on them. Floor: counted FLOPs over the device's own matmul rate, measured
in the same run (not the data sheet's). MFU = floor / time. Both are measured as written and with the decoder layers compiled
(`learner.compile`). The loss is measured at T tokens and V ids, forward and backward.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).parents[2]))

from opd_governor.actors.causal_lm import compile_layers
from opd_governor.actors.learner.fields import LazyLogits, TokenFields
from opd_governor.actors.learner.objective import chunked_objective
from opd_governor.actors.teacher.scoring import score_positions

SEED, ROUNDS = 0, 5
FULL = {"hidden": 2048, "inner": 6144, "layers": 28, "heads": 16, "kv_heads": 8, "vocabulary": 150_000, "batch": 8, "tokens": 1024}
SMOKE = {"hidden": 64, "inner": 128, "layers": 2, "heads": 2, "kv_heads": 1, "vocabulary": 500, "batch": 2, "tokens": 32}
STOP_IDS = (1, 3)
CHUNK_TOKENS = 1024
OBJECTIVE: Any = SimpleNamespace(
    support="sampled", stop_event="class", importance_cap=2.0, advantage_clip_nats=None, trust_region_nats=None, clip_low=0.2, clip_high=0.2
)
"""What the sampled loss reads of the objective's settings, whose own class needs pydantic."""


def build(size: dict[str, int], device: torch.device, dtype: torch.dtype) -> Any:
    config = AutoConfig.for_model(
        "llama", hidden_size=size["hidden"], intermediate_size=size["inner"], num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"], num_key_value_heads=size["kv_heads"], vocab_size=size["vocabulary"],
        head_dim=size["hidden"] // size["heads"], max_position_embeddings=2 * size["tokens"],
    )  # fmt: skip
    torch.manual_seed(SEED)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).to(device)


def forward_flops(model: Any, num_rows: int, num_tokens: int, size: dict[str, int]) -> float:
    """FLOPs of a forward pass: 2 per weight and token (embeddings are looked up, not multiplied), and attention's two products under the
    causal mask."""
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    attention = 2 * size["layers"] * num_tokens * size["hidden"]  # 4 x T x H, half of it masked away
    return float(num_rows * num_tokens) * (2 * matrices + attention)


def fields_of(ids_N: torch.Tensor) -> TokenFields:
    zero_N = torch.zeros(len(ids_N), device=ids_N.device)
    return TokenFields(
        sampled_ids_N=ids_N, position_N=torch.arange(len(ids_N), device=ids_N.device), rollout_N=zero_N == 0,
        weight_N=zero_N + 1 / len(ids_N), golden_weight_N=zero_N, behaviour_logp_N=zero_N - 1, teacher_logp_N=zero_N - 1,
        teacher_stop_logp_N=zero_N - 5, tilt_N=zero_N, overlong_N=zero_N,
    )  # fmt: skip


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_s(run: Callable[[], Any], device: torch.device, rounds: int) -> float:
    """Median seconds after one round of warm-up."""
    times = []
    for _ in range(rounds + 1):
        wait(device)
        started = time.perf_counter()
        run()
        wait(device)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def matmul_rate(device: torch.device, dtype: torch.dtype, width: int) -> float:
    """FLOP/s of a square product."""
    first, second = (torch.randn(width, width, device=device, dtype=dtype) for _ in range(2))
    return 2 * width**3 / median_s(lambda: first @ second, device, ROUNDS)


def measure(size: dict[str, int], device: torch.device, rounds: int) -> dict[str, Any]:
    rate = matmul_rate(device, torch.bfloat16, 8192 if device.type == "cuda" else 1024)
    ids_BL = torch.randint(4, size["vocabulary"], (size["batch"], size["tokens"]), device=device)
    learned = measure_learner(size, ids_BL, rate, rounds)  # its model is gone before the teacher's comes
    return {"matmul_tflops": rate / 1e12} | learned | measure_teacher(size, ids_BL, rate, rounds)


def measure_learner(size: dict[str, int], ids_BL: torch.Tensor, rate: float, rounds: int) -> dict[str, Any]:
    device, ids_N = ids_BL.device, ids_BL[:, 1:].flatten()
    student = build(size, device, torch.float32).train()  # master weights float32, passes bfloat16, as the learner does
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16):
            hidden_NH = student.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
            loss = loss_of(student, hidden_NH, ids_N)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()

    flops = 3 * forward_flops(student, size["batch"], size["tokens"], size)
    timed = against_floor(median_s(step, device, rounds), flops, rate)
    found = {"learner_step": timed, "loss": loss_memory(student, size, device)}
    if device.type == "cuda":  # on a CPU it takes a C++ compiler, which is not everywhere
        compile_layers(student)
        found["learner_step_compiled"] = against_floor(median_s(step, device, rounds), flops, rate)
    return found


def measure_teacher(size: dict[str, int], ids_BL: torch.Tensor, rate: float, rounds: int) -> dict[str, Any]:
    teacher = build(size, ids_BL.device, torch.bfloat16).eval()

    @torch.inference_mode()
    def score() -> None:
        hidden_NH = teacher.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state[:, :-1].flatten(0, 1)
        ids_N = ids_BL[:, 1:].flatten()
        score_positions(hidden_NH, teacher.get_output_embeddings(), ids_N, STOP_IDS, top_k=32, chunk_tokens=CHUNK_TOKENS)

    flops = forward_flops(teacher, size["batch"], size["tokens"], size)
    found = {"teacher_score": against_floor(median_s(score, ids_BL.device, rounds), flops, rate)}
    if ids_BL.device.type == "cuda":
        compile_layers(teacher)
        found["teacher_score_compiled"] = against_floor(median_s(score, ids_BL.device, rounds), flops, rate)
    return found


def loss_of(student: Any, hidden_NH: torch.Tensor, ids_N: torch.Tensor) -> torch.Tensor:
    head = student.get_output_embeddings()
    logits = LazyLogits(hidden_NH, head, tuple(head.parameters()))
    stop_ids_E = torch.tensor(STOP_IDS, device=ids_N.device)
    return chunked_objective(logits, fields_of(ids_N), OBJECTIVE, stop_ids_E, chunk_tokens=CHUNK_TOKENS)[0]


def against_floor(seconds: float, flops: float, rate: float) -> dict[str, float]:
    return {"seconds": seconds, "tflop": flops / 1e12, "floor_s": flops / rate, "mfu": flops / rate / seconds}


def loss_memory(student: Any, size: dict[str, int], device: torch.device) -> dict[str, Any]:
    """Peak memory beyond weights, gradients and hidden states, and the size of [T, V] in float32 for scale. None without a GPU."""
    num_tokens = size["batch"] * size["tokens"]
    hidden_NH = torch.randn(num_tokens, size["hidden"], device=device, requires_grad=True)
    ids_N = torch.randint(4, size["vocabulary"], (num_tokens,), device=device)
    head = student.get_output_embeddings()
    head.weight.grad, hidden_NH.grad = torch.zeros_like(head.weight), torch.zeros_like(hidden_NH)
    before = 0
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with torch.autocast(device.type, torch.bfloat16):
        loss = loss_of(student, hidden_NH, ids_N)
    loss.backward()
    peak = (torch.cuda.max_memory_allocated(device) - before) / 2**20 if device.type == "cuda" else None
    return {
        "tokens": num_tokens, "vocabulary": size["vocabulary"], "peak_mib": peak,
        "logits_float32_mib": num_tokens * size["vocabulary"] * 4 / 2**20,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes; writes nothing")
    smoke = parser.parse_args().smoke
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not smoke:
        sys.exit("no GPU here: --smoke runs tiny sizes on the CPU")
    size = SMOKE if smoke else FULL
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    versions = {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__}
    results = {"device": name, "size": size, "seed": SEED, **measure(size, device, 1 if smoke else ROUNDS), "versions": versions}
    text = json.dumps(results, indent=2)
    print(text)
    if not smoke:
        (Path(__file__).parent / f"gpu-{name.lower().replace(' ', '-')}.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
