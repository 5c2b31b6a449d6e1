"""The vLLM back end: a response is scored as the tail of a prompt, through vLLM's prompt log-probs.

Shapes: T = tokens of one response, V = vocabulary, E = stop ids, K = support size.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import AutoConfig

from opd_governor.actors.deadlines import CallerError
from opd_governor.actors.packing import like_lengths
from opd_governor.actors.teacher.arguments import engine_arguments
from opd_governor.actors.teacher.backends import MAX_FULL_VOCABULARY
from opd_governor.actors.teacher.scorers import (
    GenerateOptions,
    ScoreRequest,
    check_window,
    ids_asked,
    require_stop_ids,
    score_logp,
    scores_of_asked,
)
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import TokenScores

MAX_ENTRIES = 4_000_000
"""Log-probs of one engine call where the vocabulary is read whole (about 100 bytes each while vLLM holds them)."""


class VllmScorer:
    """A vLLM engine in this process (with tensor parallelism its workers are processes of their own).

    With vLLM's V2 model runner (GPUs) the sampled token, the stop ids and given ids are read exactly, by
    `prompt_logprob_token_ids`. The V1 runner (CPU) only offers a position's most likely ids, so there the whole vocabulary is
    read, which small vocabularies allow; a larger one is refused: the stop class would be a guess. Raises ValueError then, for
    stop ids outside the vocabulary, and for a response longer than the context window.
    """

    def __init__(self, settings: TeacherSettings, stop_ids: tuple[int, ...], seed: int = 0) -> None:
        # Read when vllm is imported. In this process: no engine core beside the actor. One position above the window, for the
        # token that a request must generate after a response that fills it; that token is never fed back.
        defaults = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        for name, value in (defaults | {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}).items():
            os.environ.setdefault(name, value)
        import vllm

        self.settings = settings
        self.stop_ids = stop_ids
        config = AutoConfig.from_pretrained(settings.model, trust_remote_code=settings.trust_remote_code).get_text_config()
        self.vocabulary: int = config.vocab_size
        self.context_tokens: int | None = settings.max_model_len or getattr(config, "max_position_embeddings", None)
        require_stop_ids(stop_ids, self.vocabulary)
        self._params = vllm.SamplingParams
        self.engine: Any = vllm.LLM(**engine_arguments(settings, context_tokens=self.context_tokens, seed=seed))
        self.by_id: bool = self.engine.llm_engine.vllm_config.use_v2_model_runner
        if not self.by_id and self.vocabulary > MAX_FULL_VOCABULARY:
            raise CallerError(
                f"teacher {settings.name}: backend vllm without a GPU cannot read the stop class of a vocabulary of {self.vocabulary} "
                f"tokens (at most {MAX_FULL_VOCABULARY}); set backend: torch"
            )

    def score(self, requests: Sequence[ScoreRequest]) -> list[TokenScores | None]:
        scores: list[TokenScores | None] = [None] * len(requests)
        check_window(self.settings.name, requests, self.context_tokens)
        budget = self.settings.batch_tokens if self.by_id else min(self.settings.batch_tokens, MAX_ENTRIES // self.vocabulary)
        for batch in like_lengths([request.num_tokens for request in requests], budget, max_padding_ratio=1):
            chosen = [requests[index] for index in batch if requests[index].token_ids]
            outputs = iter(
                self.engine.generate(
                    [{"prompt_token_ids": [*request.prompt_token_ids, *request.token_ids]} for request in chosen],
                    [self._scoring_params(request) for request in chosen],
                    use_tqdm=False,
                )
            )
            for index in batch:
                request = requests[index]
                if not request.token_ids:
                    scores[index] = score_logp(self.settings.name, request, np.zeros((0, self.vocabulary), np.float32), self.stop_ids)
                elif self.by_id:
                    scores[index] = scores_by_id(self.settings.name, request, self.stop_ids, self.vocabulary, next(outputs))
                else:
                    logp_TV = _whole_vocabulary(next(outputs).prompt_logprobs, request, self.vocabulary)
                    scores[index] = score_logp(self.settings.name, request, logp_TV, self.stop_ids)
        return scores

    def generate(self, prompts: Sequence[tuple[int, ...]], options: GenerateOptions) -> list[tuple[int, ...]]:
        """Answers with their stop id; one without it ran to `max_new_tokens`. Sampling only: beams need the torch back end."""
        if options.beams > 1 or options.no_repeat_ngram > 0:
            raise CallerError(f"teacher {self.settings.name}: beams and no_repeat_ngram need backend torch")
        params = [
            self._params(
                max_tokens=options.max_new_tokens,
                temperature=options.temperature,
                seed=options.seed + index,
                stop_token_ids=list(self.stop_ids),
                ignore_eos=True,  # the stop ids are the whole stop event
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        outputs = self.engine.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], params, use_tqdm=False)
        return [tuple(output.outputs[0].token_ids) for output in outputs]

    def _scoring_params(self, request: ScoreRequest) -> Any:
        common = {"max_tokens": 1, "temperature": 0.0, "detokenize": False, "flat_logprobs": True}
        if not self.by_id:
            return self._params(prompt_logprobs=-1, **common)
        return self._params(
            prompt_logprobs=min(request.top_k, self.vocabulary) or None,
            prompt_logprob_token_ids=ids_asked(request, self.stop_ids, self.vocabulary),
            prompt_logprob_start=len(request.prompt_token_ids) - 1,
            **common,
        )


def scores_by_id(teacher: str, request: ScoreRequest, stop_ids: tuple[int, ...], vocabulary: int, output: Any) -> TokenScores:
    """Scores from a vLLM RequestOutput whose `prompt_token_id_logprobs` answer `ids_asked`."""
    asked = ids_asked(request, stop_ids, vocabulary)
    logps = np.asarray(output.prompt_token_id_logprobs, np.float32)
    assert logps.shape == asked.shape, (logps.shape, asked.shape)
    top = None
    if request.top_k:
        # The prompt's own token stands first, the most likely ones follow in order.
        ids_TN, logp_TN = _flat_rows(output.prompt_logprobs, request)
        top = ids_TN[:, 1 : request.top_k + 1], logp_TN[:, 1 : request.top_k + 1]
    return scores_of_asked(teacher, request, len(stop_ids), asked, logps, top)


def _flat_rows(flat: Any, request: ScoreRequest) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probs of the response's positions, [T, entries], from vLLM's FlatLogprobs over the whole prompt."""
    assert len(flat) == request.num_tokens, (len(flat), request.num_tokens)
    first = flat.start_indices[len(request.prompt_token_ids)]
    shape = (len(request.token_ids), -1)
    return np.array(flat.token_ids[first:], np.int32).reshape(shape), np.array(flat.logprobs[first:], np.float32).reshape(shape)


def _whole_vocabulary(flat: Any, request: ScoreRequest, vocabulary: int) -> np.ndarray:
    ids_TK, logp_TK = _flat_rows(flat, request)
    logp_TV = np.full((len(ids_TK), vocabulary), np.nan, np.float32)
    np.put_along_axis(logp_TV, ids_TK.astype(np.int64), logp_TK, axis=1)
    return logp_TV
