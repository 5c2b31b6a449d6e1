import json
import socket
from dataclasses import replace
from pathlib import Path

import pytest

from opd_governor.actors.teacher.backends import TEACHER_BACKENDS
from opd_governor.services.inputs.preflight import check, exit_code, failures, render
from opd_governor.services.job.settings import Job
from tests.tiny import build_tiny


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Folders: student, teacher (alike), end_of_turn (stops on another id), wide (a larger vocabulary), chat (with a template)."""
    root = tmp_path_factory.mktemp("models")
    build_tiny(root / "student", seed=0)
    build_tiny(root / "teacher", seed=1)
    build_tiny(root / "end_of_turn", eos=3)
    build_tiny(root / "wide", extra=("é",))
    build_tiny(root / "chat", chat=True, eos=3)
    return root


@pytest.fixture
def job(models, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "1+1?", "answer": "2"}\n')

    def build(student="student", teacher=None, **groups) -> Job:
        groups["rollout"] = {"max_new_tokens": 64} | groups.get("rollout", {})
        groups["data"] = {"prompts": {"path": str(prompts)}} | groups.get("data", {})
        teachers = teacher if isinstance(teacher, list) else [teacher or {}]
        teachers = [{"model": str(models / "teacher")} | t for t in teachers]
        return Job.model_validate({"name": "test", "student": {"model": str(models / student)}, "teacher": teachers} | groups)

    return build


def found(checks, name: str):
    (one,) = [c for c in checks if c.name == name]
    return one


def test_a_sound_job_passes_every_check(job, tmp_path):
    checks = check(job(), tmp_path / "run")
    assert {c.status for c in checks} == {"pass"}
    assert (failures(checks), exit_code(checks)) == ([], 0)
    assert not (tmp_path / "run").exists()
    assert "1 prompts" in render(checks)
    assert json.loads(json.dumps([c.to_json() for c in checks]))[0]["name"] == "output folder"


def test_a_teacher_with_more_tokens_is_fine_where_all_of_the_student_s_agree(job, models, tmp_path):
    checks = check(job(teacher={"model": str(models / "wide")}), tmp_path)
    assert found(checks, "tokenizer teacher").detail == "the same 85 tokens; the teacher has 1 more, which the student never writes"
    assert exit_code(checks) == 0


def test_models_that_stop_on_different_ids_get_a_warning_that_names_both(job, models, tmp_path):
    checks = check(job(teacher={"model": str(models / "end_of_turn"), "name": "chatty"}), tmp_path)
    stops = found(checks, "stop ids chatty")
    assert stops.status == "warn"
    assert "1 '<eos>'" in stops.detail
    assert "3 '<|im_end|>'" in stops.detail
    assert exit_code(checks) == 0

    raw = check(job(teacher={"model": str(models / "end_of_turn")}, objective={"stop_event": "raw"}), tmp_path)
    assert "set objective.stop_event to class" in found(raw, "stop ids teacher").remedy
    chosen = check(job(teacher={"model": str(models / "end_of_turn")}, rollout={"stop_token_ids": [1, 3]}), tmp_path)
    assert found(chosen, "stop ids teacher").status == "pass"


def test_failures_are_one_line_each_that_names_the_field_and_the_remedy(job, models, tmp_path):
    def failed(**groups):
        checks = check(job(**groups), groups.pop("out", tmp_path))
        lines = failures(checks)
        assert all("\n" not in line for line in lines)
        assert exit_code(checks) == 3
        return "\n".join(lines)

    assert "student.model: model" in failed(student="./absent")
    assert "teacher teacher: model: model" in failed(teacher={"model": str(models)})
    assert "id 85 is 'é' for the student and nothing for the teacher" in failed(student="wide", teacher={"tokenizer": "same"})
    chat = {"prompts": {"path": "unused.jsonl", "chat": True}}
    assert "data.prompts.chat: the student's tokenizer has no chat template" in failed(data=chat)
    assert "service.prometheus_url http://127.0.0.1:9" in failed(service={"prometheus_url": "http://127.0.0.1:9"})
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"service.port: 127.0.0.1:{port} is in use" in failed(service={"port": port})


def test_a_vllm_teacher_without_a_gpu_takes_small_vocabularies_only(job, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert failures(check(job(teacher={"backend": "vllm"}, objective={"support": "student"}), tmp_path)) == []
    monkeypatch.setitem(TEACHER_BACKENDS._parts, "vllm", replace(TEACHER_BACKENDS["vllm"], cpu_vocabulary=84))
    (line,) = failures(check(job(teacher={"backend": "vllm"}), tmp_path))
    assert line.endswith("takes at most 84 tokens of vocabulary, not 85; set its backend to torch")


def test_a_server_must_be_able_to_score_given_ids(job, tmp_path):
    checks = check(job(teacher={"backend": "http", "url": "http://127.0.0.1:9"}, objective={"support": "student"}), tmp_path)
    assert found(checks, "teacher support").status == "warn"
    assert "--max-logprobs -1" in found(checks, "teacher support").remedy


def test_a_folder_that_cannot_be_written_is_named(job, tmp_path):
    (tmp_path / "file").touch()
    checks = check(job(), tmp_path / "file" / "run")
    assert failures(checks)[0].startswith(f"--out {tmp_path}/file/run: ")
    assert exit_code(checks) == 3


@pytest.mark.parametrize(
    ("groups", "said"),
    [
        ({"data": {"prompts": {"path": "absent.jsonl"}}}, "data.prompts: absent.jsonl: no such file"),
        ({"data": {"eval": {"path": "absent.jsonl"}}}, "absent.jsonl: no such file"),
        (
            {"objective": {"golden_weight": 0.1}, "data": {"golden": {"enabled": False}}},
            "objective.golden_weight: 0.1 needs golden answers",
        ),
        ({"teacher": {"backend": "http"}}, "backend http needs a url"),
        ({"teacher": [{"name": "a"}, {"name": "b"}], "objective": {"support": "full"}}, "objective.support: full needs one teacher"),
    ],
)
def test_mistakes_in_the_job_s_own_files_have_a_code_of_their_own(job, tmp_path, groups, said):
    checks = check(job(**groups), tmp_path)
    assert said in failures(checks)[0]
    assert exit_code(checks) == 2


def test_compiled_layers_without_a_compiler_are_warned_of(job, tmp_path, monkeypatch):
    asked = job(learner={"compile": True})
    monkeypatch.setattr("opd_governor.services.inputs.check_machine.shutil.which", lambda name: f"/bin/{name}")
    assert "compiler" not in {c.name for c in check(asked, tmp_path)}
    monkeypatch.setattr("opd_governor.services.inputs.check_machine.shutil.which", lambda name: None)
    warning = found(check(asked, tmp_path), "compiler")
    assert warning.status == "warn"
    assert "learner.compile: true, and none of" in warning.detail


def test_an_eval_file_is_checked_with_its_verifier(job, tmp_path):
    path = tmp_path / "eval.jsonl"
    path.write_text('{"prompt": "1+1?", "answer": "(2"}\n')
    assert found(check(job(data={"eval": {"path": str(path)}}), tmp_path), "evaluation").status == "pass"
    for verifier, said in (("regex", "answer '(2' is no regular expression"), ("no.such:f", "does not load")):
        evaluation = found(check(job(data={"eval": {"path": str(path), "verifier": verifier}}), tmp_path), "evaluation")
        assert (evaluation.status, evaluation.exit_code) == ("fail", 2)
        assert said in evaluation.detail


def test_every_domain_needs_a_teacher(job, tmp_path):
    prompts = tmp_path / "domains.jsonl"
    prompts.write_text('{"prompt": "a", "domain": "maths"}\n{"prompt": "b", "domain": "law"}\n')
    teachers = [{"name": "one", "domains": ["maths"]}, {"name": "two", "domains": ["code"]}]
    checks = check(job(teacher=teachers, data={"prompts": {"path": str(prompts)}}), tmp_path)
    assert failures(checks) == [f"{prompts}:2: no teacher has domain 'law'; add it to a teacher's domains (they have code, maths)"]
    anything = check(job(teacher=[*teachers, {"name": "all"}], data={"prompts": {"path": str(prompts)}}), tmp_path)
    assert failures(anything) == []


def test_a_window_that_cuts_the_cap_is_a_warning_and_names_refused_prompts(job, tmp_path):
    prompts = tmp_path / "long.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": "x" * n}) + "\n" for n in (200, 250)))
    checks = check(job(data={"prompts": {"path": str(prompts)}}, rollout={"max_new_tokens": 64}), tmp_path)
    assert found(checks, "context window").status == "warn"
    assert f"{prompts}:2: 250 tokens leave 6 of 256" in found(checks, "prompts").detail
    assert exit_code(checks) == 0


def test_pad_and_eos_of_one_token_are_told(job, models, tmp_path):
    folder = build_tiny(tmp_path / "padded")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"pad_token": "<eos>"}))
    assert "1 '<eos>'" in found(check(job(student=str(folder)), tmp_path), "pad token").detail


def test_a_strict_job_is_told_what_stands_against_an_exact_resume(job, tmp_path):
    strict = {"rollout": {"max_staleness": 0}}
    assert found(check(job(**strict), tmp_path), "exact resume").status == "pass"
    assert "exact resume" not in {c.name for c in check(job(), tmp_path)}
    server = {"backend": "http", "url": "http://127.0.0.1:1", "name": "far"}
    told = found(check(job(teacher=server, service={"prometheus_url": "http://127.0.0.1:1"}, **strict), tmp_path), "exact resume")
    assert told.status == "warn"
    assert "teacher far is a server" in told.detail
    assert "Prometheus server" in told.detail


def test_a_teacher_with_another_vocabulary_is_compared_by_bytes_and_check_says_so(job, models, tmp_path):
    one = found(check(job(student="wide"), tmp_path), "tokenizer teacher")
    assert one.status == "pass"
    assert "id 85 is 'é' for the student and nothing" in one.detail
    assert "compared by bytes, 99% of the student's tokens are single tokens there too" in one.detail
    own = found(check(job(teacher={"tokenizer": "own"}), tmp_path), "tokenizer teacher")
    assert own.detail.startswith("teacher teacher reads tokens of its own: compared by bytes")
    dense = found(check(job(student="wide", objective={"support": "teacher"}), tmp_path), "tokenizer teacher")
    assert (dense.status, dense.remedy.partition(":")[0]) == ("warn", "set objective.tail_bucket")
    full = check(job(student="wide", objective={"support": "full"}), tmp_path)
    assert "needs one vocabulary" in found(full, "tokenizer teacher").line()
    assert exit_code(full) == 3


def test_a_servers_teacher_is_compared_by_the_tokenizer_that_the_job_names(job, models, tmp_path):
    server = {"backend": "http", "url": "http://127.0.0.1:9", "model": "served"}
    one = found(check(job(teacher=server | {"tokenizer": str(models / "wide")}), tmp_path), "tokenizer teacher")
    assert (one.status, "compared by bytes" in one.detail) == ("pass", True)
    absent = failures(check(job(teacher=server | {"tokenizer": "own", "model": "./absent"}), tmp_path))
    assert any("teacher teacher tokenizer ./absent" in line for line in absent)


def test_a_reward_is_checked_with_its_group_its_verifier_and_its_answers(job, tmp_path):
    def rewarded(samples: int = 2, verifier: str = "number", prompts: str | None = None, **reward):
        data = {}
        if prompts is not None:
            (tmp_path / "own.jsonl").write_text(prompts)
            data = {"prompts": {"path": str(tmp_path / "own.jsonl")}}
        built = job(objective={"reward": {"verifier": verifier} | reward}, rollout={"samples_per_prompt": samples}, data=data)
        checks = check(built, tmp_path / "run")
        return failures(checks), exit_code(checks)

    assert rewarded() == ([], 0)
    assert rewarded(samples=1, baseline="running") == ([], 0)
    (alone,), code = rewarded(samples=1)
    assert alone == (
        "objective.reward.baseline: group compares the samples of a prompt, and rollout.samples_per_prompt is 1; "
        "set it to 2 or more, or baseline to running"
    )
    assert code == 2
    (missing,), code = rewarded(prompts='{"prompt": "1+1?"}\n')
    assert missing.endswith("own.jsonl:1: no column 'answer' to verify against; add it, set answer_column or unset objective.reward")
    assert code == 2
    (unread,), _ = rewarded(prompts='{"prompt": "1+1?", "answer": "two"}\n')
    assert unread.endswith("own.jsonl:1: answer 'two' holds no number; mend it, or choose another verifier")
    (schema,), _ = rewarded(verifier="json-schema", prompts='{"prompt": "1+1?", "answer": "{"}\n')
    assert "own.jsonl:1: answer '{' is no JSON" in schema
    (unknown,), code = rewarded(verifier="numbr")
    assert unknown.startswith("objective.reward.verifier numbr: expected exact, regex, number")
    assert code == 2
