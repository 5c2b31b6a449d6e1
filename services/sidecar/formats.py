"""Log files of any kind into rows of numbers: one declaration per format, recognised by content. Pure but for reading the file.

A row is a flat mapping from the trainer's own key to a value; `trainers.py` knows what the keys mean.
"""

import csv
import gzip
import io
import json
import re
from ast import literal_eval
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opd_governor.actors.extensions import Kind
from opd_governor.services.sidecar.tensorboard import is_events, read_events

Row = dict[str, Any]
HEAD_BYTES = 65536
MAX_LINE_CHARS = 8_000_000
"""A longer line is no log line."""
MAX_DOCUMENT_BYTES = 1 << 30
MAX_DEPTH = 6


class LogError(ValueError):
    """A log that cannot be read: one line for the user, with the file's name."""


@dataclass(frozen=True, slots=True)
class LogFormat:
    """How one kind of file is recognised and read."""

    words: str
    recognises: Callable[[bytes], bool]
    """From the file's first HEAD_BYTES."""
    rows: Callable[[Path], Iterable[Row]]
    """May raise LogError without the file's name."""


LOG_FORMATS: Kind[LogFormat] = Kind("log format")
"""In the order in which they are tried."""


def read_rows(path: Path) -> tuple[str, list[Row]]:
    """The format's name and every row of a file. Raises LogError: one line that names the file."""
    try:
        if not path.exists():
            raise LogError("no such file")
        if not path.is_file():
            raise LogError("is no regular file; name the log file itself")
        with _open(path) as file:
            head = file.read(HEAD_BYTES)
        if not head.strip(b"\x00 \t\r\n"):
            raise LogError("is empty")
        name = next((name for name, form in LOG_FORMATS.items() if form.recognises(head)), None)
        if name is None:
            raise LogError("is in no format known here (" + ", ".join(form.words for form in LOG_FORMATS.values()) + ")")
        rows = list(LOG_FORMATS[name].rows(path))
    except LogError as error:
        raise LogError(f"{path}: {error}") from None
    except (OSError, EOFError) as error:
        raise LogError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except (RecursionError, MemoryError):
        raise LogError(f"{path}: is nested too deeply or too large to be a log") from None
    if not rows:
        raise LogError(f"{path}: holds no numbers by step ({LOG_FORMATS[name].words})")
    return name, rows


def _open(path: Path) -> Any:
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if packed else path.open("rb")


def _text(head: bytes) -> str:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return head.decode("utf-16", "replace")
    return head.decode("utf-8-sig", "replace")


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text, progress bars' carriage returns included, without colours. NUL bytes and bad characters become `?`."""
    with _open(path) as raw:
        wide = raw.read(2) in (b"\xff\xfe", b"\xfe\xff")
        raw.seek(0)
        reader = io.TextIOWrapper(raw, encoding="utf-16" if wide else "utf-8-sig", errors="replace", newline=None)
        while line := reader.readline(MAX_LINE_CHARS):
            yield line


def _is_text(head: bytes) -> bool:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return True
    return head.count(0) == 0 and _text(head).count("�") <= len(head) // 20


def flatten(value: dict[str, Any], prefix: str = "", depth: int = 0) -> Row:
    """Nested objects joined by `/`; what is neither number nor text of a number is dropped.

    >>> flatten({"step": 3, "data": {"actor/lr": 1e-6}})
    {'step': 3, 'data/actor/lr': 1e-06}
    """
    if not prefix and not any(isinstance(item, dict | list) or item is None for item in value.values()):
        return value
    row: Row = {}
    for key, item in value.items():
        if isinstance(item, dict):
            if depth < MAX_DEPTH:
                row |= flatten(item, f"{prefix}{key}/", depth + 1)
        elif item is not None and not isinstance(item, list):
            row[f"{prefix}{key}"] = item
    return row


# ---- JSON


_WEIRD = re.compile(r"np\.[a-z_0-9]+\(([^()]*)\)|tensor\(([^(),]*)[^()]*\)")


def _parse(text: str) -> Any:
    """JSON with NaN; None where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


STAMPED = re.compile(r"\[[^\[\]{}\"]*\]\s*\S")
"""A line of a log that begins with a time, level or rank in brackets."""


def _is_document(head: bytes) -> bool:
    """One JSON value over many lines, or one line alone."""
    text = _text(head).lstrip()
    if not text.startswith(("{", "[")):
        return False
    first = text.partition("\n")[0].strip()
    if STAMPED.match(first):
        return False
    return not (first.startswith("{") and _parse(first) is not None and len(text) > len(first) + 1 and text[len(first) :].strip() != "")


def _document_rows(path: Path) -> Iterable[Row]:
    with _open(path) as file:
        data = file.read(MAX_DOCUMENT_BYTES + 1)
    if len(data) > MAX_DOCUMENT_BYTES:
        raise LogError(f"is one JSON value of more than {MAX_DOCUMENT_BYTES >> 20} MiB; give JSON lines instead")
    text = _text(data)
    try:
        document = json.loads(text)
    except ValueError:
        saved = list(_salvage(text))
        if not saved:
            raise LogError("is broken JSON, and no whole row can be saved from it") from None
        return saved
    rows = _find_rows(document)
    if rows is None:
        raise LogError("is JSON without a list of steps (trainer_state.json keeps them under log_history)")
    return [flatten(row) for row in rows]


def _find_rows(document: Any, depth: int = 0) -> list[dict[str, Any]] | None:
    """The longest list of objects anywhere near the top, or columns of equal length turned into rows."""
    if isinstance(document, list):
        return [item for item in document if isinstance(item, dict)] or None
    if not isinstance(document, dict) or depth > 3:
        return None
    if isinstance(document.get("log_history"), list):
        return _find_rows(document["log_history"])
    columns = {key: item for key, item in document.items() if isinstance(item, list) and item and not isinstance(item[0], dict | list)}
    sizes = [len(item) for item in columns.values()]
    if len(columns) > 1 and max(sizes) == min(sizes):
        return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    found = [rows for item in document.values() if (rows := _find_rows(item, depth + 1))]
    if found:
        return max(found, key=len)
    return [document] if depth == 0 and flatten(document) else None


def _salvage(text: str) -> Iterator[Row]:
    """Whole objects of a list whose file was cut."""
    at = text.find("[", max(0, text.find('"log_history"')))
    decoder = json.JSONDecoder()
    while at >= 0 and (start := text.find("{", at)) >= 0:
        try:
            value, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            return
        yield flatten(value)


def _is_lines_of_json(head: bytes) -> bool:
    lines = [line for line in _text(head).split("\n") if line.strip()]
    whole = lines[:-1] or lines
    return _is_text(head) and sum(isinstance(_parse(line), dict) for line in whole) * 2 >= len(whole) > 0


def _json_lines(path: Path) -> Iterator[Row]:
    for line in _lines(path):
        value = _parse(line) if line.lstrip()[:1] == "{" else None
        if isinstance(value, dict) and (row := flatten(value)):
            yield row


# ---- tables


def _is_table(head: bytes) -> bool:
    lines = _text(head).split("\n")
    if not _is_text(head) or len(lines) < 2 or lines[0].lstrip()[:1] in ("{", "["):
        return False
    mark = _delimiter(lines[0])
    try:
        names = next(csv.reader([lines[0].strip("\r")], delimiter=mark), [])
        cells = next(csv.reader([lines[1].strip("\r")], delimiter=mark), [])
    except csv.Error:
        return False
    return len(names) > 1 and len(names) == len(cells) and not any(map(_number, names)) and any(_number(cell) is not None for cell in cells)


def _delimiter(line: str) -> str:
    return max((",", "\t", ";"), key=line.count)


def _table_rows(path: Path) -> Iterator[Row]:
    lines = _lines(path)
    names_line = next(lines)
    mark = _delimiter(names_line)
    names = [_column(name) for name in next(csv.reader([names_line], delimiter=mark))]
    try:
        for cells in csv.reader(lines, delimiter=mark):
            row = {name: cell for name, cell in zip(names, cells, strict=False) if cell and name}
            if row:
                yield row
    except csv.Error as error:
        raise LogError(f"is no table from some line on ({error})") from None


def _column(name: str) -> str:
    """W&B heads a column with `run - metric` and adds its extremes as __MIN and __MAX, which are dropped."""
    return "" if name.endswith(("__MIN", "__MAX")) else name.rpartition(" - ")[2].strip()


def _number(text: Any) -> float | None:
    try:
        return float(text)
    except (TypeError, ValueError, OverflowError):
        return None


# ---- TensorBoard


def _events(path: Path) -> Iterable[Row]:
    with _open(path) as file:
        return read_events(file.read())


# ---- what a trainer prints

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_VERL = re.compile(r"\bstep:(\d+) - ")
_NUMBERED = re.compile(r"\b(?:step|rollout|perf|iter(?:ation)?|eval)\s*[:#]?\s*(\d+)\b", re.IGNORECASE)
_BULLET = re.compile(
    r"^[\s•*\-│|]*([A-Za-z][\w /()%.\-]{2,60}?)\s*[:=]\s*(-?[\d.,]+(?:e[+-]?\d+)?)\s*(%?)\s*\S{0,12}\s*[│|]?\s*$", re.IGNORECASE
)
_CELL = re.compile(r"^\s*([A-Za-z][\w /.\-]*?)[:\s]\s*(-?\d[\d.,]*(?:e[+-]?\d+)?)\s*(%?)", re.IGNORECASE)
_PAIR = re.compile(r"([A-Za-z_][\w/.\-]*)=(-?\d[\d.]*(?:e[+-]?\d+)?)", re.IGNORECASE)
_STEP_OF = re.compile(r"\b(?:step|iteration)\s*[:#]?\s*(\d+)\s*(?:/|\||$)", re.IGNORECASE)


def _is_printed(head: bytes) -> bool:
    return _is_text(head)


def _printed_rows(path: Path) -> Iterator[Row]:
    """verl's `step:N - key:value`, printed dicts, `key=value` pairs, `Step N | Name value |`, bullets below a line that names the step."""
    open_step: int | None = None
    for raw in _lines(path):
        line = _COLOUR.sub("", raw) if "\x1b" in raw else raw
        if len(line) < 4:
            continue
        if "{" in line and (row := _printed_dict(line)):
            yield row
            continue
        if (found := _VERL.search(line)) is not None:
            yield {"step": int(found[1][:18])} | _verl_pairs(line[found.end() :])
            continue
        if line.count("=") > 2 and len(pairs := _PAIR.findall(line)) > 2:
            yield dict(pairs)
            continue
        step = _STEP_OF.search(line)
        if step is not None:
            open_step = int(step[1][:18])
            if "|" in line and (cells := dict(_cells(line))):
                yield {"step": open_step} | cells
            continue
        if open_step is not None and (bullet := _BULLET.match(line)) is not None:
            yield {"step": open_step, bullet[1].strip(): _shown(bullet[2], bullet[3])}


def _printed_dict(line: str) -> Row | None:
    start, end = line.find("{"), line.rfind("}")
    if end <= start or ":" not in line[start:end]:
        return None
    text = line[start : end + 1]
    value = _parse(text)
    if value is None and len(text) < 100_000:
        try:
            value = literal_eval(re.sub(r"\bnan\b|\binf\b", "None", _WEIRD.sub(lambda m: m[1] or m[2], text)))
        except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError):
            return None
    if not isinstance(value, dict):
        return None
    row = flatten({str(key): item for key, item in value.items()})
    named = _NUMBERED.search(line[:start])
    if row and named is not None and not any(key.rpartition("/")[2] in ("step", "global_step") for key in row):
        row["step"] = int(named[1][:18])
    return row


def _verl_pairs(text: str) -> Row:
    row: Row = {}
    for pair in text.split(" - "):
        name, _, value = pair.strip().rpartition(":")
        if name:
            row[name.strip()] = _WEIRD.sub(lambda m: m[1] or m[2], value)
    return row


def _cells(line: str) -> Iterator[tuple[str, Any]]:
    for cell in line.split("|")[1:]:
        if (found := _CELL.match(cell)) is not None:
            yield found[1].strip(), _shown(found[2], found[3])


def _shown(text: str, percent: str) -> float | None:
    value = _number(text.replace(",", ""))
    return value / 100 if value is not None and percent else value


LOG_FORMATS.add("tensorboard")(LogFormat("TensorBoard event files", is_events, _events))
LOG_FORMATS.add("json")(LogFormat("JSON such as trainer_state.json", _is_document, _document_rows))
LOG_FORMATS.add("jsonl")(LogFormat("JSON lines", _is_lines_of_json, _json_lines))
LOG_FORMATS.add("csv")(LogFormat("CSV", _is_table, _table_rows))
LOG_FORMATS.add("console")(LogFormat("what a trainer prints", _is_printed, _printed_rows))
