"""Where the service listens, and the token that opens it."""

import logging
import stat
from pathlib import Path

import httpx
import pytest

from opd_governor.services.control.app import create_app
from opd_governor.services.control.server import ControlServer, ServiceError, bind, load_or_create_token
from opd_governor.services.job.tunables import ConfigStore
from tests.services.control.fake_run import FakeRun, make_job


@pytest.fixture
def make_server(tmp_path: Path):
    run, store = FakeRun(), ConfigStore(make_job(), tmp_path / "config.jsonl")
    servers: list[ControlServer] = []

    def make(port: int = 0, token: str | None = "secret") -> ControlServer:
        servers.append(ControlServer(create_app(run, store, run.registry, token), bind("127.0.0.1", port, token)))
        servers[-1].start()
        return servers[-1]

    yield make
    for server in servers:
        server.stop()


def test_port_zero_picks_a_free_port_and_the_server_answers_there(make_server):
    server = make_server()
    assert server.url == f"http://127.0.0.1:{server.port}"
    assert httpx.get(f"{server.url}/healthz", trust_env=False).json() == {"status": "ok"}


def test_a_stopped_server_frees_its_port_at_once(make_server):
    server = make_server()
    with httpx.Client(trust_env=False) as client:  # its connection stays open
        client.get(f"{server.url}/healthz")
        server.stop()
        server.stop()
    again = make_server(port=server.port)
    assert httpx.get(f"{again.url}/healthz", trust_env=False).status_code == 200


def test_a_service_whose_thread_ended_serves_again_on_the_same_port(make_server):
    server = make_server()
    assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200
    server._server.should_exit = True  # what is left of a thread that died: nothing serves, the port is still ours
    server._thread.join()
    assert not server.alive
    server.start()
    assert server.alive
    assert httpx.get(f"{server.url}/healthz", trust_env=False).status_code == 200


def test_a_port_in_use_is_one_clear_line(make_server):
    taken = make_server().port
    with pytest.raises(ServiceError, match=rf"^service.port: 127.0.0.1:{taken} is in use; choose another port, or 0 for a free one$"):
        bind("127.0.0.1", taken, "secret")


def test_other_addresses_than_loopback_need_a_token():
    with pytest.raises(ServiceError, match=r"^service.host: 0.0.0.0 can be reached from other machines and there is no token"):
        bind("0.0.0.0", 0, None)
    bind("localhost", 0, None).close()


def test_an_address_of_another_machine_is_one_clear_line():
    with pytest.raises(ServiceError, match=r"^service.host: cannot listen on 192.0.2.1:80"):
        bind("192.0.2.1", 80, "secret")


def test_the_token_file_is_made_once_for_its_owner_only(tmp_path, monkeypatch):
    monkeypatch.delenv("OPD_TOKEN", raising=False)
    token = load_or_create_token(tmp_path)
    assert len(token) >= 32
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600
    (tmp_path / "token").chmod(0o644)
    assert load_or_create_token(tmp_path) == token
    assert stat.S_IMODE((tmp_path / "token").stat().st_mode) == 0o600


def test_an_empty_token_file_does_not_open_the_service(tmp_path, monkeypatch):
    monkeypatch.delenv("OPD_TOKEN", raising=False)
    (tmp_path / "token").write_text("\n")
    with pytest.raises(ServiceError, match="holds no token"):
        load_or_create_token(tmp_path)


def test_opd_token_goes_first_and_leaves_no_file(tmp_path, monkeypatch):
    monkeypatch.setenv("OPD_TOKEN", "from-outside\n")
    assert load_or_create_token(tmp_path) == "from-outside"
    assert not (tmp_path / "token").exists()


def test_the_token_stands_in_no_log_and_no_answer(make_server, caplog):
    caplog.set_level(logging.DEBUG)
    server = make_server(token="very-secret")
    headers = {"authorization": "Bearer very-secret"}
    with httpx.Client(base_url=server.url, headers=headers, trust_env=False) as client:
        answers = [
            client.get(path).text for path in ("/v1/run", "/v1/config", "/v1/config/history", "/metrics", "/openapi.json", "/nothing")
        ]
    assert "very-secret" not in caplog.text + "".join(answers)
