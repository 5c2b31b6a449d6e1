"""The models of one learner rank: the student, and beside it the frozen ones that a loss may need."""

from dataclasses import dataclass

from opd_governor.actors.causal_lm import CausalLM, Head, compile_layers
from opd_governor.actors.learner.settings import LearnerSettings


@dataclass(frozen=True, slots=True)
class LearnerModels:
    """Which models a learner loads, as folders or ids that transformers resolves.

    >>> LearnerModels("deploy/sums/student", with_reference=True)   # doctest: +SKIP
    """

    student: str
    with_reference: bool = False
    """Keep the initial student beside the student, for a KL to it."""
    teacher: str | None = None
    """A teacher whose output head is loaded, for a support that needs its hidden states."""
    trust_remote_code: bool = False
    tokenizer: str | None = None
    """Folder or id of the tokenizer and chat template that the student is trained with. None: the student's own."""
    num_ids: int | None = None
    """The student's ids that are tokens; rows past them pad its embedding. None: every row is a token."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The models, loaded. All but the student are frozen."""

    student: CausalLM
    reference: CausalLM | None
    teacher_head: Head | None


def load_models(models: LearnerModels, settings: LearnerSettings) -> Loaded:
    """The student in float32 whatever precision its passes run in: master weights and moments are float32."""

    def load(path: str, dtype: str, device: str | None = None) -> CausalLM:
        num_ids = models.num_ids if path == models.student else None
        return CausalLM(path, dtype=dtype, device=device, trust_remote_code=models.trust_remote_code, num_ids=num_ids)

    # Models of several ranks are loaded on the CPU: whole, they may not fit one rank's device.
    device = "cpu" if settings.num_ranks > 1 else None

    def frozen(path: str, device: str | None = None) -> CausalLM:
        lm = load(path, settings.dtype, device)
        lm.model.requires_grad_(False)
        return lm

    student = load(models.student, "float32", device)
    student.model.train()
    if settings.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    if settings.freeze_embeddings:
        student.model.get_input_embeddings().requires_grad_(False)
    reference = frozen(models.student, device) if models.with_reference else None
    teacher_head = frozen(models.teacher).head if models.teacher else None
    if settings.compile:
        for lm in (student, reference):
            if lm is not None:
                compile_layers(lm.model)
    return Loaded(student, reference, teacher_head)
