"""TRL's DistillationTrainer on one workload, in TRL's own environment (requirements.txt beside this file); `bench.py` calls it.

    .venv-trl/bin/python tests/bench/trl/trl_side.py WORKLOAD.json OUT

WORKLOAD.json is `bench.py`'s Workload. Writes OUT/steps.jsonl, one line a step as it ends, and the student at the steps asked
for. A step is everything from one step's beginning to its end: generation, teacher, loss, backward, optimiser; writing a student
is left out.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer


class StepClock(TrainerCallback):
    """Seconds and completion tokens of every whole step."""

    def __init__(self, work: dict[str, Any], out: Path, tokenizer: Any) -> None:
        self._work, self._out, self._tokenizer = work, out, tokenizer
        self._started = self._seconds = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._started
        if state.global_step in self._work["save_steps"]:
            folder = self._out / f"student-{state.global_step}"
            model.save_pretrained(folder)
            self._tokenizer.save_pretrained(folder)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if not logs or "completions/mean_length" not in logs:
            return
        line = {
            "step": state.global_step,
            "seconds": self._seconds,
            "tokens": round(logs["completions/mean_length"] * self._work["rollouts_per_step"]),
            "truncation": logs["completions/clipped_ratio"],
            "loss": logs["loss"],
        }
        with (self._out / "steps.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


class FirstStepBegins(TrainerCallback):
    """When generation of the first step begins, for the start-up figure."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        (self._out / "first_step_at").write_text(str(time.time()))


def main(work: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(work["threads"])
    tokenizer = AutoTokenizer.from_pretrained(work["student"], padding_side="left")
    rows = [json.loads(line) for line in Path(work["prompts"]).read_text().splitlines()]
    for row in rows:  # the very ids that the other side samples from
        ids = tokenizer(row["prompt"])["input_ids"]
        if ids != row["token_ids"]:
            raise ValueError(f"prompt {row['prompt']!r}: {ids} here, {row['token_ids']} on the other side")
    bfloat16 = work["dtype"] == "bfloat16"
    student = AutoModelForCausalLM.from_pretrained(work["student"], dtype=torch.float32)
    if work["freeze_embeddings"]:
        student.get_input_embeddings().requires_grad_(False)
    teacher = AutoModelForCausalLM.from_pretrained(work["teacher"], dtype=getattr(torch, work["dtype"]))
    micro = work["trl_micro_batch"]
    config = DistillationConfig(
        output_dir=str(out),
        max_steps=work["steps"],
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=work["rollouts_per_step"] // micro,
        max_completion_length=work["max_new_tokens"],
        temperature=1.0,
        beta=1.0,  # reverse KL, over the whole vocabulary
        learning_rate=work["learning_rate"],
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch_fused",
        adam_beta1=work["betas"][0],
        adam_beta2=work["betas"][1],
        weight_decay=0.0,
        max_grad_norm=work["max_grad_norm"],
        bf16=bfloat16,
        gradient_checkpointing=False,  # the default True costs a forward pass and buys memory nobody is short of here
        shuffle_dataset=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=work["seed"],
    )
    trainer = DistillationTrainer(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in rows]),
        processing_class=tokenizer,
        callbacks=[StepClock(work, out, tokenizer), FirstStepBegins(out)],
    )
    trainer.train()


if __name__ == "__main__":
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    folder = Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    main(json.loads(Path(sys.argv[1]).read_text()), folder)
