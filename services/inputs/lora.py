"""What a LoRA student trains, and whether it can: known from configurations alone."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from opd_governor.actors.learner.lora import LoraError, LoraSettings, adapter_names, add_lora, lora_layers, read_adapter, same_layers
from opd_governor.services.inputs.check_models import not_causal, num_experts
from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.job.settings import Job

MIB = 2**20


def check_lora(job: Job, student: ModelFacts) -> Iterator[Check]:
    """What stands against the addition, one line each, or what it is."""
    lora = job.student.lora
    if lora is None or num_experts(student.config) or not_causal(student):  # refused as students in any case
        return
    try:
        model = _without_weights(job, student, lora)
    except LoraError as error:
        yield Check("lora", "fail", str(error), exit_code=2)
        return
    yield Check("lora", "pass", _words(model))
    if job.cluster.weight_transfer in ("nccl", "ipc"):
        detail = f"cluster.weight_transfer: {job.cluster.weight_transfer} is not used: an addition always travels as a file"
        yield Check("lora transfer", "warn", detail, "leave it out")
    if "learning_rate" not in job.learner.model_fields_set:
        detail = f"learner.learning_rate: the default of {job.learner.learning_rate:g} is for all weights"
        yield Check("lora learning rate", "warn", detail, "an addition takes about ten times as much: set it")


def _without_weights(job: Job, student: ModelFacts, lora: LoraSettings) -> Any:
    """The model with its addition, held against the adapter that it starts from. Raises LoraError."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(student.config, trust_remote_code=job.student.trust_remote_code)
        add_lora(model, lora.model_copy(update={"start_from": None}), seed=0)
    if lora.start_from is not None:
        same_layers(model, read_adapter(Path(lora.start_from), lora))
    return model


def _words(model: Any) -> str:
    """Parameters and share, where they are, what travels and what is kept."""
    own = dict(model.named_parameters())
    trained, total = sum(own[name].numel() for name in adapter_names(model)), sum(p.numel() for p in own.values())
    layers = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in lora_layers(model)))
    share = trained / (total - trained)
    return (
        f"{trained:,} parameters, {share:.2%} of the model's {total - trained:,}, in {layers}; "
        f"{4 * trained / MIB:,.1f} MiB to the engines a step, {12 * trained / MIB:,.1f} MiB a checkpoint"
    )
