"""Write and read a checkpoint: beside its place first, then renamed; a manifest with the SHA-256 of every file.

checkpoints/step-40/
  student/              Hugging Face layout
  optimizer.safetensors Adam moments by parameter name
  random.safetensors    every rank's random state
  teacher.safetensors   weights of a teacher that follows the student
  learner.json          weight version
  state.json            data cursor, governor, limits, config generation, every metric, sizes of the record files
  manifest.json         {"step": 40, "files": {"student/model.safetensors": "<sha256>", ...}}
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from opd_governor.actors.learner.sharding import gather, scatter

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
STUDENT = "student"


class CheckpointError(ValueError):
    """A checkpoint that must not be used; names the file and what is wrong with it."""


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it counts; empty."""
    folder = _partial(root, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal_checkpoint(root: Path, step: int, state: dict[str, Any]) -> Path:
    """Add state and manifest to what lies in the partial folder, bring all of it to the disk, and rename it to `root/step-N`.

    Every file is its owner's alone. Raises OSError (disk full, read-only): everything that was there before is untouched.
    """
    final, partial = root / f"step-{step}", _partial(root, step)
    (partial / STATE).write_text(json.dumps(state))
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    manifest = {"step": step, "files": {str(path.relative_to(partial)): _digest(path) for path in files}}
    (partial / MANIFEST).write_text(_canonical(manifest))
    for path in (*partial.rglob("*"), partial):
        path.chmod(0o700 if path.is_dir() else 0o600)
        _sync(path)
    if final.exists():
        final.rename(_partial(root, step).with_suffix(".replaced"))
    partial.rename(final)
    _sync(root)
    remove_partials(root)
    return final


def remove_partials(root: Path) -> None:
    """Clear away what a crash or a full disk left half written."""
    for folder in root.glob(".step-*"):
        shutil.rmtree(folder, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Verify every file against the manifest and return the state. Raises CheckpointError."""
    path = folder / MANIFEST
    try:
        text = path.read_text()
        manifest = json.loads(text)
        expected = dict(manifest["files"])
        whole = _canonical(manifest) == text and manifest["step"] == step_of(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: unreadable ({error}); the checkpoint before it is used") from None
    if not whole or STATE not in expected:
        raise CheckpointError(f"{path}: not as it was written; the checkpoint before it is used")
    found = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_symlink() or not file.is_dir()}
    if odd := sorted((found ^ expected.keys()) - {MANIFEST}):
        what = "not in" if odd[0] in found else "missing, but in"
        raise CheckpointError(f"{folder / odd[0]}: {what} {MANIFEST}; the checkpoint before it is used")
    for name, digest in expected.items():
        if (folder / name).is_symlink() or _digest(folder / name) != digest:
            raise CheckpointError(f"{folder / name}: altered or torn (not the SHA-256 of {MANIFEST}); the checkpoint before it is used")
    return json.loads((folder / STATE).read_text())


def newest_checkpoint(root: Path, *, healthy: bool = False) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies (and, where asked, was written in health), its state, and one line per refused one."""
    refused: list[str] = []
    for folder in _newest_first(root):
        try:
            state = read_state(folder)
        except CheckpointError as error:
            refused.append(str(error))
            continue
        if state["healthy"] or not healthy:
            return folder, state, refused
    return None, {}, refused


def prune_checkpoints(root: Path, keep: int, always: Iterable[Path]) -> None:
    """Remove all but the newest `keep` checkpoints and those in `always`."""
    kept = set(always)
    for folder in _newest_first(root)[keep:]:
        if folder not in kept:
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """`step-40` -> 40."""
    return int(folder.name.removeprefix("step-"))


def moments(optimizer: torch.optim.Optimizer, names: list[str]) -> dict[str, torch.Tensor]:
    """Copies of the Adam moments as `parameter/field`, whole, on the first rank. safetensors holds tensors only: nothing that could
    run code on load."""
    state = optimizer.state_dict()["state"]
    named = ((f"{names[index]}/{key}", torch.as_tensor(value)) for index, entry in state.items() for key, value in entry.items())
    return gather(named, copy=True)


def load_moments(optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, torch.Tensor]) -> None:
    """The inverse of `moments` on any number of ranks, each given all tensors; parameter groups keep their present settings."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        index = index_of[name]
        moment = tensor.ndim > 0  # else Adam's own count of steps
        state.setdefault(index, {})[field] = scatter(tensor, parameters[index]) if moment else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _newest_first(root: Path) -> list[Path]:
    return sorted((path for path in root.glob("step-*") if re.fullmatch(r"step-\d+", path.name)), key=step_of, reverse=True)


def _partial(root: Path, step: int) -> Path:
    return root / f".step-{step}.partial"


def _canonical(manifest: dict[str, Any]) -> str:
    """The one text of a manifest, so that no byte of the file can change unseen."""
    return json.dumps(manifest, indent=1)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
