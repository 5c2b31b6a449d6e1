"""Support full: the learner reads the teacher's output head alone, and keeps the teacher's hidden states as they came."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_learner import batch
from tiny import Architecture, build_tiny
from transformers import AutoModelForCausalLM

from opd_governor.actors import causal_lm
from opd_governor.actors.causal_lm import CausalLM, load_head
from opd_governor.actors.learner.batching import build_micro_batches
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, ScoredRollout, TokenScores

HEADS: list[tuple[Architecture, bool | None]] = [("llama", False), ("llama", True), ("qwen3", None), ("gemma3", None), ("gpt2", None)]


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the tensors that are read from files, one at a time."""
    names: list[str] = []

    class Opened:
        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = causal_lm_open(*args, **options)

        def __enter__(self) -> "Opened":
            self._file.__enter__()
            return self

        def __exit__(self, *error: Any) -> None:
            self._file.__exit__(*error)

        def keys(self) -> list[str]:
            return list(self._file.keys())

        def get_tensor(self, name: str) -> torch.Tensor:
            names.append(name)
            return self._file.get_tensor(name)

    causal_lm_open = causal_lm.safe_open
    monkeypatch.setattr(causal_lm, "safe_open", Opened)
    return names


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize(("architecture", "tied"), HEADS)
def test_the_head_alone_gives_the_model_s_logits(
    architecture: Architecture, tied: bool | None, shards: bool, tmp_path: Path, read: list[str]
) -> None:
    folder = build_tiny(tmp_path / "teacher", architecture, seed=2, tied=tied)
    if shards:
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(tmp_path / "shards", max_shard_size="40KB")
        folder = tmp_path / "shards"
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    hidden_CH = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    alone = load_head(str(folder), dtype="float32", device="cpu")(hidden_CH)
    assert len(read) == 1
    torch.testing.assert_close(alone, CausalLM(str(folder), device="cpu").head(hidden_CH), rtol=0, atol=0)


def test_a_head_under_an_unknown_name_is_read_with_the_whole_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(build_tiny(tmp_path / "teacher", "llama", seed=2))
    monkeypatch.setattr(causal_lm, "_tensor_of", lambda path, names: None)
    hidden_CH = torch.ones(2, 64)
    torch.testing.assert_close(load_head(folder, dtype="float32", device="cpu")(hidden_CH), CausalLM(folder, device="cpu").head(hidden_CH))


def test_hidden_states_stay_bfloat16_and_of_the_other_rank_s_rows_none_is_made(tmp_path: Path) -> None:
    student, teacher = build_tiny(tmp_path / "student", seed=1), build_tiny(tmp_path / "teacher", seed=2)
    rollouts = batch(student, teacher, num=6, hidden=True)
    exact = [r.scores.hidden_TH for r in rollouts]
    bits = [torch.from_numpy(hidden).bfloat16().view(torch.uint16).numpy() for hidden in exact if hidden is not None]
    short = [
        ScoredRollout(r.trajectory, TokenScores("t", r.scores.sampled_logp_T, r.scores.stop_logp_T, hidden_TH=hidden))
        for r, hidden in zip(rollouts, bits, strict=True)
    ]
    settings = ObjectiveSettings(support="full", loss="jsd")
    made = [
        build_micro_batches(short, [], settings, LengthLimits(32), micro_batch_tokens=48, max_new_tokens=32, share=(rank, 2))
        for rank in range(2)
    ]
    hidden = [micro.fields.teacher_hidden_NH for share in made for micro in share]
    assert {h.dtype for h in hidden if h is not None} == {torch.bfloat16}
    assert sum(len(h) for h in hidden if h is not None) == sum(len(h) for h in bits)
    whole = np.sort(np.concatenate(bits).ravel())
    assert np.array_equal(np.sort(torch.cat([h for h in hidden if h is not None]).view(torch.uint16).numpy().ravel()), whole)
