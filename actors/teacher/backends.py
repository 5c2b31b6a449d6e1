"""The teacher back ends by name, and what each can do: read by settings, checks, launch and the actor itself.

A back end of your own is one declaration in a file that the job's `extensions` names:

    from opd_governor.actors.teacher.backends import TEACHER_BACKENDS, Backend

    TEACHER_BACKENDS.add("mine")(Backend(lambda settings, stop_ids, seed: MyScorer(settings, stop_ids)))

Its scorer follows `scorers.Scorer`. Back ends load what they need inside the loader, so that naming one costs nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd_governor.actors.extensions import Kind

if TYPE_CHECKING:
    from opd_governor.actors.teacher.scorers import Scorer
    from opd_governor.actors.teacher.settings import TeacherSettings

MAX_FULL_VOCABULARY = 4096
"""Largest vocabulary read whole from an engine or a server, one number per entry. Beyond it one position of an answer is megabytes of
JSON, or seconds and hundreds of MB of Python objects."""

StopIds = tuple[int, ...]
Load = Callable[["TeacherSettings", StopIds, int], "Scorer"]
"""(settings, stop ids, seed) -> the scorer, its model loaded."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to score tokens under a teacher."""

    load: Load
    local: bool = True
    """The teacher's weights are loaded on this cluster. False: a server of someone else's holds them; `teacher.url` is its address."""
    hidden: bool = False
    """It can give hidden states, which support `full` needs."""
    given_ids: bool = True
    """It scores any ids it is given, which supports `student` and `union` need. False: it depends on the server."""
    follows: bool = False
    """Its scorer has `follow`, which takes new weights while it serves."""
    beams: bool = False
    """Golden answers by beam search and without repeated n-grams."""
    repeatable: bool = True
    """Equal requests get scores that are equal to the last bit."""
    cpu_vocabulary: int | None = None
    """Largest vocabulary that it can score without a GPU; None: any."""
    package: str | None = None
    """Python package that has to be installed for it."""


TEACHER_BACKENDS: Kind[Backend] = Kind("teacher back end")


def _torch(settings: "TeacherSettings", stop_ids: StopIds, seed: int) -> "Scorer":
    from opd_governor.actors.causal_lm import num_ids_of
    from opd_governor.actors.teacher.scorers import TorchScorer

    named = settings.tokenizer if settings.tokenizer not in (None, "own", "same") else settings.model
    num_ids = max(num_ids_of(named, settings.trust_remote_code), *(stop + 1 for stop in stop_ids))
    return TorchScorer(settings, stop_ids, num_ids=num_ids)


def _vllm(settings: "TeacherSettings", stop_ids: StopIds, seed: int) -> "Scorer":
    from opd_governor.actors.teacher.vllm_scorer import VllmScorer

    return VllmScorer(settings, stop_ids, seed)


def _http(settings: "TeacherSettings", stop_ids: StopIds, seed: int) -> "Scorer":
    from opd_governor.actors.teacher.http_scorer import HttpScorer

    return HttpScorer(settings, stop_ids, seed)


TEACHER_BACKENDS.add("torch")(Backend(_torch, hidden=True, follows=True, beams=True))
TEACHER_BACKENDS.add("vllm")(Backend(_vllm, cpu_vocabulary=MAX_FULL_VOCABULARY, package="vllm"))
TEACHER_BACKENDS.add("http")(Backend(_http, local=False, given_ids=False, repeatable=False))
