"""The HTTP back end on a server that answers as SGLang does, directly and through a proxy that spoils answers."""

import numpy as np
import pytest
import torch

from opd_governor.actors.teacher.http_scorer import HttpScorer
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest
from opd_governor.actors.teacher.scoring import score_positions
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.teacher.faulty_proxy import CURED, cured, faulty_proxy
from tests.teacher.sglang_server import LOGP_VV, VOCABULARY, WINDOW, sglang_server

STOP_IDS = (1, 3)


@pytest.fixture(scope="module")
def url():
    with sglang_server() as address:
        yield address


def requests(num: int, top_k: int) -> list[ScoreRequest]:
    draw = np.random.default_rng(0)

    def ids(length):
        return tuple(draw.integers(0, VOCABULARY, length).tolist())

    return [ScoreRequest(ids(draw.integers(1, 6)), ids(draw.integers(1, 20)), top_k=top_k) for _ in range(num)]


def check(scored, sent: ScoreRequest) -> None:
    before = torch.tensor([sent.prompt_token_ids[-1], *sent.token_ids[:-1]])
    expected = score_positions(LOGP_VV[before], lambda x: x, torch.tensor(sent.token_ids), STOP_IDS, top_k=sent.top_k)
    np.testing.assert_allclose(scored.sampled_logp_T, expected.sampled_logp_N, atol=1e-5)
    np.testing.assert_allclose(scored.stop_logp_T, expected.stop_logp_N, atol=1e-5)
    if sent.top_k:
        np.testing.assert_array_equal(scored.support_ids_TK, expected.support_ids_NK)
        np.testing.assert_allclose(scored.support_logp_TK, expected.support_logp_NK, atol=1e-5)


def settings(url: str, **options) -> TeacherSettings:
    return TeacherSettings(model="big", backend="http", url=url, **options)


@pytest.mark.parametrize("top_k", [0, 4])
def test_scores_are_the_models_own_with_the_exact_stop_class(url, top_k):
    scorer, sent = HttpScorer(settings(url), STOP_IDS), requests(8, top_k)
    for scored, one in zip(scorer.score(sent), sent, strict=True):
        check(scored, one)
    assert "SGLang" in scorer.server(0.0).way
    assert scorer.generate([(5, 6)], GenerateOptions(max_new_tokens=3)) == [(7, 3)]
    scorer.close()


def test_faults_are_cured_and_a_response_beyond_the_window_is_its_own_error(url):
    too_long = ScoreRequest((5,), (6,) * WINDOW)
    with faulty_proxy(url, cured(2)) as proxy:
        scorer = HttpScorer(settings(proxy.url, timeout_s=4.0, server="sglang"), STOP_IDS)
        sent = requests(2 * len(CURED), 2)
        scores = scorer.score([too_long, *sent])
        assert scores[0] is None
        for scored, one in zip(scores[1:], sent, strict=True):
            check(scored, one)
        assert {fault for fault, count in proxy.faults.items() if count} >= {"500", "429", "dropped", "truncated"}
        scorer.close()


def test_ids_of_the_students_choice_are_refused_in_one_line(url):
    scorer = HttpScorer(settings(url), STOP_IDS)
    with pytest.raises(ValueError, match=r"its server scores only its own most likely ids; set objective.support"):
        scorer.score([ScoreRequest((5,), (6, 7), support_ids_TK=np.zeros((2, 1), np.int32))])
    scorer.close()
