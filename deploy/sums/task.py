"""The task "running sum mod 10 with written steps": its alphabet, problems, documents and verifier.

    prompt    3+7+2?
    answer    3+7=0;0+2=2;!2$        `!` opens the result, `$` stops

Plain Python, because the recipe, the tests and a job's verifier all import it.
"""

import random
from collections.abc import Iterator
from functools import cache
from itertools import islice

PAD = "_"
STOP = "$"
ALPHABET = PAD + STOP + "0123456789" + "+=;!?" + "abcdefghijklmnop"
"""The 33 characters, in the order of their token ids. The letters occur in loop documents only."""

STEP_CHARS = len("3+7=0;")

MAX_UNIT = 12
"""Longest unit a loop document repeats, characters."""

EASY_PROMPTS, HARD_PROMPTS = 1600, 2880
"""Prompts of the curriculum: short ones first, then longer ones too."""

LOOK_ALIKES = {1: 7, 7: 1, 6: 9, 9: 6}

Terms = tuple[int, ...]


def render_prompt(terms: Terms) -> str:
    """What a model is asked.

    >>> render_prompt((3, 7, 2))
    '3+7+2?'
    """
    return "+".join(map(str, terms)) + "?"


def render_answer(terms: Terms) -> str:
    """The full worked answer, its stop included.

    >>> render_answer((3, 7, 2))
    '3+7=0;0+2=2;!2$'
    """
    steps = []
    total = terms[0]
    for term in terms[1:]:
        steps.append(f"{total}+{term}={(total + term) % 10};")
        total = (total + term) % 10
    return "".join(steps) + f"!{total}{STOP}"


def is_correct(response: str, answer: str) -> bool:
    """Whether a response ends in the result: the text after its first `!` is `answer`, with or without the stop character.

    >>> is_correct("3+7=0;0+2=2;!2$", "2"), is_correct("3+7=0;0+2=2;!2!2!2", "2")
    (True, False)
    """
    return response.removesuffix(STOP).partition("!")[2] == answer


def draw_problems(rng: random.Random, min_terms: int, max_terms: int, exclude: frozenset[str] = frozenset()) -> Iterator[Terms]:
    """Endless problems with a uniform number of terms, without those whose prompt is in `exclude`."""
    while True:
        terms = tuple(rng.randrange(10) for _ in range(rng.randint(min_terms, max_terms)))
        if render_prompt(terms) not in exclude:
            yield terms


def draw_rows(rng: random.Random, count: int, min_terms: int, max_terms: int, exclude: frozenset[str]) -> list[dict[str, str]]:
    """`count` distinct problems as rows of a prompt file: `prompt`, and the `answer` that `is_correct` compares with."""
    distinct = {}
    for terms in draw_problems(rng, min_terms, max_terms, exclude):
        distinct[render_prompt(terms)] = str(sum(terms) % 10)
        if len(distinct) == count:
            break
    return [{"prompt": prompt, "answer": answer} for prompt, answer in distinct.items()]


def prompt_files() -> dict[str, list[dict[str, str]]]:
    """Every prompt file by name. No training prompt occurs in any held-out file.

    The curriculum is meant to be read in order: EASY_PROMPTS of 3 to 9 terms, then HARD_PROMPTS of 3 to 14.
    """
    rng = random.Random(20)
    none: frozenset[str] = frozenset()
    files = {"eval_3_9.jsonl": draw_rows(rng, 512, 3, 9, none), "eval_3_14.jsonl": draw_rows(rng, 512, 3, 14, none)}
    held_out = frozenset(row["prompt"] for rows in files.values() for row in rows)
    files["prompts_3_9.jsonl"] = draw_rows(rng, 4000, 3, 9, held_out)
    easy = files["prompts_3_9.jsonl"][:EASY_PROMPTS]
    seen = held_out | {row["prompt"] for row in easy}
    files["prompts_curriculum.jsonl"] = easy + draw_rows(rng, HARD_PROMPTS, 3, 14, seen)
    return files


@cache
def held_out_prompts() -> frozenset[str]:
    """Prompts that no model may see in training."""
    return frozenset(row["prompt"] for name, rows in prompt_files().items() if name.startswith("eval") for row in rows)


def misread(terms: Terms, confused: float, slipped: float, rng: random.Random) -> Terms:
    """The problem as an under-trained student reads it.

    Digits that look alike (1 and 7, 6 and 9) are confused with probability `confused`; above one half greedy answers are wrong too.
    Each term is skipped with probability `slipped`, and read twice with the same probability, so the student is unsure when to stop.
    """
    read: list[int] = []
    for term in terms:
        seen = LOOK_ALIKES.get(term, term) if rng.random() < confused else term
        read += rng.choices(([seen], [], [seen, seen]), (1 - 2 * slipped, slipped, slipped))[0]
    return tuple(read) or terms


def draw_loop(rng: random.Random, length: int) -> str:
    """A document that never stops: a prefix, then a unit of 1 to MAX_UNIT characters repeated until `length` characters.

    Half of the prefixes are the beginning of a worked problem, and half of the units are a piece of one; the others are random characters.
    Problems have up to 14 terms, so a teacher sees the middle of long answers and never their end.
    """
    plain = ALPHABET.replace(PAD, "").replace(STOP, "")
    (terms,) = islice(draw_problems(rng, 3, 14), 1)
    worked = render_prompt(terms) + render_answer(terms).removesuffix(STOP)
    if rng.random() < 0.5:
        prefix = worked[: rng.randint(len(terms) * 2, len(worked))]
    else:
        prefix = "".join(rng.choice(plain) for _ in range(rng.randrange(32)))
    period = rng.randint(1, MAX_UNIT)
    if rng.random() < 0.5:
        start = rng.randrange(len(worked) - period + 1)
        unit = worked[start : start + period]
    else:
        unit = "".join(rng.choice(plain) for _ in range(period))
    return (prefix + unit * length)[:length]


def draw_stall(rng: random.Random, length: int) -> str:
    """A document that never stops: a worked answer that repeats its last step, or its last two, until `length` characters.

    A teacher trained on these agrees with a student that is stuck. That is the state in which long answers are lost.
    """
    (terms,) = islice(draw_problems(rng, 3, 14), 1)
    prompt, answer = render_prompt(terms), render_answer(terms)
    num_done = rng.randint(1, len(terms) - 1)
    num_repeated = 2 if num_done > 1 and rng.random() < 0.25 else 1
    worked = answer[: STEP_CHARS * num_done]
    return (prompt + worked + worked[-STEP_CHARS * num_repeated :] * length)[:length]
