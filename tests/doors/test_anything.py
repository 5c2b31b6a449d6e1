"""Whatever a row, a file or a template does: accepted, refused with its place, or stopped with one line. Nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opd_governor.services.inputs.prompts import PromptStream, open_problems, open_prompts
from opd_governor.services.inputs.readers import READERS
from opd_governor.services.inputs.rows import open_rows
from opd_governor.services.job.settings import Job, JobError, PromptSource
from tests.tiny import CHATML, tiny_tokenizer

GENTLE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
COLUMNS = ("prompt", "messages", "answer", "golden", "domain", "tools", "images", "teacher_prompt", "reward_model")
texts = st.text(max_size=40) | st.sampled_from(
    ["", " ", "<|im_start|>user\nhi<|im_end|>\n", "<eos>", "\x00", "\ud800", "é" * 300, "[", '[{"role": "user", "content": "x"}]']
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
messages = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "from", "value", "tool_calls"]), scalars | st.lists(scalars, max_size=2), max_size=4
    )
    | st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system", "tool", ""]), "content": texts}),
    max_size=4,
)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=8
)
rows = st.dictionaries(st.sampled_from(COLUMNS), anything | messages, max_size=5) | anything


def job_of(path: Path, **source: Any) -> Job:
    prompts = {"path": str(path), "on_bad_row": "refuse"} | source
    data = {"prompts": prompts, "eval": {"path": str(path), "on_bad_row": "refuse"}}
    return Job.model_validate({"name": "any", "student": {"model": "s"}, "teacher": {"model": "t"}, "data": data})


def check_refusal(error: JobError, place: Path | None = None) -> None:
    """One line, which names the file where it is a file's fault."""
    assert "\n" not in str(error)
    assert place is None or str(place) in str(error), error


def opened(job: Job, tokenizer: Any, place: Path) -> PromptStream | None:
    """The prompts, or None where they were refused in one line that names the file."""
    try:
        stream = open_prompts(job, tokenizer, 256)
    except JobError as error:
        check_refusal(error, place)
        return None
    for line in (*stream.survey.notes, *stream.survey.refused):
        assert "\n" not in line
    for prompt in stream.next(3):
        assert prompt.token_ids
        assert all(0 <= token < len(tokenizer) for token in prompt.token_ids)
    return stream


@GENTLE
@given(st.lists(rows, max_size=5), st.booleans(), st.sampled_from(["prompt", "messages", "reward_model.ground_truth"]))
def test_any_rows(tmp_path: Path, content: list[Any], chat: bool, column: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
    tokenizer = tiny_tokenizer(chat=True)
    stream = opened(job_of(path, chat=chat, column=column), tokenizer, path)
    if stream is not None:
        assert len(stream) + stream.survey.num_refused <= len(content)
    try:
        open_problems(job_of(path, chat=chat, column=column), tokenizer, 256)
    except JobError as error:
        check_refusal(error, path)


@GENTLE
@given(st.binary(max_size=200), st.sampled_from([*READERS, ".jsonl.gz", ".csv.zst", ".parquet.xz", ".json.bz2"]))
def test_any_bytes_in_any_kind_of_file(tmp_path: Path, content: bytes, end: str) -> None:
    path = tmp_path / f"p{end}"
    path.write_bytes(content)
    opened(job_of(path), tiny_tokenizer(), path)


@GENTLE
@given(st.lists(texts, min_size=1, max_size=4), st.sampled_from([".csv", ".tsv", ".jsonl", ".json"]))
def test_any_text_in_a_file_of_text(tmp_path: Path, content: list[str], end: str) -> None:
    path = tmp_path / f"p{end}"
    path.write_text("prompt\n" + "\n".join(content), errors="surrogatepass")
    opened(job_of(path), tiny_tokenizer(), path)


class Contrary:
    """A tokenizer whose template and encoding do what they like with each text: raise, answer something else, nothing or too much."""

    def __init__(self, behaviour: list[str]) -> None:
        self._inner, self._behaviour, self._calls = tiny_tokenizer(), behaviour, 0
        self.chat_template = CHATML
        self.bos_token, self.bos_token_id, self.eos_token_id = None, None, 1
        self.added_tokens_decoder = self._inner.added_tokens_decoder
        self.special_tokens_map = self._inner.special_tokens_map
        self.split_special_tokens = False

    def _act(self, answer: Any) -> Any:
        self._calls += 1
        behaviour = self._behaviour[self._calls % len(self._behaviour)]
        if behaviour == "raise":
            raise TypeError("can only concatenate str (not NoneType)\nto str")
        if behaviour == "panic":
            raise type("PanicException", (BaseException,), {})("index out of bounds")
        return {"none": None, "short": answer[:0], "other": 7}.get(behaviour, answer)

    def __len__(self) -> int:
        return len(self._inner)

    def __call__(self, text: Any, **terms: Any) -> Any:
        return self._act(self._inner(text, **terms))

    def apply_chat_template(self, conversation: Any, **terms: Any) -> Any:
        return self._act(["".join(m["content"] for m in c) for c in conversation] if isinstance(conversation[0], list) else "x")

    def encode(self, *terms: Any, **named: Any) -> Any:
        return self._act(self._inner.encode(*terms, **named))

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return self._inner.convert_ids_to_tokens(ids)

    def get_vocab(self) -> dict[str, int]:
        return self._inner.get_vocab()


@GENTLE
@given(st.lists(st.sampled_from(["fine", "raise", "panic", "none", "short", "other"]), min_size=1, max_size=6), st.booleans())
def test_any_tokenizer_and_template(tmp_path: Path, behaviour: list[str], chat: bool) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"number {i}", "golden": "g"}) + "\n" for i in range(4)))
    try:
        stream = open_prompts(job_of(path, chat=chat), Contrary(behaviour), 256)
    except JobError as error:
        check_refusal(error)
    else:
        assert all("\n" not in note for note in stream.survey.notes)


def test_an_interrupt_is_nobody_s_words(tmp_path: Path) -> None:
    class Interrupted(Contrary):
        def __call__(self, text: Any, **terms: Any) -> Any:
            raise KeyboardInterrupt

    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "x"}\n')
    with pytest.raises(KeyboardInterrupt):
        open_prompts(job_of(path), Interrupted(["fine"]), 256)


def test_a_reader_from_outside_reads_by_the_end_of_the_file_s_name(tmp_path: Path) -> None:
    READERS.add(".lines")(lambda file: ((n, {"prompt": line.decode().strip()}) for n, line in enumerate(file, start=1)))
    (tmp_path / "p.lines").write_text("one\ntwo\n")
    assert [row.value for row in open_rows(PromptSource(path=str(tmp_path / "p.lines")))] == [{"prompt": "one"}, {"prompt": "two"}]
    assert [row.place for row in open_rows(PromptSource(path=str(tmp_path / "p.lines")))][1].endswith("p.lines:2")
