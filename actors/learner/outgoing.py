"""The student's weights as they leave the learner: checkpoint names, whole tensors, the engine's dtype (torch and transformers alone).

    parameters and persistent buffers --unit by unit: cast, gather, checkpoint names--> (name, tensor), the output head on its own

A unit is a layer. Where the model class packs tensors of its checkpoint (experts of a mixture), they are unpacked within their unit,
so that no more than one layer is whole at a time.
"""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from opd_governor.actors.learner.sharding import whole

HEAD = "lm_head.weight"
"""What engines call the output head."""


class Described(NamedTuple):
    """A tensor that is to come."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class Outgoing:
    """Iterates over (name, whole tensor on the model's device), the same in each round and on each rank.

    Iterating is a collective where the model is sharded: all ranks iterate to the end. Parameters are cast to `dtype` before they
    are gathered, half the bytes in bfloat16. Persistent buffers (router biases) keep their dtype: engines hold these in float32.
    """

    def __init__(self, model: Any, dtype: torch.dtype, *, trained_only: bool = False, num_ids: int | None = None) -> None:
        """`trained_only`: without what no step changes; `num_ids`: without the rows of embedding and head past them."""
        self._model, self._dtype, self._trained_only = model, dtype, trained_only
        self._num_ids = num_ids
        self._of_ids = {id(part.weight) for part in (model.get_input_embeddings(), model.get_output_embeddings())}
        self._packed = bool(getattr(model, "_weight_conversions", None))

    def described(self) -> list[Described]:
        """What iterating yields, in its order; moves no data."""
        found = []
        for unit in self._units():
            shapes = {name: self._cut(t, torch.empty(t.shape, dtype=self._sent(t), device="meta")) for name, t in unit.items()}
            found += [Described(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in self._renamed(shapes)]
        return found

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for unit in self._units():
            yield from self._renamed({name: self._cut(t, whole(t.detach().to(self._sent(t)))) for name, t in unit.items()})

    def _cut(self, tensor: Tensor, sent: Tensor) -> Tensor:
        """A row for each id that is a token, where `tensor` has a row an id."""
        return sent[: self._num_ids] if self._num_ids and id(tensor) in self._of_ids else sent

    def _sent(self, tensor: Tensor) -> torch.dtype:
        return self._dtype if isinstance(tensor, torch.nn.Parameter) else tensor.dtype

    def _renamed(self, unit: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
        """Sorted where names change: the converter's own order depends on what it was given."""
        return sorted(revert_weight_conversion(self._model, unit).items()) if self._packed else list(unit.items())

    def _units(self) -> list[dict[str, Tensor]]:
        units: dict[str, dict[str, Tensor]] = {}
        for name, tensor in self._named().items():
            layer = re.match(r".*?\.\d+\.", name)
            units.setdefault(layer.group() if layer and self._packed else name, {})[name] = tensor
        return list(units.values())

    def _named(self) -> dict[str, Tensor]:
        passing = {name for name, _ in self._model.named_non_persistent_buffers()}
        buffers = {name: buffer for name, buffer in self._model.named_buffers() if name not in passing}
        named = dict(self._model.named_parameters()) | buffers | {HEAD: self._model.get_output_embeddings().weight}
        return {name: tensor for name, tensor in named.items() if tensor.requires_grad or not self._trained_only}
