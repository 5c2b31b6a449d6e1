"""One declaration each from outside the package: a signal and an actuator, from policy to dashboard."""

import os
import subprocess
import sys
from pathlib import Path

PARTS = """
from opd_governor.actors.governor.actuators import ACTUATORS, Actuator
from opd_governor.actors.governor.evidence import MeanTest, Observation
from opd_governor.actors.governor.signals import SIGNALS, Signal


def read(growth):
    loss = growth.current.gauge("opd_learner_loss")
    return None if loss is None else Observation(loss, 1.0)


SIGNALS.add("loss")(
    Signal(title="the loss", unit="nats", help="Loss of the last step.", disease="drift",
           test=MeanTest(sign=1.0, slack=1.0, alternatives=(1.0,), floor=0.5), read=read)
)
ACTUATORS.add("entropy_weight")(
    Actuator(title="entropy weight", unit="", help="Weight of an entropy bonus.", tighter="up", bound=0.5, moved_by=("drift",))
)
"""

PROGRAM = """
import json

from deploy.grafana.dashboards import dashboards
from opd_governor.actors.governor.actor import Governor
from opd_governor.actors.governor.actuators import describe
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.snapshot import Snapshot
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.record.telemetry import Telemetry
from tests.governor.metrics_server import ScriptedSource

policy = Policy.model_validate({"bounds": {"entropy_weight": 0.25}})
series = lambda step: Snapshot.of([
    ("opd_rollouts_total", {"finish_reason": reason}, 32.0 * step * (reason == "stop")) for reason in ("stop", "length", "repetition")
] + [("opd_learner_loss", {}, 0.1 if step < 8 else 9.0), ("opd_learner_steps_total", {}, float(step))])
governor = Governor(ScriptedSource(*(series(step) for step in range(1, 14))), policy, LengthLimits(cap_tokens=64))
for step in range(1, 14):
    decision, record = governor.tick(step)
json.dumps(record)
telemetry = Telemetry("x")
telemetry.record_limits(decision.limits, decision.after.pressure)
telemetry.record_evidence({name: reading.evidence for name, reading in decision.readings.items()})
value = lambda name, **labels: telemetry.registry.get_sample_value(name, {"run": "x"} | labels)
assert decision.signal == "loss", decision.reason
assert "the loss" in decision.reason
held = decision.limits.get("entropy_weight")
assert 0.2 < held <= 0.25, held
assert record["limits"]["extra"] == {"entropy_weight": held}
assert value("opd_governor_entropy_weight") == held
assert value("opd_governor_evidence_nats", signal="loss") > 10
assert "opd_governor_entropy_weight" in json.dumps(dashboards()["governor.json"])
assert {"name": "entropy_weight", "title": "entropy weight", "unit": ""} in describe()["actuators"]
assert {"name": "loss", "title": "the loss"} in describe()["signals"]
for wrong in ({"bounds": {"entropy_weight": 7}}, {"bounds": {"entropy": 0.1}}):
    try:
        Policy.model_validate(wrong)
    except ValueError:
        continue
    raise AssertionError(wrong)
"""


def test_a_signal_and_an_actuator_from_a_file_outside_work_from_the_policy_to_the_dashboard(tmp_path: Path) -> None:
    """In a process of its own: the kinds of this one stay as they are."""
    (tmp_path / "parts.py").write_text(PARTS)
    root = Path(__file__).parents[2]
    environment = os.environ | {"OPD_EXTENSIONS": str(tmp_path / "parts.py"), "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", PROGRAM], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
