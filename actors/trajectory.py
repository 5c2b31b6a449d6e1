"""The frozen types that cross actors. They know no Ray, no vLLM, no clock.

Shapes: T = tokens of one response (its stop token included), K = support size of a dense loss.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

FinishReason = Literal["stop", "length", "repetition", "turns", "error"]
"""turns: a conversation that had all the turns it may have, each of which ended by itself."""

PASS = 0.5
"""Score from which a verifier's verdict counts as right."""
BY_ENVIRONMENT = "environment"
"""The verifier that takes the reward of the job's environment."""
REST_ID = -2
"""In a support's ids: the column whose log-prob is that of every id which is neither the sampled one, nor in the support, nor (where
stops are one event) a stop id. -1 is padding."""
Rest = Literal["without_stops", "with_stops"]
"""Whether the rest leaves out the stop ids (they are a class of their own) or has those that are not listed."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as it leaves the data stream.

    >>> Prompt(index=7, token_ids=(5, 9, 3), domain="maths", answer="12").domain
    'maths'
    """

    index: int
    """Position in the data source; with `epoch` it identifies the prompt for good."""
    token_ids: tuple[int, ...]
    epoch: int = 0
    domain: str = ""
    answer: str | None = None
    """What a verifier compares with."""
    text: str = ""
    """The prompt as a person reads it: for samples and reports, never re-tokenised."""
    teacher_token_ids: tuple[int, ...] | None = None
    """What the teacher sees instead of `token_ids` (concise teacher, privileged context), in the teacher's own tokens; None: the same
    prompt."""
    privileged_ids: tuple[int, ...] = ()
    """What only the teacher sees, in the student's tokens: to find copies of it in answers."""
    teacher_weights: tuple[tuple[str, float], ...] = ()
    """Teachers' names with their weights on this prompt, where it has its own; a teacher of weight 0 is not asked."""
    golden_ids: tuple[int, ...] | None = None
    """A complete, terminating answer (its stop id included)."""
    teacher_finishes: bool | None = None
    """Whether the teacher itself finished this prompt within the budget; None: not tried."""
    teacher_right: bool | None = None
    """Whether a verifier called its answer right; None: not tried, or nobody asked."""
    expected_tokens: float | None = None
    """Mean length of the teacher's answers to it, tokens, by what the golden pass found; None: not known."""
    longest_tokens: float | None = None
    """Where the tail of their lengths begins, tokens."""
    turn: int = 0
    """Of a conversation: turns behind it. `token_ids` then end with what the environment said last."""
    most_tokens: int | None = None
    """Of a turn: most new tokens, where a conversation has left fewer than the cap."""


@dataclass(frozen=True, slots=True)
class LengthLimits:
    """The governor's values in force: decided at a step border, stamped on every trajectory, obeyed by rollout and learner.

    At rest (no pressure) they equal the job file's own settings.
    """

    cap_tokens: int
    """Most new tokens per rollout."""
    generation: int = 0
    """Rises by one with every change of any value."""
    golden_weight: float = 0.0
    """Weight of the golden cross-entropy beside the objective."""
    lr_scale: float = 1.0
    """Learning-rate brake: factor on the schedule's learning rate, in (0, 1]."""
    reference_kl_weight: float = 0.0
    """Weight of KL(student || frozen initial student) on student prefixes."""
    stop_tilt_nats: float = 0.0
    """Strength b of the teacher's tilt toward stopping beyond the target length, nats."""
    stop_weight: float = 0.0
    """Weight of the dense loss on stopping."""
    excess_weight: float = 1.0
    """Weight of tokens beyond the teacher's longest answers to the same prompt: 1 keeps them, 0 masks them."""
    loop_tail_weight: float = 1.0
    """Weight of tokens after a loop's onset: 1 keeps them, 0 masks them."""
    admission_quota: float = 1.0
    """Largest share of truncated rollouts admitted to a batch."""
    unfinished_quota: float | None = None
    """Largest share of prompts in a step that the teacher itself does not finish; None: prompts are not chosen by it."""
    extra: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Values of actuators that extensions add, by name."""

    def get(self, name: str) -> float | None:
        """The value of an actuator by its name; None: nothing to move in this job."""
        if name in self.__slots__:
            return float(value) if isinstance(value := getattr(self, name), int | float) else None
        return self.extra.get(name)


@dataclass(frozen=True, slots=True)
class Trajectory:
    """One student sample with everything needed to learn from it; nothing is ever recomputed from text."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """[T] response ids, the stop id included when one was sampled."""
    logprobs_T: np.ndarray
    """[T] float32, nats: the engine's processed log-prob of each sampled token (the behaviour policy)."""
    finish_reason: FinishReason
    budget_tokens: int
    """Most tokens this request could have: the cap in force, or less where the context window left less."""
    step: int
    """Learner step this rollout was drawn for."""
    weight_version: int
    """Student version at the first token."""
    limits_generation: int
    sample: int = 0
    """Which of the prompt's samples this is."""
    loop_onset: int | None = None
    """First index of a terminal loop, None without one."""
    loop_period: int | None = None
    support_ids_TK: np.ndarray | None = field(default=None, repr=False)
    """[T, K] int32: the student's own top-k ids at each position, when the objective asks for them."""
    num_thinking: int | None = None
    """Tokens of the thinking part, its end mark included; None: it has none."""
    forced: int | None = None
    """Index of a token that the engine put there and the student did not choose: the end of a used-up thinking budget."""
    reward: float | None = None
    """The verifier's score; None: not asked, or no verdict."""
    refusal: str = ""
    """With finish reason "error": the engine's words where it refused this request, or what went wrong in the environment."""
    observed: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Of a conversation: what stands between its turns and was not sampled, as (sampled tokens before it, its ids), in order. Everything
    else here is about sampled tokens only: `token_ids`, lengths, log-probs, loops."""
    num_turns: int = 1
    failure: str = ""
    """With finish reason "error": why the environment gave no answer, in one word (environment/protocol.py); empty: the engine's fault."""
    repeated_calls: int = 0
    """Of a conversation: turns that say word for word what the turn before them said."""

    @property
    def truncated(self) -> bool:
        """Cut before it stopped: by the cap or by the in-engine loop stop. A used-up number of turns is no cut."""
        return self.finish_reason in ("length", "repetition")

    @property
    def conversation_ids(self) -> tuple[int, ...]:
        """All ids behind the prompt in their order, the environment's too: what a model reads, exactly as the engine read it."""
        if not self.observed:
            return self.token_ids
        ids: list[int] = []
        start = 0
        for place, between in self.observed:
            ids += self.token_ids[start:place]
            ids += between
            start = place
        return (*ids, *self.token_ids[start:])

    @property
    def mask_T(self) -> np.ndarray | None:  # noqa: N802 - a shape suffix
        """[len(conversation_ids)] bool: which of them were sampled. None: all were."""
        if not self.observed:
            return None
        mask_T = np.ones(len(self.token_ids) + sum(len(between) for _, between in self.observed), bool)
        shift = 0
        for place, between in self.observed:
            mask_T[place + shift : place + shift + len(between)] = False
            shift += len(between)
        return mask_T

    @property
    def answer_ids(self) -> tuple[int, ...]:
        """The last turn: what a verifier reads."""
        return self.token_ids[self.observed[-1][0] :] if self.observed else self.token_ids


@dataclass(frozen=True, slots=True)
class TokenScores:
    """A teacher's log-probs on one response: temperature 1, nats, float32, same token ids as the student's."""

    teacher: str
    sampled_logp_T: np.ndarray
    """[T] log-prob of each sampled token id, raw (no stop class)."""
    stop_logp_T: np.ndarray
    """[T] log of the summed probability of all stop ids, at every position."""
    support_ids_TK: np.ndarray | None = field(default=None, repr=False)
    """[T, K] int32 ids the next array refers to."""
    support_logp_TK: np.ndarray | None = field(default=None, repr=False)
    """[T, K] float32 raw log-probs at `support_ids_TK`."""
    hidden_TH: np.ndarray | None = field(default=None, repr=False)
    """[T, H] the teacher's last hidden states, which its head turns into logits over the whole vocabulary: float32, or the bits of
    bfloat16 as uint16. With them the log-probs above are NaN: they are left to whoever has the head."""
    span_T: np.ndarray | None = field(default=None, repr=False)
    """[T] int32, rising, from a teacher with another tokenizer: tokens with one number are a span, the smallest piece of text that
    both tokenizers cut out; -1: nothing to compare, the token is left out of the loss. None: it reads the student's ids."""
    sampled_only_T: np.ndarray | None = field(default=None, repr=False)
    """[T] bool: no support stands at this token, which takes the sampled estimator (spans of several tokens on either side)."""
    canonical: bool = True
    """With spans: the student sampled the tokens that its own tokenizer makes of the text."""
    num_unaligned_bytes: int = 0
    """With spans: bytes that the teacher's tokens do not spell."""
    copied_T: np.ndarray | None = field(default=None, repr=False)
    """[T] bool: copied from what only the teacher sees; None: there is nothing of that kind."""


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A trajectory and its teacher scores: what the learner consumes."""

    trajectory: Trajectory
    scores: TokenScores
    advantage: float = 0.0
    """Of the verifier's score over its baseline; 0 without a verdict."""
