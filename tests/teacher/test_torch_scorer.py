"""TorchScorer on tiny random models, against transformers' own forward in float64."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opd_governor.actors.causal_lm import Head, num_ids_of
from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.teacher.backends import TEACHER_BACKENDS
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, TorchScorer, cut_at_stop, digest_weights
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.tiny import ARCHITECTURES, build_tiny, tiny_tokenizer

STOP_IDS = (1, 3)


def ragged_requests(seed: int = 0, vocabulary: int = 85) -> list[ScoreRequest]:
    draw = np.random.default_rng(seed)
    requests = []
    shapes = [(3, 5, 0, 4), (11, 1, 2, 0), (1, 17, 3, 6), (7, 0, 2, 3), (2, 9, 0, 0), (40, 30, 1, 1)]
    for prompt_length, response_length, given, top_k in shapes:
        requests.append(
            ScoreRequest(
                prompt_token_ids=tuple(draw.integers(4, vocabulary, prompt_length).tolist()),
                token_ids=tuple(draw.integers(0, vocabulary, response_length).tolist()),
                support_ids_TK=draw.integers(-1, vocabulary, (response_length, given)).astype(np.int32) if given else None,
                top_k=top_k,
            )
        )
    return requests


def expected_logp(model: torch.nn.Module, request: ScoreRequest) -> torch.Tensor:
    """One sequence, no padding, the model's whole forward in float64."""
    with torch.inference_mode():
        logits_SV = model(torch.tensor([request.prompt_token_ids + request.token_ids])).logits[0]
    first = len(request.prompt_token_ids) - 1
    return torch.log_softmax(logits_SV, -1)[first : first + len(request.token_ids)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_ragged_batches_match_one_by_one_float64(tmp_path, architecture):
    folder = build_tiny(tmp_path / "teacher", architecture, seed=3)
    settings = TeacherSettings(model=str(folder), batch_tokens=64, chunk_tokens=7)
    requests = ragged_requests()

    scores = TorchScorer(settings, STOP_IDS).score(requests)

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for request, scored in zip(requests, scores, strict=True):
        logp_TV = expected_logp(model, request)
        steps = range(len(request.token_ids))
        np.testing.assert_allclose(scored.sampled_logp_T, [logp_TV[t, request.token_ids[t]] for t in steps], atol=1e-4)
        np.testing.assert_allclose(scored.stop_logp_T, logp_TV[:, STOP_IDS].logsumexp(-1), atol=1e-4)
        given = 0 if request.support_ids_TK is None else request.support_ids_TK.shape[1]
        if given + request.top_k == 0:
            assert scored.support_ids_TK is None
            continue
        assert scored.support_ids_TK.shape == (len(request.token_ids), given + request.top_k)
        if given:
            np.testing.assert_array_equal(scored.support_ids_TK[:, :given], request.support_ids_TK)
        for t in steps:
            for token, logp in zip(scored.support_ids_TK[t], scored.support_logp_TK[t], strict=True):
                assert logp == (pytest.approx(logp_TV[t, token].item(), abs=1e-4) if token >= 0 else -np.inf)
            top = set(logp_TV[t].topk(request.top_k).indices.tolist())
            assert top <= {int(token) for token in scored.support_ids_TK[t]}


def test_batch_and_chunk_sizes_change_nothing(tmp_path):
    folder = build_tiny(tmp_path / "teacher")
    requests = ragged_requests()
    alone = TorchScorer(TeacherSettings(model=str(folder), batch_tokens=16, chunk_tokens=1), STOP_IDS).score(requests)
    together = TorchScorer(TeacherSettings(model=str(folder), batch_tokens=4096), STOP_IDS).score(requests)
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_allclose(one.sampled_logp_T, other.sampled_logp_T, atol=1e-4)
        np.testing.assert_allclose(one.stop_logp_T, other.stop_logp_T, atol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_of_no_token_have_no_probability_in_teacher_and_learner(tmp_path, architecture):
    """Both give the log-probs of the distribution over the tokenizer's ids alone, as a float64 softmax over these."""
    padding = tuple("äöüßéèê")
    folder = build_tiny(tmp_path / "model", architecture, seed=3, extra=padding)
    tiny_tokenizer().save_pretrained(folder)
    num_ids = num_ids_of(str(folder))
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    assert model.config.vocab_size == num_ids + len(padding)
    rng = np.random.default_rng(0)
    ids = [int(i) for i in rng.integers(4, num_ids, 24)]
    with torch.no_grad():
        logits_LV = model(torch.tensor([ids])).logits[0, :-1]
    expected_L = logits_LV[:, :num_ids].log_softmax(-1)[range(23), ids[1:]].numpy()
    (scores,) = (
        TEACHER_BACKENDS["torch"].load(TeacherSettings(model=str(folder)), (1,), 0).score([ScoreRequest(tuple(ids[:1]), tuple(ids[1:]))])
    )
    np.testing.assert_allclose(scores.sampled_logp_T, expected_L, atol=1e-4)
    student = Learner(LearnerModels(str(folder), num_ids=num_ids), LearnerSettings(), ObjectiveSettings(), stop_ids=(1,), max_new_tokens=8)
    np.testing.assert_allclose(student.probe(ids, "float32"), expected_L, atol=1e-4)
    assert logits_LV.softmax(-1)[:, num_ids:].sum(-1).max() > 0.01, "rows of no token weigh too little to prove anything"


def test_soft_capped_logits_are_scored_capped(tmp_path):
    config = AutoConfig.for_model(
        "gemma2",
        vocab_size=85,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        final_logit_softcapping=2.0,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.get_output_embeddings().weight.data.normal_(0, 1)
    model.save_pretrained(tmp_path / "capped")
    request = ragged_requests()[0]
    scored = TorchScorer(TeacherSettings(model=str(tmp_path / "capped")), STOP_IDS).score([request])[0]
    logp_TV = expected_logp(AutoModelForCausalLM.from_pretrained(tmp_path / "capped", dtype=torch.float64), request)
    np.testing.assert_allclose(scored.stop_logp_T, logp_TV[:, STOP_IDS].logsumexp(-1), atol=1e-4)


def test_an_unknown_output_head_is_refused_at_construction(tmp_path, monkeypatch):
    folder = build_tiny(tmp_path / "teacher")
    monkeypatch.setattr(Head, "__call__", lambda self, hidden_CH: 2 * self._linear(hidden_CH))
    with pytest.raises(ValueError, match="LlamaForCausalLM changes its logits"):
        TorchScorer(TeacherSettings(model=str(folder)), STOP_IDS)


def test_a_response_beyond_the_context_window_is_a_clear_error(tmp_path):
    folder = build_tiny(tmp_path / "teacher", context_tokens=16)
    scorer = TorchScorer(TeacherSettings(model=str(folder), name="small"), STOP_IDS)
    with pytest.raises(ValueError, match="teacher small: prompt and response have 20 tokens, its context window 16"):
        scorer.score([ScoreRequest(prompt_token_ids=(5,) * 12, token_ids=(6,) * 8)])


def test_stop_ids_outside_the_vocabulary_are_refused(tmp_path):
    folder = build_tiny(tmp_path / "teacher")
    with pytest.raises(ValueError, match=r"stop ids \(5000,\): none is in the teacher's vocabulary"):
        TorchScorer(TeacherSettings(model=str(folder)), (5000,))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_answers_do_not_depend_on_the_batch(tmp_path, architecture):
    folder = build_tiny(tmp_path / "teacher", architecture)
    prompts = [request.prompt_token_ids for request in ragged_requests()]
    options = GenerateOptions(max_new_tokens=12, temperature=0)
    alone = TorchScorer(TeacherSettings(model=str(folder), batch_tokens=16), STOP_IDS).generate(prompts, options)
    together = TorchScorer(TeacherSettings(model=str(folder)), STOP_IDS).generate(prompts, options)
    assert alone == together
    assert all(0 < len(answer) <= 12 for answer in together)


def test_answers_that_go_on_in_rounds_are_those_of_one_go(tmp_path, monkeypatch):
    folder = build_tiny(tmp_path / "teacher")
    scorer = TorchScorer(TeacherSettings(model=str(folder)), STOP_IDS)
    prompts, options = [request.prompt_token_ids for request in ragged_requests()], GenerateOptions(max_new_tokens=100, temperature=0)
    in_rounds = scorer.generate(prompts, options)
    monkeypatch.setattr("opd_governor.actors.teacher.scorers.FIRST_ROUND_TOKENS", 100)
    assert in_rounds == scorer.generate(prompts, options)
    assert {len(answer) for answer in in_rounds} - {100}, "some end before"
    assert max(map(len, in_rounds)) == 100


def test_sampled_answers_follow_seed_and_temperature_and_end_at_a_stop(tmp_path):
    folder = build_tiny(tmp_path / "teacher")
    scorer = TorchScorer(TeacherSettings(model=str(folder)), (1, 3, *range(10, 30)))
    prompts = [(5, 6)] * 64
    drawn = scorer.generate(prompts, GenerateOptions(max_new_tokens=8, seed=1))
    assert drawn == scorer.generate(prompts, GenerateOptions(max_new_tokens=8, seed=1))
    assert drawn != scorer.generate(prompts, GenerateOptions(max_new_tokens=8, seed=2))
    stopped = [answer for answer in drawn if answer[-1] in scorer.stop_ids]
    assert stopped
    assert all(token not in scorer.stop_ids for answer in drawn for token in answer[:-1])
    assert len(set(scorer.generate(prompts, GenerateOptions(max_new_tokens=8, temperature=1e-4)))) == 1


def test_sampling_draws_from_the_plain_distribution_whatever_the_checkpoint_prefers(tmp_path):
    folder = build_tiny(tmp_path / "teacher")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.generation_config.update(do_sample=True, top_k=1, temperature=0.01, repetition_penalty=1.5)
    model.save_pretrained(folder)
    scorer = TorchScorer(TeacherSettings(model=str(folder)), STOP_IDS)
    answers = scorer.generate([(5, 6)] * 2000, GenerateOptions(max_new_tokens=1))
    first_logp_V = torch.log_softmax(model(torch.tensor([[5, 6]])).logits[0, -1].detach(), -1)
    seen_V = torch.bincount(torch.tensor([answer[0] for answer in answers]), minlength=len(first_logp_V)) / 2000
    assert (seen_V - first_logp_V.exp()).abs().max() < 0.05  # 4.5 standard errors at p = .5


def test_beams_find_answers_at_least_as_likely_as_greedy_and_repeat_no_bigram(tmp_path):
    folder = build_tiny(tmp_path / "teacher")
    scorer = TorchScorer(TeacherSettings(model=str(folder)), (84,))
    greedy = scorer.generate([(5, 6, 7)], GenerateOptions(max_new_tokens=6, temperature=0))[0]
    beam = scorer.generate([(5, 6, 7)], GenerateOptions(max_new_tokens=6, beams=8, length_penalty=0.0))[0]
    total = [
        scored.sampled_logp_T.sum()
        for scored in scorer.score([ScoreRequest(prompt_token_ids=(5, 6, 7), token_ids=answer) for answer in (greedy, beam)])
    ]
    assert total[1] >= total[0] - 1e-4
    varied = scorer.generate([(5, 6, 7)], GenerateOptions(max_new_tokens=40, temperature=0, no_repeat_ngram=2))[0]
    bigrams = list(pairwise(varied))
    assert len(bigrams) == len(set(bigrams))


def test_an_answer_is_cut_after_its_first_stop():
    assert cut_at_stop([7, 3, 1, 0], (1, 3)) == (7, 3)
    assert cut_at_stop([7, 8], (1, 3)) == (7, 8)


def test_a_request_needs_a_prompt_and_one_support_row_per_token():
    with pytest.raises(ValueError, match="prompt_token_ids is empty"):
        ScoreRequest(prompt_token_ids=(), token_ids=(1,))
    with pytest.raises(ValueError, match="1 rows for 2 response tokens"):
        ScoreRequest(prompt_token_ids=(1,), token_ids=(1, 2), support_ids_TK=np.zeros((1, 3)))


def test_equal_weight_files_have_equal_digests(tmp_path):
    folders = [build_tiny(tmp_path / str(i), seed=seed) for i, seed in enumerate((1, 1, 2))]
    one, same, other = (digest_weights(str(folder)) for folder in folders)
    assert one == same != other
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no \.safetensors file"):
        digest_weights(str(tmp_path / "empty"))
