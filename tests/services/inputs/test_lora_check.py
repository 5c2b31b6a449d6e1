"""Which students can have an addition and what it trains, told before anything starts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd_governor.actors.causal_lm import CausalLM
from opd_governor.actors.learner.lora import adapter_names, add_lora, write_adapter
from opd_governor.actors.learner.settings import LoraSettings
from opd_governor.services.inputs.check_machine import check_disk
from opd_governor.services.inputs.check_models import check_student
from opd_governor.services.inputs.checks import Check, exit_code
from opd_governor.services.inputs.lora import check_lora
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.job.settings import Job
from tests.tiny import Architecture, build_tiny, tiny_tokenizer

LAYERS = "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj"


def found(folder: Path, lora: dict[str, Any] | None, **groups: dict[str, Any]) -> list[Check]:
    given: dict[str, Any] = {"learner": {"learning_rate": 1e-4}} | groups
    job = Job.model_validate(
        {"name": "a", "student": {"model": "m", "lora": lora}, "teacher": {"model": "t"}, "data": {"prompts": {"path": "p"}}} | given
    )
    return list(check_lora(job, facts(folder)))


def facts(folder: Path) -> ModelFacts:
    config = AutoConfig.from_pretrained(folder)
    return ModelFacts(str(folder), config, config, tiny_tokenizer(), {1: "config.json"}, 256)


def problem(folder: Path, lora: dict[str, Any]) -> str:
    (check,) = found(folder, lora)
    assert check.status == "fail"
    assert exit_code([check]) == 2
    assert "\n" not in check.line()
    return check.line()


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_what_it_trains_is_said_without_loading_weights(tmp_path: Path, architecture: Architecture) -> None:
    folder = build_tiny(tmp_path / "student", architecture)
    lm = CausalLM(str(folder), device="cpu")
    total = sum(p.numel() for p in lm.model.parameters())
    add_lora(lm.model, LoraSettings(rank=8), seed=0)
    trained = sum(p.numel() for p in lm.model.parameters() if p.requires_grad)
    (folder / "model.safetensors").unlink()
    assert found(folder, None) == []
    (check,) = found(folder, {"rank": 8})
    assert check.status == "pass"
    assert check.detail.startswith(f"{trained:,} parameters, {trained / total:.2%} of the model's {total:,}, in {LAYERS}; ")
    assert f"{4 * trained / 2**20:,.1f} MiB to the engines a step" in check.detail
    (few,) = found(folder, {"targets": ["q_proj", "down_proj"]})
    assert "in q_proj, down_proj;" in few.detail


def test_settings_beside_it_that_do_not_fit_are_warned_of(tmp_path: Path) -> None:
    checks = found(build_tiny(tmp_path / "student"), {}, learner={}, cluster={"weight_transfer": "nccl"})
    assert [check.status for check in checks] == ["pass", "warn", "warn"]
    assert checks[1].detail.startswith("cluster.weight_transfer: nccl is not used")
    assert checks[2].line() == (
        "learner.learning_rate: the default of 1e-05 is for all weights; an addition takes five to ten times as much: set it"
    )


def test_what_cannot_have_one_is_one_line(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "student", "gemma3")
    assert "no linear layer qproj; choose from down_proj, gate_proj" in problem(folder, {"targets": ["qproj", "v_proj"]})
    told = problem(folder, {"targets": ["lm_head"]})
    assert told.startswith("student.lora.targets: the decoder's blocks have no linear layer lm_head (head and embeddings take no addition)")
    assert "has no linear layer" in problem(build_tiny(tmp_path / "gpt2", "gpt2"), {})


def test_a_mixture_of_experts_is_refused_once(tmp_path: Path) -> None:
    config = AutoConfig.for_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, hidden_size=32, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    student = facts(tmp_path / "moe")
    (refused,) = [check for check in [*check_student(student), *found(tmp_path / "moe", {})] if check.status == "fail"]
    assert "a mixture of 4 experts" in refused.line()


def test_the_adapter_to_start_from_is_held_against_the_model(tmp_path: Path) -> None:
    folder, settings = build_tiny(tmp_path / "student"), LoraSettings(rank=4)
    lm = CausalLM(str(folder), device="cpu")
    add_lora(lm.model, settings, seed=0)
    own = dict(lm.model.named_parameters())
    tensors = {stored: own[name].detach() for name, stored in adapter_names(lm.model).items()}
    write_adapter(tmp_path / "good", tensors, settings, "base")
    assert [check.status for check in found(folder, {"rank": 4, "start_from": str(tmp_path / "good")})] == ["pass"]
    assert "has rank 4 and alpha 8, the job 8 and 16" in problem(folder, {"rank": 8, "start_from": str(tmp_path / "good")})
    assert "is no adapter in peft's format" in problem(folder, {"start_from": str(tmp_path / "none")})
    named = problem(folder, {"rank": 4, "targets": ["q_proj"], "start_from": str(tmp_path / "good")})
    assert "set targets to the adapter's" in named
    first = next(iter(tensors))
    write_adapter(tmp_path / "wide", tensors | {first: torch.zeros(4, 999)}, settings, "base")
    assert "give the model that it was trained for" in problem(folder, {"rank": 4, "start_from": str(tmp_path / "wide")})


def test_room_on_the_disk_is_asked_for_the_addition_alone(tmp_path: Path) -> None:
    """A base that fills the disk many times over is no obstacle: no checkpoint holds it."""
    folder = build_tiny(tmp_path / "student")
    with (folder / "model.safetensors").open("r+b") as file:
        file.truncate(2**40)  # sparse: it takes no room itself
    tree: dict[str, Any] = {"name": "a", "student": {"model": "m"}, "teacher": {"model": "t"}, "data": {"prompts": {"path": "p"}}}
    for lora, status in ((None, "fail"), ({"rank": 8}, "pass")):
        job = Job.model_validate(tree | {"student": {"model": "m", "lora": lora}})
        assert [check.status for check in check_disk(job, facts(folder), tmp_path)] == [status]
