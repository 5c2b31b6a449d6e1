"""Every sync brings the learner's weights into the engine: four architectures, tied and untied, twenty learner steps each."""

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import numpy as np
import pytest
import ray
from tiny import Architecture, build_tiny, tiny_tokenizer

from opd_governor.actors.trajectory import LengthLimits, Prompt, Trajectory
from opd_governor.services.inputs.resolve import Models, resolve
from opd_governor.services.job.settings import Job
from opd_governor.services.run.cluster import connect
from opd_governor.services.run.fleet import Fleet
from tests.made_up import random_batch

pytestmark = pytest.mark.integration

NUM_SYNCS = 20
TOLERANCE_NATS = 1e-3
PROBE = [int(i) for i in np.random.default_rng(0).integers(4, 80, 48)]


@pytest.fixture(scope="module")
def private_ray() -> Iterator[None]:
    connect(None)
    yield
    ray.shutdown()


CASES: dict[str, tuple[Architecture, bool | None]] = {
    "llama-tied": ("llama", True), "llama-untied": ("llama", False), "qwen3": ("qwen3", None), "gemma3": ("gemma3", None),
    "gpt2": ("gpt2", None),
}  # fmt: skip
AFTER = "after-an-update"
PADDING = tuple("äöüßéèêáàâóòôúùûíìîñçåøæœþð")
"""Of the embedding of its student, not of the tokenizer."""


@pytest.fixture(scope="module")
def found(private_ray: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each case gave, or what it raised. Two at a time: an engine's start is mostly one core's work."""
    two = asyncio.Semaphore(2)

    def student(architecture: Architecture, tied: bool | None, extra: tuple[str, ...] = ()) -> str:
        return str(build_tiny(tmp_path_factory.mktemp("student") / "student", architecture, seed=0, tied=tied, extra=extra))

    def padded(folder: str) -> str:
        tiny_tokenizer().save_pretrained(folder)
        return folder

    async def one(case: Coroutine[Any, Any, Any]) -> Any:
        async with two:
            return await case

    async def every() -> dict[str, Any]:
        cases = {name: _learn_and_sync(name, student(*shape)) for name, shape in CASES.items()}
        cases[AFTER] = _sample_learn_sample(AFTER, padded(student("llama", None, PADDING)))
        return dict(zip(cases, await asyncio.gather(*map(one, cases.values()), return_exceptions=True), strict=True))

    return asyncio.run(every())


def of(found: dict[str, Any], case: str) -> Any:
    if isinstance(found[case], BaseException):
        raise found[case]
    return found[case]


@pytest.mark.parametrize("case", CASES)
def test_engine_and_learner_agree_after_each_of_twenty_steps(found: dict[str, Any], case: str) -> None:
    gaps, moved = of(found, case)
    assert len(gaps) == NUM_SYNCS + 1
    assert max(gaps) < TOLERANCE_NATS, gaps
    assert moved > 100 * TOLERANCE_NATS, "the weights hardly changed: the comparison would prove nothing"


def test_after_an_update_no_prefix_of_older_weights_is_read_and_what_no_step_changes_is_still_there(found: dict[str, Any]) -> None:
    """Its embedding has more rows than its tokenizer has ids: none of them is sampled, and neither side gives them probability."""
    told, expected, before, ids = of(found, AFTER)
    assert max(ids) < len(tiny_tokenizer())
    np.testing.assert_allclose(told, expected, atol=TOLERANCE_NATS)
    assert np.abs(told - before).max() > 100 * TOLERANCE_NATS, "the weights hardly changed: the comparison would prove nothing"


async def _sample_learn_sample(name: str, folder: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[int]]:
    """A response's log-probs: as sampled after an update, as the learner gives them, as it gave them before; and all ids sampled. The
    prompt fills cache blocks, which the same prompt left there before the update; embeddings are frozen."""
    job = make_job(name, folder, {"samples_per_prompt": 2, "prompts_per_step": 1}, {"freeze_embeddings": True})
    prompt = Prompt(0, tuple(int(i) for i in np.random.default_rng(1).integers(4, 80, 200)))
    models, _ = resolve(job)
    assert models.cut_ids == len(tiny_tokenizer())
    fleet = Fleet(job, models, PROBE)
    await fleet.start()

    async def sample() -> list[Trajectory]:
        groups = fleet.rollout([(prompt, 0), (prompt, 1)], LengthLimits(32), 1, job.rollout)
        return [trajectory async for group in groups for trajectory in group]

    try:
        await fleet.sync_weights()
        first = await sample()
        learner = fleet.learner
        for version in range(1, 6):
            await fleet.learner.learn(random_batch(version), [], LengthLimits(32), 10.0, 3e-3)
            assert (await fleet.sync_weights()).gap_nats < TOLERANCE_NATS
        (trajectory, _) = await sample()
        ids, length = [*prompt.token_ids, *trajectory.token_ids], len(trajectory.token_ids)
        expected = (await learner.probe(ids))[-length:]
        await fleet.restart_learner()
        sampled = [token for one in (*first, trajectory) for token in one.token_ids]
        return trajectory.logprobs_T, expected, (await fleet.learner.probe(ids))[-length:], sampled
    finally:
        await asyncio.to_thread(fleet.end_actors)


def make_job(name: str, folder: str, rollout: dict[str, Any], learner: dict[str, Any]) -> Job:
    return Job.model_validate(
        {
            "name": name,
            "student": {"model": folder},
            "teacher": {"model": folder},
            "data": {"prompts": {"path": "none.jsonl"}},
            "rollout": {"max_num_seqs": 8, "max_new_tokens": 32} | rollout,
            "learner": {"learning_rate": 3e-3} | learner,
        }
    )


async def _learn_and_sync(name: str, folder: str) -> tuple[list[float], float]:
    """The gap after each sync, and how far the probe's log-probs moved from the first to the last."""
    job = make_job(name, folder, {}, {})
    fleet = Fleet(job, Models(folder, (folder,), (1,), 256), PROBE)
    await fleet.start()
    try:
        gaps = [(await fleet.sync_weights()).gap_nats]
        first = await fleet.learner.probe(PROBE)
        for version in range(1, NUM_SYNCS + 1):
            report = await fleet.learner.learn(random_batch(version), [], LengthLimits(32), 10.0, 3e-3)
            assert not report.skipped
            gaps.append((await fleet.sync_weights()).gap_nats)
        return gaps, float(np.abs(await fleet.learner.probe(PROBE) - first).max())
    finally:
        await asyncio.to_thread(fleet.end_actors)
