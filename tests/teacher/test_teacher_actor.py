"""Real Ray actors with a tiny model: scores arrive, a killed process comes back, answers do not depend on the number of actors."""

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ray

from opd_governor.actors.teacher.actor import RayTeacher, start_teacher
from opd_governor.actors.teacher.attempts import Events
from opd_governor.actors.teacher.pool import Support, TeacherPool
from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer, digest_weights
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import Prompt, Trajectory
from tests.tiny import build_tiny

pytestmark = pytest.mark.integration
STOP_IDS = (1, 3)


@pytest.fixture(scope="module")
def cluster():
    environment = {"env_vars": {"PYTHONPATH": str(Path.cwd()), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}}
    options = {"include_dashboard": False, "log_to_driver": False, "configure_logging": False, "runtime_env": environment}
    ray.init(address="local", num_cpus=2, **options)
    yield
    ray.shutdown()


def trajectories(count: int) -> list[Trajectory]:
    draw = np.random.default_rng(0)
    made = []
    for index in range(count):
        length = int(draw.integers(1, 30))
        made.append(
            Trajectory(
                prompt=Prompt(index=index, token_ids=tuple(draw.integers(4, 80, draw.integers(1, 9)).tolist())),
                token_ids=tuple(draw.integers(0, 80, length).tolist()),
                logprobs_T=np.zeros(length, np.float32),
                finish_reason="stop",
                budget_tokens=64,
                step=0,
                weight_version=0,
                limits_generation=0,
            )
        )
    return made


async def kill(teacher: RayTeacher) -> None:
    os.kill(await teacher.actor.__ray_call__.remote(lambda actor: os.getpid()), signal.SIGKILL)


async def until_back(teacher: RayTeacher) -> None:
    async with asyncio.timeout(60):
        while True:
            with contextlib.suppress(ray.exceptions.RayActorError):
                await teacher.ping()
                return
            await asyncio.sleep(0.1)


async def test_two_actors_score_answer_and_survive_a_kill(cluster, tmp_path):
    folder = str(build_tiny(tmp_path / "teacher", seed=5))
    settings = TeacherSettings(model=folder, name="tiny", num_actors=2, batch_tokens=256)
    handles = start_teacher(settings, STOP_IDS, seed=0)
    restarts = []
    pool = TeacherPool([(settings, handles)], support=Support(top_k=4), events=Events(on_restart=lambda *event: restarts.append(event)))
    await pool.start()
    samples = trajectories(24)

    scores = await pool.score(samples)

    requests = [ScoreRequest(sample.prompt.token_ids, sample.token_ids, top_k=4) for sample in samples]
    for arrived, local in zip(scores, TorchScorer(settings, STOP_IDS).score(requests), strict=True):
        np.testing.assert_allclose(arrived.sampled_logp_T, local.sampled_logp_T, atol=1e-4)
        np.testing.assert_allclose(arrived.support_logp_TK, local.support_logp_TK, atol=1e-4)
    assert await handles[0].actor.weights_digest.remote() == digest_weights(folder)

    golden = await pool.golden([sample.prompt for sample in samples], max_new_tokens=6, temperature=1.0, seed=3)
    alone = TeacherPool([(settings, handles[:1])])
    assert golden == await alone.golden([sample.prompt for sample in samples], max_new_tokens=6, temperature=1.0, seed=3)

    victim = await handles[0].ping()
    await kill(handles[0])
    again = await pool.score(samples)
    assert None not in again
    for before, after in zip(scores, again, strict=True):
        np.testing.assert_allclose(before.sampled_logp_T, after.sampled_logp_T, atol=1e-4)
    await asyncio.wait_for(pool.members[0].live.wait(), 60)
    assert await handles[0].ping() != victim
    assert restarts == [("tiny", "crash")]

    await kill(handles[1])
    await until_back(handles[1])  # nobody asks it for scores meanwhile
    assert None not in await pool.score(samples)
    assert restarts == [("tiny", "crash")] * 2

    await handles[1].restart()
    assert None not in await pool.score(samples)
    await pool.close()
    with pytest.raises(ValueError, match="context window 256"):
        await TeacherPool([(settings, handles[:1])]).score([samples[0], replace(samples[1], token_ids=(5,) * 300)])
