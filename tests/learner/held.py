"""What a rank holds between forward and backward, and in its frozen models; run inside the ranks' own processes (see ranks.py)."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

from opd_governor.actors.trajectory import LengthLimits, ScoredRollout


def copy_bytes_per_parameter(learner: Any, rollouts: list[ScoredRollout], limits: LengthLimits) -> float:
    """Bytes of weights beside the rank's own parts that the layers' forward pass leaves for backward, per parameter of the layers."""
    matrices = [p for name, p in learner._student.model.named_parameters() if ".layers." in name and p.ndim > 1]
    shapes = {frozenset(p.shape) for p in matrices}
    micro = learner._micro_batches(rollouts, [], limits, 4.0)[0]
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, DTensor) and tensor.ndim == 2 and frozenset(tensor.shape) in shapes:
            saved[id(tensor.untyped_storage())] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss, _ = learner._passes._run(lambda: learner._passes._loss(micro.student, micro.fields, limits))
    held = sum(storage.nbytes() for storage in {s.data_ptr(): s for s in saved.values() if s.nbytes()}.values())
    loss.backward()
    return held / sum(p.numel() for p in matrices)


def reference_bytes(learner: Any) -> int:
    """What this rank keeps of the reference."""
    parameters = learner._passes._models.reference.model.parameters()
    return sum((p.to_local() if isinstance(p, DTensor) else p).nbytes for p in parameters)


def save_told(learner: Any, folder: str) -> str:
    """What a rank's save says."""
    try:
        learner.save(folder)
    except OSError as error:
        return f"OSError: {error}"
    return "saved"
