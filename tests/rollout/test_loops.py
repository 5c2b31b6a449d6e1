"""A planted loop is found where it starts; sound text, cut anywhere, is never called a loop."""

import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from opd_governor.actors.rollout.loops import PLAIN_FACTOR, PLAIN_UNIT_TOKENS, Loop, find_loop
from opd_governor.actors.rollout.settings import RolloutSettings

TEXTS = {path.name: path.read_text(encoding="utf-8") for path in sorted((Path(__file__).parent / "texts").iterdir())}
MIN_REPEATS = RolloutSettings().loop_min_repeats
MIN_TOKENS = RolloutSettings().loop_min_tokens


def find(token_ids: Sequence[int]) -> Loop | None:
    return find_loop(token_ids, min_repeats=MIN_REPEATS, min_tokens=MIN_TOKENS)


def find_by_trying_everything(ids: Sequence[int], min_repeats: int, min_tokens: int) -> Loop | None:
    for onset in range(len(ids)):
        region = ids[onset:]
        for period in range(1, len(region) // min_repeats + 1):
            repeats = all(a == b for a, b in zip(region, region[period:], strict=False))
            if repeats and len(region) >= min_tokens:
                plain = len(set(region)) <= PLAIN_UNIT_TOKENS
                return None if plain and len(region) < PLAIN_FACTOR * min_tokens else Loop(onset, period)
    return None


def train_bpe() -> Tokenizer:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(TEXTS.values(), trainers.BpeTrainer(vocab_size=800, initial_alphabet=alphabet, show_progress=False))
    return bpe


BPE = train_bpe()
TOKENIZERS: dict[str, Callable[[str], list[int]]] = {
    "characters": lambda text: [ord(character) for character in text],
    "words": lambda text: [hash(word) for word in re.findall(r"\w+|\s+|[^\w\s]", text)],
    "bpe": lambda text: BPE.encode(text).ids,
}


@given(
    prefix=st.lists(st.integers(0, 32), max_size=100),
    unit=st.lists(st.integers(0, 32), min_size=1, max_size=64),
    surplus_tokens=st.integers(0, 100),
)
def test_a_planted_loop_of_any_period_is_found_at_its_onset(prefix: list[int], unit: list[int], surplus_tokens: int) -> None:
    if prefix and prefix[-1] == unit[-1]:
        prefix = [*prefix, 33]  # else the loop would start before the planted place
    region_tokens = max(MIN_REPEATS * len(unit), PLAIN_FACTOR * MIN_TOKENS) + surplus_tokens
    planted = (unit * region_tokens)[:region_tokens]

    loop = find(prefix + planted)

    assert loop is not None
    assert loop.onset == len(prefix)
    assert len(unit) % loop.period == 0


@pytest.mark.parametrize("period", range(1, 65))
@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_sound_text_that_falls_into_a_loop_is_cut_within_one_period_of_the_fall(tokenizer: str, period: int) -> None:
    generator = random.Random(period)
    ids = TOKENIZERS[tokenizer](TEXTS["prose.txt"])
    onset = generator.randrange(100, 300)
    unit = ids[onset - period : onset]  # the student repeats what it has just written

    loop = find(ids[:onset] + unit * 64)

    assert loop is not None
    assert abs(loop.onset - (onset - period)) <= period
    assert period % loop.period == 0


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
@pytest.mark.parametrize("text", TEXTS)
def test_sound_text_cut_anywhere_is_no_loop(text: str, tokenizer: str) -> None:
    ids = TOKENIZERS[tokenizer](TEXTS[text])
    assert len(ids) > 60
    alarms = {end: loop for end in range(len(ids) + 1) if (loop := find(ids[:end])) is not None}
    assert alarms == {}


def test_a_ruler_of_a_line_is_sound_and_a_longer_one_is_a_loop() -> None:
    assert find([5] * (PLAIN_FACTOR * MIN_TOKENS - 1)) is None
    assert find([5] * (PLAIN_FACTOR * MIN_TOKENS)) == Loop(onset=0, period=1)
    assert PLAIN_FACTOR * MIN_TOKENS == 64


def test_short_responses_are_no_loops() -> None:
    assert find([]) is None
    assert find([5]) is None
    assert find([5, 5, 5, 5]) is None


def test_the_longest_region_wins_over_a_shorter_period() -> None:
    line = [1] * 70 + [2, 3, 4]
    assert find(line * 5 + [1] * 70) == Loop(onset=0, period=73)


@given(
    unit=st.lists(st.integers(0, 4), max_size=14),
    repeats=st.integers(0, 5),
    noise=st.lists(st.integers(0, 4), max_size=20),
    min_repeats=st.integers(2, 5),
    min_tokens=st.integers(2, 24),
)
def test_agrees_with_trying_every_onset_and_period(
    unit: list[int], repeats: int, noise: list[int], min_repeats: int, min_tokens: int
) -> None:
    ids = unit * repeats
    for response in (noise + ids, noise + ids + unit[:1], ids + noise):
        assert find_loop(response, min_repeats=min_repeats, min_tokens=min_tokens) == find_by_trying_everything(
            response, min_repeats, min_tokens
        )


def test_agrees_with_trying_everything_on_small_alphabets() -> None:
    generator = random.Random(0)
    found = 0
    for _ in range(2000):
        response = generator.choices(range(generator.choice((1, 2, 4, 5))), k=generator.randrange(30))
        loop = find_loop(response, min_repeats=2, min_tokens=3)
        assert loop == find_by_trying_everything(response, 2, 3)
        found += loop is not None
    assert found > 200


class CountedId(int):
    """A token id that counts how often it is compared."""

    comparisons = 0

    def __eq__(self, other: object) -> bool:
        CountedId.comparisons += 1
        return int(self) == other.__index__()  # type: ignore[attr-defined]

    __hash__ = int.__hash__


def fibonacci_word(num_tokens: int) -> list[int]:
    shorter, longer = [0], [0, 1]
    while len(longer) < num_tokens:
        shorter, longer = longer, longer + shorter
    return longer[:num_tokens]


@pytest.mark.parametrize(
    "ids",
    [
        [7] * 4000,
        [7] * 3999 + [8],
        [8] + [7] * 3999,
        [1, 2, 3, 4, 5] * 800,
        fibonacci_word(4000),
        random.Random(0).choices(range(2), k=4000),
    ],
    ids=["one token", "one token and a last", "one token after a first", "a unit", "fibonacci", "random bits"],
)
def test_comparisons_grow_linearly_with_length(ids: list[int]) -> None:
    CountedId.comparisons = 0
    find([CountedId(token) for token in ids])
    assert CountedId.comparisons <= 2 * len(ids)
