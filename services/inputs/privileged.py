"""What only a teacher sees of a prompt: its context, filled from the row, before what it is asked. Pure.

    row, teacher.context --> the teacher's own text or messages, and the privileged text in them

The student's prompt, and so its tokens, are never touched.
"""

import math
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opd_governor.services.inputs.messages import Messages
from opd_governor.services.inputs.questions import Question, column_of
from opd_governor.services.inputs.refusals import RowError

TEACHER_PROMPT = "teacher_prompt"
"""Column with what teachers are asked in place of the prompt: text, or chat messages."""
PROMPT = "prompt"
"""Where the context names it, the prompt stands there; else behind the context."""


@dataclass(frozen=True, slots=True)
class Privileged:
    """A teacher's side of a row."""

    content: str | Messages
    text: str
    """What the student does not see; empty: nothing."""


def columns_named(context: str) -> list[str]:
    """The columns that a context names, in order.

    >>> columns_named("Solution:\\n{golden}\\n\\n{prompt}")
    ['golden', 'prompt']
    """
    return [name for _, name, _, _ in string.Formatter().parse(context) if name is not None]


def privileged(question: Question, context: str | None) -> Privileged:
    """Raises RowError for a row in which a named column is missing or empty: the teacher would know no more than the student."""
    own = _teacher_prompt(question)
    content = question.content if own is None else own
    text = "" if own is None else _shown(own)
    if context is None:
        return Privileged(content, text)
    values = {name: _value(question, name) for name in columns_named(context) if name != PROMPT}
    empty = [name for name, value in values.items() if not value.strip()]
    if empty:
        remedy = "fill it, take the row out, or write braces that are text twice"
        raise RowError(f"column {empty[0]!r} is empty, and teacher.context names it; {remedy}")
    hint = _filled(context, values | {PROMPT: ""})

    def placed(asked: str) -> str:
        return _filled(context, values | {PROMPT: asked}) if PROMPT in columns_named(context) else f"{hint}\n\n{asked}"

    if isinstance(content, str):
        return Privileged(placed(content), hint + text)
    last = max((place for place, message in enumerate(content) if message["role"] == "user"), default=None)
    if last is None:
        raise RowError("no user message that teacher.context could stand before; add one")
    changed = [message | {"content": placed(str(message["content"]))} if i == last else message for i, message in enumerate(content)]
    return Privileged(changed, hint + text)


def _filled(context: str, values: Mapping[str, str]) -> str:
    """By hand, so that a dotted name is a path into nested columns, and braces in a value stay."""
    parts = []
    for before, name, _, _ in string.Formatter().parse(context):
        parts += [before, "" if name is None else values[name]]
    return "".join(parts)


def _value(question: Question, name: str) -> str:
    known = {"golden": question.golden, "answer": question.answer, "domain": question.domain}
    value = known.get(name)
    value = column_of(question.row, name) if value is None else value
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, list) and value and all(isinstance(message, Mapping) for message in value):
        return _shown(value)
    return value if isinstance(value, str) else str(value)


def _teacher_prompt(question: Question) -> str | Messages | None:
    value: Any = question.row.get(TEACHER_PROMPT)
    if value is None or value == "" or value == []:
        return None
    if isinstance(value, str):
        if isinstance(question.content, str):
            return value
        last = max((place for place, message in enumerate(question.content) if message["role"] == "user"), default=None)
        if last is None:
            return [*question.content, {"role": "user", "content": value}]
        return [message | {"content": value} if i == last else message for i, message in enumerate(question.content)]
    fits = isinstance(value, list) and all(
        isinstance(m, Mapping) and isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in value
    )
    if not fits:
        raise RowError(f"column {TEACHER_PROMPT!r} must be text or a list of messages with role and content")
    if isinstance(question.content, str):
        raise RowError(f"column {TEACHER_PROMPT!r} holds messages where the prompt is text; give text, or set data.prompts.chat")
    return [dict(message) for message in value]


def _shown(content: str | Messages) -> str:
    return content if isinstance(content, str) else "\n".join(str(message.get("content") or "") for message in content)
