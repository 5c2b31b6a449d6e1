"""Every trainer's log is read by content; broken and hostile files are one clear line."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from opd_governor.services.cli.app import app
from opd_governor.services.sidecar.diagnosing import draw, judge, read_logs, render
from opd_governor.services.sidecar.formats import LogError
from tests.services.sidecar.logs import collapse, steady, trl_rows, write_all

TRAINER = {
    "trl": "trl", "trl lines": "trl", "trl printed": "trl", "wandb csv": "trl", "columns": "trl", "utf-16": "trl", "tensorboard": "trl",
    "verl console": "verl", "verl file": "verl", "nemo-rl console": "nemo-rl", "prime-rl": "prime-rl", "slime": "slime",
    "openrlhf": "openrlhf", "ours": "ours", "somebody's own": "generic",
    "prime-rl printed": "prime-rl", "logfmt": "generic",
}  # fmt: skip


@pytest.mark.parametrize("name", TRAINER)
def test_a_collapse_is_found_in_every_trainers_log(name: str, tmp_path: Path) -> None:
    (log,) = read_logs([write_all(tmp_path, collapse())[name]])
    assert log.trainer == TRAINER[name]
    assert len(log.steps) >= 59
    diagnosis = judge(log)
    assert diagnosis.kind == "collapsed", render(log, diagnosis)
    assert diagnosis.since_step is not None
    assert 28 <= diagnosis.since_step <= 38


@pytest.mark.parametrize("name", TRAINER)
def test_a_steady_run_is_healthy_in_every_trainers_log(name: str, tmp_path: Path) -> None:
    (log,) = read_logs([write_all(tmp_path, steady())[name]])
    assert judge(log).kind == "healthy", render(log, judge(log))


def test_a_log_whose_lines_begin_with_a_time_in_brackets_is_no_json(tmp_path: Path) -> None:
    lines = write_all(tmp_path, collapse())["slime"].read_text().splitlines()
    path = tmp_path / "stamped.log"
    path.write_text("".join(f"[2026-11-28 01:02:03] {line}\n" for line in lines))
    (log,) = read_logs([path])
    assert log.trainer == "slime"
    assert judge(log).kind == "collapsed"


def test_a_file_cut_in_the_middle_is_read_up_to_there(tmp_path: Path) -> None:
    text = json.dumps({"log_history": trl_rows(collapse())}, indent=2)
    path = tmp_path / "state.json"
    path.write_text(text[: int(len(text) * 0.9)])
    (log,) = read_logs([path])
    assert 50 <= len(log.steps) < 60
    assert judge(log).kind == "collapsed"


def test_a_packed_log_is_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in trl_rows(steady())).encode()))
    (log,) = read_logs([path])
    assert len(log.steps) == 60


def test_of_a_step_logged_twice_the_later_row_counts(tmp_path: Path) -> None:
    path = tmp_path / "resumed.jsonl"
    rows = [*trl_rows(collapse()), *trl_rows(steady())[20:]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (log,) = read_logs([path])
    assert judge(log).kind == "healthy"


def test_a_trainers_log_and_its_orchestrators_are_one_run(tmp_path: Path) -> None:
    orchestrator, trainer = tmp_path / "a", tmp_path / "b"
    orchestrator.write_bytes(write_all(tmp_path, steady())["prime-rl"].read_bytes())
    trainer.write_text(
        "".join(json.dumps({"step": step, "optim/lr": 1e-6, "entropy/all/mean": 0.4, "ref_kl": -0.2}) + "\n" for step in range(1, 61))
    )
    (log,) = read_logs([trainer, orchestrator])
    assert log.steps[5].entropy_nats == 0.4
    assert log.steps[5].kl_nats == 0.2, "prime-rl logs teacher minus student"
    assert log.steps[5].length_mean_tokens is not None


def test_a_folder_of_checkpoints_is_its_newest_state(tmp_path: Path) -> None:
    for age, number in enumerate((30, 60)):
        folder = tmp_path / f"checkpoint-{number}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": trl_rows(collapse()[:number])}))
        os.utime(folder / "trainer_state.json", (1000 + age, 1000 + age))
    (log,) = read_logs([tmp_path])
    assert len(log.steps) == 60


HOSTILE = {
    "empty": b"",
    "blank": b"\n\n  \n",
    "zeros": bytes(5000),
    "noise": bytes(range(256)) * 64,
    "elf": b"\x7fELF" + bytes(range(256)) * 40,
    "deep": b"[" * 200_000,
    "deep object": b'{"a":' * 100_000,
    "prose": "Zwölf Boxkämpfer jagen Viktor quer über den Sylter Deich.\n".encode() * 50,
    "broken json": b'{"log_history": [{"step": 1, "loss',
    "no rows": b'{"a": 1, "b": "x"}',
    "null": b"null",
    "numbers": b"1\n2\n3\n",
    "huge number": b'{"step": ' + b"9" * 5000 + b', "completions/mean_length": 3}\n' * 3,
    "half gzip": gzip.compress(b"x" * 10000)[:40],
    "loss only": b"".join(b'{"step": %d, "loss": 0.5}\n' % step for step in range(30)),
    "nan only": b"".join(b'{"step": %d, "completions/mean_length": NaN, "loss": NaN}\n' % step for step in range(30)),
    "no events": b"\x18" + bytes(7) + b"\x00" * 4 + b"\x09" + bytes(200),
    "csv of words": b"a,b\nx,y\n" * 20,
    "wide": "nothing here\n".encode("utf-16"),
    "template": b"{{ cookiecutter }} {% raw %}\n" * 10,
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_what_cannot_be_diagnosed_is_one_line_and_exit_code_2(name: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(HOSTILE[name])
    result = CliRunner().invoke(app, ["diagnose", str(path)])
    assert result.exit_code == 2, result.output
    assert result.stderr.count("\n") == 1
    assert str(path) in result.stderr
    assert result.stdout == ""


def test_what_is_no_file_is_one_line(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "missing", tmp_path / "pipe", tmp_path / "empty-folder"):
        if path.name == "empty-folder":
            path.mkdir()
        with pytest.raises(LogError, match=str(path)):
            read_logs([path])


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.binary(max_size=400), seed=st.sampled_from(sorted(TRAINER)), at=st.floats(0, 1))
def test_bytes_put_into_a_log_never_crash_it(data: bytes, seed: str, at: float, tmp_path: Path) -> None:
    source = write_all(tmp_path, steady(8))[seed].read_bytes()
    place = int(at * len(source))
    path = tmp_path / "spoiled"
    path.write_bytes(source[:place] + data + source[place:])
    result = CliRunner().invoke(app, ["diagnose", str(path)])
    assert result.exit_code in (0, 1, 2), result.exception
    assert result.exit_code < 2 or result.stderr.count("\n") == 1


def test_exit_codes_and_json(tmp_path: Path) -> None:
    well, sick = tmp_path / "well", tmp_path / "sick"
    well.write_text(json.dumps({"log_history": trl_rows(steady())}))
    sick.write_text(json.dumps({"log_history": trl_rows(collapse())}))
    assert CliRunner().invoke(app, ["diagnose", str(well)]).exit_code == 0
    result = CliRunner().invoke(app, ["diagnose", str(well), str(sick), "--json"])
    assert result.exit_code == 1
    first, second = json.loads(result.stdout)
    assert (first["kind"], first["sick"]) == ("healthy", False)
    assert (second["kind"], second["sick"], second["trainer"]) == ("collapsed", True, "trl")
    assert second["governor"]["step"] <= second["since_step"] + 3
    assert second["advice"][0]["why"]


def test_the_picture_as_a_file(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(json.dumps({"log_history": trl_rows(collapse())}))
    (log,) = read_logs([path])
    draw(log, judge(log), tmp_path / "a.svg")
    assert b"<svg" in (tmp_path / "a.svg").read_bytes()
    with pytest.raises(LogError, match="cannot be written"):
        draw(log, judge(log), tmp_path / "a.nosuchformat")
