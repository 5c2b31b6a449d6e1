"""`opd replay`: the record against the law, and against another policy."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from opd_governor.services.cli.app import app
from tests.governor.test_governor import governor_of, reading, write_records

LENIENT = "false_alarm_steps: 1.0e9\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """Three decisions, pressure rising."""
    write_records(tmp_path, governor_of(reading(1), reading(2, long=10), reading(3, long=20)), 3)
    return tmp_path


def replay(*words: object) -> Result:
    return CliRunner().invoke(app, ["replay", *map(str, words)])


def test_an_untouched_record_is_what_the_law_says(run_dir: Path) -> None:
    assert replay(run_dir).output == "3 decisions: every one is what the law says, bit for bit\n"


@pytest.mark.parametrize("text", [LENIENT, "governor:\n  " + LENIENT.replace("\n", "\n  ").rstrip() + "\nname: sums\n"])
def test_another_policy_shows_where_it_would_have_parted(run_dir: Path, text: str) -> None:
    policy = run_dir / "policy.yaml"
    policy.write_text(text)
    lines = replay(run_dir, "--policy", policy).output.splitlines()
    assert lines[-2].startswith("step 3: recorded ")
    assert "replayed " in lines[-2]
    assert lines[-1].endswith(" of 3 decisions differ")
    rows = json.loads(replay(run_dir, "--policy", policy, "--json").output)
    assert rows[2]["recorded"]["pressure"] > rows[2]["replayed"]["pressure"] == 0
    assert "pressure" in rows[2]["differences"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "No such file"),
        ("a: [", "not YAML"),
        ("false_alarm_steps: 7", "false_alarm_steps: "),
        ("target_truncation: 0.1", "target_truncation is gone: governor.length_factor"),
        ("targett: 1", "targett: unknown key"),
    ],
)
def test_a_policy_that_cannot_be_read_is_one_line(run_dir: Path, text: str | None, said: str) -> None:
    policy = run_dir / "policy.yaml"
    if text is not None:
        policy.write_text(text)
    result = replay(run_dir, "--policy", policy)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert said in result.stderr


def test_a_directory_without_decisions_is_one_line(tmp_path: Path) -> None:
    result = replay(tmp_path)
    assert result.exit_code == 2
    assert "decisions.jsonl" in result.stderr


def test_one_step_explained_names_every_signal_its_evidence_and_the_limits(run_dir: Path) -> None:
    text = replay(run_dir, "--explain", 3).output
    assert text.startswith("step 3, enforce: tighten")
    assert "a healthy run shows this once in" in text
    for name in ("length", "tail", "short"):
        assert f"\n{name} " in text
    assert "learning rate x " in text
    missing = replay(run_dir, "--explain", 9)
    assert (missing.exit_code, missing.stderr.splitlines()) == (
        2,
        ["opd: --explain 9: no decision of that step among 3; give the step of one"],
    )
