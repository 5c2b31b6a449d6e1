"""Held-out evaluation: verifiers, and what a set of responses amounts to.

A verifier is a function (response, answer) -> right or wrong. To add one by name, from any file that the job's `extensions` list:

    @VERIFIERS.add("starts")
    def starts(response: str, answer: str) -> bool:
        return response.startswith(answer)
"""

import importlib
import importlib.util
import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

import numpy as np

from opd_governor.actors.extensions import Kind
from opd_governor.services.inputs.messages import shown
from opd_governor.services.inputs.refusals import is_theirs, words
from opd_governor.services.job.settings import JobError

Verifier = Callable[[str, str], bool]
"""(response text, answer) -> right or wrong."""

VERIFIERS: Kind[Verifier] = Kind("verifier")

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?%?")
MATH_PACKAGE = "math_verify"


@VERIFIERS.add("exact")
def exact(response: str, answer: str) -> bool:
    """The whole response is the answer, white space around it aside."""
    return response.strip() == answer.strip()


@VERIFIERS.add("regex")
def regex(response: str, answer: str) -> bool:
    """The answer is a pattern that is found in the response."""
    return re.search(answer, response) is not None


@VERIFIERS.add("number")
def number(response: str, answer: str) -> bool:
    """The last number of the response equals the last number of the answer: `1,000.0` is 1000, `#### 18` is 18."""
    given, wanted = last_number(response), last_number(answer)
    if wanted is None:
        raise ValueError(f"answer {answer!r} holds no number")
    return given == wanted


@VERIFIERS.add("math-verify")
def math_verify(response: str, answer: str) -> bool:
    """The two are the same in mathematics (LaTeX, fractions, sets), by the package math-verify."""
    package = importlib.import_module(MATH_PACKAGE)
    return bool(package.verify(package.parse(answer), package.parse(response)))


def last_number(text: str) -> Decimal | None:
    """The last number in a text; None where there is none.

    >>> last_number("so 3 + 4 = 1,007.0")
    Decimal('1007.0')
    """
    for found in reversed([match for match in NUMBER.findall(text) if any(sign.isdigit() for sign in match)]):
        try:
            return Decimal(found.replace(",", "").rstrip("%").rstrip("."))
        except InvalidOperation:
            continue
    return None


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
    """The summary of one way of decoding. A value is None where nothing was there to make it of."""

    accuracy_ratio: float | None
    """Of the responses that the verifier judged."""
    length_tokens: float | None
    """Mean."""
    length_p95_tokens: float | None
    truncation_ratio: float | None
    num_problems: int
    """Problems answered."""
    num_unanswered: int = 0
    """Problems whose request was refused or lost: in none of the values."""
    num_unjudged: int = 0
    """Responses on which the verifier raised: not in the accuracy."""
    trouble: str = ""
    """What the verifier raised first."""

    def shortfall(self) -> str:
        """One line about what is missing; empty where nothing is."""
        parts = []
        if self.num_unanswered:
            parts.append(f"{self.num_unanswered} of {self.num_problems + self.num_unanswered} problems got no answer")
        if self.num_unjudged:
            parts.append(f"the verifier failed on {self.num_unjudged} of {self.num_problems} responses (first: {self.trouble})")
        return "; ".join(parts)


def verdict(verify: Verifier, response: str, answer: str) -> bool:
    """Right or wrong. Raises what `verify` raises, and ValueError for a result that is neither: a score of -1 or a word is no `True`."""
    try:
        found = verify(response, answer)
    except SystemExit as error:
        raise ValueError(f"it called exit({error.code})") from None
    if isinstance(found, bool | np.bool_) or (isinstance(found, int | float | np.number) and found in (0, 1)):
        return bool(found)
    if inspect.iscoroutine(found):
        found.close()
        raise ValueError("it is async: make it a plain function")
    raise ValueError(f"it returned {shown(found)}, which is neither True nor False (nor 1 or 0)")


def judge_of(spec: str) -> Callable[[str], str]:
    """A function that says why no response could be judged against an answer; it answers nothing where one can.

    A verifier of the job's own may be slow: it is tried on one answer alone. Raises JobError for a verifier that is none.
    """
    verify, is_own = load_verifier(spec), spec not in ("exact", "regex", "number", "math-verify")
    tried: list[str] = []

    def judge(answer: str) -> str:
        if spec == "number" and last_number(answer) is None:
            return f"answer {answer!r} holds no number; mend it, or choose another verifier"
        if spec == "regex":
            try:
                re.compile(answer)
            except re.error as error:
                return f"answer {answer!r} is no regular expression ({error}); mend it"
        if spec == "math-verify" and judged(verify, answer, answer) != "right":
            return f"answer {answer!r} is nothing that math-verify can read; write LaTeX between $ signs, or choose another verifier"
        if is_own and not tried:
            tried.append(answer)
            if (said := judged(verify, answer, answer)) not in ("right", "wrong"):
                raise JobError(f"data.eval.verifier {spec}: on response and answer {answer!r}: {said}")
        return ""

    return judge


def judged(verify: Verifier, response: str, answer: str) -> str:
    """right, wrong, or what came in place of a verdict. Raises nothing that the verifier raises."""
    try:
        return "right" if verdict(verify, response, answer) else "wrong"
    except BaseException as error:
        if not is_theirs(error):
            raise
        return words(error)


def summarise(responses: Sequence[Response], verify: Verifier, num_unanswered: int = 0) -> Evaluation:
    """Accuracy, mean length and truncation. A response on which `verify` raises is left out of the accuracy, and counted."""
    num = len(responses)
    verdicts: list[bool] = []
    trouble = ""
    for response in responses:
        try:
            verdicts.append(verdict(verify, response.text, response.answer))
        except BaseException as error:
            if not is_theirs(error):
                raise
            trouble = trouble or f"answer {response.answer!r}: {type(error).__name__}: {words(error)}"
    return Evaluation(
        accuracy_ratio=sum(verdicts) / len(verdicts) if verdicts else None,
        length_tokens=sum(r.num_tokens for r in responses) / num if num else None,
        length_p95_tokens=float(np.percentile([r.num_tokens for r in responses], 95)) if num else None,
        truncation_ratio=sum(r.truncated for r in responses) / num if num else None,
        num_problems=num,
        num_unanswered=num_unanswered,
        num_unjudged=num - len(verdicts),
        trouble=trouble,
    )


def load_verifier(spec: str) -> Verifier:
    """A verifier by its name, or `file.py:function` or `module:function`.

    The code of a file or module runs on load. Raises JobError naming what is missing or what it raised.
    """
    if spec in VERIFIERS:
        if spec == "math-verify" and importlib.util.find_spec(MATH_PACKAGE) is None:
            raise JobError("data.eval.verifier math-verify: the package is not installed; pip install math-verify[antlr4_13_2]")
        return VERIFIERS[spec]
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        raise JobError(f"data.eval.verifier {spec}: expected {', '.join(VERIFIERS)}, file.py:function or module:function")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is their one line
        raise JobError(f"data.eval.verifier {spec}: {place} does not load ({type(error).__name__}: {words(error)})") from error
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
