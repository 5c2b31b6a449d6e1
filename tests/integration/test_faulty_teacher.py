"""Real runs with a real vLLM server as teacher, behind a proxy that spoils answers. They are retried, or masked and counted."""

import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from opd_governor.services.record.rundir import Record, read_records
from opd_governor.services.record.steps import CLOCK_FIELDS
from tests.live_run import JOB, LiveRun
from tests.teacher.faulty_proxy import CURED, Choose, FaultyProxy, cured, faulty_proxy
from tests.teacher.vllm_server import vllm_server

pytestmark = pytest.mark.integration

STEPS, PROMPTS_PER_STEP = 4, 8


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The quickstart's teacher. It takes one request at a time, so its answer does not depend on other requests."""
    log = tmp_path_factory.mktemp("server") / "server.log"
    with vllm_server(JOB.parent / "../sums/teacher", "teacher", log, "--max-num-seqs", "1", "--no-enable-prefix-caching") as url:
        yield url


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs, which share the golden answers."""
    return tmp_path_factory.mktemp("runs")


def run(out: Path, server: str, choose: Choose, staleness: int) -> tuple[FaultyProxy, list[Record]]:
    """A short quickstart through the proxy; what the proxy did, and the run's records."""
    with faulty_proxy(server, choose) as proxy:
        live = LiveRun(
            out, f"learner.total_steps={STEPS}", f"rollout.prompts_per_step={PROMPTS_PER_STEP}", f"rollout.max_staleness={staleness}",
            "data.eval.path=null", "data.golden.num_prompts=16", "teacher.backend=http", "teacher.model=teacher",
            f"teacher.url={proxy.url}", "teacher.timeout_s=16",
        )  # fmt: skip
        assert live.finish() == 0, live.log.read_text()[-3000:]
        return proxy, read_records(out / "metrics.jsonl")


def weights_sha256(out: Path) -> str:
    return hashlib.sha256((out / "final/model.safetensors").read_bytes()).hexdigest()


def without_clock(records: list[Record]) -> list[dict[str, Any]]:
    return [{key: value for key, value in record.items() if key not in CLOCK_FIELDS} for record in records]


def test_faults_that_asking_again_cures_leave_the_weights_of_a_healthy_teacher(server: str, folder: Path) -> None:
    _, healthy = run(folder / "healthy", server, lambda prompt, times: "", staleness=0)
    proxy, records = run(folder / "faulty", server, cured(every=2), staleness=0)
    assert {fault for fault, times in proxy.faults.items() if times} == {"", *CURED}
    assert sum(record["num_unscored"] for record in records) == 0
    assert without_clock(records) == without_clock(healthy)
    assert weights_sha256(folder / "faulty") == weights_sha256(folder / "healthy")


def test_samples_without_a_usable_score_are_masked_and_counted(server: str, folder: Path) -> None:
    def choose(prompt: tuple[int, ...], times: int) -> str:
        """The same fault however often it is asked; none for the scorer's first question, of two tokens, about the vocabulary."""
        return {0: "non-finite", 1: "token count"}.get(zlib.crc32(bytes(prompt)) % 6, "") if len(prompt) > 2 else ""

    out = folder / "lost"
    proxy, records = run(out, server, choose, staleness=1)
    spoiled = {fault: sum(choose(prompt, 0) == fault for prompt in proxy.asked) for fault in ("non-finite", "token count")}
    assert all(spoiled.values()), spoiled
    assert len(records) == STEPS
    assert sum(record["num_rollouts"] for record in records) == STEPS * PROMPTS_PER_STEP
    assert sum(record["num_unscored"] for record in records) == sum(spoiled.values())
    kept = [json.loads(line) for line in (out / "nonfinite.jsonl").read_text().splitlines()]
    assert [sample["source"] for sample in kept] == ["teacher"] * spoiled["non-finite"]
    assert all(np.isfinite(tensor).all() for tensor in load_file(out / "final/model.safetensors").values())
