"""Held-out evaluation: verifiers, and what a set of responses amounts to."""

import importlib
import importlib.util
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from opd_governor.services.job.settings import JobError

Verifier = Callable[[str, str], bool]
"""(response text, answer) -> right or wrong."""


@dataclass(frozen=True, slots=True)
class Response:
    """One answer of the student to a held-out problem."""

    text: str
    """Without the stop token."""
    answer: str
    """What the verifier compares with."""
    num_tokens: int
    """The stop token included."""
    truncated: bool


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The summary of one way of decoding."""

    accuracy_ratio: float
    length_tokens: float
    """Mean."""
    length_p95_tokens: float
    truncation_ratio: float
    num_problems: int


def summarise(responses: Sequence[Response], verify: Verifier) -> Evaluation:
    """Accuracy, mean length and truncation of at least one response."""
    assert responses, "no responses to summarise"
    num = len(responses)
    return Evaluation(
        accuracy_ratio=sum(bool(verify(r.text, r.answer)) for r in responses) / num,
        length_tokens=sum(r.num_tokens for r in responses) / num,
        length_p95_tokens=float(np.percentile([r.num_tokens for r in responses], 95)),
        truncation_ratio=sum(r.truncated for r in responses) / num,
        num_problems=num,
    )


def load_verifier(spec: str) -> Verifier:
    """`exact`, `regex` (the answer is a pattern searched in the response), `file.py:function` or `module:function`.

    The code of a file or module runs on load. Raises JobError naming what is missing or what it raised.
    """
    if spec == "exact":
        return lambda response, answer: response.strip() == answer.strip()
    if spec == "regex":
        return lambda response, answer: re.search(answer, response) is not None
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise JobError(f"data.eval.verifier {spec}: expected exact, regex, file.py:function or module:function")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except Exception as error:  # whatever the user's code raises is their one line
        raise JobError(f"data.eval.verifier {spec}: {place} does not load ({type(error).__name__}: {error})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise JobError(f"data.eval.verifier {spec}: {place} has no function {name}")
    return function


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(f"opd_verifier_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
