"""One row as a question: plain text or chat messages, tools, and what else the row says about it. Pure: no tokenizer, no file.

    {"prompt": ..., "answer": ..., "golden": ..., "domain": ..., "tools": ...} --read_question--> Question

What people's files hold is taken as they mean it (an SFT conversation, messages as a JSON string, content in parts), and told in
Notes; what cannot be a prompt is a RowError.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from opd_governor.services.inputs.messages import (
    NO_ANSWER,
    SFT,
    SFT_BESIDE_GOLDEN,
    Messages,
    Notes,
    before_the_answer,
    messages_in,
    read_messages,
    shown,
    without_nones,
)
from opd_governor.services.inputs.refusals import RowError
from opd_governor.services.job.settings import PromptSource

ELSEWHERE = {
    "system": "set data.prompts.system_prompt for all rows, or put it into the messages",
    "images": "only text is read",
    "image": "only text is read",
    "videos": "only text is read",
    "audio": "only text is read",
    "completion": "set data.prompts.golden_column to it where it is a golden answer",
    "response": "set data.prompts.golden_column to it where it is a golden answer",
    "chosen": "set data.prompts.golden_column to it where it is a golden answer",
    "rejected": "preference pairs are not used",
    "reward_model": "set data.prompts.answer_column to reward_model.ground_truth where it holds the answer",
    "ground_truth": "set data.prompts.answer_column to it where it is the answer",
    "input": "put it into the prompt where it is part of the question",
    "context": "put it into the prompt where it is part of the question",
    "documents": "put them into the prompt",
    "functions": "rename it to tools",
    "output": "set data.prompts.golden_column to it where it is a golden answer",
    "target": "set data.prompts.golden_column to it where it is a golden answer",
    "solution": "set data.prompts.answer_column to it where it is the answer",
    "chat_template_kwargs": "set data.prompts.template for all rows",
}
"""Columns that mean something to other trainers and nothing here, with what to do where they matter."""
NO_NUMBER = "answers are NaN or infinite: taken as absent"
WHOLE_FLOAT = "answers are whole numbers stored as floats (2.0): read as 2"
EMPTY_ANSWER = "answers are empty: taken as absent"
EMPTY_GOLDEN = "golden answers are empty: taken as absent"
GOLDEN_MESSAGE = "golden answers are an assistant's message: its content is taken"
TOOLS_UNUSED = "rows have tools beside a plain text prompt: ignored, give messages or set data.prompts.chat"


@dataclass(slots=True)
class Question:
    """What a row asks, before any tokenizer has seen it."""

    place: str
    content: str | Messages
    """Text, or chat messages that end before the answer."""
    domain: str
    answer: str | None
    golden: str | None
    tools: list[dict[str, Any]] | None
    row: Mapping[str, Any]
    """The row as it stands in the file, for what else may be made of it."""

    @property
    def text(self) -> str:
        """As a person reads it."""
        return self.content if isinstance(self.content, str) else "\n".join(m.get("content") or "" for m in self.content)


def read_question(row: Mapping[str, Any], place: str, source: PromptSource, notes: Notes, others: Collection[str] = ()) -> Question:
    """Raises RowError for a row that is no prompt. `others`: columns that something else reads, so that they are not called ignored."""
    golden = _golden(row, source.golden_column, place, notes)
    if golden is not None and not golden.strip():
        notes.add(EMPTY_GOLDEN, place)
        golden = None
    content = _content(row, place, source, notes)
    if not isinstance(content, str):
        content, last = before_the_answer(content, source.column)
        golden = _golden_of(last, golden, place, notes) if last else golden
    tools = _tools(row)
    if tools and isinstance(content, str):
        notes.add(TOOLS_UNUSED, place)
        tools = None
    for column in ELSEWHERE.keys() & row.keys():
        used = (source.column, source.answer_column, source.golden_column, source.domain_column, *others)
        if row[column] is not None and not any(name == column or name.startswith(f"{column}.") for name in used):
            notes.add(f"rows have a column {column!r} that is ignored: {ELSEWHERE[column]}", place)
    answer = _text(row, source.answer_column, place, notes)
    if answer is not None and not answer.strip():
        notes.add(EMPTY_ANSWER, place)
        answer = None
    domain = _text(row, source.domain_column, place, notes) or ""
    question = Question(place, content, domain, answer, golden, tools, row)
    _check_encodable(question)
    return question


def column_of(row: Mapping[str, Any], path: str) -> Any:
    """A column by name, or by a dotted path into nested ones. None where there is none.

    >>> column_of({"reward_model": {"ground_truth": "7"}}, "reward_model.ground_truth")
    '7'
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return None
    return value


def _content(row: Mapping[str, Any], place: str, source: PromptSource, notes: Notes) -> str | Messages:
    """Plain text, or messages where the row has them or the source asks for chat form."""
    value = column_of(row, source.column)
    if value is None:
        if source.column in row:
            raise RowError(f"no column {source.column!r}: it is null here; fill it or remove the row")
        known = ", ".join(map(repr, row)) or "none"
        raise RowError(f"no column {source.column!r} (it has {known}); set data.prompts.column")
    if isinstance(value, str):
        messages = messages_in(value, place, notes)
        if messages is None:
            return _as_chat(value, source)
        value = messages
    if not isinstance(value, list | tuple) or not value:
        raise RowError(
            f"column {source.column!r} must be text or a list of messages, got {shown(value)}; set data.prompts.column or mend the row"
        )
    return read_messages(value, source.column, place, notes)


def _golden(row: Mapping[str, Any], column: str, place: str, notes: Notes) -> str | None:
    """The golden column as text: text, or the assistant's message as TRL's completions have it, also as JSON."""
    value = column_of(row, column)
    if isinstance(value, str):
        value = messages_in(value, place, Notes()) or value
    if isinstance(value, list | tuple) and len(value) == 1 and isinstance(value[0], Mapping):
        (message,) = read_messages(value, column, place, Notes())
        if message["role"] == "assistant" and not message.get("tool_calls"):
            notes.add(GOLDEN_MESSAGE, place)
            return str(message["content"])
    return _text(row, column, place, notes)


def _golden_of(last: Mapping[str, Any], golden: str | None, place: str, notes: Notes) -> str | None:
    """The golden answer of a conversation that ends with an assistant's turn. `golden`: what the golden column has."""
    if last.get("tool_calls") or not last["content"].strip():
        notes.add(NO_ANSWER, place)
        return golden
    if golden is None:
        notes.add(SFT, place)
        return str(last["content"])
    notes.add(SFT_BESIDE_GOLDEN if golden.strip() != last["content"].strip() else SFT, place)
    return golden


def _as_chat(text: str, source: PromptSource) -> str | Messages:
    if not source.chat:
        return text
    system = [{"role": "system", "content": source.system_prompt}] if source.system_prompt else []
    return [*system, {"role": "user", "content": text}]


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    value = row.get("tools")
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise RowError(f"column 'tools' is text that is not JSON ({error}); give a list of JSON schemas") from None
    if not value:
        return None
    if not isinstance(value, list | tuple) or not all(isinstance(tool, Mapping) for tool in value):
        raise RowError(f"column 'tools' must be a list of JSON schemas, got {shown(value)}")
    return [without_nones(tool) for tool in value]


def _text(row: Mapping[str, Any], column: str, place: str, notes: Notes) -> str | None:
    """A column as text. None where it is absent."""
    value = column_of(row, column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, float | Decimal):
        if not math.isfinite(value):
            notes.add(NO_NUMBER, place)
            return None
        if abs(float(value)) < 2**53 and value == int(value):
            notes.add(WHOLE_FLOAT, place)
            return str(int(value))
        return str(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    raise RowError(f"column {column!r} must be text, got {type(value).__name__}; give text or a number")


def _check_encodable(question: Question) -> None:
    for text in (question.text, question.domain, question.answer or "", question.golden or ""):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RowError(f"holds half of a surrogate pair at character {error.start + 1}, which is no text; mend it") from None
