"""What people bring, one row a case: a file or a model folder, the exit code of `opd check`, words that must stand in its output.

A case is `Case(name, code, words, write)`. `write(folder, job)` lays files into `folder` and changes `job`, a tree as in a job file, whose
prompts are `folder/prompts.jsonl` and whose models are sound. To add a case is to add a row.
"""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet

Tree = dict[str, Any]
Write = Callable[[Path, Tree], None]
GOOD = [{"prompt": f"What is {n}+{n}?", "answer": str(2 * n)} for n in range(120)]
USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "hello"}


@dataclass(frozen=True)
class Case:
    """One thing that somebody has."""

    name: str
    code: int
    words: Sequence[str]
    write: Write
    student: str = "plain"
    """plain: no template; chat: ChatML; bos: a tokenizer that adds a BOS."""


def lines(*rows: Any, name: str = "prompts.jsonl", **source: Any) -> Write:
    """Rows as JSON lines; a str or bytes row is written as it stands."""

    def write(folder: Path, job: Tree) -> None:
        encoded = [row if isinstance(row, bytes) else (row if isinstance(row, str) else json.dumps(row)).encode() for row in rows]
        (folder / name).write_bytes(b"\n".join(encoded) + b"\n")
        job["data"]["prompts"] |= {"path": str(folder / name)} | source

    return write


def among_good(*rows: Any, **source: Any) -> Write:
    """A few rows behind 120 (or as many as asked) good ones: under 1 % where it is one."""
    return lines(*GOOD, *rows, **source)


def raw(name: str, content: bytes, **source: Any) -> Write:
    """A file of these bytes."""

    def write(folder: Path, job: Tree) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content)
        job["data"]["prompts"] |= {"path": str(place)} | source

    return write


def parquet(*rows: Any, name: str = "prompts.parquet", **source: Any) -> Write:
    def write(folder: Path, job: Tree) -> None:
        place = folder / name
        place.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(rows)), place)
        job["data"]["prompts"] |= {"path": str(place)} | source

    return write


def table(columns: Tree, **source: Any) -> Write:
    """Parquet of these columns, in types that no JSON has."""

    def write(folder: Path, job: Tree) -> None:
        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "p.parquet")
        job["data"]["prompts"] |= {"path": str(folder / "p.parquet")} | source

    return write


def both(*writes: Write) -> Write:
    def write(folder: Path, job: Tree) -> None:
        for one in writes:
            one(folder, job)

    return write


def pointing(path: str, **source: Any) -> Write:
    """data.prompts.path inside the case's folder."""
    return lambda folder, job: job["data"]["prompts"].update({"path": str(folder / path)} | source)


def plain_path(path: str, **source: Any) -> Write:
    return lambda folder, job: job["data"]["prompts"].update({"path": path} | source)


def held_out(*rows: Any, verifier: str = "exact", **settings: Any) -> Write:
    def write(folder: Path, job: Tree) -> None:
        lines(*GOOD)(folder, job)
        (folder / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        job["data"]["eval"] = {"path": str(folder / "held.jsonl"), "verifier": verifier} | settings

    return write


def verified(code: str) -> Write:
    """One problem, judged by `f` of this code."""

    def write(folder: Path, job: Tree) -> None:
        (folder / "v.py").write_text(code)
        held_out({"prompt": "x", "answer": "1"}, verifier=f"{folder / 'v.py'}:f")(folder, job)

    return write


def setting(group: str, **values: Any) -> Write:
    def write(folder: Path, job: Tree) -> None:
        lines(*GOOD)(folder, job)
        job.setdefault(group, {}).update(values)

    return write


JSONL = "".join(json.dumps(row) + "\n" for row in GOOD).encode()
CSV = b'prompt,answer\nWhat is 1+1?,2\n"two\nlines, quoted",3\n'
DEEP = b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
LONG = "x" * 300


def zst(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def feather(folder: Path, job: Tree) -> None:
    table = pyarrow.Table.from_pylist(GOOD)
    with pyarrow.ipc.new_file(folder / "prompts.arrow", table.schema) as writer:
        writer.write_table(table)
    job["data"]["prompts"]["path"] = str(folder / "prompts.arrow")


def no_cache(folder: Path, job: Tree) -> None:
    lines(*({"prompt": f"number {n}"} for n in range(21_000)))(folder, job)
    (folder / "cache").write_text("a file where a folder should be")


def saved_dataset(folder: Path, job: Tree) -> None:
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(GOOD[:8])}).save_to_disk(folder / "saved")
    job["data"]["prompts"]["path"] = str(folder / "saved")


def parquet_twice(folder: Path, job: Tree) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([["x"], ["y"]], names=["prompt", "prompt"]), folder / "p.parquet")
    job["data"]["prompts"]["path"] = str(folder / "p.parquet")


READING = [
    Case("an empty path", 2, ["is no path of a file"], plain_path("")),
    Case("a path of two lines", 2, ["is no path of a file"], raw("p\n.jsonl", JSONL)),
    Case("a path with brackets", 0, ["120 prompts"], raw("p[1].jsonl", JSONL)),
    Case("a folder called like a file", 2, ["no file of a known kind"], lambda f, j: ((f / "p.jsonl").mkdir(), j["data"]["prompts"].update(path=str(f / "p.jsonl")))[0]),
    Case("an address that does not answer", 2, ["http://127.0.0.1:9/p.jsonl: its file system says"], plain_path("http://127.0.0.1:9/p.jsonl")),
    Case("csv with two columns of a name", 2, ["has two columns called 'prompt'"], raw("p.csv", b"prompt,prompt\na,b\n")),
    Case("csv with an open quote", 2, ["unexpected end of data"], raw("p.csv", b'prompt\n"abc\n')),
    Case("csv with a header alone", 2, ["has no rows"], raw("p.csv", b"prompt\n")),
    Case("parquet with two columns of a name", 2, ["has two columns called 'prompt'"], parquet_twice),
    Case("zstandard in two frames", 0, ["240 prompts"], raw("p.jsonl.zst", zst(JSONL) + zst(JSONL))),
    Case("json lines", 0, ["120 prompts"], lines(*GOOD)),
    Case("a BOM and CRLF", 0, ["2 prompts"], raw("p.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')),
    Case("a json array", 0, ["120 prompts"], raw("p.json", json.dumps(GOOD, indent=1).encode())),
    Case("json lines called json", 0, ["120 prompts"], raw("p.json", JSONL)),
    Case("gzip", 0, ["120 prompts"], raw("p.jsonl.gz", gzip.compress(JSONL))),
    Case("zstandard", 0, ["120 prompts"], raw("p.jsonl.zst", zst(JSONL))),
    Case("bzip2", 0, ["120 prompts"], raw("p.jsonl.bz2", bz2.compress(JSONL))),
    Case("xz", 0, ["120 prompts"], raw("p.jsonl.xz", lzma.compress(JSONL))),
    Case("a json array in gzip", 0, ["120 prompts"], raw("p.json.gz", gzip.compress(json.dumps(GOOD).encode()))),
    Case("csv with a quoted line break", 0, ["2 prompts"], raw("p.csv", CSV)),
    Case("tsv", 0, ["1 prompts"], raw("p.tsv", b"prompt\tanswer\na\tb\n")),
    Case("parquet", 0, ["120 prompts"], parquet(*GOOD)),
    Case("arrow", 0, ["120 prompts"], feather),
    Case("a dataset saved to disk", 0, ["8 prompts"], saved_dataset),
    Case("a folder of shards", 0, ["240 prompts"], both(parquet(*GOOD, name="d/a-0.parquet"), parquet(*GOOD, name="d/a-1.parquet"), pointing("d"))),
    Case("a glob", 0, ["240 prompts"], both(parquet(*GOOD, name="d/a-0.parquet"), parquet(*GOOD, name="d/a-1.parquet"), pointing("d/a-*.parquet"))),
    Case("only the shards of the split", 0, ["120 prompts"], both(parquet(*GOOD, name="d/train-0.parquet"), parquet(*GOOD, name="d/test-0.parquet"), pointing("d"))),
    Case("no shard of the split", 2, ["no file of split 'train'", "test"], both(parquet(*GOOD, name="d/test-0.parquet"), pointing("d"))),
    Case("an fsspec address", 0, ["120 prompts"], lambda f, j: (lines(*GOOD)(f, j), j["data"]["prompts"].update(path=f"file://{f}/prompts.jsonl"))[0]),
    Case("an address nobody serves", 2, ["nowhere://", "its file system says"], plain_path("nowhere://bucket/p.jsonl")),
    Case("an address of a back end that is not installed", 2, ["s3fs"], plain_path("s3://bucket/p.jsonl")),
    Case("nothing at an address", 2, ["nothing of a known kind is there"], lambda f, j: j["data"]["prompts"].update(path=f"file://{f}/absent.jsonl")),
    Case("a missing file", 2, ["absent.jsonl: no such file"], plain_path("absent.jsonl")),
    Case("a missing folder", 2, ["no such file"], plain_path("/absent/folder")),
    Case("a dataset id without a network", 2, ["nobody/nothing: neither a file nor a dataset", "config 'main'"], plain_path("nobody/nothing", config="main")),
    Case("a folder without rows", 2, ["no file of a known kind"], lambda f, j: ((f / "e").mkdir(), j["data"]["prompts"].update(path=str(f / "e")))[0]),
    Case("an unknown kind of file", 2, ["no reader for this kind of file", ".jsonl"], raw("p.docx", b"PK")),
    Case("a glob without a match", 2, ["matches no file"], pointing("*.jsonl")),
    Case("an empty file", 2, ["has no rows"], raw("p.jsonl", b"\n")),
    Case("torn parquet", 2, ["the file says", "mend or replace it"], raw("p.parquet", b"PAR1" + b"x" * 40)),
    Case("torn gzip", 2, ["the file says"], raw("p.jsonl.gz", gzip.compress(JSONL)[:-40])),
    Case("torn zstandard", 2, ["p.jsonl.zst"], raw("p.jsonl.zst", zst(JSONL)[:-40])),
    Case("gzip that is none", 2, ["the file says"], raw("p.jsonl.gz", JSONL)),
    Case("UTF-16", 2, ["not JSON"], raw("p.jsonl", '{"prompt": "a"}\n'.encode("utf-16"))),
    Case("latin-1", 2, [":1: not JSON"], raw("p.jsonl", '{"prompt": "é"}\n'.encode("latin-1"))),
    Case("csv in latin-1", 2, ["the file says", "utf-8"], raw("p.csv", "prompt\né\n".encode("latin-1"))),
    Case("csv with too many cells", 2, [":2: more cells than the 1 of the header"], raw("p.csv", b"prompt\na,b\n")),
    Case("a json object", 2, ["p.json:1"], raw("p.json", b'{\n "data": []\n}')),
    Case("a torn json array", 2, ["p.json: not JSON"], raw("p.json", b'[{"prompt": "a"}')),
    Case("an arrow file that is none", 2, ["the file says"], raw("p.arrow", b"ARROW1xxxx")),
    Case("a BOM in the middle of a file", 0, ["2 prompts"], raw("p.jsonl", b'{"prompt": "a"}\n\xef\xbb\xbf{"prompt": "b"}\n')),
    Case("ndjson", 0, ["120 prompts"], raw("p.ndjson", JSONL)),
    Case("a json array called jsonl", 2, ["is one JSON array", "call it .json"], raw("p.jsonl", json.dumps(GOOD, indent=1).encode())),
    Case("json lines with commas behind", 2, [":1: not JSON (Extra data"], raw("p.jsonl", b'{"prompt": "a"},\n{"prompt": "b"},\n')),
    Case("a pointer of Git LFS", 2, ["magic bytes not found"], raw("p.parquet", b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 123\n")),
    Case("a page of HTML", 2, [":1: not JSON"], raw("p.jsonl", b"<!DOCTYPE html><html>404</html>\n")),
    Case("csv with semicolons", 2, ["no column 'prompt' (it has 'prompt;answer')"], raw("p.csv", b"prompt;answer\na;1\n")),
    Case("csv with blanks in its header", 2, ["it has 'prompt ', ' answer'"], raw("p.csv", b"prompt , answer\na,1\n")),
    Case("csv of an old Mac", 0, ["2 prompts"], raw("p.csv", b"prompt,answer\ra,1\rb,2\r")),
    Case("csv with the index of pandas", 0, ["1 prompts"], raw("p.csv", b",prompt,answer\n0,a,1\n")),
    Case("a zip", 2, ["no reader for this kind of file"], raw("p.jsonl.zip", b"PK\x03\x04")),
    Case("a broken link", 2, ["no such file"], lambda f, j: ((f / "p.jsonl").symlink_to(f / "gone"), j["data"]["prompts"].update(path=str(f / "p.jsonl")))[0]),
    Case("one bad shard", 2, ["a-1.parquet: the file says"], both(parquet(*GOOD, name="d/a-0.parquet"), raw("d/a-1.parquet", b"x"), pointing("d"))),
    Case("kinds of files in one folder", 0, ["240 prompts"], both(parquet(*GOOD, name="d/a.parquet"), raw("d/b.jsonl", JSONL), raw("d/README.md", b"x"), pointing("d"))),
    Case("a glob through folders", 0, ["120 prompts"], both(raw("d/x/a.jsonl", JSONL), pointing("d/**/*.jsonl"))),
    Case("a glob beside the job", 0, ["120 prompts"], both(raw("d/a.jsonl", JSONL), plain_path("d/*.jsonl"))),
    Case("a time that Python has not", 0, ["1 prompts"], table({"prompt": ["x"], "when": pyarrow.array([1], pyarrow.timestamp("ns", tz="Mars/Olympus"))})),
    Case("an answer that Python has not", 2, ["column 'answer' must be text, got Unreadable"], table({"prompt": ["x"], "answer": pyarrow.array([2**62], pyarrow.duration("s"))})),
    Case("messages as a map", 2, ["got a list of tuple"], table({"prompt": pyarrow.array([[("role", "user")]], pyarrow.map_(pyarrow.string(), pyarrow.string()))}), "chat"),
    Case("a column of nulls", 2, ["no column 'prompt': it is null here"], table({"prompt": pyarrow.array([None], pyarrow.null())})),
]  # fmt: skip

ROWS = [
    Case("one bad row among many", 0, ["1 of 121 rows cannot be used", "prompts.jsonl:121: not JSON", "fewer than 1 %"], among_good("{")),
    Case("two bad rows of many", 2, ["prompts.jsonl:121: not JSON", "2 of 122 rows", "on_bad_row: refuse"], among_good("{", "[1]")),
    Case("bad rows refused", 0, ["2 of 122 rows cannot be used", "on_bad_row is refuse"], among_good("{", "[1]", on_bad_row="refuse")),
    Case("one bad row stops", 2, ["prompts.jsonl:121: not JSON"], among_good("{", on_bad_row="stop")),
    Case("every row bad, refused", 2, ["no prompt is left"], lines("{", on_bad_row="refuse")),
    Case("a column of another name", 2, ["prompts.jsonl:1: no column 'prompt' (it has 'question'); set data.prompts.column"], lines({"question": "x"})),
    Case("a number", 2, ["must be text or a list of messages, got int 3"], lines({"prompt": 3})),
    Case("null", 2, ["no column 'prompt'"], lines({"prompt": None})),
    Case("an empty prompt", 2, ["holds no tokens"], lines({"prompt": ""})),
    Case("an empty prompt with a BOS", 2, ["holds no tokens"], lines({"prompt": ""}), "bos"),
    Case("an empty list", 2, ["must be text or a list of messages"], lines({"prompt": []}), "chat"),
    Case("half a surrogate pair", 2, ["half of a surrogate pair"], lines('{"prompt": "\\ud800"}')),
    Case("a NUL byte", 0, ["1 prompts"], lines({"prompt": "a\x00b"})),
    Case("nested without end", 2, ["not JSON"], lines(DEEP)),
    Case("an endless number", 2, ["prompts.jsonl:1"], lines(b'{"prompt": "x", "answer": ' + b"9" * 5000 + b"}")),
    Case("binary columns", 2, ["must be text"], parquet({"prompt": b"x"})),
    Case("a date", 2, ["column 'answer' must be text, got date"], parquet({"prompt": "x", "answer": __import__("datetime").date(2026, 1, 1)})),
    Case("a nested column by path", 0, ["1 prompts"], lines({"data": {"question": "x"}}, column="data.question")),
    Case("a column with a dot in its name", 0, ["1 prompts"], lines({"a.b": "x"}, column="a.b")),
    Case("a path that leads nowhere", 2, ["no column 'data.q'"], lines({"data": {"question": "x"}}, column="data.q")),
    Case("an over-long prompt", 0, ["300 tokens leave -44 of 256: refused"], lines(*GOOD, {"prompt": LONG})),
    Case("only over-long prompts", 2, ["no prompt is left"], lines({"prompt": LONG})),
    Case("golden that is empty", 0, ["1 golden answers are empty: taken as absent"], lines({"prompt": "x", "golden": " "})),
    Case("golden beyond the window", 0, ["1 golden answers do not fit into the 256 tokens"], lines({"prompt": "x", "golden": "".join(map(str, range(140)))})),
    Case("golden that loops", 0, ["1 golden answers end in a loop: left out"], lines({"prompt": "x", "golden": "so abcd" + "efgh" * 30})),
    Case("golden that goes on", 0, ["1 golden answers go on behind a stop token"], lines({"prompt": "x", "golden": "one<eos>two"})),
    Case("golden as a list", 2, ["column 'golden' must be text, got list"], lines({"prompt": "x", "golden": ["a"]})),
    Case("answers as floats", 0, ["1 answers are whole numbers stored as floats (2.0): read as 2"], lines({"prompt": "x", "answer": 2.0})),
    Case("an answer that is NaN", 0, ["1 answers are NaN or infinite"], lines('{"prompt": "x", "answer": NaN}')),
    Case("a boolean answer", 2, ["column 'answer' must be text, got bool"], lines({"prompt": "x", "answer": True})),
    Case("an ignored column", 0, ["1 rows have a column 'images' that is ignored: only text is read"], lines({"prompt": "x", "images": ["a.png"]})),
    Case("a nested answer that nobody asked for", 0, ["'reward_model' that is ignored", "reward_model.ground_truth"], lines({"prompt": "x", "reward_model": {"ground_truth": "1"}})),
    Case("a nested answer that was asked for", 0, ["1 prompts"], lines({"prompt": "x", "reward_model": {"ground_truth": "1"}}, answer_column="reward_model.ground_truth")),
    Case("a stop token in the text", 0, ["1 prompts hold a stop token in their own text"], lines({"prompt": "a <eos> b"})),
    Case("a domain nobody serves", 3, ["prompts.jsonl:1: no teacher has domain 'b'"], both(lines({"prompt": "x", "domain": "b"}), lambda f, j: j["teacher"].update(domains=["a"]))),
    Case("a domain as a list", 2, ["column 'domain' must be text"], lines({"prompt": "x", "domain": ["a"]})),
    Case("a BOS in the text", 0, ["1 prompts begin with the BOS token already"], lines({"prompt": "<|im_start|>x"}), "bos"),
    Case("a key twice", 2, ["it has key 'prompt' twice"], lines('{"prompt": "a", "prompt": "b"}')),
    Case("a million characters", 0, ["120 prompts", "1000000 tokens leave -999744"], among_good({"prompt": "x" * 1_000_000})),
    Case("prompts that differ in white space", 0, ["4 prompts"], lines({"prompt": "a"}, {"prompt": "a "}, {"prompt": " a"}, {"prompt": "a"})),
    Case("an instruction with its input beside it", 0, ["1 rows have a column 'input' that is ignored", "'output' that is ignored"], lines({"instruction": "Translate", "input": "cat", "output": "chat"}, column="instruction")),
    Case("a question with its context beside it", 0, ["1 rows have a column 'context' that is ignored"], lines({"prompt": "q", "context": "c"})),
    Case("a context that the teacher is shown", 0, ["1 prompts"], both(lines({"prompt": "q", "context": "c"}), lambda f, j: j["teacher"].update(context="{context}"))),
    Case("an answer that is empty", 0, ["1 answers are empty: taken as absent"], lines({"prompt": "x", "answer": " "})),
    Case("an answer as an object", 2, ["column 'answer' must be text, got dict"], lines({"prompt": "x", "answer": {"value": 1}})),
    Case("golden as a bool", 2, ["column 'golden' must be text, got bool"], lines({"prompt": "x", "golden": False})),
    Case("golden with two ends", 0, ["1 golden answers go on behind a stop token"], lines({"prompt": "x", "golden": "y<eos><eos>"})),
]  # fmt: skip

CHAT = [
    Case("messages", 0, ["1 prompts"], lines({"prompt": [USER]}), "chat"),
    Case("messages without a template", 2, ["chat messages need a chat template"], lines({"prompt": [USER]})),
    Case("chat without a template", 3, ["has no chat template"], lines({"prompt": "x"}, chat=True)),
    Case("an SFT conversation", 0, ["1 conversations end with the assistant's answer: it is taken as their golden answer"], lines({"messages": [USER, ANSWER]}, column="messages"), "chat"),
    Case("an answer alone", 2, ["the assistant's answer alone"], lines({"prompt": [ANSWER]}), "chat"),
    Case("messages as a JSON string", 0, ["1 prompts are messages as a JSON string"], lines({"prompt": json.dumps([USER])}), "chat"),
    Case("ShareGPT", 0, ["1 prompts have messages with from and value"], lines({"prompt": [{"from": "human", "value": "hi"}]}), "chat"),
    Case("content in parts", 0, ["1 messages hold their content in parts"], lines({"prompt": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}), "chat"),
    Case("an image part", 2, ["holds a part of type", "image_url"], lines({"prompt": [{"role": "user", "content": [{"type": "image_url"}]}]}), "chat"),
    Case("chat rows out of parquet", 0, ["2 prompts"], parquet({"prompt": [USER]}, {"prompt": [USER | {"tool_calls": [{"id": "1"}]}]}), "chat"),
    Case("a message without a role", 2, ["a message has no role"], lines({"prompt": [{"content": "x"}]}), "chat"),
    Case("a message that is text", 2, ["messages with role and content"], lines({"prompt": ["x"]}), "chat"),
    Case("content that is a number", 2, ["content is int 3"], lines({"prompt": [{"role": "user", "content": 3}]}), "chat"),
    Case("tools beside messages", 0, ["1 prompts"], lines({"prompt": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]}), "chat"),
    Case("tools as a JSON string", 0, ["1 prompts"], lines({"prompt": [USER], "tools": "[]"}), "chat"),
    Case("tools that are no JSON", 2, ["column 'tools' is text that is not JSON"], lines({"prompt": [USER], "tools": "f()"}), "chat"),
    Case("tools beside plain text", 0, ["1 rows have tools beside a plain text prompt"], lines({"prompt": "x", "tools": [{"name": "f"}]})),
    Case("a rendered prompt with chat", 0, ["1 prompts were put through a chat template before"], lines({"prompt": "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"}, chat=True), "chat"),
    Case("an end of turn in the user's text", 0, ["1 prompts hold a stop token in their own text"], lines({"prompt": "say <|im_end|> twice"}, chat=True), "chat"),
    Case("a template that takes no system role", 2, ["prompts.jsonl:1: the student's chat template says: System role not supported"], lines({"prompt": [{"role": "system", "content": "x"}, USER]}), "strict"),
    Case("a template that wants turns to alternate", 2, ["roles must alternate"], lines({"prompt": [USER, USER]}), "strict"),
    Case("one such row among many", 0, ["1 of 121 rows cannot be used", "roles must alternate"], among_good({"prompt": [USER, USER]}), "strict"),
    Case("a template that breaks on everything", 2, ["the student's chat template says"], lines({"prompt": [USER]}), "broken"),
    Case("a template key that it has", 0, ["1 prompts"], lines({"prompt": [USER]}, template={"enable_thinking": False}), "thinking"),
    Case("a template key that it lacks", 0, ["does not mention enable_thinking"], lines({"prompt": [USER]}, template={"enable_thinking": False}), "chat"),
    Case("a template key of our own", 2, ["messages is passed to every chat template already"], lines({"prompt": [USER]}, template={"messages": []}), "chat"),
    Case("a completion as TRL has it", 0, ["1 golden answers are an assistant's message: its content is taken"], lines({"prompt": [USER], "completion": [ANSWER]}, golden_column="completion"), "chat"),
    Case("golden as messages in JSON", 0, ["1 golden answers are an assistant's message"], lines({"prompt": [USER], "golden": json.dumps([ANSWER])}), "chat"),
    Case("golden as two messages", 2, ["column 'golden' must be text, got list"], lines({"prompt": [USER], "golden": [ANSWER, ANSWER]}), "chat"),
    Case("an SFT conversation beside another golden answer", 0, ["left out, the golden column has the one that is taken"], lines({"messages": [USER, ANSWER], "golden": "b"}, column="messages"), "chat"),
    Case("a conversation that ends with a tool call", 0, ["1 conversations end with an assistant's turn that calls tools or says nothing"], lines({"messages": [USER, {"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]}, column="messages"), "chat"),
    Case("a conversation that ends with an empty answer", 0, ["calls tools or says nothing: left out"], lines({"messages": [USER, ANSWER | {"content": ""}]}, column="messages"), "chat"),
    Case("messages as Python prints them", 0, ["1 prompts are messages as Python prints them"], raw("p.csv", ('messages\n"' + repr([USER]) + '"\n').encode(), column="messages"), "chat"),
    Case("ShareGPT with an answer", 0, ["1 prompts have messages with from and value", "it is taken as their golden answer"], lines({"c": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]}, column="c"), "chat"),
    Case("one message that is no list", 2, ["must be text or a list of messages, got dict"], lines({"prompt": USER}), "chat"),
    Case("a list of conversations", 2, ["got a list of list"], lines({"prompt": [[USER]]}), "chat"),
    Case("a tool's result that is an object", 2, ["content is dict"], lines({"prompt": [USER, {"role": "tool", "content": {"t": 3}}]}), "chat"),
    Case("a role that the template leaves out", 0, ["1 conversations hold a message that the chat template leaves out"], lines({"prompt": [USER, USER | {"role": "User", "content": "louder"}]}), "picky"),
    Case("functions beside messages", 0, ["1 rows have a column 'functions' that is ignored: rename it to tools"], lines({"prompt": [USER], "functions": [{"name": "f"}]}), "chat"),
    Case("one tool that is no list", 2, ["column 'tools' must be a list"], lines({"prompt": [USER], "tools": {"name": "f"}}), "chat"),
    Case("a template that asks for a system message", 2, ["needs a system message"], lines({"prompt": "x"}, chat=True), "bossy"),
    Case("and gets one", 0, ["1 prompts", "3 '<|im_end|>' (chat template)"], lines({"prompt": "x"}, chat=True, system_prompt="be kind"), "bossy"),
]  # fmt: skip

HELD_OUT = [
    Case("an answer without a number", 2, ["held.jsonl:1: answer 'abc' holds no number"], held_out({"prompt": "x", "answer": "abc"}, verifier="number")),
    Case("held-out problems", 0, ["1 problems"], held_out({"prompt": "x", "answer": "1"})),
    Case("an over-long problem", 0, ["1 problems", "held.jsonl:2: 300 tokens leave -44 of 256: refused"], held_out({"prompt": "x", "answer": "1"}, {"prompt": LONG, "answer": "1"})),
    Case("a problem without an answer", 2, ["data.eval: ", "held.jsonl:1: no column 'answer' to verify against"], held_out({"prompt": "x"})),
    Case("one of many without an answer", 0, ["119 problems", "held.jsonl:120: no column 'answer'"], held_out(*GOOD[:119], {"prompt": "x"})),
    Case("an answer that is NaN, held out", 2, ["no column 'answer' to verify against"], held_out({"prompt": "x", "answer": float("nan")})),
    Case("another column", 0, ["1 problems"], held_out({"q": "x", "a": "1"}, column="q", answer_column="a")),
    Case("a pattern that is none", 2, ["held.jsonl:1: answer '(' is no regular expression"], held_out({"prompt": "x", "answer": "("}, verifier="regex")),
    Case("a verifier that is none", 2, ["data.eval.verifier nobody"], held_out({"prompt": "x", "answer": "1"}, verifier="nobody")),
    Case("a verifier's file that breaks", 2, ["does not load"], held_out({"prompt": "x", "answer": "1"}, verifier="absent.py:f")),
    Case("a missing held-out file", 2, ["gone.jsonl: no such file"], held_out({"prompt": "x", "answer": "1"}, path="gone.jsonl")),
    Case("a verifier that is async", 2, ["a coroutine (make it a plain function)"], verified("async def f(r, a):\n    return r == a\n")),
    Case("a verifier of one argument", 2, ["takes 1 positional argument"], verified("def f(r):\n    return True\n")),
    Case("a verifier in verl's form", 2, ["missing 1 required positional argument"], verified("def f(data_source, solution_str, ground_truth):\n    return 1.0\n")),
    Case("a verifier that gives -1 for wrong", 0, ["1 problems"], verified("def f(r, a):\n    return -1.0\n")),
    Case("a verifier that gives a score in a dict", 2, ["neither true, false nor a finite number"], verified("def f(r, a):\n    return {'score': 0.0}\n")),
    Case("a verifier that gives a word", 2, ["it gives 'false', neither true, false nor a finite number"], verified("def f(r, a):\n    return 'false'\n")),
    Case("a verifier that gives nothing", 2, ["it gives None, neither true, false nor a finite number"], verified("def f(r, a):\n    pass\n")),
    Case("a verifier that gives numpy's bool", 0, ["1 problems"], verified("import numpy\ndef f(r, a):\n    return numpy.bool_(r == a)\n")),
    Case("a verifier that gives 1.0", 0, ["1 problems"], verified("def f(r, a):\n    return 1.0\n")),
    Case("a verifier that exits", 2, ["it called exit(3)"], verified("import sys\ndef f(r, a):\n    sys.exit(3)\n")),
    Case("a verifier that exits as it loads", 2, ["does not load (SystemExit"], verified("import sys\nsys.exit(0)\n")),
    Case("one answer of many without a number", 0, ["120 problems", "held.jsonl:121: answer 'none' holds no number"], held_out(*GOOD, {"prompt": "x", "answer": "none"}, verifier="number")),
    Case("mathematics that math-verify does not see", 2, ["held.jsonl:1: answer 'x+1' is nothing that math-verify can read", "between $ signs"], held_out({"prompt": "x", "answer": "x+1"}, verifier="math-verify")),
    Case("held-out problems of other columns", 2, ["held.jsonl:1: no column 'prompt' (it has 'question', 'answer'); set data.eval.column"], held_out({"question": "x", "answer": "1"})),
    Case("a held-out answer that is empty", 2, ["no column 'answer' to verify against"], held_out({"prompt": "x", "answer": ""})),
]  # fmt: skip

JOB = [
    Case("a stop id beyond the tokenizer", 2, ["rollout.stop_token_ids: 99999 is no id of the student's tokenizer"], setting("rollout", stop_token_ids=[99999])),
    Case("no stop ids", 2, ["rollout.stop_token_ids: is empty"], setting("rollout", stop_token_ids=[])),
    Case("a system prompt without chat", 0, ["data.prompts.system_prompt", "it is not used"], lines(*GOOD, system_prompt="be kind")),
    Case("a server's own template", 2, ["render is own, but the server has its tokenizer"], both(lines({"prompt": [USER]}), lambda f, j: j["teacher"].update(render="own", backend="http", url="http://127.0.0.1:9"))),
    Case("a teacher's own template that it lacks", 2, ["its tokenizer has no chat template"], both(lines({"prompt": [USER]}), lambda f, j: j["teacher"].update(render="own")), "chat"),
    Case("a cache that cannot be written", 2, ["the prompts' cache cannot be written", "set OPD_CACHE_DIR"], no_cache),
    Case("a misspelt key", 2, ["data.prompts.colum: unknown key; did you mean column?"], lines({"prompt": "x"}, colum="q")),
    Case("a misspelt group", 2, ["learnr: unknown key; did you mean learner?"], setting("learnr", total_steps=3)),
    Case("a key that nothing is near", 2, ["rollout.zzz: unknown key; remove it; the keys here are"], setting("rollout", zzz=1)),
    Case("a misspelt key in a teacher", 2, ["teacher.0.modle: unknown key; did you mean model?"], both(lines(*GOOD), lambda f, j: j["teacher"].update(modle="x"))),
    Case("on_bad_row that is neither", 2, ["data.prompts.on_bad_row", "'refuse' or 'stop'"], lines({"prompt": "x"}, on_bad_row="skip")),
    Case("a limit of none", 2, ["data.prompts.limit"], lines({"prompt": "x"}, limit=0)),
    Case("a context with an open brace", 2, ["teacher.0.context: expected '}'", "write a brace of the text twice"], both(lines(*GOOD), lambda f, j: j["teacher"].update(context="{a"))),
    Case("an engine of another model", 2, ["rollout.engine: model is set by the run itself"], setting("rollout", engine={"model": "other"})),
    Case("a stop id below zero", 2, ["rollout.stop_token_ids: -1 is no id"], setting("rollout", stop_token_ids=[-1])),
    Case("true for a number", 2, ["rollout.max_new_tokens: must be a number, not true or false"], setting("rollout", max_new_tokens=True)),
    Case("a number of another kind", 2, ["data.eval.limit", "integer"], held_out({"prompt": "x", "answer": "1"}, limit=2.5)),
    Case("a tokenizer beside the job", 0, ["120 prompts"], both(lines(*GOOD), lambda f, j: j["student"].update(tokenizer="teacher"))),
]  # fmt: skip
