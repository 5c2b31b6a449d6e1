"""Python functions as tools: their schemas, the student's calls read from its text, and what they answer.

a message with <tool_call>{"name": ..., "arguments": {...}}</tool_call> --> a message of role tool for each call
a message without a call ends the conversation

The format is that of Hermes, which Qwen and many others share.
"""

import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from opd_governor.actors.extensions import ExtensionError, part_of

CALL = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """One call as the student wrote it."""

    name: str
    arguments: Mapping[str, Any]
    trouble: str = ""
    """Why it cannot be made, in words for the student; empty where it can."""


def read_calls(text: str) -> list[Call]:
    """The calls in a message, in order; one that is no JSON of the right form has trouble.

    >>> read_calls('so <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>')
    [Call(name='add', arguments={'a': 1}, trouble='')]
    """
    calls = []
    for body in CALL.findall(text):
        try:
            said = json.loads(body)
            name, arguments = said["name"], said.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError):
            calls.append(Call("", {}, 'a call must be JSON: {"name": ..., "arguments": {...}}'))
            continue
        sound = isinstance(name, str) and isinstance(arguments, dict)
        calls.append(Call(name, arguments) if sound else Call(str(name), {}, "arguments must be a JSON object"))
    return calls


def load_tools(specs: Sequence[str]) -> dict[str, Callable[..., Any]]:
    """Functions by their names. Raises ExtensionError."""
    tools: dict[str, Callable[..., Any]] = {}
    for spec in specs:
        function = part_of(spec, "environment.tools")
        if not callable(function):
            raise ExtensionError(f"environment.tools {spec}: it is no function")
        if function.__name__ in tools:
            raise ExtensionError(f"environment.tools {spec}: there is a tool {function.__name__} already; rename one")
        tools[function.__name__] = function
    return tools


def schemas(specs: Sequence[str]) -> list[dict[str, Any]]:
    """Of each tool, as chat templates take it. Raises ExtensionError where hints or docstring do not tell it."""
    found = []
    get_json_schema = importlib.import_module("transformers.utils").get_json_schema
    for name, function in load_tools(specs).items():
        try:
            found.append(get_json_schema(function))
        except Exception as error:
            why = " ".join(str(error).split())
            raise ExtensionError(f"environment.tools {name}: {why}; add type hints and a docstring with an Args section") from error
    return found


class ToolEnvironment:
    """Every task has the same tools; a task has no state."""

    def __init__(self, specs: Sequence[str]) -> None:
        self._tools = load_tools(specs)

    def open(self, row: Mapping[str, Any]) -> "ToolEnvironment":
        return self

    def answer(self, message: Mapping[str, Any]) -> tuple[list[dict[str, str]], None, bool]:
        """What each call gives; done where there is none."""
        calls = read_calls(message["content"])
        return [{"role": "tool", "name": call.name, "content": self._made(call)} for call in calls], None, not calls

    def _made(self, call: Call) -> str:
        """The tool's answer. Whatever is wrong is told to the student, which may do better."""
        if call.trouble:
            return f"Error: {call.trouble}"
        if call.name not in self._tools:
            return f"Error: no tool {call.name[:60]!r}; known: {', '.join(self._tools)}"
        try:
            found = self._tools[call.name](**call.arguments)
            return found if isinstance(found, str) else json.dumps(found)
        except Exception as error:
            return f"Error: {type(error).__name__}: {' '.join(str(error).split())[:200]}"
