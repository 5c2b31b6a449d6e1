"""From what an environment says to the ids that follow a turn: the difference of two renderings by the student's own template.

render(question, answer) -----------------------> what stands already
render(question, answer, messages, next turn) --> what stands already + the bridge

Ids that the student sampled are never rendered again, so nothing is ever re-tokenised. A template that writes earlier turns otherwise
once more messages follow has no such difference, and is refused.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_governor.services.inputs.refusals import theirs
from opd_governor.services.inputs.templates import QUESTION, stop_words
from opd_governor.services.job.errors import JobError

ANSWER = "Two."
THOUGHT = "<think>\nOne more.\n</think>\n\n"
Messages = Sequence[Mapping[str, Any]]


class Bridge:
    """Of one tokenizer. Without a chat template messages are appended as they stand."""

    def __init__(self, tokenizer: Any, template: Mapping[str, Any], tools: list[dict[str, Any]] | None = None) -> None:
        """`template`: variables of the chat template. `tools`: schemas that every prompt was rendered with."""
        self._tokenizer, self._keys, self._tools = tokenizer, dict(template), tools
        self._stops = tuple(stop_words(tokenizer).values())
        self._thinks = "<think>" in str(tokenizer.chat_template or "")

    def __call__(self, messages: Messages) -> tuple[int, ...]:
        """Ids between the student's turn, its stop included, and its next one. Raises JobError in one line."""
        text = self.text(messages)
        with theirs("", "the student's tokenizer", "let the environment say what it can encode", JobError):
            return tuple(self._tokenizer(text, add_special_tokens=False).input_ids)

    def text(self, messages: Messages) -> str:
        """The same as text."""
        if not self._tokenizer.chat_template:
            return "".join(message["content"] for message in messages)
        before = self._before(messages, "")
        standing, whole = self._render(before, last=True), self._render([*before, *messages], last=False)
        roles = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        if not whole.startswith(standing) or (self._thinks and self._forgets(messages)):
            raise JobError(
                f"the student's chat template writes earlier turns otherwise once a message of role {roles} follows; "
                "set data.prompts.template so that it keeps them, or student.tokenizer to one that does"
            )
        ended = max((place + len(stop) for stop in self._stops if (place := standing.rfind(stop)) >= 0), default=-1)
        if ended < 0 or standing[ended:].strip():  # the template writes no end of turn: the student's own stop was one
            ended = len(standing)
        bridge = whole[ended:]
        if any(message["content"].strip() not in bridge for message in messages):
            raise JobError(f"the student's chat template leaves out messages of role {roles}; student.tokenizer needs one that has them")
        return bridge

    def _before(self, messages: Messages, thought: str) -> list[dict[str, Any]]:
        """A conversation that such messages may follow."""
        calls = [
            {"type": "function", "function": {"name": str(message.get("name", "tool")), "arguments": {}}}
            for message in messages
            if message["role"] == "tool"
        ]
        answer: dict[str, Any] = {"role": "assistant", "content": thought + ANSWER}
        return [{"role": "user", "content": QUESTION}, answer | ({"tool_calls": calls} if calls else {})]

    def _forgets(self, messages: Messages) -> bool:
        """Whether thoughts of earlier turns go."""
        before = self._before(messages, THOUGHT)
        standing = self._render(before, last=True)
        return not self._render([*before, *messages], last=False).startswith(standing)

    def _render(self, messages: Messages, *, last: bool) -> str:
        with theirs("", "the student's chat template", "mend it, or set student.tokenizer", JobError):
            return str(
                self._tokenizer.apply_chat_template(
                    list(messages), tools=self._tools, tokenize=False, add_generation_prompt=not last, **self._keys
                )
            )
