"""Weights on a GPU that learner and engine share, as handles made of plain numbers and bytes.

vLLM's own ipc back end sends torch classes inside its handles, which its serialisation refuses unless it is told to unpickle whatever
comes (VLLM_ALLOW_INSECURE_SERIALIZATION). Here a handle is a list: sizes, strides, offsets, the name of a dtype, CUDA's own bytes.
"""

import contextlib
from typing import Any

from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferEngine, IPCWeightTransferUpdateInfo

from opd_governor.actors.handles import each_handle, rebuilt

BACKEND = "opd_ipc"
"""Its name in vLLM, where `ipc` is vLLM's own."""


class PlainIPCEngine(IPCWeightTransferEngine):
    """vLLM's ipc back end behind plain handles."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> IPCWeightTransferUpdateInfo:
        return super().parse_update_info(update_dict | {"ipc_handles": each_handle(update_dict["ipc_handles"], rebuilt)})


with contextlib.suppress(ValueError):  # already registered in this process
    WeightTransferEngineFactory.register_engine(BACKEND, PlainIPCEngine)
