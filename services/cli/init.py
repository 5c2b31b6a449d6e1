"""`opd init`: a commented job file for a student, a teacher and a prompt file.

    flags, else questions on a terminal --> read models and prompts --> Draft --render--> JOB.yaml --> opd check

The models and prompts are read before anything is written, so the file holds facts: the prompt's column, the longest prompt, the ids
that end an answer. An existing file is never overwritten.
"""

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
import yaml
from pydantic import ValidationError

from opd_governor.services.cli.terminal import fail, load, quiet_environment
from opd_governor.services.job.load import describe_errors
from opd_governor.services.job.settings import Job, JobError

T = TypeVar("T", str, int, bool)

COLUMNS = ("prompt", "messages", "question", "problem", "instruction", "query", "input", "text")
"""Names under which data sets keep the prompt, most usual first."""
UNBOUNDED_TOKENS = 32768
"""Window taken for models whose positions have no end."""
CAP_TOKENS = 1024
"""The cap that is offered where the context window has room for it."""
WINDOW_STEP_TOKENS = 128
"""rollout.max_model_len is rounded up to a multiple of this."""


@dataclass(frozen=True, slots=True)
class Draft:
    """What the job file will say. Relative paths start at the job file's folder."""

    name: str
    student: str
    teacher: str
    teacher_url: str | None
    prompts: str
    column: str
    chat: bool
    eval_path: str
    verifier: str
    max_new_tokens: int
    max_model_len: int
    total_steps: int
    dtype: str
    prompts_note: str
    """Number of prompts and length of the longest one."""
    stops_note: str
    """The ids that end an answer, and where each was found."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """The models and the prompt file, opened."""

    tokenizer: Any
    window_tokens: int
    """The smaller context window of student and teacher."""
    stops: dict[int, str]
    """Stop id -> where it was found."""
    row: dict[str, Any]
    """The first row of the prompt file."""

    @property
    def column(self) -> str:
        """The column that most likely holds the prompt."""
        texts = [name for name, value in self.row.items() if isinstance(value, str | list)]
        return next((name for name in COLUMNS if name in texts), texts[0] if texts else COLUMNS[0])

    def takes_template(self, column: str) -> bool:
        """Whether the column holds plain text and the student has a chat template to put it in."""
        return isinstance(self.row.get(column), str) and bool(self.tokenizer.chat_template)

    def name_stops(self) -> str:
        """`1 '<eos>' (config, tokenizer), 3 '<|im_end|>' (chat template)`."""
        token = self.tokenizer.convert_ids_to_tokens
        return ", ".join(f"{stop} {token(stop)!r} ({where})" for stop, where in sorted(self.stops.items()))


def init(
    student: Annotated[str | None, typer.Option(help="The model that learns: a Hugging Face id or a local folder.")] = None,
    teacher: Annotated[str | None, typer.Option(help="The model that teaches; with --teacher-url its name on the server.")] = None,
    prompts: Annotated[str | None, typer.Option(help="Prompts: a file (.jsonl, .csv, .parquet, ...), a folder or a dataset id.")] = None,
    out: Annotated[Path, typer.Option("--out", help="The job file to write. An existing file is never overwritten.")] = Path("job.yaml"),
    column: Annotated[str | None, typer.Option(help="Column with the prompt. Default: found in the first row.")] = None,
    chat: Annotated[bool | None, typer.Option("--chat/--no-chat", help="Put text prompts through the student's chat template.")] = None,
    eval_path: Annotated[str | None, typer.Option("--eval", help="Held-out problems with an `answer` column. Default: none.")] = None,
    verifier: Annotated[
        str, typer.Option(help="How held-out answers are judged: exact, regex, number, math-verify or file.py:function.")
    ] = "exact",
    max_new_tokens: Annotated[int | None, typer.Option(help="The longest answer, tokens. Default: 1024 or what fits.", min=1)] = None,
    steps: Annotated[int | None, typer.Option(help="Learner steps. Default: 100.", min=1)] = None,
    name: Annotated[str | None, typer.Option(help="The run's name. Default: made from the student's.")] = None,
    teacher_url: Annotated[str | None, typer.Option(help="Address of a server that runs the teacher.")] = None,
) -> None:
    """Write a commented job file for a student, a teacher and a prompt file, then run `opd check` on it.

    What is not given is asked on a terminal, and takes its default elsewhere. The exit code is that of `opd check`.

    Example: `opd init --student Qwen/Qwen3-1.7B-Base --teacher Qwen/Qwen3-4B --prompts prompts.jsonl`
    """
    if out.exists():
        fail([f"--out {out}: exists already; choose another file"], 2)
    student = settle("--student", student, None, "Student, a Hugging Face id or local folder")
    teacher = settle("--teacher", teacher, None, "Teacher")
    prompts = settle("--prompts", prompts, None, "Prompts, a file (.jsonl, .csv, .parquet, ...), a folder or a dataset id")
    quiet_environment()
    try:
        inputs = read_inputs(student, None if teacher_url else teacher, prompts)
        column = settle("--column", column, inputs.column, f"Column with the prompt ({', '.join(inputs.row)})")
        takes_template = inputs.takes_template(column)
        chat = settle("--chat", chat, True, "Put prompts through the chat template?") if takes_template else bool(chat)
        note, longest = survey(inputs, prompts, column, chat)
        room = inputs.window_tokens - longest
        cap = settle("--max-new-tokens", max_new_tokens, min(CAP_TOKENS, room), f"Longest answer, tokens (the window leaves {room})")
        if cap > room:
            raise JobError(f"--max-new-tokens {cap}: the window leaves {room} after the longest prompt; give {room} or fewer")
        draft = Draft(
            name=name or slug(student),
            student=beside(out, student), teacher=teacher if teacher_url else beside(out, teacher), teacher_url=teacher_url,
            prompts=beside(out, prompts), column=column, chat=chat,
            eval_path=beside(out, settle("--eval", eval_path, "", "Held-out problems with an answer column (empty: none)")),
            verifier=beside(out, verifier),
            max_new_tokens=cap, max_model_len=window_for(longest + cap, inputs.window_tokens),
            total_steps=settle("--steps", steps, 100, "Learner steps"), dtype=best_dtype(),
            prompts_note=note, stops_note=inputs.name_stops(),
        )  # fmt: skip
        write(out, render(draft))
    except JobError as error:
        fail([str(error)], 2)
    except OSError as error:  # a model id that cannot be reached, a folder that cannot be written
        fail([str(error).strip().split("\n")[0]], 3)
    finish(out)


def settle(flag: str, given: T | None, default: T | None, question: str) -> T:
    """The flag's value, else the answer to a question on a terminal, else the default; without one, one line and exit code 2."""
    if given == "" and default is None:
        fail([f"{flag}: empty; name one"], 2)
    if given is not None:
        return given
    if sys.stdin.isatty():
        return typer.prompt(question, default=default, type=type(default) if default is not None else str)
    if default is None:
        fail([f"{flag}: missing; give it, or run opd init on a terminal"], 2)
    return default


def read_inputs(student: str, teacher: str | None, prompts: str) -> Inputs:
    """Open the models and the prompt file. `teacher` None: a server has it. Raises JobError, or OSError for an id out of reach."""
    from opd_governor.services.inputs.models import split_pruned
    from opd_governor.services.inputs.resolve import facts_of
    from opd_governor.services.inputs.rows import first_row
    from opd_governor.services.job.settings import PromptSource

    pruned = split_pruned(student)
    models = [("--student", pruned[0] if pruned else student), ("--teacher", teacher)]
    found = [facts_of(name, flag, trust=False) for flag, name in models if name]
    stops = {stop: where for facts in found for stop, where in facts.stops.items()}
    windows = [facts.context_tokens for facts in found if facts.context_tokens is not None]
    return Inputs(found[0].tokenizer, min(windows, default=UNBOUNDED_TOKENS), stops, first_row(PromptSource(path=prompts)))


def survey(inputs: Inputs, prompts: str, column: str, chat: bool) -> tuple[str, int]:
    """(number and longest in words, tokens of the longest prompt), every row read. Raises JobError."""
    from opd_governor.services.inputs.prompts import open_prompts

    source = {"path": prompts, "column": column, "chat": chat}
    job = Job.model_validate({"name": "init", "student": {"model": "-"}, "teacher": {"model": "-"}, "data": {"prompts": source}})
    stream = open_prompts(job, inputs.tokenizer, inputs.window_tokens)
    refused = f", {stream.survey.num_refused} more do not fit the window" if stream.survey.num_refused else ""
    return f"{len(stream)} prompts, the longest {stream.survey.longest_tokens} tokens{refused}", stream.survey.longest_tokens


def best_dtype() -> str:
    """bfloat16 where this machine has a GPU, else float32."""
    import torch

    return "bfloat16" if torch.cuda.is_available() else "float32"


def slug(model: str) -> str:
    """A run's name from a model's: `Qwen/Qwen3-1.7B-Base` -> `qwen3-1-7b-base`."""
    return re.sub(r"[^a-z0-9]+", "-", Path(model).name.lower()).strip("-")[:63].strip("-") or "run"


def beside(out: Path, named: str) -> str:
    """A relative path that exists here, as seen from the job file's folder; ids and absolute paths stay as they are."""
    file, colon, function = named.partition(":")
    if not file or Path(file).is_absolute() or not Path(file).exists():
        return named
    return f"{os.path.relpath(file, out.parent)}{colon}{function}"


def window_for(tokens: int, window_tokens: int) -> int:
    """The context window that holds this many tokens, rounded up, and no more than the models have."""
    return min(-(-tokens // WINDOW_STEP_TOKENS) * WINDOW_STEP_TOKENS, window_tokens)


def render(draft: Draft) -> str:
    """The job file's text."""
    url = f"\n  backend: http\n  url: {scalar(draft.teacher_url)}" if draft.teacher_url else f"\n  dtype: {draft.dtype}"
    evaluation = "  # eval: {path: heldout.jsonl, verifier: exact, every_steps: 20}  # needs an answer column"
    if draft.eval_path:
        evaluation = f"  eval:\n    path: {scalar(draft.eval_path)}\n    verifier: {scalar(draft.verifier)}\n    every_steps: 20"
    return f"""\
# A job of OPD Governor. services/job/README.md explains every key; a key left out has its default.
#   opd check JOB.yaml                   looks for mistakes before the first step
#   opd run JOB.yaml                     runs it on this machine
#   opd submit JOB.yaml --address URL    runs it on a Ray cluster
name: {scalar(draft.name)}
preset: governed  # plain-opd | stable-opd | governed: fills objective and governor; keys you add under those two win

student:
  model: {scalar(draft.student)}
teacher:  # one, or a list: each with a name, and domains or a weight
  model: {scalar(draft.teacher)}{url}

data:
  prompts:
    path: {scalar(draft.prompts)}  # {draft.prompts_note}
    column: {scalar(draft.column)}
    chat: {scalar(draft.chat)}  # text prompts go through the student's chat template as one user message
  golden:
    num_prompts: 256  # the teacher answers these first: the governor measures lengths against its answers
{evaluation}

rollout:
  # A rollout ends at {draft.stops_note}. `stop_token_ids: [...]` names other ids.
  prompts_per_step: 32
  samples_per_prompt: 1
  max_new_tokens: {draft.max_new_tokens}  # upper bound of the cap; the governor moves the cap below it
  max_model_len: {draft.max_model_len}  # prompt and answer together, tokens
  max_staleness: 1  # learner steps a rollout may lag behind; 0 is strict: the same job gives the same weights, bit for bit
  dtype: {draft.dtype}

learner:
  total_steps: {draft.total_steps}
  learning_rate: 1.0e-6  # for billions of parameters; models of a few hundred million take 1e-5 to 1e-4
  dtype: {draft.dtype}

checkpoint:
  every_steps: 50
"""


def scalar(value: Any) -> str:
    """One value as YAML on one line, quoted where YAML needs it."""
    return yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True).removesuffix("...\n").rstrip("\n")


def write(out: Path, text: str) -> None:
    """Write a new file. Raises JobError where it exists or would be no valid job, OSError where it cannot be written."""
    try:
        Job.model_validate(yaml.safe_load(text))
    except ValidationError as error:
        raise JobError("\n".join(describe_errors(error))) from None
    try:
        with out.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise JobError(f"--out {out}: exists already; choose another file") from None
    except OSError as error:
        raise OSError(f"--out {out}: not written ({error.strerror}); choose a folder that is there and can be written") from None


def finish(out: Path) -> None:
    """Run `opd check` on the new file, print what it found and what to do next; exit as it exits."""
    from opd_governor.services.inputs.preflight import check, exit_code
    from opd_governor.services.inputs.preflight import render as table

    job = load(out, None)
    checks = check(job, Path("runs") / job.name)
    typer.echo(table(checks))
    path = shlex.quote(str(out))
    typer.echo(f"{out} is written; " + (f"mend it, then: opd check {path}" if exit_code(checks) else f"next: opd run {path}"))
    raise typer.Exit(exit_code(checks))
