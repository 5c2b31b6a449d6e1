"""Write and read a checkpoint: beside its place first, then renamed; a manifest with the SHA-256 of every file.

checkpoints/step-40/
  student/            Hugging Face layout
  optimizer.safetensors
  state.json          scheduler, random state, data cursor, governor, config generation, metric totals
  manifest.json       {"files": {"student/model.safetensors": "<sha256>", ...}}
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from actors.learner.sharding import gather, rank_and_size, scatter

MANIFEST = "manifest.json"
STATE = "state.json"
OPTIMIZER = "optimizer.safetensors"
STUDENT = "student"


class CheckpointError(ValueError):
    """A checkpoint that must not be used; names the file and what is wrong with it."""


def partial_folder(root: Path, step: int) -> Path:
    """Where a checkpoint is written before it counts; empty."""
    folder = root / f".step-{step}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def seal_checkpoint(root: Path, step: int, state: dict[str, Any]) -> Path:
    """Add state and manifest to what lies in the partial folder, bring all of it to the disk, and rename it to `root/step-N`.

    Raises OSError (disk full, read-only); the partial folder is gone then, and everything that was there before is untouched.
    """
    final = root / f"step-{step}"
    partial = root / f".step-{step}.partial"
    try:
        (partial / STATE).write_text(json.dumps(state))
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        manifest = {"step": step, "files": {str(path.relative_to(partial)): _digest(path) for path in files}}
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in (*files, partial / MANIFEST):
            _sync(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(final, ignore_errors=True)
    partial.rename(final)
    _sync(root)
    return final


def read_state(folder: Path) -> dict[str, Any]:
    """Verify every file against the manifest and return the state. Raises CheckpointError."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
        expected = dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / MANIFEST}: unreadable ({error}); the checkpoint before it is used") from None
    for name, digest in expected.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing; the checkpoint before it is used")
        if _digest(path) != digest:
            raise CheckpointError(f"{path}: altered or torn (SHA-256 differs); the checkpoint before it is used")
    if STATE not in expected:
        raise CheckpointError(f"{folder / STATE}: not in the manifest; the checkpoint before it is used")
    return json.loads((folder / STATE).read_text())


def newest_checkpoint(root: Path, *, healthy: bool = False) -> tuple[Path | None, dict[str, Any], list[str]]:
    """The newest checkpoint that verifies (and, where asked, was written in health), its state, and one line per refused one."""
    refused: list[str] = []
    for folder in sorted(root.glob("step-*"), key=step_of, reverse=True):
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
    for folder in sorted(root.glob("step-*"), key=step_of, reverse=True)[keep:]:
        if folder not in kept:
            shutil.rmtree(folder)


def step_of(folder: Path) -> int:
    """`step-40` -> 40."""
    return int(folder.name.removeprefix("step-"))


def save_optimizer(optimizer: torch.optim.Optimizer, names: list[str], path: Path) -> None:
    """Adam moments by parameter name, whole. safetensors holds tensors only: nothing that could run code on load. Rank 0 writes."""
    state = optimizer.state_dict()["state"]
    tensors = gather((f"{names[index]}/{key}", torch.as_tensor(value)) for index, entry in state.items() for key, value in entry.items())
    if rank_and_size()[0] == 0:
        save_file(tensors, path)


def load_optimizer(optimizer: torch.optim.Optimizer, names: list[str], path: Path) -> None:
    """The inverse of `save_optimizer` on any number of ranks; parameter groups keep their present settings."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    index_of = {name: index for index, name in enumerate(names)}
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, tensor in load_file(path).items():
        name, _, field = key.rpartition("/")
        index = index_of[name]
        moment = tensor.ndim > 0  # else Adam's own count of steps
        state.setdefault(index, {})[field] = scatter(tensor, parameters[index]) if moment else tensor
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
