"""Batches under way: launched in order, taken in order, and no prompt lost when they are dropped."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.trajectory import LengthLimits
from opd_governor.services.record.batch import Launch
from opd_governor.services.run.ahead import Ahead
from tests.services.run.loop import FakeStream, Loop


def terms() -> Any:
    job = SimpleNamespace(rollout=SimpleNamespace(prompts_per_step=3))
    return SimpleNamespace(job=job, generation=1, ruling=SimpleNamespace(limits=LengthLimits(8)), observed=lambda: None)


async def sample(launch: Launch) -> Any:
    return launch


@given(st.lists(st.tuples(st.sampled_from(["launch", "take", "drop"]), st.integers(1, 4)), max_size=30))
def test_whatever_is_launched_taken_and_dropped_every_prompt_is_taken_once_and_in_order(moves: list[tuple[str, int]]) -> None:
    async def play() -> list[int]:
        stream, taken, step = FakeStream(), list[int](), 0
        ahead = Ahead(stream, sample)  # type: ignore[arg-type]
        for move, number in moves:
            if move == "launch":
                ahead.launch(step + number, terms())
            elif move == "drop":
                await ahead.drop()
                assert ahead.cursor() == {"position": 3 * step}
            else:
                ahead.launch(step + 1, terms())
                launch: Any = await ahead.first
                ahead.take()
                step += 1
                assert launch.step == step
                taken += [prompt.index for prompt in launch.prompts]
            assert ahead.cursor() == {"position": 3 * step}
        await ahead.drop()
        return taken

    taken = asyncio.run(play())
    assert taken == list(range(len(taken)))


async def test_dropped_batches_are_cancelled() -> None:
    cancelled = []

    async def never(launch: Launch) -> Any:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(launch.step)
            raise

    ahead = Ahead(FakeStream(), never)  # type: ignore[arg-type]
    ahead.launch(2, terms())
    await asyncio.sleep(0)
    await ahead.drop()
    assert cancelled == [1, 2]


def test_a_launch_is_on_the_terms_in_force_when_it_is_made(tmp_path: Path) -> None:
    loop = Loop(tmp_path, staleness=2)
    loop.on_step = lambda record: record["step"] == 4 and loop.store.change({"rollout": {"max_new_tokens": 2}}, expected=None, source="t")
    records = loop.run()
    # Steps 5 and 6 were under way when the change was made, and keep the terms of their launch.
    assert [record["config_generation"] for record in records][:6] == [1] * 6
    assert records[-1]["config_generation"] == 2
    assert [record["cap_tokens"] for record in records] == [8 if record["config_generation"] == 1 else 2 for record in records]
