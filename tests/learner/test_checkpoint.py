"""Checkpoints are whole or not at all, and a torn one is refused by name."""

import json
from pathlib import Path

import pytest
import torch

from actors.learner.checkpoint import (
    CheckpointError,
    load_optimizer,
    newest_checkpoint,
    partial_folder,
    prune_checkpoints,
    read_state,
    save_optimizer,
    seal_checkpoint,
)


def write(root: Path, step: int, text: str = "weights", healthy: bool = True) -> Path:
    folder = partial_folder(root, step)
    (folder / "student").mkdir()
    (folder / "student/model.safetensors").write_text(text * 100)
    return seal_checkpoint(root, step, {"step": step, "healthy": healthy})


def test_a_sealed_checkpoint_reads_back(tmp_path: Path) -> None:
    assert read_state(write(tmp_path, 8)) == {"step": 8, "healthy": True}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("damage", ["cut", "flip", "remove"])
def test_each_damaged_file_is_refused_by_name_and_the_one_before_is_used(tmp_path: Path, damage: str) -> None:
    before = write(tmp_path, 4)
    names = [path.relative_to(before) for path in before.rglob("*") if path.is_file()]
    assert len(names) == 3
    for name in names:
        path = write(tmp_path, 8) / name
        data = path.read_bytes()
        if damage == "remove":
            path.unlink()
        else:
            path.write_bytes(data[:-1] if damage == "cut" else bytes([data[0] ^ 1]) + data[1:])
        folder, state, refused = newest_checkpoint(tmp_path)
        assert folder == before
        assert state["step"] == 4
        assert len(refused) == 1
        assert str(name) in refused[0]


def test_a_crash_before_the_rename_leaves_the_old_ones(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (partial_folder(tmp_path, 8) / "half").write_text("x")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-4"


def test_retention_keeps_the_newest_and_the_last_healthy_one(tmp_path: Path) -> None:
    healthy = write(tmp_path, 2)
    for step in (4, 6, 10):
        write(tmp_path, step)
    prune_checkpoints(tmp_path, 2, [healthy])
    assert {path.name for path in tmp_path.iterdir()} == {"step-2", "step-6", "step-10"}


def test_the_last_healthy_one_is_found_behind_newer_ones(tmp_path: Path) -> None:
    healthy = write(tmp_path, 4)
    newest = write(tmp_path, 8, healthy=False)
    assert newest_checkpoint(tmp_path)[0] == newest
    assert newest_checkpoint(tmp_path, healthy=True)[0] == healthy


def test_a_manifest_without_files_is_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    (folder / "manifest.json").write_text(json.dumps({"files": {}}))
    with pytest.raises(CheckpointError, match=r"state\.json"):
        read_state(folder)


def test_an_optimizer_goes_on_bit_for_bit(tmp_path: Path) -> None:
    def setup() -> tuple[torch.nn.Linear, torch.optim.AdamW]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(3, 2)
        return layer, torch.optim.AdamW(layer.parameters(), lr=0.1)

    def steps(layer: torch.nn.Linear, optimizer: torch.optim.AdamW, num: int) -> None:
        for i in range(num):
            optimizer.zero_grad()
            (layer(torch.ones(1, 3) * (i + 1)) ** 2).sum().backward()
            optimizer.step()

    layer, optimizer = setup()
    steps(layer, optimizer, 3)
    save_optimizer(optimizer, ["weight", "bias"], tmp_path / "optimizer.safetensors")
    other, resumed = setup()
    other.load_state_dict(layer.state_dict())
    load_optimizer(resumed, ["weight", "bias"], tmp_path / "optimizer.safetensors")
    steps(layer, optimizer, 2)
    steps(other, resumed, 2)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
