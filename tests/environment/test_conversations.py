"""Conversations over a sampler that remembers what it was asked: ids only grow, budgets hold, errors cost one sample."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest

from deploy.sums.tokenizer import build_tokenizer
from opd_governor.actors.environment.protocol import Failure, Reply, checked
from opd_governor.actors.environment.settings import EnvironmentSettings
from opd_governor.actors.environment.tools import ToolEnvironment, read_calls, schemas
from opd_governor.actors.extensions import ExtensionError
from opd_governor.actors.rollout.actor import request_seed
from opd_governor.actors.rollout.settings import RolloutSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.inputs.bridge import Bridge
from opd_governor.services.job.errors import JobError
from opd_governor.services.run.conversations import Conversations
from tests.environment.worlds import pool_here
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)
STOP = 3


class Echo:
    """Samples `a` and a number of tokens that follows from the request's seed; remembers every prompt."""

    def __init__(self, num_tokens: int = 3, *, forced: int | None = None) -> None:
        self.asked: list[Prompt] = []
        self.num_tokens, self.forced = num_tokens, forced

    async def rollout(
        self, requests: Sequence[tuple[Prompt, int]], limits: LengthLimits, step: int, settings: RolloutSettings, *, greedy: bool = False
    ) -> AsyncIterator[list[Trajectory]]:
        for prompt, sample in reversed(requests):
            self.asked.append(prompt)
            await asyncio.sleep(0)
            draw = np.random.default_rng(request_seed(0, prompt, sample, step))
            ids = (*TOKENIZER("a" + "bcdefg"[draw.integers(6)] * (self.num_tokens - 2), add_special_tokens=False).input_ids, STOP)
            budget = min(limits.cap_tokens, prompt.most_tokens or limits.cap_tokens)
            ids, ended = (ids, "stop") if len(ids) <= budget else (ids[:budget], "length")
            logprobs_T = draw.uniform(-3, 0, len(ids)).astype(np.float32)
            reason: Any = ended
            support = np.tile(np.array(ids, np.int32)[:, None], 2)
            held = {"sample": sample, "support_ids_TK": support, "forced": self.forced}
            yield [Trajectory(prompt, ids, logprobs_T, reason, budget, step, 0, 0, **held)]


def play(pool: Any, prompts: Sequence[str], *, turns: Echo | None = None, cap: int = 64, window: int = 256, strict: bool = False) -> Any:
    bridge = Bridge(TOKENIZER, {})
    player = Conversations(turns or Echo(), pool, bridge, lambda ids: TOKENIZER.decode(ids[:-1]), window, strict)  # type: ignore[arg-type]
    requests = [(Prompt(i, tuple(TOKENIZER(text).input_ids), text=text), s) for i, text in enumerate(prompts) for s in range(2)]

    async def all_of_them() -> list[Trajectory]:
        found = []
        async for group in player.rollout(requests, LengthLimits(cap), 1, RolloutSettings(min_new_tokens=1)):
            found += group
        return sorted(found, key=lambda t: (t.prompt.index, t.sample))

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("strict", [False, True])
def test_the_ids_of_a_conversation_only_grow(strict):
    turns = Echo()
    found = play(pool_here("Countdown"), ["one?", "two?"], turns=turns, strict=strict)
    assert [(t.prompt.index, t.sample) for t in found] == [(0, 0), (0, 1), (1, 0), (1, 1)], "each once"
    for t in found:
        assert (t.finish_reason, t.num_turns, t.reward, len(t.token_ids)) == ("stop", 3, 1.0, 9)
        text = TOKENIZER.decode(t.conversation_ids)
        answers = [TOKENIZER.decode(t.token_ids[i : i + 2]) for i in (0, 3, 6)]
        marks = "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
        assert text == answers[0] + marks.format(1) + answers[1] + marks.format(0) + answers[2] + "<|im_end|>"
        own = t.prompt.token_ids + t.conversation_ids
        asked = [p.token_ids for p in turns.asked if own[: len(p.token_ids)] == p.token_ids]
        assert len({len(ids) for ids in asked}) == 3, "every turn was sampled behind these very ids"
        assert t.support_ids_TK[:, 0].tolist() == list(t.token_ids), "fields stay with their tokens"
    assert len({request_seed(0, p, 0, 1) for p in turns.asked if p.index == 0}) == 3, "each turn has a seed of its own"


def test_the_same_conversations_strict_or_not_and_after_a_death():
    alike = [play(pool_here("Countdown", **held), ["one?", "two?"], strict=strict) for held, strict in CASES]
    for found in alike[1:]:
        for one, other in zip(alike[0], found, strict=True):
            assert one.conversation_ids == other.conversation_ids
            assert one.logprobs_T.tobytes() == other.logprobs_T.tobytes()
            assert (one.reward, one.num_turns) == (other.reward, other.num_turns)


CASES: list[tuple[dict[str, Any], bool]] = [({}, False), ({}, True), ({"dies": {3, 7, 8}, "concurrency": 1}, True), ({"dies": {5}}, False)]


def test_budgets_of_turn_and_conversation_and_the_turns_themselves():
    (t, _) = play(pool_here("Countdown", max_turns=2), ["one?"])
    assert (t.finish_reason, t.truncated, t.num_turns) == ("turns", False, 2)
    (t, _) = play(pool_here("Countdown", max_turn_tokens=2), ["one?"])
    assert (t.finish_reason, t.truncated, len(t.token_ids), t.budget_tokens) == ("length", True, 2, 2)
    (t, _) = play(pool_here("Countdown"), ["one?"], cap=5)
    assert (t.finish_reason, len(t.token_ids), t.budget_tokens) == ("length", 5, 5), "the cap is the conversation's"
    (t, _) = play(pool_here("Countdown"), ["one?"], cap=3)
    assert (t.finish_reason, t.num_turns, len(t.token_ids)) == ("length", 1, 3)
    (t, _) = play(pool_here("Countdown"), ["one?"], window=20)
    assert (t.finish_reason, t.num_turns) == ("length", 1), "what does not fit the window is not appended"
    assert not t.observed


def test_a_forced_token_is_no_choice_of_the_student():
    (t, _) = play(pool_here("Countdown", max_turns=2), ["one?"], turns=Echo(forced=1))
    assert len(t.token_ids) == len(t.logprobs_T) == len(t.support_ids_TK) == 4
    assert t.conversation_ids[1] not in t.token_ids[:1]
    assert not t.mask_T[1]


def test_the_same_words_again_are_counted_and_a_loop_of_turns_is_a_loop():
    turns = Echo(num_tokens=2)
    (t, _) = play(pool_here("Countdown"), ["one?"], turns=turns)
    assert (t.repeated_calls, t.num_turns) == (2, 3)


@pytest.mark.parametrize(
    ("prompt", "reason", "words"),
    [
        ("raises", "raised", "ValueError: no such world"),
        ("shouts", "nonsense", "100000 characters, more than environment.reply_characters"),
        ("role", "nonsense", "a role of user, tool, system"),
        ("silent", "nonsense", "is not done and says nothing"),
        ("reward", "nonsense", "its reward is 'much'"),
        ("nothing", "nonsense", "it gives None"),
    ],
)
def test_an_environment_that_misbehaves_costs_that_sample_alone(prompt, reason, words):
    bad, _, good, _ = play(pool_here("Misbehaving"), [prompt, "fine"])
    assert (bad.finish_reason, bad.failure, bad.token_ids) == ("error", reason, ())
    assert words in bad.refusal
    assert "\n" not in bad.refusal
    assert (good.finish_reason, good.reward, good.failure) == ("stop", 1.0, "")


def test_a_conversation_that_kills_its_process_again_and_again_fails():
    found = play(pool_here("Countdown", dies=set(range(1, 7)), concurrency=1), ["one?"])
    assert [t.failure for t in found] == ["died", "died"]


def test_tools_are_called_and_told_what_is_wrong():
    tools = ToolEnvironment(["tests.environment.worlds:add"])
    (schema,) = schemas(["tests.environment.worlds:add"])
    assert schema["function"]["parameters"]["required"] == ["a", "b"]

    def said(text: str) -> list[str]:
        messages, _, done = tools.open({}).answer({"content": text})
        assert done == (not messages)
        return [message["content"] for message in messages]

    call = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call>'
    assert said(f"so {call} and {call}") == ["3", "3"]
    assert said("the answer is 3") == []
    assert said(call.replace("add", "sub")) == ["Error: no tool 'sub'; known: add"]
    assert "unexpected keyword" in said(call.replace('"b"', '"c"'))[0]
    assert said("<tool_call>{") == ['Error: a call must be JSON: {"name": ..., "arguments": {...}}']
    assert read_calls('<tool_call>{"name": "x", "arguments": 3}</tool_call>')[0].trouble == "arguments must be a JSON object"
    with pytest.raises(ExtensionError, match=r"environment.tools tests.environment.worlds:sub: tests.environment.worlds has no sub"):
        schemas(["tests.environment.worlds:sub"])


def test_a_template_that_rewrites_earlier_turns_is_refused():
    forgets = tiny_tokenizer(chat=True)
    forgets.chat_template = (
        "{% for m in messages %}{% if m.role != 'assistant' or loop.last %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    with pytest.raises(JobError, match="writes earlier turns otherwise once a message of role user follows"):
        Bridge(forgets, {})([{"role": "user", "content": "more"}])
    deaf = tiny_tokenizer(chat=True)
    deaf.chat_template = deaf.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message.role != 'tool' %}"
    )
    with pytest.raises(JobError, match="leaves out messages of role tool"):
        Bridge(deaf, {})([{"role": "tool", "content": "7"}])
    with pytest.raises(JobError, match="the student's tokenizer says: "):
        Bridge(build_tokenizer(64), {})([{"role": "user", "content": "Zebra"}])
    assert TOKENIZER.decode(Bridge(tiny_tokenizer(), {})([{"role": "user", "content": "more"}])) == "more"


def test_settings_and_answers_held_against_the_protocol():
    with pytest.raises(ValueError, match="name an entry, or tools"):
        EnvironmentSettings()
    assert checked(([], None, True), 10) == Reply((), None, True)
    assert isinstance(checked(([], float("nan"), True), 10), Failure)
