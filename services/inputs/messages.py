"""Chat messages as people store them: lists, JSON, ShareGPT, parts, and conversations that end with the answer. Pure."""

import ast
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from opd_governor.services.inputs.refusals import RowError

Messages = list[dict[str, Any]]

SPEAKERS = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant"}
"""Roles of ShareGPT's `from`."""

SFT = "conversations end with the assistant's answer: it is taken as their golden answer"
SFT_BESIDE_GOLDEN = "conversations end with the assistant's answer: left out, the golden column has the one that is taken"
NO_ANSWER = "conversations end with an assistant's turn that calls tools or says nothing: left out"
FROM_JSON = "prompts are messages as a JSON string: read as messages"
FROM_PYTHON = "prompts are messages as Python prints them: read as messages"
FROM_VALUE = "prompts have messages with from and value: read as role and content"
PARTS = "messages hold their content in parts of type text: joined"


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


def read_messages(value: Any, column: str, place: str, notes: Notes) -> Messages:
    """A list of messages, each with role and text. Raises RowError."""
    odd: set[str] = set()
    messages = [_message(message, column, odd) for message in value]
    for kind in sorted(odd):
        notes.add(kind, place)
    return messages


def messages_in(text: str, place: str, notes: Notes) -> list[Any] | None:
    """Messages written into a text, as JSON or as Python prints them (a CSV of pandas); None for any other text."""
    if text.lstrip()[:1] != "[":
        return None
    for kind, quote, read in ((FROM_JSON, '"', json.loads), (FROM_PYTHON, "'", ast.literal_eval)):
        if f"{quote}role{quote}" not in text or f"{quote}content{quote}" not in text:
            continue
        try:
            value = read(text.strip())
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        if isinstance(value, list) and value and all(isinstance(message, dict) and "role" in message for message in value):
            notes.add(kind, place)
            return value
    return None


def _message(message: Any, column: str, odd: set[str]) -> dict[str, Any]:
    """One message with text content. Keys that are None are dropped: tables hold them for messages that never had them."""
    if not isinstance(message, Mapping):
        raise RowError(f"column {column!r} must be text or a list of messages with role and content, got a list of {shown(message)}")
    message = {key: without_nones(value) for key, value in message.items() if value is not None}
    if "from" in message and "value" in message and "role" not in message:
        odd.add(FROM_VALUE)
        speaker = message.pop("from")
        message["role"], message["content"] = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker, message.pop("value")
    if not isinstance(message.get("role"), str):
        raise RowError(f"column {column!r} must be text or a list of messages with role and content: a message has no role")
    content = message.get("content", "" if message.get("tool_calls") else None)
    if isinstance(content, list | tuple):
        odd.add(PARTS)
        content = "".join(_part(part) for part in content)
    if not isinstance(content, str):
        raise RowError(f"column {column!r} must be text or a list of messages with role and content: content is {shown(content)}")
    return message | {"content": content}


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str) and part.get("type", "text") == "text":
        return part["text"]
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    raise RowError(f"a message holds a part of type {shown(kind)}: only text is read; remove the row or the part")


def before_the_answer(messages: Messages, column: str) -> tuple[Messages, dict[str, Any] | None]:
    """The messages up to the last answer, and that answer where the conversation ends with it."""
    if messages[-1]["role"] != "assistant":
        return messages, None
    if len(messages) == 1:
        raise RowError(f"column {column!r} holds the assistant's answer alone: there is no question; add one or remove the row")
    return messages[:-1], messages[-1]


def without_nones(value: Any) -> Any:
    """Without the keys that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_nones(inner) for key, inner in value.items() if inner is not None}
    return [without_nones(inner) for inner in value] if isinstance(value, list | tuple) else value


def shown(value: Any) -> str:
    text = repr(value)
    return f"{type(value).__name__} {text}" if len(text) <= 60 else type(value).__name__
