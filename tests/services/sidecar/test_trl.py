"""The callback inside real TRL, where its environment is built (`make .venv-trl/.installed`): every knob that it names moves."""

import json
import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PYTHON = ROOT / ".venv-trl" / "bin" / "python"


@pytest.mark.integration
@pytest.mark.skipif(not PYTHON.exists(), reason="TRL's own environment is not built")
def test_every_knob_moves_in_every_trainer() -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [PYTHON, "tests/bench/sidecar/trl_knobs.py"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {line["trainer"]: line for line in map(json.loads, filter(lambda line: line.startswith('{"'), done.stdout.splitlines()))}
    assert set(found) == {"DistillationTrainer", "GRPOTrainer", "GOLDTrainer"}
    for line in found.values():
        assert line["longest_before"] > 12 >= (line["longest_after"] or 0)
        assert line["learning_rates"] == [1e-5, 1e-5, 5e-6, 5e-6, 5e-6, 5e-6]
        assert line["ignored"] == []
    assert found["GRPOTrainer"]["turned"]["beta"] == 0.2
    assert found["GOLDTrainer"]["turned"]["lmbda"] == 0.5
