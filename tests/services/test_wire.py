"""Actors and driver receive what the other side sent, unchanged."""

import numpy as np
import pytest

from opd_governor.actors.trajectory import Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.actors.wire import Ragged, Table, pack, rows_of, tabulate, unpack


def rollout(index: int, length: int, support: int = 0) -> ScoredRollout:
    draw = np.random.default_rng(index)
    logp_T = draw.normal(size=length).astype(np.float32)
    ids_TK = draw.integers(0, 50_000, (length, support)).astype(np.int32) if support else None
    prompt = Prompt(index, tuple(range(index)), domain="maths", answer="12" if index % 2 else None)
    trajectory = Trajectory(
        prompt,
        tuple(draw.integers(0, 50_000, length).tolist()),
        logp_T,
        "stop",
        64,
        3,
        2,
        0,
        1,
        loop_onset=index or None,
        support_ids_TK=ids_TK,
    )
    return ScoredRollout(trajectory, TokenScores("t", logp_T - 1, logp_T - 2, ids_TK, None if ids_TK is None else ids_TK / np.float32(7)))


def same(a: object, b: object) -> bool:
    """Equality where dataclasses hold arrays."""
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    names = getattr(type(a), "__match_args__", None)
    if names:
        return type(a) is type(b) and all(same(getattr(a, name), getattr(b, name)) for name in names)
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("support", [0, 5])
def test_rows_arrive_as_they_were_sent(support: int) -> None:
    rows = [rollout(index, length, support) for index, length in enumerate((5, 1, 0, 300))]
    arrived = rows_of(unpack(pack(tabulate(rows))))
    assert len(arrived) == len(rows)
    assert all(same(sent, got) for sent, got in zip(rows, arrived, strict=True))


def test_arrays_of_all_rows_are_one_object_on_the_way() -> None:
    table = tabulate([rollout(index, 4).scores for index in range(3)])
    assert isinstance(table, Table)
    assert isinstance(table.columns["sampled_logp_T"], Ragged)
    assert table.columns["support_ids_TK"] == [None, None, None]


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [rollout(1, 3).scores, None],
        [np.zeros(2, np.float32), np.zeros(2, np.float64)],
        [np.zeros((2, 3), np.int32), np.zeros((2, 4), np.int32), None],
    ],
)
def test_rows_of_several_kinds_go_as_they_are(rows: list[object]) -> None:
    arrived = rows_of(unpack(pack(tabulate(rows))))
    assert len(arrived) == len(rows)
    assert all(same(sent, got) for sent, got in zip(rows, arrived, strict=True))


def test_given_columns_stand_in_for_the_rows_own() -> None:
    table = tabulate([rollout(index, 4).trajectory for index in range(2)], prompt=[8, 9])
    assert table.columns["prompt"] == [8, 9]
