"""A model's sizes from its config alone: parameters, and what a pass over it keeps, by running it on tensors without storage."""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM

from opd_governor.actors.causal_lm import decoder_layers
from opd_governor.actors.learner.lora import LoraError, add_lora
from opd_governor.actors.learner.settings import LoraSettings
from opd_governor.services.job.settings import JobError

SHIPPED = Path(__file__).parent / "configs"
"""Configs by the last part of a hub id, so that a job on described hardware can be checked without a hub."""
PROBE_TOKENS = (64, 128, 256)
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "auto": 2}


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes that one forward pass keeps for its backward, beside the weights themselves."""

    fixed: float
    """Whatever the batch: under autocast a copy of every weight in its dtype."""
    per_layer: float
    """The same, once a layer."""
    per_token: float
    """Outside the layers: embeddings, last norm."""
    per_layer_token: float

    def total(self, num_layers: int, num_tokens: int) -> float:
        """Bytes at the end of the forward pass over `num_tokens`."""
        return self.fixed + num_layers * self.per_layer + num_tokens * (self.per_token + num_layers * self.per_layer_token)


@dataclass(frozen=True, slots=True)
class Shape:
    """What memory and time depend on."""

    name: str
    num_parameters: int
    num_active: int
    """Parameters that one token is multiplied with: experts that are not chosen and the embedding look-up left out."""
    num_outside: int
    """Parameters outside the layers: embeddings, last norm, head."""
    num_layers: int
    hidden: int
    inner: int
    """Width of the feed-forward part that one token passes."""
    vocabulary: int
    kv_bytes_per_token_at_2: int
    """KV cache of one token over all layers at two bytes an entry."""
    num_heads: int
    num_kv_heads: int
    context_tokens: int
    num_experts: int

    @property
    def head_bytes_per_dtype_byte(self) -> int:
        """Entries of the output head."""
        return self.vocabulary * self.hidden


def config_for(model: str, trust_remote_code: bool = False) -> Any:
    """The text config of a folder, a shipped id or a hub id. Raises JobError where none can be read."""
    shipped = SHIPPED / f"{model.rpartition('/')[2]}.json"
    source = str(shipped) if not Path(model).is_dir() and shipped.is_file() else model
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code).get_text_config()
    except (OSError, ValueError) as error:
        known = ", ".join(sorted(path.stem for path in SHIPPED.glob("*.json")))
        raise JobError(
            f"model {model}: its config cannot be read ({str(error).splitlines()[0]}); give a folder with config.json, "
            f"a hub id that can be reached, or one that is shipped: {known}"
        ) from None


@lru_cache(maxsize=16)
def shape_of(model: str, trust_remote_code: bool = False) -> Shape:
    """Sizes of a model from its config; the parameters are counted on the model itself, made without storage."""
    config = config_for(model, trust_remote_code)
    built = _without_storage(config, trust_remote_code)
    total = sum(p.numel() for p in built.parameters())
    inside = sum(p.numel() for layer in decoder_layers(built) for p in layer.parameters())
    num_experts = next((n for key in ("num_experts", "num_local_experts", "n_routed_experts") if (n := getattr(config, key, None))), 0)
    experts = sum(p.numel() for name, p in built.named_parameters() if ".experts." in name)
    chosen = experts * getattr(config, "num_experts_per_tok", 1) // num_experts if num_experts else 0
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_width = getattr(config, "head_dim", None) or config.hidden_size // heads
    inner = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    if num_experts:
        inner = (getattr(config, "moe_intermediate_size", None) or inner) * getattr(config, "num_experts_per_tok", 1)
    return Shape(
        name=model,
        num_parameters=total,
        num_active=inside - experts + chosen + config.vocab_size * config.hidden_size,
        num_outside=total - inside,
        num_layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        inner=inner,
        vocabulary=config.vocab_size,
        kv_bytes_per_token_at_2=2 * 2 * config.num_hidden_layers * kv_heads * head_width,
        num_heads=heads,
        num_kv_heads=kv_heads,
        context_tokens=config.max_position_embeddings,
        num_experts=num_experts,
    )


@lru_cache(maxsize=16)
def adapter_parameters(model: str, lora: LoraSettings, trust_remote_code: bool = False) -> int:
    """How many parameters a LoRA student trains, counted as `shape_of` counts. Raises JobError where the model takes no addition."""
    built = _without_storage(config_for(model, trust_remote_code), trust_remote_code)
    try:
        add_lora(built, lora.model_copy(update={"start_from": None}), seed=0)
    except LoraError as error:
        raise JobError(str(error)) from None
    return sum(p.numel() for p in built.parameters() if p.requires_grad)


@lru_cache(maxsize=32)
def kept_of(model: str, dtype: str, checkpointing: bool, trust_remote_code: bool = False, lora: LoraSettings | None = None) -> Kept:
    """What a forward pass of the learner keeps, per token and layer: one and two layers are run on tensors without storage."""
    config = config_for(model, trust_remote_code)
    found = {
        (num_layers, num_tokens): _saved_bytes(config, num_layers, num_tokens, dtype, checkpointing, trust_remote_code, lora)
        for num_layers in (1, 2)
        for num_tokens in PROBE_TOKENS
    }
    (fixed_1, token_1), (fixed_2, token_2) = (_line([found[layers, tokens] for tokens in PROBE_TOKENS]) for layers in (1, 2))
    return Kept(2 * fixed_1 - fixed_2, fixed_2 - fixed_1, 2 * token_1 - token_2, token_2 - token_1)


def _line(found: list[int]) -> tuple[float, float]:
    """Intercept and slope over PROBE_TOKENS without the square: tensors without storage are given a mask of all pairs of tokens,
    which a real pass is not."""
    first, second, third = PROBE_TOKENS
    left, right = (found[1] - found[0]) / (second - first), (found[2] - found[1]) / (third - second)
    square = (right - left) / (third - first)
    slope = left - square * (first + second)
    return found[0] - slope * first - square * first**2, slope


def _without_storage(config: Any, trust_remote_code: bool) -> Any:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _saved_bytes(
    config: Any, num_layers: int, num_tokens: int, dtype: str, checkpointing: bool, trust_remote_code: bool, lora: LoraSettings | None
) -> int:
    """Bytes of distinct storages that autograd saves, weights themselves left out."""
    small = type(config).from_dict(config.to_dict() | {"num_hidden_layers": num_layers} | _cut_lists(config, num_layers))
    held = torch.bfloat16 if lora is not None and dtype == "bfloat16" else torch.float32
    with FakeTensorMode():
        model: Any = AutoModelForCausalLM.from_config(small, dtype=held, trust_remote_code=trust_remote_code)
        model.train()
        if lora is not None:
            add_lora(model, lora.model_copy(update={"start_from": None}), seed=0)
        if checkpointing:
            model.gradient_checkpointing_enable()
        own = {p.untyped_storage()._cdata for p in (*model.parameters(), *model.buffers())}
        saved: dict[int, int] = {}
        alive = []  # a storage that is freed gives its address to another

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            alive.append(storage)
            if storage._cdata not in own:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        ids_BL = torch.zeros(1, num_tokens, dtype=torch.long)
        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            output = model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state
        saved[output.untyped_storage()._cdata] = output.untyped_storage().nbytes()
    return sum(saved.values())


def _cut_lists(config: Any, num_layers: int) -> dict[str, Any]:
    """Settings that hold one entry a layer."""
    named = ("layer_types", "mlp_layer_types", "mlp_only_layers")
    return {key: value[:num_layers] for key in named if isinstance(value := getattr(config, key, None), list)}
