"""What the proxy turns in a request, and how it counts answers."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.sidecar.answers import read_answer
from opd_governor.services.sidecar.requests import GENERATION, LOOP_STOP, Turned, turn

REST = LengthLimits(cap_tokens=512)
PRESSED = LengthLimits(cap_tokens=100, loop_tail_weight=0.0)
COMPLETIONS, CHAT = GENERATION["/v1/completions"], GENERATION["/v1/chat/completions"]


def test_without_pressure_the_bytes_pass_as_they_came() -> None:
    body = b'{ "max_tokens" : 512 ,"prompt":[1, 2],  "x":"\\u00e9" }'
    turned = turn(body, COMPLETIONS, REST, 512)
    assert (turned.body, turned.asked_tokens, turned.cap_tokens) == (body, 512, 512)


def test_under_pressure_only_the_cap_and_the_loop_stop_change() -> None:
    body = b'{ "max_tokens" : 512 ,"prompt":[1, 2],  "x":"\\u00e9", "y": {"max_tokens": 7} }'
    turned = turn(body, COMPLETIONS, PRESSED, 512)
    loop_stop = json.dumps(LOOP_STOP).encode()
    assert (
        turned.body
        == b'{"repetition_detection": ' + loop_stop + b',  "max_tokens" : 100 ,"prompt":[1, 2],  "x":"\\u00e9", "y": {"max_tokens": 7} }'
    )
    assert (turned.asked_tokens, turned.cap_tokens) == (512, 100)


def test_a_cap_that_is_lower_already_stays() -> None:
    assert json.loads(turn(b'{"max_tokens": 50}', COMPLETIONS, PRESSED, 512).body)["max_tokens"] == 50


def test_a_chat_without_a_cap_gets_one() -> None:
    assert json.loads(turn(b"{}", CHAT, PRESSED, 512).body)["max_tokens"] == 100
    assert json.loads(turn(b'{"max_completion_tokens": 400}', CHAT, PRESSED, 512).body)["max_completion_tokens"] == 100


def test_token_routes_keep_their_parameters_inside() -> None:
    body = b'{"token_ids": [1], "sampling_params": {"n": 2, "max_tokens": 300}}'
    turned = turn(body, GENERATION["/inference/v1/generate"], LengthLimits(cap_tokens=100), 512)
    assert turned.body == b'{"token_ids": [1], "sampling_params": {"n": 2, "max_tokens": 100}}'
    assert turned.choices == 2
    sglang = turn(b'{"text": "a", "sampling_params": {"max_new_tokens": 300}}', GENERATION["/generate"], PRESSED, 512)
    assert json.loads(sglang.body)["sampling_params"] == {"max_new_tokens": 100}
    added = turn(b'{"text": "a"}', GENERATION["/generate"], LengthLimits(cap_tokens=100), 512)
    assert json.loads(added.body) == {"text": "a", "sampling_params": {"max_new_tokens": 100}}


def test_a_thinking_budget_leaves_room_for_the_answer() -> None:
    body = turn(b'{"max_tokens": 512, "thinking_token_budget": 400}', CHAT, PRESSED, 512).body
    assert json.loads(body)["thinking_token_budget"] == 80


@pytest.mark.parametrize("body", [b"", b"no json", b"[1]", b'"a"', b'{"max_tokens": "x"', b"\xff\xfe", b'{"sampling_params": 3}'])
def test_what_is_not_understood_passes_as_it_came(body: bytes) -> None:
    for path in GENERATION:
        assert turn(body, GENERATION[path], LengthLimits(cap_tokens=100), 512).body == body or body == b'{"sampling_params": 3}'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


@given(st.dictionaries(st.text(), VALUES), st.integers(101, 4000), st.sampled_from([None, 1, 3]), st.booleans())
def test_all_else_of_any_request_is_the_same(request: dict[str, Any], cap: int, indent: int | None, ascii_only: bool) -> None:
    request = request | {"max_tokens": cap}
    body = json.dumps(request, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    turned = turn(body, COMPLETIONS, LengthLimits(cap_tokens=100), 4096)
    if turned.body != body:
        assert json.loads(turned.body) == request | {"max_tokens": 100}
        assert len(body) - len(turned.body) == len(str(cap)) - 3


def answer(**document: Any) -> bytes:
    return json.dumps(document).encode()


def test_plain_answers() -> None:
    one = Turned(b"", 512, 512)
    completion = answer(choices=[{"text": "a", "finish_reason": "stop"}], usage={"completion_tokens": 7})
    assert [(e.tokens, e.reason) for e in read_answer(completion, one, False)] == [(7, "stop")]
    listed = answer(choices=[{"index": 0, "token_ids": [1, 2, 3], "finish_reason": "repetition"}])
    assert [(e.tokens, e.reason) for e in read_answer(listed, one, False)] == [(3, "repetition")]
    two = answer(choices=[{"finish_reason": "length"}, {"finish_reason": "stop"}], usage={"completion_tokens": 120})
    assert [(e.tokens, e.reason) for e in read_answer(two, Turned(b"", 512, 100, 2), False)] == [(100, "length"), (20, "stop")]
    sglang = answer(text="a", meta_info={"completion_tokens": 9, "finish_reason": {"type": "length", "length": 9}})
    assert [(e.tokens, e.reason) for e in read_answer(sglang, Turned(b"", 9, 9), False)] == [(9, "length")]


def test_streams() -> None:
    def stream(*events: Any) -> bytes:
        return b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events) + b"data: [DONE]\n\n"

    texts = [{"choices": [{"index": 0, "text": "x", "finish_reason": None}]} for _ in range(4)]
    end = {"choices": [{"index": 0, "text": "", "finish_reason": "stop"}]}
    one = Turned(b"", 64, 64)
    assert [(e.tokens, e.reason) for e in read_answer(stream(*texts, end), one, True)] == [(4, "stop")]
    usage = {"choices": [], "usage": {"completion_tokens": 11}}
    assert [(e.tokens, e.reason) for e in read_answer(stream(*texts, end, usage), one, True)] == [(11, "stop")]
    cut = {"choices": [{"index": 0, "text": "x", "finish_reason": "length"}]}
    assert [(e.tokens, e.reason) for e in read_answer(stream(*texts, cut), one, True)] == [(64, "length")]
    chat = {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]}
    assert [
        e.tokens for e in read_answer(stream(chat, chat, {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}), one, True)
    ] == [2]
