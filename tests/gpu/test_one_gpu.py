"""One GPU, some minutes: a whole colocated run, weights over ipc, memory against the estimate. Skipped, and said to be, without one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny import ARCHITECTURES, Architecture, build_tiny

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.job.settings import Job
from opd_governor.services.plan.memory import learner_need
from opd_governor.services.plan.shapes import shape_of
from tests.services.plan.test_memory import MODELS, ROW_TOKENS, batch, build

pytestmark = [pytest.mark.integration, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine")]

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_whole_run_shares_one_gpu_and_every_sync_is_sound(architecture: Architecture, tmp_path: Path) -> None:
    student = build_tiny(tmp_path / "student", architecture, seed=1)
    teacher = build_tiny(tmp_path / "teacher", architecture, seed=2)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"{number} + 1 ="}) + "\n" for number in range(64)))
    job = {
        "name": "one-gpu", "student": {"model": str(student)}, "teacher": {"model": str(teacher)},
        "data": {"prompts": {"path": str(prompts)}, "golden": {"num_prompts": 8}},
        "rollout": {"max_new_tokens": 32, "prompts_per_step": 8, "max_num_seqs": 8}, "learner": {"total_steps": 5, "learning_rate": 1e-4},
    }  # fmt: skip
    (tmp_path / "job.yaml").write_text(json.dumps(job))
    command = [sys.executable, "-m", "opd_governor", "run", str(tmp_path / "job.yaml"), "--out", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "plan: colocated on 1 GPUs" in done.stdout or torch.cuda.device_count() > 1
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) >= 5


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_a_step_takes_the_memory_that_was_estimated(model: str, checkpointing: bool, tmp_path: Path) -> None:
    folder = build(tmp_path, MODELS[model])
    settings = LearnerSettings(dtype="bfloat16", gradient_checkpointing=checkpointing, micro_batch_tokens=8192, chunk_tokens=1024)
    learner = Learner(LearnerModels(folder), settings, ObjectiveSettings(), stop_ids=(1,), max_new_tokens=ROW_TOKENS)
    rollouts = batch(2 * settings.micro_batch_tokens // ROW_TOKENS)
    learner.step(rollouts, [], LengthLimits(ROW_TOKENS), 4.0)
    torch.cuda.reset_peak_memory_stats()
    learner.step(rollouts, [], LengthLimits(ROW_TOKENS), 4.0)
    job = Job.model_validate(
        {
            "name": "m", "student": {"model": folder}, "teacher": {"model": folder}, "data": {"prompts": {"path": "none.jsonl"}},
            "learner": settings.model_dump(), "governor": {"actuators": ["lr_scale"]},
        }
    )  # fmt: skip
    assert learner_need(job, shape_of(folder), 1).gpu_bytes == pytest.approx(torch.cuda.max_memory_allocated(), rel=0.15)
