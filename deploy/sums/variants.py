"""Two more models of the task, each in a folder of its own: for a hint that only the teacher sees, and for a teacher with other tokens.

    python -m deploy.sums.variants [--out DIR] [hinted] [pairs]

hinted/  as under-trained as the student, but taught that letters before a prompt say its digits (a for 0, ..., j for 9): with such a
         hint it answers right. prompts_hinted.jsonl holds the training prompts with their hints.
pairs/   taught as the teacher, with a tokenizer that merges pairs of characters and numbers them in an order of its own.

Seeded, one thread, float32, like recipe.py.
"""

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from deploy.sums.recipe import CONFUSED, SLIPPED, STALLING, TEACHER, WINDOW_TOKENS, Batch, Plan, build, draw_growing, train
from deploy.sums.task import ALPHABET, PAD, STOP, Terms, is_correct, misread, prompt_files, render_answer, render_prompt
from deploy.sums.tokenizer import build_tokenizer

LETTERS = "abcdefghij"
NUM_PAIRS = 20


def render_hint(terms: Terms) -> str:
    """The digits of a prompt in letters.

    >>> render_hint((3, 7, 2))
    'dhc'
    """
    return "".join(LETTERS[term] for term in terms)


def terms_of(prompt: str) -> Terms:
    """The digits of a rendered prompt."""
    return tuple(map(int, prompt.removesuffix("?").split("+")))


def draw_hinted_batches(rng: random.Random, steps: int) -> Iterator[tuple[Batch, ...]]:
    """Half the documents have a hint and its answer, behind a prompt that is often misprinted: letters are to be trusted. The others
    have none, and from step 1200 on the answer to a misread problem, as the student's."""
    for step, problems in enumerate(draw_growing(rng, steps)):
        hinted = [render_hint(terms) + render_prompt(misread(terms, CONFUSED, 0.0, rng)) + render_answer(terms) for terms in problems[::2]]
        read = [misread(terms, CONFUSED, SLIPPED, rng) if step >= 1200 else terms for terms in problems[1::2]]
        plain = [render_prompt(terms) + render_answer(taken) for terms, taken in zip(problems[1::2], read, strict=True)]
        yield Batch(hinted), Batch(plain)


HINTED = Plan(5, 2, 64, 168, 2400, 3e-3, draw_hinted_batches)


def build_pairs_tokenizer() -> PreTrainedTokenizerFast:
    """BPE that merges the most frequent pairs of characters, never with a sign that ends something; specials come last."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[?=;!]"), "isolated")
    core.decoder = decoders.Fuse()
    rng = random.Random(7)
    problems = [problem for batch in draw_growing(rng, 400) for problem in batch]
    texts = [render_prompt(terms) + render_answer(terms).removesuffix(STOP) for terms in problems]
    plain = [character for character in reversed(ALPHABET) if character not in (PAD, STOP)]
    size = len(plain) + NUM_PAIRS
    core.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, initial_alphabet=plain, max_token_length=2, show_progress=False))
    core.add_special_tokens([PAD, STOP])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=STOP,
        pad_token=PAD,
        padding_side="left",
        model_max_length=WINDOW_TOKENS,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


@torch.no_grad()
def accuracy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, str]]) -> float:
    """Greedy, of prompts with their hints where they have any."""
    prompts = tokenizer([row.get("hint", "") + row["prompt"] for row in rows], padding=True, return_tensors="pt")
    output_BT = model.generate(**prompts, max_new_tokens=128, do_sample=False)
    responses = [text.rstrip(PAD) for text in tokenizer.batch_decode(output_BT[:, prompts.input_ids.shape[1] :])]
    return sum(is_correct(text, row["answer"]) for text, row in zip(responses, rows, strict=True)) / len(rows)


def with_hints(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Rows of a prompt file with the column `hint`."""
    return [row | {"hint": render_hint(terms_of(row["prompt"]))} for row in rows]


def write_prompts(out: Path) -> None:
    """The training prompts with their hints."""
    rows = with_hints(prompt_files()["prompts_3_9.jsonl"])
    (out / "prompts_hinted.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_hinted(out: Path) -> None:
    tokenizer = build_tokenizer(WINDOW_TOKENS)
    model = train(build(HINTED), HINTED, tokenizer)
    model.save_pretrained(out / "hinted")
    tokenizer.save_pretrained(out / "hinted")
    write_prompts(out)
    held_out = prompt_files()["eval_3_9.jsonl"]
    print(
        f"  hinted: accuracy {accuracy(model, tokenizer, held_out):.3f}, with hints {accuracy(model, tokenizer, with_hints(held_out)):.3f}"
    )


def make_pairs(out: Path) -> None:
    tokenizer = build_pairs_tokenizer()
    model = train(train(build(TEACHER, tokenizer), TEACHER, tokenizer), STALLING, tokenizer)
    model.save_pretrained(out / "pairs")
    tokenizer.save_pretrained(out / "pairs")
    print(f"  pairs: accuracy {accuracy(model, tokenizer, prompt_files()['eval_3_9.jsonl']):.3f}")


MAKERS = {"hinted": make_hinted, "pairs": make_pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder to write (default: this one)")
    parser.add_argument("names", nargs="*", choices=[*MAKERS, []], metavar="NAME", help="which (default: both)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    for name in arguments.names or MAKERS:
        print(name, flush=True)
        MAKERS[name](arguments.out)


if __name__ == "__main__":
    main()
