"""The models of one learner rank: the student, and beside it the frozen ones that a loss may need.

one rank:      load_models --> student, reference, teacher's head
several ranks: load_models --> their shapes --shard--> parts without values --fill: rank 0 loads, broadcasts--> each rank's parts
"""

from collections.abc import Callable
from dataclasses import dataclass

from opd_governor.actors.causal_lm import CausalLM, Head, compile_layers, load_head
from opd_governor.actors.learner.lora import add_lora
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings
from opd_governor.actors.settings import FollowSettings


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
    lora: LoraSettings | None = None
    """Train an addition to the student, frozen in the passes' precision; it is its own reference then. None: train its weights."""
    seed: int = 0
    """Of a new addition's weights."""
    follow: FollowSettings | None = None
    """Keep the weights of a teacher that follows the student. None: no teacher does."""
    num_ids: int | None = None
    """The student's ids that are tokens; rows past them pad its embedding. None: every row is a token."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """The models. All but the student are frozen. Of several ranks student and reference have shapes alone, until they are cut over
    the ranks and filled."""

    student: CausalLM
    reference: CausalLM | None
    """The student itself where it has an addition, which is turned off in passes of the reference."""
    teacher_head: Head | None
    whole: Callable[[CausalLM], CausalLM]
    """Student or reference with its values, whole, on the CPU: what rank 0 fills the parts of all ranks from."""


def load_models(models: LearnerModels, settings: LearnerSettings) -> Loaded:
    """The student in float32 whatever precision its passes run in: master weights and moments are float32. Raises LoraError."""

    def load(path: str, dtype: str, device: str | None = None) -> CausalLM:
        num_ids = models.num_ids if path == models.student else None
        return CausalLM(path, dtype=dtype, device=device, trust_remote_code=models.trust_remote_code, num_ids=num_ids)

    device = "meta" if settings.num_ranks > 1 else None

    def frozen(path: str, device: str | None = None) -> CausalLM:
        lm = load(path, settings.dtype, device)
        lm.model.requires_grad_(False)
        return lm

    # A frozen base of one rank is kept in the passes' precision. Ranks share it out, and gather it in that precision.
    in_passes = models.lora is not None and settings.num_ranks == 1
    student = load(models.student, settings.dtype if in_passes else "float32", device)
    student.model.train()
    if settings.gradient_checkpointing:
        student.model.gradient_checkpointing_enable()
    if models.lora is not None:
        add_lora(student.model, models.lora, models.seed)
    elif settings.freeze_embeddings:
        student.model.get_input_embeddings().requires_grad_(False)
    reference = None
    if models.with_reference:
        reference = student if models.lora is not None else frozen(models.student, device)
    teacher_head = None
    if models.teacher:
        teacher_head = load_head(models.teacher, dtype=settings.dtype, trust_remote_code=models.trust_remote_code)
    if settings.compile:
        for lm in {id(lm): lm for lm in (student, reference) if lm is not None}.values():
            compile_layers(lm.model)

    def whole(lm: CausalLM) -> CausalLM:
        values = load(models.student, "float32" if lm is student else settings.dtype, "cpu")
        if lm is student and models.lora is not None:
            add_lora(values.model, models.lora, models.seed)
        return values

    return Loaded(student, reference, teacher_head, whole)
