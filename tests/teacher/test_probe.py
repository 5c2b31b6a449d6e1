"""What a server is asked before a run, and how each thing that cannot work is told in one line."""

import pytest
from test_http_scorer import STOP_IDS, FakeServer, serving

from opd_governor.actors.teacher.probe import ServerError, probe
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.teacher.sglang_server import WINDOW, sglang_server


def settings(url: str, **options) -> TeacherSettings:
    return TeacherSettings(**{"model": "big", "name": "far", "backend": "http", "url": url} | options)


@pytest.mark.parametrize(("max_logprobs", "given_ids", "way"), [(-1, True, "whole vocabulary"), (20, False, "one more token")])
def test_a_vllm_server_says_what_it_offers(max_logprobs, given_ids, way):
    with serving(FakeServer(max_logprobs)) as server:
        report = probe(settings(server.url), STOP_IDS, {"ab": [5, 6], "c": [7]})
        assert (report.models, report.window_tokens, report.given_ids) == (("big",), 99, given_ids)
        assert way in report.kind
        assert report.other_tokens == ("c",)
        assert 0 < report.seconds < 30
        with pytest.raises(ServerError, match=r"teacher far: http://127.* serves big, not small; set teacher.model"):
            probe(settings(server.url, model="small"), STOP_IDS)
        server.faults = ["401"]
        with pytest.raises(ServerError, match=r"refused a probe: 401 no; look at its log, correct teacher.model or the key"):
            probe(settings(server.url), STOP_IDS)
        server.faults = ["ok", "nan"]
        with pytest.raises(ServerError, match=r"scores a probe with .*which are no log-probs"):
            probe(settings(server.url), STOP_IDS)


def test_an_sglang_server_says_what_it_offers():
    with sglang_server() as url:
        report = probe(settings(url), STOP_IDS, {"ab": [1]})
        assert report.window_tokens == WINDOW
        assert "SGLang" in report.kind
        assert report.other_tokens == ()


def test_a_server_that_is_not_there_is_one_line_with_the_remedy():
    with pytest.raises(ServerError, match=r"^http://127.0.0.1:9: no answer: .*; start the server, or correct teacher.url$"):
        probe(settings("http://127.0.0.1:9"))
    with pytest.raises(ServerError, match="needs url"):
        probe(TeacherSettings(model="big", backend="http"))
