"""The HTTP back end: a server of someone else's (vLLM or SGLang) scores responses by their token ids."""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.teacher.http_client import REFUSALS_FOR_ALL, Client, RefusedError, TeacherUnavailableError, words
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, generate_timeout_s
from opd_governor.actors.teacher.servers import Server, find_server
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import TokenScores

MAX_IN_FLIGHT = 32
DEADLINE_SHARE = 0.9
"""Of a call's deadline at the pool: what has arrived by then is handed over in time."""
T = TypeVar("T")


class HttpScorer:
    """Scores one response per request; failed and wrong answers are asked again, with jitter, within `settings.timeout_s`.

    A response that got no right answer in `max_attempts`, or that the server refuses (400: longer than its window), is None: the pool
    masks and counts it. Refusals that concern every request (a wrong model, a missing key), and ids of the student's choice where the
    server scores none, are CallerErrors. TeacherUnavailableError, with the last failure as its cause, where nothing got an answer.
    How each kind of server is asked is in servers.py. A server's context window must leave one token after prompt and response.

    >>> HttpScorer(TeacherSettings(model="big", backend="http", url="http://127.0.0.1:8000"), stop_ids=(2,))
    """

    def __init__(self, settings: TeacherSettings, stop_ids: tuple[int, ...], seed: int = 0) -> None:
        self.settings = settings
        self.stop_ids = stop_ids
        self._client = Client(settings, seed)
        self._server: Server | None = None
        """Found with the first request."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        deadline = time.monotonic() + DEADLINE_SHARE * self.settings.timeout_s
        server = self.server(deadline)
        if not server.given_ids and any(request.support_ids_TK is not None for request in requests):
            raise CallerError(
                f"teacher {self.settings.name}: its server scores only its own most likely ids; set objective.support to sampled or "
                "teacher, start it with --enable-scale-out on a GPU, or use backend torch or vllm"
            )
        return self._in_parallel(lambda request: server.score(self._client, request, deadline), requests)

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        """Answers with their stop id. Sampling only. Raises TeacherUnavailableError unless every prompt is answered."""
        if options.beams > 1 or options.no_repeat_ngram > 0:
            raise CallerError(f"teacher {self.settings.name}: beams and no_repeat_ngram need backend torch")
        deadline = time.monotonic() + DEADLINE_SHARE * generate_timeout_s(self.settings, options)
        server = self.server(deadline)

        def answer(item: tuple[int, tuple[int, ...]]) -> tuple[int, ...]:
            index, prompt = item
            return server.generate(self._client, prompt, options, options.seed + index, deadline)

        answers = [answer for answer in self._in_parallel(answer, list(enumerate(prompts))) if answer is not None]
        if len(answers) < len(prompts):
            raise TeacherUnavailableError(f"{self.settings.url}: {len(prompts) - len(answers)} of {len(prompts)} prompts got no answer")
        return answers

    def server(self, deadline: float) -> Server:
        """The server's kind and way, asked for once."""
        if self._server is None:
            try:
                self._server = find_server(self._client, self.stop_ids, deadline)
            except RefusedError as error:
                raise self._refused(error) from error
        return self._server

    def close(self) -> None:
        self._client.close()

    def _refused(self, error: RefusedError) -> CallerError:
        return CallerError(f"teacher {self.settings.name}: {self.settings.url} refused a request: {error}")

    def _in_parallel(self, call: Callable[[Any], T], items: Sequence[Any]) -> list[T | None]:
        """Each item's result; None for one that was refused or got no answer. Raises TeacherUnavailableError where all got none."""
        failures: list[TeacherUnavailableError] = []

        def attempt(item: Any) -> T | None:
            try:
                return call(item)
            except RefusedError as error:
                if error.status in REFUSALS_FOR_ALL:
                    raise self._refused(error) from error
                return None
            except TeacherUnavailableError as error:
                failures.append(error)
                return None

        with ThreadPoolExecutor(MAX_IN_FLIGHT) as threads:
            results = list(threads.map(attempt, items))
        if results and len(failures) == len(results):
            last = failures[-1].__cause__ or failures[-1]
            raise TeacherUnavailableError(f"{self.settings.url}: no usable answer to {len(results)} requests: {words(last)}") from last
        return results
