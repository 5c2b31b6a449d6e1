"""What vLLM imports in each process of an engine that holds weights (`worker_extension_cls`)."""

import os
import select
import threading

import actors.rollout.transfer  # noqa: F401  registers the file back end
from actors.rollout.engine import OWNER


class EngineWorker:
    """The extension; importing its module is all it is for. Nobody else does."""


def end_with(pid: int) -> None:
    """End this process at once when that one is gone.

    Ray ends what an actor started with the actor, unless Ray itself is killed with it (the raylet, a driver with a private cluster):
    vLLM's core process then waits for requests for ever, and its memory is not there for the engine that comes after it.
    """
    try:
        owner = os.pidfd_open(pid)
    except ProcessLookupError:
        os._exit(1)

    def wait() -> None:
        waiting = select.poll()
        waiting.register(owner, select.POLLIN)
        waiting.poll()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


if (_owner := int(os.environ[OWNER])) != os.getpid():
    end_with(_owner)
