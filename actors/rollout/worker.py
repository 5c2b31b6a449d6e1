"""What vLLM imports in each process of an engine that holds weights (`worker_extension_cls`)."""

import os
import select
import threading
from typing import Any

from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

import opd_governor.actors.rollout.broadcast
import opd_governor.actors.rollout.ipc
import opd_governor.actors.rollout.transfer  # noqa: F401  these register their back ends
from opd_governor.actors.rollout.engine import OWNER


class EngineWorker:
    """Becomes a base of vLLM's worker."""

    def load_file(self, path: str) -> None:
        """A whole weight update out of a safetensors file. One call: with one for each of its parts the engine, paused meanwhile, would
        wait for every one's way here and back."""
        worker: Any = self
        worker.start_weight_update()
        worker.update_weights({"path": path})
        worker.finish_weight_update()

    def abandon_update(self) -> None:
        """Forget an update whose sender went away in the middle: the next one brings every layer whole.

        vLLM has no such verb: it would refuse the next update, or count what came of a layer twice and close it too early.
        """
        worker: Any = self
        worker._weight_update_active = False
        for layer in worker.weight_transfer_engine.model.modules():
            info = get_layerwise_info(layer)
            if info.can_load():
                info.load_numel, info.loaded_weights = 0, []


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
