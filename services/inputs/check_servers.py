"""Checks of teachers that a server has: reachable, model, window, log-probs, tokenizer, one scored probe."""

import time
from collections.abc import Iterator

from opd_governor.actors.teacher.http_client import TeacherUnavailableError
from opd_governor.actors.teacher.probe import ServerError, ServerReport, probe
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.inputs.checks import Check
from opd_governor.services.inputs.refusals import is_theirs, words
from opd_governor.services.inputs.resolve import ModelFacts
from opd_governor.services.job.settings import Job

TRIES, PAUSE_S = 3, 1.0
"""A server that answers now and then is one that a run can live with."""
TEXTS = ("What is 17 + 25?", "Grüße, 你好 🙂\n\tdef f(x): return x**2", "  two spaces")
"""Texts on which tokenizers differ: digits, accents, CJK, an emoji, code, white space."""


def check_server(settings: TeacherSettings, student: ModelFacts, job: Job) -> Iterator[Check]:
    """What the server said to a probe."""
    name = f"teacher server {settings.name}"
    same_ids = settings.tokenizer is None or settings.tokenizer == "same"
    texts = _encoded(student) if same_ids else {}
    try:
        report = _asked(settings, tuple(sorted(student.stops)) or (0,), texts)
    except ServerError as error:
        yield Check(name, "fail", " ".join(str(error).split()))
        return
    except BaseException as error:
        if not is_theirs(error):
            raise
        yield Check(name, "fail", f"teacher {settings.name}: {settings.url}: its answer to a probe: {words(error)}", "look at its log")
        return
    yield Check(name, "pass", f"{settings.url}: {report.kind}, one probe scored in {report.seconds:.2f} s")
    if report.other_tokens:
        detail = f"teacher {settings.name}: the server encodes {report.other_tokens[0]!r} otherwise than the student's tokenizer"
        yield Check(f"tokenizer {settings.name}", "fail", detail, "serve a model of the student's family, or name teacher.tokenizer")
    elif texts:
        yield Check(f"tokenizer {settings.name}", "pass", "the server and the student's tokenizer agree wherever it could be asked")
    if job.objective.needs.student_top_k and not report.given_ids:
        detail = (
            f"objective.support {job.objective.support} needs any id's log-prob, which the server of teacher {settings.name} does not give"
        )
        yield Check(f"teacher support {settings.name}", "fail", detail, "set it to sampled or teacher, or use another server")
    if report.window_tokens is not None and report.window_tokens <= job.rollout.max_new_tokens:
        detail = f"teacher {settings.name}: the server's window is {report.window_tokens} tokens"
        detail += f", rollout.max_new_tokens {job.rollout.max_new_tokens}"
        yield Check(f"teacher window {settings.name}", "warn", detail, "samples beyond it are masked and counted: serve a longer window")


def _asked(settings: TeacherSettings, stop_ids: tuple[int, ...], texts: dict[str, list[int]]) -> ServerReport:
    for left in range(TRIES - 1, -1, -1):
        try:
            return probe(settings, stop_ids, texts)
        except ServerError as error:
            if not left or not isinstance(error.__cause__, TeacherUnavailableError):
                raise
            time.sleep(PAUSE_S)
    raise AssertionError("unreachable")


def _encoded(student: ModelFacts) -> dict[str, list[int]]:
    """Those of TEXTS that the student's tokenizer can encode, with their ids: one without an unknown token raises on foreign letters."""
    encoded = {}
    for text in TEXTS:
        try:
            encoded[text] = [int(i) for i in student.tokenizer(text, add_special_tokens=False).input_ids]
        except BaseException as error:
            if not is_theirs(error):
                raise
    return encoded
