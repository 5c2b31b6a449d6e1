"""What servers are asked for scores, and how their answers are read: vLLM in three ways, SGLang in one. All of them are exact.

Shapes: T tokens of one response, V vocabulary, E stop ids, K support.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.teacher.backends import MAX_FULL_VOCABULARY
from opd_governor.actors.teacher.http_client import BadAnswerError, Client, RefusedError
from opd_governor.actors.teacher.scorers import (
    GenerateOptions,
    ScoreRequest,
    cut_at_stop,
    ids_asked,
    score_logp,
    scores_of_asked,
)
from opd_governor.actors.trajectory import TokenScores

SERVER_TOP_K = 20
"""Ids asked for where the vocabulary is not read whole: vLLM's own limit (--max-logprobs) unless the server raises it."""
PREFIXES_A_REQUEST = 64
CLAMPED_LOGP = -9999.0
"""What a vLLM server writes for minus infinity."""
WHOLE_NATS = 0.1
"""Log of the sum of a whole vocabulary's probabilities: rounding (bfloat16 logits over 10^5 ids) stays far below it."""
Row = dict[int, float]
"""Id -> log-prob at one position."""


class Server(Protocol):
    """How one kind of server scores and answers. Both raise RefusedError and TeacherUnavailableError."""

    way: str
    """In words, for `opd check`."""
    given_ids: bool
    """It scores any ids that it is given."""

    def score(self, client: Client, request: ScoreRequest, deadline: float) -> TokenScores: ...

    def generate(self, client: Client, prompt: Sequence[int], options: GenerateOptions, seed: int, deadline: float) -> tuple[int, ...]: ...


def find_server(client: Client, stop_ids: tuple[int, ...], deadline: float) -> Server:
    """The kind of the server and the best way it offers. Raises CallerError where it offers no exact one, RefusedError where it takes no
    request at all (a wrong model, a missing key)."""
    kind = client.settings.server
    if kind == "auto":
        answers = (client.get(path) for path in ("/get_model_info", "/model_info"))  # SGLang's, before and since it was renamed
        kind = "sglang" if any(isinstance(answer, dict) and "model_path" in answer for answer in answers) else "vllm"
    if kind == "sglang":
        return SglangServer(stop_ids)
    if 0 < (size := _whole_vocabulary(client, stop_ids, deadline)) <= MAX_FULL_VOCABULARY:
        return WholeVocabulary(stop_ids, size)
    for server in (ById(stop_ids), NextToken(stop_ids)):
        try:
            server.try_out(client, deadline)
        except RefusedError:
            continue
        return server
    raise CallerError(
        f"teacher {client.settings.name}: the server at {client.settings.url} gives no log-prob of the stop ids "
        f"(an unlisted id would be a guess); use vLLM 0.32 or newer, SGLang, or backend torch or vllm"
    )


def _whole_vocabulary(client: Client, stop_ids: tuple[int, ...], deadline: float) -> int:
    """Ask for a whole vocabulary once, over two tokens: its size where that is allowed, else 0."""
    probe = ScoreRequest(prompt_token_ids=stop_ids[:1], token_ids=stop_ids[:1])
    body = _completion(client, list(stop_ids[:1]) * 2, prompt_logprobs=-1)
    try:
        (row,) = client.post(COMPLETIONS, body, lambda answer: read_rows(only_choice(answer, body["prompt"]), probe), deadline)
        return len(row) if is_whole(row) else 0
    except RefusedError as error:
        if "prompt logprobs" not in str(error):  # refused for another reason: a wrong model, a missing key
            raise
        return 0


# ---- vLLM

COMPLETIONS, TOKENS = "/v1/completions", "/inference/v1/generate"


def _completion(client: Client, prompt: Any, **options: Any) -> dict[str, Any]:
    common = {"model": client.settings.model, "max_tokens": 1, "temperature": 0}
    return common | {"prompt": prompt, "return_token_ids": True} | options


class _Vllm:
    """What the three ways have in common."""

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = tuple(dict.fromkeys(stop_ids))

    def generate(self, client: Client, prompt: Sequence[int], options: GenerateOptions, seed: int, deadline: float) -> tuple[int, ...]:
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}  # not the checkpoint's own defaults
        stops = {"stop_token_ids": list(self.stop_ids), "ignore_eos": True}
        sampling = {"max_tokens": options.max_new_tokens, "temperature": options.temperature, "seed": seed}
        body = _completion(client, list(prompt), **sampling, **stops, **plain)
        answer = client.post(COMPLETIONS, body, lambda answer: read_ids(only_choice(answer, body["prompt"]).get("token_ids")), deadline)
        return cut_at_stop(answer, self.stop_ids)


class WholeVocabulary(_Vllm):
    """Small vocabularies, where the server allows it (--max-logprobs -1): every id at every position."""

    way = "the whole vocabulary at each position"
    given_ids = True

    def __init__(self, stop_ids: tuple[int, ...], vocabulary: int) -> None:
        super().__init__(stop_ids)
        self.vocabulary = vocabulary

    def score(self, client: Client, request: ScoreRequest, deadline: float) -> TokenScores:
        body = _completion(client, [*request.prompt_token_ids, *request.token_ids], prompt_logprobs=-1)

        def read(answer: Any) -> TokenScores:
            rows = read_rows(only_choice(answer, body["prompt"]), request)
            logp_TV = np.full((len(rows), self.vocabulary), np.nan, np.float32)
            for t, row in enumerate(rows):
                if len(row) != self.vocabulary or max(row) >= self.vocabulary:
                    raise BadAnswerError(f"{len(row)} log-probs at position {t} for a vocabulary of {self.vocabulary}")
                if not is_whole(row):
                    raise BadAnswerError(f"the log-probs at position {t} are not those of a whole vocabulary: they do not add up to 1")
                logp_TV[t, list(row)] = list(row.values())
            return score_logp(client.settings.name, request, logp_TV, self.stop_ids)

        return client.post(COMPLETIONS, body, read, deadline)


class ById(_Vllm):
    """The sampled token, the stop ids and given ids by their ids in one pass: `vllm serve --enable-scale-out` on GPUs."""

    way = "any ids in one pass (--enable-scale-out)"
    given_ids = True

    def try_out(self, client: Client, deadline: float) -> None:
        """Raises RefusedError where the server does not offer this way."""
        self.score(client, ScoreRequest(self.stop_ids[:1], self.stop_ids[:1]), deadline)

    def score(self, client: Client, request: ScoreRequest, deadline: float) -> TokenScores:
        asked = ids_asked(request, self.stop_ids, None)
        sampling = {
            "max_tokens": 1,
            "temperature": 0.0,
            "prompt_logprobs": request.top_k or None,
            "prompt_logprob_token_ids": asked.tolist(),
            "prompt_logprob_start": len(request.prompt_token_ids) - 1,
        }
        prompt = [*request.prompt_token_ids, *request.token_ids]
        body = {"model": client.settings.model, "token_ids": prompt, "sampling_params": sampling}

        def read(answer: Any) -> TokenScores:
            try:
                logps = np.load(io.BytesIO(base64.b64decode(answer["prompt_token_id_logprobs"])))
            except (LookupError, TypeError, ValueError) as error:
                raise BadAnswerError(f"no log-probs by id in the answer: {error!r}") from None
            if logps.shape != asked.shape:
                raise BadAnswerError(f"log-probs of shape {logps.shape}, asked for {asked.shape}")
            top = top_of(read_rows(answer, request), request) if request.top_k else None
            return scores_of_asked(client.settings.name, request, len(self.stop_ids), asked, logps.astype(np.float32), top)

        return client.post(TOKENS, body, read, deadline)


class NextToken(_Vllm):
    """Any vLLM server: its most likely ids in one pass; where they lack a stop id, its log-prob as the next token of each prefix.

    Those prefixes are in the server's prefix cache, so each costs the tokens since the last cached block and one more.
    """

    way = "the most likely ids in one pass, unlisted stop ids by one more token after each prefix"
    given_ids = False

    def try_out(self, client: Client, deadline: float) -> None:
        """Raises RefusedError where the server does not offer this way."""
        self._next(client, [list(self.stop_ids[:1])], deadline)

    def score(self, client: Client, request: ScoreRequest, deadline: float) -> TokenScores:
        prompt = [*request.prompt_token_ids, *request.token_ids]
        body = _completion(client, prompt, prompt_logprobs=max(request.top_k, SERVER_TOP_K))
        rows = client.post(COMPLETIONS, body, lambda answer: read_rows(only_choice(answer, prompt), request), deadline)
        stops = [{stop_id: row[stop_id] for stop_id in self.stop_ids if stop_id in row} for row in rows]
        lacking = [t for t, row in enumerate(stops) if len(row) < len(self.stop_ids)]
        for group in (lacking[start : start + PREFIXES_A_REQUEST] for start in range(0, len(lacking), PREFIXES_A_REQUEST)):
            prefixes = [prompt[: len(request.prompt_token_ids) + t] for t in group]
            for t, row in zip(group, self._next(client, prefixes, deadline), strict=True):
                stops[t] |= row
        return listed_scores(client.settings.name, request, rows, stops)

    def _next(self, client: Client, prefixes: list[list[int]], deadline: float) -> list[Row]:
        ids = list(self.stop_ids)
        body = _completion(client, prefixes, logprobs=0, logprob_token_ids=ids, return_tokens_as_token_ids=True, return_token_ids=False)

        def read(answer: Any) -> list[Row]:
            try:
                choices = sorted(answer["choices"], key=lambda choice: choice["index"])
                rows = [choice["logprobs"]["top_logprobs"][0] for choice in choices]
                found = [{stop_id: _read_logp(row[f"token_id:{stop_id}"]) for stop_id in ids} for row in rows]
            except (LookupError, TypeError, ValueError) as error:
                raise RefusedError(200, f"no log-probs of the ids asked for: {error!r}") from None
            if len(found) != len(prefixes):
                raise BadAnswerError(f"{len(found)} answers to {len(prefixes)} prefixes")
            return found

        return client.post(COMPLETIONS, body, read, deadline)


# ---- SGLang


class SglangServer:
    """The response's tokens, the most likely ids and the stop ids at each position, in one pass of POST /generate."""

    way = "stop ids by token_ids_logprob in one pass (SGLang)"
    given_ids = False

    def __init__(self, stop_ids: tuple[int, ...]) -> None:
        self.stop_ids = tuple(dict.fromkeys(stop_ids))

    def score(self, client: Client, request: ScoreRequest, deadline: float) -> TokenScores:
        body = {
            "input_ids": [*request.prompt_token_ids, *request.token_ids],
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "logprob_start_len": len(request.prompt_token_ids) - 1,
            "top_logprobs_num": request.top_k,
            "token_ids_logprob": list(self.stop_ids),
        }

        def read(answer: Any) -> TokenScores:
            sampled = self._rows([[entry] for entry in _meta(answer, "input_token_logprobs")], request)
            if [next(iter(row)) for row in sampled] != list(request.token_ids):
                raise BadAnswerError("the log-probs are of other tokens than those sent")
            stops = self._rows(_meta(answer, "input_token_ids_logprobs"), request)
            if any(row.keys() != set(self.stop_ids) for row in stops):
                raise BadAnswerError("no log-probs of the stop ids in the answer")
            rows = self._rows(_meta(answer, "input_top_logprobs"), request) if request.top_k else sampled
            return listed_scores(client.settings.name, request, [own | row for own, row in zip(sampled, rows, strict=True)], stops)

        return client.post("/generate", body, read, deadline)

    @staticmethod
    def _rows(entries: list[Any], request: ScoreRequest) -> list[Row]:
        """The response's positions: the last T, because the first of those sent back predicts nothing."""
        num_tokens = len(request.token_ids)
        if len(entries) < num_tokens:
            raise BadAnswerError(f"log-probs for {len(entries)} tokens, sent {num_tokens}")
        try:
            return [{int(entry[1]): _read_logp(entry[0]) for entry in row} for row in entries[len(entries) - num_tokens :]]
        except (LookupError, TypeError, ValueError) as error:
            raise BadAnswerError(f"log-probs in another form: {error!r}") from None

    def generate(self, client: Client, prompt: Sequence[int], options: GenerateOptions, seed: int, deadline: float) -> tuple[int, ...]:
        # No seed: SGLang takes one only when it was started for deterministic inference, and refuses the request otherwise.
        sampling = {"max_new_tokens": options.max_new_tokens, "temperature": options.temperature}
        plain = {"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
        stops = {"stop_token_ids": list(self.stop_ids), "ignore_eos": True}
        body = {"input_ids": list(prompt), "sampling_params": sampling | plain | stops}
        answer = client.post(
            "/generate", body, lambda answer: read_ids(answer.get("output_ids") if isinstance(answer, dict) else None), deadline
        )
        return cut_at_stop(answer, self.stop_ids)


def _meta(answer: Any, name: str) -> list[Any]:
    told = answer.get("meta_info") if isinstance(answer, dict) else None
    entries = told.get(name) if isinstance(told, dict) else None
    if not isinstance(entries, list):
        raise BadAnswerError(f"no {name} in the answer")
    return entries


# ---- reading


def is_whole(row: Row) -> bool:
    """Whether a position's log-probs are those of every id: their probabilities add up to 1. NaN is not judged: the pool refuses it."""
    with np.errstate(invalid="ignore"):
        return not abs(np.logaddexp.reduce(list(row.values()), initial=-np.inf)) >= WHOLE_NATS


def only_choice(answer: Any, prompt: list[int]) -> Mapping[str, Any]:
    """The one choice of a completion about `prompt`. Raises BadAnswerError."""
    try:
        (choice,) = answer["choices"]
        echoed = choice["prompt_token_ids"]
    except (LookupError, TypeError, ValueError) as error:
        raise BadAnswerError(f"not a completion with one choice and its token ids: {error}") from None
    if echoed != prompt:
        raise BadAnswerError("the answer is about other token ids than those sent")
    return choice


def read_ids(token_ids: Any) -> list[int]:
    """The ids generated. Raises BadAnswerError."""
    if not isinstance(token_ids, list) or not all(isinstance(token, int) for token in token_ids):
        raise BadAnswerError("no token ids in the answer")
    return token_ids


def read_rows(choice: Mapping[str, Any], request: ScoreRequest) -> list[Row]:
    """vLLM's prompt log-probs at each of the response's T positions, the token itself among them. Raises BadAnswerError."""
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


def listed_scores(teacher: str, request: ScoreRequest, rows: Sequence[Row], stops: Sequence[Row]) -> TokenScores:
    """Scores from the most likely ids of each position with the token itself, and the log-prob of every stop id."""
    top_ids_TK, top_logp_TK = top_of(rows, request)
    with np.errstate(invalid="ignore"):  # a NaN stays one: the pool refuses the sample
        stop_logp_T = np.array([np.logaddexp.reduce(list(row.values())) for row in stops], np.float32)
    return TokenScores(
        teacher=teacher,
        sampled_logp_T=np.array([row[token] for row, token in zip(rows, request.token_ids, strict=True)], np.float32),
        stop_logp_T=stop_logp_T,
        support_ids_TK=top_ids_TK if request.top_k else None,
        support_logp_TK=top_logp_TK if request.top_k else None,
    )


def top_of(rows: Sequence[Row], request: ScoreRequest) -> tuple[np.ndarray, np.ndarray]:
    """[T, top_k] ids in falling order of log-prob and their log-probs; padded where a position has fewer."""
    ids_TK = np.full((len(rows), request.top_k), -1, np.int32)
    logp_TK = np.full((len(rows), request.top_k), -np.inf, np.float32)
    for t, row in enumerate(rows):
        for k, token in enumerate(sorted(row, key=lambda token: -row[token])[: request.top_k]):
            ids_TK[t, k], logp_TK[t, k] = token, row[token]
    return ids_TK, logp_TK


def _read_logp(value: Any) -> float:
    logp = math.nan if value is None else float(value)
    return -math.inf if logp <= CLAMPED_LOGP else logp
