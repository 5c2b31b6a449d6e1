"""Which students can have an addition, told before anything starts."""

from pathlib import Path

import pytest
from transformers import AutoConfig

from opd_governor.services.inputs.lora import lora_problem
from opd_governor.services.job.settings import Job
from tests.tiny import build_tiny


def job(lora: dict[str, object] | None) -> Job:
    student = {"model": "m", "lora": lora}
    return Job.model_validate({"name": "a", "student": student, "teacher": {"model": "t"}, "data": {"prompts": {"path": "p"}}})


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_linear_layers_of_the_blocks_are_found_without_weights(tmp_path: Path, architecture: str) -> None:
    folder = build_tiny(tmp_path / "student", architecture)  # type: ignore[arg-type]
    (folder / "model.safetensors").unlink()
    assert lora_problem(job(None), str(folder)) is None
    assert lora_problem(job({"rank": 8}), str(folder)) is None
    assert lora_problem(job({"targets": ["q_proj", "down_proj"]}), str(folder)) is None
    problem = lora_problem(job({"targets": ["q_proj", "head"]}), str(folder))
    assert problem is not None
    assert problem.startswith("student.lora.targets: ")
    assert "no linear layer head; choose from down_proj" in problem


def test_what_cannot_have_one_is_one_line(tmp_path: Path) -> None:
    assert "has no linear layer" in (lora_problem(job({}), str(build_tiny(tmp_path / "gpt2", "gpt2"))) or "")
    config = AutoConfig.for_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, hidden_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    )
    config.save_pretrained(tmp_path / "moe")
    assert "mixture of experts" in (lora_problem(job({}), str(tmp_path / "moe")) or "")
