"""What a resumed run compares with its checkpoint."""

import json
from pathlib import Path
from typing import Any

import pytest

from opd_governor.services.inputs.prompts import open_prompts
from opd_governor.services.job.settings import Job, JobError
from opd_governor.services.run.reads import changes, refuse_other_run, what_it_reads
from opd_governor.services.run.sources import Sources
from tests.doors.models import save
from tests.services.inputs.test_prompts import job_of, write_lines
from tests.tiny import CHATML, build_tiny, tiny_tokenizer

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


def test_each_thing_that_a_run_reads_is_named_when_it_changes(tmp_path: Path) -> None:
    """Prompts, what teachers alone see of them, golden answers, answers, models, template, stop ids, objective: one at a time."""
    row = {"prompt": "one", "hint": "a", "golden": "b", "answer": "c"}
    models = {name: build_tiny(tmp_path / name, seed=seed) for name, seed in (("student", 1), ("teacher", 2), ("other", 3))}

    def reads(row: dict[str, str], student: str = "student", **groups: Any) -> dict[str, Any]:
        path = write_lines(tmp_path / "p.jsonl", [row])
        tree = {
            "name": "a", "student": {"model": str(models[student])}, "data": {"prompts": {"path": str(path)}},
            "teacher": {"model": str(models["teacher"]), "context": "{hint}"} | groups.pop("teacher", {}),
            "objective": {"reward": {"verifier": "exact", "baseline": "running"}} | groups.pop("objective", {}),
        } | groups  # fmt: skip
        job = Job.model_validate(tree)
        return json.loads(json.dumps(what_it_reads(job, Sources.read(job))))

    first = reads(row)
    assert changes(first, reads(row)) == []
    assert changes(first, reads(row | {"prompt": "two"}))[0] == "data.prompts (other content)"
    assert changes(first, reads(row | {"hint": "z"})) == ["data.prompts for teachers (other content)"]
    assert changes(first, reads(row | {"golden": "z"})) == ["golden answers of data.prompts (other content)"]
    assert changes(first, reads(row | {"answer": "z"})) == ["answers of data.prompts (other content)"]
    assert changes(first, reads(row, teacher={"system_prompt": "Be short."})) == ["data.prompts for teachers (other content)"]
    assert changes(first, reads(row, teacher={"weight": 2.0})) == ["teacher teacher weight (was 1.0, is 2.0)"]
    assert changes(first, reads(row, teacher={"model": str(models["other"])})) == ["teacher teacher (other content)"]
    assert changes(first, reads(row, "other")) == ["student.model (other content)"]
    assert changes(first, reads(row, rollout={"stop_token_ids": [3]})) == [
        "golden answers of data.prompts (other content)", "rollout.stop_token_ids (was [1], is [3])"
    ]  # fmt: skip
    assert changes(first, reads(row, objective={"clip_low": 0.1})) == ["objective.clip_low (was 0.2, is 0.1)"]
    save(models["student"], template=CHATML)
    assert "student.tokenizer (other content)" in changes(first, reads(row))
