"""The golden pass: complete, terminating answers, how long they are, and which prompts the teacher finishes.

prompts --golden column--> answers --filter: ends with a stop id, no loop--> GoldenSet --> Parquet cache
       \\--else generate--/
"""

import hashlib
import inspect
import json
import math
import os
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from opd_governor.actors.governor.reference import TAIL_MARGIN, Answer, LengthModel, fit_lengths
from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.prompts import PromptStream
from opd_governor.services.inputs.refusals import DataError
from opd_governor.services.job.settings import GoldenSettings

Answers = Sequence[tuple[int, ...] | None]
Generate = Callable[[Sequence[Prompt]], Answers | Awaitable[Answers]]
"""Prompts -> one answer each, the stop id included when one was reached; None where the teacher gave none."""
MAX_IGNORED_CENSORED = 0.01
"""Share of cut answers up to which the p99 is read from the complete ones."""
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
    censored_share: float = 0.0
    """Of the answers seen, those that were cut: only known to be longer."""
    loop_share: float = 0.0
    """Of the answers seen, those that end in a loop."""
    model: LengthModel | None = field(default=None, repr=False)
    """Length given the prompt; None: too few answers are complete to say."""

    @property
    def asked_cap_tokens(self) -> int:
        """The cap under which the tail of the teacher's own lengths can be seen."""
        return math.ceil(TAIL_MARGIN * self.p99_tokens)


@dataclass(frozen=True, slots=True)
class GoldenSet:
    """What the golden pass found."""

    answers: Mapping[int, tuple[int, ...]]
    """Prompt index -> answer kept."""
    finished: Mapping[int, bool]
    """Prompt index -> whether the teacher finished it without a loop; prompts with a golden column are not asked."""
    reference: LengthReference
    cached: bool
    """Every answer was read from the cache."""
    key: str
    """Name of the cache's file: equal for equal answers."""
    refused: tuple[int, ...] = ()
    """Prompts whose own golden answer was not kept."""
    num_silent: int = 0
    """Prompts that the teacher gave no answer to, for a failure of its own: nothing is known of them, and they are asked again."""


def golden_key(prompts: Sequence[Prompt], settings: GoldenSettings, terms: Mapping[str, Any], seed: int) -> str:
    """The cache's key. `terms` is all else that shapes an answer or decides whether it is kept (teachers, stop ids, ...), JSON."""
    inputs = {
        "prompts": [[p.token_ids, p.teacher_token_ids, p.golden_ids] for p in prompts],
        "settings": settings.model_dump(exclude={"cache_dir", "enabled"}),
        "terms": dict(terms),
        "seed": seed,
        "format": "complete, loops",
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
    *,
    needed: bool = False,
    num_ids: int | None = None,
) -> GoldenSet:
    """Golden answers of `prompts`: from the cache, else from their golden column or, without one, from `generate`.

    An answer is kept when it ends with one of `stop_ids`, has no loop, and has no id from `num_ids` on, which the student cannot write.
    One that was cut still counts for the reference: it is longer than it was let be. With none kept the run has no golden answers, and its
    lengths are governed on what can be known; `needed`: it is refused instead. The cache holds verdicts alone: a prompt that the teacher
    gave no answer to is asked again by the next run.
    Raises DataError where there is no answer at all.
    """
    known = _read_cache(cache_file)
    fresh = [prompt for prompt in prompts if prompt.index not in known]
    if fresh:
        asked = [prompt for prompt in fresh if prompt.golden_ids is None]
        generated = generate(asked) if asked else []
        answers = await generated if inspect.isawaitable(generated) else generated
        assert len(answers) == len(asked), f"{len(answers)} answers to {len(asked)} prompts"
        pairs = [(prompt, prompt.golden_ids, False) for prompt in fresh if prompt.golden_ids is not None]
        pairs += [(prompt, answer, True) for prompt, answer in zip(asked, answers, strict=True) if answer is not None]
        known |= {
            prompt.index: {
                "index": prompt.index,
                "token_ids": list(answer),
                "by_teacher": by_teacher,
                "complete": bool(answer) and answer[-1] in stop_ids and (num_ids is None or max(answer) < num_ids),
                "loops": bool(answer) and find_loop(answer) is not None,
            }
            for prompt, answer, by_teacher in pairs
        }
        _write_cache(cache_file, list(known.values()))
    table = [known[prompt.index] for prompt in prompts if prompt.index in known]
    for row in table:
        row["kept"] = row["complete"] and not row["loops"]
    kept = {row["index"]: tuple(row["token_ids"]) for row in table if row["kept"]}
    if not table:
        raise DataError(f"golden pass: the teacher gave no answer to any of {len(prompts)} prompts; see that it runs, and start again")
    if not kept and needed:
        raise DataError(
            f"golden pass: none of {len(prompts)} answers ends with a stop id and without a loop; "
            "raise data.golden.max_new_tokens, lower data.golden.temperature or check the stop ids with opd check"
        )
    return GoldenSet(
        answers=kept if settings.enabled else {},
        finished={row["index"]: row["kept"] for row in table if row["by_teacher"]},
        reference=measure_reference(prompts, table),
        cached=not fresh,
        key=cache_file.stem,
        refused=tuple(row["index"] for row in table if not row["by_teacher"] and not row["kept"]),
        num_silent=len(prompts) - len(table),
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


def measure_reference(prompts: Sequence[Prompt], table: Sequence[Mapping[str, Any]]) -> LengthReference:
    """Length statistics and the model behind them, from rows of the cache (index, token_ids, kept, complete, loops).

    Where more than one answer in a hundred was cut and a model is there, a cut answer counts as long as it was, so that the mean is that of
    min(length, budget), and p95 and p99 are the model's.
    """
    by_index = {prompt.index: prompt for prompt in prompts}
    answers = [
        Answer(
            index=row["index"],
            prompt_tokens=len(by_index[row["index"]].token_ids),
            domain=by_index[row["index"]].domain,
            num_tokens=len(row["token_ids"]),
            complete=row["kept"],
            stuck=row["loops"],
        )
        for row in table
        if row["token_ids"]
    ]
    if not answers:
        return LengthReference(0.0, 0.0, 0.0, 0, 0, 0.0)
    kept = sum(answer.complete for answer in answers)
    censored = sum(not row["complete"] for row in table if row["token_ids"]) / len(answers)
    model = fit_lengths(answers)
    fitted = model is not None and censored > MAX_IGNORED_CENSORED
    used = [answer for answer in answers if answer.complete or fitted] or answers
    reference = measure_lengths([range(answer.num_tokens) for answer in used], num_seen=len(table))
    if model is not None and fitted:
        p95, p99 = (model.quantile_tokens(answers, share) for share in (0.95, 0.99))
        reference = replace(reference, p95_tokens=p95, p99_tokens=p99)
    loops = sum(row["loops"] for row in table) / len(table)
    return replace(reference, num_answers=kept, kept_share=kept / len(table), censored_share=censored, loop_share=loops, model=model)


def _read_cache(path: Path) -> dict[int, dict[str, Any]]:
    """Verdicts by prompt index; none where there is no whole file."""
    try:
        return {row["index"]: row for row in pyarrow.parquet.read_table(path).to_pylist()}
    except (OSError, pyarrow.ArrowInvalid, KeyError):
        return {}


def _write_cache(path: Path, rows: list[dict[str, Any]]) -> None:
    flags = {"complete": pyarrow.bool_(), "loops": pyarrow.bool_()}
    schema = pyarrow.schema({"index": pyarrow.int64(), "token_ids": pyarrow.list_(pyarrow.int32()), "by_teacher": pyarrow.bool_(), **flags})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), scratch)
    scratch.replace(path)  # whole or not at all
