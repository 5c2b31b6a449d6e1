"""A teacher with another tokenizer behind the scorer's interface, against transformers' own forward in float64."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from opd_governor.actors.teacher.alignment import NO_STOP_LOGP
from opd_governor.actors.teacher.byte_tokens import ByteTokenizer
from opd_governor.actors.teacher.cross_tokenizer import CrossTokenizerScorer, Vocabularies
from opd_governor.actors.teacher.prefixes import Other, OwnTokens, conditionals
from opd_governor.actors.teacher.scorers import GenerateOptions, ScoreRequest, TorchScorer
from opd_governor.actors.teacher.settings import TeacherSettings
from tests.teacher import zoo

EACH = frozenset({1, 2})
TEXTS = ["The sum is 12 + 345 = 357.", "老师教学生写字 😀!", "", "  \n\n\t1999", "naïve e\u0301 <|end|>", "ab"]


def build_model(folder: Path, tokenizer: PreTrainedTokenizerFast, order: list[int] | None = None) -> Path:
    """A small random Llama of this vocabulary; `order`: its ids renumbered (row order[i] becomes row i)."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", vocab_size=len(tokenizer), max_position_embeddings=256, tie_word_embeddings=True, **shape)
    config.eos_token_id = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0, 0.3)
            if order is not None:
                model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight[order].clone())
    model.save_pretrained(folder)
    return folder


def scorer(
    folder: Path, student: PreTrainedTokenizerFast, teacher: PreTrainedTokenizerFast, window: int | None = 256, **more: int
) -> CrossTokenizerScorer:
    student.save_pretrained(folder / "student-tokenizer")
    teacher.save_pretrained(folder)
    inner = TorchScorer(TeacherSettings(model=str(folder)), (teacher.eos_token_id,))
    stops = (student.eos_token_id,), (teacher.eos_token_id,), student.eos_token_id
    return CrossTokenizerScorer(inner, Vocabularies(str(folder / "student-tokenizer"), str(folder), *stops, context_tokens=window), **more)


def exact_logp(folder: Path, prompt: tuple[int, ...], ids: list[int]) -> np.ndarray:
    """[len(ids), V] float64 log-probs, one sequence, no padding."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.inference_mode():
        logits_SV = model(torch.tensor([[*prompt, *ids]])).logits[0]
    return logits_SV[len(prompt) - 1 : len(prompt) + len(ids) - 1].log_softmax(-1).numpy()


@pytest.mark.parametrize("kind", ["gemma", "coarse"])
def test_tokens_add_up_to_the_log_prob_of_the_teachers_own_tokens_and_the_stop_is_one_event(tmp_path: Path, kind: str) -> None:
    student = zoo.byte_level()
    teacher = zoo.sentencepiece(gemma=True) if kind == "gemma" else zoo.byte_level(900)
    folder = build_model(tmp_path / "teacher", teacher)
    cross, ours, theirs = scorer(folder, student, teacher), ByteTokenizer(student), ByteTokenizer(teacher)
    prompt = tuple(theirs.encode("Question:"))
    for text in TEXTS:
        for stopped in (True, False):
            ids = ours.encode(text) + [student.eos_token_id] * stopped
            if not ids:
                continue
            (scores,) = cross.score([ScoreRequest(prompt, tuple(ids))])
            canonical = theirs.encode(text) + [teacher.eos_token_id] * stopped
            logp = exact_logp(folder, prompt, canonical)
            whole = logp[np.arange(len(canonical)), canonical].sum()
            total = scores.sampled_logp_T.astype(np.float64).sum()
            if stopped:
                np.testing.assert_allclose(total, whole, rtol=1e-5, atol=1e-4)
                np.testing.assert_allclose(scores.stop_logp_T[-1], scores.sampled_logp_T[-1], atol=1e-5)
            else:  # cut here: longer tokens that go on count as well
                assert total >= whole - 1e-4
            assert scores.stop_logp_T[0] > NO_STOP_LOGP
            inside = np.diff(scores.span_T, prepend=-2) == 0
            assert (scores.stop_logp_T[inside] <= 0).all()
            assert scores.canonical
            assert scores.num_unaligned_bytes == 0


def cuts_at(student: ByteTokenizer, piece: bytes, place: int) -> bool:
    try:
        ids = student.encode(piece.decode())
    except ValueError:
        return False
    return place in np.cumsum([len(student.bytes_of(i) or b"") for i in ids])


def brute_force(folder: Path, student: ByteTokenizer, teacher: ByteTokenizer, prompt: tuple[int, ...], data: bytes) -> float:
    """F of some bytes, from whole float64 distributions: the teacher's tokens of these bytes before q, then any one token that spells
    them to their end or beyond, and that the student would cut at their end."""
    ids = teacher.encode(data.decode())
    logp = exact_logp(folder, prompt, ids)
    starts = np.concatenate([[0], np.cumsum([len(teacher.bytes_of(i) or b"") for i in ids])])
    terms = []
    for q in range(len(ids)):
        before, text = logp[np.arange(q), ids[:q]].sum(), data[starts[q] :]
        for i in range(logp.shape[1]):
            piece = teacher.bytes_of(i) or b""
            if piece.startswith(text) and (i == ids[q] or piece == text or cuts_at(student, piece, len(text))):
                terms.append(before + logp[q, i])
    return float(np.logaddexp.reduce(terms))


@pytest.mark.parametrize("kind", ["pairs", "bytes"])
def test_a_token_has_the_teachers_conditional_probability_of_its_bytes(tmp_path: Path, kind: str) -> None:
    """Against a sum over the whole vocabulary in float64, of the ways to write each prefix by its own tokens and one more."""
    student, teacher = (zoo.characters(), zoo.pairs()) if kind == "pairs" else (zoo.byte_level(), zoo.byte_level(900))
    folder = build_model(tmp_path / "teacher", teacher)
    cross, ours, theirs = scorer(folder, student, teacher, prefix_top_k=2000), ByteTokenizer(student), ByteTokenizer(teacher)
    prompt = tuple(theirs.encode("1+2?"))
    for text in ["1+2=3;3+4=7;!7", "9+9=8;8+0"] if kind == "pairs" else ["the teacher reads 1999 spaces", "def add(a, b):"]:
        ids = ours.encode(text)
        (scores,) = cross.score([ScoreRequest(prompt, tuple(ids))])
        marks = np.cumsum([len(ours.bytes_of(i) or b"") for i in ids]).tolist()
        wanted = np.diff([0.0, *(brute_force(folder, ours, theirs, prompt, text.encode()[:mark]) for mark in marks)])
        np.testing.assert_allclose(scores.sampled_logp_T, wanted, atol=2e-3)


def test_a_wrong_first_half_is_charged_to_it_and_not_to_what_follows() -> None:
    """The teacher writes two bytes in one token and is sure of another one: the second byte follows from the first."""
    own = OwnTokens(
        start_J=np.array([0, 2]),
        end_J=np.array([2, 3]),
        event_J=np.array([False, False]),
        token_ids=(5, 6),
        pieces=[b"1;", b"x"],
        logp_J=np.array([-18.0, -1.0]),
        others=[[Other(7, b"2;", -0.001, EACH), Other(8, b"1", -25.0, EACH)], [Other(9, b"xy", -0.5, EACH)]],
        cuts=[EACH, EACH],
    )
    encode = {b"1": [8], b"1;": [5], b"1;x": [5, 6]}.get
    logp, own_T = conditionals(np.array([1, 2, 3]), np.zeros(3, bool), own, encode)
    np.testing.assert_allclose(logp, [-18, 0, np.logaddexp(-1, -0.5)], atol=2e-3)
    np.testing.assert_allclose(own_T, [0, np.nan, 0], atol=2e-3)


def test_a_choice_has_its_price_where_it_is_made() -> None:
    """The teacher would end: "4" then ";!". Another one goes on: "4;" then "4". Both have written "4;" when they choose."""
    ends = OwnTokens(
        start_J=np.array([0, 1]),
        end_J=np.array([1, 3]),
        event_J=np.array([False, False]),
        token_ids=(4, 8),
        pieces=[b"4", b";!"],
        logp_J=np.array([-0.01, -0.02]),
        others=[[Other(7, b"4;", -5.0, EACH)], []],
        cuts=[EACH, EACH],
    )
    goes_on = OwnTokens(
        start_J=np.array([0, 2]),
        end_J=np.array([2, 3]),
        event_J=np.array([False, False]),
        token_ids=(7, 4),
        pieces=[b"4;", b"4"],
        logp_J=np.array([-5.0, -0.03]),
        others=[[Other(4, b"4", -0.01, EACH)], []],
        cuts=[EACH, EACH],
    )
    encode = {b"4": [4], b"4;": [7], b"4;!": [4, 8], b"4;4": [7, 4]}.get
    marks, none = np.array([1, 2, 3]), np.zeros(3, bool)
    (one, _), (other, _) = (conditionals(marks, none, own, encode) for own in (ends, goes_on))
    np.testing.assert_allclose(one[:2], other[:2], atol=1e-9)  # the same state, however it goes on
    assert one[2] - other[2] > 4.9
    np.testing.assert_allclose(one.sum(), -0.03, atol=1e-9)


def test_the_students_own_model_under_other_ids_gives_the_same_scores(tmp_path: Path) -> None:
    """Test of truth: a permuted vocabulary changes nothing, supports included."""
    student = zoo.pairs()
    order = np.random.default_rng(0).permutation(len(student)).tolist()
    teacher = zoo.renumbered(student, order)
    plain = TorchScorer(TeacherSettings(model=str(build_model(tmp_path / "same", student))), (student.eos_token_id,))
    cross = scorer(build_model(tmp_path / "renumbered", student, order), student, teacher)
    draw = np.random.default_rng(1)
    ours, theirs = ByteTokenizer(student), ByteTokenizer(teacher)
    for text in ("1+2=3;3+4=7;", "9+9=8;!8", "abab0+0=0;"):
        ids = (*ours.encode(text), student.eos_token_id)
        given = draw.integers(0, len(student), (len(ids), 4)).astype(np.int32)
        (wanted,) = plain.score([ScoreRequest(tuple(ours.encode("1+2?")), ids, given, top_k=5)])
        (found,) = cross.score([ScoreRequest(tuple(theirs.encode("1+2?")), ids, given, top_k=5)])
        assert wanted is not None
        assert found is not None
        np.testing.assert_allclose(found.sampled_logp_T, wanted.sampled_logp_T, atol=1e-5)
        np.testing.assert_allclose(found.stop_logp_T, wanted.stop_logp_T, atol=1e-5)
        assert not found.sampled_only_T.any()
        stop = student.eos_token_id
        for row in range(len(ids)):
            # Beside the stop, which is scored as a class, the same ids have the same log-probs.
            there = {i: p for i, p in zip(wanted.support_ids_TK[row], wanted.support_logp_TK[row], strict=True) if i not in (-1, stop)}
            here = {i: p for i, p in zip(found.support_ids_TK[row], found.support_logp_TK[row], strict=True) if i >= 0}
            assert here.keys() == there.keys()
            assert all(abs(here[i] - there[i]) < 1e-5 for i in here)


def test_a_support_stands_where_a_span_is_one_token_on_both_sides(tmp_path: Path) -> None:
    student, teacher = zoo.characters(), zoo.pairs()
    cross = scorer(build_model(tmp_path / "teacher", teacher), student, teacher)
    ours, theirs = ByteTokenizer(student), ByteTokenizer(teacher)
    ids = (*ours.encode("1+2=3;!3"), student.eos_token_id)
    (scores,) = cross.score([ScoreRequest(tuple(theirs.encode("1+2?")), ids, top_k=4)])
    assert scores is not None
    counts = np.bincount(scores.span_T)
    pieces = [len(theirs.bytes_of(i) or b"$") for i in theirs.encode("1+2=3;!3")] + [1]
    assert counts.tolist() == pieces
    np.testing.assert_array_equal(scores.sampled_only_T, counts[scores.span_T] > 1)
    assert (scores.support_ids_TK[scores.sampled_only_T] == -1).all()
    for row in np.flatnonzero(~scores.sampled_only_T):
        named = scores.support_ids_TK[row][scores.support_ids_TK[row] >= 0]
        assert all(ours.bytes_of(int(i)) in theirs.id_of_bytes for i in named)


def test_what_lies_beyond_the_teachers_window_is_left_out(tmp_path: Path) -> None:
    student, teacher = zoo.byte_level(900), zoo.sentencepiece(gemma=True)
    folder = build_model(tmp_path / "teacher", teacher)
    cross = scorer(folder, student, teacher, window=12)
    ours, theirs = ByteTokenizer(student), ByteTokenizer(teacher)
    ids = (*ours.encode("ab 老师教学生写字 cd"), student.eos_token_id)
    prompt = tuple(theirs.encode("Q:"))
    (scores,) = cross.score([ScoreRequest(prompt, ids)])
    (whole,) = scorer(folder, student, teacher).score([ScoreRequest(prompt, ids)])
    assert scores is not None
    assert whole is not None
    kept = scores.span_T >= 0
    assert 0 < kept.sum() < len(ids)
    assert not kept[-1]
    np.testing.assert_allclose(scores.sampled_logp_T[kept], whole.sampled_logp_T[kept], atol=1e-4)


def test_golden_answers_come_in_the_students_tokens(tmp_path: Path) -> None:
    student, teacher = zoo.characters(), zoo.pairs()
    cross = scorer(build_model(tmp_path / "teacher", teacher), student, teacher)
    theirs = ByteTokenizer(teacher)

    class Canned:
        def score(self, requests):
            raise AssertionError

        def generate(self, prompts, options):
            return [(*theirs.encode("1+2=3;"), teacher.eos_token_id), tuple(theirs.encode("1+2=3;!3")), (teacher.eos_token_id,)]

    cross._inner = Canned()
    ours = ByteTokenizer(student)
    stop = student.eos_token_id
    prompts = [(1,)] * 3
    assert cross.generate(prompts, GenerateOptions(20)) == [(*ours.encode("1+2=3;"), stop), tuple(ours.encode("1+2=3;!3")), (stop,)]
    assert cross.generate(prompts, GenerateOptions(6))[0] == tuple(ours.encode("1+2=3;"))  # its stop is the seventh: it was not finished
