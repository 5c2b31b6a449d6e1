"""What a verifier says of one response, also where it says nothing of use. Light: a verifier's own process loads it.

judge(verify, response, answer) --> Verdict
"""

import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

from opd_governor.actors.trajectory import PASS
from opd_governor.services.inputs.refusals import is_theirs, words

Verifier = Callable[[str, str], Any]
"""(response text, answer) -> right or wrong, or a finite score."""
Reason = Literal["raised", "nonsense", "memory", "timeout", "died"]
REASONS: tuple[Reason, ...] = get_args(Reason)
"""Why there is no score: the verifier raised; gave no finite number; ran out of memory; took too long; its process died."""
TIMEOUT_VARIABLE, MEMORY_VARIABLE = "OPD_VERIFIER_TIMEOUT_S", "OPD_VERIFIER_MEMORY_MIB"
"""Environment of a verifier's process: its limits for one response, which a verifier with processes of its own obeys."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """On one response."""

    score: float | None
    """None: no score, and `reason` and `trouble` say why."""
    reason: Reason | None = None
    trouble: str = ""
    """In words, the answer that it was compared with first."""

    @property
    def passed(self) -> bool:
        return self.score is not None and self.score >= PASS


def judge(verify: Verifier, response: str, answer: str) -> Verdict:
    """Whatever the verifier raises is a verdict without a score."""
    try:
        score = _score(verify(response, answer))
    except MemoryError:
        return failed("memory", answer, "it ran out of memory")
    except SystemExit as error:
        return failed("raised", answer, f"it called exit({error.code})")
    except BaseException as error:
        if not is_theirs(error):
            raise
        return failed("raised", answer, f"{type(error).__name__}: {words(error)}")
    if isinstance(score, str):
        return failed("nonsense", answer, f"it gives {score}, neither true, false nor a finite number")
    return Verdict(score)


def _score(found: Any) -> float | str:
    """A score, or what stands there instead."""
    if inspect.iscoroutine(found):
        found.close()
        return "a coroutine (make it a plain function)"
    try:
        score = math.nan if isinstance(found, str | bytes) else float(found)
    except (TypeError, ValueError):
        score = math.nan
    return score if math.isfinite(score) else repr(found)[:60]


def failed(reason: Reason, answer: str, why: str) -> Verdict:
    """A verdict without a score."""
    return Verdict(None, reason, f"answer {answer[:60]!r}: {why}")


def limits() -> tuple[float, int]:
    """(seconds, MiB) for one response, of this process."""
    return float(os.environ.get(TIMEOUT_VARIABLE, 10.0)), int(os.environ.get(MEMORY_VARIABLE, 1024))
