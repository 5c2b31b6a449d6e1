"""Settings that may change while something runs: a store with generations, a history, and an audit line for each change."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from opd_governor.actors.settings import Settings

Document = dict[str, Any]
"""A tree of JSON values."""
T = TypeVar("T", bound=Settings)

UNKNOWN = "not a tunable setting; GET /v1/config/schema lists them"


def overlay(base: Document, top: Document) -> Document:
    """`top` over `base`, key by key; unlike a merge patch, null is a value."""
    return base | {key: overlay(base[key], value) if _both_objects(base.get(key), value) else value for key, value in top.items()}


def _both_objects(left: Any, right: Any) -> bool:
    return isinstance(left, dict) and isinstance(right, dict)


def merge_patch(target: Any, patch: Any) -> Any:
    """RFC 7396: objects merge key by key, null removes a key, anything else replaces."""
    if not isinstance(patch, dict):
        return patch
    merged = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            merged.pop(key, None)
        else:
            merged[key] = merge_patch(merged.get(key), value)
    return merged


def _unknown_nulls(patch: Document, known: Document, loc: tuple[str, ...] = ()) -> list[str]:
    """Keys that a patch removes and that were never there: a merge patch alone would pass over a misspelt one."""
    pointers = [_pointer((*loc, key)) for key, value in patch.items() if value is None and key not in known]
    for key in patch.keys() & known.keys():
        if _both_objects(patch[key], known[key]):
            pointers += _unknown_nulls(patch[key], known[key], (*loc, key))
    return pointers


class StaleConfigError(ValueError):
    """The change was made against settings that have changed since."""


class ConfigError(ValueError):
    """The merged settings do not validate. `errors` are (JSON pointer, what is wrong) per bad field."""

    def __init__(self, errors: list[tuple[str, str]]) -> None:
        super().__init__("; ".join(f"{pointer or '/'}: {detail}" for pointer, detail in errors))
        self.errors = errors


@dataclass(frozen=True, slots=True)
class FieldChange:
    """One field before and after: `FieldChange("/rollout/max_new_tokens", 256, 128)`."""

    pointer: str
    old: Any
    new: Any


@dataclass(frozen=True, slots=True)
class Generation:
    """One state of the tunable settings: a line of config.jsonl.

    >>> Generation(2, 1760000000.0, "127.0.0.1 curl/8.5", {"rollout": {"top_k": 20}}, (FieldChange("/rollout/top_k", 0, 20),), {...})
    """

    generation: int
    """1 is the job file's own."""
    time: float
    """Unix time, seconds."""
    source: str
    """Who made it: `job`, `resume`, or the client's address and program."""
    patch: Document
    changes: tuple[FieldChange, ...]
    config: Document
    """The whole tunable document from here on."""

    def record(self) -> Document:
        """As a line of config.jsonl and an item of GET /v1/config/history."""
        changes = [{"pointer": change.pointer, "from": change.old, "to": change.new} for change in self.changes]
        return {
            "generation": self.generation,
            "time": self.time,
            "source": self.source,
            "patch": self.patch,
            "changes": changes,
            "config": self.config,
        }

    @classmethod
    def of_record(cls, record: Document) -> "Generation":
        changes = tuple(FieldChange(change["pointer"], change["from"], change["to"]) for change in record["changes"])
        return cls(**record | {"changes": changes})


class Store(Generic[T]):
    """The tunable settings of one run, of the model T, shared by the HTTP thread that changes them and the loop that obeys them.

    The loop, at each step border:

        generation, tunables = store.in_force()
        job = tunables.apply(job)
        ...                               # the step runs under these values
        store.observe(generation)

    A change is in `path` on the disk before anybody sees it. Opened on a file with lines, the store goes on from them: the patches
    are made again over the job's values, so a field nobody tuned follows an edited job file and a tuned one keeps its value.
    """

    def __init__(
        self, base: T, path: Path, clock: Callable[[], float] = time.time, check: Callable[[T], object] = lambda settings: None
    ) -> None:
        """`base`: the settings before any change. `check` raises ValidationError for values that fit the model and still cannot be.

        Raises ConfigError when the recorded patches do not fit `base` any more.
        """
        self.model = type(base)
        self._check = check
        self._base = base.model_dump(mode="json")
        self._path = path
        self._clock = clock
        self._lock = threading.Lock()
        self._history: list[Generation] = []
        self._observed_generation = 0
        self._tunables = base
        recorded = _read_complete_lines(path)
        if not recorded:
            self._append("job", {}, (), self._base)
            return
        self._history = recorded
        document = self._base
        for generation in recorded:
            document = self._merge(document, generation.patch)
        self._tunables = self._validate(document)
        if changes := _compare(recorded[-1].config, document):
            self._append("resume", {}, changes, document)

    @property
    def generation(self) -> int:
        return self._history[-1].generation

    @property
    def observed_generation(self) -> int:
        """The generation the loop has taken into force; 0 before its first step."""
        return self._observed_generation

    def in_force(self) -> tuple[int, T]:
        """The newest generation and its values, for the next step."""
        with self._lock:
            return self.generation, self._tunables

    def observe(self, generation: int) -> None:
        """The loop has taken this generation into force."""
        self._observed_generation = generation

    def history(self) -> tuple[Generation, ...]:
        """Every generation, oldest first."""
        with self._lock:
            return tuple(self._history)

    def change(self, patch: Any, *, expected: int | None, source: str, dry_run: bool = False) -> Generation:
        """Merge `patch` (RFC 7396) into the settings, whole or not at all; null returns a field to the job file's value.

        `expected` is the generation the patch was made against; None skips the check. Returns the settings as they are afterwards
        and what changed: a new generation, or the present number when nothing differs. With `dry_run` they are what would be,
        under the present number, and nothing is kept.
        Raises StaleConfigError, or ConfigError with every bad field.
        """
        with self._lock:
            present = self._history[-1]
            if expected is not None and expected != present.generation:
                raise StaleConfigError(
                    f"generation {expected} is stale: the settings are at generation {present.generation}, changed by {present.source}"
                )
            if not isinstance(patch, dict):
                raise ConfigError([("", f"expected an object with any of {', '.join(self.model.model_fields)}")])
            if unknown := _unknown_nulls(patch, self._base):
                raise ConfigError([(pointer, UNKNOWN) for pointer in unknown])
            tunables = self._validate(self._merge(present.config, patch))
            # Compared and kept as the model prints it, so that 1 and 1.0 are one value.
            document = tunables.model_dump(mode="json")
            changes = _compare(present.config, document)
            if not changes or dry_run:
                return Generation(present.generation, self._clock(), source, patch, changes, document)
            self._append(source, patch, changes, document)
            self._tunables = tunables
            return self._history[-1]

    def _merge(self, document: Document, patch: Document) -> Document:
        merged = merge_patch(document, patch)
        return overlay(self._base, merged)

    def _validate(self, document: Document) -> T:
        try:
            tunables = self.model.model_validate_json(json.dumps(document), strict=True)
            self._check(tunables)
        except ValidationError as error:
            raise ConfigError([(_pointer(item["loc"]), _explain(item)) for item in error.errors(include_url=False)]) from None
        return tunables

    def _append(self, source: str, patch: Document, changes: tuple[FieldChange, ...], document: Document) -> None:
        number = self._history[-1].generation + 1 if self._history else 1
        generation = Generation(number, self._clock(), source, patch, changes, document)
        with self._path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            try:
                line = json.dumps(generation.record(), allow_nan=False) + "\n"
                if file.write(line.encode()) < len(line.encode()):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self._path))
                os.fsync(file.fileno())
            except OSError:
                file.truncate(size)
                raise
        self._history.append(generation)


def _read_complete_lines(path: Path) -> list[Generation]:
    """The recorded generations. A last line without its end was being written when the run died: nobody saw it, so it is cut off."""
    if not path.exists():
        return []
    lines, end, _ = path.read_text().rpartition("\n")
    os.truncate(path, len((lines + end).encode()))
    return [Generation.of_record(json.loads(line)) for line in lines.splitlines()]


def _compare(old: Any, new: Any, loc: tuple[str, ...] = ()) -> tuple[FieldChange, ...]:
    """The leaves that differ, in the order of the document."""
    if _both_objects(old, new):
        return tuple(change for key in old | new for change in _compare(old.get(key), new.get(key), (*loc, key)))
    return () if old == new else (FieldChange(_pointer(loc), old, new),)


def _pointer(loc: tuple[int | str, ...]) -> str:
    """RFC 6901: ("rollout", "top_k") -> "/rollout/top_k"."""
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in loc)


def _explain(item: Any) -> str:
    if item["type"] == "extra_forbidden":
        return UNKNOWN
    return str(item["msg"]).removeprefix("Value error, ")
