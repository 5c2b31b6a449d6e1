"""Real TRL on the curriculum of the collapse benchmark, with the governor's callback and without; in TRL's own environment.

    PYTHONPATH=. .venv-trl/bin/python tests/bench/sidecar/trl_curriculum.py plain|governed SEED OUT

Writes OUT/trainer_state.json (TRL's own log), OUT/accuracy.jsonl (held-out, T = 1, every 20 steps) and OUT/machine.json.
"""

import json
import os
import platform
import shutil
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer

from opd_governor.services.sidecar.golden import golden_lengths
from opd_governor.trl import LengthGovernorCallback

SUMS = Path(__file__).parents[3] / "deploy" / "sums"
CAP_TOKENS, ROLLOUTS, STEPS, EVERY_STEPS = 192, 32, 140, 20
NUM_REFERENCE_PROMPTS = 512


class HeldOut(TrainerCallback):
    """Accuracy at T = 1 on the held-out problems; the trainer's random state is left as it was."""

    def __init__(self, tokenizer: Any, out: Path, limit: int = 512) -> None:
        self._tokenizer, self._out = tokenizer, out
        self._rows = [json.loads(line) for line in (SUMS / "eval_3_14.jsonl").read_text().splitlines()][:limit]

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % EVERY_STEPS:
            return
        kept = torch.get_rng_state()
        torch.manual_seed(1)
        right = cut = 0
        model.eval()
        for start in range(0, len(self._rows), 128):
            rows = self._rows[start : start + 128]
            batch = self._tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True, padding_side="left")
            ids_BT = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                max_new_tokens=CAP_TOKENS,
                do_sample=True,
                top_k=0,
                pad_token_id=self._tokenizer.pad_token_id,
            )
            for row, ids in zip(rows, ids_BT[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                stopped = self._tokenizer.eos_token_id in ids
                text = self._tokenizer.decode(ids, skip_special_tokens=True)
                cut += not stopped
                right += stopped and text.replace(" ", "").partition("!")[2].strip("$_") == row["answer"]
        model.train()
        torch.set_rng_state(kept)
        line = {"step": state.global_step, "accuracy": right / len(self._rows), "truncation": cut / len(self._rows)}
        with (self._out / "accuracy.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")


def main(arm: str, seed: int, out: Path) -> None:
    torch.set_num_threads(1)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(SUMS / "student", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (SUMS / "prompts_curriculum.jsonl").read_text().splitlines()]
    teacher = AutoModelForCausalLM.from_pretrained(SUMS / "teacher", dtype=torch.float32)
    config = DistillationConfig(
        output_dir=str(out / "trl"),
        max_steps=STEPS,
        per_device_train_batch_size=ROLLOUTS,
        max_completion_length=CAP_TOKENS,
        temperature=1.0,
        beta=1.0,
        learning_rate=float(os.environ.get("LEARNING_RATE", "1e-3")),
        lr_scheduler_type="constant",
        warmup_steps=0,
        adam_beta2=0.95,
        max_grad_norm=1.0,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="steps" if arm == "governed" else "no",
        save_steps=10,
        report_to=[],
        disable_tqdm=True,
        seed=seed,
    )
    # ---- the governor: from here
    governor = None
    if arm == "governed":
        spread = prompts[:: max(1, len(prompts) // NUM_REFERENCE_PROMPTS)]
        torch.manual_seed(seed)
        golden = golden_lengths(teacher, tokenizer, spread, max_new_tokens=CAP_TOKENS)
        governor = LengthGovernorCallback(reference=golden.finished, out=out)
    # ---- to here
    trainer = DistillationTrainer(
        model=AutoModelForCausalLM.from_pretrained(SUMS / "student", dtype=torch.float32),
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        processing_class=tokenizer,
        callbacks=[HeldOut(tokenizer, out), *([governor] if governor else [])],
    )
    started = time.perf_counter()
    governor.train(trainer) if governor else trainer.train()
    trainer.state.save_to_json(str(out / "trainer_state.json"))
    shutil.rmtree(out / "trl", ignore_errors=True)
    packages = ("trl", "transformers", "torch")
    figures = {"arm": arm, "seed": seed, "seconds": time.perf_counter() - started, "learning_rate": config.learning_rate}
    machine = {"machine": platform.machine(), "cpu_count": os.cpu_count(), "python": platform.python_version()}
    (out / "machine.json").write_text(json.dumps(figures | machine | {name: version(name) for name in packages}, indent=1))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
