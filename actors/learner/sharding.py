"""One student over several ranks: FSDP2 shards, and tensors brought together or cut apart one at a time (pure torch).

    rank 0 .. R-1 --join--> process group --shard--> each rank has room for 1/R of every weight, its gradient and its moments
    shapes alone, sharded --fill: rank 0 reads, all get their part--> a student        whole tensors on rank 0: gather

Everything here is the identity where there is one rank: callers need not ask how many there are.
"""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
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
    _disk.group = dist.new_group(backend="gloo")


class _Disk:
    group: dist.ProcessGroup | None = None


_disk = _Disk()


def disk_group() -> dist.ProcessGroup | None:
    """The same ranks again, for what they agree on while steps go on beside it: writing a checkpoint."""
    return _disk.group


@torch.no_grad()
def fill(lm: CausalLM, read: Callable[[], CausalLM]) -> None:
    """The values of a model that rank 0 reads, into the parts that all ranks hold of it, a tensor at a time.

    Rank 0's host alone holds the model whole, and only meanwhile.
    """
    model, source = lm.model, read().model if rank_and_size()[0] == 0 else None
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, source.state_dict() if source is not None else {}, options=options)
    conversions = [getattr(source, "_weight_conversions", None)]
    dist.broadcast_object_list(conversions, src=0)
    model._weight_conversions = conversions[0]
    saved = set(model.state_dict())
    own = dict(source.named_buffers()) if source is not None else {}
    for name, buffer in model.named_buffers():
        if name not in saved:  # rotary frequencies, scales: computed from the config, in no file
            if source is not None:
                buffer.copy_(own[name])
            dist.broadcast(buffer, 0)


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
    """Cut the model's shape over the group's ranks, layer by layer; returns what every pass over it has to run inside. `fill` follows.

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
    _make_room(lm, root, device)

    def run_inside(run: Callable[[], T]) -> T:
        result = root(run)
        if not torch.is_grad_enabled():
            root.reshard()  # no backward will
        return result

    return run_inside


def shard_frozen(lm: CausalLM, device: torch.device) -> None:
    """Cut the layers of a model that is never trained: each is gathered for its own turn. Embeddings, last norm and head stay whole.
    `fill` follows.

    Passes over it need nothing around them, but all ranks must make the same ones in the same order.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in decoder_layers(lm.model):
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
    _make_room(lm, lm.model, device)


def _make_room(lm: CausalLM, root: nn.Module, device: torch.device) -> None:
    """Memory on `device` for a model that had none, for `fill`."""
    root.to_empty(device=device)
    lm.model.tie_weights()  # each module was given memory of its own
    lm.device = device


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor of a sharded one, on every rank."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def gather(named: Iterable[tuple[str, Tensor]], dtype: torch.dtype | None = None, *, copy: bool = False) -> dict[str, Tensor]:
    """Whole tensors on the first rank's CPU, one at a time, numbers with a point in `dtype`; the other ranks take part and get none.
    `copy`: never the tensor itself."""
    rank, _ = rank_and_size()
    tensors = {}
    for name, tensor in named:
        full = whole(tensor.detach())
        if rank == 0:
            tensors[name] = full.to("cpu", dtype if dtype and full.is_floating_point() else full.dtype, copy=copy).contiguous()
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
