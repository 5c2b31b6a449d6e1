"""The OpenAPI document is true: schemathesis in stateful mode finds no difference to a real server."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opd_governor.services.control.app import create_app
from opd_governor.services.control.server import ControlServer, bind
from opd_governor.services.job.tunables import ConfigStore
from tests.services.control.fake_run import FakeRun, make_job

NUM_EXAMPLES = int(os.environ.get("OPD_SCHEMATHESIS_EXAMPLES", "10"))
# Per operation and phase: 10 keep `make check` short, 150 make over 2000 cases.

CONFIG = """
[checks]
not_a_server_error.expected-statuses = ["2xx", "4xx"]

[[operations]]
include-name = "PATCH /v1/config"
# Schema-valid, and yet refused where the ETag is not the present one or two fields contradict each other.
checks.positive_data_acceptance.expected-statuses = ["2xx", "412", "422"]
checks.negative_data_rejection.expected-statuses = ["400", "401", "412", "413", "415", "422", "428"]
checks.missing_required_header.expected-statuses = ["401", "428"]
"""


@pytest.mark.timeout(1800)
def test_schemathesis_finds_nothing(tmp_path: Path):
    run, store = FakeRun(), ConfigStore(make_job(), tmp_path / "config.jsonl")
    server = ControlServer(create_app(run, store, run.registry, "secret"), bind("127.0.0.1", 0, "secret"))
    server.start()
    (tmp_path / "schemathesis.toml").write_text(CONFIG)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "run", f"{server.url}/openapi.json"]
    options = ["-H", "Authorization: Bearer secret", "--checks", "all", "--max-examples", str(NUM_EXAMPLES), "--seed", "1", "--no-color"]
    environment = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    done = subprocess.run(command + options, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    server.stop()
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"Stateful \(in", done.stdout), done.stdout
    print(re.search(r"(\d+) generated", done.stdout)[0], "cases")
