"""HttpScorer against a real vLLM server on loopback, compared with the torch back end."""

import numpy as np
import pytest

from opd_governor.actors.teacher.http_scorer import HttpScorer
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.teacher.vllm_server import vllm_server
from tests.tiny import build_tiny

pytestmark = pytest.mark.integration
STOP_IDS = (1, 3)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """Folder and address of a tiny teacher behind `vllm serve`."""
    folder = build_tiny(tmp_path_factory.mktemp("server") / "teacher", seed=3)
    with vllm_server(folder, "tiny", folder.parent / "server.log") as url:
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
    scorer._vocabulary = 0  # as from a server that keeps to its 20 most likely ids
    for ours, theirs in zip(torch_scorer.score(requests(False)), scorer.score(requests(False)), strict=True):
        np.testing.assert_allclose(ours.sampled_logp_T, theirs.sampled_logp_T, atol=1e-4, rtol=0)
        assert (theirs.stop_logp_T >= ours.stop_logp_T - 1e-4).all()
        np.testing.assert_array_equal(ours.support_ids_TK, theirs.support_ids_TK)
    greedy = GenerateOptions(max_new_tokens=8, temperature=0)
    prompts = [request.prompt_token_ids for request in requests(False)]
    assert scorer.generate(prompts, greedy) == torch_scorer.generate(prompts, greedy)
    with pytest.raises(ValueError, match="refused a request: 400"):
        scorer.score([ScoreRequest((5,) * 200, (6,) * 100)])
    scorer.close()
    misnamed = HttpScorer(TeacherSettings(model="other", backend="http", url=url), STOP_IDS)
    with pytest.raises(ValueError, match="refused a request: 404"):
        misnamed.score(requests(False))
    misnamed.close()
