"""How the student is sampled."""

from typing import Annotated, Any

from pydantic import Field, field_validator

from opd_governor.actors.settings import Settings


class LoopStop(Settings):
    """End a loop inside the engine (vLLM repetition_detection): finish reason "repetition"."""

    enabled: bool = False
    """Off by default: the loss mask handles loop tails; turn on to save the tokens as well."""
    max_period_tokens: Annotated[int, Field(ge=1, le=512)] = 64
    """Longest repeating unit looked for, tokens; raised to twice min_tokens / min_repeats where it is less."""
    min_repeats: Annotated[int, Field(ge=2)] = 8
    """Repeats of the unit before the rollout is ended."""
    min_tokens: Annotated[int, Field(ge=2)] = 64
    """Least length of the repeated region, tokens: a table's ruler is not a loop."""


class StopRamp(Settings):
    """Raise the stop ids' logits beyond a target length while sampling; the log-probs recorded are the processed ones."""

    strength_nats: Annotated[float, Field(ge=0, le=20)] = 0.0
    """Largest bias added to every stop id's logit; 0 turns the ramp off."""
    target_tokens: Annotated[int, Field(ge=1)] | None = None
    """Length from which the ramp rises; None: the reference length (mean of golden or teacher answers)."""
    width_tokens: Annotated[int, Field(ge=1)] = 32
    """Tokens from the start of the ramp to its full strength."""


class RolloutSettings(Settings):
    """Sampling, budgets and the engine."""

    prompts_per_step: Annotated[int, Field(ge=1)] = 32
    """Prompts drawn for one learner step."""
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    """Rollouts per prompt."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    """Upper bound of the cap, tokens. The governor's cap moves below it; tunable while running."""
    min_new_tokens: Annotated[int, Field(ge=1)] = 16
    """A prompt that leaves less than this in the context window is refused up front with its line number."""
    min_tokens: Annotated[int, Field(ge=0)] = 0
    """No stop is sampled before this many tokens."""
    temperature: Annotated[float, Field(gt=0, le=2)] = 1.0
    """vLLM refuses more than 2."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the most likely tokens that together have this probability; 1 keeps every token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """0 keeps every token."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 keeps every token."""
    repetition_penalty: Annotated[float, Field(gt=0, le=4)] = 1.0
    """vLLM's; above 1 repeated tokens become less likely. The log-probs recorded are the processed ones."""
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """vLLM's; nats taken from each token that has occurred."""
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] = 0.0
    """vLLM's; nats taken from each token per occurrence."""
    no_repeat_ngram: Annotated[int, Field(ge=0, le=64)] = 0
    """No n-gram of this length occurs twice in a response; 0 turns it off."""
    thinking_ids: tuple[int, int] | None = None
    """Ids that begin and end the student's thinking part. None: known pairs, such as <think> and </think>, where the tokenizer has them."""
    thinking_budget_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most tokens of thought: then the engine ends it, with a token that is not learned from. None: no bound but the cap."""
    stop_token_ids: tuple[int, ...] | None = None
    """The stop event E. None: the stop ids of student and teacher together. An id that is named twice counts once."""
    loop_stop: LoopStop = LoopStop()
    stop_ramp: StopRamp = StopRamp()
    loop_min_repeats: Annotated[int, Field(ge=2)] = 4
    """Repeats of a unit at the end of a response before the detector calls it a loop."""
    loop_min_tokens: Annotated[int, Field(ge=2)] = 32
    """Least length of the repeated region, tokens: short repeats in sound text are not loops. A unit of at most three different
    tokens (a ruler, a separator row, zeros) needs twice this."""
    max_staleness: Annotated[int, Field(ge=0, le=8)] = 1
    """Learner steps a rollout's weights may lie behind. 0 is the strict loop: on-policy, and the same bit for bit whenever it is run
    or resumed, for a batch starts together in its engine and the teacher scores one response a call."""
    num_actors: Annotated[int, Field(ge=1)] = 1
    """vLLM engines, one per rollout actor."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Context window, tokens. None: the student's own."""
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = "float32"
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    """Sequences decoded at once in one engine."""
    kv_cache_gib: Annotated[float, Field(gt=0)] = 1.0
    """KV cache per engine where there is no GPU, GiB."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    enforce_eager: bool = True
    """Skip graph capture: starts faster; turn off for large models on GPUs."""
    engine: dict[str, Any] = Field(default={})
    """More arguments of vLLM's AsyncEngineArgs by name (kv_cache_dtype: fp8, max_num_batched_tokens: 16384, quantization: fp8,
    data_parallel_size: 2); `opd check` holds the names against the installed vLLM. They win over what the keys here set."""

    @property
    def filtered(self) -> bool:
        """Sampling takes tokens out of the distribution: an engine's log-probs no longer tell which ids the student holds likeliest."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0

    @field_validator("stop_token_ids")
    @classmethod
    def _once_each(cls, value: tuple[int, ...] | None) -> tuple[int, ...] | None:
        return None if value is None else tuple(dict.fromkeys(value))
