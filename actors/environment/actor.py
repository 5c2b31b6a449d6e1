"""One process of an environment. It is asked one message at a time, and brings a task that it does not know to where it stood."""

from collections.abc import Mapping, Sequence
from typing import Any

from opd_governor.actors.environment.protocol import Failure, Message, Reply, Task, ask, load_environment
from opd_governor.actors.environment.settings import EnvironmentSettings


class EnvironmentActor:
    """Holds the tasks of many conversations."""

    def __init__(self, settings: EnvironmentSettings) -> None:
        self._settings = settings
        self._environment = load_environment(settings)
        self._tasks: dict[int, Task] = {}

    def ready(self) -> None:
        """The environment is loaded."""

    def answer(self, ticket: int, row: Mapping[str, Any], before: Sequence[Message], message: Message) -> Reply | Failure:
        """The environment's answer to `message`. `before`: the student's messages so far, played again where the task is not here."""
        if ticket not in self._tasks:
            try:
                self._tasks[ticket] = self._environment.open(row)
            except (Exception, SystemExit) as error:
                return Failure("raised", f"open: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            for earlier in before:
                if isinstance(found := ask(self._tasks[ticket], earlier, self._settings.reply_characters), Failure):
                    return self._ended(ticket, found)
        found = ask(self._tasks[ticket], message, self._settings.reply_characters)
        return self._ended(ticket, found) if isinstance(found, Failure) or found.done else found

    def _ended(self, ticket: int, found: Reply | Failure) -> Reply | Failure:
        self.drop(ticket)
        return found

    def drop(self, ticket: int) -> None:
        """The conversation is over."""
        self._tasks.pop(ticket, None)
