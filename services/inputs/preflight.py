"""Everything that can be known to be wrong before an actor starts, each with its remedy.

folder, port, Prometheus --+
models, tokenizers, stops --+--> [Check, ...] --> table, one line per failure, exit code
prompts, eval, objective --+
"""

import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import torch
from rich.console import Console
from rich.table import Table

from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.control.server import ServiceError, bind
from opd_governor.services.inputs.models import (
    config_of,
    context_tokens,
    resolve_model,
    split_pruned,
    stop_event_ids,
    tokenizer_difference,
    tokenizer_of,
)
from opd_governor.services.inputs.prompts import PromptStream, describe_refusals, open_problems, open_prompts
from opd_governor.services.inputs.refusals import DataError
from opd_governor.services.inputs.tokens import SAME, comparison, named_tokenizer, own_tokenizer
from opd_governor.services.inputs.verifiers import load_verifier
from opd_governor.services.job.settings import Job, JobError

Status = Literal["pass", "warn", "fail"]


ADAM_BYTES_PER_PARAMETER = 12
"""A checkpoint's float32 master weight and two moments."""
COMPILERS = (os.environ.get("CXX") or "g++", "gcc", "clang")
"""What torch.compile calls, on CPUs the first."""
PROMETHEUS_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `detail` of a failure names the field, or file and line; `remedy` says what to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""
    exit_code: Literal[2, 3] = 3
    """2: a mistake in the job's own files; 3: the world is not as the job needs it."""

    def line(self) -> str:
        """As one line."""
        return f"{self.detail}; {self.remedy}" if self.remedy else self.detail

    def to_json(self) -> dict[str, Any]:
        """For --json."""
        return asdict(self)


def check(job: Job, directory: Path) -> list[Check]:
    """Check a job against the world; starts nothing, writes nothing but converted models in the cache."""
    checks = [*_check_folder(directory), *_check_service(job), *check_job_alone(job), *_check_dtypes(job)]
    student, found = _resolve("student model", partial(_stand_in, job.student.model), job.student.trust_remote_code, "student.model")
    checks += found
    teachers: list[str | None] = []
    for teacher in job.teacher:
        if not teacher.means.local:
            teachers.append(None)
            continue
        resolve = partial(resolve_model, teacher.model)
        model, found = _resolve(f"teacher model {teacher.name}", resolve, teacher.trust_remote_code, f"teacher {teacher.name}: model")
        teachers.append(model)
        checks += found
        if model is not None:
            checks += _check_vocabulary(teacher, model)
    if student is None:
        return checks
    tokenizer, found = _load_tokenizer("student", job.student.tokenizer or student, job.student.trust_remote_code)
    checks += found
    if tokenizer is None:
        return checks
    checks += _check_pad(tokenizer)
    trusted = job.student.trust_remote_code
    stops = stop_event_ids(student, tokenizer, trusted)
    windows = [context_tokens(student, trusted)]
    others: dict[str, Any] = {}
    for settings, model in zip(job.teacher, teachers, strict=True):
        trusted = settings.trust_remote_code
        if model is not None:
            windows.append(context_tokens(model, trusted))
        named = named_tokenizer(settings, model)
        if named is None:
            continue
        theirs, found = _load_tokenizer(f"teacher {settings.name}", named, trusted)
        checks += found
        if theirs is not None:
            ends = stop_event_ids(model, theirs, trusted) if model is not None else {}
            checks += _check_pair(settings, tokenizer, theirs, stops, ends, job)
            if settings.render == "own" or own_tokenizer(settings, model or settings.model, tokenizer):
                others[settings.name] = theirs
    checks += _check_data(job, tokenizer, windows, others)
    checks += _check_disk(job, student, directory)
    return checks


def check_job_alone(job: Job) -> list[Check]:
    """What needs no model, no data and no machine."""
    return [*_check_objective(job), *_check_repeatable(job)]


def failures(checks: Sequence[Check]) -> list[str]:
    """One line per failure."""
    return [found.line() for found in checks if found.status == "fail"]


def exit_code(checks: Sequence[Check]) -> int:
    """0 without failures; 2 when one is a mistake in the job's own files, else 3."""
    return min((found.exit_code for found in checks if found.status == "fail"), default=0)


def render(checks: Sequence[Check]) -> str:
    """A table: what was checked, how it stands, what to do."""
    table = Table("check", "status", "found", "remedy", show_lines=False)
    colours = {"pass": "green", "warn": "yellow", "fail": "red"}
    for found in checks:
        table.add_row(found.name, f"[{colours[found.status]}]{found.status}[/]", _escape(found.detail), _escape(found.remedy))
    console = Console()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip()


def _escape(text: str) -> str:
    return text.replace("[", r"\[")


def _resolve(name: str, resolve: Callable[[], str], trust_remote_code: bool, where: str) -> tuple[str | None, list[Check]]:
    """A model's folder or id when its config can be read, and the check that says so."""
    try:
        model = resolve()
        config_of(model, trust_remote_code)
    except JobError as error:
        return None, [Check(name, "fail", f"{where}: {error}")]
    except (OSError, ValueError) as error:  # unknown id, no network, an architecture transformers does not know
        return None, [Check(name, "fail", f"{where}: {_first_line(error)}", "give a local model folder or a hub id that can be reached")]
    return model, [Check(name, "pass", model)]


def _stand_in(model: str) -> str:
    """The model itself, or the full one of a `pruned:` name: it is made at the run's start, and shares tokenizer and window."""
    if pruned := split_pruned(model):
        return _stand_in(pruned[0])
    return resolve_model(model)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__


def _load_tokenizer(whose: str, model: str, trust_remote_code: bool) -> tuple[Any, list[Check]]:
    try:
        return tokenizer_of(model, trust_remote_code), []
    except (OSError, ValueError) as error:
        return None, [
            Check(
                f"{whose} tokenizer",
                "fail",
                f"{whose} tokenizer {model}: {_first_line(error)}",
                "put the tokenizer's files beside the model",
            )
        ]


def _check_folder(directory: Path) -> Iterator[Check]:
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        yield Check("output folder", "fail", f"--out {directory}: {place} is not a folder that can be written", "choose another folder")
    else:
        yield Check("output folder", "pass", str(directory))


def _check_disk(job: Job, student: str, directory: Path) -> Iterator[Check]:
    weights = sum(file.stat().st_size for file in Path(student).glob("*.safetensors"))
    if not weights:
        return  # a hub id: its size is not known before it is fetched
    place = directory.absolute()
    while not place.exists():
        place = place.parent
    bytes_per_parameter = 2 if getattr(config_of(student), "dtype", None) in (torch.bfloat16, torch.float16) else 4
    parameters = weights / bytes_per_parameter
    needed = (job.checkpoint.keep + 2) * parameters * (bytes_per_parameter + ADAM_BYTES_PER_PARAMETER)
    free = shutil.disk_usage(place).free
    detail = f"{free / 2**30:.1f} GiB free at {place}, checkpoints need about {needed / 2**30:.1f}"
    if free < needed:
        yield Check("disk space", "fail", detail, "free some, choose another --out or lower checkpoint.keep")
    else:
        yield Check("disk space", "pass", detail)


def _check_service(job: Job) -> Iterator[Check]:
    try:
        bind(job.service.host, job.service.port, "token").close()
    except ServiceError as error:
        yield Check("port", "fail", str(error))
    else:
        yield Check("port", "pass", f"{job.service.host}:{job.service.port or 'a free one'}")
    if (url := job.service.prometheus_url) is None:
        return
    try:
        answer = httpx.get(f"{url.rstrip('/')}/-/ready", timeout=PROMETHEUS_TIMEOUT_S)
        problem = "" if answer.status_code == 200 else f"answers {answer.status_code}"
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        problem = _first_line(error)
    if problem:
        yield Check(
            "prometheus", "fail", f"service.prometheus_url {url}: {problem}", "start the server or unset it: the run's own /metrics serve"
        )
    else:
        yield Check("prometheus", "pass", url)


def _check_objective(job: Job) -> Iterator[Check]:
    support, needs = job.objective.support, job.objective.needs
    if needs.hidden and (len(job.teacher) > 1 or not job.teacher[0].means.hidden):
        detail = (
            f"objective.support: {support} needs one teacher, with back end torch: its hidden states go to the learner, which has its head"
        )
        yield Check("teacher support", "fail", detail, "name a single such teacher, or set it to sampled, student or teacher", exit_code=2)
    if job.learner.compile and not any(map(shutil.which, COMPILERS)):
        detail = f"learner.compile: true, and none of {', '.join(COMPILERS)} is on this machine"
        yield Check("compiler", "warn", detail, "install one where the learner runs (apt-get install g++), or set it to false")
    for teacher in job.teacher:
        if not teacher.means.local and not teacher.url:
            detail = f"teacher {teacher.name}: backend {teacher.backend} needs a url"
            yield Check("teacher support", "fail", detail, "add url to the teacher", exit_code=2)
        if not teacher.means.given_ids and needs.student_top_k:
            detail = f"objective.support {support} asks teacher {teacher.name}'s server for any id's log-prob"
            yield Check("teacher support", "warn", detail, "start the server with --max-logprobs -1, or set it to sampled or teacher")
    for package in {teacher.means.package for teacher in job.teacher} - {None}:
        if package and importlib.util.find_spec(package) is None:
            yield Check(package, "fail", f"teacher.backend: {package} is not installed", "install the cpu or gpu extra, or set it to torch")


def _check_vocabulary(teacher: TeacherSettings, model: str) -> Iterator[Check]:
    """Without a GPU a back end may have to read whole vocabularies, up to a size."""
    no_gpu = not torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS")  # a cluster may have some
    vocabulary = config_of(model, teacher.trust_remote_code).vocab_size
    most = teacher.means.cpu_vocabulary
    if most is not None and no_gpu and vocabulary > most:
        detail = (
            f"teacher {teacher.name}: backend {teacher.backend} without a GPU takes at most {most} tokens of vocabulary, not {vocabulary}"
        )
        yield Check(f"teacher support {teacher.name}", "fail", detail, "set its backend to torch")


def _check_dtypes(job: Job) -> Iterator[Check]:
    rollout, learner = job.rollout.dtype, job.learner.dtype
    remedy = ""
    if rollout != learner:
        detail, remedy = f"rollout.dtype {rollout} and learner.dtype {learner} differ", "set both alike, or expect a larger sync gap"
    elif torch.cuda.is_available() and rollout == "float32":
        detail, remedy = "float32 on a GPU", "bfloat16 is several times faster there"
    elif not torch.cuda.is_available() and rollout == "bfloat16" and not torch.cpu.get_capabilities().get("avx512_bf16"):
        detail, remedy = "bfloat16 on a CPU without bf16 instructions", "float32 is faster there"
    else:
        detail = rollout
    yield Check("dtype", "warn" if remedy else "pass", detail, remedy)


def _check_repeatable(job: Job) -> Iterator[Check]:
    """A strict job resumes bit for bit; what stands against that is said once, here."""
    if not job.strict:
        return
    against = [f"teacher {teacher.name} is a server, whose batches are its own" for teacher in job.teacher if not teacher.means.repeatable]
    if job.service.prometheus_url and job.governor.mode != "off":
        against.append("the governor reads a Prometheus server, whose scrapes fall when they fall")
    if against:
        detail = f"rollout.max_staleness 0, but a resumed run may differ: {'; '.join(against)}"
        yield Check("exact resume", "warn", detail, "use a local teacher and the run's own /metrics where bits matter")
    else:
        yield Check("exact resume", "pass", "strict: the same job gives the same weights, resumed or not")


def _check_pad(tokenizer: Any) -> Iterator[Check]:
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        detail = (
            f"pad and eos are the same token, {_named(tokenizer, tokenizer.pad_token_id)}: padding is masked by length, stops are learned"
        )
        yield Check("pad token", "pass", detail)


def _check_pair(
    settings: TeacherSettings, student: Any, teacher: Any, ours: dict[int, str], theirs: dict[int, str], job: Job
) -> Iterator[Check]:
    name, difference = settings.name, tokenizer_difference(student, teacher)
    if difference and settings.tokenizer == SAME:
        detail = f"student.model and teacher {name} have different vocabularies: {difference}"
        yield Check(f"tokenizer {name}", "fail", detail, "set its tokenizer to own, or choose models of one family")
        return
    if difference or settings.tokenizer not in (None, SAME):
        status, detail, remedy = comparison(name, difference, student, teacher, job)
        yield Check(f"tokenizer {name}", status, detail, remedy)
        return
    yield Check(f"tokenizer {name}", "pass", f"the same {len(student.get_vocab())} tokens")
    if job.rollout.stop_token_ids is not None:
        named = ", ".join(_named(student, stop) for stop in job.rollout.stop_token_ids)
        yield Check(f"stop ids {name}", "pass", f"set by rollout.stop_token_ids: {named}")
        return
    described = [
        ", ".join(f"{_named(student, stop)} ({where})" for stop, where in sorted(ids.items())) or "nothing" for ids in (ours, theirs)
    ]
    if not ours and not theirs:
        yield Check(f"stop ids {name}", "fail", "neither model says what it stops on", "set rollout.stop_token_ids")
    elif ours.keys() == theirs.keys():
        yield Check(f"stop ids {name}", "pass", described[0])
    else:
        remedy = "they are scored as one event (objective.stop_event: class); rollout.stop_token_ids overrides the set"
        if job.objective.stop_event == "raw":
            remedy = "set objective.stop_event to class: raw teaches the student not to stop"
        yield Check(f"stop ids {name}", "warn", f"the student stops on {described[0]}, teacher {name} on {described[1]}", remedy)


def _named(tokenizer: Any, token_id: int) -> str:
    return f"{token_id} {tokenizer.convert_ids_to_tokens(token_id)!r}"


def _check_data(job: Job, tokenizer: Any, windows: Sequence[int], others: Mapping[str, Any]) -> Iterator[Check]:
    if job.data.prompts.chat and not tokenizer.chat_template:
        detail = "data.prompts.chat: the student's tokenizer has no chat template"
        yield Check("chat template", "fail", detail, "set it to false, or student.tokenizer to one that has a template")
        return
    window = min(windows)
    if job.rollout.max_model_len:
        window = min(window, job.rollout.max_model_len)
    try:
        stream = open_prompts(job, tokenizer, window, others)
    except DataError as error:
        yield Check("prompts", "fail", f"data.prompts: {error}", exit_code=2)
        return
    yield from _check_prompts(job, stream, window)
    if job.data.eval.path is None:
        return
    try:
        problems = open_problems(job, tokenizer, window).prompts
        load_verifier(job.data.eval.verifier)
        if job.data.eval.verifier == "regex":
            for problem in problems:
                _compile(problem.answer or "", job.data.eval.path, problem.index)
    except JobError as error:
        yield Check("evaluation", "fail", str(error), exit_code=2)
    else:
        yield Check("evaluation", "pass", f"{len(problems)} problems, verifier {job.data.eval.verifier}")


def _compile(pattern: str, path: str, index: int) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise DataError(f"{path}: problem {index + 1}: answer {pattern!r} is no regular expression ({error}); mend it") from None


def _check_prompts(job: Job, stream: PromptStream, window: int) -> Iterator[Check]:
    survey, cap = stream.survey, job.rollout.max_new_tokens
    detail = f"{len(stream)} prompts, the longest {survey.longest_tokens} tokens"
    if survey.refused:
        yield Check("prompts", "warn", f"{detail}; {describe_refusals(survey.refused, job.rollout.min_new_tokens, survey.num_refused)}")
    else:
        yield Check("prompts", "pass", detail)
    if survey.longest_tokens + cap > window:
        detail = f"the longest prompt leaves {window - survey.longest_tokens} of {window} tokens, less than rollout.max_new_tokens {cap}"
        yield Check("context window", "warn", detail, "such prompts get what is left; lower the cap or shorten them")
    else:
        yield Check("context window", "pass", f"{window} tokens hold prompt and cap")
    served = {domain for teacher in job.teacher for domain in teacher.domains}
    if all(teacher.domains for teacher in job.teacher) and (orphans := survey.domains.keys() - served):
        first = min(orphans, key=lambda domain: survey.domains[domain])
        detail = f"{survey.domains[first]}: no teacher has domain {first!r}"
        remedy = f"add it to a teacher's domains (they have {', '.join(sorted(served))})"
        yield Check("domains", "fail", detail + (f", nor {len(orphans) - 1} others" if len(orphans) > 1 else ""), remedy)
    if job.objective.golden_weight > 0 and not job.data.golden.enabled and not survey.num_golden:
        detail = f"objective.golden_weight: {job.objective.golden_weight} needs golden answers, but data.golden.enabled is false"
        yield Check("golden answers", "fail", detail, "enable the golden pass, add a golden column or set the weight to 0", exit_code=2)
