"""Handles of shared GPU memory as numbers, text and bytes (pure torch).

`torch.multiprocessing.reductions.reduce_tensor` describes a tensor on a GPU by a tuple with classes in it. Serialisers that refuse
classes, as they should, take what `plain` makes of it; `rebuilt` is the tuple again.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.storage import TypedStorage

TENSOR, SIZE, STORAGE, DTYPE = 0, 1, 4, 5
"""Places of what torch's reduce_tensor puts into a handle beside numbers and bytes."""


def plain(handle: tuple[Any, ...]) -> list[Any]:
    """A handle of `reduce_tensor` without classes. Raises ValueError for a tensor of another class, or a handle of another form."""
    fields = list(handle)
    if fields[TENSOR] is not torch.Tensor or fields[STORAGE] is not TypedStorage:
        raise ValueError(f"a handle of {fields[TENSOR]} in {fields[STORAGE]}: only plain tensors are shared")
    fields[TENSOR], fields[STORAGE] = None, None
    fields[SIZE], fields[SIZE + 1] = list(fields[SIZE]), list(fields[SIZE + 1])
    fields[DTYPE] = str(fields[DTYPE]).removeprefix("torch.")
    odd = [type(value).__name__ for value in fields if not isinstance(value, int | bytes | str | list | type(None))]
    if odd:
        raise ValueError(f"a handle with {odd[0]}: this torch makes handles of another form")
    return fields


def rebuilt(fields: list[Any]) -> tuple[Any, ...]:
    """The inverse of `plain`."""
    handle = list(fields)
    handle[TENSOR], handle[STORAGE] = torch.Tensor, TypedStorage
    handle[SIZE], handle[SIZE + 1] = torch.Size(handle[SIZE]), tuple(handle[SIZE + 1])
    dtype = getattr(torch, handle[DTYPE])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"a handle of dtype {handle[DTYPE]!r}")
    handle[DTYPE] = dtype
    return tuple(handle)


def each_handle(handles: Any, change: Callable[[Any], Any]) -> Any:
    """Packed updates have one {GPU: handle}, others a list of them."""
    if isinstance(handles, dict):
        return {gpu: change(handle) for gpu, handle in handles.items()}
    return [each_handle(one, change) for one in handles]
