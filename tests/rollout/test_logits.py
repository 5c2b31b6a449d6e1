"""The logits processors follow their requests through vLLM's batch and change those rows only."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import BatchUpdate, MoveDirectionality

from opd_governor.actors.rollout.logits import Ngrams, NoRepeatNgram, StopRamp

CPU = torch.device("cpu")
NUM_ROWS, VOCAB = 4, 12


def ramped(strength_nats: float = 4.0, target_tokens: float = 2, width_tokens: int = 4) -> SamplingParams:
    return SamplingParams(stop_token_ids=[1, 3], extra_args={"stop_ramp": (strength_nats, target_tokens, width_tokens)})


def batch(*, added: list = [], removed: list = [], moved: list = []) -> BatchUpdate:  # noqa: B006
    return BatchUpdate(
        batch_size=NUM_ROWS, added=[(row, params, [9], output_ids) for row, params, output_ids in added], removed=removed, moved=moved
    )


def stop_bias(ramp: StopRamp) -> list[float]:
    """What each row's stop ids got; every other logit must be untouched."""
    logits = ramp.apply(torch.zeros(NUM_ROWS, VOCAB))
    assert torch.equal(logits[:, 1], logits[:, 3])
    others = [token for token in range(VOCAB) if token not in (1, 3)]
    assert not logits[:, others].any()
    return logits[:, 1].tolist()


def banned(processor: NoRepeatNgram) -> list[set[int]]:
    logits = processor.apply(torch.zeros(NUM_ROWS, VOCAB))
    return [set(torch.nonzero(row == -torch.inf).flatten().tolist()) for row in logits]


def test_the_ramp_rises_with_the_response_from_the_target_to_full_strength() -> None:
    ramp, output_ids = StopRamp(None, CPU, False), []
    ramp.update_state(batch(added=[(2, ramped(strength_nats=4.0, target_tokens=2, width_tokens=4), output_ids)]))
    biases = []
    for token in range(8):
        biases.append(stop_bias(ramp)[2])
        output_ids.append(token)
        ramp.update_state(None)
    assert biases == [0, 0, 0, 1, 2, 3, 4, 4]


def test_a_ramp_moves_swaps_and_leaves_with_its_request() -> None:
    ramp, long, longer = StopRamp(None, CPU, False), [5] * 4, [5] * 5
    ramp.update_state(batch(added=[(0, ramped(), long), (1, SamplingParams(), [5] * 9), (3, ramped(), longer)]))
    assert stop_bias(ramp) == [2, 0, 0, 3]
    ramp.update_state(batch(moved=[(0, 3, MoveDirectionality.SWAP)]))
    assert stop_bias(ramp) == [3, 0, 0, 2]
    ramp.update_state(batch(removed=[1], moved=[(3, 1, MoveDirectionality.UNIDIRECTIONAL)]))
    assert stop_bias(ramp) == [3, 2, 0, 0]
    ramp.update_state(batch(moved=[(2, 0, MoveDirectionality.UNIDIRECTIONAL)]))
    assert stop_bias(ramp)[1:] == [2, 0, 0]
    ramp.update_state(batch(removed=[1]))
    assert stop_bias(ramp)[1:] == [0, 0, 0]


def test_a_request_without_a_ramp_that_takes_a_row_over_has_none() -> None:
    ramp = StopRamp(None, CPU, False)
    ramp.update_state(batch(added=[(0, ramped(), [5] * 6)]))
    ramp.update_state(batch(added=[(0, SamplingParams(stop_token_ids=[1, 3]), [5] * 6)]))
    assert stop_bias(ramp) == [0, 0, 0, 0]


def test_a_stop_that_min_tokens_forbids_stays_forbidden() -> None:
    ramp = StopRamp(None, CPU, False)
    ramp.update_state(batch(added=[(0, ramped(), [5] * 6)]))
    logits = torch.zeros(NUM_ROWS, VOCAB)
    logits[0, [1, 3]] = -torch.inf
    assert ramp.apply(logits)[0, [1, 3]].tolist() == [-torch.inf, -torch.inf]


def test_without_requests_that_ask_for_it_logits_pass_untouched() -> None:
    for processor in (StopRamp(None, CPU, False), NoRepeatNgram(None, CPU, False)):
        processor.update_state(batch(added=[(0, SamplingParams(), [5, 5, 5])]))
        logits = torch.randn(NUM_ROWS, VOCAB)
        before = logits.clone()
        assert processor.apply(logits) is logits
        assert torch.equal(logits, before)
        assert not processor.is_argmax_invariant()


def test_ngrams_are_banned_for_the_request_that_asked_as_its_response_grows() -> None:
    processor, output_ids = NoRepeatNgram(None, CPU, False), [4, 5]
    bigrams = SamplingParams(extra_args={"no_repeat_ngram": 2})
    processor.update_state(batch(added=[(1, bigrams, output_ids), (2, SamplingParams(), [4, 5, 4])]))
    assert banned(processor) == [set(), set(), set(), set()]
    output_ids.append(4)
    assert banned(processor) == [set(), {5}, set(), set()]
    output_ids += [6, 4]
    processor.update_state(batch(moved=[(1, 3, MoveDirectionality.UNIDIRECTIONAL)]))
    assert banned(processor) == [set(), set(), set(), {5, 6}]


def test_a_request_that_comes_back_with_a_response_knows_its_ngrams() -> None:
    processor = NoRepeatNgram(None, CPU, False)
    processor.update_state(batch(added=[(0, SamplingParams(extra_args={"no_repeat_ngram": 3}), [7, 8, 9, 7, 8])]))
    assert banned(processor)[0] == {9}


@given(response=st.lists(st.integers(0, 3), max_size=30), n=st.integers(1, 5), read_every=st.integers(1, 4))
def test_banned_tokens_are_those_that_would_repeat_an_ngram(response: list[int], n: int, read_every: int) -> None:
    output_ids: list[int] = []
    ngrams = Ngrams(n, output_ids)
    for index, token in enumerate(response):
        output_ids.append(token)
        if index % read_every == 0:
            seen = {tuple(output_ids[i : i + n]) for i in range(len(output_ids) - n + 1)}
            tail = output_ids[len(output_ids) - n + 1 :] if len(output_ids) >= n - 1 else None
            expected = {next_id for next_id in range(4) if tail is not None and (*tail, next_id) in seen}
            assert set(ngrams.banned()) == expected
