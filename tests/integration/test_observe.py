"""A governor that only observes changes nothing: the run is the one without a governor, bit for bit."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from opd_governor.services.record.rundir import read_records
from opd_governor.services.record.steps import CLOCK_FIELDS
from tests.live_run import LiveRun

pytestmark = pytest.mark.integration

STRICT = (
    "rollout.max_staleness=0",
    "rollout.prompts_per_step=16",
    "learner.total_steps=8",
    "data.golden.num_prompts=64",
    "data.eval.every_steps=8",
    "data.eval.limit=16",
    # It would act: lengths should be a tenth of the teacher's.
    "governor.length_factor=0.1",
)


def test_a_run_observed_takes_the_steps_of_a_run_without_a_governor(tmp_path: Path) -> None:
    for mode in ("off", "observe"):
        live = LiveRun(tmp_path / mode, *STRICT, f"governor.mode={mode}")
        assert live.finish() == 0, live.log.read_text()[-3000:]
    off, observed = (read_records(tmp_path / mode / "metrics.jsonl") for mode in ("off", "observe"))
    assert max(record["pressure"] for record in observed if record["num_rollouts"]) > 0
    ignored = CLOCK_FIELDS | {"pressure"}
    for one, other in zip(off, observed, strict=True):
        assert {k: v for k, v in one.items() if k not in ignored} == {k: v for k, v in other.items() if k not in ignored}
    assert read_records(tmp_path / "off/samples.jsonl") == read_records(tmp_path / "observe/samples.jsonl")
    weights, others = (load_file(tmp_path / mode / "final/model.safetensors") for mode in ("off", "observe"))
    assert all(weights[name].numpy().tobytes() == others[name].numpy().tobytes() for name in weights)
