"""A run without Ray: the same methods as the main loop's view of itself, with records that look like a run's."""

import math
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge

from opd_governor.actors.governor.actuators import describe
from opd_governor.services.job.settings import Job


def make_job(**changes: Any) -> Job:
    """The smallest valid job."""
    job = {"name": "sums", "student": {"model": "student"}, "teacher": {"model": "teacher"}, "data": {"prompts": {"path": "prompts.jsonl"}}}
    return Job.model_validate(job | changes)


def make_step(step: int) -> dict[str, Any]:
    """A step record: lengths inflate slowly, one value is not a number."""
    return {
        "step": step,
        "time": 1.76e9 + step,
        "num_rollouts": 32,
        "length_mean": 60.0 + step,
        "length_p95": 90.0 + 2 * step,
        "length_max": 128 + step,
        "truncation": min(1.0, step / 200),
        "loops": min(1.0, step / 300),
        "kl_nats": 1.0 / (1 + step),
        "entropy_nats": 2.0,
        "loss": math.nan if step == 3 else 1.0 / (1 + step),
        "grad_norm": 0.5,
        "cap_tokens": 256 - step,
        "pressure": min(1.0, step / 100),
        "golden_weight": 0.1,
        "lr_scale": 1.0 - min(0.5, step / 100),
        "reference_kl_weight": 0.01,
        "stop_tilt_nats": step / 50,
        "admission_quota": 1.0,
        "loop_tail_weight": 1.0 - min(1.0, step / 100),
        "tokens_per_s": 1234.5,
        "staleness_mean": 0.5,
        "weight_version": step,
        "limits_generation": step // 10,
        "config_generation": 1,
        "step_s": 0.4,
        "kl_by_position": {"0-15": 0.5 / (1 + step), "16-63": 1.0 / (1 + step), "64-255": 2.0 / (1 + step)},
        "eval_accuracy": 0.4 + step / 100 if step % 10 == 0 else None,
    }


READINGS = {
    "tail": {"value": 0.051, "bound": 0.032, "evidence": 12.0, "threshold": 10.5, "pressure": 0.3},
    "loops": {"value": 0.02, "bound": 0.025, "evidence": 0.0, "threshold": 10.5, "pressure": 0.0},
}


class FakeRun:
    """Holds `num_steps` finished steps; verbs are remembered in `requested`."""

    def __init__(self, num_steps: int = 5) -> None:
        self.records = [make_step(step) for step in range(1, num_steps + 1)]
        self.phase = "running"
        self.waiting_for: str | None = None
        self.requested: list[str] = []
        self.healthy_checkpoint = True
        self.registry = CollectorRegistry()
        self.restarts = Counter("opd_actor_restarts_total", "Actors restarted.", ["run", "role"], registry=self.registry)
        self._cap = Gauge("opd_governor_cap_tokens", "The cap in force.", ["run"], registry=self.registry)
        self.show_in_metrics()

    def show_in_metrics(self) -> None:
        """Set the metrics to the values of the newest record."""
        self._cap.labels("sums").set(self.records[-1]["cap_tokens"])

    def status(self) -> dict[str, Any]:
        return {
            "name": "sums",
            "phase": self.phase,
            "step": len(self.records),
            "total_steps": 100,
            "weight_version": len(self.records),
            "limits": {"cap_tokens": 256 - len(self.records), "golden_weight": 0.1, "generation": 0},
            "links": {"metrics": "/metrics"},
            "waiting_for": self.waiting_for,
            "events": [{"time": 1.76e9, "step": 5, "text": "restarted: learner (crash)"}],
        }

    def steps(self, after: int) -> list[dict[str, Any]]:
        return [record for record in self.records if record["step"] > after]

    def samples(self) -> list[dict[str, Any]]:
        return [
            {
                "step": len(self.records),
                "prompt": "3 + 4 + 5 =",
                "response": "3 + 4 = 7, 7 + 5 = 12",
                "finish_reason": "stop",
                "length_tokens": 22,
                "loop_onset_char": None,
            },
            {
                "step": len(self.records),
                "prompt": "1 + 2 =",
                "response": "1 + 2 = 3, so 3, so 3, so 3",
                "finish_reason": "length",
                "length_tokens": 28,
                "loop_onset_char": 11,
            },
        ]

    def governor(self) -> dict[str, Any]:
        return {
            "mode": "enforce",
            "pressure": 0.25,
            "signals": {"truncation": math.nan, "expected_cut_rate": 0.01},
            "readings": READINGS,
            "limits": self.status()["limits"],
            "declared": describe(),
        }

    def decisions(self, after: int) -> list[dict[str, Any]]:
        """Holds for ten steps, then tightens at every second one."""
        steps = [step for step in range(1, len(self.records) + 1) if step > after and (step <= 10 or step % 2 == 0)]
        hold = {"action": "hold", "signal": "", "reason": "all signals within their targets: pressure stays 0.00"}
        return [
            {"step": step} | hold
            if step <= 10
            else {"step": step, "action": "tighten", "signal": "length", "reason": f"p95 is {90 + 2 * step} tokens: pressure up"}
            for step in steps
        ]

    def request(self, verb: str) -> dict[str, Any]:
        if verb == "rollback" and not self.healthy_checkpoint:
            raise ValueError("there is no healthy checkpoint yet")
        self.requested.append(verb)
        return {"requested": verb, "phase": self.phase}
