"""The objective's knobs and how the student is updated."""

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from opd_governor.actors.extensions import Key, Kind
from opd_governor.actors.settings import Settings
from opd_governor.actors.trajectory import PASS


class RewardSettings(Settings):
    """A verifier's score of each answer, beside the teacher: its advantage is the policy-gradient signal of all tokens of the answer."""

    verifier: str
    """As data.eval.verifier: a name, an http(s) address, `file.py:function` or `module:function`. It compares with the answer column."""
    weight: Annotated[float, Field(gt=0, le=1000)] = 1.0
    """Nats per unit of advantage. The teacher's signal is some .1 to 1 nats a token, so 1 is of its size; a student ends above a teacher
    that prefers a wrong answer by n nats only where this is more than n."""
    baseline: Literal["group", "running", "none"] = "group"
    """What is taken from a score. group: the mean of the prompt's other samples (leave-one-out); running: the mean of earlier steps, by
    domain; none: nothing."""
    normalise: bool = False
    """Divide advantages by the spread of what the baseline is a mean of. It favours prompts that are nearly always right or wrong."""
    when: Literal["always", "failed", "passed", "teacher_right"] = "always"
    """Rollouts that are distilled: all, those that the verifier failed or passed (one without a verdict is then left out), or those on
    prompts that the teacher itself gets right. That is found out once: the verifier judges the golden pass's answers. Prompts beyond
    data.golden.num_prompts were not tried and are distilled."""

    @model_validator(mode="after")
    def _consistent(self) -> "RewardSettings":
        if self.normalise and self.baseline == "none":
            raise ValueError("normalise divides by the spread around a baseline: set baseline to group or running, or normalise to false")
        return self

    def distils(self, reward: float | None, teacher_right: bool | None = None) -> bool:
        """Whether a rollout with this score, on a prompt that the teacher gets right or not, is distilled."""
        if self.when == "always":
            return True
        if self.when == "teacher_right":
            return teacher_right is not False
        return reward is not None and (reward >= PASS) == (self.when == "passed")


if TYPE_CHECKING:
    from opd_governor.actors.learner.supports import Needs, Support


def _losses() -> Kind[Any]:
    """Late: with the losses comes torch, which takes a second, and most commands read no job."""
    from opd_governor.actors.learner.divergences import LOSSES

    return LOSSES


def _supports() -> "Kind[Support]":
    """Late, as above."""
    from opd_governor.actors.learner.supports import SUPPORTS

    return SUPPORTS


class ObjectiveSettings(Settings):
    """The loss. `support` says over which tokens the divergence is taken.

    sampled: the sampled token alone, as a stop-gradient advantage (reverse_kl only);
    student | teacher | union: top-k ids of that model, back-propagated, renormalised;
    full: the whole vocabulary (the teacher sends its hidden states, the learner has the teacher's head).
    """

    loss: Annotated[str, Key(_losses)] = "reverse_kl"
    """The divergence between student and teacher; formulas in actors/learner/README.md."""
    loss_options: dict[str, float] = Field(default={})
    """Parameters of a loss of your own, which reads them from here."""
    support: Annotated[str, Key(_supports)] = "sampled"
    """The tokens over which the divergence is taken; see above."""
    top_k: Annotated[int, Field(ge=1, le=1024)] = 32
    """Ids in a student, teacher or union support; the sampled token and the stop class are always added."""
    tail_bucket: bool = False
    """Add one class for all tokens outside the support instead of renormalising on it."""
    rkl_share: Annotated[float, Field(ge=0, le=1)] = 0.5
    """mixed_kl: share of reverse KL, the rest is forward KL."""
    jsd_beta: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """jsd: beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S."""
    skew_alpha: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """skew_kl: KL(p_T || alpha p_T + (1 - alpha) p_S)."""
    distillation_weight: Annotated[float, Field(ge=0, le=100)] = 1.0
    """Weight of the distillation, beside `reward` and the other terms; 0 learns from the reward alone, with the teacher as a metric."""
    reward: RewardSettings | None = None
    """None: distillation alone."""
    stop_event: Literal["class", "raw"] = "class"
    """class: all stop ids are one action; raw: each id for itself."""
    reduction: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """token_mean: every token of a batch counts alike; sequence_mean: every sequence does; constant: the sum over a fixed divisor."""
    constant_normaliser_tokens: Annotated[float, Field(gt=0)] | None = None
    """reduction constant: the divisor per sequence, tokens. None: the job file's max_new_tokens; a cap changed later does not move it,
    so that losses before and after the change stay comparable."""
    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """See clip_high."""
    clip_high: Annotated[float, Field(gt=0)] = 0.2
    """PPO clip: the ratio to the policy at the batch's start is kept in [1 - clip_low, 1 + clip_high]."""
    importance_cap: Annotated[float, Field(ge=1)] | None = 2.0
    """Truncated importance sampling: weight min(pi_learner / pi_engine, cap); None: no weight."""
    advantage_clip_nats: Annotated[float, Field(gt=0)] | None = None
    """Bound on each token's signal |D|; None: unbounded."""
    trust_region_nats: Annotated[float, Field(gt=0)] | None = None
    """A sampled token that the teacher finds less likely than the student by more than this is an outlier. None: none is."""
    outliers: Literal["clip", "mask", "forward"] = "clip"
    """What an outlier teaches. clip: as much as a token at the edge of the region (support sampled); mask: nothing; forward: KL(teacher ||
    student) on the support, in place of `loss` (a dense support): the teacher rejects what was sampled, so it shows what it would say."""
    reference_kl_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    """StableOPD: weight of KL(student || frozen initial student) on student prefixes."""
    reference_kl: Literal["exact", "k3"] = "exact"
    """exact: over the whole vocabulary in chunks; k3: sampled estimate."""
    golden_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    """StableOPD: weight of the cross-entropy on golden answers."""
    golden_ratio: Annotated[float, Field(ge=0, le=4)] = 0.25
    """Golden answers beside each rollout in a batch (0.25: one per four)."""
    overlong_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    """DAPO soft overlong penalty: a response at its cap has this many nats taken from each token's advantage; sampled support only.
    Where it ends in a loop, from the tokens of the loop alone, whatever weight `loop_tail` gives their distillation."""
    overlong_buffer_ratio: Annotated[float, Field(gt=0, le=1)] = 0.2
    """The penalty rises over the last buffer x cap tokens."""
    stop_tilt_nats: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Strength of the teacher's tilt toward stopping beyond the target length."""
    stop_tilt_target_tokens: Annotated[int, Field(ge=1)] | None = None
    """None: the mean length of the teacher's answers to the same prompt (golden pass), or to all prompts where that is not known."""
    stop_tilt_width_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens from the target length to the tilt's full strength."""
    stop_weight: Annotated[float, Field(ge=0, le=10)] = 0.0
    """Weight of the KL of {stop, go on} from the tilted teacher to the student, at every token of a rollout, loops included: a student that
    samples no stop learns it all the same."""
    excess_weight: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Weight of tokens beyond the teacher's longest answers to the same prompt (golden pass); 1 keeps them, 0 masks them. They are states
    that the teacher itself does not reach, where its scores say little, and they fill the batch. A stop among them counts whole."""
    horizon_tokens: Annotated[int, Field(ge=1)] | None = None
    """Loss on the first tokens of each response only, and on its stop event wherever that stands, sampled or golden. None: all."""
    position_gamma: Annotated[float, Field(ge=0, le=10)] = 0.0
    """IW-OPD: a token counts 1 + gamma x the share of its response's |log pT - log pS| that lies at it or after it. 0: all tokens alike.
    Needs log-probs of the sampled tokens, so not with support full."""
    loop_tail: Literal["mask", "keep", "downweight"] = "mask"
    """Tokens from one period after a loop's onset."""
    loop_tail_weight: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Their weight under downweight."""
    truncated: Literal["keep", "mask"] = "keep"
    """mask drops truncated rollouts from the loss whole (weak alone, kept for comparison)."""
    copied: Literal["keep", "mask"] = "keep"
    """mask drops tokens copied from what only the teacher sees (teacher.context) from the loss; their share is a metric either way."""
    admission_quota: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Largest share of truncated rollouts admitted to a batch; 1: no quota."""

    @model_validator(mode="after")
    def _consistent(self) -> "ObjectiveSettings":
        dense = _supports()[self.support].dense
        if not dense and self.loss != "reverse_kl":
            raise ValueError(f"loss {self.loss} needs a dense support: set support to student, teacher, union or full")
        if dense and self.overlong_weight > 0:
            raise ValueError("overlong_weight acts on the sampled estimator only: set support to sampled or the weight to 0")
        if _supports()[self.support].hidden and self.position_gamma > 0:
            raise ValueError(f"position_gamma needs log-probs of the sampled tokens; support {self.support} has none: set it to 0")
        if self.trust_region_nats is not None and self.outliers == ("clip" if dense else "forward"):
            other = "mask or forward" if dense else "clip or mask"
            raise ValueError(f"outliers {self.outliers} does not act on support {self.support}: set it to {other}")
        if self.reward is None and self.distillation_weight == 0:
            raise ValueError("distillation_weight 0 leaves nothing to learn from: set a reward, or the weight above 0")
        return self

    @property
    def needs(self) -> "Needs":
        """What engines, teachers and the learner have to know of each position for this support."""
        return _supports()[self.support].needs(self)


class LoraSettings(Settings):
    """Train a low-rank addition to the student's linear layers instead of its weights."""

    rank: Annotated[int, Field(ge=1, le=512)] = 16
    """Inner width of the addition. The larger, the nearer to training all weights; 8 to 64 are usual."""
    alpha: Annotated[float, Field(gt=0)] | None = None
    """The addition is scaled by alpha / rank. None: twice the rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers that get one, such as [q_proj, v_proj]. Empty: every linear layer of the decoder's blocks."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of an addition's inputs dropped in training. 0 is usual on-policy: with dropout the learner is not the policy that sampled."""
    start_from: str | None = None
    """Folder of an adapter in peft's format to go on from; its rank and targets must be those above. None: a new one, which changes
    nothing at first."""
    merge: bool = False
    """Also write the student with the addition merged into its weights, into `final/merged`."""

    @property
    def scale(self) -> float:
        """Factor of the addition."""
        return (2 * self.rank if self.alpha is None else self.alpha) / self.rank


class LearnerSettings(Settings):
    """Ranks, optimiser, precision, micro-batches."""

    num_ranks: Annotated[int, Field(ge=1)] = 1
    """Processes (on GPUs: one GPU each) that weights, gradients and moments are cut over (FSDP2). Each writes its own part of a
    checkpoint, and any number resumes any other's."""
    total_steps: Annotated[int, Field(ge=1)] = 100
    """The run ends after this many steps."""
    learning_rate: Annotated[float, Field(gt=0)] = 1e-5
    """AdamW's, after warm-up. The governor's brake multiplies it."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After warm-up; cosine and linear fall to `min_lr_ratio` at total_steps."""
    min_lr_ratio: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Share of the learning rate that is left at the end of a cosine or linear schedule."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's, on matrices only."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay of the first and the second moment."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """A longer gradient is scaled down to this norm."""
    micro_batch_tokens: Annotated[int, Field(ge=16)] = 8192
    """Padded tokens in one forward and backward; a batch is split, gradients accumulate. At 16 nearly every row goes alone: with the
    teacher's batch_tokens at 16 too, equal models agree to the last bit, and a step changes nothing."""
    chunk_tokens: Annotated[int, Field(ge=1)] = 1024
    """Positions whose logits exist at once in the loss."""
    epochs_per_batch: Annotated[int, Field(ge=1)] = 1
    """Optimiser steps on one batch; above 1 the PPO clip bites."""
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = "float32"
    """Compute precision; master weights and optimizer stay float32."""
    compile: bool = False
    """Compile the decoder layers of the student, and of frozen models beside it, with torch.compile: a step of a 2-billion-parameter
    student takes a quarter less time on an H200, the first one a quarter of a minute more. Needs a C compiler."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    freeze_embeddings: bool = False
    """Keep input (and tied output) embeddings fixed."""
    max_skipped_steps: Annotated[int, Field(ge=1)] = 10
    """Non-finite steps in a row before the run stops."""
