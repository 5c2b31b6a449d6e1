"""LoRA: a frozen student with a trained low-rank addition to its linear layers (pure torch), in peft's file format.

    W x  -->  W x + (alpha / rank) B A x          A: rank x in, B: out x rank, B starts at zero

The layers keep their names and weights; A and B are two parameters more of each, `<layer>.lora_A` and `<layer>.lora_B`. With the addition
off the student is the model that it started from, so a KL to that model needs no second copy. Source: arXiv 2106.09685.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from opd_governor.actors.causal_lm import decoder_layers
from opd_governor.actors.learner.settings import LoraSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
"""What peft puts before the names of a model's modules."""
OUTSIDE = ("lm_head", "embed_tokens", "embed_out", "wte")
"""Usual names of head and embeddings. Families that tie the two have a head that engines give no addition."""


class LoraError(ValueError):
    """An adapter that this student cannot have: one line."""


class LoraLinear(nn.Linear):
    """A linear layer with an addition. An existing layer becomes one in place, so its weight keeps name and memory."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_scale: float
    lora_dropout: float
    lora_on: bool

    def forward(self, input: Tensor) -> Tensor:
        plain = super().forward(input)
        if not self.lora_on:
            return plain
        dropped = F.dropout(input, self.lora_dropout, self.training)
        return plain + self.lora_scale * F.linear(F.linear(dropped, self.lora_A.to(input.dtype)), self.lora_B.to(input.dtype)).to(
            plain.dtype
        )

    def merged(self, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        """W + scale B A, float32; given whole tensors, where the layer's own are shards."""
        return weight.float() + self.lora_scale * (lora_B.float() @ lora_A.float())


def add_lora(model: Any, settings: LoraSettings, seed: int) -> None:
    """Freeze the model and give its linear layers an addition. Raises LoraError for targets that it does not have."""
    model.requires_grad_(False)
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules()}
    linear = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and id(module) in inside}
    found = {name.rpartition(".")[2] for name in linear}
    if unknown := set(settings.targets) - found:
        outside = " (head and embeddings take no addition)" if unknown & set(OUTSIDE) else ""
        raise LoraError(
            f"student.lora.targets: the decoder's blocks have no linear layer {', '.join(sorted(unknown))}{outside}; "
            f"choose from {', '.join(sorted(found))}"
        )
    if not found:
        raise LoraError(f"student.lora: {type(model).__name__} has no linear layer in its decoder's blocks; train its weights instead")
    generator = torch.Generator().manual_seed(seed)
    for name, module in linear.items():
        if settings.targets and name.rpartition(".")[2] not in settings.targets:
            continue
        module.__class__ = LoraLinear
        assert isinstance(module, LoraLinear)
        bound = 1 / math.sqrt(module.in_features)  # Kaiming's uniform with a = sqrt(5), as peft and nn.Linear start
        start = torch.empty(settings.rank, module.in_features).uniform_(-bound, bound, generator=generator)
        module.lora_A = nn.Parameter(start.to(module.weight.device))
        module.lora_B = nn.Parameter(torch.zeros(module.out_features, settings.rank, device=module.weight.device))
        module.lora_scale, module.lora_dropout, module.lora_on = settings.scale, settings.dropout, True
    if settings.start_from is not None:
        load_adapter(model, read_adapter(Path(settings.start_from), settings))


def lora_layers(model: Any) -> dict[str, LoraLinear]:
    """The layers with an addition, by name; empty for a student without LoRA."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


@contextlib.contextmanager
def without_lora(model: Any) -> Iterator[None]:
    """Inside, the model is the one it started from."""
    layers = lora_layers(model).values()
    for layer in layers:
        layer.lora_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.lora_on = True


def adapter_names(model: Any) -> dict[str, str]:
    """Parameter name -> name in an adapter's file."""
    pairs = ((name, part) for name in lora_layers(model) for part in ("lora_A", "lora_B"))
    return {f"{name}.{part}": f"{PREFIX}{name}.{part}.weight" for name, part in pairs}


def adapter_config(tensors: Mapping[str, Tensor], settings: LoraSettings, base: str | None = None) -> dict[str, Any]:
    """What peft and vLLM read beside the weights."""
    targets = sorted({name.removesuffix(".weight").rpartition(".")[0].rpartition(".")[2] for name in tensors})
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": settings.rank,
        "lora_alpha": settings.scale * settings.rank, "lora_dropout": settings.dropout, "target_modules": targets, "bias": "none",
        "use_rslora": False, "use_dora": False, "modules_to_save": None, "inference_mode": True,
    }  # fmt: skip


def adapter_bytes(tensors: Mapping[str, Tensor], settings: LoraSettings) -> bytes:
    """An adapter as one safetensors file with its configuration in the header; no tensors where a rank has none."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    return save(contiguous, {"adapter_config": json.dumps(adapter_config(tensors, settings))})


def write_adapter(folder: Path, tensors: Mapping[str, Tensor], settings: LoraSettings, base: str) -> None:
    """An adapter's folder in peft's format. `tensors`: by names of the file; `base`: folder or id of the model it belongs to."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(adapter_config(tensors, settings, base), indent=1) + "\n")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)


def read_adapter(folder: Path, settings: LoraSettings) -> dict[str, Tensor]:
    """An adapter's tensors by the names of its file. Raises LoraError where it is not what the settings say."""
    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = load_file(folder / WEIGHTS)
        rank, alpha = int(config["r"]), float(config["lora_alpha"])
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        why = f"no key {error}" if isinstance(error, KeyError) else str(error)
        raise LoraError(f"student.lora.start_from: {folder} is no adapter in peft's format ({why}); give its folder") from None
    odd = [key for key in ("use_rslora", "use_dora", "modules_to_save", "rank_pattern", "alpha_pattern") if config.get(key)]
    if odd or config.get("bias", "none") != "none":
        raise LoraError(f"student.lora.start_from: {folder} uses {', '.join(odd) or 'bias'}, which is not known here; train it without")
    theirs = (rank, alpha)
    if theirs != (settings.rank, settings.scale * settings.rank):
        raise LoraError(
            f"student.lora.start_from: {folder} has rank {theirs[0]} and alpha {theirs[1]:g}, "
            f"the job {settings.rank} and {settings.scale * settings.rank:g}; set rank and alpha to the adapter's"
        )
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise LoraError(f"student.lora.start_from: {folder} is a {kind} adapter, not LORA; give one that is")
    if odd := [name for name, tensor in tensors.items() if not tensor.is_floating_point() or not tensor.isfinite().all()]:
        raise LoraError(f"student.lora.start_from: {folder}: {odd[0]} holds NaN, infinite values or whole numbers; give a sound adapter")
    return tensors


@torch.no_grad()
def load_adapter(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Take an adapter's weights, where the model is not cut over ranks. Raises LoraError where it has other layers."""
    same_layers(model, tensors)
    own = dict(model.named_parameters())
    for name, stored in adapter_names(model).items():
        own[name].copy_(tensors[stored])


def same_layers(model: Any, tensors: Mapping[str, Tensor]) -> None:
    """Raises LoraError where an adapter is for other layers, or for layers of other sizes."""
    own, names = dict(model.named_parameters()), adapter_names(model)
    if odd := sorted(set(names.values()) ^ set(tensors)):
        raise LoraError(
            f"student.lora.start_from: adapter and student differ in {odd[0]} and {len(odd) - 1} others; set targets to the adapter's"
        )
    for name, stored in names.items():
        if own[name].shape != tensors[stored].shape:
            theirs, ours = tuple(tensors[stored].shape), tuple(own[name].shape)
            raise LoraError(f"student.lora.start_from: {stored} is {theirs}, the student's {ours}; give the model that it was trained for")
