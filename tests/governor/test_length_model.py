"""The length model: what it recovers, with answers that were cut, and what a rollout is worth against it."""

import math

import numpy as np
import pytest

from opd_governor.actors.governor.reference import Aim, Answer, fit_lengths
from opd_governor.actors.trajectory import Prompt, Trajectory


def answers(num: int = 400, spread: float = 0.5, budget: float = math.inf, seed: int = 0) -> list[Answer]:
    """Log length = 1.5 + .7 log prompt length (+ .6 in domain b) + noise."""
    rng, found = np.random.default_rng(seed), []
    for index in range(num):
        prompt, domain = int(rng.integers(8, 80)), "ab"[index % 2]
        length = math.exp(1.5 + 0.7 * math.log(prompt) + 0.6 * (domain == "b") + spread * rng.normal())
        found.append(Answer(index, prompt, domain, int(max(1, min(length, budget))), length <= budget))
    return found


def rollout(length: int, prompt_tokens: int = 20, budget: int = 500, cut: bool = False, index: int = -1, domain: str = "a") -> Trajectory:
    reason = "length" if cut else "stop"
    prompt = Prompt(index, (1,) * prompt_tokens, domain=domain)
    return Trajectory(prompt, (2,) * length, np.zeros(length, np.float32), reason, budget, 1, 0, 0)  # type: ignore[arg-type]


@pytest.mark.parametrize("budget", [math.inf, 100.0])
def test_slope_domain_and_spread_are_found_also_where_a_third_of_the_answers_was_cut(budget):
    model = fit_lengths(answers(budget=budget))
    assert model.slope == pytest.approx(0.7, abs=0.12)
    assert model.domains["b"] - model.domains["a"] == pytest.approx(0.6, abs=0.15)
    assert model.spread_nats == pytest.approx(0.5, abs=0.06)
    assert (model.censored_share > 0.3) == (budget <= 100)


def test_too_few_complete_answers_say_nothing():
    assert fit_lengths([]) is None
    assert fit_lengths([Answer(i, 5, "", 64, False) for i in range(50)]) is None


def test_new_answers_of_the_teacher_have_no_excess_on_prompts_of_any_length():
    model, fresh = fit_lengths(answers()), answers(seed=1)
    for low, high in ((8, 20), (20, 50), (50, 80)):
        part = [a for a in fresh if low <= a.prompt_tokens < high]
        found = model.excesses([rollout(a.num_tokens, a.prompt_tokens, 10**6, domain=a.domain) for a in part])
        assert abs(found.nats_N.mean()) < 4 * 0.5 / math.sqrt(len(part)) + 0.05
    assert found.in_tail_N.mean() < 0.02


def test_a_cap_that_hides_the_tail_makes_cut_rollouts_the_tail_and_the_teacher_has_its_share_there():
    model = fit_lengths(answers())
    median = math.exp(model.mu(-1, 20, "a"))
    found = model.excesses([rollout(int(median), budget=int(median), cut=True), rollout(5, budget=int(median))])
    assert found.in_tail_N.tolist() == [True, False]
    assert found.tail_probability_N[0] == pytest.approx(0.5, abs=0.02)
    # Cut at the median, it is expected to be longer: the mean of the upper half of a normal law.
    assert found.nats_N[0] == pytest.approx(model.spread_nats * math.sqrt(2 / math.pi), rel=0.05)


def test_a_prompts_own_answer_moves_its_reference_half_way():
    seen = answers()
    model = fit_lengths(seen)
    without = model.mu(-1, seen[3].prompt_tokens, seen[3].domain)
    assert model.mu(3, seen[3].prompt_tokens, seen[3].domain) == pytest.approx((without + math.log(seen[3].num_tokens)) / 2)


def test_the_aim_is_a_factor_and_a_budget():
    model = fit_lengths(answers())
    mu = model.mu(-1, 20, "a")
    assert model.mu(-1, 20, "a", Aim(0.5)) == pytest.approx(mu + math.log(0.5))
    assert model.mu(-1, 20, "a", Aim(1.0, 10)) == pytest.approx(math.log(10))
    assert model.mu(-1, 20, "a", Aim(1.0, 10**6)) == mu
