"""Whether a student can have the addition that `student.lora` asks for, known from its configuration alone."""

import torch
from transformers import AutoModelForCausalLM

from opd_governor.actors.learner.lora import LoraError, add_lora
from opd_governor.services.inputs.models import config_of
from opd_governor.services.job.settings import Job

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")


def lora_problem(job: Job, student: str) -> str | None:
    """What stands against it, in one line; None where nothing does. Builds the model without its weights."""
    lora = job.student.lora
    if lora is None:
        return None
    config = config_of(student, job.student.trust_remote_code)
    if any(getattr(config, name, None) for name in EXPERTS):
        return "student.lora: the model is a mixture of experts, whose expert layers take no addition here; remove lora"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=job.student.trust_remote_code)
            add_lora(model, lora.model_copy(update={"start_from": None}), seed=0)
    except LoraError as error:
        return str(error)
    return None
