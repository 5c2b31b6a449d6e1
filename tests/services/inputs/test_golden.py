from dataclasses import replace

import numpy as np
import pytest

from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.golden import choose_prompts, collect_golden, golden_key, measure_lengths
from opd_governor.services.inputs.prompts import open_prompts
from opd_governor.services.inputs.refusals import DataError
from opd_governor.services.job.settings import GoldenSettings
from tests.services.inputs.test_prompts import job_of, write_lines
from tests.tiny import tiny_tokenizer

STOP = 1
PROMPTS = [Prompt(index=i, token_ids=(5, i)) for i in range(6)]


class FakeTeacher:
    """Answers with as many tokens as the prompt's index plus two; the last token is the stop unless told otherwise."""

    def __init__(self, unfinished=(), silent=(), loops=()):
        self.unfinished, self.silent, self.loops, self.asked = unfinished, silent, loops, []

    def answer(self, prompt):
        if prompt.index in self.silent:
            return None
        body = [8 if prompt.index in self.loops else 9] * (prompt.index + 1)
        return (*body, 9 if prompt.index in self.unfinished else STOP)

    def __call__(self, prompts):
        self.asked += [prompt.index for prompt in prompts]
        return [self.answer(prompt) for prompt in prompts]


def loop_of_eights(ids):
    return "loop" if 8 in ids else None


async def collect(teacher, tmp_path, prompts=PROMPTS, **settings):
    return await collect_golden(prompts, GoldenSettings(**settings), teacher, {STOP}, loop_of_eights, tmp_path / "golden.parquet")


async def test_only_answers_that_end_without_a_loop_are_kept(tmp_path):
    golden = await collect(FakeTeacher(unfinished={0}, silent={1}, loops={2}), tmp_path)
    assert golden.answers == {3: (9, 9, 9, 9, STOP), 4: (9,) * 5 + (STOP,), 5: (9,) * 6 + (STOP,)}
    assert golden.finished == {0: False, 2: False, 3: True, 4: True, 5: True}, "nothing is known of a prompt without an answer"
    assert golden.reference.kept_share == 0.6
    assert golden.reference.mean_tokens == 6


async def test_a_golden_column_is_used_and_its_prompt_not_asked(tmp_path):
    written = replace(PROMPTS[2], golden_ids=(7, STOP))
    teacher = FakeTeacher()
    golden = await collect(teacher, tmp_path, [written, PROMPTS[3]])
    assert golden.answers[2] == (7, STOP)
    assert teacher.asked == [3]
    assert golden.finished == {3: True}


async def test_the_second_run_reads_the_cache(tmp_path):
    first, second = FakeTeacher(unfinished={4}), FakeTeacher()
    written = await collect(first, tmp_path)
    read = await collect(second, tmp_path)
    assert (written.cached, read.cached, second.asked) == (False, True, [])
    assert (read.answers, read.finished, read.reference) == (written.answers, written.finished, written.reference)


async def test_an_async_teacher_does_as_well(tmp_path):
    async def teacher(prompts):
        return FakeTeacher()(prompts)

    assert len((await collect(teacher, tmp_path)).answers) == 6


async def test_without_golden_answers_the_lengths_are_still_measured(tmp_path):
    golden = await collect(FakeTeacher(), tmp_path, enabled=False)
    assert golden.answers == {}
    assert golden.reference.num_answers == 6


async def test_a_teacher_that_finishes_nothing_runs_without_golden_answers_and_without_a_length_model(tmp_path):
    golden = await collect(FakeTeacher(unfinished=set(range(6))), tmp_path)
    assert golden.answers == {}
    assert golden.reference.censored_share == 1
    assert golden.reference.model is None


async def test_cut_answers_are_censored_and_not_missing(tmp_path):
    """The longest sixth of the answers is cut at 20 tokens: the model knows that they were longer."""
    prompts = [replace(PROMPTS[0], index=i) for i in range(300)]
    lengths = np.exp(np.random.default_rng(0).normal(2.5, 0.5, 300)).astype(int) + 1

    def teacher(asked):
        return [(9,) * 20 if lengths[p.index] > 20 else (*[9] * (int(lengths[p.index]) - 1), STOP) for p in asked]

    reference = (await collect(teacher, tmp_path, prompts)).reference
    assert reference.censored_share == pytest.approx(float((lengths > 20).mean()))
    assert reference.p99_tokens == pytest.approx(np.quantile(lengths, 0.99), rel=0.25)
    assert reference.model.spread_nats == pytest.approx(np.log(lengths).std(), rel=0.15)


def test_the_cache_key_moves_with_all_that_shapes_an_answer():
    settings, teachers = GoldenSettings(), {"teacher": "weights"}
    key = golden_key(PROMPTS, settings, teachers, seed=0)
    assert key == golden_key(PROMPTS, settings.model_copy(update={"cache_dir": "elsewhere"}), teachers, seed=0)
    others = {
        golden_key(PROMPTS[1:], settings, teachers, seed=0),
        golden_key(PROMPTS, settings.model_copy(update={"temperature": 0.5}), teachers, seed=0),
        golden_key(PROMPTS, settings, {"teacher": "other weights"}, seed=0),
        golden_key(PROMPTS, settings, teachers, seed=1),
    }
    assert len(others | {key}) == 5


def test_prompts_with_a_golden_column_are_chosen_first(tmp_path):
    rows = [{"prompt": f"number {i}"} for i in range(9)] + [{"prompt": "number 9", "golden": "nine"}]
    stream = open_prompts(job_of(write_lines(tmp_path / "p.jsonl", rows)), tiny_tokenizer(), 256)
    chosen = choose_prompts(stream, GoldenSettings(num_prompts=3), seed=0)
    assert chosen[0].index == 9
    assert len({p.index for p in chosen}) == 3
    assert chosen == choose_prompts(stream, GoldenSettings(num_prompts=3), seed=0)
    assert chosen != choose_prompts(stream, GoldenSettings(num_prompts=3), seed=1)


def test_length_reference_counts_the_stop_token():
    reference = measure_lengths([(9,) * n for n in range(1, 101)], num_seen=200)
    assert (reference.mean_tokens, reference.max_tokens, reference.kept_share) == (50.5, 100, 0.5)
    assert 95 <= reference.p95_tokens <= 96
    assert 99 <= reference.p99_tokens <= 100


async def test_a_teacher_s_outage_is_no_verdict_and_those_prompts_are_asked_again(tmp_path):
    first = await collect(FakeTeacher(silent={1, 4}), tmp_path)
    assert (first.num_silent, first.cached) == (2, False)
    teacher = FakeTeacher()
    second = await collect(teacher, tmp_path)
    assert teacher.asked == [1, 4]
    assert set(second.answers) == set(range(6))
    third = FakeTeacher()
    assert (await collect(third, tmp_path)).cached
    assert third.asked == []
    with pytest.raises(DataError, match="no answer to any of 6 prompts"):
        await collect_golden(PROMPTS, GoldenSettings(), FakeTeacher(silent=set(range(6))), {STOP}, loop_of_eights, tmp_path / "b.parquet")


async def test_where_nothing_needs_golden_answers_a_pass_without_any_goes_on(tmp_path):
    teacher = FakeTeacher(unfinished=set(range(6)))
    golden = await collect_golden(PROMPTS, GoldenSettings(), teacher, {STOP}, loop_of_eights, tmp_path / "golden.parquet", needed=False)
    assert golden.answers == {}
    assert (golden.reference.kept_share, golden.reference.num_answers, golden.reference.mean_tokens) == (0.0, 0, 4.5)


async def test_a_golden_column_that_the_pass_refuses_is_not_learned(tmp_path):
    rows = [{"prompt": "one", "golden": "1"}, {"prompt": "two", "golden": "2"}]
    stream = open_prompts(job_of(write_lines(tmp_path / "p.jsonl", rows)), tiny_tokenizer(), 256)
    assert len(stream.golden()) == 2
    stream.mark({}, {0: (9, STOP)}, refused=[1])
    assert [p.golden_ids for p in stream.golden()] == [(9, STOP)]


async def test_a_torn_cache_is_made_again(tmp_path):
    (tmp_path / "golden.parquet").write_bytes(b"PAR1 torn")
    assert len((await collect(FakeTeacher(), tmp_path)).answers) == 6
