"""Which knobs really move in the TRL that is installed: each trainer trains six steps, everything is turned after the second.

    PYTHONPATH=. .venv-trl/bin/python tests/bench/sidecar/trl_knobs.py

In TRL's own environment. Prints one JSON line a trainer: what was read, the longest completion before and after, the learning rate
in the optimizer, and what the callback found ignored.
"""

import json
import logging
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from trl import DistillationConfig, DistillationTrainer, GRPOConfig, GRPOTrainer

from opd_governor.client import AT_REST
from opd_governor.trl import LengthGovernorCallback

SUMS = Path(__file__).parents[3] / "deploy" / "sums"
CAP_TOKENS, LOWERED_TOKENS, TURN_AT = 64, 12, 2


class Turned:
    """In place of the law: at rest up to TURN_AT, then everything at once."""

    def advise(self, seen: Any, finish_reasons: Any, golden: Any) -> dict[str, Any]:
        limits = dict(AT_REST)
        if seen.step >= TURN_AT:
            limits |= {"cap_tokens": LOWERED_TOKENS, "lr_scale": 0.5, "golden_weight": 1.0, "reference_kl_weight": 0.2}
        return {"step": seen.step, "pressure": 0.0, "limits": limits, "action": "hold", "reason": "", "healthy": True}


class Rates(TrainerCallback):
    """The learning rate that the optimizer uses."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


class Heard(logging.Handler):
    """What the callback found ignored."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def common(out: Path) -> dict[str, Any]:
    return {
        "output_dir": str(out),
        "max_steps": 6,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "seed": 0,
    }


def trainers(out: Path) -> dict[str, Any]:
    """Name -> a function that builds the trainer with these callbacks."""
    tokenizer = AutoTokenizer.from_pretrained(SUMS / "student", padding_side="left")
    prompts = [json.loads(line)["prompt"] for line in (SUMS / "prompts_3_9.jsonl").read_text().splitlines()[:64]]
    rows = Dataset.from_list([{"prompt": prompt} for prompt in prompts])

    def model(name: str) -> Any:
        return AutoModelForCausalLM.from_pretrained(SUMS / name, dtype=torch.float32)

    def distillation(callbacks: list[Any]) -> Any:
        config = DistillationConfig(**common(out), max_completion_length=CAP_TOKENS)
        return DistillationTrainer(
            model=model("student"),
            teacher_model=model("teacher"),
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def grpo(callbacks: list[Any]) -> Any:
        config = GRPOConfig(**common(out), max_completion_length=CAP_TOKENS, num_generations=4, beta=0.04)
        return GRPOTrainer(
            model=model("student"),
            reward_funcs=lambda completions, **_: [float(len(text)) for text in completions],
            args=config,
            train_dataset=rows,
            processing_class=tokenizer,
            callbacks=callbacks,
        )

    def gold(callbacks: list[Any]) -> Any:
        from trl.experimental.gold import GOLDConfig, GOLDTrainer

        # GOLD aligns texts by bytes and takes byte-level tokenizers only.
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        bpe.train_from_iterator(prompts, BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<pad>", "<eos>"]))
        byte_level = PreTrainedTokenizerFast(tokenizer_object=bpe, pad_token="<pad>", eos_token="<eos>")
        byte_level.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        shape = LlamaConfig(
            vocab_size=len(byte_level),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            eos_token_id=1,
            pad_token_id=0,
        )
        answer = {"role": "assistant", "content": "1+1=2;!2"}
        chat = Dataset.from_list([{"messages": [{"role": "user", "content": prompt}, answer]} for prompt in prompts])
        config = GOLDConfig(**common(out), max_completion_length=CAP_TOKENS, max_length=128, lmbda=1.0, use_uld_loss=False)
        return GOLDTrainer(
            model=LlamaForCausalLM(shape),
            teacher_model=LlamaForCausalLM(shape),
            args=config,
            train_dataset=chat,
            processing_class=byte_level,
            callbacks=callbacks,
        )

    return {"DistillationTrainer": distillation, "GRPOTrainer": grpo, "GOLDTrainer": gold}


def main() -> None:
    torch.set_num_threads(1)
    heard = Heard()
    logging.getLogger("opd_governor").addHandler(heard)
    failed = False
    for name in trainers(Path("unused")):
        heard.lines.clear()
        with tempfile.TemporaryDirectory() as scratch:
            governor, rates = LengthGovernorCallback(), Rates()
            trainer = trainers(Path(scratch))[name]([governor, rates])
            governor.attach(trainer)
            governor._adviser = Turned()
            before = dict(governor._held)
            governor.train(trainer)
            lines = [json.loads(line) for line in (Path(scratch) / "governor" / "metrics.jsonl").read_text().splitlines()]
        early = [line["length_max"] for line in lines if line["step"] <= TURN_AT]
        late = [line["length_max"] for line in lines if line["step"] > TURN_AT]
        found = {
            "trainer": name,
            "knobs": before,
            "turned": governor._told,
            "longest_before": max(early),
            "longest_after": max(late) if late else None,  # GOLD: nothing is sampled where no batch is on-policy
            "learning_rates": rates.used,
            "ignored": list(heard.lines),
            "trl": version("trl"),
        }
        failed |= bool(heard.lines) or (bool(late) and max(late) > LOWERED_TOKENS)
        print(json.dumps(found))
    sys.exit(failed)


if __name__ == "__main__":
    main()
