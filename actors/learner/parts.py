"""Tensors that are cut over ranks, in safetensors files: each rank writes its part, and reads its part of what any number of ranks wrote.

Every rank calls, at the same time. torch.distributed.checkpoint does it, in its safetensors form: its own form holds a pickle.
"""

import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter

from opd_governor.actors.learner.sharding import disk_group, rank_and_size

SHARDS = "sharded"
"""Where torch keeps the parts of a file that it makes whole."""


def write(folder: Path, tensors: Mapping[str, Tensor], *, whole: bool = False) -> None:
    """A file for each rank; `whole`: one file of whole tensors, as any other program reads them. Raises OSError."""
    if not tensors:
        return
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True, enable_consolidation=whole)
    try:
        dcp.save(dict(tensors), storage_writer=writer, process_group=disk_group())
    except CheckpointException as error:  # no Exception, and says of every rank what failed
        raise OSError(f"{folder}: {next(iter(error.failures.values()))[0]}") from None
    if whole:
        dist.barrier(disk_group())
        if rank_and_size()[0] == 0:
            shutil.rmtree(folder / SHARDS)


def names(folder: Path) -> set[str]:
    """Of the tensors in a folder's files."""
    return set(HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata)


def read(folder: Path, into: Mapping[str, Tensor]) -> None:
    """Fill tensors, whole or cut over the present ranks, in place."""
    if not into:
        return
    reader = HuggingFaceStorageReader(str(folder))
    if rank_and_size()[1] == 1:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is meant
            dcp.load(dict(into), storage_reader=reader, no_dist=True)
    else:
        dcp.load(dict(into), storage_reader=reader, process_group=disk_group())
