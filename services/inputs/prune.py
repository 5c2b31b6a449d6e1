"""A depth-pruned student: the layers whose removal changes a model's output least are dropped, one at a time, then the rest is healed.

    prompts --the model's own answers--> KL(full || without layer i), for each i --> drop the least --> again --> heal --> folder

Legend: B texts, T tokens, H hidden width, V vocabulary, N answer positions.
"""

import hashlib
import json
import logging
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import GenerationConfig

from opd_governor.actors.causal_lm import CausalLM
from opd_governor.services.inputs.encode import Terms
from opd_governor.services.inputs.models import (
    build_once,
    cache_dir,
    resolve_model,
    split_pruned,
    stop_event_ids,
    tokenizer_of,
    weights_identity,
)
from opd_governor.services.inputs.refusals import some_of
from opd_governor.services.inputs.rows import open_rows
from opd_governor.services.inputs.table import open_table
from opd_governor.services.job.settings import JobError, PromptSource

CALIBRATION_TEXTS = 12
CALIBRATION_ANSWER_TOKENS = 32
"""The search's cost is proportional to both: two to three minutes for 135M parameters, 8 layers dropped, on one core."""
SHORTLIST = 8
"""Layers tried in a round; trying all of them in every round takes two to three times as long."""
HEALING_STEPS = 0
"""None by default: distillation itself is the healing. Ask for some where the start is too rough to sample from."""
HEALING_BATCH = 8
HEALING_ANSWER_TOKENS = 64
HEALING_LEARNING_RATE = 2e-4
GENERATION_BATCH = 64
CHUNK_POSITIONS = 256
"""Positions whose logits [N, V] exist at once."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drop:
    """One round of the search."""

    layer: int
    """Index in the full model."""
    kl_nats: float
    """KL(full || pruned) per answer token with this layer gone too."""


@dataclass(frozen=True, slots=True)
class Texts:
    """Prompts with answers, padded on the right."""

    ids_BT: Tensor
    scored_BT: Tensor
    """True where the next token is part of the answer."""


class Replay(nn.Module):
    """Stands for all layers before the one under test: returns the hidden states that they gave."""

    def __init__(self, hidden_BTH: Tensor) -> None:
        super().__init__()
        self._hidden_BTH = hidden_BTH

    def forward(self, *_: Any, **__: Any) -> Tensor:
        return self._hidden_BTH


class Stack:
    """A causal LM whose layers can be left out: the one place that knows where architectures keep them."""

    def __init__(self, path: str) -> None:
        self.lm = CausalLM(path, device="cpu")
        self.model = self.lm.model
        self._config = self.model.config
        self._owner = self.model.base_model
        self._name = "h" if hasattr(self._owner, "h") else "layers"
        if not isinstance(getattr(self._owner, self._name, None), nn.ModuleList):
            raise JobError(
                f"model {path}: {type(self.model).__name__} keeps its layers in a way not known here; choose another architecture"
            )
        self.layers = list(getattr(self._owner, self._name))
        self._types: list[str] = list(getattr(self._config, "layer_types", None) or [])

    def install(self, kept: Sequence[int], replayed_BTH: Tensor | None = None) -> None:
        """Make the model run the layers `kept`, on `replayed_BTH` where given."""
        layers = [self.layers[i] for i in kept]
        types = [self._types[i] for i in kept] if self._types else []
        if replayed_BTH is not None:
            layers.insert(0, Replay(replayed_BTH))
            types = self._types[:1] + types  # it looks at no mask: any type will do
        setattr(self._owner, self._name, nn.ModuleList(layers))
        self._config.num_hidden_layers = len(layers)
        if self._types:
            self._config.layer_types = types

    def hidden(self, texts: Texts) -> Tensor:
        """Final hidden states at the scored positions, [N, H]."""
        return self.lm.hidden(texts.ids_BT)[texts.scored_BT]

    def logp(self, hidden_NH: Tensor) -> Tensor:
        """[N, V], nats."""
        return F.log_softmax(self.lm.head(hidden_NH).float(), dim=-1)

    @contextmanager
    def recorded(self) -> Iterator[list[Tensor]]:
        """Fill the list with what each installed layer receives, [B, T, H] each."""
        inputs: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])) for layer in self.installed()]
        yield inputs
        for hook in hooks:
            hook.remove()

    def installed(self) -> nn.ModuleList:
        return getattr(self._owner, self._name)


def prune(stack: Stack, texts: Texts, num_layers: int, shortlist: int = SHORTLIST) -> tuple[list[int], list[Drop]]:
    """Greedy search: (layers kept, the drops in order). Leaves the kept layers installed.

    The first round tries every layer, later ones the `shortlist` whose removal last added least. A candidate runs only the
    layers behind it, on hidden states kept from the round's own model.
    """
    kept, drops = list(range(len(stack.layers))), list[Drop]()
    added_nats = dict.fromkeys(kept, 0.0)
    with torch.inference_mode():
        full_NH = stack.hidden(texts)
        while len(kept) > num_layers:
            stack.install(kept)
            with stack.recorded() as inputs:
                stack.hidden(texts)
            kl_nats = {}
            for layer in sorted(kept, key=added_nats.__getitem__)[: shortlist if drops else None]:
                place = kept.index(layer)
                stack.install(kept[place + 1 :], inputs[place])
                kl_nats[layer] = _mean_kl(stack, full_NH, stack, stack.hidden(texts))
                added_nats[layer] = kl_nats[layer] - (drops[-1].kl_nats if drops else 0.0)
            least = min(kl_nats, key=kl_nats.__getitem__)
            kept.remove(least)
            drops.append(Drop(least, kl_nats[least]))
            log.info("layer %d dropped: KL %.3f nats, %d layers left", least, kl_nats[least], len(kept))
    stack.install(kept)
    return kept, drops


def measure_kl(full: Stack, pruned: Stack, texts: Texts) -> float:
    """Mean KL(full || pruned) over the answers' tokens, nats."""
    with torch.inference_mode():
        return _mean_kl(full, full.hidden(texts), pruned, pruned.hidden(texts))


def heal(full: Stack, pruned: Stack, batches: Sequence[Texts]) -> None:
    """Forward KL over the whole vocabulary on the full model's answers, one AdamW step a batch; embeddings stay fixed."""
    pruned.model.requires_grad_(False)
    trained = list(pruned.installed().requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(trained, HEALING_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    for step, texts in enumerate(batches):
        with torch.no_grad():
            full_NH = full.hidden(texts)
        hidden_NH = pruned.hidden(texts)
        leaf_NH = hidden_NH.detach().requires_grad_()  # logits and their gradient live one chunk at a time
        loss = 0.0
        for p_NH, q_NH in _chunks(full_NH, leaf_NH):
            chunk = _kl(full.logp(p_NH), pruned.logp(q_NH)).sum() / len(full_NH)
            chunk.backward()
            loss += float(chunk.detach())
        hidden_NH.backward(leaf_NH.grad)
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        log.info("healing step %d of %d: KL %.3f nats", step + 1, len(batches), loss)


def write_answers(stack: Stack, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_ids: Sequence[int], seed: int) -> list[Texts]:
    """The model's own sampled answers (temperature 1), `GENERATION_BATCH` prompts at a time."""
    stops, texts = torch.tensor(stop_ids), []
    sampling = GenerationConfig(
        do_sample=True, top_k=0, max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=stop_ids[0]
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for start in range(0, len(prompts), GENERATION_BATCH):
            batch = prompts[start : start + GENERATION_BATCH]
            width = max(map(len, batch))
            ids_BP = torch.tensor([[stop_ids[0]] * (width - len(ids)) + list(ids) for ids in batch])
            mask_BP = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in batch])
            answers_BT = stack.model.generate(ids_BP, attention_mask=mask_BP, generation_config=sampling)[:, width:]
            stopped_BT = torch.isin(answers_BT, stops).int()
            lengths = (stopped_BT.cumsum(1) - stopped_BT == 0).sum(1).tolist()  # up to and with the first stop
            texts.append(_pad(batch, [answer[:length] for answer, length in zip(answers_BT.tolist(), lengths, strict=True)], stop_ids[0]))
    return texts


def _pad(prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]], pad_id: int) -> Texts:
    width = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids_BT = torch.full((len(prompts), width), pad_id)
    scored_BT = torch.zeros_like(ids_BT, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids_BT[row, :end] = torch.tensor([*prompt, *answer])
        scored_BT[row, len(prompt) - 1 : end - 1] = True
    return Texts(ids_BT, scored_BT)


def _rows(texts: Texts, size: int) -> Iterator[Texts]:
    """Batches of `size` texts, each cut to its own longest."""
    for start in range(0, len(texts.ids_BT), size):
        own = slice(start, start + size)
        width = int(texts.scored_BT[own].any(0).nonzero().max()) + 2  # a state predicts the token behind it
        yield Texts(texts.ids_BT[own, :width], texts.scored_BT[own, :width])


def _mean_kl(full: Stack, full_NH: Tensor, other: Stack, other_NH: Tensor) -> float:
    total = sum(float(_kl(full.logp(p), other.logp(q)).sum()) for p, q in _chunks(full_NH, other_NH))
    return total / len(full_NH)


def _kl(logp_NV: Tensor, logq_NV: Tensor) -> Tensor:
    return (logp_NV.exp() * (logp_NV - logq_NV)).sum(-1)


def _chunks(*hidden_NH: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(h.split(CHUNK_POSITIONS) for h in hidden_NH), strict=True)


def make_student(model: str, num_layers: int, calibration: PromptSource, out: Path, healing_steps: int = HEALING_STEPS) -> dict[str, Any]:
    """Prune `model` to `num_layers`, heal it, and write a Hugging Face folder with its tokenizer; returns what was measured.

    The report stands in `pruning.json` of the folder too. Raises JobError when there are no layers to drop.
    """
    full, tokenizer = Stack(model), tokenizer_of(model)
    if not 0 < num_layers < len(full.layers):
        raise JobError(f"--layers {num_layers}: {model} has {len(full.layers)} layers; give a number from 1 to {len(full.layers) - 1}")
    stop_ids = sorted(stop_event_ids(model, tokenizer))
    table = open_table(open_rows(calibration), tokenizer, Terms(calibration))
    usable = table.num_tokens("token_ids") > 0
    if not usable.any():
        raise JobError(
            f"{calibration.path}: {some_of(table.found.bad, table.found.num_bad) or 'has no rows'}; no calibration prompt is left"
        )
    order = [index for index in random.Random(0).sample(range(len(table)), len(table)) if usable[index]]
    total = CALIBRATION_TEXTS + healing_steps * HEALING_BATCH
    prompts = [tuple(table[index]["token_ids"]) for index in islice(cycle(order), total)]
    log.info("pruning %s to %d of %d layers", model, num_layers, len(full.layers))
    texts = write_answers(full, prompts[:CALIBRATION_TEXTS], CALIBRATION_ANSWER_TOKENS, stop_ids, seed=0)[0]
    kept, drops = prune(full, texts, num_layers)
    full.install(range(len(full.layers)))
    pruned = Stack(model)
    pruned.install(kept)
    report = {
        "model": Path(model).name,
        "kept": kept,
        "drops": [asdict(drop) for drop in drops],
        "kl_pruned_nats": measure_kl(full, pruned, texts),
    }
    if healing_steps:
        answers = write_answers(full, prompts[CALIBRATION_TEXTS:], HEALING_ANSWER_TOKENS, stop_ids, seed=1)
        heal(full, pruned, [batch for group in answers for batch in _rows(group, HEALING_BATCH)])
        report["kl_healed_nats"] = measure_kl(full, pruned, texts)
    pruned.model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "pruning.json").write_text(json.dumps(report, indent=1))
    return report


def resolve_student(name: str, calibration: PromptSource) -> str:
    """As `resolve_model`, and `pruned:MODEL:N` is MODEL cut to its N most needed layers, once, on the prompts of `calibration`."""
    pruned = split_pruned(name)
    if pruned is None:
        return resolve_model(name)
    base, num_layers = pruned
    source = resolve_model(base)
    prompts = Path(calibration.path)
    content = prompts.read_bytes() if prompts.is_file() else calibration.path.encode()
    settings = f"{calibration.model_dump_json(exclude={'path'})} {HEALING_STEPS}".encode()
    identity = hashlib.sha256(b"\0".join([weights_identity(source).encode(), settings, content])).hexdigest()[:12]
    folder = cache_dir() / f"{Path(source).name}-{num_layers}-layers-{identity}"
    return str(build_once(folder, lambda scratch: make_student(source, num_layers, calibration, scratch)))


def prune_model(model: str, num_layers: int, calibration: Path, out: Path, healing_steps: int = HEALING_STEPS) -> dict[str, Any]:
    """`opd prune`: see make_student. Raises JobError for an unknown model, a broken calibration file or a folder that exists."""
    if out.exists():
        raise JobError(f"--out {out}: exists already; choose another folder")
    source = resolve_model(model)
    report: dict[str, Any] = {}
    prompts = PromptSource(path=str(calibration), chat=bool(tokenizer_of(source).chat_template))
    build_once(out, lambda folder: report.update(make_student(source, num_layers, prompts, folder, healing_steps)))
    return report


def render(report: dict[str, Any]) -> str:
    """The drops as a table, and the KL before and after healing."""
    table = Table("round", "layer dropped", "KL(full || pruned), nats per token")
    for number, drop in enumerate(report["drops"], start=1):
        table.add_row(str(number), str(drop["layer"]), f"{drop['kl_nats']:.4f}")
    console = Console()
    with console.capture() as capture:
        console.print(table)
    healed = f"; after healing {report['kl_healed_nats']:.4f}" if "kl_healed_nats" in report else ""
    return f"{capture.get()}layers kept: {report['kept']}\nKL {report['kl_pruned_nats']:.4f} nats per token{healed}"
