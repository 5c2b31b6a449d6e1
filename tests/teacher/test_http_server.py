"""HttpScorer against a real vLLM server on loopback, compared with the torch back end."""

import time

import numpy as np
import pytest

from opd_governor.actors.teacher.http_client import Client, RefusedError
from opd_governor.actors.teacher.http_scorer import HttpScorer
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, TorchScorer
from opd_governor.actors.teacher.servers import ById, NextToken, find_server
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.teacher.faulty_proxy import CURED, cured, faulty_proxy
from tests.teacher.vllm_server import vllm_server
from tests.tiny import CHARACTERS, SPECIAL, build_tiny

pytestmark = pytest.mark.integration
STOP_IDS = (1, 3)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder and address of a tiny teacher behind `vllm serve`."""
    folder = build_tiny(tmp_path_factory.mktemp("server") / "teacher", seed=3)
    with vllm_server(folder, "tiny", folder.parent / "server.log", "--enable-scale-out") as url:
        yield folder, url


def requests(support: bool) -> list[ScoreRequest]:
    draw = np.random.default_rng(0)
    made = []
    for prompt_length, length in [(3, 5), (11, 1), (1, 17), (40, 30)]:
        prompt, response = (tuple(draw.integers(4, 85, n).tolist()) for n in (prompt_length, length))
        given = draw.integers(0, 85, (length, 2)).astype(np.int32) if support else None
        made.append(ScoreRequest(prompt, response, support_ids_TK=given, top_k=4))
    return made


def test_a_real_server_agrees_with_the_torch_back_end(server):
    folder, url = server
    torch_scorer = TorchScorer(TeacherSettings(model=str(folder)), STOP_IDS)
    scorer = HttpScorer(TeacherSettings(model="tiny", backend="http", url=url), STOP_IDS)
    for ours, theirs in zip(torch_scorer.score(requests(True)), scorer.score(requests(True)), strict=True):
        np.testing.assert_allclose(ours.sampled_logp_T, theirs.sampled_logp_T, atol=1e-4, rtol=0)
        np.testing.assert_allclose(ours.stop_logp_T, theirs.stop_logp_T, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(ours.support_ids_TK, theirs.support_ids_TK)
        np.testing.assert_allclose(ours.support_logp_TK, theirs.support_logp_TK, atol=1e-4, rtol=0)
    scorer._server = NextToken(STOP_IDS)  # as from a server that keeps to its 20 most likely ids
    for ours, theirs in zip(torch_scorer.score(requests(False)), scorer.score(requests(False)), strict=True):
        np.testing.assert_allclose(ours.sampled_logp_T, theirs.sampled_logp_T, atol=1e-4, rtol=0)
        np.testing.assert_allclose(ours.stop_logp_T, theirs.stop_logp_T, atol=1e-4, rtol=0)
        np.testing.assert_array_equal(ours.support_ids_TK, theirs.support_ids_TK)
    greedy = GenerateOptions(max_new_tokens=8, temperature=0)
    prompts = [request.prompt_token_ids for request in requests(False)]
    assert scorer.generate(prompts, greedy) == torch_scorer.generate(prompts, greedy)
    too_long, (right, *_) = ScoreRequest((5,) * 200, (6,) * 100), requests(False)
    none, scored = scorer.score([too_long, right])
    assert none is None, "beyond the server's window: that sample's error"
    assert scored is not None
    scorer.close()
    misnamed = HttpScorer(TeacherSettings(model="other", backend="http", url=url), STOP_IDS)
    with pytest.raises(ValueError, match="refused a request: 404"):
        misnamed.score(requests(False))
    misnamed.close()


def test_the_way_by_id_is_tried_and_another_taken_where_the_server_cannot(server, monkeypatch):
    """On a CPU vLLM's runner refuses ids of prompt positions, in words that are no fault of the job's."""
    _, url = server
    client = Client(TeacherSettings(model="tiny", backend="http", url=url))
    deadline = time.monotonic() + 60
    with pytest.raises(RefusedError, match="requires the V2 model runner"):
        ById(STOP_IDS).try_out(client, deadline)
    monkeypatch.setattr("opd_governor.actors.teacher.servers.MAX_FULL_VOCABULARY", 10)
    assert isinstance(find_server(client, STOP_IDS, deadline), NextToken)
    client.close()


def test_through_a_proxy_that_spoils_answers_the_scores_are_the_same(server):
    folder, url = server
    torch_scorer = TorchScorer(TeacherSettings(model=str(folder)), STOP_IDS)
    draw = np.random.default_rng(1)
    sent = [ScoreRequest((5, 6), tuple(draw.integers(4, 85, 9).tolist())) for _ in range(2 * len(CURED))]
    with faulty_proxy(url, cured(2)) as proxy:
        scorer = HttpScorer(TeacherSettings(model="tiny", backend="http", url=proxy.url, timeout_s=20.0), STOP_IDS)
        scorer._server = NextToken(STOP_IDS)
        for ours, theirs in zip(torch_scorer.score(sent), scorer.score(sent), strict=True):
            np.testing.assert_allclose(ours.sampled_logp_T, theirs.sampled_logp_T, atol=1e-4, rtol=0)
            np.testing.assert_allclose(ours.stop_logp_T, theirs.stop_logp_T, atol=1e-4, rtol=0)
        scorer.close()
        assert sum(proxy.faults[fault] for fault in CURED) == len(CURED)


def test_the_stop_mass_is_exact_at_a_large_vocabulary_too(tmp_path):
    """49,152 ids, two of them stops, mostly far from the 20 likeliest: what a bound on them would only guess."""
    wide = build_tiny(tmp_path / "wide", seed=4, extra=tuple(f"<{i}>" for i in range(49_152 - len(SPECIAL) - len(CHARACTERS))))
    draw = np.random.default_rng(2)
    sent = [ScoreRequest((5, 6, 7), tuple(draw.integers(0, 49_152, n).tolist()), top_k=4) for n in (1, 12, 40)]
    torch_scorer = TorchScorer(TeacherSettings(model=str(wide)), STOP_IDS)
    assert torch_scorer.lm.vocabulary == 49_152
    with vllm_server(wide, "wide", tmp_path / "server.log") as url:
        scorer = HttpScorer(TeacherSettings(model="wide", backend="http", url=url), STOP_IDS)
        for ours, theirs in zip(torch_scorer.score(sent), scorer.score(sent), strict=True):
            np.testing.assert_allclose(np.exp(ours.stop_logp_T), np.exp(theirs.stop_logp_T), atol=1e-4, rtol=0)
            np.testing.assert_allclose(ours.stop_logp_T, theirs.stop_logp_T, atol=1e-3, rtol=0)
            np.testing.assert_allclose(ours.sampled_logp_T, theirs.sampled_logp_T, atol=1e-3, rtol=0)
            np.testing.assert_array_equal(ours.support_ids_TK, theirs.support_ids_TK)
        assert isinstance(scorer._server, NextToken)
        scorer.close()
