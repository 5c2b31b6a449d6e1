"""The adapter over the law: any figures are taken, references are what they say, a cap that is ignored is told."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.governor.policy import Policy
from opd_governor.services.sidecar.governing import OutsideGovernor
from opd_governor.services.sidecar.seen import StepSeen
from opd_governor.services.sidecar.yardstick import Yardstick

TOKENS = st.none() | st.sampled_from([0.0, 1.0, 1e9]) | st.floats(0, 1e9)
SHARE = st.none() | st.floats(0, 1)
ANY = st.none() | st.floats(-1e30, 1e30)
STEP = st.fixed_dictionaries(
    dict.fromkeys(("length_mean_tokens", "length_p95_tokens", "length_max_tokens", "reference_mean_tokens", "reference_p99_tokens"), TOKENS)
    | {"truncation": SHARE, "loops": SHARE, "kl_nats": ANY, "num_rollouts": TOKENS, "cap_tokens": st.none() | st.floats(1, 1e9)}
    | {"lengths": st.lists(st.integers(0, 10**9), max_size=8).map(tuple)}
)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(STEP, st.lists(st.floats(0, 1e9), max_size=8), st.lists(st.floats(0, 1e9), max_size=3)), min_size=1, max_size=14))
def test_any_figures_get_an_answer_and_go_through_the_state(rows: list[tuple[dict[str, object], list[float], list[float]]]) -> None:
    governor, other = OutsideGovernor(now_s=lambda: 0.0), OutsideGovernor(now_s=lambda: 0.0)
    for step, (fields, references, cut) in enumerate(rows):
        seen = StepSeen(step=step, **fields)  # type: ignore[arg-type]
        answer = governor.observe(seen, references, reference_cut=cut)
        other.restore(json.loads(json.dumps(other.state(), allow_nan=False)))
        assert other.observe(seen, references, reference_cut=cut) == answer
        assert 0 <= answer.pressure <= 1
        json.dumps(answer.to_json() | governor.record(), allow_nan=False)


def test_a_reference_comes_from_the_best_source() -> None:
    own = Yardstick()
    for step in range(8):
        own = own.learn(StepSeen.of_completions(step, [20, 30, 40, 50], ["stop"] * 4))
    assert own.mean_tokens == pytest.approx(35, rel=0.1)
    assert "first 8 steps" in own.source
    given = own.learn(StepSeen(step=9, reference_p99_tokens=200.0, reference_mean_tokens=80.0))
    assert (given.mean_tokens, given.p99_tokens) == (80.0, 200.0)
    posted = Yardstick().post([10.0 + step for step in range(50)])
    assert posted.p99_tokens == 59.0
    cut = Yardstick().post([10.0 + step for step in range(50)], [200.0] * 10)
    assert cut.p99_tokens is not None
    assert cut.p99_tokens > posted.p99_tokens
    assert "10 that were cut" in cut.source


def test_steps_mostly_cut_are_no_baseline() -> None:
    own = Yardstick()
    for step in range(20):
        own = own.learn(StepSeen.of_completions(step, [64] * 8, ["length"] * 8, cap_tokens=64))
    assert own.p99_tokens is None


def test_a_trainer_that_ignores_the_cap_is_told_so() -> None:
    governor = OutsideGovernor(Policy(), cap_tokens=512)
    for step in range(12):
        governor.observe(StepSeen.of_completions(step, [40 + i % 9 for i in range(32)], ["stop"] * 32, cap_tokens=512))
    answers = [governor.observe(StepSeen.of_completions(step, [512] * 32, ["length"] * 32, cap_tokens=512)) for step in range(12, 18)]
    assert answers[-1].limits.cap_tokens < 512
    assert answers[-1].ignored is not None
    assert "512" in answers[-1].ignored


def test_a_cap_that_is_not_known_is_never_moved() -> None:
    governor = OutsideGovernor()
    for step in range(20):
        governor.observe(
            StepSeen(step=step, length_mean_tokens=40.0 if step < 10 else 400.0, length_max_tokens=60.0 if step < 10 else 900.0)
        )
    assert governor.last is not None
    assert governor.last.pressure > 0.5
    assert governor.last.to_json()["limits"]["cap_tokens"] is None
    assert governor.last.limits.lr_scale < 1.0
