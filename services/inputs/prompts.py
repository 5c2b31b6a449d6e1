"""Prompts: read from JSONL, Parquet or a dataset id, put in the student's own tokens, streamed shuffled and resumable.

    file or dataset --rows--> check every row --> PromptStream --next(n)--> Prompt

Rows are kept raw and tokenised when drawn; the check up front sees each of them once.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pyarrow.parquet

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.models import answer_stop
from opd_governor.services.job.settings import EvalSettings, Job, JobError, PromptSource

REFUSALS_NAMED = 3
"""Refused prompts reported by line; the rest are counted."""


class DataError(JobError):
    """A mistake in a data file: one line that names file, line and remedy; exit code 2."""


class Rows(Protocol):
    """Random access to raw rows."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> dict[str, Any]: ...
    def where(self, index: int) -> str:
        """FILE:LINE of a row, for messages."""


class JsonLines:
    """A JSONL file, kept as bytes; blank lines are skipped. Raises DataError on a broken line when it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        lines = enumerate(path.read_bytes().split(b"\n"), start=1)
        self._lines = [(number, line) for number, line in lines if line.strip()]

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        try:
            row = json.loads(self._lines[index][1])
        except ValueError as error:
            raise DataError(f"{self.where(index)}: not JSON ({error}); mend or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f'{self.where(index)}: expected an object such as {{"prompt": "..."}}, got {type(row).__name__}')
        return row

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index][0]}"


class Table:
    """A Parquet file or a dataset of the hub; `table[i]` is a row. Lines count from 1."""

    def __init__(self, table: Any, name: str) -> None:
        self._table, self._name = table, name

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if isinstance(self._table, pyarrow.Table):
            return self._table.slice(index, 1).to_pylist()[0]
        return dict(self._table[index])

    def where(self, index: int) -> str:
        return f"{self._name}:{index + 1}"


def read_rows(path: str, split: str = "train") -> Rows:
    """Open a .jsonl or .parquet file or a dataset id. Raises DataError when it is missing, unreadable or empty."""
    file = Path(path).expanduser()
    rows: Rows
    if file.is_dir():
        raise DataError(f"{path}: is a folder; give a .jsonl or .parquet file or a dataset id")
    if file.suffix in (".jsonl", ".json", ".parquet") and not file.is_file():
        raise DataError(f"{path}: no such file; give a .jsonl or .parquet file or a dataset id")
    if not file.is_file():
        rows = Table(_load_dataset(path, split), f"{path}[{split}]")
    elif file.suffix == ".parquet":
        try:
            rows = Table(pyarrow.parquet.read_table(file), path)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    else:
        rows = JsonLines(file)
    if not len(rows):
        raise DataError(f"{path}: has no rows; give it at least one prompt")
    return rows


def _load_dataset(name: str, split: str) -> Any:
    import datasets  # slow to import, needed for dataset ids alone

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError) as error:  # unknown id, no network, unknown split
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"{name}: neither a file nor a dataset that can be loaded with split {split!r}: {reason}") from None


@dataclass(frozen=True, slots=True)
class PromptEncoder:
    """Row -> Prompt in the student's tokens."""

    tokenizer: Any
    source: PromptSource
    teachers: Sequence[TeacherSettings] = ()
    """Their system prompts decide what a concise teacher sees."""

    def encode(self, rows: Rows, index: int, epoch: int = 0) -> Prompt:
        """Raises DataError naming file and line when the row lacks a usable prompt."""
        row, where = rows[index], rows.where(index)
        messages = self._messages(row, where)
        domain = self._text(row, "domain", where) or ""
        golden = self._text(row, "golden", where)
        text = messages if isinstance(messages, str) else "\n".join(message["content"] for message in messages)
        token_ids = self._tokens(messages)
        if not token_ids:
            raise DataError(f"{where}: column {self.source.column!r} holds no tokens; give the prompt some text")
        return Prompt(
            index=index,
            token_ids=token_ids,
            epoch=epoch,
            domain=domain,
            answer=self._text(row, "answer", where),
            text=text,
            teacher_token_ids=self._teacher_tokens(messages, domain),
            golden_ids=None if golden is None else self._golden_tokens(golden, chat=not isinstance(messages, str)),
        )

    def _messages(self, row: dict[str, Any], where: str) -> str | list[dict[str, str]]:
        """Plain text, or chat messages where the row has them or the source asks for chat form."""
        column = self.source.column
        value = row.get(column)
        if value is None:
            raise DataError(f"{where}: no column {column!r} (it has {', '.join(map(repr, row)) or 'none'}); set data.prompts.column")
        if isinstance(value, str):
            if not self.source.chat:
                return value
            value = [{"role": "user", "content": value}]
            if self.source.system_prompt:
                value.insert(0, {"role": "system", "content": self.source.system_prompt})
        fields_are_text = isinstance(value, list) and all(
            isinstance(m, dict) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
        )
        if not value or not fields_are_text:
            raise DataError(f"{where}: column {column!r} must be text or a list of messages with role and content")
        if not self.tokenizer.chat_template:
            raise DataError(f"{where}: chat messages need a chat template, which the student's tokenizer lacks; give plain text")
        return value

    def _text(self, row: dict[str, Any], column: str, where: str) -> str | None:
        value = row.get(column)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int | float) and not isinstance(value, bool):
            return str(value)
        raise DataError(f"{where}: column {column!r} must be text, got {type(value).__name__}")

    def _tokens(self, messages: str | list[dict[str, str]]) -> tuple[int, ...]:
        if not isinstance(messages, str):
            encoded = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            return tuple(encoded)
        # Only a BOS that the tokenizer adds by itself: one that also appends an eos would end the prompt before the answer.
        bos = self.tokenizer.bos_token_id
        adds_bos = bos is not None and self.tokenizer("").input_ids[:1] == [bos]
        body = self.tokenizer(messages, add_special_tokens=False).input_ids
        return (bos, *body) if adds_bos else tuple(body)

    def _teacher_tokens(self, messages: str | list[dict[str, str]], domain: str) -> tuple[int, ...] | None:
        serving = [teacher for teacher in self.teachers if not teacher.domains or domain in teacher.domains]
        prompts = {teacher.system_prompt for teacher in serving}
        if prompts <= {None}:
            return None
        if len(prompts) > 1:
            names = ", ".join(teacher.name for teacher in serving)
            raise DataError(f"teachers {names} serve domain {domain!r} with different system prompts; give them the same")
        (system_prompt,) = prompts
        assert system_prompt is not None
        if isinstance(messages, str):
            return self._tokens(f"{system_prompt}\n\n{messages}")
        others = [message for message in messages if message["role"] != "system"]
        return self._tokens([{"role": "system", "content": system_prompt}, *others])

    def _golden_tokens(self, golden: str, chat: bool) -> tuple[int, ...]:
        stop = answer_stop(self.tokenizer, chat)
        body = tuple(self.tokenizer(golden, add_special_tokens=False).input_ids)
        return body if body[-1:] == (stop,) else (*body, stop)


@dataclass(frozen=True, slots=True)
class Survey:
    """What the check of every row found."""

    indices: tuple[int, ...]
    """Rows that are used."""
    refused: tuple[str, ...] = ()
    """One line per prompt that leaves too little of the context window."""
    domains: Mapping[str, str] = field(default_factory=dict)
    """Domain -> FILE:LINE of its first prompt."""
    longest_tokens: int = 0
    num_golden: int = 0
    """Prompts with a golden column."""


class PromptStream:
    """An endless, shuffled, resumable stream of prompts.

    The order is a function of seed and epoch alone, so a cursor of two numbers resumes it.

    >>> stream = open_prompts(job, tokenizer, context_tokens=2048)
    >>> stream.next(2)[0].index
    17
    >>> stream.state()
    {'epoch': 0, 'position': 2, 'num_prompts': 400}
    """

    def __init__(
        self, rows: Rows, encoder: PromptEncoder, survey: Survey, seed: int, unfinished: Literal["drop", "quota", "keep"] = "keep"
    ) -> None:
        self.survey = survey
        self._rows, self._encoder, self._seed, self._unfinished = rows, encoder, seed, unfinished
        self._indices = np.asarray(survey.indices)
        self._finished: dict[int, bool] = {}
        self._golden: dict[int, tuple[int, ...]] = {}
        self._epoch = self._position = 0
        self._order = self._shuffle()

    def __len__(self) -> int:
        return len(self._indices)

    def prompts(self) -> Iterator[Prompt]:
        """Every accepted prompt once, in file order."""
        return (self._prompt(int(index)) for index in self._indices)

    def next(self, n: int, unfinished_quota: float | None = None) -> list[Prompt]:
        """The next n prompts; with policy quota at most that share of them are ones the teacher does not finish.

        Where no prompt is finished by the teacher the quota gives way: a batch is never short.
        """
        batch: list[Prompt] = []
        room = (
            n
            if self._unfinished == "keep"
            else int((1.0 if unfinished_quota is None else unfinished_quota) * n)
            if self._unfinished == "quota"
            else 0
        )
        if all(self._is_unfinished(int(index)) for index in self._indices):
            room = n
        while len(batch) < n:
            index = self._advance()
            if self._is_unfinished(index):
                if room == 0:
                    continue
                room -= 1
            batch.append(self._prompt(index))
        return batch

    def mark(self, finished: Mapping[int, bool], golden: Mapping[int, tuple[int, ...]] | None = None) -> None:
        """Note what the golden pass learned: prompt index -> whether the teacher finished it, and its golden answer.

        Raises DataError when the policy is drop and nothing would be left.
        """
        self._finished |= finished
        self._golden |= golden or {}
        if self._unfinished == "drop" and all(self._is_unfinished(int(index)) for index in self._indices):
            raise DataError(
                f"data.unfinished_by_teacher: drop leaves none of {len(self)} prompts, the teacher finishes none of them; "
                "raise data.golden.max_new_tokens or set it to keep"
            )

    def state(self) -> dict[str, int]:
        """The cursor, as JSON."""
        return {"epoch": self._epoch, "position": self._position, "num_prompts": len(self)}

    def restore(self, state: Mapping[str, int]) -> None:
        """Go on from a cursor. Raises DataError when the prompts are no longer as many as they were."""
        if state["num_prompts"] != len(self):
            raise DataError(
                f"data.prompts: the checkpoint's run had {state['num_prompts']} prompts, now there are {len(self)}; give the same file"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._order = self._shuffle()

    def _advance(self) -> int:
        if self._position == len(self._order):
            self._epoch, self._position = self._epoch + 1, 0
            self._order = self._shuffle()
        self._position += 1
        return int(self._order[self._position - 1])

    def _shuffle(self) -> np.ndarray:
        if not self._encoder.source.shuffle:
            return self._indices
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._indices)

    def _is_unfinished(self, index: int) -> bool:
        return self._finished.get(index) is False

    def _prompt(self, index: int) -> Prompt:
        prompt = self._encoder.encode(self._rows, index, self._epoch)
        return replace(prompt, teacher_finishes=self._finished.get(index), golden_ids=self._golden.get(index, prompt.golden_ids))


def open_prompts(job: Job, tokenizer: Any, context_tokens: int) -> PromptStream:
    """The training prompts of a job, every row checked.

    `context_tokens`: the window both models can hold. A prompt that leaves less than `rollout.min_new_tokens` of it
    is refused (see `PromptStream.survey`). Raises DataError: file missing, empty, a broken line, or no prompt left.
    """
    source = job.data.prompts
    encoder = PromptEncoder(tokenizer, source, job.teacher)
    rows = read_rows(source.path, source.split)
    accepted: list[int] = []
    refused: list[str] = []
    domains: dict[str, str] = {}
    longest = num_golden = 0
    for index in range(min(len(rows), source.limit or len(rows))):
        prompt = encoder.encode(rows, index)
        num_tokens = max(len(prompt.token_ids), len(prompt.teacher_token_ids or ()))
        if context_tokens - num_tokens < job.rollout.min_new_tokens:
            refused.append(f"{rows.where(index)}: {num_tokens} tokens leave {context_tokens - num_tokens} of {context_tokens}")
            continue
        accepted.append(index)
        domains.setdefault(prompt.domain, rows.where(index))
        longest = max(longest, num_tokens)
        num_golden += prompt.golden_ids is not None
    if not accepted:
        raise DataError(f"{describe_refusals(refused, job.rollout.min_new_tokens)}; no prompt is left")
    survey = Survey(tuple(accepted), tuple(refused), domains, longest, num_golden)
    return PromptStream(rows, encoder, survey, job.seed, job.data.unfinished_by_teacher)


def describe_refusals(refused: Sequence[str], min_new_tokens: int) -> str:
    """One line: the first few refused prompts by line, the others counted."""
    named = "; ".join(refused[:REFUSALS_NAMED])
    more = f"; and {len(refused) - REFUSALS_NAMED} more" if len(refused) > REFUSALS_NAMED else ""
    return f"{named}{more}: refused, rollout.min_new_tokens is {min_new_tokens}; shorten the prompts or lower it"


def load_problems(settings: EvalSettings, source: PromptSource, tokenizer: Any) -> list[Prompt]:
    """Held-out prompts, each with an answer to verify against; column and chat form are those of the training prompts."""
    assert settings.path is not None
    rows = read_rows(settings.path)
    encoder = PromptEncoder(tokenizer, source)
    problems = [encoder.encode(rows, index) for index in range(min(len(rows), settings.limit or len(rows)))]
    for index, problem in enumerate(problems):
        if problem.answer is None:
            raise DataError(f"{rows.where(index)}: no column 'answer' to verify against; add it or unset data.eval.path")
    return problems
