"""Job and limits in force: a person's change, the governor's decision, a governor that is gone, a checkpoint."""

from dataclasses import replace
from pathlib import Path

import pytest

from opd_governor.services.run.terms import Command, Ruling, Terms, base_limits
from tests.services.run.loop import Loop


class InForce:
    """The terms of a test loop, begun."""

    def __init__(self, tmp_path: Path, commands: dict[int, str] | None = None) -> None:
        self.loop = Loop(tmp_path, commands)
        self.terms = Terms(self.loop.job, self.loop.store, self.loop.governor, self.loop.journal)

    def change(self, max_new_tokens: int) -> None:
        self.loop.store.change({"rollout": {"max_new_tokens": max_new_tokens}}, expected=None, source="test")

    def metric(self, name: str) -> float | None:
        return self.loop.telemetry.registry.get_sample_value(name, {"run": "x"})


async def test_a_persons_change_waits_for_the_next_decision(tmp_path: Path) -> None:
    held = InForce(tmp_path)
    await held.terms.begin()
    held.change(2)
    assert held.terms.outdated
    assert held.terms.job.rollout.max_new_tokens == held.terms.ruling.limits.cap_tokens == 8
    assert await held.terms.decide(1) == Command(None, "because")
    assert not held.terms.outdated
    assert held.terms.job.rollout.max_new_tokens == held.terms.ruling.limits.cap_tokens == 2
    assert held.metric("opd_config_generation") == 2
    assert held.loop.store.observed_generation == 0, "nothing was launched on it"
    held.terms.observed()
    assert held.loop.store.observed_generation == held.metric("opd_config_observed_generation") == 2


async def test_without_a_governor_the_last_ruling_holds_but_a_persons_change_comes_into_force(tmp_path: Path) -> None:
    held = InForce(tmp_path, {1: "rollback"})
    await held.terms.begin()
    assert (await held.terms.decide(1)).verb == "rollback"
    ruling, held.loop.governor.lost_at = held.terms.ruling, (2,)
    held.change(2)
    assert await held.terms.decide(2) == Command()
    assert held.terms.ruling == ruling
    assert held.terms.job.rollout.max_new_tokens == 2
    assert any("the last limits hold" in line for line in held.loop.warnings)


@pytest.mark.parametrize("healthy", [True, False])
async def test_what_a_checkpoint_holds_comes_back_and_a_later_change_with_the_next_decision(tmp_path: Path, healthy: bool) -> None:
    held = InForce(tmp_path)
    await held.terms.begin()
    held.terms.ruling = Ruling(replace(base_limits(held.loop.job)), 0.25, healthy)
    state = await held.terms.state()
    held.change(2)
    later = Terms(held.loop.job, held.loop.store, held.loop.governor, held.loop.journal)
    await later.begin()
    await later.restore(state)
    assert (later.ruling.pressure, later.ruling.healthy, later.generation) == (0.25, healthy, 1)
    assert later.outdated


@pytest.mark.parametrize(("unfinished", "quota"), [("keep", None), ("drop", None), ("quota", 1.0)])
def test_the_governor_has_a_quota_of_unfinished_prompts_to_move_only_where_the_job_asks_for_one(
    tmp_path: Path, unfinished: str, quota: float | None
) -> None:
    job = Loop(tmp_path).job
    data = job.data.model_copy(update={"unfinished_by_teacher": unfinished})
    assert base_limits(job.model_copy(update={"data": data})).unfinished_quota == quota
