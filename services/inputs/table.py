"""All prompts of a source in token ids: made once, in one pass, kept by content, read from the disk's own pages.

    rows --RowEncoder, a batch ahead of the tokenizer--> record batches --> <cache>/prompts/<key>.arrow + .json --> PromptTable

Small sources stay in memory. The key is made of everything that decides a token: rows, tokenizer, settings, this package's own code.
"""

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.compute
import pyarrow.ipc
from rich.console import Console
from rich.progress import Progress

from opd_governor.services.inputs.encode import Draft, RowEncoder, Terms
from opd_governor.services.inputs.messages import Notes
from opd_governor.services.inputs.models import cache_dir
from opd_governor.services.inputs.refusals import DataError
from opd_governor.services.inputs.rows import Rows

BATCH_ROWS = 1000
KEPT_IN_MEMORY_ROWS = 20_000
"""Smaller sources are encoded in a second or two: no file is kept of them."""
FORGOTTEN_AFTER_S = 30 * 86400
"""A cached source that was not used for so long is removed when another one is written."""
LINE_EVERY_S = 10.0
"""How often a log without a terminal says how far the pass is."""
BAD_ROWS_KEPT = 20
SCHEMA = pyarrow.schema(
    {
        "file": pyarrow.int32(),
        "line": pyarrow.int64(),
        "token_ids": pyarrow.list_(pyarrow.int32()),
        "teacher_ids": pyarrow.list_(pyarrow.int32()),
        "privileged_ids": pyarrow.list_(pyarrow.int32()),
        "golden_ids": pyarrow.list_(pyarrow.int32()),
        "domain": pyarrow.string(),
        "answer": pyarrow.string(),
        "text": pyarrow.large_string(),
        "weights": pyarrow.string(),
    }
)
"""token_ids is null for a row that is no prompt."""

log = logging.getLogger(__name__)


@dataclass
class Found:
    """What the pass learned beside the tokens."""

    files: list[str] = field(default_factory=list)
    num_rows: int = 0
    num_bad: int = 0
    bad: list[str] = field(default_factory=list)
    """FILE:LINE and what is wrong, of the first bad rows."""
    notes: Notes = field(default_factory=Notes)


class PromptTable:
    """The rows of a source by their place in it, from 0."""

    def __init__(self, batches: Sequence[pyarrow.RecordBatch], found: Found) -> None:
        self.found = found
        self._batches = list(batches)
        self._starts = np.cumsum([0, *(batch.num_rows for batch in self._batches)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of one row."""
        which = int(np.searchsorted(self._starts, index, side="right")) - 1
        batch, row = self._batches[which], index - int(self._starts[which])
        return {name: batch.column(place)[row].as_py() for place, name in enumerate(batch.schema.names)}

    def place(self, index: int) -> str:
        """FILE:LINE of a row."""
        row = self[index]
        return f"{self.found.files[row['file']]}:{row['line']}"

    def digest(self, indices: np.ndarray, column: str = "token_ids") -> str:
        """Of one column of these rows, ids or text, in their order in the source."""
        digest, used = hashlib.sha256(), np.zeros(len(self), bool)
        used[indices] = True
        for start, batch in zip(self._starts, self._batches, strict=False):
            values = batch.column(column).filter(pyarrow.array(used[start : start + batch.num_rows]))
            if pyarrow.types.is_string(values.type):
                digest.update(json.dumps(values.to_pylist()).encode())
                continue
            for part in (pyarrow.compute.list_value_length(values), values.flatten()):
                digest.update(part.to_numpy(zero_copy_only=False).tobytes())
        return digest.hexdigest()[:16]

    def domains(self, indices: np.ndarray) -> dict[str, str]:
        """Domain -> FILE:LINE of the first of these rows that has it."""
        used, first = np.zeros(len(self), bool), dict[str, int]()
        used[indices] = True
        for start, batch in zip(self._starts, self._batches, strict=False):
            places = np.flatnonzero(used[start : start + batch.num_rows])
            for place, domain in zip(places, batch.column("domain").take(pyarrow.array(places)).to_pylist(), strict=True):
                first.setdefault(domain, int(start + place))
        return {domain: self.place(index) for domain, index in first.items()}

    def answers(self) -> list[str | None]:
        """For each row: its answer."""
        return [answer for batch in self._batches for answer in batch.column("answer").to_pylist()]

    def num_tokens(self, column: str) -> np.ndarray:
        """Tokens of each row in one of the id columns; -1 where it has none."""
        lengths = [pyarrow.compute.fill_null(pyarrow.compute.list_value_length(batch.column(column)), -1) for batch in self._batches]
        return np.concatenate([np.zeros(0, np.int32), *(part.to_numpy(zero_copy_only=False) for part in lengths)])


def open_table(rows: Rows, tokenizer: Any, terms: Terms, teacher_tokenizers: Mapping[str, Any] | None = None) -> PromptTable:
    """Every row of the source (up to its limit) encoded: from the cache where it has been before. Raises DataError."""
    others = teacher_tokenizers or {}
    key = content_key(rows, [tokenizer, *(others[name] for name in sorted(others))], terms)
    folder = cache_dir() / "prompts"
    try:
        return _read(folder, key)
    except (OSError, ValueError, TypeError, KeyError, pyarrow.ArrowException):
        pass  # not there, or torn: made again
    encoder = RowEncoder(tokenizer, terms, others)
    found = Found(list(rows.names), notes=encoder.notes)
    batches = _encoded(rows, encoder, found, terms.source.limit)
    first = list(islice(batches, KEPT_IN_MEMORY_ROWS // BATCH_ROWS))
    if len(first) < KEPT_IN_MEMORY_ROWS // BATCH_ROWS:
        return PromptTable(first, found)
    try:
        _write(folder, key, first, batches, found)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{folder}: the prompts' cache cannot be written ({error}); set OPD_CACHE_DIR to a folder with room") from None
    return _read(folder, key)


def content_key(rows: Rows, tokenizers: Sequence[Any], terms: Terms) -> str:
    """Equal for what gives equal tables."""
    digest = hashlib.sha256(rows.identity().encode())
    for tokenizer in tokenizers:
        digest.update(tokenizer_identity(tokenizer).encode())
    source = terms.source.model_dump(exclude={"path", "shuffle", "on_bad_row"})
    teachers = [t.model_dump(include={"name", "domains", "system_prompt", "context", "template", "render"}) for t in terms.teachers]
    rest = {name: value for name, value in asdict(terms).items() if name not in ("source", "teachers")}
    digest.update(json.dumps([source, teachers, rest], sort_keys=True, default=str).encode())
    for file in sorted(Path(__file__).parent.glob("*.py")):  # how rows are read and encoded
        digest.update(file.read_bytes())
    return digest.hexdigest()[:24]


def tokenizer_identity(tokenizer: Any) -> str:
    """Equal for tokenizers that encode and render alike."""
    digest = hashlib.sha256(type(tokenizer).__qualname__.encode())
    fast = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = fast.to_str() if fast is not None else json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]))
    for part in (vocabulary, repr(tokenizer.chat_template), repr(sorted(tokenizer.special_tokens_map.items()))):
        digest.update(part.encode())
    return digest.hexdigest()


def _encoded(rows: Rows, encoder: RowEncoder, found: Found, limit: int | None) -> Iterator[pyarrow.RecordBatch]:
    """Record batches in order; while the tokenizer works on one, the next is read and rendered."""
    numbers = {name: number for number, name in enumerate(found.files)}
    with _own_threads(), ThreadPoolExecutor(1) as worker, _progress(rows, found) as told:
        ahead: Future[list[Draft]] | None = None
        source = iter(islice(rows, limit))
        while group := list(islice(source, BATCH_ROWS)):
            drafts = encoder.drafts(group)
            if ahead is not None:
                yield _record(ahead.result(), found, numbers)
            ahead = worker.submit(encoder.tokens, drafts)
            told()
        if ahead is not None:
            yield _record(ahead.result(), found, numbers)


def _record(drafts: Sequence[Draft], found: Found, numbers: Mapping[str, int]) -> pyarrow.RecordBatch:
    found.num_rows += len(drafts)
    for draft in drafts:
        if draft.error is not None:
            found.num_bad += 1
            if len(found.bad) < BAD_ROWS_KEPT:
                found.bad.append(f"{draft.row.place}: {draft.error}")
            draft.token_ids = draft.teacher_ids = draft.privileged_ids = draft.golden_ids = draft.question = None
        else:
            assert draft.question is not None
    questions = [draft.question for draft in drafts]
    columns = {
        "file": [numbers[draft.row.file] for draft in drafts],
        "line": [draft.row.line for draft in drafts],
        "token_ids": [draft.token_ids for draft in drafts],
        "teacher_ids": [draft.teacher_ids for draft in drafts],
        "privileged_ids": [draft.privileged_ids for draft in drafts],
        "golden_ids": [draft.golden_ids for draft in drafts],
        "domain": [q and q.domain for q in questions],
        "answer": [q and q.answer for q in questions],
        "text": [q and q.text for q in questions],
        "weights": [draft.weights for draft in drafts],
    }
    return pyarrow.record_batch([pyarrow.array(columns[item.name], item.type) for item in SCHEMA], SCHEMA)


def _write(folder: Path, key: str, first: Sequence[pyarrow.RecordBatch], rest: Iterator[pyarrow.RecordBatch], found: Found) -> None:
    """Both files beside their places first; the second, renamed last, says that the first is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    _forget_old(folder)
    scratch = folder / f".{key}.{os.getpid()}"
    try:
        with pyarrow.ipc.new_file(scratch, SCHEMA) as writer:
            for batch in first:
                writer.write_batch(batch)
            for batch in rest:
                writer.write_batch(batch)
        scratch.rename(folder / f"{key}.arrow")
        scratch.write_text(json.dumps(asdict(found)))
        scratch.rename(folder / f"{key}.json")
    finally:
        scratch.unlink(missing_ok=True)


def _read(folder: Path, key: str) -> PromptTable:
    """Raises what a missing or torn file raises."""
    told = json.loads((folder / f"{key}.json").read_text())
    found = Found(**(told | {"notes": Notes(**told["notes"])}))
    reader = pyarrow.ipc.open_file(pyarrow.memory_map(str(folder / f"{key}.arrow")))
    table = PromptTable([reader.get_batch(i) for i in range(reader.num_record_batches)], found)
    os.utime(folder / f"{key}.json")
    if len(table) != found.num_rows:
        raise ValueError("torn")
    return table


def _forget_old(folder: Path) -> None:
    for mark in folder.glob("*.json"):
        if time.time() - mark.stat().st_mtime > FORGOTTEN_AFTER_S:
            mark.unlink(missing_ok=True)
            mark.with_suffix(".arrow").unlink(missing_ok=True)


@contextmanager
def _own_threads() -> Iterator[None]:
    """Let the tokenizers use every core; elsewhere in this process they are told not to, for it forks."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


@contextmanager
def _progress(rows: Rows, found: Found) -> Iterator[Callable[[], None]]:
    """A bar on a terminal, a line now and then elsewhere; nothing for what is done at once."""
    bar = Progress(console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty())
    task = bar.add_task("prompts", total=1.0, visible=False)
    started = said = time.monotonic()

    def told() -> None:
        nonlocal said
        now = time.monotonic()
        bar.update(task, completed=rows.done_share, visible=now - started > 1.0, description=f"prompts: {found.num_rows:,} rows")
        if not sys.stderr.isatty() and now - said > LINE_EVERY_S:
            said = now
            log.info("prompts: %s rows read and encoded (%.0f %%)", f"{found.num_rows:,}", 100 * rows.done_share)

    with bar:
        yield told
