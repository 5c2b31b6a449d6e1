"""What only a teacher sees: where it stands, what is refused, and that the student's prompt stays as it is."""

import copy
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd_governor.actors.teacher.copied import copied_tokens
from opd_governor.services.inputs.blends import teacher_weights
from opd_governor.services.inputs.messages import Notes
from opd_governor.services.inputs.privileged import columns_named, privileged
from opd_governor.services.inputs.prompts import open_prompts
from opd_governor.services.inputs.questions import Question, read_question
from opd_governor.services.inputs.refusals import DataError, RowError
from opd_governor.services.job.settings import Job, PromptSource
from tests.teacher import zoo
from tests.tiny import tiny_tokenizer

SOURCE = PromptSource(path="p.jsonl")


def question(**row) -> Question:
    return read_question(row, "p.jsonl:1", SOURCE, Notes())


def test_a_context_stands_before_the_prompt_or_around_it() -> None:
    row = question(prompt="1+1?", golden="2", hint="count")
    assert privileged(row, "Solution:\n{golden}").content == "Solution:\n2\n\n1+1?"
    assert privileged(row, "Solution:\n{golden}").text == "Solution:\n2"
    assert privileged(row, "{hint} then {prompt} now").content == "count then 1+1? now"
    assert privileged(row, "{hint} then {prompt} now").text == "count then  now"
    assert privileged(row, "Be brief.").content == "Be brief.\n\n1+1?"
    assert columns_named("{a} {prompt} {b.c}") == ["a", "prompt", "b.c"]


def test_in_chat_form_it_stands_in_the_last_user_message() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "two"},
    ]
    seen = privileged(question(prompt=messages, hint="h"), "{hint}").content
    assert [m["content"] for m in seen] == ["s", "one", "a", "h\n\ntwo"]
    assert messages[-1]["content"] == "two"


def test_a_dotted_name_reaches_into_nested_columns_and_braces_in_values_stay() -> None:
    row = question(prompt="p", extra={"solution": "{x} = {}"})
    assert privileged(row, "{extra.solution}|{prompt}").content == "{x} = {}|p"


@pytest.mark.parametrize("row", [{}, {"hint": ""}, {"hint": "  "}, {"hint": None}])
def test_a_row_with_nothing_privileged_is_refused(row) -> None:
    with pytest.raises(RowError, match=r"column 'hint' is empty, and teacher\.context names it"):
        privileged(question(prompt="p", **row), "{hint}")


def test_a_column_teacher_prompt_takes_the_prompts_place_for_teachers() -> None:
    assert privileged(question(prompt="p", teacher_prompt="p, 4"), None).content == "p, 4"
    assert privileged(question(prompt="p", teacher_prompt="q", hint="h"), "{hint}").content == "h\n\nq"
    chat = [{"role": "user", "content": "p"}]
    assert privileged(question(prompt=chat, teacher_prompt="q"), None).content == [{"role": "user", "content": "q"}]
    other = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    assert privileged(question(prompt=chat, teacher_prompt=other), None).content == other
    with pytest.raises(RowError, match="holds messages where the prompt is text"):
        privileged(question(prompt="p", teacher_prompt=other), None)
    with pytest.raises(RowError, match="must be text or a list of messages"):
        privileged(question(prompt="p", teacher_prompt=[1]), None)


def job(folder: Path, rows: list[dict], **teacher) -> Job:
    path = folder / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = {"path": str(path), "shuffle": False, **teacher.pop("prompts", {})}
    return Job.model_validate(
        {
            "name": "t",
            "student": {"model": "s"},
            "teacher": {"model": "t", **teacher},
            "data": {"prompts": prompts},
            "rollout": {"min_new_tokens": 8},
        }
    )


def test_the_students_tokens_stay_and_the_teachers_are_counted_in_the_window(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "hint": "a"}, {"prompt": "2+2?", "hint": "b" * 40}]
    tokenizer = tiny_tokenizer()
    plain = open_prompts(job(tmp_path, rows), tokenizer, 64)
    assert [prompt.teacher_token_ids for prompt in plain.prompts()] == [None, None]
    hinted = open_prompts(job(tmp_path, rows, context="hint {hint}."), tokenizer, 64)
    assert [prompt.token_ids for prompt in hinted.prompts()] == [prompt.token_ids for prompt in plain.prompts()]
    first, _ = hinted.prompts()
    assert tokenizer.decode(first.teacher_token_ids) == "hint a.\n\n1+1?"
    assert tokenizer.decode(first.privileged_ids) == "hint a."
    narrow = open_prompts(job(tmp_path, rows, context="hint {hint}."), tokenizer, 56)
    assert len(narrow) == 1
    assert f"{tmp_path}/prompts.jsonl:2" in narrow.survey.refused[0]


def test_rows_without_a_hint_are_refused_by_line(tmp_path: Path) -> None:
    rows = [{"prompt": "1+1?", "hint": "a"}, {"prompt": "2+2?"}]
    with pytest.raises(DataError, match=r"prompts.jsonl:2: column 'hint' is empty"):
        open_prompts(job(tmp_path, rows, context="{hint}"), tiny_tokenizer(), 64)
    left_out = open_prompts(job(tmp_path, rows, context="{hint}", prompts={"on_bad_row": "refuse"}), tiny_tokenizer(), 64)
    assert [prompt.text for prompt in left_out.prompts()] == ["1+1?"]


def test_copies_are_runs_of_the_hint_that_the_prompt_does_not_have() -> None:
    hint, prompt = (5, 6, 7, 8, 9), (1, 7, 8, 9)
    assert copied_tokens((3, 5, 6, 7, 4, 7, 8, 9), hint, prompt, 3).tolist() == [False, True, True, True, False, False, False, False]
    assert not copied_tokens((5, 6), hint, prompt, 3).any()
    assert not copied_tokens((5, 6, 7), (5, 6), prompt, 3).any()


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=8), st.integers(1, 4))
def test_a_token_is_copied_exactly_where_some_run_around_it_stands_in_the_hint(ids: list[int], hint: list[int], run: int) -> None:
    found = copied_tokens(ids, hint, (), run)
    for place in range(len(ids)):
        around = [ids[s : s + run] for s in range(max(0, place - run + 1), place + 1) if s + run <= len(ids)]
        stands = any(window == hint[s : s + run] for window in around for s in range(len(hint) - run + 1))
        assert found[place] == stands


def test_a_row_may_weigh_its_teachers(tmp_path: Path) -> None:
    rows = [{"prompt": "1?"}, {"prompt": "2?", "teacher_weights": {"a": 0, "b": 2}}, {"prompt": "3?", "teacher_weights": '{"a": 0.5}'}]
    one = job(tmp_path, rows, name="a")
    two = one.model_copy(update={"teacher": (*one.teacher, one.teacher[0].model_copy(update={"name": "b"}))})
    prompts = open_prompts(two, tiny_tokenizer(), 64).prompts()
    assert [prompt.teacher_weights for prompt in prompts] == [(), (("a", 0.0), ("b", 2.0)), (("a", 0.5),)]
    with pytest.raises(DataError, match=r"prompts.jsonl:2: column 'teacher_weights' names 'b'"):
        open_prompts(one, tiny_tokenizer(), 64)


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("{", "must be an object"),
        ([1], "must be an object"),
        ({"a": -1}, "at least 0"),
        ({"a": True}, "at least 0"),
        ({"a": 0}, "no teacher"),
    ],
)
def test_weights_that_are_none_are_refused(weights, words: str) -> None:
    with pytest.raises(RowError, match=words):
        teacher_weights({"teacher_weights": weights}, ["a"])


def test_a_teacher_with_tokens_of_its_own_reads_its_own_template_and_ids(tmp_path: Path) -> None:
    rows = [{"prompt": [{"role": "user", "content": "1+1?"}], "hint": "two"}]
    student, teacher = tiny_tokenizer(chat=True), zoo.byte_level(900)
    teacher = copy.deepcopy(teacher)
    teacher.chat_template = "{% for m in messages %}Q: {{ m['content'] }}\n{% endfor %}A:"
    one = job(tmp_path, rows, name="t", context="{hint}", tokenizer="own")
    (prompt,) = open_prompts(one, student, 128, {"t": teacher}).prompts()
    assert student.decode(prompt.token_ids).startswith("<|im_start|>user\n1+1?")
    assert teacher.decode(prompt.teacher_token_ids) == "Q: two\n\n1+1?\nA:"
    assert student.decode(prompt.privileged_ids) == "two"
    teacher.chat_template = None  # the student's form, in the teacher's ids
    (prompt,) = open_prompts(one, student, 256, {"t": teacher}).prompts()
    assert teacher.decode(prompt.teacher_token_ids).startswith("<|im_start|>user\ntwo\n\n1+1?<|im_end|>")
