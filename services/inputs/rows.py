"""Where rows come from: files, folders, globs, addresses, datasets of the hub. Read once through, in order, bad rows among them.

data.prompts --open_rows--> Rows --for row in rows--> Row(place, value or RowError)
"""

import hashlib
import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import fsspec
from fsspec.core import url_to_fs

from opd_governor.services.inputs.readers import decompressed, known_ends, reader_of
from opd_governor.services.inputs.refusals import DataError, RowError, theirs, words
from opd_governor.services.job.settings import PromptSource

SPLITS = ("train", "training", "test", "validation", "valid", "val", "dev", "eval")
"""Words that name a split in the names of shards."""
SAVED_BY_DATASETS = ("dataset_info.json", "dataset_dict.json")
CHUNK_BYTES = 2**20


class Row(NamedTuple):
    """One row: which file (or dataset), which line from 1, and its content or what is wrong with it."""

    file: str
    line: int
    value: dict[str, Any] | RowError

    @property
    def place(self) -> str:
        """FILE:LINE."""
        return f"{self.file}:{self.line}"


class Rows(Protocol):
    """Rows once through, as often as asked."""

    names: Sequence[str]
    """Of the files, or of the dataset."""

    def __iter__(self) -> Iterator[Row]: ...

    def identity(self) -> str:
        """Equal for equal content."""
        ...

    @property
    def done_share(self) -> float:
        """How far the reading is, 0 to 1."""
        ...


@dataclass
class FileRows:
    """One or several files of one file system. Raises DataError for a file that breaks in the middle."""

    files: Sequence[str]
    names: Sequence[str]
    fs: Any
    done_share: float = 0.0

    def __iter__(self) -> Iterator[Row]:
        self.done_share = 0.0
        sizes = [self.fs.size(file) or 1 for file in self.files]
        total, before = sum(sizes), 0
        for file, name, size in zip(self.files, self.names, sizes, strict=True):
            reader = reader_of(file)
            assert reader is not None, file
            with theirs(name, "the file", "it cannot be read whole: mend or replace it"), self.fs.open(file, "rb") as raw:
                opened, _ = decompressed(raw, file)
                try:
                    for line, value in reader(opened):
                        yield Row(name, line, value)
                        if not line % 1000:
                            self.done_share = (before + min(size, raw.tell())) / total
                except RowError as error:
                    raise DataError(f"{name}: {error}") from None
            before += size
        self.done_share = 1.0

    def identity(self) -> str:
        digest = hashlib.sha256()
        for file, name in zip(self.files, self.names, strict=True):
            with theirs(name, "the file", "give one that can be read"):
                reader = reader_of(file)
                digest.update(f"{name}\0{reader.__module__}.{reader.__qualname__}\0".encode())  # type: ignore[union-attr]
                digest.update(Path(inspect.getfile(reader)).read_bytes())  # type: ignore[arg-type]
                if "file" in _protocols(self.fs):
                    with open(file, "rb") as stream:
                        digest.update(hashlib.file_digest(stream, "sha256").digest())
                else:
                    digest.update(str(self.fs.ukey(file)).encode())  # a store's own mark of the content: no second download
        return digest.hexdigest()


@dataclass
class DatasetRows:
    """A dataset of the `datasets` library."""

    dataset: Any
    names: Sequence[str]
    done_share: float = 0.0

    def __iter__(self) -> Iterator[Row]:
        (name,), total = self.names, len(self.dataset)
        with theirs(name, "the dataset", "give one that can be read"):
            for number, value in enumerate(self.dataset, start=1):
                self.done_share = number / total
                yield Row(name, number, dict(value))

    def identity(self) -> str:
        return f"{self.names[0]} {self.dataset._fingerprint}"


def open_rows(source: PromptSource) -> Rows:
    """What `source.path` names. Raises DataError where nothing readable is there; the rows themselves are read later."""
    path = source.path
    if not path.strip() or "\n" in path:
        raise DataError(f"path {path!r}: is no path of a file; give a file, a folder, a glob, an address or a dataset id")
    if "://" in path:
        return _remote(source)
    place = Path(path).expanduser()
    if place.is_file():
        if reader_of(place.name) is None:
            raise DataError(f"{path}: no reader for this kind of file; give one of {known_ends()}")
        return _local([str(place)], [path])
    if place.is_dir():
        return _folder(place, source)
    if any(sign in path for sign in "*?["):
        matches = sorted(str(match) for match in _glob(place) if match.is_file() and reader_of(match.name))
        if not matches:
            raise DataError(f"{path}: matches no file of a known kind; the kinds are {known_ends()}")
        return _local(matches, matches)
    if path.startswith(("/", "./", "../", "~")) or reader_of(place.name) or path.count("/") > 1 or place.suffix in (".txt", ".md", ".yaml"):
        raise DataError(f"{path}: no such file; give a file ({known_ends()}), a folder, a glob or a dataset id")
    return _hub(source)


def first_row(source: PromptSource) -> dict[str, Any]:
    """The first row that can be read. Raises DataError where there is none."""
    for row in open_rows(source):
        if not isinstance(row.value, RowError):
            return row.value
        raise DataError(f"{row.place}: {row.value}")
    raise DataError(f"{source.path}: has no rows; give it at least one prompt")


def _local(files: list[str], names: list[str]) -> Rows:
    return FileRows(files, names, fsspec.filesystem("file"))


def _glob(pattern: Path) -> Iterator[Path]:
    anchor = Path(pattern.anchor or ".")
    return anchor.glob(str(pattern.relative_to(pattern.anchor) if pattern.anchor else pattern))


def _folder(folder: Path, source: PromptSource) -> Rows:
    if any((folder / name).is_file() for name in SAVED_BY_DATASETS):
        return _saved(folder, source)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and reader_of(file.name) and not _hidden(file, folder))
    if not files:
        raise DataError(f"{source.path}: the folder has no file of a known kind; the kinds are {known_ends()}")
    chosen = of_split([str(file.relative_to(folder)) for file in files], source)
    names = [str(folder / file) for file in chosen]
    return _local(names, names)


def of_split(files: Sequence[str], source: PromptSource) -> list[str]:
    """The files of the split, where their names tell: `data/train-00000-of-00004.parquet`; all of them where no name names one."""
    split_of = [_named_split(file) for file in files]
    named = {split for split in split_of if split}
    if not named:
        return list(files)
    same = _same_split(source.split)
    chosen = [file for file, split in zip(files, split_of, strict=True) if split in same]
    if not chosen:
        raise DataError(
            f"{source.path}: no file of split {source.split!r}, there are files of {', '.join(sorted(named))}; set split, or give a glob"
        )
    return chosen


def _named_split(file: str) -> str | None:
    parts = re.split(r"[-_./\s]+", file.lower())
    return next((part for part in parts if part in SPLITS), None)


def _same_split(split: str) -> set[str]:
    groups = ({"train", "training"}, {"validation", "valid", "val", "dev"}, {"test", "eval"})
    return next((group for group in groups if split in group), {split.lower()})


def _hidden(file: Path, folder: Path) -> bool:
    """Hidden files, and the configuration files that lie beside models and datasets."""
    parts = file.relative_to(folder).parts
    return any(part.startswith((".", "_")) for part in parts) or file.name in ("dataset_infos.json", "config.json", "state.json")


def _remote(source: PromptSource) -> Rows:
    """Files behind an fsspec address."""
    path = source.path
    remedy = "give an address that can be read here"
    with theirs(path, "its file system", f"{remedy}; a back end may have to be installed (s3fs for s3://, gcsfs for gs://)"):
        fs, inner = url_to_fs(path)
        if any(sign in inner for sign in "*?["):
            found = [file for file in sorted(fs.glob(inner)) if reader_of(file)]
        elif fs.isdir(inner):
            everything = [file for file in sorted(fs.find(inner)) if reader_of(file)]
            found = of_split(everything, source) if everything else []
        else:
            found = [inner] if fs.exists(inner) else []
    if not found:
        raise DataError(f"{path}: nothing of a known kind is there; the kinds are {known_ends()}")
    if reader_of(found[0]) is None:
        raise DataError(f"{path}: no reader for this kind of file; give one of {known_ends()}")
    protocol = path.split("://", 1)[0]
    return FileRows(found, [file if "://" in file else f"{protocol}://{file}" for file in found], fs)


def _protocols(fs: Any) -> Sequence[str]:
    return [fs.protocol] if isinstance(fs.protocol, str) else list(fs.protocol)


def _saved(folder: Path, source: PromptSource) -> Rows:
    """A folder written by `save_to_disk`."""
    import datasets  # slow to import, needed for datasets alone

    with theirs(source.path, "datasets", "save it again with save_to_disk"):
        loaded = datasets.load_from_disk(str(folder))
    if isinstance(loaded, datasets.DatasetDict):
        if source.split not in loaded:
            raise DataError(f"{source.path}: no split {source.split!r}, there are {', '.join(map(str, loaded))}; set split")
        loaded = loaded[source.split]
    return DatasetRows(loaded, [source.path])


def _hub(source: PromptSource) -> Rows:
    import datasets  # slow to import, needed for datasets alone

    asked = [f"split {source.split!r}"]
    asked += [f"{what} {value!r}" for what, value in (("config", source.config), ("revision", source.revision)) if value]
    try:
        dataset = datasets.load_dataset(source.path, source.config, split=source.split, revision=source.revision)
    except Exception as error:  # unknown id, configuration or split, no network: the library's words tell which
        raise DataError(
            f"{source.path}: neither a file nor a dataset that can be loaded with {', '.join(asked)}: {words(error)}; "
            "give a file, or an id, config, split and revision that exist"
        ) from None
    place = f"{source.path}[{source.split}]"
    return DatasetRows(dataset, [place])
