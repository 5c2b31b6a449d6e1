"""What a LoRA student trains, and whether it can: known from configurations alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opd_governor.actors.learner.lora import LoraError, adapter_names, add_lora, lora_layers, read_adapter, same_layers
from opd_governor.actors.learner.settings import LoraSettings
from opd_governor.services.inputs.check_models import not_causal, num_experts
from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.models import config_of
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.job.settings import Job, StudentSettings

MIB = 2**20


def check_lora(job: Job, student: ModelFacts) -> Iterator[Check]:
    """What stands against the addition, one line each, or what it is."""
    lora = job.student.lora
    if lora is None or num_experts(student.config) or not_causal(student):  # refused as students in any case
        return
    try:
        model = _without_weights(student.config, lora, job.student.trust_remote_code)
        if lora.start_from is not None:
            same_layers(model, read_adapter(Path(lora.start_from), lora))
    except LoraError as error:
        yield Check("lora", "fail", str(error), exit_code=2)
        return
    yield Check("lora", "pass", _words(model))
    if _count(model) > _count_frozen(model):
        detail = f"student.lora.rank: {lora.rank} makes the addition larger than the model it is added to"
        yield Check("lora rank", "warn", detail, "lower it: 8 to 64 are usual")
    if job.cluster.weight_transfer in ("nccl", "ipc"):
        detail = f"cluster.weight_transfer: {job.cluster.weight_transfer} is not used: an addition always travels as a file"
        yield Check("lora transfer", "warn", detail, "leave it out")
    if "learning_rate" not in job.learner.model_fields_set:
        detail = f"learner.learning_rate: the default of {job.learner.learning_rate:g} is for all weights"
        yield Check("lora learning rate", "warn", detail, "an addition takes five to ten times as much: set it")


def lora_targets(student: str, lora: LoraSettings, trust_remote_code: bool) -> tuple[str, ...]:
    """Names of the layers that get an addition, such as q_proj, without the modules that they are in."""
    return _names(_without_weights(config_of(student, trust_remote_code), lora, trust_remote_code))


def _without_weights(config: Any, lora: LoraSettings, trust_remote_code: bool) -> Any:
    """The model with its addition. Raises LoraError."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        add_lora(model, lora.model_copy(update={"start_from": None}), seed=0)
    return model


def trained_parameters(facts: ModelFacts, student: StudentSettings) -> int:
    """How many parameters a LoRA student trains; 0 where it cannot, which `check_lora` says."""
    assert student.lora is not None
    try:
        return _count(_without_weights(facts.config, student.lora, student.trust_remote_code))
    except LoraError:
        return 0


def _count(model: Any) -> int:
    own = dict(model.named_parameters())
    return sum(own[name].numel() for name in adapter_names(model))


def _count_frozen(model: Any) -> int:
    return sum(p.numel() for p in model.parameters()) - _count(model)


def _names(model: Any) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name.rpartition(".")[2] for name in lora_layers(model)))


def _words(model: Any) -> str:
    """Parameters and share, where they are, what travels and what is kept."""
    trained, frozen = _count(model), _count_frozen(model)
    return (
        f"{trained:,} parameters, {trained / frozen:.2%} of the model's {frozen:,}, in {', '.join(_names(model))}; "
        f"{4 * trained / MIB:,.1f} MiB to the engines a step, {12 * trained / MIB:,.1f} MiB a checkpoint"
    )
