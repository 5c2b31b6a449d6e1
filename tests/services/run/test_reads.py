"""What a resumed run compares with its checkpoint."""

import json
from pathlib import Path

import pytest

from opd_governor.services.inputs.prompts import open_prompts
from opd_governor.services.job.settings import JobError
from opd_governor.services.run.reads import changes, refuse_other_run
from tests.services.inputs.test_prompts import job_of, write_lines
from tests.tiny import tiny_tokenizer

READS = {"data.prompts": "a", "student.model": "b", "teacher t": "c", "objective.loss": "reverse_kl"}


def checkpoint(root: Path, step: int, state: dict) -> None:
    folder = root / f"step-{step}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps(state))


def test_what_changed_is_named_with_both_values_where_they_mean_something() -> None:
    now = READS | {"data.prompts": "x", "objective.loss": "forward_kl", "objective.new_key": 1}
    del now["teacher t"]
    assert changes(READS, READS) == []
    assert changes(READS, now) == ["data.prompts (other content)", "objective.loss (was reverse_kl, is forward_kl)", "teacher t (gone)"]


def test_another_run_is_refused_until_it_is_accepted(tmp_path: Path) -> None:
    checkpoint(tmp_path, 9, {"reads": {"data.prompts": "old"}})
    checkpoint(tmp_path, 10, {"reads": READS})
    assert refuse_other_run(tmp_path, READS, accept=False) == []
    with pytest.raises(JobError, match=r"^--resume: .*student.model \(other content\); .* --accept-changes"):
        refuse_other_run(tmp_path, READS | {"student.model": "x"}, accept=False)
    assert refuse_other_run(tmp_path, READS | {"student.model": "x"}, accept=True) == ["student.model (other content)"]


def test_checkpoints_from_before_and_torn_ones_are_no_hindrance(tmp_path: Path) -> None:
    assert refuse_other_run(tmp_path, READS, accept=False) == []
    checkpoint(tmp_path, 1, {})
    assert refuse_other_run(tmp_path, READS, accept=False) == []
    (tmp_path / "step-2").mkdir()
    (tmp_path / "step-2/state.json").write_text("{")
    assert refuse_other_run(tmp_path, READS, accept=False) == []


def test_a_prompt_file_that_moved_is_the_same_and_one_that_changed_is_not(tmp_path: Path) -> None:
    def digest(name: str, texts: list[str]) -> str:
        path = write_lines(tmp_path / name, [{"prompt": text} for text in texts])
        return open_prompts(job_of(path), tiny_tokenizer(), 256).digest()

    assert digest("a.jsonl", ["one", "two"]) == digest("b.jsonl", ["one", "two"])
    assert len({digest("c.jsonl", texts) for texts in (["one", "two"], ["two", "one"], ["onet", "wo"], ["one", "two", "x"])}) == 4
