"""Job files and rows about additions, rewards, thinking, hints and following teachers, as cases (see cases.py)."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.doors.cases import GOOD, USER, Case, Tree, Write, both, held_out, lines
from tests.doors.models import changed, weights

Change = Callable[[dict[str, torch.Tensor], Tree], Any]


def lora(**values: Any) -> Write:
    return both(lines(*GOOD), lambda folder, job: job["student"].update(lora=values))


def adapter(change: Change, **values: Any) -> Write:
    """An adapter of the student in peft's format, changed."""

    def write(folder: Path, job: Tree) -> None:
        lora(**{"rank": 4, "alpha": 8, "targets": ["q_proj", "v_proj"], "start_from": str(folder / "adapter")} | values)(folder, job)
        tensors, rank = {}, 4
        for name, weight in load_file(Path(job["student"]["model"]) / "model.safetensors").items():
            if name.endswith(("q_proj.weight", "v_proj.weight")):
                layer = f"base_model.model.{name.removesuffix('.weight')}"
                tensors |= {
                    f"{layer}.lora_A.weight": torch.ones(rank, weight.shape[1]),
                    f"{layer}.lora_B.weight": torch.zeros(weight.shape[0], rank),
                }
        told: Tree = {"peft_type": "LORA", "r": rank, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "bias": "none"}
        (folder / "adapter").mkdir()
        change(tensors, told)
        save_file(tensors, folder / "adapter/adapter_model.safetensors")
        (folder / "adapter/adapter_config.json").write_text(json.dumps(told.get("whole", told)))

    return write


def torn(folder: Path, job: Tree) -> None:
    (folder / "adapter/adapter_model.safetensors").write_bytes(b"x" * 100)


def reward(code: str = "", *rows: Any, **values: Any) -> Write:
    """objective.reward on these rows, by `f` of this code where there is some."""

    def write(folder: Path, job: Tree) -> None:
        lines(*(rows or GOOD))(folder, job)
        if code:
            (folder / "r.py").write_text(code)
        named = {"verifier": f"{folder / 'r.py'}:f"} if code else {}
        job["objective"] = {"reward": {"verifier": "exact", "baseline": "running"} | named | values}

    return write


def quick(folder: Path, job: Tree) -> None:
    job["data"]["verifiers"] = {"timeout_s": 0.5}


def helper(folder: Path, job: Tree) -> None:
    (folder / "beside_the_reward.py").write_text("def right(response, answer):\n    return 1.0\n")


def rollout(**values: Any) -> Write:
    return both(lines(*GOOD), lambda folder, job: job["rollout"].update(values))


def teacher(*rows: Any, **values: Any) -> Write:
    return both(lines(*(rows or GOOD)), lambda folder, job: job["teacher"].update(values))


def own_teacher(**values: Any) -> Write:
    """Its model is the student's."""
    return both(lines(*GOOD), lambda folder, job: job["teacher"].update({"model": job["student"]["model"]} | values))


def spoilt(value: float, part: str) -> Callable[[Path], None]:
    def spoil(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if part in name:
            tensor = tensor.clone()
            tensor.view(-1)[5] = value
        return {name: tensor}

    return weights(spoil)


F = "def f(r, a):\n    "
SCHEMA = {"prompt": "x", "answer": '{"type": "objekt"}'}


def world(code: str = "", **settings: Any) -> Write:
    """An environment of the job's own, in a file beside it."""

    def write(folder: Path, job: Tree) -> None:
        lines(*GOOD)(folder, job)
        (folder / "world.py").write_text(code)
        job.update(environment={"entry": str(folder / "world.py:World")} | settings, objective={"golden_weight": 0})

    return write


WORLD = "class World:\n    def open(self, row):\n        return self\n\n    def answer(self, message):\n        return [], 1.0, True\n"
TOOL = 'def add(a: int, b: int) -> int:\n    """Adds.\n\n    Args:\n        a: one\n        b: other\n    """\n    return a + b\n'


def tools(code: str, *names: str) -> Write:
    return lambda folder, job: world(code, entry=None, tools=[f"{folder}/world.py:{name}" for name in names])(folder, job)


TASKS = [
    Case("an environment", 0, ["world.py:World"], world(WORLD)),
    Case("an environment without its method", 2, ["it has no method open(row)"], world("class World:\n    pass\n")),
    Case("an environment that does not start", 2, ["it does not start (ValueError: no board)"], world("class World:\n    def __init__(self):\n        raise ValueError('no board')\n")),
    Case("an environment that is not there", 2, ["world.py"], world("x = 1\n")),
    Case("an environment and tools", 2, ["name an entry, or tools"], world(WORLD, tools=["a.py:b"])),
    Case("tools without a chat template", 0, ["1 tools", "a chat template tells the student of its tools"], tools(TOOL, "add")),
    Case("a tool without hints", 2, ["environment.tools add", "add type hints and a docstring"], tools("def add(a, b):\n    return a + b\n", "add")),
    Case("a tool that is no function", 2, ["it is no function"], tools("add = 3\n", "add")),
    Case("one tool twice", 2, ["there is a tool add already"], tools(TOOL, "add", "add")),
    Case("an addition", 0, ["32,768 parameters, 38.58% of the model's"], lora()),
    Case("an addition by peft's names", 2, ["student.lora.r: unknown key", "lora_alpha: unknown key; did you mean alpha?", "did you mean targets?"], lora(r=8, lora_alpha=16, target_modules=["q_proj"])),
    Case("an addition larger than the model", 0, ["student.lora.rank: 512 makes the addition larger than the model"], lora(rank=512)),
    Case("an addition to all-linear", 2, ["no linear layer all-linear; choose from down_proj"], lora(targets=["all-linear"])),
    Case("an addition to the head", 2, ["no linear layer lm_head (head and embeddings take no addition)"], lora(targets=["lm_head"])),
    Case("an adapter to go on from", 0, ["1,792 parameters"], adapter(lambda tensors, told: None)),
    Case("an adapter that is not there", 2, ["absent is no adapter in peft's format"], lora(start_from="absent")),
    Case("an adapter that is torn", 2, ["is no adapter in peft's format", "header"], both(adapter(lambda tensors, told: None), torn)),
    Case("an adapter whose config is a list", 2, ["is no adapter in peft's format"], adapter(lambda tensors, told: told.update(whole=[]))),
    Case("an adapter without a rank", 2, ["is no adapter in peft's format (no key 'r')"], adapter(lambda tensors, told: told.pop("r"))),
    Case("an adapter whose alpha is a word", 2, ["is no adapter in peft's format"], adapter(lambda tensors, told: told.update(lora_alpha="x"))),
    Case("an adapter of another kind", 2, ["is a IA3 adapter, not LORA"], adapter(lambda tensors, told: told.update(peft_type="IA3"))),
    Case("an adapter of NaN", 2, ["q_proj.lora_A.weight holds NaN"], adapter(lambda tensors, told: tensors[min(tensors)].fill_(float("nan")))),
    Case("an adapter of another rank", 2, ["has rank 4 and alpha 8, the job 8 and 8"], adapter(lambda tensors, told: None, rank=8)),
    Case("an adapter in rsLoRA", 2, ["uses use_rslora, which is not known here"], adapter(lambda tensors, told: told.update(use_rslora=True))),
    Case("an addition and a teacher that follows", 2, ["remove student.lora"], both(own_teacher(follow={"every_steps": 5}), lambda folder, job: job["student"].update(lora={}))),
    Case("a student of NaN", 3, ["model.layers.1.mlp.up_proj.weight holds NaN or infinity"], changed("student", spoilt(float("nan"), "layers.1.mlp.up_proj"))),
    Case("a teacher of infinity", 3, ["teacher teacher: model", "lm_head.weight holds NaN or infinity"], changed("teacher", spoilt(float("inf"), "lm_head"))),
    Case("a reward for one sample a prompt", 2, ["rollout.samples_per_prompt is 1; set it to 2 or more"], reward(baseline="group")),
    Case("a reward that hangs", 2, ["says nothing for 0.5 s (data.verifiers.timeout_s)"], both(reward("import time\n" + F + "time.sleep(60)"), quick)),
    Case("a reward that ends its process", 2, ["objective.reward.verifier", "its process ended with exit code 11"], reward("import os\n" + F + "os._exit(11)")),
    Case("a reward that crashes", 2, ["its process ended with signal 11"], reward("import os\n" + F + "os.kill(os.getpid(), 11)")),
    Case("a reward that takes all memory", 2, ["it ran out of memory"], reward(F + "return len(bytearray(10**11))")),
    Case("a reward that ends its process as it loads", 2, ["its process ended with exit code 0"], reward("import os\nos._exit(0)\n")),
    Case("a reward that prints", 0, ["verifier"], reward("print('loaded')\n" + F + "print('judged'); return 1.0")),
    Case("a reward that imports what lies beside it", 0, ["verifier"], both(reward("from beside_the_reward import right as f\n"), helper)),
    Case("a reward that imports what is not there", 2, ["does not load (ModuleNotFoundError: No module named 'nopackage')"], reward("import nopackage\n" + F + "return 1.0")),
    Case("a reward that gives a pair", 2, ["it gives (1.0, 'ok'), neither true, false nor a finite number"], reward(F + "return 1.0, 'ok'")),
    Case("a reward that is a class", 2, ["takes no arguments"], reward("class f:\n    pass\n")),
    Case("a reward without a function", 2, ["objective.reward.verifier r.py: expected exact"], reward(verifier="r.py")),
    Case("a reward from a server that is down", 2, ["http://127.0.0.1:9/score: on response and answer", "Connection refused"], reward(verifier="http://127.0.0.1:9/score")),
    Case("held-out answers for a server that is down", 2, ["data.eval.verifier http://127.0.0.1:9/score", "Connection refused"], held_out({"prompt": "x", "answer": "1"}, verifier="http://127.0.0.1:9/score")),
    Case("a reward on rows without an answer", 2, ["no column 'answer' to verify against", "unset objective.reward"], reward("", {"prompt": "x"})),
    Case("a schema that is none", 2, ["is no JSON schema ('objekt' is not valid"], reward("", SCHEMA, verifier="json-schema")),
    Case("tests that are no Python", 2, ["answer 'assert f(' is no Python"], reward("", {"prompt": "x", "answer": "assert f("}, verifier="unit-tests")),
    Case("prompts drawn by verdicts that nobody gives", 2, ["nothing judges them: set objective.reward"], both(lines(*GOOD), lambda folder, job: job["data"].update(select={"prefer": "mixed"}))),
    Case("a thinking budget without marks", 2, ["has none of the known marks of thinking"], rollout(thinking_budget_tokens=8)),
    Case("marks of thinking beyond the tokenizer", 2, ["rollout.thinking_ids: 9999 is no id of the student's tokenizer"], rollout(thinking_ids=[3, 9999])),
    Case("one mark of thinking twice", 2, ["4 both begins and ends the thinking part"], rollout(thinking_ids=[4, 4])),
    Case("a mark of thinking that stops", 2, ["1 is a stop id: the response would end with its thinking"], rollout(thinking_ids=[4, 1])),
    Case("a thinking budget above the cap", 0, ["800 is never reached, rollout.max_new_tokens is 32"], rollout(thinking_ids=[3, 4], thinking_budget_tokens=800)),
    Case("a teacher that follows somebody else", 2, ["begins as a copy of the student", "set it to"], teacher(follow={"every_steps": 5})),
    Case("a teacher that follows twice", 2, ["follow: name one of every_steps and ema"], own_teacher(follow={"every_steps": 5, "ema": 0.9})),
    Case("a hint that no row has", 2, ["column 'hint' is empty, and teacher.context names it", "write braces that are text twice"], teacher(context="{hint}")),
    Case("a hint that is NaN", 2, ["column 'hint' is empty"], teacher('{"prompt": "x", "hint": NaN}', context="{hint}")),
    Case("a hint with LaTeX", 2, ["teacher.0.context: {} is no column's name", "write a brace of the text twice"], teacher(context="Use \\boxed{}")),
    Case("a hint with a width", 2, ["{hint!r:>10} is no column's name"], teacher({"prompt": "x", "hint": "y"}, context="{hint!r:>10}")),
    Case("a hint beside no user message", 2, ["no user message that teacher.context could stand before"], teacher({"prompt": [USER | {"role": "system"}], "hint": "y"}, context="{hint}"), "chat"),
    Case("a demonstration without its place", 2, ["teacher.0.demonstration: it must hold {demonstration} once"], teacher(demonstration="Like: {demo}")),
    Case("a demonstration out of one sample", 2, ["rollout.samples_per_prompt is 1; set it to 2 or more"], teacher(demonstration="Like: {demonstration}")),
    Case("a teacher's own tokens and the whole vocabulary", 3, ["objective.support full needs one vocabulary"], both(teacher(tokenizer="own"), lambda folder, job: job.update(objective={"support": "full"}))),
    Case("weights of a teacher that is none", 2, ["names 'nobody'; the teachers of the row's domain are teacher"], lines({"prompt": "x", "teacher_weights": {"nobody": 1}})),
]  # fmt: skip
