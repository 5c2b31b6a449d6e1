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

    An actor that is killed, or whose node manager is, cannot end its engine, and vLLM's core process waits for requests for ever:
    it would keep its memory from the engine that replaces it.
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
