import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.services.inputs.encode import Terms
from opd_governor.services.inputs.prompts import PromptStream, Survey, open_problems, open_prompts
from opd_governor.services.inputs.refusals import DataError
from opd_governor.services.inputs.rows import Row
from opd_governor.services.inputs.table import open_table
from opd_governor.services.job.settings import Job, PromptSource
from tests.tiny import tiny_tokenizer

PLAIN, CHAT = tiny_tokenizer(), tiny_tokenizer(chat=True)


def write_lines(path: Path, rows: list) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def job_of(path: Path | str, teacher: dict | None = None, data: dict | None = None, **source) -> Job:
    return Job.model_validate(
        {
            "name": "test",
            "seed": 3,
            "student": {"model": "student"},
            "teacher": {"model": "teacher"} | (teacher or {}),
            "data": {"prompts": {"path": str(path)} | source} | (data or {}),
        }
    )


def open_numbered(tmp_path: Path, num: int, **data) -> PromptStream:
    path = write_lines(tmp_path / "numbered.jsonl", [{"prompt": f"number {i}"} for i in range(num)])
    return open_prompts(job_of(path, data=data), PLAIN, 256)


def indices(prompts) -> list[int]:
    return [prompt.index for prompt in prompts]


def test_each_epoch_holds_every_prompt_once_in_an_order_of_its_own(tmp_path):
    stream = open_numbered(tmp_path, 20)
    first, second = stream.next(20), stream.next(20)
    assert sorted(indices(first)) == sorted(indices(second)) == list(range(20))
    assert indices(first) != indices(second)
    assert {p.epoch for p in first} == {0}
    assert {p.epoch for p in second} == {1}


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 9))
def test_a_restored_cursor_goes_on_where_the_stream_was(steps, n):
    def stream():
        return PromptStream(table_of([{"prompt": "x"}] * 7), Survey(tuple(range(7))), seed=5)

    original, resumed = stream(), stream()
    for step in steps:
        original.next(step)
    resumed.restore(json.loads(json.dumps(original.state())))
    assert resumed.next(n) == original.next(n)


class FakeRows(list):
    names = ("fake",)
    done_share = 0.0

    def __iter__(self):
        return (Row("fake", number, row) for number, row in enumerate(super().__iter__(), start=1))

    def identity(self) -> str:
        return "fake"


def table_of(rows):
    return open_table(FakeRows(rows), PLAIN, Terms(PromptSource(path="unused")))


def test_a_cursor_of_another_file_is_refused(tmp_path):
    stream = open_numbered(tmp_path, 5)
    with pytest.raises(DataError, match="had 9 prompts, now there are 5"):
        stream.restore({"epoch": 0, "position": 3, "num_prompts": 9})


def test_without_shuffle_the_file_s_order_is_kept(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a"}, "", {"prompt": "b"}])
    assert indices(open_prompts(job_of(path, shuffle=False), PLAIN, 256).next(4)) == [0, 1, 0, 1]


def test_drop_leaves_out_what_the_teacher_does_not_finish(tmp_path):
    stream = open_numbered(tmp_path, 10, unfinished_by_teacher="drop")
    stream.mark({i: i >= 4 for i in range(8)})
    drawn = stream.next(60)
    assert set(indices(drawn)) == {4, 5, 6, 7, 8, 9}
    assert {p.index: p.teacher_finishes for p in drawn}[5] is True
    assert {p.index: p.teacher_finishes for p in drawn}[9] is None
    with pytest.raises(DataError, match="drop leaves none of 10 prompts"):
        stream.mark(dict.fromkeys(range(10), False))


@given(quota=st.floats(0, 1), n=st.integers(1, 12), num_unfinished=st.integers(0, 9))
def test_quota_bounds_the_share_of_unfinished_prompts_in_every_batch(quota, n, num_unfinished):
    stream = PromptStream(table_of([{"prompt": "x"}] * 10), Survey(tuple(range(10))), seed=1, unfinished="quota")
    stream.mark({i: i >= num_unfinished for i in range(10)})
    for _ in range(3):
        batch = stream.next(n, unfinished_quota=quota)
        assert len(batch) == n
        assert sum(p.teacher_finishes is False for p in batch) <= quota * n


def test_a_quota_gives_way_where_the_teacher_finishes_nothing(tmp_path):
    stream = open_numbered(tmp_path, 4, unfinished_by_teacher="quota")
    stream.mark(dict.fromkeys(range(4), False))
    assert len(stream.next(6, unfinished_quota=0.0)) == 6


def test_text_becomes_tokens_without_special_tokens_unless_the_tokenizer_adds_its_bos(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "3+7?"}])
    plain = open_prompts(job_of(path), PLAIN, 256).next(1)[0]
    assert plain.token_ids == tuple(PLAIN.convert_tokens_to_ids(list("3+7?")))
    assert plain.text == "3+7?"

    with_bos = tiny_tokenizer()
    with_bos.bos_token = "<|im_start|>"
    from tokenizers.processors import TemplateProcessing

    with_bos.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <eos>", special_tokens=[("<|im_start|>", 2), ("<eos>", 1)]
    )
    assert open_prompts(job_of(path), with_bos, 256).next(1)[0].token_ids == (2, *plain.token_ids)


def test_chat_prompts_go_through_the_template_with_a_generation_prompt(tmp_path):
    messages = [{"role": "user", "content": "hi"}]
    path = write_lines(tmp_path / "p.jsonl", [{"q": messages}, {"q": "hi"}])
    stream = open_prompts(job_of(path, column="q", chat=True, system_prompt="be kind", shuffle=False), CHAT, 256)
    as_messages, as_text = (CHAT.decode(p.token_ids) for p in stream.next(2))
    assert as_messages == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert as_text == "<|im_start|>system\nbe kind<|im_end|>\n" + as_messages


def test_a_concise_teacher_sees_its_own_system_prompt(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "hi"}])
    teacher = {"system_prompt": "be brief"}
    chat = open_prompts(job_of(path, teacher=teacher, chat=True, system_prompt="be kind"), CHAT, 256).next(1)[0]
    assert (
        CHAT.decode(chat.teacher_token_ids)
        == "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "be kind" in CHAT.decode(chat.token_ids)
    plain = open_prompts(job_of(path, teacher=teacher), PLAIN, 256).next(1)[0]
    assert PLAIN.decode(plain.teacher_token_ids) == "be brief\n\nhi"
    assert open_prompts(job_of(path), PLAIN, 256).next(1)[0].teacher_token_ids is None


def test_domain_answer_and_golden_columns_are_read(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "1+1?", "domain": "sums", "answer": 2, "golden": "2"}])
    prompt = open_prompts(job_of(path), PLAIN, 256).next(1)[0]
    assert (prompt.domain, prompt.answer) == ("sums", "2")
    assert prompt.golden_ids == (PLAIN.convert_tokens_to_ids("2"), PLAIN.eos_token_id)
    in_chat = open_prompts(job_of(path, chat=True), CHAT, 256).next(1)[0]
    assert in_chat.golden_ids[-1] == CHAT.convert_tokens_to_ids("<|im_end|>")


def test_parquet_reads_like_jsonl(tmp_path):
    rows = [{"prompt": "a", "answer": "b"}, {"prompt": "c", "answer": None}]
    lines = write_lines(tmp_path / "p.jsonl", rows)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert open_prompts(job_of(tmp_path / "p.parquet"), PLAIN, 256).next(4) == open_prompts(job_of(lines), PLAIN, 256).next(4)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "x"', "not JSON"),
        ("\xff", "not JSON"),
        ('["x"]', "expected an object"),
        ('{"question": "x"}', "no column 'prompt' (it has 'question'); set data.prompts.column"),
        ('{"prompt": 3}', "column 'prompt' must be text or a list of messages"),
        ('{"prompt": [{"role": "user"}]}', "column 'prompt' must be text or a list of messages"),
        ('{"prompt": ""}', "holds no tokens"),
        ('{"prompt": "x", "domain": ["a"]}', "column 'domain' must be text, got list"),
        ('{"prompt": [{"role": "user", "content": "x"}]}', "chat template"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "fine"}, "", line])
    with pytest.raises(DataError) as caught:
        open_prompts(job_of(path), PLAIN, 256)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_empty_or_missing_file_is_named(tmp_path):
    empty = write_lines(tmp_path / "p.jsonl", [""])
    with pytest.raises(DataError, match="has no rows"):
        open_prompts(job_of(empty), PLAIN, 256)
    with pytest.raises(DataError, match="no such file"):
        open_prompts(job_of(tmp_path / "absent.jsonl"), PLAIN, 256)


def test_prompts_that_leave_too_little_of_the_window_are_refused_by_line(tmp_path):
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "x" * n} for n in (10, 60, 48, 49)])
    stream = open_prompts(job_of(path), PLAIN, 64)
    assert sorted(indices(stream.next(2))) == [0, 2]
    assert stream.survey.refused == (f"{path}:2: 60 tokens leave 4 of 64", f"{path}:4: 49 tokens leave 15 of 64")
    with pytest.raises(DataError, match="no prompt is left"):
        open_prompts(job_of(path), PLAIN, 20)


def test_held_out_problems_need_an_answer(tmp_path):
    path = write_lines(tmp_path / "eval.jsonl", [{"prompt": "1+1?", "answer": "2"}, {"prompt": "2+2?"}])

    def opened(**settings):
        return open_problems(job_of("unused", data={"eval": {"path": str(path)} | settings}), PLAIN, 256).prompts

    assert opened(limit=1)[0].answer == "2"
    with pytest.raises(DataError, match=r"eval.jsonl:2: no column 'answer'"):
        opened()


def test_an_over_long_problem_is_refused_by_line_and_the_others_are_as_without_it(tmp_path):
    rows = [{"prompt": f"{n}+{n}?", "answer": str(2 * n)} for n in range(9)]
    plain = write_lines(tmp_path / "plain.jsonl", rows)
    longer = write_lines(tmp_path / "longer.jsonl", [*rows[:4], {"prompt": "x" * 300, "answer": "1"}, *rows[4:]])

    def opened(path):
        return open_problems(job_of("unused", data={"eval": {"path": str(path)}}), PLAIN, 256)

    with_it, without = opened(longer), opened(plain)
    assert [(p.token_ids, p.answer) for p in with_it.prompts] == [(p.token_ids, p.answer) for p in without.prompts]
    assert with_it.survey.refused == (f"{longer}:5: 300 tokens leave -44 of 256",)


def test_a_domain_of_refused_prompts_alone_needs_no_teacher(tmp_path):
    rows = [{"prompt": "x", "domain": "a"}, {"prompt": "x" * 300, "domain": "b"}, {"prompt": "y", "domain": "a"}]
    path = write_lines(tmp_path / "p.jsonl", rows)
    assert open_prompts(job_of(path), PLAIN, 256).survey.domains == {"a": f"{path}:1"}
