"""The golden pass: complete, terminating answers, how long they are, and which prompts the teacher finishes.

prompts --golden column--> answers --filter: ends with a stop id, no loop--> GoldenSet --> Parquet cache
       \\--else generate--/
"""

import hashlib
import inspect
import json
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.prompts import PromptStream
from opd_governor.services.inputs.refusals import DataError
from opd_governor.services.job.settings import GoldenSettings

Answers = Sequence[tuple[int, ...] | None]
Generate = Callable[[Sequence[Prompt]], Answers | Awaitable[Answers]]
"""Prompts -> one answer each, the stop id included when one was reached; None where the teacher gave none."""
FindLoop = Callable[[Sequence[int]], object | None]
"""Token ids -> a loop, or None."""


@dataclass(frozen=True, slots=True)
class LengthReference:
    """How long a healthy answer is: what the governor compares rollouts with. Lengths in tokens, the stop id included."""

    mean_tokens: float
    p95_tokens: float
    p99_tokens: float
    max_tokens: int
    num_answers: int
    """Answers kept."""
    kept_share: float
    """Of the answers seen."""


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """What the golden pass found."""

    answers: Mapping[int, tuple[int, ...]]
    """Prompt index -> answer kept."""
    finished: Mapping[int, bool]
    """Prompt index -> whether the teacher finished it without a loop; prompts with a golden column are not asked."""
    reference: LengthReference
    cached: bool
    """Read from the cache."""
    key: str
    """Name of the cache's file: equal for equal answers."""


def golden_key(prompts: Sequence[Prompt], settings: GoldenSettings, terms: Mapping[str, Any], seed: int) -> str:
    """The cache's key. `terms` is all else that shapes an answer or decides whether it is kept (teachers, stop ids, ...), JSON."""
    inputs = {
        "prompts": [[p.token_ids, p.teacher_token_ids, p.golden_ids] for p in prompts],
        "settings": settings.model_dump(exclude={"cache_dir", "enabled"}),
        "terms": dict(terms),
        "seed": seed,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]


def choose_prompts(stream: PromptStream, settings: GoldenSettings, seed: int) -> list[Prompt]:
    """The prompts of the golden pass: those with a golden column first, then others in a seeded order."""
    order = np.random.default_rng([seed, len(stream)]).permutation(len(stream))
    golden_first = order[np.argsort(~stream.has_golden()[order], kind="stable")]
    return [stream.at(int(stream.indices[place])) for place in golden_first[: settings.num_prompts]]


async def collect_golden(
    prompts: Sequence[Prompt],
    settings: GoldenSettings,
    generate: Generate,
    stop_ids: Collection[int],
    find_loop: FindLoop,
    cache_file: Path,
) -> GoldenSet:
    """Golden answers of `prompts`: from the cache, else from their golden column or, without one, from `generate`.

    An answer is kept when it ends with one of `stop_ids` and has no loop. Raises DataError when none is kept.
    """
    cached = cache_file.exists()
    if not cached:
        asked = [prompt for prompt in prompts if prompt.golden_ids is None]
        generated = generate(asked) if asked else []
        answers = await generated if inspect.isawaitable(generated) else generated
        assert len(answers) == len(asked), f"{len(answers)} answers to {len(asked)} prompts"
        pairs = [(prompt, prompt.golden_ids, False) for prompt in prompts if prompt.golden_ids is not None]
        pairs += [(prompt, answer or (), True) for prompt, answer in zip(asked, answers, strict=True)]
        rows = [
            {
                "index": prompt.index,
                "token_ids": list(answer),
                "by_teacher": by_teacher,
                "kept": bool(answer) and answer[-1] in stop_ids and find_loop(answer) is None,
            }
            for prompt, answer, by_teacher in pairs
        ]
        _write_cache(cache_file, rows)
    table = pyarrow.parquet.read_table(cache_file).to_pylist()
    kept = {row["index"]: tuple(row["token_ids"]) for row in table if row["kept"]}
    if not kept:
        raise DataError(
            f"golden pass: none of {len(table)} answers ends with a stop id and without a loop; "
            "raise data.golden.max_new_tokens, lower data.golden.temperature or check the stop ids with opd check"
        )
    return GoldenSet(
        answers=kept if settings.enabled else {},
        finished={row["index"]: row["kept"] for row in table if row["by_teacher"]},
        reference=measure_lengths(list(kept.values()), num_seen=len(table)),
        cached=cached,
        key=cache_file.stem,
    )


def measure_lengths(answers: Sequence[Sequence[int]], num_seen: int) -> LengthReference:
    """Length statistics of the answers kept, out of `num_seen`."""
    lengths = np.array([len(answer) for answer in answers])
    p95, p99 = np.quantile(lengths, (0.95, 0.99))
    return LengthReference(
        mean_tokens=float(lengths.mean()),
        p95_tokens=float(p95),
        p99_tokens=float(p99),
        max_tokens=int(lengths.max()),
        num_answers=len(answers),
        kept_share=len(answers) / num_seen,
    )


def _write_cache(path: Path, rows: list[dict[str, Any]]) -> None:
    schema = pyarrow.schema(
        {"index": pyarrow.int64(), "token_ids": pyarrow.list_(pyarrow.int32()), "by_teacher": pyarrow.bool_(), "kept": pyarrow.bool_()}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), scratch)
    scratch.replace(path)  # whole or not at all
