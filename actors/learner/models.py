"""The models of one learner rank: the student, and beside it the frozen ones that a loss may need.

one rank:      load_models --> student, reference, teacher's head
several ranks: load_models --> their shapes --shard--> parts without values --fill: rank 0 loads, broadcasts--> each rank's parts
"""

from collections.abc import Callable
from dataclasses import dataclass

from opd_governor.actors.causal_lm import CausalLM, Head, compile_layers, load_head
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


@dataclass(frozen=True, slots=True)
class Loaded:
    """The models. All but the student are frozen. Of several ranks student and reference have shapes alone, until they are cut over
    the ranks and filled."""

    student: CausalLM
    reference: CausalLM | None
    teacher_head: Head | None
    whole: Callable[[CausalLM], CausalLM]
    """Student or reference with its values, whole, on the CPU: what rank 0 fills the parts of all ranks from."""


def load_models(models: LearnerModels, settings: LearnerSettings) -> Loaded:
    """The student in float32 whatever precision its passes run in: master weights and moments are float32."""

    def load(path: str, dtype: str, device: str | None = None) -> CausalLM:
        return CausalLM(path, dtype=dtype, device=device, trust_remote_code=models.trust_remote_code)

    device = "meta" if settings.num_ranks > 1 else None

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
    teacher_head = None
    if models.teacher:
        teacher_head = load_head(models.teacher, dtype=settings.dtype, trust_remote_code=models.trust_remote_code)
    if settings.compile:
        for lm in (student, reference):
            if lm is not None:
                compile_layers(lm.model)

    def whole(lm: CausalLM) -> CausalLM:
        return load(models.student, "float32" if lm is student else settings.dtype, "cpu")

    return Loaded(student, reference, teacher_head, whole)
