"""The golden-length pass for strangers: how long a teacher's own answers to your prompts are. Needs transformers and torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class GoldenLengths:
    """Of one pass over some prompts."""

    finished: tuple[int, ...]
    """Tokens of each answer that ended by itself, its stop included: what to hand to the governor as reference lengths."""
    cut: tuple[int, ...] = ()
    """Tokens at which the other answers reached the cap: their true length is not known, only that it is above."""

    @property
    def share_cut(self) -> float:
        return len(self.cut) / max(1, len(self.cut) + len(self.finished))


def golden_lengths(
    teacher: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 64, temperature: float = 1.0
) -> GoldenLengths:
    """Sample the teacher once on each prompt and count. `teacher`: a transformers model that generates; `prompts`: text, templates applied.

    >>> golden_lengths(teacher, tokenizer, ["3+7+2?"], max_new_tokens=192).finished        # doctest: +SKIP
    (15,)
    """
    import torch

    stops = teacher.generation_config.eos_token_id
    stops = tokenizer.eos_token_id if stops is None else stops
    stop_ids = {stops} if isinstance(stops, int) else set(stops)
    finished: list[int] = []
    cut: list[int] = []
    for start in range(0, len(prompts), batch_size):
        batch = tokenizer(list(prompts[start : start + batch_size]), return_tensors="pt", padding=True, padding_side="left")
        batch = {name: batch[name].to(teacher.device) for name in ("input_ids", "attention_mask")}
        with torch.inference_mode():
            ids_BT = teacher.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=True,
                temperature=temperature,
                top_k=0,
                pad_token_id=tokenizer.pad_token_id,
            )
        for row in ids_BT[:, batch["input_ids"].shape[1] :].tolist():
            end = next((index for index, token in enumerate(row) if token in stop_ids), None)
            if end is None:
                cut.append(len(row))
            else:
                finished.append(end + 1)
    return GoldenLengths(tuple(finished), tuple(cut))
