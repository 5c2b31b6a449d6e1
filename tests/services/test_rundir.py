"""The run directory: appended line by line, cut at a checkpoint, never overwritten unasked."""

import math
from pathlib import Path

import pytest

from services.job import JobError
from services.rundir import RunDirectory, finite, read_records


def test_records_are_lines_and_a_torn_last_one_is_left_out(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "run", resume=False)
    directory.append(directory.metrics, {"step": 1, "loss": math.nan})
    directory.append(directory.metrics, {"step": 2, "loss": 0.5})
    with directory.metrics.open("a") as file:
        file.write('{"step": 3, "lo')
    assert read_records(directory.metrics) == [{"step": 1, "loss": None}, {"step": 2, "loss": 0.5}]


def test_a_resumed_run_forgets_what_it_will_write_again(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, resume=False)
    for step in (1, 2, 3):
        directory.append(directory.metrics, {"step": step})
    directory.cut_after(2)
    assert [record["step"] for record in read_records(directory.metrics)] == [1, 2]


def test_a_folder_with_a_run_in_it_is_refused_unless_resumed(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, resume=False)
    directory.append(directory.metrics, {"step": 1})
    with pytest.raises(JobError, match="--resume"):
        RunDirectory(tmp_path, resume=False)
    assert RunDirectory(tmp_path, resume=True).path == tmp_path


def test_an_unwritable_folder_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JobError, match="not writable"):
        RunDirectory(tmp_path / "file" / "run", resume=False)


def test_json_has_no_name_for_nan() -> None:
    assert finite({"a": [math.inf, (1.0, math.nan)], "b": "x"}) == {"a": [None, [1.0, None]], "b": "x"}
