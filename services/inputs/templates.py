"""A tokenizer and its chat template as rows meet them: whatever either raises is that row's refusal.

messages --ChatForm.render--> text --Encoder.ids--> token ids
"""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from opd_governor.services.inputs.messages import Messages
from opd_governor.services.inputs.models import end_of_turn
from opd_governor.services.inputs.refusals import RowError, is_theirs, theirs, words
from opd_governor.services.job.settings import JobError

T = TypeVar("T")
Conversation = tuple[Messages, list[dict[str, Any]] | None]
"""Messages and tools."""
QUESTION = "What is one and one?"


class ChatForm:
    """A tokenizer's chat template with its variables."""

    def __init__(self, tokenizer: Any, keys: Mapping[str, Any], whose: str) -> None:
        """`whose`: for messages, such as `the student`."""
        self._tokenizer, self._keys, self._whose = tokenizer, dict(keys), whose
        self.opening = self._opening() if tokenizer.chat_template else None
        """The special token that every rendered prompt begins with, after a BOS; None where there is none."""

    @property
    def exists(self) -> bool:
        """Whether the tokenizer has a template."""
        return bool(self._tokenizer.chat_template)

    def render(self, conversations: Sequence[Conversation]) -> list[str | RowError]:
        """Each conversation as text that asks for an answer."""
        rendered: dict[int, str | RowError] = {}
        groups: dict[str, list[int]] = {}
        for place, (_, tools) in enumerate(conversations):
            groups.setdefault(json.dumps(tools) if tools else "", []).append(place)
        for places in groups.values():
            tools = conversations[places[0]][1]
            texts = one_by_one(lambda group, tools=tools: self._render(group, tools), [conversations[i][0] for i in places], self._refused)  # type: ignore[misc]
            rendered.update(zip(places, texts, strict=True))
        return [rendered[place] for place in range(len(conversations))]

    def _render(self, conversations: Sequence[Messages], tools: Any) -> Sequence[str]:
        return self._tokenizer.apply_chat_template(
            list(conversations), tools=tools, tokenize=False, add_generation_prompt=True, **self._keys
        )

    def _refused(self, error: BaseException) -> RowError:
        return RowError(f"{self._whose}'s chat template says: {words(error)}; mend the messages, or set data.prompts.template or chat")

    def _opening(self) -> str | None:
        (text,) = self.render([([{"role": "user", "content": QUESTION}], None)])
        if isinstance(text, RowError):
            return None
        text = text.removeprefix(self._tokenizer.bos_token or "")
        specials = sorted((str(token) for token in self._tokenizer.added_tokens_decoder.values()), key=len, reverse=True)
        return next((special for special in specials if special and text.startswith(special)), None)


class Encoder:
    """A tokenizer's ids of texts, without the special tokens that it would add, but for its BOS where asked."""

    def __init__(self, tokenizer: Any, whose: str) -> None:
        self._tokenizer, self._whose = tokenizer, whose
        self.bos_token: str | None = tokenizer.bos_token
        bos = tokenizer.bos_token_id
        with theirs(whose, "the tokenizer", "give one that encodes text", JobError):
            # Only a BOS that the tokenizer adds by itself; one that also appends an eos would end the prompt before the answer.
            self.bos = bos if bos is not None and self._ids_of(tokenizer("").input_ids)[:1] == [bos] else None
        fast = getattr(tokenizer, "backend_tokenizer", None)
        self._fast = fast if fast is not None and hasattr(fast, "encode_batch_fast") and not tokenizer.split_special_tokens else None

    def ids(self, texts: Sequence[str]) -> list[list[int] | RowError]:
        """Token ids of each text."""
        return one_by_one(self._encode, texts, self._refused)

    def _encode(self, texts: Sequence[str]) -> Sequence[list[int]]:
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()
            return [encoding.ids for encoding in self._fast.encode_batch_fast(list(texts), add_special_tokens=False)]
        return [self._ids_of(self._tokenizer(text, add_special_tokens=False).input_ids) for text in texts]

    @staticmethod
    def _ids_of(ids: Any) -> list[int]:
        return [int(token) for token in ids]

    def _refused(self, error: BaseException) -> RowError:
        return RowError(f"{self._whose}'s tokenizer says: {words(error)}; mend the text or remove the row")


def one_by_one(
    call: Callable[[Sequence[Any]], Sequence[T]], items: Sequence[Any], refused: Callable[[BaseException], RowError]
) -> list[T | RowError]:
    """`call` on all items; where it raises or answers short, on each alone, so that one of them costs itself only."""
    if not items:
        return []
    try:
        answers: list[T | RowError] = list(call(items))
        if len(answers) == len(items):
            return answers
        error: BaseException = ValueError(f"{len(answers)} answers to {len(items)}")
    except BaseException as raised:
        if not is_theirs(raised):
            raise
        error = raised
    if len(items) == 1:
        return [refused(error)]
    return [answer for item in items for answer in one_by_one(call, [item], refused)]


def stop_words(tokenizer: Any) -> dict[int, str]:
    """The ids that end an answer by the tokenizer's own account, as they stand in text: its eos and the template's end of turn."""
    ids = [stop for stop in (tokenizer.eos_token_id, end_of_turn(tokenizer)) if stop is not None]
    return {int(stop): str(tokenizer.convert_ids_to_tokens(int(stop))) for stop in ids}
