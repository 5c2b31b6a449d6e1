"""One row as a question: plain text or chat messages, tools, and what else the row says about it. Pure: no tokenizer, no file.

    {"prompt": ..., "answer": ..., "golden": ..., "domain": ..., "tools": ...} --read_question--> Question

What people's files hold is taken as they mean it (an SFT conversation, messages as a JSON string, content in parts), and told in
Notes; what cannot be a prompt is a RowError.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from opd_governor.services.inputs.refusals import RowError
from opd_governor.services.job.settings import PromptSource

Messages = list[dict[str, Any]]

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
    "solution": "set data.prompts.answer_column to it where it is the answer",
    "chat_template_kwargs": "set data.prompts.template for all rows",
}
"""Columns that mean something to other trainers and nothing here, with what to do where they matter."""
SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Roles of ShareGPT's `from`."""

SFT = "conversations end with the assistant's answer: it is taken as their golden answer"
FROM_JSON = "prompts are messages as a JSON string: read as messages"
FROM_VALUE = "prompts have messages with from and value: read as role and content"
PARTS = "messages hold their content in parts of type text: joined"
NO_NUMBER = "answers are NaN or infinite: taken as absent"
WHOLE_FLOAT = "answers are whole numbers stored as floats (2.0): read as 2"
EMPTY_GOLDEN = "golden answers are empty: taken as absent"
TOOLS_UNUSED = "rows have tools beside a plain text prompt: ignored, give messages or set data.prompts.chat"


@dataclass
class Notes:
    """What was taken otherwise than it stood: kind -> how many rows, and the first one's place."""

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def add(self, kind: str, place: str) -> None:
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.first.setdefault(kind, place)

    def lines(self) -> list[str]:
        """One line a kind."""
        return [f"{count} {kind} (first {self.first[kind]})" for kind, count in self.counts.items()]


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


def read_question(row: Mapping[str, Any], place: str, source: PromptSource, notes: Notes) -> Question:
    """Raises RowError for a row that is no prompt."""
    golden = _text(row, source.golden_column, place, notes)
    if golden is not None and not golden.strip():
        notes.add(EMPTY_GOLDEN, place)
        golden = None
    content = _content(row, place, source, notes)
    if not isinstance(content, str):
        content, last = _before_the_answer(content, source.column, place, notes)
        golden = last if golden is None else golden
    tools = _tools(row)
    if tools and isinstance(content, str):
        notes.add(TOOLS_UNUSED, place)
        tools = None
    for column in ELSEWHERE.keys() & row.keys():
        used = (source.column, source.answer_column, source.golden_column, source.domain_column)
        if row[column] is not None and not any(name == column or name.startswith(f"{column}.") for name in used):
            notes.add(f"rows have a column {column!r} that is ignored: {ELSEWHERE[column]}", place)
    answer = _text(row, source.answer_column, place, notes)
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
        known = ", ".join(map(repr, row)) or "none"
        raise RowError(f"no column {source.column!r} (it has {known}); set data.prompts.column")
    if isinstance(value, str):
        messages = _messages_in(value)
        if messages is None:
            return _as_chat(value, source)
        notes.add(FROM_JSON, place)
        value = messages
    if not isinstance(value, list | tuple) or not value:
        raise RowError(
            f"column {source.column!r} must be text or a list of messages, got {_shown(value)}; set data.prompts.column or mend the row"
        )
    return [_message(message, source.column, place, notes) for message in value]


def _as_chat(text: str, source: PromptSource) -> str | Messages:
    if not source.chat:
        return text
    system = [{"role": "system", "content": source.system_prompt}] if source.system_prompt else []
    return [*system, {"role": "user", "content": text}]


def _messages_in(text: str) -> list[Any] | None:
    """Messages written as a JSON string, or None for any other text."""
    start = text.lstrip()[:1]
    if start != "[" or '"role"' not in text or '"content"' not in text:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, list) and value and all(isinstance(m, dict) and "role" in m for m in value) else None


def _message(message: Any, column: str, place: str, notes: Notes) -> dict[str, Any]:
    """One message with text content. Keys that are None are dropped: tables hold them for messages that never had them."""
    if not isinstance(message, Mapping):
        raise RowError(f"column {column!r} must be text or a list of messages with role and content, got a list of {_shown(message)}")
    message = {key: without_nones(value) for key, value in message.items() if value is not None}
    if "from" in message and "value" in message and "role" not in message:
        notes.add(FROM_VALUE, place)
        speaker = message.pop("from")
        message["role"], message["content"] = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, message.pop("value")
    if not isinstance(message.get("role"), str):
        raise RowError(f"column {column!r} must be text or a list of messages with role and content: a message has no role")
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list | tuple):
        notes.add(PARTS, place)
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise RowError(f"column {column!r} must be text or a list of messages with role and content: content is {_shown(content)}")
    return message | {"content": content}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowError(f"a message holds a part of type {_shown(kind)}: only text is read; remove the row or the part")


def _before_the_answer(messages: Messages, column: str, place: str, notes: Notes) -> tuple[Messages, str | None]:
    """The messages up to the last answer, and that answer where the conversation ends with it."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise RowError(f"column {column!r} holds the assistant's answer alone: there is no question; add one or remove the row")
    notes.add(SFT, place)
    return messages[:-1], messages[-1]["content"] or None


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
        raise RowError(f"column 'tools' must be a list of JSON schemas, got {_shown(value)}")
    return [without_nones(tool) for tool in value]


def without_nones(value: Any) -> Any:
    """Without the keys that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nones(inner) for key, inner in value.items() if inner is not None}
    return [without_nones(inner) for inner in value] if isinstance(value, list | tuple) else value


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


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__
