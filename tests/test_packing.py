from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.packing import like_lengths

lengths_of = st.lists(st.integers(min_value=1, max_value=300), max_size=40)


@given(lengths_of, st.integers(min_value=1, max_value=2000), st.sampled_from([0.0, 0.1, 0.5, 1.0]))
def test_every_sequence_once_within_size_and_padding(lengths, batch_tokens, max_padding_ratio):
    batches = like_lengths(lengths, batch_tokens, max_padding_ratio)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[index] for index in batch)
        assert len(batch) == 1 or padded <= batch_tokens
        assert sum(lengths[index] for index in batch) >= (1 - max_padding_ratio) * padded - 1e-6


def test_without_a_bound_on_padding_a_batch_is_filled():
    assert like_lengths([100, 10, 10, 10], 400, max_padding_ratio=1) == [[0, 1, 2, 3]]
    assert like_lengths([100, 10, 10, 10], 400) == [[0], [1, 2, 3]]
