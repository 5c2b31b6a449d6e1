"""What leaves the learner has the names, shapes and values of the checkpoint's own file, for dense models and for mixtures of experts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from opd_governor.actors.learner.outgoing import HEAD, Outgoing

SHAPE: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 64, "vocab_size": 90, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 32, "num_experts_per_tok": 2}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "v_head_dim": 16, "qk_nope_head_dim": 16, "num_key_value_heads": 2}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "deepseek_v3": {"n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, **EXPERTS, **LATENT},
}


@pytest.fixture(params=MODELS)
def model_and_file(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, dict[str, torch.Tensor]]:
    config = AutoConfig.for_model(request.param, **(SHAPE | MODELS[request.param]))
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(config)
    for name, buffer in made.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    made.save_pretrained(tmp_path)
    return AutoModelForCausalLM.from_pretrained(tmp_path), load_file(tmp_path / "model.safetensors")


def test_names_and_values_are_those_of_the_file(model_and_file: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, saved = model_and_file
    sent = dict(Outgoing(model, torch.float32))
    assert sent.keys() == saved.keys() | {HEAD}
    assert all(torch.equal(sent[name], saved[name]) for name in saved)


def test_what_is_described_is_what_comes_in_the_same_order(model_and_file: tuple[Any, dict[str, torch.Tensor]]) -> None:
    outgoing = Outgoing(model_and_file[0], torch.bfloat16)
    assert [(name, t.dtype, tuple(t.shape)) for name, t in outgoing] == [tuple(described) for described in outgoing.described()]


def test_rows_of_no_token_stay_at_home(model_and_file: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, saved = model_and_file
    num_ids = model.config.vocab_size - 3
    outgoing = Outgoing(model, torch.float32, num_ids=num_ids)
    sent = dict(outgoing)
    cut = {name for name in saved if sent[name].shape != saved[name].shape}
    assert cut == {name for name in saved if "embed_tokens" in name or name == HEAD}
    assert all(torch.equal(sent[name], saved[name][:num_ids]) for name in cut)
    assert sent[HEAD].shape[0] == num_ids
    assert [tuple(described.shape) for described in outgoing.described()] == [tuple(tensor.shape) for tensor in sent.values()]


def test_router_biases_keep_their_dtype(model_and_file: tuple[Any, dict[str, torch.Tensor]]) -> None:
    dtypes = {name.rpartition(".")[2]: tensor.dtype for name, tensor in Outgoing(model_and_file[0], torch.bfloat16)}
    assert dtypes.pop("e_score_correction_bias", torch.float32) == torch.float32
    assert set(dtypes.values()) == {torch.bfloat16}


def test_frozen_weights_are_left_out_where_asked(model_and_file: tuple[Any, dict[str, torch.Tensor]]) -> None:
    model, saved = model_and_file
    model.get_input_embeddings().requires_grad_(False)
    left_out = saved.keys() - dict(Outgoing(model, torch.float32, trained_only=True)).keys()
    assert left_out == {name for name in saved if "embed_tokens" in name or name.endswith("e_score_correction_bias")}
