"""What `opd check` says of a teacher that a server has."""

from pathlib import Path

import pytest

from opd_governor.actors.teacher.probe import ServerError
from opd_governor.services.inputs.check_servers import check_server
from opd_governor.services.inputs.resolve import ModelFacts, student_facts
from opd_governor.services.job.settings import Job
from tests.teacher.sglang_server import sglang_server
from tests.tiny import build_tiny


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> ModelFacts:
    folder = build_tiny(tmp_path_factory.mktemp("models") / "student")
    return student_facts(job_of("http://127.0.0.1:9", str(folder)).student)


def job_of(url: str, student: str = "student", **groups: object) -> Job:
    teacher = {"model": "big", "name": "far", "backend": "http", "url": url}
    data = {"prompts": {"path": "p.jsonl"}}
    return Job.model_validate({"name": "x", "student": {"model": student}, "teacher": teacher, "data": data} | groups)


def said(job: Job, student: ModelFacts) -> dict[str, str]:
    return {found.name: f"{found.status}: {found.line()}" for found in check_server(job.teacher[0], student, job)}


def test_an_sglang_server_is_probed(student: ModelFacts) -> None:
    with sglang_server() as url:
        found = said(job_of(url), student)
    assert found["teacher server far"].startswith(f"pass: {url}: ")
    assert "SGLang" in found["teacher server far"]
    assert found["teacher window far"].startswith("warn: teacher far: the server's window is 64 tokens, rollout.max_new_tokens 256")


def test_a_server_that_is_not_there_is_a_failure_with_the_remedy(student: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd_governor.services.inputs.check_servers.PAUSE_S", 0.0)
    (line,) = said(job_of("http://127.0.0.1:9"), student).values()
    assert line.startswith("fail: http://127.0.0.1:9: no answer: ")
    assert line.endswith("start the server, or correct teacher.url")
    assert "\n" not in line


def test_whatever_a_probe_raises_is_one_line(student: ModelFacts, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*terms: object) -> None:
        raise AttributeError("'int' object has no attribute 'get'\nat all")

    monkeypatch.setattr("opd_governor.services.inputs.check_servers.probe", broken)
    (line,) = said(job_of("http://127.0.0.1:9"), student).values()
    assert (
        line == "fail: teacher far: http://127.0.0.1:9: its answer to a probe: 'int' object has no attribute 'get' at all; look at its log"
    )


def test_a_tokenizer_that_raises_on_foreign_letters_is_compared_on_what_it_can_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums' tokenizer knows 33 characters and has no unknown token: accents and CJK raise."""
    job = job_of("http://127.0.0.1:9", str(Path(__file__).parents[3] / "deploy/sums/student"))
    asked: list[str] = []

    def note(settings: object, stop_ids: object, texts: dict[str, list[int]]) -> None:
        asked.extend(texts)
        raise ServerError("enough")

    monkeypatch.setattr("opd_governor.services.inputs.check_servers.PAUSE_S", 0.0)
    monkeypatch.setattr("opd_governor.services.inputs.check_servers.probe", note)
    (line,) = said(job, student_facts(job.student)).values()
    assert line == "fail: enough"
    assert not any("Grüße" in text for text in asked)
