"""A stand-in for a run that Prometheus can scrape: the service's own Telemetry and record_batch, fed with made-up batches.

Not a real run: what the main loop sets beside record_batch (limits, decisions, sync, evaluations) is set here by hand in the same
way. `Target` names an address and a run, so the same checks can be pointed at the /metrics of a live one.
"""

import json
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import yaml
from prometheus_client import start_http_server

from opd_governor.actors.governor.reference import Answer, fit_lengths
from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.learner.metrics import POSITION_BUCKETS, BatchMetrics, SignalSums
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.inputs.golden import LengthReference
from opd_governor.services.record.batch import Batch
from opd_governor.services.record.steps import StepTimes, record_batch
from opd_governor.services.record.telemetry import Telemetry

CONFIG = Path(__file__).parents[2] / "deploy/prometheus/prometheus.yml"
CAP_TOKENS = 192


@dataclass(frozen=True, slots=True)
class Target:
    """What a Prometheus scrapes: `address` is host:port of a /metrics."""

    run: str
    address: str

    def announce(self, folder: Path) -> Path:
        """Announce the address as a run does in `service.file_sd_dir`."""
        path = folder / f"opd-{self.run}.json"
        scratch = path.with_suffix(".tmp")
        scratch.write_text(json.dumps([{"targets": [self.address], "labels": {"run": self.run}}]))
        return scratch.replace(path)


class ObservedRun:
    """Publishes metrics like a run and takes a step when told to.

    >>> run = ObservedRun("sums")
    >>> run.step([38, 40, 192])
    >>> run.close()
    """

    def __init__(self, name: str) -> None:
        self.telemetry = Telemetry(name)
        self.server, self.thread = start_http_server(0, addr="127.0.0.1", registry=self.telemetry.registry)
        self.target = Target(name, f"127.0.0.1:{self.server.server_port}")
        self.steps = 0
        answers = [Answer(index, 1, "", 30 + index % 20, complete=True) for index in range(200)]
        self.telemetry.use_reference(LengthReference(40.0, 55.0, 60.0, 60, 200, 1.0, model=fit_lengths(answers)))
        self.change_settings(1)

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def change_settings(self, generation: int) -> None:
        for name in ("opd_config_generation", "opd_config_observed_generation"):
            self.telemetry.set(name, generation)

    def decide(self, action: str, signal: str = "tail_share") -> None:
        self.telemetry.record_limits(LengthLimits(cap_tokens=CAP_TOKENS, golden_weight=0.1, unfinished_quota=0.5), pressure=0.2)
        self.telemetry.record_evidence({"tail": 3.0})
        self.telemetry.set("opd_governor_metrics_age_seconds", 0.5)
        self.telemetry.inc("opd_governor_decisions_total", action=action, signal=signal)

    def step(self, lengths: list[int]) -> None:
        telemetry, limits = self.telemetry, LengthLimits(cap_tokens=CAP_TOKENS)
        self.steps += 1
        trajectories = [_trajectory(length, self.steps) for length in lengths]
        scored = [ScoredRollout(t, _scores(t)) for t in trajectories]
        batch = Batch(self.steps, trajectories, scored, [], 0, 0, limits, CAP_TOKENS, 1, rollout_s=1.0, score_s=0.1)
        report = StepReport(0.3, 1.2, 1e-4, False, self.steps, _metrics(sum(lengths), len(lengths)))
        record_batch(telemetry, batch, report, limits)
        telemetry.beat()
        for phase, seconds in StepTimes(1.0, 0.1, 0.3, 0.1, 0.0, 1.5, 1.0).by_phase().items():
            telemetry.observe("opd_step_seconds", seconds, phase=phase)
        telemetry.observe("opd_weight_sync_seconds", 0.1)
        telemetry.set("opd_weight_sync_gap_nats", 4e-5)
        telemetry.set("opd_scores", 0.8, field="spans_per_token")
        for role in ("learner", "rollout"):
            telemetry.set("opd_weight_version", self.steps, role=role)
        telemetry.inc("opd_teacher_requests_total", teacher="teacher", result="ok")
        telemetry.observe("opd_teacher_request_seconds", 0.2, teacher="teacher")
        for name in ("opd_eval_accuracy_ratio", "opd_eval_length_tokens", "opd_eval_truncation_ratio"):
            telemetry.set(name, 0.7, decoding="greedy")
        self.decide("hold")


def _trajectory(length: int, step: int) -> Trajectory:
    whole = length < CAP_TOKENS
    logprobs_T = np.zeros(length, np.float32)
    onset = None if whole else 90
    return Trajectory(
        Prompt(0, (1,)),
        (2,) * length,
        logprobs_T,
        "stop" if whole else "length",
        CAP_TOKENS,
        step,
        step - 1,
        0,
        loop_onset=onset,
        reward=float(whole),
        observed=((1, (5, 6)),),
        num_turns=2,
        repeated_calls=int(not whole),
    )


def _scores(trajectory: Trajectory) -> TokenScores:
    nothing_T = np.zeros(len(trajectory.token_ids), np.float32)
    return TokenScores("teacher", nothing_T, nothing_T)


def _metrics(num_tokens: int, num_stops: int) -> BatchMetrics:
    tokens_P = np.full(len(POSITION_BUCKETS), num_tokens // len(POSITION_BUCKETS))
    zero: dict[str, Any] = dict.fromkeys(("num_masked_tokens", "num_clipped_tokens", "num_outlier_tokens", "num_golden_tokens"), 0)
    zero |= dict.fromkeys(("reference_kl_nats", "golden_nats"), 0.0)
    return BatchMetrics(
        loss=0.3,
        num_tokens_P=tokens_P,
        kl_nats_P=0.4 * tokens_P,
        entropy_nats=0.5 * num_tokens,
        student_stop_mass=0.02 * num_tokens,
        teacher_stop_mass=0.025 * num_tokens,
        teacher_stop_logp_raw_M=np.full(num_stops, -0.4, np.float32),
        teacher_stop_logp_class_M=np.full(num_stops, -0.3, np.float32),
        teacher_signal=SignalSums(num_tokens, -0.4 * num_tokens, 0.5 * num_tokens, 0.5 / num_tokens),
        reward_signal=SignalSums(num_tokens, 0.0, 0.25 * num_tokens, 0.25 / num_tokens),
        **zero,
    )


class Prometheus:
    """A real server with the deployed configuration; only addresses, folders and intervals are the test's own.

    >>> server = Prometheus(tmp_path)        # doctest: +SKIP
    >>> target.announce(server.targets)      # doctest: +SKIP
    >>> server.query("up")                   # doctest: +SKIP
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.targets = folder, folder / "targets"
        self.targets.mkdir()
        (folder / "prometheus.yml").write_text(yaml.safe_dump(self._config()))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        arguments = [f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
        with (folder / "prometheus.log").open("w") as log:
            self.process = subprocess.Popen(
                ["prometheus", *arguments, f"--web.listen-address=127.0.0.1:{port}"], stdout=log, stderr=subprocess.STDOUT
            )
        self.wait_for(self._is_ready)

    def _config(self) -> dict[str, Any]:
        config: dict[str, Any] = yaml.safe_load(CONFIG.read_text())
        config["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
        config["rule_files"] = [str(CONFIG.parent / name) for name in config["rule_files"]]
        for scrape in config["scrape_configs"]:
            files = [str(self.targets / Path(pattern).name) for pattern in scrape["file_sd_configs"][0]["files"]]
            scrape["file_sd_configs"] = [{"files": files, "refresh_interval": "1s"}]
        return config

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Result of an instant query. Raises what Prometheus says when the expression is wrong."""
        answer = httpx.get(f"{self.url}/api/v1/query", params={"query": expression}, trust_env=False).json()
        assert answer["status"] == "success", (expression, answer)
        return list(answer["data"]["result"])

    def value(self, expression: str) -> float | None:
        """Value of the only series; None without one."""
        result = self.query(expression)
        assert len(result) <= 1, result
        return float(result[0]["value"][1]) if result else None

    def wait_for(self, condition: Any, timeout_s: float = 30.0) -> None:
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert self.process.poll() is None, (self.folder / "prometheus.log").read_text()[-3000:]
            assert time.monotonic() < deadline_s, "waited in vain"
            time.sleep(0.2)

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)
