"""vLLM's nccl back end as an engine holds it here: over a group that may end in the middle, and be formed again; and over gloo."""

import contextlib
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLWeightTransferEngine,
    NCCLWeightTransferInitInfo,
    NCCLWeightTransferUpdateInfo,
)

from opd_governor.actors.weight_groups import GLOO_BACKEND, SenderWatch, over_gloo

BACKEND = "opd_nccl"
"""Its name in vLLM, where `nccl` is vLLM's own."""


class BroadcastEngine(NCCLWeightTransferEngine):
    """Leaves its old group before it joins the next; raises RuntimeError where the sender goes away during an update."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        self.shutdown()
        super().init_transfer_engine(init_info)

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        with SenderWatch(self.model_update_group) as watch:
            super().receive_weights(update_info)
        if watch.fired:
            self.shutdown()
            raise RuntimeError("the sender of the weights is gone; what came of them is not whole")


class GlooEngine(BroadcastEngine):
    """The same on CPU tensors."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        with over_gloo():
            super().init_transfer_engine(init_info)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # vLLM's own waits for an accelerator afterwards, which a CPU worker lacks.
        with over_gloo():
            self.receive_weights(self.parse_update_info(update_info))


for name, engine in ((BACKEND, BroadcastEngine), (GLOO_BACKEND, GlooEngine)):
    with contextlib.suppress(ValueError):  # already registered in this process
        WeightTransferEngineFactory.register_engine(name, engine)
