"""An environment actor on a Ray cluster, as the pool sees it."""

from collections.abc import Mapping
from typing import Any

import ray

from opd_governor.actors.environment.actor import EnvironmentActor
from opd_governor.actors.environment.protocol import Failure, Message, Reply
from opd_governor.actors.environment.settings import EnvironmentSettings


class RayEnvironment:
    """Reserves no CPU: it waits most of the time."""

    def __init__(self, settings: EnvironmentSettings) -> None:
        self.actor = ray.remote(EnvironmentActor).options(num_cpus=0).remote(settings)

    async def ready(self) -> None:
        await self.actor.ready.remote()

    async def answer(self, ticket: int, row: Mapping[str, Any], before: list[Message], message: Message) -> Reply | Failure:
        return await self.actor.answer.remote(ticket, row, before, message)

    def drop(self, ticket: int) -> None:
        self.actor.drop.remote(ticket)

    def end(self) -> None:
        ray.kill(self.actor)
