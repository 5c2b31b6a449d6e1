"""Ranks of a learner, each in its own process, joined over gloo on loopback without Ray."""

import multiprocessing
from functools import reduce
from multiprocessing.connection import Connection
from operator import add
from typing import Any

import torch.distributed as dist

from opd_governor.actors.learner.actor import Learner

PATIENCE_S = 60.0


def serve(connection: Connection) -> None:
    """Does to its learner what it is told until it is told None; `new` takes the place of the learner before."""
    learner: Any = None
    while (command := connection.recv()) is not None:
        verb, arguments, options = command
        if verb == "new":
            if dist.is_initialized():
                dist.destroy_process_group()
            learner = Learner(*arguments, **options)
            connection.send(None)
            continue
        if verb == "apply":
            function, *rest = arguments
            connection.send(function(learner, *rest))
            continue
        try:
            connection.send(getattr(learner, verb)(*arguments, **options))
        except ValueError as error:
            connection.send(error)


class Ranks:
    """The verbs of `Learner` on all ranks at once; a list of what each answered."""

    def __init__(self, num_ranks: int) -> None:
        context = multiprocessing.get_context("spawn")
        pairs = [context.Pipe() for _ in range(num_ranks)]
        self._ours = [ours for ours, _ in pairs]
        self._processes = [context.Process(target=serve, args=(theirs,), daemon=True) for _, theirs in pairs]
        for process in self._processes:
            process.start()

    def new(self, *arguments: Any, **options: Any) -> None:
        self.call("new", *arguments, **options)
        host, port = self.first("open_rendezvous")
        for rank, connection in enumerate(self._ours):
            connection.send(("join", (rank, host, port), {}))
        for connection in self._ours:
            self._receive(connection)

    def call(self, verb: str, *arguments: Any, **options: Any) -> list[Any]:
        for connection in self._ours:
            connection.send((verb, arguments, options))
        return [self._receive(connection) for connection in self._ours]

    def step(self, *arguments: Any) -> Any:
        """The first rank's report and the metrics of all."""
        reports = self.call("step", *arguments)
        assert len({str((report.loss, report.grad_norm, report.skipped)) for report in reports}) == 1, reports
        return reports[0], reduce(add, (report.metrics for report in reports))

    def first(self, verb: str, *arguments: Any) -> Any:
        """The first rank alone."""
        self._ours[0].send((verb, arguments, {}))
        return self._receive(self._ours[0])

    def save(self, folder: str) -> None:
        self.call("snapshot")
        self.call("save", folder)

    def close(self) -> None:
        for connection in self._ours:
            connection.send(None)
        for process in self._processes:
            process.join(10)
            process.kill()

    @staticmethod
    def _receive(connection: Connection) -> Any:
        assert connection.poll(PATIENCE_S), "a rank does not answer"
        answer = connection.recv()
        if isinstance(answer, Exception):
            raise answer
        return answer
