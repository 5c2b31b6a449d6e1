"""A run never loads a pickle, runs a model's code unasked, writes outside its directory, stores a secret, or lets others read its files."""

import ast
import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from opd_governor.actors.causal_lm import CausalLM
from opd_governor.services.inputs.models import config_of, resolve_model
from opd_governor.services.inputs.preflight import check
from opd_governor.services.inputs.resolve import resolve
from opd_governor.services.job.load import load_job
from opd_governor.services.job.settings import JobError
from opd_governor.services.record.rundir import RunDirectory
from tests.tiny import build_tiny

ROOT = Path(__file__).parents[2]
MINIMAL = "name: {name}\nstudent: {{model: {model}}}\nteacher: {{model: {model}{teacher}}}\ndata: {{prompts: {{path: p.jsonl}}}}\n"


def job_file(folder: Path, name: str = "x", model: str = "a", teacher: str = "", more: str = "") -> Path:
    path = folder / "job.yaml"
    path.write_text(MINIMAL.format(name=json.dumps(name), model=json.dumps(model), teacher=teacher) + more)
    return path


WIRE = ROOT / "actors/wire.py"
"""What actors of one run send each other inside Ray's own messages, which are pickles themselves: nothing comes in from outside."""


def test_no_line_of_the_service_unpickles_what_comes_from_outside_or_evaluates() -> None:
    """torch.load, pickle, marshal, shelve, eval, exec, yaml's unsafe loaders, allow_pickle: none is called or imported."""
    forbidden = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec", "torch.hub.load"}
    for path in [file for folder in ("actors", "services") for file in (ROOT / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in forbidden, f"{path}:{node.lineno}"
                assert not any(word.arg == "allow_pickle" for word in node.keywords), f"{path}:{node.lineno}"
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.split(".")[0] for alias in node.names} | {(getattr(node, "module", None) or "").split(".")[0]}
                assert path == WIRE or not names & {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}, f"{path}:{node.lineno}"


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


def test_a_model_of_pickled_weights_is_refused_and_never_opened(tmp_path: Path) -> None:
    folder, marker = build_tiny(tmp_path / "model"), tmp_path / "exploded"
    (folder / "model.safetensors").unlink()
    torch.save({"bomb": Bomb(marker)}, folder / "pytorch_model.bin")
    with pytest.raises(JobError, match=r"no \.safetensors file"):
        resolve_model(str(folder))
    with pytest.raises(OSError, match="safetensors"):
        CausalLM(str(folder))
    assert not marker.exists()


def test_a_pickle_beside_safetensors_is_left_alone(tmp_path: Path) -> None:
    folder, marker = build_tiny(tmp_path / "model"), tmp_path / "exploded"
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    torch.save({"bomb": Bomb(marker)}, folder / "pytorch_model.bin")
    found = CausalLM(str(folder)).model.state_dict()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert not marker.exists()


def model_with_code(tmp_path: Path) -> tuple[Path, Path]:
    folder, marker = build_tiny(tmp_path / "model"), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own-kind", "auto_map": auto_map}))
    (folder / "own.py").write_text(
        f"from pathlib import Path\nfrom transformers import LlamaConfig, LlamaForCausalLM\nPath({str(marker)!r}).touch()\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own-kind'\nclass OwnModel(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder, marker


def test_a_models_own_code_runs_only_where_the_job_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = model_with_code(tmp_path)
    job = load_job(job_file(tmp_path, model=str(folder)))
    assert not job.student.trust_remote_code
    assert not job.teacher[0].trust_remote_code
    failed = [line for line in check(job, tmp_path / "run") if line.status == "fail"]
    assert any("custom code" in line.detail for line in failed), failed
    with pytest.raises(ValueError, match=r"trust_remote_code|own-kind"):
        CausalLM(str(folder))
    assert not marker.exists()
    config_of(str(folder), trust_remote_code=True)
    assert marker.exists()


def test_a_run_trusts_a_models_own_code_where_its_check_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = model_with_code(tmp_path)
    job = load_job(job_file(tmp_path, model=str(folder)))
    with pytest.raises((JobError, ValueError, OSError), match=r"trust_remote_code|custom code|own-kind"):
        resolve(job)
    assert not marker.exists()
    trusting = job.model_copy(
        update={
            "student": job.student.model_copy(update={"trust_remote_code": True}),
            "teacher": [teacher.model_copy(update={"trust_remote_code": True}) for teacher in job.teacher],
        }
    )
    models, _ = resolve(trusting)
    assert marker.exists()
    assert models.context_tokens > 0
    assert models.stop_ids


@pytest.mark.parametrize("name", ["../x", "a/b", "/etc", "..", ".", "a\n", "A", "-a", "", "a" * 64, "a b", "a\0"])
def test_a_name_that_could_leave_a_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = job_file(tmp_path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"name": name}))
    with pytest.raises(JobError, match="name: "):
        load_job(path)


@pytest.mark.parametrize(
    ("teacher", "more", "field"),
    [
        (", backend: http, url: 'http://user:hunter2@host:8000'", "", "teacher.0.url"),
        ("", "service: {prometheus_url: 'https://hunter2@host'}\n", "service.prometheus_url"),
    ],
)
def test_an_address_with_a_password_is_refused_without_repeating_it(tmp_path: Path, teacher: str, more: str, field: str) -> None:
    with pytest.raises(JobError) as caught:
        load_job(job_file(tmp_path, teacher=teacher, more=more))
    assert field in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_no_secret_of_the_environment_reaches_job_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ("OPD_TOKEN", "VLLM_API_KEY", "HF_TOKEN", "WANDB_API_KEY", "MLFLOW_TRACKING_PASSWORD")
    for name in names:
        monkeypatch.setenv(name, "hunter2")
    directory = RunDirectory(tmp_path / "run", resume=False)
    directory.write_job(load_job(job_file(tmp_path, teacher=", backend: http, url: 'http://host:8000'")))
    assert "hunter2" not in (tmp_path / "run/job.yaml").read_text()
