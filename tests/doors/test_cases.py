"""Every case of the table through `opd check`: its exit code, and the words that must stand in what it prints."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from opd_governor.services.cli.app import app
from tests.doors.cases import CHAT, HELD_OUT, JOB, READING, ROWS, Case
from tests.doors.models import MODELS, students
from tests.doors.tasks import TASKS
from tests.tiny import build_tiny

TABLE = [*READING, *ROWS, *CHAT, *HELD_OUT, *JOB, *MODELS, *TASKS]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Students by the kind of their tokenizer, and a teacher."""
    root = tmp_path_factory.mktemp("models")
    return students(root) | {"teacher": build_tiny(root / "teacher", seed=2)}


@pytest.mark.parametrize("case", TABLE, ids=lambda case: case.name)
def test_a_case_is_taken_or_refused_in_one_line(
    case: Case, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPD_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    models = {name: shutil.copytree(folders[name], tmp_path / name) for name in (case.student, "teacher")}
    tree: dict[str, Any] = {
        "name": "case",
        "student": {"model": str(models[case.student])},
        "teacher": {"model": str(models["teacher"])},
        "data": {"prompts": {"path": str(tmp_path / "prompts.jsonl")}},
        "rollout": {"max_new_tokens": 32},
    }
    case.write(tmp_path, tree)
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    answer = CliRunner().invoke(app, ["check", str(tmp_path / "job.yaml"), "--json", "--out", str(tmp_path / "run")])
    assert answer.exception is None or isinstance(answer.exception, SystemExit), answer.exception
    said = told(answer.stdout) if answer.stdout.startswith("[") else answer.stderr
    assert answer.exit_code == case.code, said
    assert "Traceback" not in said
    for words in case.words:
        assert words in said, said


def told(output: str) -> str:
    """What the findings say, a line each; none of them may hold a line break."""
    findings = json.loads(output)
    for finding in findings:
        assert "\n" not in finding["detail"] + finding["remedy"], finding
    return "\n".join(f"{finding['detail']}; {finding['remedy']}" if finding["remedy"] else finding["detail"] for finding in findings)


def test_no_case_has_the_name_of_another() -> None:
    assert len({case.name for case in TABLE}) == len(TABLE)
