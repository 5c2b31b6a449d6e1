"""The job file: strict, composed, and every mistake one line."""

from pathlib import Path

import pytest

from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import JobError

MINIMAL = "name: x\nstudent: {model: a}\nteacher: {model: b}\ndata: {prompts: {path: p.jsonl}}\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(text)
    return path


def test_a_minimal_job_needs_a_name_models_and_prompts(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL))
    assert (job.name, job.student.model, job.teacher[0].model) == ("x", "a", "b")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (MINIMAL + "learnr: {}\n", ["learnr: unknown key"]),
        (MINIMAL + "rollout: {temperature: 9}\n", ["rollout.temperature", "less than or equal to 2", "9"]),
        (MINIMAL + "governor: {max_golden_weight: 11}\n", ["governor.max_golden_weight", "11"]),
        (MINIMAL + "governor: {target_truncation: 0.1}\n", ["governor", "target_truncation is gone", "governor.length_factor"]),
        (MINIMAL + "preset: best\n", ["preset", "'plain-opd', 'stable-opd' or 'governed'", "'best'"]),
        (MINIMAL + "objective: {loss: forward_kl}\n", ["objective", "forward_kl needs a dense support"]),
        ("name: x\n", ["student: missing"]),
        ("- 1\n", ["expected keys and values"]),
        ("name: [\n", [":2: not YAML"]),
        ("name: x\nname: y\n", [":2: not YAML: key 'name' stands there twice"]),
        ("learner:\n  learning_rate: 1.0e-5\n  learning_rate: 1\n", [":3: not YAML: key 'learning_rate' stands there twice"]),
        ("[" * 5000, ["nested without end"]),
    ],
)
def test_a_mistake_is_one_line_with_path_value_and_remedy(tmp_path: Path, text: str, expected: list[str]) -> None:
    with pytest.raises(JobError) as caught:
        load_job(write(tmp_path, text))
    line = next(line for line in str(caught.value).split("\n") if expected[0] in line)
    assert all(part in line for part in expected)


def test_a_missing_file_is_one_line() -> None:
    with pytest.raises(JobError, match=r"nowhere\.yaml: No such file"):
        load_job(Path("nowhere.yaml"))


def test_overrides_reach_nested_keys_and_lists(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL), ("learner.total_steps=7", "rollout.stop_token_ids=[1, 2]", "teacher.name=big"))
    assert job.learner.total_steps == 7
    assert job.rollout.stop_token_ids == (1, 2)
    assert job.teacher[0].name == "big"


@pytest.mark.parametrize("override", ["learner", "=3", "name.deeper=1"])
def test_a_malformed_override_is_one_line(tmp_path: Path, override: str) -> None:
    with pytest.raises(JobError, match="--set"):
        load_job(write(tmp_path, MINIMAL), (override,))


def test_the_governor_is_turned_off_by_a_bare_off_which_yaml_reads_as_false(tmp_path: Path) -> None:
    path = write(tmp_path, MINIMAL)
    assert load_job(path, ["governor.mode=off"]).governor.mode == "off"


def test_a_preset_fills_what_the_file_leaves_open(tmp_path: Path) -> None:
    job = load_job(write(tmp_path, MINIMAL + "preset: stable-opd\nobjective: {golden_weight: 0.3}\n"))
    assert job.objective.golden_weight == 0.3
    assert job.objective.reference_kl_weight == 0.01
    assert job.governor.mode == "observe"


def test_paths_beside_the_job_file_are_resolved_and_ids_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").touch()
    (tmp_path / "a").mkdir()
    job = load_job(write(tmp_path, MINIMAL))
    assert job.data.prompts.path == str((tmp_path / "p.jsonl").resolve())
    assert job.student.model == str((tmp_path / "a").resolve())
    assert job.teacher[0].model == "b"


def test_teachers_need_names_of_their_own(tmp_path: Path) -> None:
    text = MINIMAL.replace("teacher: {model: b}", "teacher: [{model: b}, {model: c}]")
    with pytest.raises(JobError, match="names of their own"):
        load_job(write(tmp_path, text))


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "deploy/jobs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_job_that_ships_is_valid(path: Path) -> None:
    assert load_job(path).name
