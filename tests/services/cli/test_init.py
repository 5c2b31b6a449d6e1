"""`opd init` writes a job file that `opd check` passes, asks on a terminal, and never overwrites."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from opd_governor.services.cli.app import app
from opd_governor.services.cli.init import scalar, slug, window_for
from opd_governor.services.job.load import load_job
from tests.tiny import ARCHITECTURES, Architecture, build_tiny


def write_rows(path: Path, *rows: dict[str, object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with two questions in prompts.jsonl and their answers in heldout.jsonl."""
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "prompts.jsonl", {"id": 1, "question": "What is 1+1?"}, {"id": 2, "question": "And 2 + 2, then?"})
    write_rows(tmp_path / "heldout.jsonl", {"question": "What is 3+3?", "answer": "6"})
    return tmp_path


def build_pair(folder: Path, architecture: Architecture = "llama", **options: object) -> None:
    build_tiny(folder / "student", architecture, seed=1, **options)  # type: ignore[arg-type]
    build_tiny(folder / "teacher", architecture, seed=2, **options)  # type: ignore[arg-type]


def opd(*arguments: str) -> Result:
    return CliRunner().invoke(app, arguments)


def opd_init(*arguments: str) -> Result:
    return opd("init", "--student", "student", "--teacher", "teacher", "--prompts", "prompts.jsonl", *arguments)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_check_passes_on_what_was_written(folder: Path, architecture: Architecture) -> None:
    build_pair(folder, architecture, chat=True)
    written = opd_init("--eval", "heldout.jsonl", "--steps", "7")
    assert written.exit_code == 0, written.output
    job = load_job(folder / "job.yaml")
    assert (job.data.prompts.column, job.data.prompts.chat, job.learner.total_steps) == ("question", True, 7)
    assert job.rollout.max_model_len is not None
    assert job.rollout.max_new_tokens < job.rollout.max_model_len <= 256
    checked = opd("check", "job.yaml", "--json")
    assert checked.exit_code == 0
    assert {found["status"] for found in json.loads(checked.output)} == {"pass"}, checked.output


def test_the_file_says_what_was_found_in_models_and_prompts(folder: Path) -> None:
    build_pair(folder, eos=[1, 3])
    assert opd_init().exit_code == 0
    text = (folder / "job.yaml").read_text()
    assert "2 prompts, the longest 16 tokens" in text
    assert "1 '<eos>' (generation_config, config, tokenizer), 3 '<|im_end|>' (generation_config, config)" in text


def test_messages_need_no_chat_key(folder: Path) -> None:
    build_pair(folder, chat=True)
    write_rows(folder / "prompts.jsonl", {"source": "a", "messages": [{"role": "user", "content": "Hello"}]})
    assert opd_init().exit_code == 0
    prompts = load_job(folder / "job.yaml").data.prompts
    assert (prompts.column, prompts.chat) == ("messages", False)


def test_paths_are_seen_from_the_folder_of_the_job_file(folder: Path) -> None:
    build_pair(folder)
    (folder / "jobs").mkdir()
    assert opd_init("--out", "jobs/mine.yaml").exit_code == 0
    assert "model: ../student\n" in (folder / "jobs/mine.yaml").read_text()
    assert load_job(folder / "jobs/mine.yaml").data.prompts.path == str(folder / "prompts.jsonl")


def test_an_existing_file_is_never_overwritten(folder: Path) -> None:
    (folder / "job.yaml").write_text("mine")
    refused = opd_init()
    assert (refused.exit_code, refused.stderr) == (2, "opd: --out job.yaml: exists already; choose another file\n")
    assert (folder / "job.yaml").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--prompts", "none.jsonl"), 2, "none.jsonl: no such file"),
        (("--student", "./none"), 2, "model ./none: no such folder"),
        (("--column", "nothing"), 2, "prompts.jsonl:1: no column 'nothing'"),
        (("--max-new-tokens", "0"), 2, "--max-new-tokens"),
        (("--max-new-tokens", "900"), 2, "--max-new-tokens 900: the window leaves "),
        (("--name", "My Run"), 2, "name: String should match"),
        (("--teacher", ""), 2, "--teacher: empty; name one"),
        (("--out", "none/job.yaml"), 3, "none/job.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(folder: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    build_pair(folder)
    refused = opd_init(*arguments)
    assert refused.exit_code == code
    assert words in refused.stderr
    assert not (folder / "job.yaml").exists()


def test_the_next_command_can_be_pasted_where_the_path_has_a_space(folder: Path) -> None:
    build_pair(folder)
    assert "next: opd run 'my job.yaml'\n" in opd_init("--out", "my job.yaml").output


def test_without_a_terminal_what_is_missing_is_named() -> None:
    refused = opd("init", "--student", "student")
    assert (refused.exit_code, refused.stderr) == (2, "opd: --teacher: missing; give it, or run opd init on a terminal\n")


def test_a_job_that_check_refuses_is_written_and_its_failure_said(folder: Path) -> None:
    build_pair(folder)
    answered = opd_init("--eval", "heldout.jsonl", "--verifier", "judge.py:is_right")
    assert answered.exit_code == 2
    assert "judge.py" in answered.output
    assert "job.yaml is written; mend it" in answered.output


def test_on_a_terminal_it_asks_for_what_was_not_given(folder: Path) -> None:
    build_pair(folder, chat=True)
    terminal, its_end = os.openpty()
    process = subprocess.Popen([sys.executable, "-m", "opd_governor", "init"], stdin=its_end, stdout=subprocess.PIPE, text=True)
    os.close(its_end)
    # student, teacher, prompts, column, chat, cap, held-out file, steps
    os.write(terminal, b"student\nteacher\nprompts.jsonl\n\nn\n100\nheldout.jsonl\n9\n")
    said, _ = process.communicate(timeout=120)
    os.close(terminal)
    assert process.returncode == 0, said
    assert "Column with the prompt (id, question) [question]" in said
    job = load_job(folder / "job.yaml")
    assert (job.data.prompts.chat, job.rollout.max_new_tokens, job.learner.total_steps) == (False, 100, 9)
    assert job.data.eval.path == str(folder / "heldout.jsonl")


@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"])))
def test_any_name_is_one_line_of_yaml_that_reads_as_itself(value: str) -> None:
    assert "\n" not in scalar(value)
    assert yaml.safe_load(f"key: {scalar(value)}  # a comment")["key"] == value


@given(st.text())
def test_a_name_made_from_a_model_is_one_that_a_job_takes(model: str) -> None:
    name = slug(model)
    assert 1 <= len(name) <= 63
    assert name[0].isalnum()
    assert name[-1].isalnum()
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def test_the_window_is_rounded_up_to_what_the_models_have() -> None:
    assert window_for(130, 1024) == 256
    assert window_for(1000, 1000) == 1000
