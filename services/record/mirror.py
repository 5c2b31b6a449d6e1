"""A second place for checkpoints and records, wherever fsspec reaches: s3://bucket/runs/sums, gs://, file://, memory://.

checkpoints/step-N --push, manifest last--> ADDRESS/checkpoints/step-N --fetch, verified--> an empty run directory
metrics.jsonl ...  --push---------------->  ADDRESS/metrics.jsonl ...  --fetch----------->
"""

import shutil
from pathlib import Path, PurePosixPath

import fsspec

from opd_governor.actors.learner.checkpoint import MANIFEST, CheckpointError, read_state
from opd_governor.services.job.settings import JobError
from opd_governor.services.record.rundir import RunDirectory


class Mirror:
    """Copies of one run. Whatever fsspec raises while copying passes through: its back ends have errors of their own.

    >>> mirror = Mirror("s3://bucket/runs/sums", directory)   # doctest: +SKIP
    >>> mirror.push(directory.checkpoints / "step-40")        # doctest: +SKIP
    """

    def __init__(self, url: str, directory: RunDirectory) -> None:
        """Raises JobError for an address that no installed package serves."""
        try:
            self._files, root = fsspec.core.url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise JobError(f"checkpoint.copy_to: {url}: {error}") from None
        self._root = root.rstrip("/")
        self._directory = directory

    def push(self, folder: Path) -> None:
        """Copy a whole checkpoint and the records up to it; checkpoints that are no longer kept here go there too."""
        files = [path for path in folder.rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == MANIFEST):  # without it a copy does not count
            self._put(path, f"checkpoints/{folder.name}/{path.relative_to(folder).as_posix()}")
        for path in self._records():
            if path.exists():
                self._put(path, path.name)
        for name in self._names():
            if not (folder.parent / name).exists():
                self._files.rm(f"{self._root}/checkpoints/{name}", recursive=True)

    def fetch(self) -> list[str]:
        """Bring the newest whole checkpoint and its records here, unless it is here; one line per refused one."""
        refused: list[str] = []
        root = self._directory.checkpoints
        for name in self._names():
            if (root / name).exists():
                break
            scratch = root / ".step-fetched" / name
            shutil.rmtree(scratch, ignore_errors=True)
            prefix = f"{self._root}/checkpoints/{name}/"
            for source in self._files.find(prefix):
                inside = PurePosixPath(source[source.index(prefix) + len(prefix) :])
                if ".." not in inside.parts:
                    (scratch / inside).parent.mkdir(parents=True, exist_ok=True)
                    self._files.get_file(source, str(scratch / inside))
            try:
                read_state(scratch)
            except CheckpointError as error:
                refused.append(str(error))
                continue
            scratch.rename(root / name)
            for path in self._records():
                if self._files.exists(f"{self._root}/{path.name}"):
                    self._files.get_file(f"{self._root}/{path.name}", str(path))
            break
        return refused

    def _put(self, path: Path, name: str) -> None:
        target = f"{self._root}/{name}"
        self._files.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._files.put_file(str(path), target)

    def _names(self) -> list[str]:
        """Checkpoints there, newest first."""
        folder = f"{self._root}/checkpoints"
        if not self._files.exists(folder):
            return []
        names = [entry.rstrip("/").rpartition("/")[2] for entry in self._files.ls(folder, detail=False)]
        steps = [name for name in names if name.removeprefix("step-").isdigit()]
        return sorted(steps, key=lambda name: int(name.removeprefix("step-")), reverse=True)

    def _records(self) -> tuple[Path, ...]:
        return (*self._directory.of_steps(), self._directory.config)
