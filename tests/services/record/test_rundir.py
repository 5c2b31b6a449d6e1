"""The run directory: appended line by line, cut at a checkpoint, never overwritten unasked."""

import errno
import math
import os
from pathlib import Path

import pytest

from opd_governor.services.job.settings import JobError
from opd_governor.services.record.rundir import RunDirectory, finite, read_records


def test_records_are_lines_and_a_torn_last_one_is_left_out(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", resume=False)
    directory.append(directory.metrics, {"step": 1, "loss": math.nan})
    directory.append(directory.metrics, {"step": 2, "loss": 0.5})
    with directory.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_records(directory.metrics) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, resume=False)
    for step in (1, 2):
        directory.append(directory.metrics, {"step": step})
    sizes = directory.record_sizes()
    for path in (directory.metrics, directory.decisions):
        directory.append(path, {"step": 3})
    directory.cut_to(sizes)
    assert [record["step"] for record in read_records(directory.metrics)] == [1, 2]
    assert read_records(directory.decisions) == []


def test_records_that_find_no_room_wait_and_leave_no_half_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, write, room = RunDirectory(tmp_path, resume=False), os.write, [30]

    def small_disk(descriptor: int, data: bytes) -> int:
        if not room[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = write(descriptor, data[: room[0]])
        room[0] -= written
        return written

    monkeypatch.setattr(os, "write", small_disk)
    for step in range(1, 5):
        directory.append(directory.metrics, {"step": step})
    assert "No space left" in (directory.trouble or "")
    assert [record["step"] for record in read_records(directory.metrics)] == [1, 2]
    with pytest.raises(OSError, match="No space left"):
        directory.record_sizes()
    room[0] = 1000
    directory.append(directory.metrics, {"step": 5})
    assert directory.trouble is None
    assert [record["step"] for record in read_records(directory.metrics)] == [1, 2, 3, 4, 5]


def test_a_folder_with_a_run_in_it_is_refused_unless_resumed(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, resume=False)
    directory.append(directory.metrics, {"step": 1})
    with pytest.raises(JobError, match="--resume"):
        RunDirectory(tmp_path, resume=False)
    directory.metrics.unlink()
    (directory.checkpoints / "step-4").mkdir(parents=True)
    with pytest.raises(JobError, match="--resume"):
        RunDirectory(tmp_path, resume=False)
    assert RunDirectory(tmp_path, resume=True).path == tmp_path


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="not writable"):
        RunDirectory(tmp_path / "file" / "run", resume=False)


def test_json_has_no_name_for_nan() -> None:
    assert finite({"a": [math.inf, (1.0, math.nan)], "b": "x"}) == {"a": [None, [1.0, None]], "b": "x"}
