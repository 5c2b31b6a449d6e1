"""The HTTP back end: a vLLM server of someone else's, through POST /v1/completions with token ids and prompt log-probs.

Shapes: T = tokens of one response, V = vocabulary, K = support size.
"""

import json
import math
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import httpx
import numpy as np

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.teacher.backends import MAX_FULL_VOCABULARY
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, cut_at_stop, generate_timeout_s, score_logp
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import TokenScores

SERVER_TOP_K = 20
"""Ids asked for where the vocabulary is not read whole: vLLM's own limit (--max-logprobs) unless the server raises it."""
MAX_IN_FLIGHT = 32
FIRST_BACKOFF_S, MAX_BACKOFF_S = 0.25, 10.0
DEADLINE_SHARE = 0.9
"""Of a call's deadline at the pool: what has arrived by then is handed over in time."""
CLAMPED_LOGP = -9999.0
"""What a vLLM server writes for minus infinity."""
T = TypeVar("T")


class TeacherUnavailableError(RuntimeError):
    """No request of a call got a usable answer."""


class BadAnswerError(RuntimeError):
    """The server answered with something else than the scores of what it was asked; asked again."""


class HttpScorer:
    """Scores one response per request; failed and wrong answers are asked again, with jitter, within `settings.timeout_s`.

    A response that got no right answer in `max_attempts` is None. Where the vocabulary is small and the server allows it
    (--max-logprobs -1) everything is exact. Else the server's most likely ids are all there is: a stop id outside them counts
    with the largest probability it can have there (no more than the least likely id listed, nor than the mass not listed), and
    ids of the student's choice cannot be scored (ValueError). A request that the server refuses (4xx) is a ValueError with its
    words. The server's context window must leave one token after prompt and response. VLLM_API_KEY, where set, is sent.

    >>> HttpScorer(TeacherSettings(model="big", backend="http", url="http://127.0.0.1:8000"), stop_ids=(2,))
    """

    def __init__(self, settings: TeacherSettings, stop_ids: tuple[int, ...], seed: int = 0) -> None:
        if not settings.url:
            raise CallerError(f"teacher {settings.name}: backend http needs url, such as http://127.0.0.1:8000")
        self.settings = settings
        self.stop_ids = stop_ids
        self._random = random.Random(seed)
        address = settings.url.rstrip("/").removesuffix("/v1")  # people write both forms
        key = os.environ.get("VLLM_API_KEY")
        self._client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {key}"} if key else {})
        self._vocabulary: int | None = None
        """Size of a vocabulary read whole; 0: only the most likely ids are read; None: not asked yet."""

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        deadline = time.monotonic() + DEADLINE_SHARE * self.settings.timeout_s
        if self._vocabulary is None:
            self._vocabulary = self._find_vocabulary(deadline)
        return self._in_parallel(lambda request: self._score_one(request, deadline), requests)

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        """Answers with their stop id. Sampling only. Raises TeacherUnavailableError unless every prompt is answered."""
        if options.beams > 1 or options.no_repeat_ngram > 0:
            raise CallerError(f"teacher {self.settings.name}: beams and no_repeat_ngram need backend torch")
        deadline = time.monotonic() + DEADLINE_SHARE * generate_timeout_s(self.settings, options)
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # not the checkpoint's own defaults

        def answer(item: tuple[int, tuple[int, ...]]) -> tuple[int, ...] | None:
            index, prompt = item
            body = {
                "prompt": list(prompt),
                "max_tokens": options.max_new_tokens,
                "temperature": options.temperature,
                "seed": options.seed + index,
                "stop_token_ids": list(self.stop_ids),
                "ignore_eos": True,
            }
            return self._ask(body | plain, lambda choice: cut_at_stop(read_answer(choice), self.stop_ids), deadline)

        answers = [answer for answer in self._in_parallel(answer, list(enumerate(prompts))) if answer is not None]
        if len(answers) < len(prompts):
            raise TeacherUnavailableError(f"{self.settings.url}: {len(prompts) - len(answers)} of {len(prompts)} prompts got no answer")
        return answers

    def close(self) -> None:
        self._client.close()

    def _in_parallel(self, call: Callable[[Any], T | None], items: Sequence[Any]) -> list[T | None]:
        with ThreadPoolExecutor(MAX_IN_FLIGHT) as threads:
            results = list(threads.map(call, items))
        if results and all(result is None for result in results):
            raise TeacherUnavailableError(f"{self.settings.url}: no usable answer to {len(results)} requests")
        return results

    def _score_one(self, request: ScoreRequest, deadline: float) -> TokenScores | None:
        vocabulary = self._vocabulary or 0
        if not vocabulary and request.support_ids_TK is not None:
            raise CallerError(
                f"teacher {self.settings.name}: an HTTP server scores only its own most likely ids; set objective.support to sampled "
                "or teacher, or use backend torch or vllm"
            )
        body = {
            "prompt": [*request.prompt_token_ids, *request.token_ids],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": -1 if vocabulary else max(request.top_k, SERVER_TOP_K),
        }

        def read(choice: Mapping[str, Any]) -> TokenScores:
            rows = read_rows(choice, request)
            if not vocabulary:
                return score_listed(self.settings.name, request, rows, self.stop_ids)
            logp_TV = np.full((len(rows), vocabulary), np.nan, np.float32)
            for t, row in enumerate(rows):
                if len(row) != vocabulary or max(row) >= vocabulary:
                    raise BadAnswerError(f"{len(row)} log-probs at position {t} for a vocabulary of {vocabulary}")
                logp_TV[t, list(row)] = list(row.values())
            return score_logp(self.settings.name, request, logp_TV, self.stop_ids)

        return self._ask(body, read, deadline)

    def _find_vocabulary(self, deadline: float) -> int:
        """Ask for a whole vocabulary once, over two tokens: its size where that is allowed and small, else 0."""
        probe = ScoreRequest(prompt_token_ids=self.stop_ids[:1], token_ids=self.stop_ids[:1])
        body = {"prompt": list(self.stop_ids[:1]) * 2, "max_tokens": 1, "temperature": 0, "prompt_logprobs": -1}
        try:
            size = self._ask(body, lambda choice: len(read_rows(choice, probe)[0]), deadline)
        except ValueError as error:
            if "prompt logprobs" not in str(error):  # refused for another reason: a wrong model, a missing key
                raise
            size = 0
        if size is None:
            raise TeacherUnavailableError(f"{self.settings.url}: no usable answer to the first request")
        return size if size <= MAX_FULL_VOCABULARY else 0

    def _ask(self, body: Mapping[str, Any], read: Callable[[Mapping[str, Any]], T], deadline: float) -> T | None:
        """`read` over the answer's only choice; None when attempts or time ran out."""
        body = {"model": self.settings.model, "return_token_ids": True, **body}
        for attempt in range(self.settings.max_attempts):
            # Shares of the time left, so that a server that hangs can be asked again before the deadline.
            timeout_s = max(deadline - time.monotonic(), 0.0) / (self.settings.max_attempts - attempt + 1)
            wait_s = self._random.uniform(0.5, 1.0) * min(FIRST_BACKOFF_S * 2**attempt, MAX_BACKOFF_S)
            try:
                response = self._client.post("/v1/completions", json=body, timeout=timeout_s)
                if response.is_success:
                    return read(_only_choice(response, body["prompt"]))
                if response.status_code < 500 and response.status_code not in (408, 429):
                    raise CallerError(f"teacher {self.settings.name}: {self.settings.url} refused a request: {_reason(response)}")
                wait_s = max(wait_s, _retry_after_s(response))
            except (httpx.TransportError, BadAnswerError):
                pass  # asked again after the wait
            if attempt + 1 == self.settings.max_attempts or time.monotonic() + wait_s > deadline:
                break
            time.sleep(wait_s)
        return None


def _only_choice(response: httpx.Response, prompt: list[int]) -> Mapping[str, Any]:
    try:
        (choice,) = response.json()["choices"]
        echoed = choice["prompt_token_ids"]
    except (json.JSONDecodeError, UnicodeDecodeError, LookupError, TypeError, ValueError) as error:
        raise BadAnswerError(f"not a completion with one choice and its token ids: {error}") from None
    if echoed != prompt:
        raise BadAnswerError("the answer is about other token ids than those sent")
    return choice


def read_answer(choice: Mapping[str, Any]) -> list[int]:
    """The ids generated. Raises BadAnswerError."""
    token_ids = choice.get("token_ids")
    if not isinstance(token_ids, list) or not all(isinstance(token, int) for token in token_ids):
        raise BadAnswerError("no token ids in the answer")
    return token_ids


def read_rows(choice: Mapping[str, Any], request: ScoreRequest) -> list[dict[int, float]]:
    """Id -> log-prob at each of the response's T positions, the token itself among them. Raises BadAnswerError."""
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != request.num_tokens:
        raise BadAnswerError(f"log-probs for {len(rows) if isinstance(rows, list) else 'no'} tokens, sent {request.num_tokens}")
    try:
        read = [{int(token): _read_logp(entry["logprob"]) for token, entry in row.items()} for row in rows[len(request.prompt_token_ids) :]]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadAnswerError(f"log-probs in another form: {error!r}") from None
    for t, (row, token) in enumerate(zip(read, request.token_ids, strict=True)):
        if token not in row:
            raise BadAnswerError(f"position {t} lacks the token sent, {token}")
    return read


def score_listed(teacher: str, request: ScoreRequest, rows: Sequence[Mapping[int, float]], stop_ids: tuple[int, ...]) -> TokenScores:
    """Scores where only the most likely ids of each position (and the token itself) are known."""
    top_ids_TK = np.full((len(rows), request.top_k), -1, np.int32)
    top_logp_TK = np.full((len(rows), request.top_k), -np.inf, np.float32)
    for t, row in enumerate(rows):
        for k, token in enumerate(sorted(row, key=lambda token: -row[token])[: request.top_k]):
            top_ids_TK[t, k], top_logp_TK[t, k] = token, row[token]
    return TokenScores(
        teacher=teacher,
        sampled_logp_T=np.array([row[token] for row, token in zip(rows, request.token_ids, strict=True)], np.float32),
        stop_logp_T=np.array([bound_stop(row, token, stop_ids) for row, token in zip(rows, request.token_ids, strict=True)], np.float32),
        support_ids_TK=top_ids_TK if request.top_k else None,
        support_logp_TK=top_logp_TK if request.top_k else None,
    )


def bound_stop(row: Mapping[int, float], sampled: int, stop_ids: Sequence[int]) -> float:
    """The stop class's log-prob, each stop id that is not listed at the most it can have; exact where all are listed."""
    listed = [math.exp(row[stop_id]) for stop_id in stop_ids if stop_id in row]
    num_missing = len(stop_ids) - len(listed)
    least = math.exp(min((logp for token, logp in row.items() if token != sampled), default=row[sampled]))
    unlisted_mass = max(1.0 - sum(math.exp(logp) for logp in row.values()), 1e-12)
    mass = sum(listed) + (min(num_missing * least, unlisted_mass) if num_missing else 0.0)
    return math.log(mass) if mass > 0 else -math.inf


def _read_logp(value: Any) -> float:
    logp = math.nan if value is None else float(value)
    return -math.inf if logp <= CLAMPED_LOGP else logp


def _retry_after_s(response: httpx.Response) -> float:
    """Seconds that the server asks to wait; its other form, a date, counts as no wish."""
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0


def _reason(response: httpx.Response) -> str:
    return f"{response.status_code} {response.text[:500]}"
