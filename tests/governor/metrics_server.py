"""A run's /metrics as the service serves it, a Prometheus server over it, and a source without either."""

import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread
from typing import Any
from wsgiref.simple_server import WSGIServer

import httpx
import numpy as np
from prometheus_client import start_http_server

from opd_governor.actors.governor.reference import Answer, fit_lengths
from opd_governor.actors.governor.signals import Snapshot
from opd_governor.actors.governor.sources import SourceDownError
from opd_governor.actors.trajectory import FinishReason, Prompt, Trajectory
from opd_governor.services.inputs.golden import LengthReference
from opd_governor.services.record.telemetry import Telemetry


class Run:
    """A run of 192 tokens at most that publishes its metrics like a real one.

    >>> Run("a").step([38] * 30 + [192, 192])   # doctest: +SKIP
    """

    def __init__(self, name: str) -> None:
        self.telemetry = Telemetry(name)
        answers = [Answer(index, 1, "", 30 + index % 20, True) for index in range(200)]
        self.telemetry.use_reference(LengthReference(40, 55, 60, 60, 200, 1.0, model=fit_lengths(answers)))
        self.telemetry.beat()
        self.server: WSGIServer
        self.thread: Thread
        self.port = 0
        self.serve()
        self.url = f"http://127.0.0.1:{self.port}/metrics"

    def serve(self) -> None:
        self.server, self.thread = start_http_server(self.port, addr="127.0.0.1", registry=self.telemetry.registry)
        self.port = self.server.server_port

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def step(self, lengths: list[int], kl_nats: float = 0.4) -> None:
        def rollout(length: int) -> Trajectory:
            reason: FinishReason = "length" if length >= 192 else "stop"
            nothing = np.zeros(length, np.float32)
            return Trajectory(Prompt(0, (1,)), (2,) * length, nothing, reason, 192, 0, 0, 0, loop_onset=3 if length >= 192 else None)

        self.telemetry.record_rollouts([rollout(length) for length in lengths], 192, 192)
        self.telemetry.inc("opd_kl_nats_total", kl_nats * sum(lengths), position="0-192")
        self.telemetry.inc("opd_kl_tokens_total", sum(lengths), position="0-192")
        for name in ("student", "teacher", "tokens"):
            self.telemetry.inc(f"opd_stop_mass_{name}_total", sum(lengths) if name == "tokens" else len(lengths))
        self.telemetry.observe("opd_stop_teacher_logprob", -0.3, form="class")
        self.telemetry.observe("opd_sample_staleness_steps", 1)
        self.telemetry.set("opd_eval_accuracy_ratio", 0.7, decoding="greedy")
        self.telemetry.inc("opd_learner_steps_total")
        self.telemetry.beat()


class Prometheus:
    """A real server that scrapes one run every second; may be stopped and started again over the same data."""

    def __init__(self, directory: Path, target_port: int) -> None:
        self.directory = directory
        config = f"""
global: {{scrape_interval: 1s, scrape_timeout: 1s}}
scrape_configs:
  - job_name: opd
    static_configs: [{{targets: ["127.0.0.1:{target_port}"]}}]
"""
        (directory / "prometheus.yml").write_text(config)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        arguments = [
            "prometheus",
            f"--config.file={self.directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={self.directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{self.port}",
        ]
        with (self.directory / "prometheus.log").open("a") as log:
            self.process = subprocess.Popen(arguments, stdout=log, stderr=log)
        wait_until(self.ready)

    def ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/-/ready", trust_env=False).is_success
        except httpx.TransportError:
            return False

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(timeout=20)


class ScriptedSource:
    """Gives what it was told to, in order; the last one again and again. None: it is down."""

    def __init__(self, *readings: Snapshot | None) -> None:
        self.readings = list(readings)

    def read(self) -> Snapshot:
        reading = self.readings.pop(0) if len(self.readings) > 1 else self.readings[0]
        if reading is None:
            raise SourceDownError("scripted: down")
        return reading


def wait_until(condition: Callable[[], Any], timeout_s: float = 30.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.1)
