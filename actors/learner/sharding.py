"""One student over several ranks: FSDP2 shards, and tensors brought together or cut apart one at a time (pure torch).

    rank 0 .. R-1 --join--> process group --shard--> each rank holds 1/R of every weight, its gradient and its moments
    weights, checkpoints: gather (whole tensors on rank 0)        restore: scatter (whole tensor in, own part kept)

Everything here is the identity where there is one rank: callers need not ask how many there are.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from opd_governor.actors.causal_lm import CausalLM, decoder_layers

T = TypeVar("T")


def open_rendezvous(host: str, num_ranks: int) -> dist.TCPStore:
    """Where ranks meet, on a free port of the first rank's machine (`store.port`)."""
    return dist.TCPStore(host, 0, num_ranks, is_master=True, wait_for_workers=False)


def join(store: dist.TCPStore, rank: int, num_ranks: int, device: torch.device) -> None:
    """Meet the other ranks; blocks until all are there."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=num_ranks)


def rank_and_size() -> tuple[int, int]:
    """(0, 1) outside a group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


class Sharded(nn.Module):
    """The root that FSDP gathers weights around: a loss calls hidden states and head apart, so both run inside one call of this.

    >>> loss, losses = Sharded(lm.model)(lambda: objective(lm))   # doctest: +SKIP
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, run: Callable[[], T]) -> T:
        return run()


def shard(lm: CausalLM, device: torch.device, dtype: str = "float32") -> Callable[[Callable[[], Any]], Any]:
    """Cut the model over the group's ranks, layer by layer; returns what every pass over it has to run inside.

    Gradients are summed over ranks, not averaged: each token's weight is its share of the whole batch's loss. All ranks must
    make the same passes in the same order. `dtype` bfloat16 gathers and multiplies in bfloat16; what a rank keeps, and what gradients
    are summed in, stays float32. Autocast would gather in float32, and keep a bfloat16 copy of every layer on every rank.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(lm.model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # Embeddings, last norm and head stay whole from forward to backward: the loss asks for the head once a chunk.
    root = fully_shard(Sharded(lm.model), mesh=mesh, reshard_after_forward=False, mp_policy=policy)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no scaled sum
    lm.device = device

    def run_inside(run: Callable[[], T]) -> T:
        result = root(run)
        if not torch.is_grad_enabled():
            root.reshard()  # no backward will
        return result

    return run_inside


def shard_frozen(lm: CausalLM, device: torch.device) -> None:
    """Cut the layers of a model that is never trained: each is gathered for its own turn. Embeddings, last norm and head stay whole.

    Passes over it need nothing around them, but all ranks must make the same ones in the same order.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(lm.model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    moved: dict[int, Tensor] = {}  # a tied weight stays one
    for module in lm.model.modules():
        for store in (module._parameters, module._buffers):
            for name, held in store.items():
                if held is not None and not isinstance(held, DTensor):
                    store[name] = moved.setdefault(id(held), _moved(held, device))
    lm.device = device


def _moved(held: Tensor, device: torch.device) -> Tensor:
    moved = held.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(held, nn.Parameter) else moved


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, *, copy: bool = False) -> dict[str, Tensor]:
    """Whole tensors on the first rank's CPU, one at a time; the other ranks take part and get none. `copy`: never the tensor itself."""
    rank, _ = rank_and_size()
    tensors = {}
    for name, tensor in named:
        full = whole(tensor.detach())
        if rank == 0:
            tensors[name] = full.to("cpu", dtype or full.dtype, copy=copy).contiguous()
    return tensors


@torch.no_grad()
def scatter(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, cut as `like` is."""
    full = full.to(like.device)
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None) if isinstance(like, DTensor) else full


def of_every_rank(tensor: Tensor, device: torch.device) -> list[Tensor]:
    """A tensor of each rank's own, equal in shape, on every rank's CPU."""
    if not dist.is_initialized():
        return [tensor]
    parts = [torch.empty_like(tensor, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.to(device))
    return [part.cpu() for part in parts]


def summed(value: float, device: torch.device) -> float:
    """The sum over ranks."""
    if not dist.is_initialized():
        return value
    total = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return float(total)
