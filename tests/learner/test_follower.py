"""The weights of a teacher that follows the student: copied, averaged, kept in checkpoints, taken by a scorer."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from ranks import Ranks
from safetensors.torch import load
from test_learner import LIMITS, STOP_IDS, batch, weights_of
from tiny import Architecture, build_tiny

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.settings import FollowSettings
from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings

RATE = 1e-2


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return build_tiny(root / "student", "llama", seed=1), build_tiny(root / "teacher", "llama", seed=2)


def learner(folder: Path, follow: FollowSettings | None) -> Learner:
    models, settings = LearnerModels(str(folder), follow=follow), LearnerSettings(learning_rate=RATE)
    return Learner(models, settings, ObjectiveSettings(), stop_ids=STOP_IDS, max_new_tokens=32)


def followed(actor: Learner) -> dict[str, torch.Tensor]:
    return load(actor.followed("float32")[1].tobytes())


def test_an_average_is_that_of_the_weights_after_every_step(folders: tuple[Path, Path]) -> None:
    """Against the same sum in float64."""
    actor, rollouts = learner(folders[0], FollowSettings(ema=0.7)), batch(*folders)
    expected = {name: tensor.double() for name, tensor in followed(actor).items()}
    assert actor.followed_version() == 0
    for step in range(1, 6):
        actor.step(rollouts, [], LIMITS, 10.0)
        student = weights_of(actor)
        expected = {name: 0.7 * tensor + 0.3 * student[name].double() for name, tensor in expected.items()}
        assert actor.followed_version() == step
    found = followed(actor)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), expected[name], rtol=0, atol=1e-6)
    assert max(float((tensor - student[name]).abs().max()) for name, tensor in found.items()) > RATE, "it lags behind"


def test_a_copy_is_taken_every_so_many_steps(folders: tuple[Path, Path]) -> None:
    actor, rollouts = learner(folders[0], FollowSettings(every_steps=3)), batch(*folders)
    begun, at = followed(actor), {}
    for step in range(1, 8):
        actor.step(rollouts, [], LIMITS, 10.0)
        at[step] = weights_of(actor)
        held = at[3 * (step // 3)] if step >= 3 else begun
        assert actor.followed_version() == 3 * (step // 3)
        assert all(torch.equal(tensor, held[name]) for name, tensor in followed(actor).items())


@pytest.mark.parametrize("settings", [FollowSettings(ema=0.9), FollowSettings(every_steps=2)])
def test_a_checkpoint_has_it_and_a_resumed_learner_goes_on_bit_for_bit(
    folders: tuple[Path, Path], tmp_path: Path, settings: FollowSettings
) -> None:
    actor, rollouts = learner(folders[0], settings), batch(*folders)
    for _ in range(3):
        actor.step(rollouts, [], LIMITS, 10.0)
    actor.snapshot()
    actor.step(rollouts, [], LIMITS, 10.0)  # a step while it is written changes nothing of it
    actor.save(str(tmp_path))
    assert json.loads((tmp_path / "learner.json").read_text())["followed_version"] == (2 if settings.every_steps else 3)
    resumed = learner(folders[0], settings)
    resumed.restore(str(tmp_path))
    resumed.step(rollouts, [], LIMITS, 10.0)
    mine, theirs = followed(actor), followed(resumed)
    assert resumed.followed_version() == actor.followed_version() == 4
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    actor.step(rollouts, [], LIMITS, 10.0)
    before = load((tmp_path / "teacher.safetensors").read_bytes())
    actor.restore(str(tmp_path), rollback=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in followed(actor).items()), "a rollback takes it back too"


def test_two_ranks_average_alike(folders: tuple[Path, Path], tmp_path: Path) -> None:
    models, settings = LearnerModels(str(folders[0]), follow=FollowSettings(ema=0.7)), LearnerSettings(learning_rate=1e-3)
    terms = {"stop_ids": STOP_IDS, "max_new_tokens": 32}
    one, rollouts, two = Learner(models, settings, ObjectiveSettings(), **terms), batch(*folders), Ranks(2)  # type: ignore[arg-type]
    try:
        two.new(models, settings.model_copy(update={"num_ranks": 2}), ObjectiveSettings(), **terms)
        for _ in range(3):
            one.step(rollouts, [], LIMITS, 10.0)
            two.step(rollouts, [], LIMITS, 10.0)
        (version, data), (_, none) = two.call("followed", "float32")
        two.save(str(tmp_path))
    finally:
        two.close()
    found, expected = load(data.tobytes()), followed(one)
    assert version == 3
    assert len(load(none.tobytes())) == 0
    assert max(float((tensor - found[name]).abs().max()) for name, tensor in expected.items()) < 1e-5
    resumed = learner(folders[0], FollowSettings(ema=0.7))
    resumed.restore(str(tmp_path))
    assert all(torch.equal(tensor, found[name]) for name, tensor in followed(resumed).items())


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3", "gpt2"])
def test_a_scorer_with_these_weights_scores_as_the_student_did(tmp_path: Path, architecture: Architecture) -> None:
    student, teacher = build_tiny(tmp_path / "student", architecture, seed=1), build_tiny(tmp_path / "teacher", architecture, seed=2)
    actor, scorer = learner(student, FollowSettings(every_steps=1)), TorchScorer(TeacherSettings(model=str(student)), STOP_IDS)
    request = ScoreRequest((5, 6, 7), (9, 10, 11, 1))
    (before,) = scorer.score([request])
    actor.step(batch(student, teacher), [], LIMITS, 10.0)
    scorer.follow(actor.followed("float32")[1].tobytes())
    (after,) = scorer.score([request])
    assert before is not None
    assert after is not None
    np.testing.assert_allclose(after.sampled_logp_T, actor.probe([5, 6, 7, 9, 10, 11, 1])[2:], atol=1e-5)
    assert np.abs(after.sampled_logp_T - before.sampled_logp_T).max() > 1e-3


@pytest.mark.parametrize("given", [{}, {"every_steps": 2, "ema": 0.9}])
def test_one_of_the_two_ways_is_named(given: dict[str, float]) -> None:
    with pytest.raises(ValidationError, match="name one of every_steps and ema"):
        FollowSettings.model_validate(given)
