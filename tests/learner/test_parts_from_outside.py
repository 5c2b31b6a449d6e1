"""A loss, a support and a teacher back end that a file outside the package adds work in a real learner step and a real actor's scoring."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_learner import LIMITS, STOP_IDS, batch, learner
from tiny import build_tiny

from opd_governor.actors import extensions
from opd_governor.actors.extensions import use_extensions
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.services.job.load import load_job

MINE = '''
from opd_governor.actors.learner.divergences import LOSSES
from opd_governor.actors.learner.supports import SUPPORTS, Support, listed
from opd_governor.actors.teacher.backends import TEACHER_BACKENDS, Backend


@LOSSES.add("power_distance")
def power_distance(logp_CX, logq_CX, p_CX, settings):
    """Sum of |p - q|^power."""
    return (logp_CX.exp() - logq_CX.exp()).abs().pow(settings.loss_options["power"]).sum(-1)


SUPPORTS.add("teacher_top_2")(Support(lambda at, settings: listed(at, columns=2), teacher_ids=True))


def load(settings, stop_ids, seed):
    from opd_governor.actors.teacher.scorers import TorchScorer

    class Flat(TorchScorer):
        """A teacher whose log-probs are all halved."""

        def score(self, requests):
            scores = super().score(requests)
            for one in scores:
                one.sampled_logp_T[:] /= 2
            return scores

    return Flat(settings, stop_ids)


TEACHER_BACKENDS.add("flat")(Backend(load, beams=True))
'''
JOB = """
name: outside
extensions: [mine.py]
student: {model: student}
teacher: {model: teacher, backend: flat}
data: {prompts: {path: prompts.jsonl}}
objective: {loss: power_distance, loss_options: {power: 2}, support: teacher_top_2, top_k: 8}
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("outside")
    build_tiny(folder / "student", seed=1)
    build_tiny(folder / "teacher", seed=2)
    (folder / "mine.py").write_text(MINE)
    (folder / "job.yaml").write_text(JOB)
    return folder


@pytest.fixture(autouse=True)
def _own_extensions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(extensions.VARIABLE, "")


def test_a_job_takes_them_by_name_and_a_learner_steps_with_them(root: Path) -> None:
    job = load_job(root / "job.yaml")
    assert job.objective.needs.teacher_top_k == 8
    assert job.objective.needs.student_top_k == 0
    rollouts = batch(root / "student", root / "teacher")
    report = learner(root / "student", job.objective).step(rollouts, [], LIMITS, 10.0)
    assert not report.skipped
    assert report.loss > 0
    assert report.grad_norm > 0
    wider = ObjectiveSettings(**job.objective.model_dump() | {"support": "teacher"})
    assert learner(root / "student", wider).step(rollouts, [], LIMITS, 10.0).loss != report.loss
    halved = job.objective.model_copy(update={"loss_options": {"power": 4.0}})
    assert learner(root / "student", halved).step(rollouts, [], LIMITS, 10.0).loss < report.loss


def test_a_loss_with_autograds_own_gradient_has_the_right_one(root: Path) -> None:
    """Against the student's own logits: what its memory is used for afterwards does not reach into the gradient."""
    use_extensions([str(root / "mine.py")])
    from opd_governor.actors.learner.divergences import LOSSES

    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    q = torch.randn(3, 5, dtype=torch.float64).log_softmax(-1)
    settings = ObjectiveSettings(loss="power_distance", support="full", loss_options={"power": 2})
    assert torch.autograd.gradcheck(lambda x: LOSSES["power_distance"](x.log_softmax(-1), q, x.detach().softmax(-1), settings), logits)


def test_the_back_end_scores_in_an_actors_own_process(root: Path) -> None:
    """Another process knows the file by the environment alone, as a Ray actor does."""
    code = (
        "import sys; from opd_governor.actors.teacher.settings import TeacherSettings as T\n"
        "from opd_governor.actors.teacher.actor import TeacherActor\n"
        "from opd_governor.actors.teacher.scorers import ScoreRequest\n"
        f"actor = TeacherActor(T(model=sys.argv[1], backend='flat'), {STOP_IDS}, 0)\n"
        "print(*actor.score([ScoreRequest((5, 6), (7, 8, 1))])[0].sampled_logp_T)"
    )
    environment = os.environ | {extensions.VARIABLE: str(root / "mine.py")}
    run = [sys.executable, "-c", code, str(root / "teacher")]
    done = subprocess.run(run, capture_output=True, text=True, check=True, env=environment)
    (plain,) = TorchScorer(TeacherSettings(model=str(root / "teacher")), STOP_IDS).score([ScoreRequest((5, 6), (7, 8, 1))])
    assert plain is not None
    np.testing.assert_allclose([float(word) for word in done.stdout.split()], plain.sampled_logp_T / 2, rtol=1e-5)
