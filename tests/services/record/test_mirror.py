"""Checkpoints and records in a second place, over fsspec's own memory:// and file://."""

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from opd_governor.actors.learner.checkpoint import newest_checkpoint
from opd_governor.services.job.settings import JobError
from opd_governor.services.record.mirror import Mirror
from opd_governor.services.record.rundir import RunDirectory, read_records
from tests.services.run.loop import Loop

NUMBERS = itertools.count()


@pytest.fixture(params=["memory", "file"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://runs/{next(NUMBERS)}" if request.param == "memory" else f"file://{tmp_path}/elsewhere/run"


def mirrored(path: Path, url: str, on_step: Callable[[int], object] = lambda step: None) -> Loop:
    loop = Loop(path, mirror_url=url)
    loop.on_step = lambda record: on_step(record["step"])
    return loop


def test_a_run_goes_on_in_an_empty_directory_from_the_copy(tmp_path: Path, url: str) -> None:
    first = mirrored(tmp_path / "first", url)
    first.on_step = lambda record: record["step"] == 5 and first.distillation.stop()
    first.run()
    shutil.rmtree(tmp_path / "first")
    directory = RunDirectory(tmp_path / "second", resume=True)
    assert Mirror(url, directory).fetch() == []
    second = mirrored(tmp_path / "second", url)
    records = second.run(resume=True)
    assert second.fleet.restored == [("step-5", False)]
    assert [record["step"] for record in records] == list(range(1, 11))
    assert [index for record in records for _, index in record["prompts"]] == list(range(30))
    assert len(read_records(second.directory.config)) == 1


def test_only_what_is_kept_here_stays_there(tmp_path: Path, url: str) -> None:
    loop = mirrored(tmp_path / "run", url)
    loop.run()
    files, root = fsspec.core.url_to_fs(url)
    there = {path.rstrip("/").rpartition("/")[2] for path in files.ls(f"{root}/checkpoints", detail=False)}
    assert there == {path.name for path in loop.directory.checkpoints.iterdir()} == {"step-10"}


def test_a_torn_copy_is_refused_by_name_and_the_one_before_is_fetched(tmp_path: Path, url: str) -> None:
    loop = Loop(tmp_path / "run", sick_from=7, mirror_url=url)
    loop.run()
    files, root = fsspec.core.url_to_fs(url)
    files.rm_file(f"{root}/checkpoints/step-10/manifest.json")
    directory = RunDirectory(tmp_path / "other", resume=True)
    (line,) = Mirror(url, directory).fetch()
    assert "step-10/manifest.json" in line
    assert newest_checkpoint(directory.checkpoints)[0] == directory.checkpoints / "step-6"


def test_a_checkpoint_that_is_here_is_not_fetched(tmp_path: Path, url: str) -> None:
    loop = mirrored(tmp_path / "run", url)
    loop.run()
    loop.directory.metrics.write_text("")
    assert Mirror(url, loop.directory).fetch() == []
    assert loop.directory.metrics.read_text() == ""


def test_a_place_out_of_reach_costs_a_warning_and_not_the_run(tmp_path: Path) -> None:
    loop = mirrored(tmp_path / "run", "file:///proc/nowhere")
    assert len(loop.run()) == 10
    assert any("step 10 not copied" in warning for warning in loop.warnings)


def test_an_address_that_nothing_serves_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"checkpoint\.copy_to: nosuch://x"):
        Mirror("nosuch://x", RunDirectory(tmp_path, resume=True))
