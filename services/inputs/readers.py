"""Files of rows: one reader per kind of file, by the end of its name.

A reader takes an open, decompressed file and yields (line, row): a dict, or a RowError for a line that cannot be read. To add one:

    @READERS.add(".yaml")
    def read_yaml(file: BinaryIO) -> Iterator[Line]:
        yield from enumerate(yaml.safe_load_all(file), start=1)
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from opd_governor.actors.extensions import Kind
from opd_governor.services.inputs.refusals import RowError, words

Line = tuple[int, Any]
"""Line or row number from 1, and the row: a dict, or the RowError that says what is wrong with the line."""
Reader = Callable[[BinaryIO], Iterator[Line]]

READERS: Kind[Reader] = Kind("prompt reader", pattern=r"\.[a-z0-9._-]+")

COMPRESSIONS: dict[str, Callable[[BinaryIO], Any]] = {
    ".gz": lambda file: gzip.GzipFile(fileobj=file),
    ".bz2": bz2.BZ2File,
    ".xz": lzma.LZMAFile,
    ".zst": lambda file: io.BufferedReader(_Rest(b"", pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))),
}
"""End of a file's name -> how it is decompressed."""
BATCH_ROWS = 1000


@READERS.add(".ndjson")
@READERS.add(".jsonl")
def read_json_lines(file: BinaryIO) -> Iterator[Line]:
    """One JSON object a line; blank lines are skipped."""
    for number, line in enumerate(file, start=1):
        if number == 1 and line.strip() == b"[":
            raise RowError("is one JSON array, not a JSON object a line; call it .json")
        if line.strip():
            yield number, _parsed(line)


@READERS.add(".json")
def read_json(file: BinaryIO) -> Iterator[Line]:
    """A JSON array of objects, or JSON lines. The places of an array are counted from 1."""
    head = file.read(1)
    while head and head in b" \t\r\n\xef\xbb\xbf":
        head = file.read(1)
    if head != b"[":
        yield from read_json_lines(io.BufferedReader(_Rest(head, file)))  # type: ignore[arg-type]
        return
    try:
        rows = json.loads(head + file.read(), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise RowError(f"not JSON ({error}); mend it") from None
    yield from ((number, _object(row)) for number, row in enumerate(rows, start=1))


@READERS.add(".csv")
def read_csv(file: BinaryIO) -> Iterator[Line]:
    """Comma-separated, with a header. Empty cells are absent."""
    yield from _separated(file, ",")


@READERS.add(".tsv")
def read_tsv(file: BinaryIO) -> Iterator[Line]:
    """Tab-separated, with a header. Empty cells are absent."""
    yield from _separated(file, "\t")


@READERS.add(".parquet")
def read_parquet(file: BinaryIO) -> Iterator[Line]:
    """Parquet; rows count from 1."""
    yield from _of_batches(pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH_ROWS))


@READERS.add(".arrow")
def read_arrow(file: BinaryIO) -> Iterator[Line]:
    """Arrow IPC, file or stream; rows count from 1."""
    magic = file.read(6)
    file.seek(0)
    if magic == b"ARROW1":
        reader = pyarrow.ipc.open_file(file)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        batches = iter(pyarrow.ipc.open_stream(file))
    yield from _of_batches(batches)


def decompressed(file: BinaryIO, name: str) -> tuple[Any, str]:
    """The file's content, and its name without the end that names the compression."""
    for end, opened in COMPRESSIONS.items():
        if name.lower().endswith(end):
            return opened(file), name[: -len(end)]
    return file, name


def reader_of(name: str) -> Reader | None:
    """The reader for a file of this name, which may be compressed; None where no reader knows it."""
    name = name.lower()
    for end in COMPRESSIONS:
        name = name.removesuffix(end)
    return next((reader for end, reader in READERS.items() if name.endswith(end)), None)


def known_ends() -> str:
    """For messages: the kinds of files that can be read."""
    return f"{', '.join(READERS)}, also with {', '.join(COMPRESSIONS)} behind"


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A cell of a table that Python has no value of, such as a time in nanoseconds. It is refused where somebody asks for its column."""

    kind: str
    why: str


class _Rest(io.RawIOBase):
    """A file whose first byte has been read already."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._head or self._file.read(len(buffer))
        self._head = b""
        buffer[: len(data)] = data
        return len(data)


def _parsed(line: bytes) -> Any:
    try:
        return _object(json.loads(line, object_pairs_hook=_once))
    except (ValueError, RecursionError) as error:
        return RowError(f"not JSON ({error}); mend or remove the line")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Of two keys of a name JSON itself would keep the last without a word."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"it has key {next(name for name, num in Counter(name for name, _ in pairs).items() if num > 1)!r} twice")
    return row


def _object(row: Any) -> Any:
    if isinstance(row, dict):
        return row
    return RowError(f'expected an object such as {{"prompt": "..."}}, got {type(row).__name__}')


def _separated(file: BinaryIO, separator: str) -> Iterator[Line]:
    csv.field_size_limit(sys.maxsize)  # the default of 131,072 characters is shorter than some prompts
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    rows = csv.DictReader(text, delimiter=separator, strict=True)
    try:
        _check_names(rows.fieldnames or ())
        for row in rows:
            if None in row:
                yield (
                    rows.line_num,
                    RowError(f"more cells than the {len(rows.fieldnames or ())} of the header; quote the text or remove the line"),
                )
            else:
                yield rows.line_num, {name: cell for name, cell in row.items() if cell}
    except csv.Error as error:
        raise RowError(f"line {rows.line_num}: {error}; mend it") from None
    finally:
        text.detach()  # the file is its opener's to close


def _check_names(names: Sequence[str]) -> None:
    if twice := next((name for name in names if list(names).count(name) > 1), None):
        raise RowError(f"has two columns called {twice!r}; rename or remove one")


def _of_batches(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[Line]:
    number = 0
    for batch in batches:
        _check_names(batch.schema.names)
        for row in _rows_of(batch):
            number += 1
            yield number, row


def _rows_of(batch: pyarrow.RecordBatch) -> list[dict[str, Any]]:
    """Its rows, float32 as its shortest decimal (0.1, not 0.10000000149), and what Python has no value of as Unreadable."""
    columns = []
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if pyarrow.types.is_float32(column.type):
            column = pyarrow.array([None if x is None else float(str(np.float32(x))) for x in column.to_pylist()], pyarrow.float64())
        try:
            columns.append((name, column.to_pylist()))
        except (ValueError, TypeError, OverflowError) as error:
            columns.append((name, [Unreadable(str(column.type), words(error))] * len(column)))
    return [dict(zip(batch.schema.names, cells, strict=True)) for cells in zip(*(cells for _, cells in columns), strict=True)]
