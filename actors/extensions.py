"""Extension points: the parts of each kind by name, and how parts from outside this package come in.

A kind is a mapping from name to declaration. This package's own parts and a stranger's are added the same way:

    LOSSES: Kind[Loss] = Kind("loss")

    @LOSSES.add("reverse_kl")
    def reverse_kl(...): ...

Code outside the package is imported before a kind is read: modules and files named by the job's `extensions` key, and whatever an
installed distribution lists under the entry-point group `opd_governor.extensions`. They travel to actors in the environment
variable OPD_EXTENSIONS, so a file must lie at the same path on every node, like a model folder.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

T = TypeVar("T")

VARIABLE = "OPD_EXTENSIONS"
"""Modules and .py files to import, separated by os.pathsep."""
GROUP = "opd_governor.extensions"
"""Entry-point group of installed distributions."""

_loaded: set[str] = set()
_added: list[tuple["Kind[Any]", str]] = []
"""Every part in the order it was added, so that those of a file that fails half-way are taken back."""


class ExtensionError(ValueError):
    """An extension that cannot be imported, or a name that is taken: one line, a user's mistake."""


class Kind(Mapping[str, T]):
    """The parts of one kind, by name, in the order they were added.

    >>> SHAPES: Kind[int] = Kind("shape")
    >>> SHAPES.add("square")(4)
    4
    >>> SHAPES["square"]
    4
    """

    def __init__(self, what: str, pattern: str = r"\S+", reserved: Sequence[str] = ()) -> None:
        """`what`: the kind in a person's words, for messages. `pattern`: what a name must match. `reserved`: names no part may have."""
        self.what = what
        self._pattern, self._reserved = pattern, frozenset(reserved)
        self._parts: dict[str, T] = {}

    def add(self, name: str) -> Callable[[T], T]:
        """A decorator (or a plain call) that lists a part. Raises ExtensionError for a name that is taken, reserved or malformed."""

        def put(part: T) -> T:
            if not re.fullmatch(self._pattern, name):
                raise ExtensionError(f"{self.what} {name!r}: a name must match {self._pattern}; give yours such a name")
            if name in self._parts or name in self._reserved:
                raise ExtensionError(f"{self.what} {name!r} exists already; give yours another name")
            self._parts[name] = part
            _added.append((self, name))
            return part

        return put

    def __getitem__(self, name: str) -> T:
        """Raises KeyError for a name that nobody added."""
        if name not in self._parts:
            load_extensions()
        return self._parts[name]

    def __iter__(self) -> Iterator[str]:
        load_extensions()
        return iter(tuple(self._parts))

    def __len__(self) -> int:
        load_extensions()
        return len(self._parts)

    @property
    def key(self) -> "Key":
        """For a settings field: `loss: Annotated[str, LOSSES.key]` takes the names of this kind only."""
        return Key(self)


class Key:
    """Pydantic annotation of a field that names a part: validates the name, and lists the known ones in the JSON schema."""

    def __init__(self, kind: Kind[Any] | Callable[[], Kind[Any]]) -> None:
        """`kind`: a function gives it once it is asked for, where what it comes from is slow to import."""
        self._given = kind

    @property
    def _kind(self) -> Kind[Any]:
        return self._given if isinstance(self._given, Kind) else self._given()

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_after_validator_function(self._check, handler(source))

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> dict[str, Any]:
        return handler(schema) | {"enum": list(self._kind)}

    def _check(self, name: str) -> str:
        if name in self._kind:
            return name
        known = list(self._kind)
        near = get_close_matches(name, known, n=1)
        raise ValueError(f"no such {self._kind.what}; " + (f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"))


def use_extensions(names: Sequence[str]) -> None:
    """Import these modules and .py files in this process, and in every actor it starts. Raises ExtensionError."""
    for name in names:
        _refuse_bad_name(name)
    held = [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
    os.environ[VARIABLE] = os.pathsep.join(dict.fromkeys([*held, *names]))
    load_extensions()


def load_extensions() -> None:
    """Import what the environment and installed distributions name, each once a process. Raises ExtensionError."""
    for name in [name for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]:
        _load(name, lambda name=name: _import(name))  # type: ignore[misc]
    for entry in _installed():
        _load(f"{entry.value} (entry point {entry.name})", entry.load)


@cache
def _installed() -> tuple[importlib.metadata.EntryPoint, ...]:
    return tuple(importlib.metadata.entry_points(group=GROUP))


def _refuse_bad_name(name: str) -> None:
    """Raises ExtensionError for a name that is neither a module's nor a file's, or that the environment variable cannot carry."""
    if os.pathsep in name:
        raise ExtensionError(f"extensions: {name}: a path must not contain {os.pathsep!r}; move the file")
    if not name.endswith(".py") and not all(part.isidentifier() for part in name.split(".")):
        raise ExtensionError(f"extensions: {name!r} names no module; give a .py file, or a module such as package.parts")


def _load(name: str, load: Callable[[], object]) -> None:
    if name in _loaded:
        return
    _loaded.add(name)  # before it is imported: an extension reads the kinds it adds to
    num_before = len(_added)
    try:
        load()
    except (Exception, SystemExit) as error:
        _loaded.discard(name)
        _take_back(num_before)  # a mended file is read again, and finds its names free
        why = str(error) if isinstance(error, ExtensionError) else f"{type(error).__name__}: {error}"
        raise ExtensionError(f"extensions: {name} does not load ({' '.join(why.split())}); mend or remove it") from error


def _take_back(num_kept: int) -> None:
    """Remove the parts that were added last, down to the first `num_kept`."""
    for kind, name in _added[num_kept:]:
        del kind._parts[name]
    del _added[num_kept:]


def part_of(spec: str, field: str) -> Any:
    """What `module:name` or `file.py:name` names. `field`: the job's key, for messages. Raises ExtensionError."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ExtensionError(f"{field} {spec}: give file.py:name or module:name")
    try:
        module = _import(place)
    except (Exception, SystemExit) as error:
        why = " ".join(str(error).split())
        raise ExtensionError(f"{field} {spec}: {place} does not load ({type(error).__name__}: {why}); mend it") from error
    if not hasattr(module, name):
        raise ExtensionError(f"{field} {spec}: {place} has no {name}")
    return getattr(module, name)


def _import(name: str) -> Any:
    if not name.endswith(".py"):
        return importlib.import_module(name)
    path = Path(name)
    if not path.is_file():
        raise FileNotFoundError("no such file")
    # The same name in every process, so that pickled objects find it; another one for a file of the same name in another folder.
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
    spec = importlib.util.spec_from_file_location(f"opd_extension_{path.stem}_{place}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # so that what it defines can be pickled and inspected
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
