"""What an environment is, and what of its answers is taken. Pure but for the environment's own code.

environment.open(row) --> task;  task.answer(the student's message) --> (messages, reward, done)

To add one by name, from any file that the job's `extensions` list:

    @ENVIRONMENTS.add("echo")
    class Echo:
        def open(self, row):
            return self

        def answer(self, message):
            return [{"role": "user", "content": message["content"]}], None, False
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

from opd_governor.actors.environment.settings import EnvironmentSettings
from opd_governor.actors.extensions import ExtensionError, Kind, part_of

Message = Mapping[str, Any]
"""role and content, as chat templates take them."""
Reason = Literal["raised", "nonsense", "timeout", "died"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why there is no answer: the environment raised; gave something that is no answer; took too long; its process died."""
ROLES = ("user", "tool", "system")


class Task(Protocol):
    """One conversation."""

    def answer(self, message: Message) -> tuple[Sequence[Message], float | None, bool]:
        """(messages that the student reads next, reward of this answer or None, whether the conversation is over)."""
        ...


class Environment(Protocol):
    """Tasks from rows. Tasks share a process: one must not depend on what others did before."""

    def open(self, row: Mapping[str, Any]) -> Task:
        """`row`: prompt (as a person reads it), answer, domain, index."""
        ...


ENVIRONMENTS: Kind[type[Environment]] = Kind("environment")


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer that can be taken."""

    messages: tuple[Message, ...]
    reward: float | None
    done: bool


@dataclass(frozen=True, slots=True)
class Failure:
    """No answer: this conversation is counted as an error, the others go on."""

    reason: Reason
    words: str


def load_environment(settings: EnvironmentSettings) -> Environment:
    """Raises ExtensionError, one line, for an entry or a tool that is none."""
    if settings.tools:
        from opd_governor.actors.environment.tools import ToolEnvironment

        return ToolEnvironment(settings.tools)
    entry = settings.entry or ""
    part: Any = ENVIRONMENTS[entry] if entry in ENVIRONMENTS else _own(entry)
    try:
        environment = part() if isinstance(part, type) else part
    except Exception as error:
        raise ExtensionError(f"environment.entry {entry}: it does not start ({type(error).__name__}: {error}); mend it") from error
    if not callable(getattr(environment, "open", None)):
        raise ExtensionError(f"environment.entry {entry}: it has no method open(row); add one that gives a task")
    return environment  # type: ignore[no-any-return]


def _own(entry: str) -> Any:
    if ":" not in entry:
        known = ", ".join(ENVIRONMENTS) or "none"
        raise ExtensionError(f"environment.entry {entry}: no such environment (known: {known}); give file.py:Name or module:Name")
    return part_of(entry, "environment.entry")


def ask(task: Task, message: Message, most_characters: int) -> Reply | Failure:
    """The task's answer; whatever it raises is a failure."""
    try:
        return checked(task.answer(message), most_characters)
    except (Exception, SystemExit) as error:
        return Failure("raised", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def checked(answer: Any, most_characters: int) -> Reply | Failure:
    """What the environment gave, held against the protocol."""

    def nonsense(why: str) -> Failure:
        return Failure("nonsense", why)

    if not isinstance(answer, tuple | list) or len(answer) != 3:
        return nonsense(f"it gives {_shown(answer)} where (messages, reward, done) are wanted")
    messages, reward, done = answer
    if not isinstance(messages, tuple | list) or not all(isinstance(message, Mapping) for message in messages):
        return nonsense(f"its messages are {_shown(messages)}, no list of messages")
    for message in messages:
        if message.get("role") not in ROLES or not isinstance(message.get("content"), str):
            return nonsense(f"a message is {_shown(dict(message))}: it needs content and a role of {', '.join(ROLES)}")
    if (num := sum(len(message["content"]) for message in messages)) > most_characters:
        return nonsense(f"it says {num} characters, more than environment.reply_characters {most_characters}")
    try:
        score = None if reward is None else float(reward)
    except (TypeError, ValueError):
        score = math.nan
    if score is not None and not math.isfinite(score):
        return nonsense(f"its reward is {_shown(reward)}, neither None nor a finite number")
    if not done and not messages:
        return nonsense("it is not done and says nothing")
    return Reply(tuple(dict(message) for message in messages), score, bool(done))


def _shown(value: Any) -> str:
    return repr(value)[:60]
