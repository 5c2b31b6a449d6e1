"""Weights into the engine where there is no NCCL: a vLLM weight-transfer back end that loads a safetensors file.

The file is memory of the rollout actor's process, filled from one object-store transfer per node. Importing this
module in the engine's process registers the back end (see worker.py).
"""

import contextlib
from dataclasses import dataclass

from safetensors import safe_open
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class FileInitInfo(WeightTransferInitInfo):
    """Nothing to agree on beforehand."""


@dataclass
class FileUpdateInfo(WeightTransferUpdateInfo):
    """Where this round's weights lie."""

    path: str


class FileWeightTransferEngine(WeightTransferEngine[FileInitInfo, FileUpdateInfo]):
    """Loads every tensor of a safetensors file, in the checkpoint's names, through the layer-wise reload.

    A plain `load_weights` would write into weights that the CPU back end has repacked and emptied.
    """

    init_info_cls = FileInitInfo
    update_info_cls = FileUpdateInfo

    def init_transfer_engine(self, init_info: FileInitInfo) -> None: ...

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: FileUpdateInfo) -> None:
        with safe_open(update_info.path, framework="pt") as file:
            self.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118

    def update_weights(self, update_info: dict) -> None:
        # The base class synchronises an accelerator, which a CPU worker lacks.
        self.receive_weights(self.parse_update_info(update_info))

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None: ...


with contextlib.suppress(ValueError):  # already registered in this process
    WeightTransferEngineFactory.register_engine("file", FileWeightTransferEngine)
