"""The job's environment as a run and a check both see it: loaded once, with the bridge between turns."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opd_governor.actors.environment.protocol import load_environment
from opd_governor.actors.environment.settings import EnvironmentSettings
from opd_governor.actors.environment.tools import schemas
from opd_governor.actors.extensions import ExtensionError
from opd_governor.services.inputs.bridge import Bridge
from opd_governor.services.job.settings import Job, JobError

CONTENT = "1234"
"""Digits, which every tokenizer has."""


def tool_schemas(job: Job) -> list[dict[str, Any]] | None:
    """None without tools. Raises JobError."""
    if job.environment is None or not job.environment.tools:
        return None
    try:
        return schemas(job.environment.tools)
    except ExtensionError as error:
        raise JobError(str(error)) from None


def tools_json(job: Job) -> str:
    """For the encoding of prompts."""
    found = tool_schemas(job)
    return json.dumps(found) if found else ""


def environment_identity(settings: EnvironmentSettings) -> dict[str, Any]:
    """What shapes its answers: the limits of a conversation, and its code. A file counts by content, a module by name."""
    limits = settings.model_dump(mode="json", include={"max_turns", "max_turn_tokens", "reply_characters"})
    return limits | {"code": [_content(spec) for spec in (settings.entry, *settings.tools) if spec]}


def _content(spec: str) -> list[str]:
    place, _, name = spec.rpartition(":")
    file = Path(place)
    return [hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else place, name]


def open_environment(job: Job, tokenizer: Any) -> Bridge | None:
    """The bridge between turns; None without an environment. Raises JobError, one line, for what can be known to be wrong."""
    if job.environment is None:
        return None
    try:
        load_environment(job.environment)
    except ExtensionError as error:
        raise JobError(str(error)) from None
    bridge = Bridge(tokenizer, job.data.prompts.template, tool_schemas(job))
    message: Mapping[str, Any] = {"role": "user", "content": CONTENT}
    if job.environment.tools:
        message = {"role": "tool", "name": "tool", "content": CONTENT}
    try:
        bridge([message])
    except JobError as error:
        raise JobError(f"environment: {error}") from None
    return bridge
