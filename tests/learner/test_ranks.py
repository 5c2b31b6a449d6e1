"""A learner on two ranks equals one on a single rank: loss, metrics, weights, checkpoints."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from held import save_told
from ranks import Ranks
from safetensors.torch import load, save
from test_learner import STOP_IDS, batch, weights_of
from tiny import build_tiny
from transformers import AutoModelForCausalLM

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt

pytestmark = pytest.mark.integration
"""Processes of their own, joined over gloo."""

TOLERANCE = 1e-5
NUM_STEPS = 4
GOLDEN = [Prompt(0, (5, 6, 7), golden_ids=(9, 9, 10, 1)), Prompt(1, (8,), golden_ids=(11, 1))]
LIMITS = LengthLimits(cap_tokens=32, golden_weight=0.3, reference_kl_weight=0.05, stop_tilt_nats=2.0)

KEY_BIASES = {f"transformer.h.{layer}.attn.c_attn.bias" for layer in range(2)}
"""GPT-2's key biases change no attention: their gradient is rounding noise, which Adam blows up to whole steps on any machine."""

CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "token_mean": ({"reduction": "token_mean"}, {}),
    "sequence_mean": ({"reduction": "sequence_mean"}, {}),
    "constant": ({"reduction": "constant"}, {}),
    "one long micro-batch": ({}, {"micro_batch_tokens": 8192}),
    "teacher's top-k": ({"support": "teacher", "top_k": 8, "loss": "forward_kl"}, {}),
    "teacher's head beside each rank": ({"support": "full", "loss": "jsd"}, {}),
    "two epochs": ({}, {"epochs_per_batch": 2}),
    "frozen embeddings": ({}, {"freeze_embeddings": True}),
    "recomputed activations": ({}, {"gradient_checkpointing": True}),
}


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return build_tiny(root / "student", "llama", seed=1), build_tiny(root / "teacher", "llama", seed=2)


def test_two_ranks_learn_the_same_addition(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    settings = LearnerSettings(learning_rate=1e-3, micro_batch_tokens=48, chunk_tokens=7)
    models = LearnerModels(str(folders[0]), with_reference=True, lora=LoraSettings(rank=4))
    terms = {"stop_ids": STOP_IDS, "max_new_tokens": 32}
    two.new(models, settings.model_copy(update={"num_ranks": 2}), ObjectiveSettings(), **terms)
    one, rollouts = Learner(models, settings, ObjectiveSettings(), **terms), batch(*folders, num=7)
    for _ in range(NUM_STEPS):
        mine, (theirs, _) = one.step(rollouts, GOLDEN, LIMITS, 4.0), two.step(rollouts, GOLDEN, LIMITS, 4.0)
        assert theirs.loss == pytest.approx(mine.loss, abs=TOLERANCE)
        assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=10 * TOLERANCE)
    (_, data), (_, none) = two.call("weights", "float32")
    ours, theirs_ = load(one.weights("float32")[1].tobytes()), load(data.tobytes())
    assert len(load(none.tobytes())) == 0
    assert max(float((tensor - theirs_[name]).abs().max()) for name, tensor in ours.items()) < TOLERANCE
    two.save(str(tmp_path))
    resumed = Learner(models, settings, ObjectiveSettings(), **terms)
    assert resumed.restore(str(tmp_path)) == NUM_STEPS
    assert all(torch.equal(tensor, theirs_[name]) for name, tensor in load(resumed.weights("float32")[1].tobytes()).items())


def arguments(folder: Path, teacher: Path, objective: dict[str, Any], learner: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    settings = LearnerSettings(**{"learning_rate": 1e-4, "micro_batch_tokens": 48, "chunk_tokens": 7} | learner)
    beside = str(teacher) if objective.get("support") == "full" else None
    models = LearnerModels(str(folder), with_reference=True, teacher=beside)
    return (models, settings, ObjectiveSettings(**objective)), {"stop_ids": STOP_IDS, "max_new_tokens": 32}


def pair(two: Ranks, folder: Path, teacher: Path, objective: dict[str, Any] | None = None, **learner: Any) -> Learner:
    """The learner with one rank; `two` holds the same with two."""
    positional, options = arguments(folder, teacher, objective or {}, learner)
    two.new(positional[0], positional[1].model_copy(update={"num_ranks": 2}), positional[2], **options)
    return Learner(*positional, **options)


def gap(one: Learner, two: Ranks) -> float:
    """Largest difference of any weight."""
    (version, first), (other, second) = two.call("weights", "float32")
    assert version == other == one.version()
    mine, theirs = weights_of(one), load(first.tobytes())
    assert mine.keys() == theirs.keys()
    assert len(load(second.tobytes())) == 0
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in mine.items() if name not in KEY_BIASES)


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_learn_what_one_does(two: Ranks, folders: tuple[Path, Path], case: str) -> None:
    objective, settings = CASES[case]
    one = pair(two, *folders, objective, **settings)
    rollouts, before = batch(*folders, num=7, hidden=objective.get("support") == "full"), weights_of(one)
    for _ in range(NUM_STEPS):
        mine = one.step(rollouts, GOLDEN, LIMITS, 4.0)
        theirs, metrics = two.step(rollouts, GOLDEN, LIMITS, 4.0)
        assert theirs.loss == pytest.approx(mine.loss, abs=TOLERANCE)
        assert theirs.grad_norm == pytest.approx(mine.grad_norm, rel=TOLERANCE)
        for field in dataclasses.fields(metrics):
            own, other = getattr(mine.metrics, field.name), getattr(metrics, field.name)
            if field.name.endswith("_M"):  # in no order that means anything
                own, other = np.sort(own), np.sort(other)
            if dataclasses.is_dataclass(own):
                own, other = dataclasses.astuple(own), dataclasses.astuple(other)
            np.testing.assert_allclose(other, own, rtol=1e-4, atol=1e-4, err_msg=field.name)
    assert gap(one, two) < TOLERANCE
    moved = max(float((tensor - before[name]).abs().max()) for name, tensor in weights_of(one).items())
    assert moved > 10 * TOLERANCE


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "qwen3"])
def test_tied_heads_and_other_architectures_are_cut_the_same_way(two: Ranks, tmp_path: Path, architecture: Any) -> None:
    folder, teacher = build_tiny(tmp_path / "student", architecture, seed=1), build_tiny(tmp_path / "teacher", "llama", seed=2)
    one = pair(two, folder, teacher)
    rollouts = batch(folder, teacher)
    for _ in range(NUM_STEPS):
        one.step(rollouts, [], LIMITS, 4.0)
        two.step(rollouts, [], LIMITS, 4.0)
    assert gap(one, two) < TOLERANCE
    np.testing.assert_allclose(two.call("probe", [5, 9, 7, 1])[1], one.probe([5, 9, 7, 1]), atol=1e-4)


def test_one_rollout_still_meets_the_other_rank_in_every_pass(two: Ranks, folders: tuple[Path, Path]) -> None:
    one, rollouts = pair(two, *folders), batch(*folders, num=1)
    one.step(rollouts, [], LIMITS, 4.0)
    two.step(rollouts, [], LIMITS, 4.0)
    assert gap(one, two) < TOLERANCE


def test_a_score_that_is_not_finite_stops_the_update_on_both_ranks_and_both_know_which_it_is(
    two: Ranks, folders: tuple[Path, Path]
) -> None:
    one, rollouts = pair(two, *folders), batch(*folders, num=7)
    rollouts[3].scores.sampled_logp_T[1] = np.nan
    reports = two.call("step", rollouts, [], LIMITS, 4.0)
    assert [report.skipped for report in reports] == [True, True]
    assert [report.suspects for report in reports] == [(3,), (3,)]
    one.step(rollouts, [], LIMITS, 4.0)
    assert gap(one, two) == 0
    assert not two.step(batch(*folders, num=7), [], LIMITS, 4.0)[0].skipped


def test_a_checkpoint_of_either_resumes_with_one_and_with_two(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    rollouts = batch(*folders, num=7)
    one = pair(two, *folders)
    straight = pair(two, *folders)
    for learner in (one, straight):
        learner.step(rollouts, GOLDEN, LIMITS, 4.0)
    two.step(rollouts, GOLDEN, LIMITS, 4.0)
    one.snapshot()
    one.save(str(tmp_path / "one"))
    two.save(str(tmp_path / "two"))
    for _ in range(2):
        straight.step(rollouts, GOLDEN, LIMITS, 4.0)
    for saved in ("one", "two"):
        resumed = pair(two, *folders)
        assert resumed.restore(str(tmp_path / saved)) == 1
        assert two.call("restore", str(tmp_path / saved)) == [1, 1]
        for _ in range(2):
            resumed.step(rollouts, GOLDEN, LIMITS, 4.0)
            two.step(rollouts, GOLDEN, LIMITS, 4.0)
        assert gap(straight, two) < TOLERANCE
        expected = weights_of(straight)
        assert max(float((t - expected[name]).abs().max()) for name, t in weights_of(resumed).items()) < TOLERANCE


def test_two_ranks_checkpoint_resumes_on_four_and_four_s_on_one(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    rollouts = batch(*folders, num=7)
    straight = pair(two, *folders)
    straight.step(rollouts, GOLDEN, LIMITS, 4.0)
    two.step(rollouts, GOLDEN, LIMITS, 4.0)
    two.save(str(tmp_path / "two"))
    assert len(list((tmp_path / "two/optimizer").iterdir())) == 2
    positional, options = arguments(*folders, {}, {"num_ranks": 4})
    four = Ranks(4)
    try:
        four.new(*positional, **options)
        assert four.call("restore", str(tmp_path / "two")) == [1] * 4
        straight.step(rollouts, GOLDEN, LIMITS, 4.0)
        four.step(rollouts, GOLDEN, LIMITS, 4.0)
        four.save(str(tmp_path / "four"))
    finally:
        four.close()
    resumed = pair(two, *folders)
    assert resumed.restore(str(tmp_path / "four")) == 2
    for learner in (straight, resumed):
        learner.step(rollouts, GOLDEN, LIMITS, 4.0)
    expected = weights_of(straight)
    assert max(float((t - expected[name]).abs().max()) for name, t in weights_of(resumed).items() if name not in KEY_BIASES) < TOLERANCE


def test_a_checkpoint_before_the_first_step_has_no_moments_and_resumes(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    rollouts, one = batch(*folders, num=7), pair(two, *folders)
    two.save(str(tmp_path))
    resumed = pair(two, *folders)
    assert two.call("restore", str(tmp_path)) == [0, 0]
    assert resumed.restore(str(tmp_path)) == 0
    for learner in (one, resumed, two):
        learner.step(rollouts, GOLDEN, LIMITS, 4.0)
    assert gap(one, two) < TOLERANCE


def test_a_full_disk_is_an_oserror_on_every_rank_and_the_ranks_go_on(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    pair(two, *folders)
    two.call("snapshot")
    (tmp_path / "optimizer").write_text("no folder can be made here")
    answers = two.call("apply", save_told, str(tmp_path))
    assert all(answer.startswith("OSError") for answer in answers), answers
    assert not two.step(batch(*folders, num=7), [], LIMITS, 4.0)[0].skipped


def test_a_rollback_drops_the_moments_of_both_ranks(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    one, rollouts = pair(two, *folders), batch(*folders, num=7)
    one.snapshot()
    one.save(str(tmp_path))
    for _ in range(2):
        one.step(rollouts, [], LIMITS, 4.0)
        two.step(rollouts, [], LIMITS, 4.0)
    one.restore(str(tmp_path), rollback=True)
    assert two.call("restore", str(tmp_path), rollback=True) == [2, 2]
    one.step(rollouts, [], LIMITS, 4.0)
    two.step(rollouts, [], LIMITS, 4.0)
    assert gap(one, two) < TOLERANCE


def test_two_ranks_with_dropout_go_on_from_a_snapshot_bit_for_bit(two: Ranks, folders: tuple[Path, Path], tmp_path: Path) -> None:
    student = build_tiny(tmp_path / "student", "gpt2", seed=1)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5}))
    rollouts = batch(student, folders[1], num=7)
    pair(two, student, folders[1])

    def go_on() -> bytes:
        for _ in range(2):
            two.step(rollouts, GOLDEN, LIMITS, 4.0)
        return two.call("weights", "float32")[0][1].tobytes()

    go_on()
    two.call("snapshot")
    expected = go_on()
    two.call("save", str(tmp_path / "saved"))
    pair(two, student, folders[1])
    assert two.call("restore", str(tmp_path / "saved")) == [2, 2]
    assert go_on() == expected
    pair(two, student, folders[1])
    (tmp_path / "saved/random.safetensors").write_bytes(save({}))
    two.call("restore", str(tmp_path / "saved"))
    assert go_on() != expected, "the ranks' generators do not matter: the test shows nothing"


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_student_that_two_ranks_write_loads_as_any_other(two: Ranks, tmp_path: Path, architecture: Any) -> None:
    folder = build_tiny(tmp_path / "student", architecture, seed=1)
    one = pair(two, folder, folder)
    one.save_student(str(tmp_path / "one"))
    two.call("save_student", str(tmp_path / "two"), "# card")
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {path.name for path in (tmp_path / "two").iterdir()} == names | {"README.md"}
    mine, theirs = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "two"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
