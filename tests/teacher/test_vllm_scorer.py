"""The vLLM back end in this process, on tiny random models, against the torch back end."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, TorchScorer, score_logp
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.teacher.vllm_scorer import VllmScorer, ids_asked, scores_by_id
from tests.tiny import build_tiny

STOP_IDS = (1, 3)
CONTEXT_TOKENS = 64


def in_vllm(test):
    """Runs in a real engine, whose own warnings are not ours to fix."""
    return pytest.mark.integration(pytest.mark.filterwarnings("default")(test))


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    folder = build_tiny(tmp_path_factory.mktemp("teacher"), "llama", seed=3, context_tokens=CONTEXT_TOKENS)
    settings = TeacherSettings(model=str(folder), batch_tokens=200)
    return TorchScorer(settings, STOP_IDS), VllmScorer(settings, STOP_IDS)


def ragged_requests() -> list[ScoreRequest]:
    draw = np.random.default_rng(0)
    requests = []
    shapes = [(3, 5, 0, 4), (11, 1, 2, 0), (1, 17, 3, 6), (7, 0, 2, 3), (2, 9, 0, 0), (40, CONTEXT_TOKENS - 40, 1, 1), (1, 1, 0, 85)]
    for prompt_length, response_length, given, top_k in shapes:
        requests.append(
            ScoreRequest(
                prompt_token_ids=tuple(draw.integers(4, 85, prompt_length).tolist()),
                token_ids=tuple(draw.integers(0, 85, response_length).tolist()),
                support_ids_TK=draw.integers(-1, 85, (response_length, given)).astype(np.int32) if given else None,
                top_k=top_k,
            )
        )
    return requests


@in_vllm
def test_both_back_ends_agree_within_1e_4_nats(scorers):
    """A response that fills the context window to its last token included."""
    requests = ragged_requests()
    for ours, theirs in zip(*(scorer.score(requests) for scorer in scorers), strict=True):
        np.testing.assert_allclose(ours.sampled_logp_T, theirs.sampled_logp_T, atol=1e-4, rtol=0)
        np.testing.assert_allclose(ours.stop_logp_T, theirs.stop_logp_T, atol=1e-4, rtol=0)
        assert (ours.support_ids_TK is None) == (theirs.support_ids_TK is None)
        if ours.support_ids_TK is not None:
            np.testing.assert_array_equal(ours.support_ids_TK, theirs.support_ids_TK)
            np.testing.assert_allclose(ours.support_logp_TK, theirs.support_logp_TK, atol=1e-4, rtol=0)


@in_vllm
def test_greedy_answers_agree_and_seeds_are_obeyed(scorers):
    prompts = [request.prompt_token_ids for request in ragged_requests()]
    greedy = GenerateOptions(max_new_tokens=10, temperature=0)
    assert scorers[0].generate(prompts, greedy) == scorers[1].generate(prompts, greedy)
    drawn = [scorers[1].generate(prompts, GenerateOptions(max_new_tokens=10, seed=seed)) for seed in (1, 1, 50)]
    assert drawn[0] == drawn[1] != drawn[2]


@in_vllm
def test_a_response_beyond_the_window_and_beams_are_clear_errors(scorers):
    with pytest.raises(ValueError, match="prompt and response have 65 tokens, its context window 64"):
        scorers[1].score([ScoreRequest(prompt_token_ids=(5,) * 12, token_ids=(6,) * 53)])
    with pytest.raises(ValueError, match="beams and no_repeat_ngram need backend torch"):
        scorers[1].generate([(5,)], GenerateOptions(max_new_tokens=4, beams=2))


class FlatLogprobs(SimpleNamespace):
    """vLLM's class of that name, as far as the scorer reads it."""

    def __len__(self):
        return len(self.start_indices)


def gpu_output(logp_SV: np.ndarray, prompt: list[int], asked: np.ndarray, start: int, top_k: int):
    """What the V2 model runner (GPUs) answers, by vLLM's documentation: row i scores its ids as prompt token start + i + 1."""
    rows = start + np.arange(len(asked))
    by_id = np.where(asked >= 0, np.take_along_axis(logp_SV[rows], asked.clip(0), axis=1), -np.inf)
    flat = FlatLogprobs(start_indices=[0], token_ids=[], logprobs=[])
    for position, token in enumerate(prompt[1:]):
        flat.start_indices.append(len(flat.token_ids))
        listed = [token, *np.argsort(-logp_SV[position])[:top_k].tolist()]
        flat.token_ids += listed
        flat.logprobs += logp_SV[position, listed].tolist()
    return SimpleNamespace(prompt_token_id_logprobs=by_id, prompt_logprobs=flat if top_k else None)


@pytest.mark.parametrize("index", [0, 1, 2, 4, 5, 6])  # an empty response never reaches the engine
def test_scores_by_id_equal_those_of_the_whole_vocabulary(index):
    request = ragged_requests()[index]
    prompt = [*request.prompt_token_ids, *request.token_ids]
    draw = torch.Generator().manual_seed(index)
    logp_SV = torch.log_softmax(torch.randn(len(prompt), 85, generator=draw), -1).numpy()
    start = len(request.prompt_token_ids) - 1
    asked = ids_asked(request, STOP_IDS, 85)
    scored = scores_by_id("t", request, STOP_IDS, 85, gpu_output(logp_SV, prompt, asked, start, request.top_k))
    expected = score_logp("t", request, logp_SV[start : start + len(request.token_ids)], STOP_IDS)
    np.testing.assert_allclose(scored.sampled_logp_T, expected.sampled_logp_T, atol=1e-6)
    np.testing.assert_allclose(scored.stop_logp_T, expected.stop_logp_T, atol=1e-6)
    if expected.support_ids_TK is not None:
        np.testing.assert_array_equal(scored.support_ids_TK, expected.support_ids_TK)
        np.testing.assert_allclose(scored.support_logp_TK, expected.support_logp_TK, atol=1e-6)
