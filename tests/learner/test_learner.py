"""The learner as the loop uses it: a step, its report, what it leaves alone, and how it comes back from a checkpoint."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from tiny import ARCHITECTURES, Architecture, build_tiny
from transformers import AutoModelForCausalLM, AutoTokenizer

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.checkpoint import newest_checkpoint, partial_folder, seal_checkpoint
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.teacher.scorers import ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from tests.disks import small_disk

STOP_IDS = (1, 3)
LIMITS = LengthLimits(cap_tokens=32)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return build_tiny(root / "student", "llama", seed=1), build_tiny(root / "teacher", "llama", seed=2)


def learner(folder: Path, objective: ObjectiveSettings | None = None, **settings: object) -> Learner:
    options = LearnerSettings(learning_rate=1e-3, **settings)  # type: ignore[arg-type]
    models = LearnerModels(str(folder), with_reference=True)
    return Learner(models, options, objective or ObjectiveSettings(), stop_ids=STOP_IDS, max_new_tokens=32)


def batch(student: Path, teacher: Path, num: int = 6, hidden: bool = False, **teacher_settings: object) -> list[ScoredRollout]:
    """Random responses scored by the teacher, the student's own log-probs as the behaviour policy."""
    rng = np.random.default_rng(0)
    responses = [(*tuple(int(i) for i in rng.integers(4, 60, rng.integers(3, 20))), 1) for _ in range(num)]
    requests, asked = ([ScoreRequest((5, 6, 7), response, top_k=8, hidden=what) for response in responses] for what in (False, hidden))
    scores = TorchScorer(TeacherSettings(model=str(teacher), **teacher_settings), STOP_IDS).score(asked)  # type: ignore[arg-type]
    own = TorchScorer(TeacherSettings(model=str(student)), STOP_IDS).score(requests)
    return [
        ScoredRollout(Trajectory(Prompt(i, (5, 6, 7)), response, mine.sampled_logp_T, "stop", 32, 1, 0, 0), score)
        for i, (response, score, mine) in enumerate(zip(responses, scores, own, strict=True))
        if score is not None and mine is not None
    ]


def weights_of(actor: Learner) -> dict[str, torch.Tensor]:
    return load(actor.weights("float32")[1].tobytes())


def test_engines_that_have_had_all_weights_get_the_trained_ones_only(folders: tuple[Path, Path]) -> None:
    actor = learner(folders[0], freeze_embeddings=True)
    first, sent = weights_of(actor), load(actor.weights("float32", trained_only=True)[1].tobytes())
    assert set(first) - set(sent) >= {"model.embed_tokens.weight"}
    actor.step(batch(*folders), [], LIMITS, 10.0)
    now, sent = weights_of(actor), load(actor.weights("float32", trained_only=True)[1].tobytes())
    for name, weight in now.items():
        torch.testing.assert_close((first | sent)[name], weight, rtol=0, atol=0)
        assert name in sent or torch.equal(first[name], weight)


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # the compiler's own look at its inputs
def test_compiled_layers_take_the_same_steps(folders: tuple[Path, Path]) -> None:
    rollouts = batch(*folders)
    plain, compiled = (
        [actor.step(rollouts, [], LIMITS, 10.0) for _ in range(3)] for actor in (learner(folders[0]), learner(folders[0], compile=True))
    )
    for ours, theirs in zip(compiled, plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=1e-3)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=1e-3)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("eager_row_tokens", [10, 256])
def test_a_step_in_bfloat16_is_that_of_float32_within_its_rounding(
    tmp_path: Path, architecture: Architecture, eager_row_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows alone and rows that share padded batches, with either attention and with both in one step."""
    monkeypatch.setattr("opd_governor.actors.learner.passes.EAGER_ROW_TOKENS", eager_row_tokens)
    folders = build_tiny(tmp_path / "student", architecture, seed=1), build_tiny(tmp_path / "teacher", architecture, seed=2)
    rollouts, objective = batch(*folders), ObjectiveSettings(support="teacher", top_k=8)
    exact = learner(folders[0], objective).step(rollouts, [], LIMITS, 10.0)
    for micro_batch_tokens in (16, 8192):
        actor = learner(folders[0], objective, dtype="bfloat16", micro_batch_tokens=micro_batch_tokens)
        rounded = actor.step(rollouts, [], LIMITS, 10.0)
        assert rounded.loss == pytest.approx(exact.loss, rel=0.03)
        assert rounded.grad_norm == pytest.approx(exact.grad_norm, rel=0.03)


def test_a_step_reports_and_moves_the_weights(folders: tuple[Path, Path]) -> None:
    actor = learner(folders[0])
    before = weights_of(actor)
    report = actor.step(batch(*folders), [], LIMITS, 10.0)
    assert report.weight_version == 1
    assert not report.skipped
    assert report.metrics.num_tokens_P.sum() == sum(len(r.trajectory.token_ids) for r in batch(*folders))
    assert any(not torch.equal(before[name], tensor) for name, tensor in weights_of(actor).items())
    assert report.learning_rate == 1e-3


@pytest.mark.parametrize("support", ["sampled", "teacher"])
def test_a_student_equal_to_its_teacher_has_rounding_to_learn_at_most(folders: tuple[Path, Path], support: str) -> None:
    report = learner(folders[0], ObjectiveSettings(support=support, top_k=8)).step(batch(folders[0], folders[0]), [], LIMITS, 10.0)  # type: ignore[arg-type]
    assert abs(report.loss) < 1e-5
    assert report.grad_norm < 1e-4  # scores and learner pad differently; Adam's first step scales any gradient up


@pytest.mark.parametrize("support", ["sampled", "teacher", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_without_padding_a_student_equal_to_its_teacher_stays_where_it_is_to_the_last_bit(
    tmp_path: Path, architecture: Architecture, support: str
) -> None:
    folder = build_tiny(tmp_path / architecture, architecture, seed=1)
    actor = Learner(
        LearnerModels(str(folder), with_reference=True, teacher=str(folder) if support == "full" else None),
        LearnerSettings(learning_rate=1e-3, micro_batch_tokens=16),
        ObjectiveSettings(support=support, top_k=8),
        stop_ids=STOP_IDS,
        max_new_tokens=32,
    )
    before = {name: weight.clone() for name, weight in weights_of(actor).items()}
    report = actor.step(batch(folder, folder, hidden=support == "full", batch_tokens=16), [], LIMITS, 10.0)
    assert (report.loss, report.grad_norm) == (0.0, 0.0)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(actor).items())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_over_the_whole_vocabulary_the_teachers_head_makes_of_its_hidden_states_what_the_teacher_says(tmp_path: Path, dtype: str) -> None:
    """Llama with a tied head, Gemma 3 with scales of its own: loss and metrics as those of every id's log-prob asked of the teacher."""
    for architecture in ("llama", "gemma3"):
        folders = (
            build_tiny(tmp_path / f"{architecture}-s", architecture, seed=1),
            build_tiny(tmp_path / f"{architecture}-t", architecture, seed=2),
        )
        by_head = Learner(
            LearnerModels(str(folders[0]), teacher=str(folders[1])),
            LearnerSettings(learning_rate=1e-3),
            ObjectiveSettings(support="full"),
            stop_ids=STOP_IDS,
            max_new_tokens=32,
        )
        golden = [Prompt(0, (5, 6, 7), golden_ids=(9, 9, 10, 1))]
        limits = LengthLimits(32, golden_weight=0.5)
        hidden = batch(*folders, hidden=True, dtype=dtype)
        assert hidden[0].scores.hidden_TH.dtype == (np.float32 if dtype == "float32" else np.uint16)
        report = by_head.step(hidden, golden, limits, 10.0)
        asked = learner(folders[0], ObjectiveSettings(support="teacher", top_k=1000)).step(
            [replace(r, scores=all_ids(r, folders[1])) for r in hidden], golden, limits, 10.0
        )
        tolerance = 1e-4 if dtype == "float32" else 5e-2
        assert report.loss == pytest.approx(asked.loss, rel=tolerance)
        assert report.grad_norm == pytest.approx(asked.grad_norm, rel=10 * tolerance)
        assert report.metrics.kl_nats_P.sum() == pytest.approx(asked.metrics.kl_nats_P.sum(), rel=tolerance)


def all_ids(rollout: ScoredRollout, teacher: Path) -> TokenScores:
    request = ScoreRequest(rollout.trajectory.prompt.token_ids, rollout.trajectory.token_ids, top_k=1000)
    (scores,) = TorchScorer(TeacherSettings(model=str(teacher)), STOP_IDS).score([request])
    assert scores is not None
    return scores


def test_repeated_steps_bring_the_student_nearer_its_teacher(folders: tuple[Path, Path]) -> None:
    actor = learner(folders[0], ObjectiveSettings(support="teacher", top_k=64, loss="forward_kl"))
    rollouts = batch(*folders)
    losses = [actor.step(rollouts, [], LIMITS, 10.0).loss for _ in range(8)]
    assert losses[-1] < 0.9 * losses[0]


def test_the_brake_scales_the_learning_rate_and_a_tuned_rate_replaces_the_jobs(folders: tuple[Path, Path]) -> None:
    actor = learner(folders[0], total_steps=10)
    rollouts = batch(*folders)
    assert actor.step(rollouts, [], LengthLimits(32, lr_scale=0.25), 10.0).learning_rate == pytest.approx(2.5e-4)
    assert actor.step(rollouts, [], LIMITS, 10.0, 5e-4).learning_rate == pytest.approx(5e-4)


def test_golden_answers_are_learned_by_their_weight(folders: tuple[Path, Path]) -> None:
    golden = [Prompt(0, (5, 6, 7), golden_ids=(9, 9, 10, 1))]
    actor = learner(folders[0])
    first = actor.step(batch(*folders), golden, LengthLimits(32, golden_weight=5.0), 10.0).metrics
    for _ in range(6):
        last = actor.step(batch(*folders), golden, LengthLimits(32, golden_weight=5.0), 10.0).metrics
    assert last.golden_nats < first.golden_nats


def test_a_score_that_is_not_finite_never_reaches_the_weights(folders: tuple[Path, Path]) -> None:
    actor = learner(folders[0])
    rollouts = batch(*folders)
    rollouts[0].scores.sampled_logp_T[1] = np.nan
    before = weights_of(actor)
    report = actor.step(rollouts, [], LIMITS, 10.0)
    assert report.skipped
    assert report.suspects == (0,)
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(actor).items())
    assert not actor.step(batch(*folders), [], LIMITS, 10.0).skipped


def test_micro_batches_do_not_change_a_step(folders: tuple[Path, Path]) -> None:
    whole, split = learner(folders[0]), learner(folders[0], micro_batch_tokens=32, chunk_tokens=7)
    first, second = whole.step(batch(*folders), [], LIMITS, 10.0), split.step(batch(*folders), [], LIMITS, 10.0)
    assert first.loss == pytest.approx(second.loss, rel=1e-5)
    assert first.grad_norm == pytest.approx(second.grad_norm, rel=1e-4)


def test_a_restored_learner_goes_on_bit_for_bit(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollouts = learner(folders[0]), batch(*folders)
    actor.step(rollouts, [], LIMITS, 10.0)
    actor.snapshot()
    actor.save(str(tmp_path))
    resumed = learner(folders[0])
    assert resumed.restore(str(tmp_path)) == 1
    actor.step(rollouts, [], LIMITS, 10.0)
    resumed.step(rollouts, [], LIMITS, 10.0)
    theirs = weights_of(resumed)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in weights_of(actor).items())


def test_what_is_saved_is_what_was_there_at_the_snapshot(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollouts = learner(folders[0]), batch(*folders)
    actor.step(rollouts, [], LIMITS, 10.0)
    before = weights_of(actor)
    actor.snapshot()
    actor.step(rollouts, [], LIMITS, 10.0)
    actor.save(str(tmp_path))
    after = weights_of(actor)
    resumed = learner(folders[0])
    assert resumed.restore(str(tmp_path)) == 1
    assert all(torch.equal(before[name], tensor) for name, tensor in weights_of(resumed).items())
    resumed.step(rollouts, [], LIMITS, 10.0)
    assert all(torch.equal(after[name], tensor) for name, tensor in weights_of(resumed).items())


def test_a_snapshot_is_written_as_the_model_itself_would_be(tmp_path: Path) -> None:
    for tied in (True, False):
        actor = learner(build_tiny(tmp_path / f"{tied}", "gpt2", seed=1, tied=tied))
        actor.snapshot()
        actor.save(str(tmp_path / f"saved-{tied}"))
        actor.save_student(str(tmp_path / f"student-{tied}"))
        saved, student = tmp_path / f"saved-{tied}/student", tmp_path / f"student-{tied}"
        assert (saved / "model.safetensors").read_bytes() == (student / "model.safetensors").read_bytes()
        assert not [path for path in saved.iterdir() if path.suffix in (".bin", ".pt", ".pkl")]


def test_what_is_written_is_what_was_trained(tmp_path: Path) -> None:
    student = build_tiny(tmp_path / "base", eos=1)
    tokenizer = build_tiny(tmp_path / "chat", chat=True, eos=3)
    models = LearnerModels(str(student), tokenizer=str(tokenizer))
    actor = Learner(models, LearnerSettings(), ObjectiveSettings(), stop_ids=(1, 3, 5000), max_new_tokens=16)
    actor.save_student(str(tmp_path / "final"), "# card", "bfloat16")
    final = AutoModelForCausalLM.from_pretrained(tmp_path / "final")
    assert final.dtype == torch.bfloat16
    assert final.generation_config.eos_token_id == [1, 3], "both ends that it was trained on, none that it cannot write"
    assert "<|im_end|>" in AutoTokenizer.from_pretrained(tmp_path / "final").chat_template
    size = (tmp_path / "base/model.safetensors").stat().st_size
    assert (tmp_path / "final/model.safetensors").stat().st_size < 0.6 * size


def test_a_source_whose_sampling_defaults_contradict_each_other_is_written(tmp_path: Path) -> None:
    """Many published models say do_sample: false beside a temperature: the library loads them and refuses to save them."""
    student = build_tiny(tmp_path / "student")
    defaults = {"do_sample": False, "temperature": 0.6, "top_p": 0.9, "eos_token_id": 1}
    (student / "generation_config.json").write_text(json.dumps(defaults))
    learner(student).save_student(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final/generation_config.json").read_text()) == defaults | {"eos_token_id": list(STOP_IDS)}


def test_dropout_goes_on_where_it_was(folders: tuple[Path, Path], tmp_path: Path) -> None:
    student = build_tiny(tmp_path / "student", "gpt2", seed=1)
    config = json.loads((student / "config.json").read_text())
    (student / "config.json").write_text(json.dumps(config | {"resid_pdrop": 0.5}))
    rollouts = batch(student, folders[1])

    def losses(actor: Learner, num: int) -> list[float]:
        return [actor.step(rollouts, [], LIMITS, 10.0).loss for _ in range(num)]

    actor = learner(student)
    losses(actor, 2)
    actor.snapshot()
    actor.save(str(tmp_path / "saved"))
    expected = losses(actor, 2)
    resumed = learner(student)
    resumed.restore(str(tmp_path / "saved"))
    assert losses(resumed, 2) == expected
    resumed.restore(str(tmp_path / "saved"))
    torch.manual_seed(1)
    assert losses(resumed, 1) != expected[:1]


def test_each_file_of_a_real_checkpoint_torn_or_altered_is_refused_by_name_and_the_one_before_is_used(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    actor = learner(folders[0])
    for step in (1, 2):
        actor.step(batch(*folders), [], LIMITS, 10.0)
        actor.snapshot()
        actor.save(str(partial_folder(tmp_path, step)))
        seal_checkpoint(tmp_path, step, {"step": step, "healthy": True})
    names = [path.relative_to(tmp_path / "step-2") for path in (tmp_path / "step-2").rglob("*") if path.is_file()]
    assert {"student/model.safetensors", "optimizer.safetensors", "random.safetensors", "learner.json"} <= {str(name) for name in names}
    rng = np.random.default_rng(0)
    for name in names:
        path, data = tmp_path / "step-2" / name, (tmp_path / "step-2" / name).read_bytes()
        for at in (0, len(data) - 1, int(rng.integers(len(data)))):
            for torn in (data[:at], data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]):
                path.write_bytes(torn)
                folder, _, (line,) = newest_checkpoint(tmp_path)
                assert folder == tmp_path / "step-1", (name, at)
                assert name.name in line
        path.write_bytes(data)
    assert newest_checkpoint(tmp_path)[0] == tmp_path / "step-2"


def test_a_full_disk_is_an_os_error_at_whatever_file_it_fills_up(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor = learner(folders[0])
    actor.step(batch(*folders), [], LIMITS, 10.0)
    actor.snapshot()
    actor.save(str(tmp_path / "whole"))
    sizes = [path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file()]
    with small_disk(tmp_path / "disk", sum(sizes) // 1024 + 4 * len(sizes)) as disk:
        for index, filled_kib in enumerate(range(0, sum(sizes) // 1024, 48)):
            (disk / "filler").write_bytes(bytes(filled_kib * 1024))
            actor.snapshot()
            if filled_kib:
                with pytest.raises(OSError, match=r"No space left|os error 28"):
                    actor.save(str(disk / f"{index}"))
            shutil.rmtree(disk / f"{index}", ignore_errors=True)
        (disk / "filler").unlink()
        actor.snapshot()
        actor.save(str(disk / "again"))


def test_a_rollback_takes_the_weights_and_keeps_counting(folders: tuple[Path, Path], tmp_path: Path) -> None:
    actor, rollouts = learner(folders[0]), batch(*folders)
    saved = weights_of(actor)
    actor.snapshot()
    actor.save(str(tmp_path))
    for _ in range(3):
        actor.step(rollouts, [], LIMITS, 10.0)
    assert actor.restore(str(tmp_path), rollback=True) == 3
    theirs = weights_of(actor)
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in saved.items())


def test_the_output_head_travels_on_its_own_even_when_tied(tmp_path: Path) -> None:
    tensors = weights_of(learner(build_tiny(tmp_path / "tied", "gpt2", seed=1)))
    assert torch.equal(tensors["lm_head.weight"], tensors["transformer.wte.weight"])
