"""Alignment by bytes: every kind of tokenizer against every other, on texts that are hard for them."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd_governor.actors.teacher.alignment import UNALIGNED, Aligner, Alignment, spans_of
from opd_governor.actors.teacher.byte_tokens import BYTE_TOKEN, ByteTokenizer, TokenizerError, utf8_runs
from tests.teacher import zoo

KINDS = {
    "byte level": ByteTokenizer(zoo.byte_level()),
    "coarse byte level, NFC": ByteTokenizer(zoo.byte_level(900, True)),
    "llama 2": ByteTokenizer(zoo.sentencepiece(gemma=False)),
    "gemma": ByteTokenizer(zoo.sentencepiece(gemma=True)),
    "metaspace": ByteTokenizer(zoo.metaspace()),
}
PAIRS = [(one, other) for one in KINDS for other in KINDS]
# Without what some vocabularies cannot spell: SentencePiece's own space, and in a Unigram the name of a byte token.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=12),
        st.sampled_from(["12345", "  ", "\n\n\t", " 3.14", "老师教", "😀👩‍👩‍👧", "é", "e\u0301", "<|end|>", "the teacher"]),
    ),
    max_size=12,
).map(lambda parts: BYTE_TOKEN.sub("", "".join(parts).replace(zoo.SPACE, "")))


def aligner(student: str, teacher: str) -> Aligner:
    return Aligner(KINDS[student], KINDS[teacher], {KINDS[student].specials[zoo.STOP]: KINDS[teacher].specials[zoo.STOP]})


def spelled(tokens: ByteTokenizer, ids: list[int] | tuple[int, ...]) -> bytes:
    return b"".join(tokens.bytes_of(token_id) or b"" for token_id in ids)


def bytes_by_span(tokens: ByteTokenizer, ids: tuple[int, ...] | list[int], span: np.ndarray) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    for token_id, index in zip(ids, span.tolist(), strict=True):
        found[index] = found.get(index, b"") + (tokens.bytes_of(token_id) or b"")
    return found


def check(student: ByteTokenizer, teacher: ByteTokenizer, ids: list[int], found: Alignment) -> None:
    assert len(found.span_T) == len(ids)
    assert len(found.span_J) == len(found.token_ids)
    ours, theirs = bytes_by_span(student, ids, found.span_T), bytes_by_span(teacher, found.token_ids, found.span_J)
    for span in set(ours) - {UNALIGNED}:
        assert ours[span] == theirs[span]


@settings(max_examples=40)
@given(text=TEXTS)
@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_every_span_is_the_same_bytes_on_both_sides(student: str, teacher: str, text: str) -> None:
    ours, theirs = KINDS[student], KINDS[teacher]
    ids = ours.encode(text)
    assert spelled(ours, ids) == text.encode()
    found = aligner(student, teacher).align([*ids, ours.specials[zoo.STOP]])
    check(ours, theirs, [*ids, ours.specials[zoo.STOP]], found)
    assert found.canonical
    assert found.num_unaligned_bytes == 0
    assert (found.span_T >= 0).all()
    assert list(found.token_ids) == [*theirs.encode(text), theirs.specials[zoo.STOP]]  # the canonical tokenisation, whole


@given(ids=st.lists(st.integers(0, 500), max_size=20))
@pytest.mark.parametrize(("student", "teacher"), [("byte level", "llama 2"), ("gemma", "byte level"), ("metaspace", "gemma")])
def test_ids_that_no_tokenizer_would_choose_are_scored_where_they_are_text(student: str, teacher: str, ids: list[int]) -> None:
    ours, theirs = KINDS[student], KINDS[teacher]
    found = aligner(student, teacher).align(ids)
    check(ours, theirs, ids, found)
    data = [ours.bytes_of(token_id) for token_id in ids]
    if None not in data:
        text = b"".join(piece or b"" for piece in data)
        lost = sum(end - start for start, end, part in utf8_runs(text) if part is None)
        assert found.num_unaligned_bytes == lost
        assert found.canonical == (lost == 0 and ours.encode(text.decode()) == ids)
        assert (found.span_T[np.array([len(piece or b"") > 0 for piece in data], bool)] >= 0).all() or lost


def test_a_span_is_the_smallest_piece_that_both_sides_express() -> None:
    common = np.intersect1d([1, 3, 4, 6], [2, 3, 5, 6])
    assert spans_of(np.array([1, 3, 4, 6]), common).tolist() == [0, 0, 1, 1]
    assert spans_of(np.array([2, 3, 5, 6]), common).tolist() == [0, 0, 1, 1]


def test_half_a_character_at_the_cap_is_left_out() -> None:
    ours, theirs = KINDS["gemma"], KINDS["byte level"]
    ids = ours.encode("ok 😀")
    found = aligner("gemma", "byte level").align(ids[:-1])  # the emoji is four byte tokens
    assert list(found.token_ids) == theirs.encode("ok ")
    assert found.span_T[-3:].tolist() == [UNALIGNED] * 3
    assert found.num_unaligned_bytes == 3


def test_bytes_that_are_no_text_are_read_as_a_replacement_character_and_what_follows_is_aligned() -> None:
    ours, theirs = KINDS["gemma"], KINDS["byte level"]
    ids = [*ours.encode("ab"), ours.id_of_bytes[b"\xff"], *ours.encode("cd")]
    found = aligner("gemma", "byte level").align(ids)
    assert spelled(theirs, found.token_ids).decode() == "ab\ufffdcd"
    assert (found.span_T == UNALIGNED).tolist() == [token_id == ours.id_of_bytes[b"\xff"] for token_id in ids]
    check(ours, theirs, ids, found)


def test_a_special_token_is_an_event_and_its_name_in_a_text_is_text() -> None:
    ours, theirs = KINDS["byte level"], KINDS["gemma"]
    think = {ours.specials[zoo.THINK]: theirs.specials[zoo.THINK]}
    named = ours.encode(zoo.THINK)
    assert ours.specials[zoo.THINK] not in named
    ids = [*ours.encode("so "), ours.specials[zoo.THINK], *named]
    with_twin = Aligner(ours, theirs, think).align(ids)
    assert list(with_twin.token_ids) == [*theirs.encode("so "), theirs.specials[zoo.THINK], *theirs.encode(zoo.THINK)]
    assert (with_twin.span_T >= 0).all()
    without = Aligner(ours, theirs, {}).align(ids)
    assert list(without.token_ids) == [*theirs.encode("so "), *theirs.encode(zoo.THINK)]
    assert (without.span_T == UNALIGNED).sum() == 1
    check(ours, theirs, ids, without)


def test_one_character_that_the_teacher_spells_otherwise_costs_no_more_than_its_own_tokens() -> None:
    ours, theirs = KINDS["byte level"], KINDS["gemma"]
    ids = ours.encode(f"left {zoo.SPACE}! right")
    found = aligner("byte level", "gemma").align(ids)  # to SentencePiece it is a space
    assert found.num_unaligned_bytes == len(zoo.SPACE.encode())
    assert b"".join(ours.bytes_of(i) or b"" for i, lost in zip(ids, found.span_T < 0, strict=True) if lost) == zoo.SPACE.encode()
    check(ours, theirs, ids, found)


def test_a_text_that_the_teacher_cannot_spell_is_unaligned_and_counted() -> None:
    ours, theirs = KINDS["byte level"], ByteTokenizer(zoo.characters())
    found = Aligner(ours, theirs, {}).align(ours.encode("3+7=Ü"))
    assert found.num_unaligned_bytes == len("3+7=Ü".encode())
    assert (found.span_T == UNALIGNED).all()


@pytest.mark.parametrize(("student", "teacher"), [("byte level", "gemma"), ("metaspace", "coarse byte level, NFC")])
def test_ten_thousand_random_strings_come_back_byte_for_byte(student: str, teacher: str) -> None:
    rng, ours, theirs = random.Random(0), KINDS[student], KINDS[teacher]
    alphabet = [*map(chr, range(32, 127)), *"\n\t äöüßé½²∑老师学生教日本語の😀👩👧\u200d\u0301"]
    align = aligner(student, teacher)
    for _ in range(10_000):
        text = "".join(rng.choices(alphabet, k=rng.randint(0, 24)))
        found = align.align(ours.encode(text))
        assert spelled(theirs, found.token_ids) == text.encode()
        assert found.num_unaligned_bytes == 0


def test_a_decoder_that_is_not_known_is_refused() -> None:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordPiece({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    core.decoder = decoders.WordPiece()
    with pytest.raises(TokenizerError, match="WordPiece is not known here"):
        ByteTokenizer(PreTrainedTokenizerFast(tokenizer_object=core))
