"""Whether the weights in a folder are those that its config describes, by the files' headers and the beginning of each tensor.

headers of *.safetensors --> a model of shapes alone, loaded by transformers itself --> its report of missing and odd tensors
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.models import weight_files
from opd_governor.services.inputs.refusals import is_theirs, some_of, words
from opd_governor.services.inputs.resolve import ModelFacts

REMEDY = "fetch the folder again, or mend its config.json"
INTEGERS = ("I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64", "BOOL")
"""Types that no plain weight has, as safetensors names them."""
LOOKED_AT = 2**18
"""Numbers of each tensor that are looked at, at least one row."""


def check_weights(whose: str, where: str, facts: ModelFacts) -> Iterator[Check]:
    """A tensor that is missing would start at random, one of another shape stops the load. A hub id is looked at when it is loaded."""
    config, folder = facts.whole, Path(facts.model)
    if not folder.is_dir() or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    named = [str(name) for name in getattr(config, "architectures", None) or ()]
    if named and kind.__name__.lower() not in (name.lower() for name in named) and not getattr(config, "auto_map", None):
        detail = f"{where}: its config.json names {named[0]}, not {kind.__name__}, the language model of its kind"
        yield Check(f"weights {whose}", "fail", detail, "give the language model, or mend architectures")
        return
    if getattr(config, "quantization_config", None):
        return  # its tensors are not those of the plain model
    try:
        found, odd = _headers(folder)
        if odd:
            yield Check(f"weights {whose}", "fail", f"{where}: {odd}", REMEDY)
            return
        report = _report(kind, config, found)
    except FileNotFoundError as error:
        yield Check(f"weights {whose}", "fail", f"{where}: {words(error)}", "fetch the folder again")
        return
    except BaseException as error:
        if not is_theirs(error):
            raise
        yield Check(f"weights {whose}", "fail", f"{where}: a model of its config cannot be made: {words(error)}", "mend its config.json")
        return
    yield from _told(whose, where, report)


def _told(whose: str, where: str, report: dict[str, Any]) -> Iterator[Check]:
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if other := sorted(report["mismatched_keys"], key=str):
        name, shape, wanted = other[0]
        detail = f"{where}: {name} has shape {list(shape)}, its config asks for {list(wanted)}"
        yield Check(f"weights {whose}", "fail", detail + (f" (and {len(other) - 1} more)" if len(other) > 1 else ""), REMEDY)
    elif missing:
        yield Check(f"weights {whose}", "fail", f"{where}: its weights lack {some_of(missing)}, which would start at random", REMEDY)
    elif unexpected:
        detail = f"{where}: its config has no place for {some_of(unexpected)}: left out"
        yield Check(f"weights {whose}", "warn", detail, "compare num_hidden_layers with the weights; an engine may refuse them")


def _headers(folder: Path) -> tuple[dict[str, torch.Tensor], str]:
    """Every tensor as a shape, and what is wrong with the first one that holds whole numbers, or no numbers in its first row."""
    found, odd = {}, ""
    for file in weight_files(folder):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dict
                header = opened.get_slice(name)
                found[name] = torch.empty(header.get_shape(), device="meta")
                if odd:
                    continue
                if header.get_dtype() in INTEGERS:
                    odd = f"{name} holds whole numbers ({header.get_dtype()}) and is not marked as quantised"
                elif not torch.isfinite(_beginning(header).float()).all():
                    odd = f"{name} holds NaN or infinity: whatever it is asked, the model answers nothing"
    return found, odd


def _beginning(header: Any) -> torch.Tensor:
    """The first rows of a tensor: a training that diverged leaves no number whole, and whole files take too long to read."""
    shape = header.get_shape()
    if not shape:
        return cast(torch.Tensor, header[...])
    return cast(torch.Tensor, header[: max(1, LOOKED_AT // max(1, math.prod(shape[1:])))])


def _report(kind: Any, config: Any, found: dict[str, torch.Tensor]) -> dict[str, Any]:
    with _quiet():
        _, report = kind.from_pretrained(
            None, config=config, state_dict=found, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
        )
    return dict(report)


@contextmanager
def _quiet() -> Iterator[None]:
    """The library's own bar and report would say the same in many lines."""
    level, bar = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bar:
            transformers_logging.enable_progress_bar()
