"""Verifiers, for rewards and for held-out evaluation, and what a set of responses amounts to.

A verifier is a function (response, answer) -> right or wrong, or a score. To add one by name, from any file that the job's `extensions`
list:

    @VERIFIERS.add("starts")
    def starts(response: str, answer: str) -> bool:
        return response.startswith(answer)
"""

import importlib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from opd_governor.actors.extensions import Kind
from opd_governor.actors.trajectory import BY_ENVIRONMENT
from opd_governor.services.inputs.refusals import words
from opd_governor.services.inputs.trial import trouble_of
from opd_governor.services.inputs.unit_tests import last_block, passes
from opd_governor.services.inputs.verdicts import Verdict, Verifier, judge, limits
from opd_governor.services.job.errors import JobError
from opd_governor.services.job.settings import VerifierProcesses

VERIFIERS: Kind[Verifier] = Kind("verifier")
PACKAGES = {"math-verify": ("math_verify", "math-verify[antlr4_13_2]"), "json-schema": ("jsonschema", "jsonschema")}
"""Verifier -> the package that it needs, as it is imported and as it is installed."""

NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)\.?)(?:[eE][-+]?\d+)?%?")


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
    package = importlib.import_module("math_verify")
    return bool(package.verify(package.parse(answer), package.parse(response)))


@VERIFIERS.add("json-schema")
def json_schema(response: str, answer: str) -> bool:
    """The response, or its last fenced block, is JSON that the answer, a JSON schema, allows. Schemas are not fetched."""
    validators, registry = importlib.import_module("jsonschema.validators"), importlib.import_module("referencing").Registry()
    schema = json.loads(answer)
    validator = validators.validator_for(schema, default=validators.Draft202012Validator)
    validator.check_schema(schema)
    try:
        found = json.loads(last_block(response))
    except ValueError:
        return False
    return bool(validator(schema, registry=registry).is_valid(found))


VERIFIERS.add("unit-tests")(passes)


@VERIFIERS.add(BY_ENVIRONMENT)
def by_environment(response: str, answer: str) -> float:
    """The reward that the job's environment gave: it comes with the rollout."""
    raise ValueError("the environment's reward comes with its rollouts; other responses have none")


def ask_server(url: str, response: str, answer: str) -> float:
    """POST {"response", "answer"} to an address, which answers {"score": number} or the number alone."""
    httpx = importlib.import_module("httpx")
    told = httpx.post(url, json={"response": response, "answer": answer}, timeout=limits()[0])
    told.raise_for_status()
    found = told.json()
    return found["score"] if isinstance(found, dict) else found  # type: ignore[no-any-return]


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
    """Responses without a score: not in the accuracy."""
    trouble: str = ""
    """Why the first of them has none."""

    def shortfall(self) -> str:
        """One line about what is missing; empty where nothing is."""
        parts = []
        if self.num_unanswered:
            parts.append(f"{self.num_unanswered} of {self.num_problems + self.num_unanswered} problems got no answer")
        if self.num_unjudged:
            parts.append(f"the verifier failed on {self.num_unjudged} of {self.num_problems} responses (first: {self.trouble})")
        return "; ".join(parts)


def judge_of(spec: str, settings: VerifierProcesses, field: str = "data.eval.verifier") -> Callable[[str], str]:
    """A function that says why no response could be judged against an answer; it answers nothing where one can.

    A verifier of the job's own may be slow: it is tried on one answer alone, in a process of its own. Raises JobError, naming `field`,
    for a verifier that is none.
    """
    is_own = spec not in BUILT_IN
    verify = exact if is_own and ":" in spec else load_verifier(spec, field)
    tried: list[str] = []

    def what_is_wrong(answer: str) -> str:
        if spec == "math-verify" and not judge(verify, answer, answer).passed:
            return f"answer {answer[:60]!r} is nothing that math-verify can read; write LaTeX between $ signs, or choose another verifier"
        if spec in READ:
            read, what = READ[spec]
            try:
                read(answer)
            except (ValueError, SyntaxError, re.error) as error:
                why = f" ({words(error)})" if str(error) else ""
                return f"answer {answer[:60]!r} {what}{why}; mend it, or choose another verifier"
        if is_own and not tried:
            tried.append(answer)
            if trouble := trouble_of(spec, field, answer, settings):
                raise JobError(trouble)
        return ""

    return what_is_wrong


def _number(answer: str) -> None:
    if last_number(answer) is None:
        raise ValueError


def _schema(answer: str) -> None:
    validators, schema = importlib.import_module("jsonschema.validators"), json.loads(answer)
    try:
        validators.validator_for(schema, default=validators.Draft202012Validator).check_schema(schema)
    except importlib.import_module("jsonschema.exceptions").SchemaError as error:
        raise ValueError(error.message) from None


READ: dict[str, tuple[Callable[[str], Any], str]] = {
    "number": (_number, "holds no number"),
    "regex": (re.compile, "is no regular expression"),
    "json-schema": (_schema, "is no JSON schema"),
    "unit-tests": (partial(compile, filename="tests.py", mode="exec"), "is no Python"),
}
"""Verifier -> what raises for an answer that it cannot read, and that in words."""
BUILT_IN = ("exact", "math-verify", BY_ENVIRONMENT, *READ)


def summarise(responses: Sequence[Response], verify: Verifier, num_unanswered: int = 0) -> Evaluation:
    """As `tally`, with verdicts made here and now."""
    return tally(responses, [judge(verify, response.text, response.answer) for response in responses], num_unanswered)


def tally(responses: Sequence[Response], verdicts: Sequence[Verdict], num_unanswered: int = 0) -> Evaluation:
    """Accuracy, mean length and truncation. A response without a score is left out of the accuracy, and counted."""
    num = len(responses)
    judged = [verdict for verdict in verdicts if verdict.score is not None]
    return Evaluation(
        accuracy_ratio=sum(verdict.passed for verdict in judged) / len(judged) if judged else None,
        length_tokens=sum(r.num_tokens for r in responses) / num if num else None,
        length_p95_tokens=float(np.percentile([r.num_tokens for r in responses], 95)) if num else None,
        truncation_ratio=sum(r.truncated for r in responses) / num if num else None,
        num_problems=num,
        num_unanswered=num_unanswered,
        num_unjudged=num - len(judged),
        trouble=next((verdict.trouble for verdict in verdicts if verdict.score is None), ""),
    )


def load_verifier(spec: str, field: str = "data.eval.verifier") -> Verifier:
    """A verifier by its name, its http(s) address, or `file.py:function` or `module:function`.

    The code of a file or module runs on load. Raises JobError naming `field` and what is missing or what it raised.
    """
    if spec in VERIFIERS:
        imported, installed = PACKAGES.get(spec, ("", ""))
        if imported and importlib.util.find_spec(imported) is None:
            raise JobError(f"{field} {spec}: the package is not installed; pip install {installed}")
        return VERIFIERS[spec]
    if spec.startswith(("http://", "https://")):
        return partial(ask_server, spec)
    place, separator, name = spec.rpartition(":")
    if not separator or not place or not name:
        known = ", ".join(name for name in VERIFIERS if name != BY_ENVIRONMENT)
        raise JobError(f"{field} {spec}: expected {known}, an http(s) address, file.py:function or module:function")
    try:
        module = _import_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (Exception, SystemExit) as error:  # whatever the user's code raises is their one line
        raise JobError(f"{field} {spec}: {place} does not load ({type(error).__name__}: {words(error)})") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise JobError(f"{field} {spec}: {place} has no function {name}")
    return function


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError("no such file")
    spec = importlib.util.spec_from_file_location(f"opd_verifier_{path.stem}", path)
    assert spec is not None, path
    assert spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    if (folder := str(path.absolute().parent)) not in sys.path:
        sys.path.append(folder)  # for what it imports from beside it
    spec.loader.exec_module(module)
    return module
