"""How long an answer of a generation server was and why it ended, from the bytes that passed. Pure."""

import json
from dataclasses import dataclass
from typing import Any

from opd_governor.services.sidecar.post import REASONS
from opd_governor.services.sidecar.requests import Turned


@dataclass(frozen=True, slots=True)
class Ended:
    """One answer."""

    tokens: int
    reason: str
    """stop, length, repetition or error."""
    cap_tokens: int | None
    """The cap that applied."""


def read_answer(data: bytes, turned: Turned, streamed: bool) -> list[Ended]:
    """Every answer in a response. Raises ValueError for what is no answer of a known server."""
    return _streamed(data, turned) if streamed else _plain(json.loads(data), turned)


def _plain(answer: Any, turned: Turned) -> list[Ended]:
    if isinstance(answer, list) or "meta_info" in answer:  # SGLang
        return [_sglang(one, turned) for one in (answer if isinstance(answer, list) else [answer])]
    choices = answer["choices"]
    counts = [_own_count(choice) for choice in choices]
    total = (answer.get("usage") or {}).get("completion_tokens")
    if None in counts and isinstance(total, int):
        counts = _share(total, choices, turned)
    return [_ended(count, choice.get("finish_reason"), turned) for count, choice in zip(counts, choices, strict=True)]


def _own_count(choice: dict[str, Any]) -> int | None:
    """Tokens of one choice, where the server lists them."""
    if isinstance(choice.get("token_ids"), list):
        return len(choice["token_ids"])
    logprobs = choice.get("logprobs")
    listed = (logprobs or {}).get("tokens") or (logprobs or {}).get("content") if isinstance(logprobs, dict) else None
    return len(listed) if isinstance(listed, list) else None


def _share(total: int, choices: list[dict[str, Any]], turned: Turned) -> list[int | None]:
    """A total over several choices: cut ones are as long as the cap, the rest is shared evenly."""
    cut = [choice.get("finish_reason") == "length" for choice in choices]
    cap = turned.cap_tokens or 0
    left = max(0, total - cap * sum(cut)) if cap else total
    num_left = len(choices) - sum(cut) if cap else len(choices)
    return [cap if one and cap else round(left / max(1, num_left)) for one in cut]


def _sglang(answer: dict[str, Any], turned: Turned) -> Ended:
    meta = answer["meta_info"]
    reason = meta.get("finish_reason")
    return _ended(meta.get("completion_tokens"), reason.get("type") if isinstance(reason, dict) else reason, turned)


def _ended(tokens: int | None, reason: Any, turned: Turned) -> Ended:
    """A server that ends an answer before its cap and says `length` ran out of context: the answer was cut all the same."""
    end = REASONS.get(str(reason), "error") if reason is not None else "error"
    if tokens is None:
        tokens = turned.cap_tokens if end == "length" else None
    if tokens is None:
        raise ValueError("the answer does not tell how many tokens it has")
    return Ended(tokens, end, turned.cap_tokens)


def _streamed(data: bytes, turned: Turned) -> list[Ended]:
    """Server-sent events. Without usage, a choice has as many tokens as it had events: at least; a cut one as many as its cap."""
    events = [line[5:].strip() for line in data.split(b"\n") if line.startswith(b"data:")]
    events = [event for event in events if event != b"[DONE]"]
    if not events:
        raise ValueError("a stream without events")
    last = json.loads(events[-1])
    if "meta_info" in last:  # SGLang: each event tells all so far
        return [_sglang(last, turned)]
    reasons: dict[int, Any] = {}
    counts: dict[int, int] = {}
    total: int | None = None
    for event in events:
        document = json.loads(event)
        if (usage := document.get("usage")) and not document.get("choices"):
            total = usage.get("completion_tokens")
        for choice in document.get("choices") or []:
            index = choice.get("index", 0)
            listed = _own_count(choice)
            delta = choice.get("delta")
            text = choice.get("text") or (delta or {}).get("content") or (delta or {}).get("reasoning_content")
            counts[index] = counts.get(index, 0) + (listed if listed is not None else 1 if text else 0)
            reasons[index] = choice.get("finish_reason") or reasons.get(index)
    if total is not None and len(counts) == 1:
        counts = dict.fromkeys(counts, total)
    cap = turned.cap_tokens
    return [
        _ended(cap if reasons[index] == "length" and cap is not None and total is None else count, reasons[index], turned)
        for index, count in counts.items()
    ]
