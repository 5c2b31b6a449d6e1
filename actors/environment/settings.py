"""Settings of conversations: which environment answers the student, and what a conversation may take."""

from typing import Annotated

from pydantic import Field, model_validator

from opd_governor.actors.settings import Settings


class EnvironmentSettings(Settings):
    """Rollouts of several turns: an environment answers each of the student's messages, until it is done. Name an entry or tools.

    rollout.max_new_tokens, and the governor's cap, then hold for all sampled tokens of a conversation. What the environment says is read
    by student and teacher, and learned by nobody.
    """

    entry: str | None = None
    """An environment by name, or `file.py:Name` / `module:Name`: a class without arguments, or an object, with `open(row) -> task` and
    `task.answer(message) -> (messages, reward, done)`."""
    tools: tuple[str, ...] = ()
    """`file.py:function` / `module:function` each: Python functions with type hints and a docstring that says what each argument is. The
    student calls them in its own format; a message without a call ends the conversation."""
    concurrency: Annotated[int, Field(ge=1, le=1024)] = 2
    """Processes that the environment runs in. Each answers one message at a time; further messages wait."""
    max_turns: Annotated[int, Field(ge=1, le=1000)] = 8
    """Most messages of the student in a conversation. One that is not done then ends as `turns`, which is no truncation."""
    max_turn_tokens: Annotated[int, Field(ge=1)] | None = None
    """Most new tokens of one turn. A turn cut there ends the conversation as truncated. None: what the conversation has left."""
    timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """For one answer; then its process is ended and started again, and the other conversations that it held are played to it again."""
    reply_characters: Annotated[int, Field(ge=1)] = 65_536
    """Longest answer of the environment, all its messages together; a longer one is an error of that conversation."""

    @model_validator(mode="after")
    def _one_of_two(self) -> "EnvironmentSettings":
        if (self.entry is None) == (not self.tools):
            raise ValueError("name an entry, or tools")
        return self
