"""The group that weights are broadcast in: what both of its ends share (imports vllm).

    nccl: vLLM's own communicator, on GPUs        gloo: the same engines of vLLM at both ends, over CPU tensors

NCCL does not notice that a peer is gone: whoever waits in a broadcast waits until its own communicator is ended. So the group's sender
leaves word in the group's store before it ends its own, and receivers watch for that word, and for the sender itself.
"""

import contextlib
import threading
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from vllm.distributed.utils import StatelessProcessGroup
from vllm.distributed.weight_transfer import nccl_common, packed_tensor

GLOO_BACKEND = "opd_gloo"
"""Its name in vLLM."""
GLOO_BUFFER_BYTES = 2**16
"""Of a packed broadcast: small, so that a tiny model takes several."""
CLOSED = "opd/closed"
"""Key in the group's store: its sender has given up."""
WATCH_S = 0.5
_POLL = timedelta(seconds=0.2)
_OPERATION = timedelta(minutes=30)
_unfinished: list[dist.ProcessGroupGloo] = []
"""Groups with an operation that no peer will end: freeing one would wait for it."""


class GlooCommunicator:
    """What vLLM's nccl engines ask of a communicator. As with NCCL a broadcast whose peer is gone ends with `destroy`, not before,
    and broadcasts after `destroy` do nothing."""

    def __init__(self, group: StatelessProcessGroup) -> None:
        self.group = group
        self._destroyed = threading.Event()
        store = dist.PrefixStore("gloo", group.store)
        self._gloo = dist.ProcessGroupGloo(store, group.rank, group.world_size, _OPERATION)

    def broadcast(self, tensor: torch.Tensor, src: int, stream: object = None) -> None:
        """In place on all but `src`."""
        if self._destroyed.is_set():
            return
        options = dist.BroadcastOptions()
        options.rootRank = src
        work = self._gloo.broadcast([tensor], options)
        while not self._destroyed.is_set():
            try:
                work.wait(_POLL)
                return
            except RuntimeError:  # not yet done, or the peer's connection is gone
                if work.is_completed():
                    self._destroyed.wait()
        if not work.is_completed():
            _unfinished.append(self._gloo)

    def destroy(self) -> None:
        """From any thread."""
        self._destroyed.set()


class _CPUStream:
    """Stands in for a CUDA stream, where everything is done in order anyway."""

    def synchronize(self) -> None: ...


@contextlib.contextmanager
def over_gloo() -> Iterator[None]:
    """Inside, vLLM's nccl engines take a gloo communicator and no CUDA stream; everything else of them runs as it is."""

    def communicator(host: str, port: int, rank: int, world_size: int, device: Any) -> GlooCommunicator:
        return GlooCommunicator(StatelessProcessGroup.create(host=host, port=port, rank=rank, world_size=world_size))

    with (
        patch.object(nccl_common, "stateless_init_process_group", communicator),
        patch.object(packed_tensor, "_get_streams", lambda device, num: tuple(_CPUStream() for _ in range(num))),
        patch.object(torch.accelerator, "current_device_index", lambda: 0),
    ):
        yield


def close_group(communicator: Any) -> None:
    """The sender's end, from any thread: receivers are told, and a broadcast under way here ends."""
    with contextlib.suppress(RuntimeError):  # a store without readers
        communicator.group.store.set(CLOSED, "1")
    communicator.destroy()


class SenderWatch:
    """While a receiver waits in broadcasts: ends its communicator once the sender has closed the group, or is gone.

    >>> with SenderWatch(communicator) as watch: receive()   # doctest: +SKIP
    >>> watch.fired   # doctest: +SKIP
    """

    def __init__(self, communicator: Any) -> None:
        self._communicator = communicator
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.fired = False

    def __enter__(self) -> "SenderWatch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        while not self._done.wait(WATCH_S):
            if self._sender_is_gone() and not self._done.is_set():
                self.fired = True
                self._communicator.destroy()
                return

    def _sender_is_gone(self) -> bool:
        try:
            return bool(self._communicator.group.store.check([CLOSED]))
        except RuntimeError:  # the store is the sender's, and went with it
            return True
