"""All that a learner's steps change: copied in memory, written to a checkpoint's folder, and taken from one.

snapshot (all ranks, between two steps) --> write (all ranks, while the next step runs)        restore (all ranks)

Of one rank everything is whole. Of several each copies, writes and reads its own part; rank 0 adds what there is once.
"""

import contextlib
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig
from transformers.utils.hub import cached_file

from opd_governor.actors.causal_lm import CausalLM
from opd_governor.actors.learner import parts
from opd_governor.actors.learner.checkpoint import OPTIMIZER, PARTS, STUDENT, copied, load_moments, moments
from opd_governor.actors.learner.follower import Follower
from opd_governor.actors.learner.lora import adapter_names, lora_layers, read_adapter, write_adapter
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.sharding import fill, gather, of_every_rank, rank_and_size, scatter, whole

COUNTERS = "learner.json"
RANDOM = "random.safetensors"
TEACHER = "teacher.safetensors"
MERGED = "merged"
"""Folder inside an adapter's that holds the merged model."""
PROBE_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Copies in host memory of all that a step changes, of several ranks this one's parts."""

    weights: dict[str, torch.Tensor]
    moments: dict[str, torch.Tensor]
    random: dict[str, torch.Tensor]
    """Generator state by rank and device, "0/cpu"; dropout draws from it."""
    weight_version: int
    followed: dict[str, torch.Tensor]
    """Weights of a teacher that follows the student; empty: none does."""
    followed_version: int


class StudentFiles:
    """The student in Hugging Face layout, with its tokenizer. Raises OSError on a full disk, whatever the writers raise."""

    def __init__(self, student: CausalLM, models: LearnerModels, stop_ids: Sequence[int]) -> None:
        """`models`: what the student was loaded from, which its generation config is made from. `stop_ids`: what it learns to end on."""
        self._student, self._models, self._trust = student, models, models.trust_remote_code
        self._stop_ids = sorted(stop for stop in set(stop_ids) if stop < student.vocabulary)

    def write(self, folder: str, weights: dict[str, torch.Tensor], card: str | None = None, dtype: str = "float32") -> None:
        """The student as it was trained: with its tokenizer, its template, and every stop id, so that it ends by itself when served.

        `card`: a model card, written as README.md. `dtype`: of the weights in the file.
        """
        with disk_errors(folder):
            cast = {name: tensor.to(getattr(torch, dtype)) if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
            # The source's own sampling defaults come as its file below: the library refuses to write many a published one.
            known = self._student.model.config.get_text_config()
            self._student.model.generation_config = GenerationConfig(bos_token_id=known.bos_token_id, pad_token_id=known.pad_token_id)
            self._student.model.save_pretrained(folder, state_dict=cast)
        self.describe(folder, card, dtype)

    def describe(self, folder: str, card: str | None = None, dtype: str = "float32") -> None:
        """Everything but the weights."""
        with disk_errors(folder):
            self._student.model.config.save_pretrained(folder)
            _change(Path(folder) / "config.json", dtype=dtype)
            self.write_beside(folder, card)

    def write_beside(self, folder: str, card: str | None) -> None:
        """What stands beside the weights: tokenizer, generation config, model card."""
        source = self._models.tokenizer or self._models.student
        AutoTokenizer.from_pretrained(source, trust_remote_code=self._trust).save_pretrained(folder)
        generation = Path(folder) / "generation_config.json"
        if own := cached_file(self._models.student, generation.name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(own, generation)
        _change(generation, eos_token_id=self._stop_ids[0] if len(self._stop_ids) == 1 else self._stop_ids)
        if card is not None:
            (Path(folder) / "README.md").write_text(card)

    @property
    def trusted(self) -> bool:
        """Whether code of the model's own may run."""
        return self._trust

    @torch.no_grad()
    def read(self, folder: str) -> None:
        """Take the weights of a folder, this rank's part of them. Of several ranks the first reads it."""

        def saved() -> CausalLM:
            return CausalLM(folder, device="cpu", trust_remote_code=self._trust)

        if rank_and_size()[1] > 1:
            fill(self._student, saved)
            return
        own = self._student.model.state_dict()
        for name, tensor in saved().model.state_dict().items():
            own[name].copy_(tensor)

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """What the model's file holds: a tied weight has one name there."""
        model = self._student.model
        tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - {name for name, _ in model.named_parameters()}
        return ((name, tensor) for name, tensor in model.state_dict().items() if name not in tied)

    @property
    def in_parts(self) -> bool:
        """Ranks write their parts of the student's file themselves: there are several, and the file has the model's own names."""
        return rank_and_size()[1] > 1 and not getattr(self._student.model, "_weight_conversions", None)


def _change(file: Path, **values: Any) -> None:
    """Set keys of a JSON file."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    file.write_text(json.dumps(held | values, indent=2) + "\n")


class AdapterFiles:
    """The same verbs for a student with an addition: only that is written, in peft's format, with the student's tokenizer."""

    def __init__(self, student: CausalLM, models: LearnerModels, stop_ids: Sequence[int]) -> None:
        assert models.lora is not None
        self._student, self._source, self._settings = student, models.student, models.lora
        self._whole = StudentFiles(student, models, stop_ids)

    def write(self, folder: str, weights: dict[str, torch.Tensor], card: str | None = None, dtype: str = "float32") -> None:
        """The addition stays float32 whatever `dtype`, which is the merged model's."""
        with disk_errors(folder):
            write_adapter(Path(folder), weights, self._settings, self._source)
            self._whole.write_beside(folder, card)

    def read(self, folder: str) -> None:
        own = dict(self._student.model.named_parameters())
        stored = read_adapter(Path(folder), self._settings)
        with torch.no_grad():
            for name, in_file in adapter_names(self._student.model).items():
                own[name].copy_(scatter(stored[in_file], own[name]))

    in_parts = False
    """It is small: rank 0 writes it whole."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        own = dict(self._student.model.named_parameters())
        return ((in_file, own[name]) for name, in_file in adapter_names(self._student.model).items())

    def merged(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The student's file with the addition in its weights, where the job asks for it; whole tensors, on every rank."""
        layers = lora_layers(self._student.model)
        for name, tensor in self._whole.weights() if self._settings.merge else ():
            layer, _, part = name.rpartition(".")
            if part in ("lora_A", "lora_B"):
                continue
            if layer in layers and part == "weight":
                one = layers[layer]
                yield name, one.merged(whole(tensor.detach()), whole(one.lora_A.detach()), whole(one.lora_B.detach()))
            else:
                yield name, tensor

    def write_merged(self, folder: str, weights: dict[str, torch.Tensor], card: str | None, dtype: str) -> float:
        """A model in Hugging Face layout that needs no adapter. Returns what rounding to its dtype costs: the mean gap of log-probs to the
        student with its addition, nats, on a sequence over the vocabulary. With several ranks it is not measured: NaN."""
        self._whole.write(folder, weights, card, dtype)
        if rank_and_size()[1] > 1:
            return math.nan
        merged = CausalLM(folder, dtype=dtype, device=self._student.device, trust_remote_code=self._whole.trusted)
        ids_BL = torch.linspace(0, merged.vocabulary - 1, PROBE_TOKENS, device=self._student.device).long()[None]
        self._student.model.eval()
        with torch.no_grad():
            logps = [
                lm.head(lm.hidden(ids_BL)[0, :-1]).float().log_softmax(-1).gather(1, ids_BL[0, 1:, None]) for lm in (self._student, merged)
            ]
        self._student.model.train()
        return float((logps[0] - logps[1]).abs().mean())


Files = StudentFiles | AdapterFiles


def files_of(student: CausalLM, models: LearnerModels, stop_ids: Sequence[int]) -> Files:
    """What is written of a student: all of it, or its addition."""
    return StudentFiles(student, models, stop_ids) if models.lora is None else AdapterFiles(student, models, stop_ids)


def snapshot(
    files: Files, student: CausalLM, optimizer: torch.optim.Optimizer, weight_version: int, follower: Follower | None = None
) -> Snapshot:
    """Copy what this rank will `write`, between two steps. Every rank takes part."""
    weights = {name: copied(tensor) for name, tensor in files.weights()} if files.in_parts else gather(files.weights(), copy=True)
    adam = moments(optimizer, optimized_names(student.model, optimizer))
    generators = {"cpu": torch.get_rng_state()}
    if student.device.type == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state(student.device)
    random = {
        f"{rank}/{kind}": part for kind, state in generators.items() for rank, part in enumerate(of_every_rank(state, student.device))
    }
    followed = {} if follower is None else gather(follower.weights(), copy=True)
    version = 0 if follower is None else follower.version
    return Snapshot(weights, adam, random, weight_version, followed, version)


def write(files: Files, taken: Snapshot, folder: str) -> None:
    """Write a snapshot for `restore` on any number of ranks: student, optimiser, generators, counters. Raises OSError."""
    path, (rank, size) = Path(folder), rank_and_size()
    if files.in_parts:
        with disk_errors(folder):
            parts.write(path / STUDENT, taken.weights, whole=True)
    if rank == 0:
        if isinstance(files, StudentFiles) and files.in_parts:
            files.describe(str(path / STUDENT))
        else:
            files.write(str(path / STUDENT), taken.weights)
    with disk_errors(folder):
        if size == 1:
            save_file(taken.moments, path / OPTIMIZER)
        else:  # a number alone has no part
            (path / PARTS).mkdir(exist_ok=True)  # before the first step there are no moments
            parts.write(path / PARTS, {name: tensor.reshape(1) if not tensor.ndim else tensor for name, tensor in taken.moments.items()})
        if rank:
            return
        save_file(taken.random, path / RANDOM)
        counters = {"weight_version": taken.weight_version}
        if taken.followed:
            save_file(taken.followed, path / TEACHER)
            counters["followed_version"] = taken.followed_version
        (path / COUNTERS).write_text(json.dumps(counters))


def restore_run(student: CausalLM, optimizer: torch.optim.Optimizer, folder: str) -> int:
    """Take moments, generators and counters of a checkpoint, all but the weights; returns the weight version."""
    path = Path(folder)
    read_moments(optimizer, optimized_names(student.model, optimizer), path)
    random = load_file(path / RANDOM)
    rank, _ = rank_and_size()  # a rank that the checkpoint's run did not have keeps its own generators
    if (state := random.get(f"{rank}/cpu")) is not None:
        torch.set_rng_state(state)
    if (state := random.get(f"{rank}/cuda")) is not None and student.device.type == "cuda":
        torch.cuda.set_rng_state(state, student.device)
    return int(json.loads((path / COUNTERS).read_text())["weight_version"])


def read_moments(optimizer: torch.optim.Optimizer, names: list[str], path: Path) -> None:
    """Adam's moments of a checkpoint, written by any number of ranks; on several ranks each its own part."""
    if (path / OPTIMIZER).is_file() and rank_and_size()[1] == 1:
        load_moments(optimizer, names, load_file(path / OPTIMIZER))
        return
    parameters = dict(zip(names, (p for group in optimizer.param_groups for p in group["params"]), strict=True))
    folder = path if (path / OPTIMIZER).is_file() else path / PARTS
    held = {name: name.rpartition("/") for name in parts.names(folder) if "/" in name and name.rpartition("/")[0] in parameters}
    counts = {name for name, (_, _, field) in held.items() if field == "step"}
    moments = {name: torch.zeros_like(parameters[owner]).detach() for name, (owner, _, _) in held.items() if name not in counts}
    if folder == path:  # one rank's file, its numbers are as Adam holds them
        with safe_open(path / OPTIMIZER, framework="pt") as file:
            steps = {name: file.get_tensor(name) for name in counts}
        parts.read(folder, moments)
    else:
        steps = {name: torch.zeros(1) for name in counts}
        parts.read(folder, moments | steps)
    load_moments(optimizer, names, moments | {name: step.reshape(()) for name, step in steps.items()})


def restore_follower(follower: Follower, folder: str) -> None:
    """Take the weights that a checkpoint's teacher had. One without them, of a job in which no teacher followed, leaves the student's as
    it came."""
    path = Path(folder)
    if (path / TEACHER).is_file():
        follower.restore(load_file(path / TEACHER), int(json.loads((path / COUNTERS).read_text())["followed_version"]))


def optimized_names(model: Any, optimizer: torch.optim.Optimizer) -> list[str]:
    """Parameter names in the optimiser's own order."""
    name_of = {id(p): name for name, p in model.named_parameters()}
    return [name_of[id(p)] for group in optimizer.param_groups for p in group["params"]]


@contextlib.contextmanager
def disk_errors(folder: str) -> Iterator[None]:
    """OSError whatever the writers raise: on a full disk safetensors and tokenizers have error types of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{folder}: {error}") from error
