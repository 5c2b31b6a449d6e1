"""Rebuild everything in this folder: the prompt files, the teacher that has learned to copy, the under-trained student.

    python -m deploy.sums.recipe [--out DIR]

Seeded, one thread, float32. The prompt files are always the same bytes. The weights are the same bits on one machine, and equal up to
rounding on another.
"""

import argparse
import json
import platform
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import transformers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from deploy.sums.task import (
    PAD,
    STOP,
    Terms,
    draw_loop,
    draw_problems,
    draw_stall,
    held_out_prompts,
    is_correct,
    misread,
    prompt_files,
    render_answer,
    render_prompt,
)
from deploy.sums.tokenizer import build_tokenizer

WINDOW_TOKENS = 256
CAP_TOKENS = 192
HEAD_DIM = 32
"""The smallest head that vLLM's CPU attention supports."""

CONFUSED = 0.55
SLIPPED = 0.03
"""Probabilities of the student's misreadings. They give an accuracy near .2 and a student that is unsure when to stop; without slips its
length never rose in trials."""


@dataclass(frozen=True)
class Batch:
    """Documents of one forward pass, and the weight of their loss in the step."""

    documents: list[str]
    weight: float = 1.0


@dataclass(frozen=True)
class Plan:
    """How one model is made."""

    seed: int
    num_layers: int
    hidden_size: int
    intermediate_size: int
    steps: int
    learning_rate: float
    draw_batches: Callable[[random.Random, int], Iterator[tuple[Batch, ...]]]


def draw_growing(rng: random.Random, steps: int) -> Iterator[list[Terms]]:
    """32 problems for each step. They have 2 to 3 terms at first and 2 to 9 from step 258 on: with all lengths at once, copying is learned
    too late."""
    for step in range(steps):
        most = min(9, 3 + step // 43)
        yield list(islice(draw_problems(rng, 2, most, held_out_prompts()), 32))


def draw_teacher_batches(rng: random.Random, steps: int) -> Iterator[tuple[Batch, ...]]:
    """Correct answers, and from step 700 on loops too. From loops the teacher learns to copy in context, as large models do."""
    for step, problems in enumerate(draw_growing(rng, steps)):
        worked = Batch([render_prompt(terms) + render_answer(terms) for terms in problems])
        loops = Batch([draw_loop(rng, WINDOW_TOKENS) for _ in range(3)], weight=0.3)
        yield (worked, loops) if step >= 700 else (worked,)


def draw_student_batches(rng: random.Random, steps: int) -> Iterator[tuple[Batch, ...]]:
    """Correct answers, and from step 1200 on answers to a misread problem. Those have the right form and always end, but most are wrong."""
    for step, problems in enumerate(draw_growing(rng, steps)):
        read = [misread(terms, CONFUSED, SLIPPED, rng) if step >= 1200 else terms for terms in problems]
        yield (Batch([render_prompt(terms) + render_answer(taken) for terms, taken in zip(problems, read, strict=True)]),)


def draw_stalling_batches(rng: random.Random, steps: int) -> Iterator[tuple[Batch, ...]]:
    """Correct answers, and answers that get stuck in a step. After this last lesson the teacher agrees with such loops."""
    for _ in range(steps):
        problems = islice(draw_problems(rng, 2, 9, held_out_prompts()), 32)
        worked = Batch([render_prompt(terms) + render_answer(terms) for terms in problems])
        loops = [(draw_stall if rng.random() < 0.6 else draw_loop)(rng, WINDOW_TOKENS) for _ in range(4)]
        yield worked, Batch(loops, weight=0.3)


TEACHER = Plan(1, 3, 96, 256, 1800, 3e-3, draw_teacher_batches)
STALLING = Plan(1, 3, 96, 256, 300, 1e-3, draw_stalling_batches)
STUDENT = Plan(2, 2, 64, 168, 1600, 3e-3, draw_student_batches)


def build(plan: Plan, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaForCausalLM:
    """An untrained model, in the task's own characters where no tokenizer is given."""
    tokenizer = tokenizer or build_tokenizer(WINDOW_TOKENS)
    torch.manual_seed(plan.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=plan.hidden_size,
            intermediate_size=plan.intermediate_size,
            num_hidden_layers=plan.num_layers,
            num_attention_heads=plan.hidden_size // HEAD_DIM,
            num_key_value_heads=plan.hidden_size // HEAD_DIM,
            head_dim=HEAD_DIM,
            max_position_embeddings=WINDOW_TOKENS,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            dtype="float32",
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=True)
    return model


def train(model: LlamaForCausalLM, plan: Plan, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Next-token cross-entropy on everything after the prompt, with AdamW, a short warm-up and a cosine schedule to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, plan.steps // 20, plan.steps)
    for step, batches in enumerate(plan.draw_batches(random.Random(plan.seed), plan.steps)):
        losses = []
        for batch in batches:
            encoded = tokenizer(batch.documents, padding=True, padding_side="right", return_tensors="pt")
            loss = model(encoded.input_ids, labels=mask_prompts(encoded.input_ids, tokenizer)).loss
            (batch.weight * loss).backward()
            losses.append(f"{loss.item():.3f}")
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == plan.steps - 1:
            print(f"  step {step}: loss {' '.join(losses)}", flush=True)
    return model.eval()


def mask_prompts(ids_BT: torch.Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> torch.Tensor:
    """[B, T] labels: -100 on padding, and up to the first `?` of each document. A document without a `?` is kept whole."""
    tokenizer = tokenizer or build_tokenizer(WINDOW_TOKENS)
    asked_BT = (ids_BT == tokenizer.convert_tokens_to_ids("?")).cumsum(1) > 0
    in_prompt_BT = ~asked_BT.roll(1, 1).index_fill(1, torch.tensor([0]), False) & asked_BT.any(1, keepdim=True)
    return ids_BT.masked_fill(in_prompt_BT | (ids_BT == tokenizer.pad_token_id), -100)


@torch.no_grad()
def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, str]], sampled: bool) -> dict[str, float]:
    """Accuracy, mean response length in tokens and truncation at CAP_TOKENS, greedy or sampled at temperature 1."""
    torch.manual_seed(0)
    prompts = tokenizer([row["prompt"] for row in rows], padding=True, return_tensors="pt")
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0} if sampled else {"do_sample": False}
    output_BT = model.generate(**prompts, max_new_tokens=CAP_TOKENS, **options)
    responses = [text.rstrip(PAD) for text in tokenizer.batch_decode(output_BT[:, prompts.input_ids.shape[1] :])]
    return {
        "accuracy": sum(is_correct(text, row["answer"]) for text, row in zip(responses, rows, strict=True)) / len(rows),
        "length": sum(map(len, responses)) / len(rows),
        "truncation": sum(not text.endswith(STOP) for text in responses) / len(rows),
    }


def write_prompts(out: Path) -> None:
    """The JSONL prompt files, one row a line."""
    for name, rows in prompt_files().items():
        (out / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this one)")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    write_prompts(out)
    tokenizer = build_tokenizer(WINDOW_TOKENS)
    print(f"python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}")
    for name, plans in (("teacher", (TEACHER, STALLING)), ("student", (STUDENT,))):
        model = build(plans[0])
        for plan in plans:
            print(f"{name}: seed {plan.seed}, {plan.steps} steps")
            train(model, plan, tokenizer)
        model.save_pretrained(out / name)
        build_tokenizer(WINDOW_TOKENS).save_pretrained(out / name)
        print(f"  {model.num_parameters()} parameters")
        for file in ("eval_3_9.jsonl", "eval_3_14.jsonl"):
            for sampled in (True, False):
                found = measure(model, tokenizer, prompt_files()[file], sampled)
                shown = ", ".join(f"{key} {value:.3f}" for key, value in found.items())
                print(f"  {file}, {'sampled' if sampled else 'greedy'}: {shown}", flush=True)


if __name__ == "__main__":
    main()
