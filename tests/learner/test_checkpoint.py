"""A checkpoint is whole or absent, and a damaged one is refused with its file's name."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.learner.checkpoint import (
    CheckpointError,
    load_moments,
    moments,
    newest_checkpoint,
    partial_folder,
    prune_checkpoints,
    read_state,
    remove_partials,
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


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    write(root, 4)
    write(root, 8)
    return root


@given(place=st.floats(0, 1, exclude_max=True), cut=st.booleans(), other=st.integers(1, 255))
@settings(deadline=None, max_examples=60)
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "student/model.safetensors"])
def test_no_byte_of_any_file_changes_unseen(two: Path, name: str, place: float, cut: bool, other: int) -> None:
    path = two / "step-8" / name
    data = path.read_bytes()
    at = int(place * len(data))
    path.write_bytes(data[:at] if cut else data[:at] + bytes([data[at] ^ other]) + data[at + 1 :])
    try:
        folder, _, refused = newest_checkpoint(two)
    finally:
        path.write_bytes(data)
    assert folder == two / "step-4"
    assert len(refused) == 1
    # A digest altered in the manifest shows at the file it belongs to: the line names both.
    assert Path(name).name in refused[0]
    assert newest_checkpoint(two)[0] == two / "step-8"


@pytest.mark.parametrize("name", ["student/pytorch_model.bin", "student/modeling.py", "extra"])
def test_a_file_that_was_not_written_with_the_checkpoint_is_refused(tmp_path: Path, name: str) -> None:
    before = write(tmp_path, 4)
    (write(tmp_path, 8) / name).write_text("x")
    folder, _, refused = newest_checkpoint(tmp_path)
    assert folder == before
    assert f"{name}: not in" in refused[0]


@pytest.mark.parametrize("name", ["../step-4/state.json", "/etc/hostname", "student/link"])
def test_a_manifest_that_points_out_of_its_folder_is_refused(tmp_path: Path, name: str) -> None:
    before = write(tmp_path, 4)
    folder = write(tmp_path, 8)
    (folder / "student/link").symlink_to("/etc/hostname")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    assert newest_checkpoint(tmp_path)[0] == before


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path: Path) -> None:
    shutil.copytree(write(tmp_path, 4), tmp_path / "step-9")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-4"


def test_a_folder_that_is_no_checkpoint_is_passed_over(tmp_path: Path) -> None:
    written = write(tmp_path, 4)
    (tmp_path / "step-final").mkdir()
    assert newest_checkpoint(tmp_path) == (written, {"step": 4, "healthy": True}, [])


def test_a_crash_before_the_rename_leaves_the_old_ones_and_is_cleared_away(tmp_path: Path) -> None:
    write(tmp_path, 4)
    (partial_folder(tmp_path, 8) / "half").write_text("x")
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-4"
    remove_partials(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_a_checkpoint_is_its_owners_alone(tmp_path: Path) -> None:
    folder = write(tmp_path, 4)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.stat().st_mode & 0o777 for path in folder.rglob("*")} == {0o700, 0o600}


def test_a_step_written_again_takes_the_place_of_the_first(tmp_path: Path) -> None:
    write(tmp_path, 4, "old")
    assert "new" in (write(tmp_path, 4, "new") / "student/model.safetensors").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


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
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        read_state(folder)


def test_an_optimizer_goes_on_bit_for_bit() -> None:
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
    saved = {name: tensor.clone() for name, tensor in moments(optimizer, ["weight", "bias"]).items()}
    other, resumed = setup()
    other.load_state_dict(layer.state_dict())
    load_moments(resumed, ["weight", "bias"], saved)
    steps(layer, optimizer, 2)
    steps(other, resumed, 2)
    assert torch.equal(layer.weight, other.weight)
    assert torch.equal(layer.bias, other.bias)
