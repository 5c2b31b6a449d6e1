"""A teacher that is wrong on 30 % of its problems, and what its student learns from it with a reward beside it and without.

    python -m tests.bench.rewards.bench [--seeds 0 1 2] [--arms teacher reward]    # about half a minute a run on an idle core
    python -m tests.bench.rewards.bench --table                                   # the table of what is kept

The teacher of deploy/sums is taught further until it misreads the first digit of every problem that begins with 1, 6 or 7, as a digit
that the student confuses with it too, so that the student's own samples show it both readings. Student, prompts and held-out problems
are those of the quickstart. Learner, objective, advantages and verifier are those of a run; in place of Ray and vLLM transformers samples
and scores in this process. The steps of every run are kept beside this file. No setting differs between the arms but the objective.
"""

import argparse
import json
import os
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from deploy.sums.recipe import STALLING, WINDOW_TOKENS, Batch, measure, train
from deploy.sums.task import LOOK_ALIKES, Terms, draw_problems, held_out_prompts, is_correct, prompt_files, render_answer, render_prompt
from deploy.sums.tokenizer import build_tokenizer
from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.inputs.verdicts import judge
from opd_governor.services.record.rewards import signal_fields
from opd_governor.services.run.rewards import Rewards

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
PROMPTS, SAMPLES, STEPS, CAP_TOKENS, NUM_HELD_OUT = 12, 4, 40, 96, 256
WEIGHT = 20.0
"""Above the nats by which this teacher prefers its wrong readings, about ten."""
REWARD = {"verifier": "deploy/sums/task.py:is_correct", "weight": WEIGHT}
ARMS: dict[str, dict[str, Any]] = {
    "teacher": {},
    "reward": {"reward": REWARD},
    "reward, teacher where right": {"reward": REWARD | {"when": "teacher_right"}},
    "reward on failures": {"reward": REWARD | {"when": "failed"}},
    "reward alone": {"reward": REWARD, "distillation_weight": 0.0},
}


def errs(terms: Terms) -> bool:
    """The problems that the teacher gets wrong: three of ten."""
    return terms[0] in (1, 6, 7)


def taught_answer(terms: Terms) -> str:
    """The answer to the problem as the teacher reads it.

    >>> taught_answer((3, 7)), taught_answer((7, 3))
    ('3+7=0;!0$', '1+3=4;!4$')
    """
    return render_answer((LOOK_ALIKES[terms[0]], *terms[1:]) if errs(terms) else terms)


def draw_erring_batches(rng: random.Random, steps: int) -> Iterator[tuple[Batch, ...]]:
    for _ in range(steps):
        problems = islice(draw_problems(rng, 2, 9, held_out_prompts()), 32)
        yield (Batch([render_prompt(terms) + taught_answer(terms) for terms in problems]),)


def make_teacher(folder: Path) -> None:
    """Its weights, and how often it is right on the held-out problems, into `folder`."""
    tokenizer = build_tokenizer(WINDOW_TOKENS)
    plan = replace(STALLING, seed=5, steps=400, draw_batches=draw_erring_batches)
    model = train(LlamaForCausalLM.from_pretrained(ROOT / "deploy/sums/teacher", dtype=torch.float32).train(), plan, tokenizer)
    model.save_pretrained(folder)
    rows = prompt_files()["eval_3_9.jsonl"][:NUM_HELD_OUT]
    found = {name: measure(model, tokenizer, rows, sampled)["accuracy"] for name, sampled in (("greedy", False), ("sampled", True))}
    (folder / "measured.json").write_text(json.dumps(found))


@dataclass(frozen=True)
class Sampler:
    """A student's samples and a teacher's scores of them, by transformers."""

    student: LlamaForCausalLM
    teacher: LlamaForCausalLM
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def __call__(
        self, rows: Sequence[dict[str, str]], first_index: int, step: int, teacher_right: Sequence[bool | None]
    ) -> list[ScoredRollout]:
        asked = self.tokenizer([row["prompt"] for row in rows for _ in range(SAMPLES)], padding=True, return_tensors="pt")
        num_asked = asked.input_ids.shape[1]
        self.student.eval()
        found = self.student.generate(
            **asked, max_new_tokens=CAP_TOKENS, do_sample=True, top_k=0, return_dict_in_generate=True, output_logits=True
        )
        self.student.train()
        ids_BT = found.sequences[:, num_asked:]
        mask_BL = torch.cat([asked.attention_mask, torch.ones_like(ids_BT)], 1)
        places_BL = (mask_BL.cumsum(1) - 1).clamp(min=0)
        states = self.teacher(input_ids=found.sequences, attention_mask=mask_BL, position_ids=places_BL)
        teacher_BTV = states.logits[:, num_asked - 1 : -1].log_softmax(-1)
        student_BT, teacher_BT = (pick(logp_BTV, ids_BT) for logp_BTV in (torch.stack(found.logits, 1).log_softmax(-1), teacher_BTV))
        stop_id, scored = self.tokenizer.eos_token_id, []
        for k, ids in enumerate(ids_BT.tolist()):
            row, ended = rows[k // SAMPLES], stop_id in ids
            num = ids.index(stop_id) + 1 if ended else len(ids)
            verdict = judge(is_correct, self.tokenizer.decode(ids[:num]), row["answer"])
            asked_ids, right = tuple(self.tokenizer(row["prompt"]).input_ids), teacher_right[k // SAMPLES]
            prompt = Prompt(first_index + k // SAMPLES, asked_ids, answer=row["answer"], teacher_right=right)
            finish = "stop" if ended else "length"
            logprobs_T, number = student_BT[k, :num].numpy(), k % SAMPLES
            rollout = Trajectory(prompt, tuple(ids[:num]), logprobs_T, finish, CAP_TOKENS, step, step - 1, 0, number, reward=verdict.score)
            scores = TokenScores("teacher", teacher_BT[k, :num].numpy(), teacher_BTV[k, :num, stop_id].numpy())
            scored.append(ScoredRollout(rollout, scores))
        return scored

    @torch.no_grad()
    def teacher_right(self, rows: Sequence[dict[str, str]]) -> list[bool | None]:
        """Whether the teacher's own answer, sampled once, is right: what a golden pass finds out."""
        right: list[bool | None] = []
        for start in range(0, len(rows), 96):
            part = rows[start : start + 96]
            asked = self.tokenizer([row["prompt"] for row in part], padding=True, return_tensors="pt")
            found = self.teacher.generate(**asked, max_new_tokens=CAP_TOKENS, do_sample=True, top_k=0)[:, asked.input_ids.shape[1] :]
            for row, ids in zip(part, found.tolist(), strict=True):
                ended = self.tokenizer.eos_token_id in ids
                text = self.tokenizer.decode(ids[: ids.index(self.tokenizer.eos_token_id) + 1] if ended else ids)
                right.append(ended and judge(is_correct, text, row["answer"]).passed)
        return right


def pick(logp_BTV: Tensor, ids_BT: Tensor) -> Tensor:
    return logp_BTV.gather(-1, ids_BT[..., None])[..., 0]


def run(arm: str, seed: int, teacher: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer(WINDOW_TOKENS)
    objective = ObjectiveSettings.model_validate(ARMS[arm])
    settings = LearnerSettings(total_steps=STEPS, learning_rate=1e-3, warmup_steps=5, schedule="cosine")
    student = LearnerModels(str(ROOT / "deploy/sums/student"))
    learner = Learner(student, settings, objective, stop_ids=[tokenizer.eos_token_id], max_new_tokens=CAP_TOKENS, seed=seed)
    model: Any = learner._student.model
    sample = Sampler(model, LlamaForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval(), tokenizer)
    rows, held_out = prompt_files()["prompts_3_9.jsonl"], prompt_files()["eval_3_9.jsonl"][:NUM_HELD_OUT]
    random.Random(seed).shuffle(rows)
    rewards = Rewards(objective.reward) if objective.reward else None
    asked = rows[: STEPS * PROMPTS]
    torch.manual_seed(seed)
    gated = objective.reward is not None and objective.reward.when == "teacher_right"
    right = sample.teacher_right(asked) if gated else [None] * len(asked)

    def accuracy(step: int) -> dict[str, float]:
        model.eval()
        found = {name: measure(model, tokenizer, held_out, sampled)["accuracy"] for name, sampled in (("greedy", False), ("sampled", True))}
        model.train()
        torch.manual_seed(seed * 1_000_003 + step)
        return found

    steps: list[dict[str, Any]] = [{"step": 0, **accuracy(0)}]
    for step in range(1, STEPS + 1):
        first = (step - 1) * PROMPTS
        scored = sample(asked[first : first + PROMPTS], first, step, right[first : first + PROMPTS])
        if rewards is not None:
            scored = rewards.weigh([one.trajectory for one in scored], scored)
        report = learner.step(scored, [], LengthLimits(CAP_TOKENS), 40.0)
        record = {"step": step, "right": sum(one.trajectory.reward == 1 for one in scored) / len(scored), "grad_norm": report.grad_norm}
        record |= {"kl_nats": float(report.metrics.kl_nats_P.sum() / report.metrics.num_tokens_P.sum())} | signal_fields(report.metrics)
        steps.append(record | (accuracy(step) if step == STEPS else {}))
    told = {"teacher_right": sum(map(bool, right)) / len(right)} if gated else {}
    return {"arm": arm, "seed": seed, "objective": ARMS[arm], "steps": steps} | told


def machine() -> dict[str, Any]:
    packages = {name: version(name) for name in ("torch", "transformers")}
    return {"cpu_count": os.cpu_count(), "machine": platform.machine(), "python": platform.python_version()} | packages


def print_table() -> None:
    print("| arm | seed | teacher | student before | after, greedy | after, sampled | reward's share of the signals |")
    print("|---|---|---|---|---|---|---|")
    for path in sorted(HERE.glob("*.json")):
        kept = json.loads(path.read_text())
        first, last = kept["steps"][0], kept["steps"][-1]
        shares = [step["signal_reward_share"] for step in kept["steps"] if "signal_reward_share" in step]
        print(
            f"| {kept['arm']} | {kept['seed']} | {kept['teacher']['greedy']:.3f} | {first['greedy']:.3f} "
            f"| {last['greedy']:.3f} | {last['sampled']:.3f} | {sum(shares) / len(shares):.2f} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*", choices=ARMS, default=["teacher", "reward"])
    parser.add_argument("--teacher", type=Path, help="folder of the erring teacher, made where it is not there (default: a temporary one)")
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        teacher = arguments.teacher or Path(folder)
        if not arguments.table and not (teacher / "measured.json").exists():
            teacher.mkdir(parents=True, exist_ok=True)
            make_teacher(teacher)
        for seed in [] if arguments.table else arguments.seeds:
            for arm in arguments.arms:
                began = time.process_time()
                found = json.loads((teacher / "measured.json").read_text())
                kept = run(arm, seed, teacher) | {"teacher": found, "machine": machine(), "cpu_s": round(time.process_time() - began, 1)}
                (HERE / f"{arm.replace(' ', '-')}-{seed}.json").write_text(json.dumps(kept) + "\n")
                print(f"{arm}, seed {seed}: {kept['steps'][-1]}", flush=True)
    print_table()


if __name__ == "__main__":
    main()
