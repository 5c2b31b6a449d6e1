"""A transformers causal model, cut where losses and scores need it: hidden states first, logits in chunks after; or its head alone.

Shapes: B sequences, L their padded length, H hidden width, C positions of a chunk, V vocabulary.
"""

import json
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

PROBE_TOLERANCE = 1e-2
"""Largest relative gap between this head and the model's own forward on a probe: far above rounding (bf16 included), far below
a missing soft cap or scale."""


class Head:
    """[C, H] hidden states to [C, V] logits as a model's own forward makes them; holds nothing else of the model.

    `num_ids`: V, where the rows of the embedding past it are padding, of no token. None: every row.
    Known beside the linear layer: soft cap (Gemma 2), multiplier (Cohere), divisor (Granite).
    """

    def __init__(self, model: Any, num_ids: int | None = None) -> None:
        self._num_ids = num_ids
        config = model.config.get_text_config()
        self._linear = model.get_output_embeddings()
        self._scale = getattr(config, "logit_scale", None)
        self._divisor = getattr(config, "logits_scaling", None)
        self._cap = getattr(config, "final_logit_softcapping", None)

    @property
    def dtype(self) -> torch.dtype:
        return self._linear.weight.dtype

    def __call__(self, hidden_CH: Tensor) -> Tensor:
        logits_CV = self._linear(hidden_CH)[:, : self._num_ids]
        if self._scale:
            logits_CV = logits_CV * self._scale
        if self._divisor:
            logits_CV = logits_CV / self._divisor
        if self._cap:
            logits_CV = torch.tanh(logits_CV / self._cap) * self._cap
        return logits_CV


class CausalLM:
    """`hidden` then `head` gives the model's own logits; a whole [B, L, V] tensor need never exist.

    >>> lm = CausalLM("deploy/sums/student")
    >>> logits_CV = lm.head(lm.hidden(ids_BL)[0, -4:])   # doctest: +SKIP

    Raises ValueError for an architecture whose output head is more than a linear layer with a known cap or scale.
    """

    def __init__(
        self,
        path: str,
        *,
        dtype: str = "float32",
        device: torch.device | str | None = None,
        trust_remote_code: bool = False,
        num_ids: int | None = None,
    ) -> None:
        """`device` meta: the model's shape alone, without weights and without memory."""
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        empty = self.device.type == "meta"
        options: dict[str, Any] = {"dtype": getattr(torch, dtype), "trust_remote_code": trust_remote_code}
        if empty:
            with self.device:
                model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code), **options)
        else:
            # never a pickle
            model, report = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True, output_loading_info=True, **options)
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"model {path}: its weights lack {missing[0]} ({len(missing)} in all), which would start at random")
            model = model.to(self.device)
        self.model: Any = model.eval()
        self.context_tokens: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        rows = model.get_output_embeddings().weight.shape[0]
        self.vocabulary: int = min(rows, num_ids or rows)
        self.head = Head(self.model, self.vocabulary if self.vocabulary < rows else None)
        if not empty:
            self._check_head(path)

    def hidden(self, ids_BL: Tensor) -> Tensor:
        """[B, L, H] states after the last norm. Row l predicts token l + 1.

        Rows may be padded on the right, with any id: under causal attention no token before it sees it. A mask would cost a slower kernel.
        """
        return self.model.base_model(input_ids=ids_BL, use_cache=False).last_hidden_state

    @torch.no_grad()
    def _check_head(self, path: str) -> None:
        ids_BL = torch.arange(min(4, self.vocabulary), device=self.device)[None]
        theirs_LV = self.model(input_ids=ids_BL, use_cache=False).logits[0, :, : self.vocabulary].float()
        gap = (self.head(self.hidden(ids_BL)[0]).float() - theirs_LV).abs().max() / theirs_LV.abs().max().clamp_min(1.0)
        if not gap <= PROBE_TOLERANCE:
            raise ValueError(
                f"model {path}: {type(self.model).__name__} changes its logits in a way that is not known here "
                f"(relative gap {gap:.3g} on a probe); use another architecture, or backend: vllm for a teacher"
            )


def load_head(path: str, *, dtype: str, device: torch.device | str | None = None, trust_remote_code: bool = False) -> Head:
    """A model's output head, and of its files no more than that. The model whole where its file names the head in an unknown way.

    Raises what loading a model does.
    """
    shape = CausalLM(path, dtype=dtype, device="meta", trust_remote_code=trust_remote_code).model
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    linear = shape.get_output_embeddings()
    for field, held in list(linear.named_parameters()):
        tensor = _tensor_of(path, {name for name, p in shape.named_parameters(remove_duplicate=False) if p is held})
        if tensor is None:
            return CausalLM(path, dtype=dtype, device=device, trust_remote_code=trust_remote_code).head
        setattr(linear, field, torch.nn.Parameter(tensor.to(device, getattr(torch, dtype)), requires_grad=False))
    return Head(shape)


def _tensor_of(path: str, names: set[str]) -> Tensor | None:
    """The tensor that a checkpoint's files hold under one of these names, with or without a prefix."""
    found = cached_file(path, SAFE_WEIGHTS_INDEX_NAME, _raise_exceptions_for_missing_entries=False)
    if found is not None:
        with open(found) as index:
            files = json.load(index)["weight_map"]
    else:
        with safe_open(cached_file(path, SAFE_WEIGHTS_NAME), framework="pt") as file:
            files = dict.fromkeys(file.keys(), SAFE_WEIGHTS_NAME)
    keys = [key for key in files if any(f".{name}".endswith(f".{key}") or f".{key}".endswith(f".{name}") for name in names)]
    if not keys:
        return None
    with safe_open(cached_file(path, files[keys[-1]]), framework="pt") as file:
        return file.get_tensor(keys[-1])


def num_ids_of(tokenizer: str, trust_remote_code: bool = False) -> int:
    """One more than the last id of a tokenizer, by folder or hub id. Rows of an embedding past them are padding, of no token."""
    return max(AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=trust_remote_code).get_vocab().values()) + 1


def compile_layers(model: Any) -> None:
    """Compile the decoder layers in place, for batches of any shape: one is compiled, the others share its code."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def decoder_layers(model: Any) -> list[torch.nn.Module]:
    """The modules that the model's own class names as what a device must hold whole."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.modules() if type(module).__name__ in kinds]
