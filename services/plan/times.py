"""How long each phase of a step takes on described hardware: FLOPs and bytes over a card's rates, times what such code reaches of them."""

from dataclasses import dataclass

from opd_governor.services.job.settings import Job
from opd_governor.services.plan.hardware import Card
from opd_governor.services.plan.memory import sync_bytes
from opd_governor.services.plan.shapes import BYTES, Shape

LEARN_SHARE, SCORE_SHARE, READ_SHARE, LINK_SHARE = 0.40, 0.45, 0.60, 0.60
"""Of the data sheet: the learner's MFU (.36 to .49 was measured on an H200), the teacher's, decoding's share of the memory rate, a
sync's of the link."""
PASS_S = 0.002
"""One decoding pass beside its reads: scheduling, sampling, log-probs."""
ANSWER_SHARE = 0.5
"""Mean length of a rollout as a share of the cap, where nothing is known."""


@dataclass(frozen=True, slots=True)
class Rates:
    """What a machine really does: FLOP/s in learning and in scoring, bytes/s read in decoding and sent in a sync, seconds a pass."""

    learn_flops: float
    score_flops: float
    read_bytes: float
    link_bytes: float
    pass_s: float = PASS_S

    @classmethod
    def of(cls, card: Card) -> "Rates":
        return cls(
            LEARN_SHARE * card.flops,
            SCORE_SHARE * card.flops,
            READ_SHARE * card.memory_bytes_per_s,
            LINK_SHARE * card.link_bytes_per_s,
        )


@dataclass(frozen=True, slots=True)
class Load:
    """One step's tokens."""

    rollouts: int
    prompt_tokens: float
    answer_tokens: float

    @classmethod
    def of(cls, job: Job, prompt_tokens: float = 256.0) -> "Load":
        rollouts = job.rollout.prompts_per_step * job.rollout.samples_per_prompt
        return cls(rollouts, prompt_tokens, ANSWER_SHARE * job.rollout.max_new_tokens)

    @property
    def tokens(self) -> float:
        return self.rollouts * (self.prompt_tokens + self.answer_tokens)


def rollout_s(job: Job, student: Shape, load: Load, rates: Rates, num_engines: int, tensor_parallel: int) -> float:
    """Decoding: each pass reads the weights and the keys and values of its sequences, or computes, whichever takes longer."""
    itemsize = BYTES[job.rollout.dtype]
    each = load.rollouts / num_engines
    together = max(1.0, min(job.rollout.max_num_seqs, each))
    kv = student.kv_bytes_per_token_at_2 * itemsize / 2 * (load.prompt_tokens + load.answer_tokens / 2)
    read = (itemsize * student.num_active + together * kv) / rates.read_bytes / tensor_parallel
    compute = 2 * student.num_active * together / rates.score_flops / tensor_parallel
    passes = each / together * load.answer_tokens
    prefill = 2 * student.num_active * each * load.prompt_tokens / rates.score_flops / tensor_parallel
    return passes * (max(read, compute) + rates.pass_s) + prefill


def score_s(teacher: Shape, load: Load, rates: Rates, num_gpus: int) -> float:
    """A forward pass over prompts and answers."""
    return _forward_flops(teacher, load) / rates.score_flops / num_gpus


def learn_s(job: Job, student: Shape, load: Load, rates: Rates, num_ranks: int) -> float:
    """Forward and backward: three forward passes' FLOPs, four with checkpointing, one more for a reference. A frozen base takes no
    gradient of its own, which is one less."""
    passes = (4 if job.learner.gradient_checkpointing else 3) + (1 if job.objective.reference_kl_weight > 0 else 0)
    passes -= job.student.lora is not None
    return passes * job.learner.epochs_per_batch * _forward_flops(student, load) / rates.learn_flops / num_ranks


def sync_s(job: Job, student: Shape, rates: Rates) -> float:
    """The weights once over the link: a broadcast passes them on."""
    return sync_bytes(job, student) / rates.link_bytes


def _forward_flops(shape: Shape, load: Load) -> float:
    """2 a weight and token, and attention's two products under the causal mask."""
    length = load.prompt_tokens + load.answer_tokens
    attention = 2 * shape.num_layers * length * shape.hidden
    return load.tokens * (2 * shape.num_active + attention)
