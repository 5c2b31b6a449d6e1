"""What a teacher's server is and offers, asked before a run starts: `opd check` prints it, and refuses what cannot work."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from opd_governor.actors.teacher.http_client import Client, RefusedError, TeacherUnavailableError
from opd_governor.actors.teacher.scorers import ScoreRequest
from opd_governor.actors.teacher.servers import Server, find_server, read_ids
from opd_governor.actors.teacher.settings import TeacherSettings

PROBE_TIMEOUT_S = 30.0
NAMED = 5
"""Models named of many."""


class ServerError(ValueError):
    """A server that cannot be this job's teacher: one line with the address, what is wrong and what to do."""


@dataclass(frozen=True, slots=True)
class ServerReport:
    """What a server said."""

    kind: str
    """In words: how it is asked for scores."""
    models: tuple[str, ...]
    """What it serves; empty where it does not say."""
    window_tokens: int | None
    """Prompt, response and one token more must fit. None: it does not say."""
    given_ids: bool
    """It scores the student's own ids (supports student and union)."""
    seconds: float
    """One scored probe."""
    other_tokens: tuple[str, ...]
    """Of the texts it was asked about: those that it encodes otherwise. Empty where it has no /tokenize."""


def probe(settings: TeacherSettings, stop_ids: Sequence[int] = (0,), texts: Mapping[str, Sequence[int]] | None = None) -> ServerReport:
    """Ask the server for what it serves, and for the scores of a few tokens. `texts`: some texts and the student's ids of them, without
    special tokens, to compare tokenizers by. Raises ServerError.

    >>> probe(TeacherSettings(model="big", backend="http", url="http://127.0.0.1:8000"), stop_ids=(2,))   # doctest: +SKIP
    """
    try:
        client = Client(settings.model_copy(update={"max_attempts": 1}))
    except ValueError as error:
        raise ServerError(str(error)) from error
    where = f"teacher {settings.name}: {settings.url}"
    deadline = time.monotonic() + PROBE_TIMEOUT_S
    try:
        models, window_tokens = _models(client)
        if models and settings.model not in models and settings.server != "sglang":
            raise ServerError(f"{where} serves {_some(models)}, not {settings.model}; set teacher.model to one of them")
        server = find_server(client, tuple(stop_ids), deadline)
        seconds = _scored(client, server, tuple(stop_ids))
        return ServerReport(server.way, models, window_tokens, server.given_ids, seconds, _encoded_otherwise(client, texts or {}))
    except TeacherUnavailableError as error:
        raise ServerError(f"{error}; start the server, or correct teacher.url") from error
    except RefusedError as error:
        raise ServerError(f"{where} refused a probe: {error}; look at its log, correct teacher.model or the key (VLLM_API_KEY)") from error
    except ServerError:
        raise
    except ValueError as error:
        raise ServerError(str(error)) from error
    finally:
        client.close()


def _models(client: Client) -> tuple[tuple[str, ...], int | None]:
    """What the server says it serves, and the window; nothing where it answers in a form of its own."""
    listed = client.get("/v1/models")
    entries = listed.get("data") if isinstance(listed, dict) else None
    named = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    windows = {name: _size(entry.get("max_model_len")) for entry in named if isinstance(name := entry.get("id"), str)}
    information = client.get("/get_server_info") if not any(windows.values()) else None
    window = windows.get(client.settings.model) or next(filter(None, windows.values()), None)
    if window is None and isinstance(information, dict):
        window = _size(information.get("context_length"))
    return tuple(windows), window


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _size(value: Any) -> int | None:
    """A number of tokens; None for anything else."""
    return int(value) if isinstance(value, int | float | str) and str(value).isdecimal() and int(value) > 0 else None


def _scored(client: Client, server: Server, stop_ids: tuple[int, ...]) -> float:
    """Seconds that four tokens take. Raises ServerError where their log-probs are none."""
    started = time.monotonic()
    request = ScoreRequest(stop_ids[:1], stop_ids[:1] * 4)
    scores = server.score(client, request, started + PROBE_TIMEOUT_S)
    logp = np.concatenate([scores.sampled_logp_T, scores.stop_logp_T])
    if not (np.isfinite(logp).all() and (logp <= 1e-3).all()):
        raise ServerError(f"{client.settings.url} scores a probe with {logp.tolist()}, which are no log-probs; look at its log")
    return time.monotonic() - started


def _encoded_otherwise(client: Client, texts: Mapping[str, Sequence[int]]) -> tuple[str, ...]:
    """The texts whose ids differ at the server's /tokenize; none where it has no such path, or one that answers otherwise."""
    different = []
    for text, ids in texts.items():
        body = {"model": client.settings.model, "prompt": text, "add_special_tokens": False}
        try:
            tokens = client.post("/tokenize", body, _tokens, time.monotonic() + PROBE_TIMEOUT_S)
        except (RefusedError, TeacherUnavailableError):
            return ()
        if tokens != list(ids):
            different.append(text)
    return tuple(different)


def _tokens(answer: Any) -> list[int]:
    return read_ids(answer.get("tokens") if isinstance(answer, dict) else None)
