"""What of a generation request is turned: its cap, the in-engine loop stop, its thinking budget. Pure, and byte for byte elsewhere."""

import json
from dataclasses import dataclass
from typing import Any

from opd_governor.actors.extensions import Kind
from opd_governor.actors.trajectory import LengthLimits

LOOP_STOP = {"max_pattern_size": 64, "min_pattern_size": 1, "min_count": 8}
"""vLLM's repetition_detection: a pattern of up to 64 tokens, eight times in a row."""
THINKING_SHARE = 0.8
"""Of a lowered cap, what a thinking budget may take: an answer must fit behind it."""
PRESSED = 0.999
"""The policy's loop tail weight below which loops are stopped in the engine too."""


@dataclass(frozen=True, slots=True)
class Route:
    """One kind of generation request."""

    caps: tuple[str, ...]
    """Names of its cap; the first is added where none is given and the server's own default is longer."""
    inside: str | None = None
    """Object (or list of objects) that holds the sampling parameters; None: the request itself."""
    default_cap_tokens: int | None = None
    """The server's own cap where a request names none; None: what is left of the context."""
    loop_stop: bool = False
    """Whether the server takes `repetition_detection`."""


GENERATION: Kind[Route] = Kind("generation route")
"""Path -> how its requests are read."""
GENERATION.add("/v1/completions")(Route(("max_tokens",), default_cap_tokens=16, loop_stop=True))
GENERATION.add("/v1/chat/completions")(Route(("max_tokens", "max_completion_tokens"), loop_stop=True))
GENERATION.add("/inference/v1/generate")(Route(("max_tokens",), inside="sampling_params", default_cap_tokens=16, loop_stop=True))
GENERATION.add("/generate")(Route(("max_new_tokens",), inside="sampling_params", default_cap_tokens=128))


@dataclass(frozen=True, slots=True)
class Turned:
    """A request as it goes on."""

    body: bytes
    asked_tokens: int | None
    """The cap that the trainer asked for; None: none that could be read."""
    cap_tokens: int | None
    """The cap that applies to its answers."""
    choices: int = 1


def turn(body: bytes, route: Route, limits: LengthLimits, base_cap_tokens: int | None) -> Turned:
    """The request under these limits; its very bytes where nothing has to change, or where it is not understood.

    >>> limits = LengthLimits(cap_tokens=100)
    >>> turn(b'{"prompt": "a",  "max_tokens":512}', GENERATION["/v1/completions"], limits, 512).body
    b'{"prompt": "a",  "max_tokens":100}'
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        return Turned(body, None, None)
    if not isinstance(request, dict):
        return Turned(body, None, None)
    holder: Any = request if route.inside is None else request.get(route.inside, {})
    if isinstance(holder, list):
        # SGLang's list of parameters, one for each prompt: left alone, and counted.
        return Turned(body, None, None)
    if not isinstance(holder, dict):
        return Turned(body, None, None)
    named = next((name for name in route.caps if isinstance(holder.get(name), int)), None)
    asked = holder[named] if named else route.default_cap_tokens
    pressed = base_cap_tokens is not None and limits.cap_tokens < base_cap_tokens
    cap = limits.cap_tokens if pressed and (asked is None or limits.cap_tokens < asked) else asked
    changes: dict[str, Any] = {}
    if cap is not None and cap != asked:
        changes[named or route.caps[0]] = cap
    if route.loop_stop and limits.loop_tail_weight < PRESSED and holder.get("repetition_detection") is None:
        changes["repetition_detection"] = LOOP_STOP
    budget = holder.get("thinking_token_budget")
    if cap is not None and cap != asked and isinstance(budget, int) and budget > THINKING_SHARE * cap:
        changes["thinking_token_budget"] = int(THINKING_SHARE * cap)
    choices = holder.get("n") if isinstance(holder.get("n"), int) else 1
    return Turned(_edit(body, changes, route.inside), asked, cap, choices or 1)


def _edit(body: bytes, changes: dict[str, Any], inside: str | None) -> bytes:
    """The same JSON text with these members set, all else left as it stands."""
    if not changes:
        return body
    text = body.decode()
    at = _members(text, 0)
    if inside is not None:
        if inside not in at:
            return _insert(text, 0, json.dumps(inside) + ": " + json.dumps(changes)).encode()
        start, end = at[inside]
        return (text[:start] + _edit(text[start:end].encode(), changes, None).decode() + text[end:]).encode()
    for name, value in sorted(changes.items(), key=lambda item: -at.get(item[0], (-1, 0))[0]):
        if name in at:
            start, end = at[name]
            text = text[:start] + json.dumps(value) + text[end:]
    for name, value in changes.items():
        if name not in at:
            text = _insert(text, 0, f"{json.dumps(name)}: {json.dumps(value)}")
    return text.encode()


def _insert(text: str, at: int, member: str) -> str:
    """A first member of the object that begins at or after `at`."""
    opening = text.index("{", at) + 1
    rest = text[opening:]
    return text[:opening] + member + ("" if rest.lstrip().startswith("}") else ", ") + rest


def _members(text: str, at: int) -> dict[str, tuple[int, int]]:
    """Where the values of an object's members stand: name -> (start, end) in the text. The last of a name twice given counts."""
    decoder = json.JSONDecoder()
    found: dict[str, tuple[int, int]] = {}
    at = text.index("{", at) + 1
    while True:
        while text[at] in " \t\r\n,":
            at += 1
        if text[at] == "}":
            return found
        name, at = decoder.raw_decode(text, at)
        at = text.index(":", at) + 1
        while text[at] in " \t\r\n":
            at += 1
        start = at
        _, at = decoder.raw_decode(text, at)
        found[name] = (start, at)
