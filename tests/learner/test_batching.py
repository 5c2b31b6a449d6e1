"""Micro-batches carry every token once, with its predictor, and add up to the whole batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.learner.batching import admit, build_micro_batches
from opd_governor.actors.learner.fields import LazyLogits
from opd_governor.actors.learner.metrics import summarise
from opd_governor.actors.learner.objective import chunked_objective
from opd_governor.actors.learner.settings import ObjectiveSettings
from opd_governor.actors.learner.weights import overlong_penalty, stop_tilt, token_mask, token_weights
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory

VOCABULARY, STOP_IDS = 30, torch.tensor([3, 4])


def rollout(index, num_prompt, num_tokens, *, reason="stop", onset=None, period=None, top_k=0, hidden=0):
    """Random ids and log-probs, the same for the same index."""
    rng = np.random.default_rng(index)
    ids = rng.integers(5, VOCABULARY, num_tokens)
    if reason == "stop" and num_tokens:
        ids[-1] = 3
    prompt = Prompt(index, tuple(rng.integers(5, VOCABULARY, num_prompt).tolist()))

    def logp(*shape):
        return -rng.exponential(2, shape).astype(np.float32)

    limits = {"budget_tokens": 40, "step": 0, "weight_version": 0, "limits_generation": 0}
    loop = {"loop_onset": onset, "loop_period": period}
    trajectory = Trajectory(prompt, tuple(ids.tolist()), logp(num_tokens), reason, **limits, **loop)
    support = {}
    if top_k:
        support["support_ids_TK"] = rng.integers(-1, VOCABULARY, (num_tokens, top_k)).astype(np.int32)
        support["support_logp_TK"] = logp(num_tokens, top_k)
    if hidden:
        support["hidden_TH"] = rng.standard_normal((num_tokens, hidden)).astype(np.float32)
    return ScoredRollout(trajectory, TokenScores("teacher", logp(num_tokens), logp(num_tokens), **support))


GOLDEN = Prompt(90, (5, 6), golden_ids=(7, 8, 9, 3))
LIMITS = LengthLimits(cap_tokens=40, golden_weight=0.1, stop_tilt_nats=1.0, loop_tail_weight=0.0)


def batch_of(lengths, **options):
    return [rollout(index, 2 + index % 3, length, **options) for index, length in enumerate(lengths)]


def build(rollouts, objective=None, golden=(GOLDEN,), micro_batch_tokens=64):
    sizes = {"micro_batch_tokens": micro_batch_tokens, "max_new_tokens": 40, "reference_length_tokens": 8.0}
    return build_micro_batches(rollouts, golden, objective or ObjectiveSettings(), LIMITS, **sizes)


@given(lengths=st.lists(st.integers(0, 40), max_size=12), micro_batch_tokens=st.integers(1, 200))
@settings(deadline=None, max_examples=50)
def test_every_token_once_within_size_and_padding(lengths, micro_batch_tokens):
    rollouts = batch_of(lengths)
    micro_batches = build(rollouts, micro_batch_tokens=micro_batch_tokens)
    seen = []
    for micro in micro_batches:
        ids_BL = micro.student.input_ids_BL
        mask_BL = ids_BL > 0  # 0 pads
        assert ids_BL.numel() <= micro_batch_tokens or len(ids_BL) == 1
        assert mask_BL.sum() >= 0.9 * mask_BL.numel()
        predicted = ids_BL.flatten()[micro.student.predictor_N + 1]
        assert torch.equal(predicted, micro.fields.sampled_ids_N)
        assert mask_BL.flatten()[micro.student.predictor_N + 1].all()
        fields = micro.fields
        seen += zip(fields.sampled_ids_N.tolist(), fields.behaviour_logp_N.tolist(), fields.position_N.tolist(), strict=True)
    expected = [(token, 0.0, position) for position, token in enumerate(GOLDEN.golden_ids)]
    for r in rollouts:
        positions = range(len(r.trajectory.token_ids))
        expected += zip(r.trajectory.token_ids, r.trajectory.logprobs_T.tolist(), positions, strict=True)
    assert sorted(seen) == sorted(expected)


class Model(torch.nn.Module):
    """A model without attention: each hidden state is its token's embedding."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(VOCABULARY, 8, dtype=torch.float64)
        self.head = torch.nn.Linear(8, VOCABULARY, dtype=torch.float64)

    def lazy_logits(self, inputs):
        return LazyLogits(self.embedding(inputs.input_ids_BL).flatten(0, 1)[inputs.predictor_N], self.head, tuple(self.head.parameters()))


def learn(micro_batches, objective):
    """Summed loss and gradient of a list of micro-batches."""
    model = Model()
    total = 0.0
    for micro in micro_batches:
        student, teacher_NH = model.lazy_logits(micro.student), micro.fields.teacher_hidden_NH
        loss, _ = chunked_objective(
            student,
            micro.fields,
            objective,
            STOP_IDS,
            chunk_tokens=16,
            reference_kl_weight=0.1,
            teacher=None if teacher_NH is None else LazyLogits(teacher_NH.double(), model.head, ()),
            reference=LazyLogits(student.hidden_NH.detach() / 2, model.head, ()),
        )
        loss.backward()
        total += float(loss.detach())
    return total, torch.cat([p.grad.flatten() for p in model.parameters()])


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean", "constant"])
@pytest.mark.parametrize(("support", "loss"), [("sampled", "reverse_kl"), ("union", "jsd"), ("full", "forward_kl")])
def test_micro_batches_add_up_to_the_whole_batch(support, loss, reduction):
    objective = ObjectiveSettings(support=support, loss=loss, reduction=reduction)
    options = {"union": {"top_k": 4}, "full": {"hidden": 8}}.get(support, {})
    rollouts = [*batch_of([12, 0, 30, 9, 9, 25], **options), rollout(7, 3, 40, reason="length", onset=10, period=4, **options)]
    by_row = build(rollouts, objective, micro_batch_tokens=1)
    whole, whole_grad = learn(by_row, objective)
    assert whole_grad.norm() > 1e-3
    split = build(rollouts, objective, micro_batch_tokens=80)
    assert 1 < len(split) < len(by_row)
    for part in (split, build(rollouts[::-1], objective, micro_batch_tokens=1000)):
        total, grad = learn(part, objective)
        assert total == pytest.approx(whole, rel=1e-6)
        assert torch.allclose(grad, whole_grad, rtol=1e-6, atol=1e-9)


def test_a_rollout_does_not_depend_on_the_widest_support_beside_it():
    objective = ObjectiveSettings(support="teacher")
    narrow, wide = rollout(1, 3, 6, top_k=2), rollout(2, 3, 6, top_k=7)
    together, _ = learn(build([narrow, wide], objective, micro_batch_tokens=100), objective)
    apart, _ = learn(build([narrow, wide], objective, micro_batch_tokens=1), objective)
    assert together == pytest.approx(apart, rel=1e-6)


def test_hidden_states_are_asked_for_and_golden_answers_have_none():
    objective = ObjectiveSettings(support="full")
    with pytest.raises(ValueError, match=r"objective.support full: teacher teacher returned no hidden states"):
        build(batch_of([3]), objective)
    bits = np.array([[0x3F80, 0xC040]], np.uint16)  # 1 and -3 in bfloat16
    scored = rollout(1, 3, 1, hidden=2)
    scored = replace(scored, scores=replace(scored.scores, hidden_TH=bits))
    rows = [row for micro in build([scored], objective) for row in zip(micro.fields.rollout_N, micro.fields.teacher_hidden_NH, strict=True)]
    assert {(bool(rolled), *hidden.tolist()) for rolled, hidden in rows} == {(True, 1.0, -3.0), (False, 0.0, 0.0)}


def test_loop_tails_and_truncated_rollouts_are_masked():
    looped = rollout(1, 3, 20, reason="repetition", onset=8, period=3).trajectory
    assert token_mask(looped, ObjectiveSettings(), 0.0).tolist() == [1] * 11 + [0] * 9
    assert token_mask(looped, ObjectiveSettings(), 0.25).tolist() == [1] * 11 + [0.25] * 9
    assert token_mask(looped, ObjectiveSettings(truncated="mask"), 1.0).sum() == 0
    assert token_mask(rollout(2, 3, 20).trajectory, ObjectiveSettings(truncated="mask"), 0.0).sum() == 20


def test_reductions_by_hand():
    masks = [np.ones(3), np.array([1.0, 0.0]), np.zeros(2), np.ones(0)]
    token, sequence, constant = (token_weights(masks, reduction, 10) for reduction in ("token_mean", "sequence_mean", "constant"))
    assert [w.tolist() for w in token] == [[0.25] * 3, [0.25, 0], [0, 0], []]
    assert [w.tolist() for w in sequence] == [[1 / 6] * 3, [0.5, 0], [0, 0], []]
    assert [w.tolist() for w in constant] == [[1 / 40] * 3, [1 / 40, 0], [0, 0], []]
    with pytest.raises(ValueError, match="median"):
        token_weights(masks, "median", 10)


def test_overlong_penalty_by_hand():
    assert [overlong_penalty(length, 100, 0.2) for length in (0, 80, 90, 100, 130)] == [0, 0, -0.5, -1, -1]


def test_stop_tilt_by_hand():
    assert stop_tilt(6, 2.0, target_tokens=2, width_tokens=2).tolist() == [0, 0, 0, 1, 2, 2]


trajectories = st.lists(
    st.builds(
        lambda index, reason, onset: rollout(index, 2, 20, reason=reason, onset=onset, period=1).trajectory,
        st.integers(0, 1000),
        st.sampled_from(["stop", "length", "repetition"]),
        st.none() | st.integers(0, 19),
    ),
    max_size=12,
)


@given(trajectories=trajectories, quota=st.floats(0, 1))
@settings(deadline=None, max_examples=100)
def test_admission_keeps_order_quota_and_as_much_as_it_can(trajectories, quota):
    admitted, refused = admit(trajectories, quota)
    order = [id(t) for t in trajectories]
    assert sorted(map(id, admitted + refused), key=order.index) == order
    for part in (admitted, refused):
        assert [id(t) for t in part] == [i for i in order if i in set(map(id, part))]
    assert all(t.truncated for t in refused)
    num_truncated = sum(t.truncated for t in admitted)
    assert num_truncated <= quota * len(admitted) + 1e-6
    if refused:
        assert num_truncated + 1 > quota * (len(admitted) + 1) - 1e-6, "one more would have fitted"


def test_admission_keeps_the_rollouts_with_the_longest_healthy_part():
    complete = [rollout(i, 2, 20).trajectory for i in range(2)]
    early, late, clean = (rollout(i, 2, 20, reason="length", onset=onset, period=1).trajectory for i, onset in ((5, 2), (6, 15), (7, None)))
    admitted, refused = admit([early, *complete, late, clean], 0.5)
    assert admitted == [*complete, late, clean]
    assert refused == [early]
    assert admit([early, late], 0.9) == ([], [early, late])


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="stop_tilt_target_tokens"):
        build_micro_batches(batch_of([3]), [], ObjectiveSettings(), LIMITS, micro_batch_tokens=64, max_new_tokens=40)
    with pytest.raises(ValueError, match="returned no top-k"):
        build(batch_of([3]), ObjectiveSettings(support="teacher"))


def test_metrics_are_sums_over_rollout_tokens():
    rollouts = [*batch_of([12, 20, 5]), rollout(7, 3, 40, reason="length", onset=10, period=4)]
    objective, model = ObjectiveSettings(), Model()

    def metrics_of(micro_batches):
        total = None
        for micro in micro_batches:
            _, losses = chunked_objective(model.lazy_logits(micro.student), micro.fields, objective, STOP_IDS, chunk_tokens=16)
            part = summarise(losses, micro.fields, STOP_IDS)
            total = part if total is None else total + part
        return total

    metrics = metrics_of(build(rollouts, micro_batch_tokens=60))
    assert metrics.num_tokens_P.tolist() == [12 + 16 + 5 + 16, 4 + 16, 8, 0, 0, 0, 0, 0]
    assert metrics.num_masked_tokens == 26
    assert metrics.num_golden_tokens == 4
    assert sorted(metrics.teacher_stop_logp_raw_M) == sorted(r.scores.sampled_logp_T[-1] for r in rollouts[:3])
    assert sorted(metrics.teacher_stop_logp_class_M) == sorted(r.scores.stop_logp_T[-1] for r in rollouts[:3])
    assert metrics.teacher_stop_mass == pytest.approx(sum(np.exp(r.scores.stop_logp_T).sum() for r in rollouts), rel=1e-5)
    kl_nats = 0.0
    for r in rollouts:
        ids = torch.tensor(r.trajectory.prompt.token_ids + r.trajectory.token_ids)
        logp = model.head(model.embedding(ids)).log_softmax(-1)[len(r.trajectory.prompt.token_ids) - 1 : -1].detach()
        for t, token in enumerate(r.trajectory.token_ids):
            own = logp[t, [3, 4]].logsumexp(-1) if token in (3, 4) else logp[t, token]
            kl_nats += float(own) - float((r.scores.stop_logp_T if token in (3, 4) else r.scores.sampled_logp_T)[t])
    assert metrics.kl_nats_P.sum() == pytest.approx(kl_nats, rel=1e-5)


def test_a_tuned_cap_does_not_move_the_divisor_of_the_constant_reduction():
    """None: the job file's cap. The one in force is in the limits, and losses before and after a change stay comparable."""
    objective, rollouts = ObjectiveSettings(reduction="constant"), batch_of([3, 5])
    sizes = {"micro_batch_tokens": 64, "max_new_tokens": 40, "reference_length_tokens": 8.0}
    before, after = (
        [micro.fields.weight_N for micro in build_micro_batches(rollouts, (), objective, replace(LIMITS, cap_tokens=cap), **sizes)]
        for cap in (40, 10)
    )
    assert len(before) == len(after)
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    assert float(max(weight_N.max() for weight_N in before)) == pytest.approx(1 / (2 * 40))


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_every_token_is_dealt_once_and_ranks_make_equally_many_passes(num_ranks):
    rollouts = batch_of([3, 9, 1, 12, 5, 7, 4])
    shares = [
        build_micro_batches(
            rollouts, [GOLDEN], ObjectiveSettings(), LIMITS, micro_batch_tokens=48, max_new_tokens=32, reference_length_tokens=4.0,
            share=(rank, num_ranks),
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    assert len({len(share) for share in shares}) == 1
    fields = [micro.fields for share in shares for micro in share]
    assert sum(float(f.weight_N.sum()) for f in fields) == pytest.approx(1)
    assert sum(float(f.golden_weight_N.sum()) for f in fields) == pytest.approx(LIMITS.golden_weight)
    assert sum(int(f.rollout_N.sum()) for f in fields) == sum(len(r.trajectory.token_ids) for r in rollouts)
    tokens = [sum(len(micro.fields) for micro in share) for share in shares]
    assert max(tokens) - min(tokens) <= 30
