"""What two ranks hold: no copy of a layer between passes in bfloat16, half of the reference's layers each."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from held import copy_bytes_per_parameter, reference_bytes
from ranks import Ranks
from test_learner import batch
from test_ranks import GOLDEN, LIMITS, pair
from tiny import build_tiny

from opd_governor.actors.causal_lm import CausalLM, decoder_layers

pytestmark = pytest.mark.integration
"""Processes of their own, joined over gloo."""


@pytest.fixture(scope="module")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("models")
    return build_tiny(root / "student", "llama", seed=1, num_layers=4), build_tiny(root / "teacher", "llama", seed=2)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_copy_of_a_layer_is_left_after_the_forward_pass_in_bfloat16(two: Ranks, folders: tuple[Path, Path], checkpointing: bool) -> None:
    one = pair(two, *folders, dtype="bfloat16", gradient_checkpointing=checkpointing)
    rollouts = batch(*folders, num=7)
    assert two.call("apply", copy_bytes_per_parameter, rollouts, LIMITS) == [0.0, 0.0]
    if not checkpointing:
        assert copy_bytes_per_parameter(one, rollouts, LIMITS) == pytest.approx(2.0), (
            "one rank under autocast does keep one: the measure works"
        )


def test_each_rank_keeps_half_of_the_reference_s_layers(two: Ranks, folders: tuple[Path, Path]) -> None:
    pair(two, *folders)
    model = CausalLM(str(folders[0]), device="cpu").model
    inside = sum(p.nbytes for layer in decoder_layers(model) for p in layer.parameters())
    outside = sum(p.nbytes for p in model.parameters()) - inside
    assert two.call("apply", reference_bytes) == [outside + inside // 2] * 2


def test_two_ranks_in_bfloat16_learn_as_a_model_in_bfloat16_does(two: Ranks, folders: tuple[Path, Path]) -> None:
    """The passes multiply in bfloat16 throughout, as engines do. Held against one rank whose weights, and so the sums of its gradients,
    are bfloat16 themselves: random weights this wide round coarsely."""
    one, rollouts = pair(two, *folders, dtype="bfloat16"), batch(*folders, num=7)
    one._student.model.to(torch.bfloat16)
    one._optimizer = one._new_optimizer()
    limits = replace(LIMITS, reference_kl_weight=0.0)
    loss, norm, _ = one._passes.gradient(one._micro_batches(rollouts, GOLDEN, limits, 4.0), limits, one._optimizer)
    report, _ = two.step(rollouts, GOLDEN, limits, 4.0)
    assert report.loss == pytest.approx(loss, rel=0.03)
    assert report.grad_norm == pytest.approx(norm, rel=0.06)
