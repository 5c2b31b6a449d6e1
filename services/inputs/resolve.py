"""The job's models as a run and a check both see them: folders or ids, stop event, window, tokenizers.

a model's name --facts_of--> ModelFacts (one line of JobError for whatever its folder raises)
job --resolve--> every model's facts --> Models, the student's tokenizer
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from opd_governor.actors.teacher.cross_tokenizer import Vocabularies
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.models import context_tokens, resolve_model, stop_event_ids, tokenizer_of, whole_config
from opd_governor.services.inputs.prune import resolve_student
from opd_governor.services.inputs.refusals import theirs
from opd_governor.services.inputs.tokens import OWN, SAME, named_tokenizer, own_tokenizer, vocabularies
from opd_governor.services.job.settings import Job, JobError, StudentSettings


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What must be known of a model before it is loaded."""

    model: str
    """Folder or id."""
    config: Any
    """Of its text part."""
    whole: Any
    """The config as it lies in the folder; another one than `config` where the text model is wrapped."""
    tokenizer: Any
    stops: Mapping[int, str]
    """Id -> where it was found: everything that this model and its tokenizer end on."""
    context_tokens: int | None
    """None: its positions have no end."""

    @property
    def num_rows(self) -> int:
        """Rows of the embedding."""
        return int(self.config.vocab_size)

    @property
    def num_ids(self) -> int:
        """One more than the tokenizer's last id."""
        return max(self.tokenizer.get_vocab().values(), default=-1) + 1


@dataclass(frozen=True, slots=True)
class Models:
    """The job's models, resolved to folders or ids."""

    student: str
    teachers: tuple[str, ...]
    stop_ids: tuple[int, ...]
    """The stop event of student and teachers together."""
    context_tokens: int
    """The smallest window of student and local teachers."""
    tokens: tuple[Vocabularies | None, ...] = ()
    """For each teacher: None where it reads the student's ids."""
    tokenizer: str | None = None
    """Folder or id of the student's tokenizer. None: the student's own."""
    dtype: str | None = None
    """Of the student's weights as they came, such as bfloat16. None: its config does not say."""
    num_ids: int | None = None
    """Ids that the student can write: its tokenizer's and the stop ids. None: not known."""
    num_rows: int | None = None
    """Of the student's embedding. Those past `num_ids` pad it and are no token: neither engine nor learner has them. None: they stay."""

    @property
    def cut_ids(self) -> int | None:
        """Where the student's vocabulary is cut; None where nothing pads it."""
        return self.num_ids if self.num_ids and self.num_rows and self.num_ids < self.num_rows else None


def facts_of(name: str, where: str, *, trust: bool, tokenizer: str | None = None, find: Callable[[str], str] = resolve_model) -> ModelFacts:
    """Everything about one model. `where`: the job's key, for messages. Raises JobError, one line whatever went wrong."""
    with theirs(where, f"model {name}", "give a Hugging Face model folder, or a hub id that can be reached", JobError):
        try:
            model = find(name)
        except JobError as error:
            raise JobError(f"{where}: {error}") from None
        whole = _trusted(lambda: whole_config(model, trust), f"{where}: model {model}", trust)
        config = whole.get_text_config()
    of = tokenizer or model
    with theirs(where, f"the tokenizer of {of}", "put the tokenizer's files beside the model, or set student.tokenizer", JobError):
        loaded = _trusted(lambda: tokenizer_of(of, trust), f"{where}: the tokenizer of {of}", trust)
        loaded.get_vocab()
    with theirs(where, f"model {name}", "mend its generation_config.json and config.json", JobError):
        stops = stop_event_ids(model, loaded, trust)
    return ModelFacts(model, config, whole, loaded, stops, context_tokens(config))


def _trusted(load: Callable[[], Any], what: str, trust: bool) -> Any:
    """What `load` gives. Raises JobError for code of a model's own that the job does not trust."""
    try:
        return load()
    except ValueError as error:
        if trust or "trust_remote_code" not in str(error):
            raise
        raise JobError(f"{what} brings custom code of its own; set trust_remote_code to true if you trust it") from None


def student_facts(settings: StudentSettings, find: Callable[[str], str] = resolve_model) -> ModelFacts:
    """Of the student, with the tokenizer that the job gives it."""
    return facts_of(settings.model, "student.model", trust=settings.trust_remote_code, tokenizer=settings.tokenizer, find=find)


def teacher_facts(settings: TeacherSettings) -> ModelFacts | None:
    """Of a teacher; None for one that a server has."""
    if not settings.means.local:
        return None
    named = None if settings.tokenizer in (None, OWN, SAME) else settings.tokenizer
    return facts_of(settings.model, f"teacher {settings.name}: model", trust=settings.trust_remote_code, tokenizer=named)


def server_tokenizer(settings: TeacherSettings) -> Any:
    """The tokenizer that the job names for a teacher on a server; None where it names none. Raises JobError."""
    named = named_tokenizer(settings, None)
    if named is None:
        if settings.render == "own":
            raise JobError(f"teacher {settings.name}: render is own, but the server has its tokenizer; name one, or set render to student")
        return None
    with theirs("", f"teacher {settings.name} tokenizer {named}", "give a folder or id with its files", JobError):
        return tokenizer_of(named, settings.trust_remote_code)


def resolve(job: Job) -> tuple[Models, Any]:
    """The models, and the student's tokenizer. `trust_remote_code` counts for the model whose setting it is. Raises JobError."""
    student = student_facts(job.student, partial(resolve_student, calibration=job.data.prompts))
    found = [teacher_facts(teacher) for teacher in job.teacher]
    teachers = tuple(t.model if facts is None else facts.model for t, facts in zip(job.teacher, found, strict=True))
    local = [student, *(facts for facts in found if facts is not None)]
    same = [
        facts
        for settings, facts in zip(job.teacher, found, strict=True)
        if facts is not None and own_tokenizer(settings, facts.model, student.tokenizer, facts.tokenizer) is None
    ]
    stop_ids = stop_ids_of(job, [student, *same])
    named = (job.student.tokenizer or student.model, student.tokenizer)
    dtype = getattr(student.config, "dtype", None)
    return Models(
        student=student.model,
        teachers=teachers,
        stop_ids=stop_ids,
        context_tokens=window_of(job, local),
        tokens=tuple(vocabularies(job, t, model, named, stop_ids) for t, model in zip(job.teacher, teachers, strict=True)),
        tokenizer=job.student.tokenizer,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
        num_ids=min(student.num_rows, max(student.num_ids, *(stop + 1 for stop in stop_ids if stop < student.num_rows))),
        num_rows=None if job.student.lora else student.num_rows,  # its engine reads the base's own file, with every row
    ), student.tokenizer


def teacher_tokenizers(job: Job, models: Models) -> dict[str, Any]:
    """By name, of the teachers that render their own prompts or read tokens of their own."""
    return {
        teacher.name: tokenizer_of(tokens.teacher if tokens else model, teacher.trust_remote_code)
        for teacher, model, tokens in zip(job.teacher, models.teachers, models.tokens, strict=True)
        if tokens or teacher.render == "own"
    }


def stop_ids_of(job: Job, local: Sequence[ModelFacts]) -> tuple[int, ...]:
    """The ids that end a response, in order: those the job names, otherwise every one that a local model ends with. Raises JobError.

    `local`: the models whose files are here and whose ids are the student's.
    """
    if job.rollout.stop_token_ids is not None:
        return job.rollout.stop_token_ids
    found = sorted({stop for facts in local for stop in facts.stops})
    if not found:
        raise JobError("rollout.stop_token_ids: no model says what it stops on; set it")
    return tuple(found)


def window_of(job: Job, local: Sequence[ModelFacts]) -> int:
    """Tokens of prompt and response together that every local model can hold, and the job allows. Raises JobError."""
    windows = [facts.context_tokens for facts in local if facts.context_tokens is not None]
    if job.rollout.max_model_len:
        windows.append(job.rollout.max_model_len)
    if not windows:
        raise JobError("rollout.max_model_len: no model says how long its context window is; set it")
    return min(windows)
