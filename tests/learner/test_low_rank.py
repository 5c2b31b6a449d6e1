"""A student with a low-rank addition: what is trained, what stays, its files, and the base as its own reference."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_learner import LIMITS, STOP_IDS, batch
from tiny import Architecture, build_tiny
from transformers import AutoModelForCausalLM

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.lora import LoraError, add_lora, lora_layers, without_lora
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits

PROBE = [5, 6, 7, 9, 12, 40, 8, 1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return build_tiny(root / "student", "llama", seed=1), build_tiny(root / "teacher", "llama", seed=2)


def learner(folder: Path, lora: LoraSettings | None = None, objective: ObjectiveSettings | None = None, **settings: object) -> Learner:
    models = LearnerModels(str(folder), with_reference=True, lora=lora or LoraSettings(rank=4))
    options = LearnerSettings(learning_rate=1e-2, **settings)  # type: ignore[arg-type]
    return Learner(models, options, objective or ObjectiveSettings(), stop_ids=STOP_IDS, max_new_tokens=32)


def adapter(actor: Learner) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in actor._student.model.named_parameters() if "lora" in name}


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
def test_a_new_addition_changes_nothing_and_is_all_that_a_step_changes(tmp_path: Path, architecture: Architecture) -> None:
    folder, teacher = build_tiny(tmp_path / "student", architecture, seed=1), build_tiny(tmp_path / "teacher", architecture, seed=2)
    actor = learner(folder)
    plain = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = plain(torch.tensor([PROBE])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]
    np.testing.assert_allclose(actor.probe(PROBE), expected, atol=1e-5)
    names = {name.rpartition(".")[2] for name in lora_layers(actor._student.model)}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    base = {name: p.detach().clone() for name, p in plain.named_parameters()}
    report = actor.step(batch(folder, teacher), [], LIMITS, 10.0)
    assert not report.skipped
    now = dict(actor._student.model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in base.items())
    assert any(p.abs().sum() > 0 for name, p in now.items() if name.endswith("lora_B"))
    assert np.abs(actor.probe(PROBE) - expected.numpy()).max() > 1e-4
    with without_lora(actor._student.model):
        np.testing.assert_allclose(actor.probe(PROBE), expected, atol=1e-5)


def test_the_gradient_is_that_of_the_merged_weight(folders: tuple[Path, Path]) -> None:
    """d loss / d B = scale x (d loss / d W) A^T, and the like for A."""
    model = AutoModelForCausalLM.from_pretrained(folders[0])
    add_lora(model, LoraSettings(rank=3, alpha=6.0), seed=0)
    layer = next(iter(lora_layers(model).values()))
    with torch.no_grad():
        layer.lora_B.normal_(0, 0.1)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    layer(x).square().sum().backward()
    weight = layer.merged(layer.weight, layer.lora_A, layer.lora_B).detach().requires_grad_()
    torch.nn.functional.linear(x, weight).square().sum().backward()
    torch.testing.assert_close(layer.lora_B.grad, 2.0 * weight.grad @ layer.lora_A.detach().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.lora_A.grad, 2.0 * layer.lora_B.detach().T @ weight.grad, rtol=1e-4, atol=1e-4)


def test_the_base_is_the_reference_without_a_second_copy(folders: tuple[Path, Path]) -> None:
    """The KL to it as with a copy beside: zero at first, and what a full learner says of the same distance."""
    limits = LengthLimits(32, reference_kl_weight=0.5)
    actor = learner(folders[0])
    assert actor._passes._models.reference is actor._student
    rollouts = batch(*folders)
    first = actor.step(rollouts, [], limits, 10.0).metrics
    assert abs(first.reference_kl_nats) < 1e-4
    second = actor.step(rollouts, [], limits, 10.0).metrics
    assert second.reference_kl_nats > 1e-3


def test_a_checkpoint_holds_the_addition_alone_and_goes_on_bit_for_bit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollouts = learner(folders[0], LoraSettings(rank=4, dropout=0.1)), batch(*folders)
    actor.step(rollouts, [], LIMITS, 10.0)
    actor.snapshot()
    actor.save(str(tmp_path / "saved"))
    stored = load_file(tmp_path / "saved/student/adapter_model.safetensors")
    assert all(name.startswith("base_model.model.model.layers.") and name.endswith((".lora_A.weight", ".lora_B.weight")) for name in stored)
    assert not (tmp_path / "saved/student/model.safetensors").exists()
    size = sum(path.stat().st_size for path in (tmp_path / "saved").rglob("*.safetensors"))
    assert size < 1.2 * 3 * 4 * sum(tensor.numel() for tensor in stored.values()) + 20_000, "weights and two moments, little more"
    resumed = learner(folders[0], LoraSettings(rank=4, dropout=0.1))
    assert resumed.restore(str(tmp_path / "saved")) == 1
    actor.step(rollouts, [], LIMITS, 10.0)
    restored_random = torch.get_rng_state()
    resumed.restore(str(tmp_path / "saved"))
    resumed.step(rollouts, [], LIMITS, 10.0)
    assert torch.equal(torch.get_rng_state(), restored_random)
    theirs = adapter(resumed)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in adapter(actor).items())


def test_what_engines_get_is_the_addition_with_its_settings(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor = learner(folders[0])
    actor.step(batch(*folders), [], LIMITS, 10.0)
    version, data = actor.weights("bfloat16", trained_only=True)
    (tmp_path / "sent").write_bytes(data.tobytes())
    with safe_open(tmp_path / "sent", "pt") as file:
        config = json.loads(file.metadata()["adapter_config"])
        assert file.get_tensor(next(iter(file.keys()))).dtype == torch.float32
    assert version == 1
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["target_modules"][0]) == ("LORA", 4, 8.0, "down_proj")
    full = sum(p.numel() for p in actor._student.model.parameters() if not p.requires_grad)
    assert len(data) < full, "a part of what the weights take"


def test_final_holds_the_addition_and_where_asked_the_merged_model(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor = learner(folders[0], LoraSettings(rank=4, merge=True))
    actor.step(batch(*folders), [], LIMITS, 10.0)
    actor.save_student(str(tmp_path / "final"), "# card\n")
    card = (tmp_path / "final/README.md").read_text()
    assert "nats away in the mean" in card
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "final/merged")
    with torch.no_grad():
        logp = merged(torch.tensor([PROBE])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(PROBE[1:])[:, None])[:, 0]
    np.testing.assert_allclose(logp, actor.probe(PROBE), atol=1e-4)
    again = learner(folders[0], LoraSettings(rank=4, start_from=str(tmp_path / "final")))
    np.testing.assert_allclose(again.probe(PROBE), actor.probe(PROBE), atol=1e-6)
    with pytest.raises(LoraError, match="has rank 4 and alpha 8, the job 8 and 16; set rank and alpha"):
        learner(folders[0], LoraSettings(rank=8, start_from=str(tmp_path / "final")))
    with pytest.raises(LoraError, match=r"adapter and student differ in .*; set targets to the adapter's"):
        learner(folders[0], LoraSettings(rank=4, targets=("q_proj",), start_from=str(tmp_path / "final")))


def test_targets_that_are_not_there_are_named(folders: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(LoraError, match="no linear layer qproj; choose from down_proj, gate_proj"):
        learner(folders[0], LoraSettings(targets=("qproj", "v_proj")))
    with pytest.raises(LoraError, match="GPT2LMHeadModel has no linear layer in its decoder's blocks; train its weights instead"):
        learner(build_tiny(tmp_path / "gpt2", "gpt2"))
    with pytest.raises(LoraError, match="is no adapter in peft's format"):
        learner(folders[0], LoraSettings(start_from=str(tmp_path)))


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"dtype": "bfloat16"}])
def test_recomputed_and_bfloat16_passes_learn_alike(folders: tuple[Path, Path], settings: dict[str, object]) -> None:
    rollouts = batch(*folders)
    exact, other = learner(folders[0]), learner(folders[0], None, None, **settings)
    for _ in range(2):
        ours, theirs = other.step(rollouts, [], LIMITS, 10.0), exact.step(rollouts, [], LIMITS, 10.0)
        assert ours.loss == pytest.approx(theirs.loss, rel=0.05)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=0.1)


def test_the_probe_knows_no_dropout(folders: tuple[Path, Path]) -> None:
    """Engines have none: with it, a sync's probe would find them wrong."""
    rollouts = batch(*folders)
    actor = learner(folders[0], LoraSettings(rank=4, dropout=0.5))
    actor.step(rollouts, [], LIMITS, 10.0)
    first = actor.probe(PROBE)
    np.testing.assert_array_equal(actor.probe(PROBE), first)
    assert actor._student.model.training, "steps drop out again"
    plain = learner(folders[0])
    for (_, ours), (_, theirs) in zip(actor._files.weights(), plain._files.weights(), strict=True):
        theirs.data.copy_(ours.data)
    np.testing.assert_allclose(plain.probe(PROBE), first, atol=1e-6)
    assert np.abs(plain.probe(PROBE) - plain.probe(PROBE, base=True)).max() > 1e-4
