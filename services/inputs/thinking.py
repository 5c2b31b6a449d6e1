"""The marks between which a model thinks, by its tokenizer."""

from typing import Any

MARKS = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
)
"""Of known families: Qwen, DeepSeek and GLM; Magistral; Seed; others."""


def thinking_ids(tokenizer: Any) -> tuple[int, int] | None:
    """Ids that begin and end the thinking part; None where the tokenizer has no such pair of single tokens."""
    vocabulary = tokenizer.get_vocab()
    for begin, end in MARKS:
        if begin in vocabulary and end in vocabulary:
            return vocabulary[begin], vocabulary[end]
    return None
