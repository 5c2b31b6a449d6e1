"""What the law would have done on the kept runs of the collapse benchmark: open loop, on their own lengths, loops, KL and stop mass.

    python -m tests.bench.governor.recorded          # prints, and writes recorded.json beside this file

The reference is the shipped teacher's answers at T = 1 to the runs' own prompts (teacher_lengths.json; a minute on one core to make again).
"""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from opd_governor.actors.governor import law
from opd_governor.actors.governor.evidence import Observation
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.reference import Answer, LengthModel, fit_lengths
from opd_governor.actors.governor.signals import KL_FLOOR_NATS, STOP_MASS_FLOOR, Signals
from opd_governor.actors.rollout.loops import find_loop
from opd_governor.actors.trajectory import LengthLimits

HERE = Path(__file__).parent
SUMS = HERE.parents[2] / "deploy/sums"
COLLAPSE = HERE.parent / "collapse"
ANSWERS = HERE / "teacher_lengths.json"
CAP_TOKENS = 192
ACTED, LATE_TRUNCATION = 0.05, 0.1
PROMPTS = {"prompts_curriculum.jsonl": 4480, "prompts_3_9.jsonl": 512}
"""File -> prompts that the golden pass of those runs asked."""
RUNS = (
    *(("plain-opd", seed, "prompts_curriculum.jsonl") for seed in (0, 1, 2)),
    ("healthy-off", 0, "prompts_3_9.jsonl"),
    ("terse-plain", 0, "prompts_3_9.jsonl"),
)


def make_answers() -> dict[str, list[Any]]:
    """File -> [prompt index, prompt tokens, tokens, complete, stuck] of each of the teacher's answers."""
    from transformers import AutoTokenizer

    from opd_governor.actors.teacher.scorers import GenerateOptions, TorchScorer
    from opd_governor.actors.teacher.settings import TeacherSettings

    tokenizer = AutoTokenizer.from_pretrained(SUMS / "teacher")
    stop_id = tokenizer.eos_token_id
    scorer = TorchScorer(TeacherSettings(model=str(SUMS / "teacher"), batch_tokens=1 << 16), (stop_id,))
    made: dict[str, list[Any]] = {}
    for name, num in PROMPTS.items():
        texts = [json.loads(line)["prompt"] for line in (SUMS / name).read_text().splitlines()]
        ids = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        chosen = np.random.default_rng(0).permutation(len(ids))[:num].tolist()
        answers = scorer.generate([ids[index] for index in chosen], GenerateOptions(max_new_tokens=CAP_TOKENS, temperature=1.0))
        rows = []
        for index, answer in zip(chosen, answers, strict=True):
            stuck = find_loop(answer[:-1], min_repeats=3, min_tokens=24) is not None
            rows.append([index, len(ids[index]), len(answer), answer[-1] == stop_id and not stuck, stuck])
        made[name] = rows
    return made


def watch(records: list[dict[str, Any]], model: LengthModel, prompt_tokens: dict[int, int]) -> dict[str, Any]:
    """First action, the step at which truncation passes LATE_TRUNCATION, share of steps under pressure."""
    policy, base = Policy(mode="observe"), LengthLimits(cap_tokens=CAP_TOKENS)
    state, first, reason, late, pressures = law.start(policy, base), None, "", None, []
    for record in records:
        if not record["num_rollouts"]:
            continue
        state, _, decision = law.decide(state, signals_of(record, model, prompt_tokens), policy, base, record["step"])
        pressures.append(state.pressure)
        if first is None and state.pressure > ACTED:
            first, reason = record["step"], decision.reason
        if late is None and record["truncation"] > LATE_TRUNCATION:
            late = record["step"]
    return {
        "first_action": first,
        "reason": reason.partition(": pressure")[0],
        "truncation_passes_late_at": late,
        "pressed_share": float(np.mean(np.array(pressures) > ACTED)),
        "steps": len(pressures),
    }


def signals_of(record: dict[str, Any], model: LengthModel, prompt_tokens: dict[int, int]) -> Signals:
    tokens_N = np.array(record["lengths"])
    num = len(tokens_N)
    mu_N = np.array([model.mu(index, prompt_tokens[index], "") for _, index in record["prompts"]])
    found = model.measure(tokens_N, np.full(num, CAP_TOKENS), tokens_N >= CAP_TOKENS, mu_N)
    lengths = Observation(float(found.nats_N.mean()), num, spread=model.spread_nats, variance=float(found.nats_N.var()))
    expected = float(found.tail_probability_N.mean())
    seen = {
        "length": lengths,
        "short": lengths,
        "tail": Observation(float(found.in_tail_N.mean()), num, expected),
        "loops": Observation(record["loops"], num),
        "kl": Observation(math.log(max(KL_FLOOR_NATS, record["kl_nats"])), 1.0),
    }
    if record["stop_mass_teacher"] > STOP_MASS_FLOOR:
        ratio = max(STOP_MASS_FLOOR, record["stop_mass_student"]) / record["stop_mass_teacher"]
        seen["stop_mass"] = Observation(math.log(ratio), 1.0)
    return Signals(
        steps_spanned=1.0,
        num_rollouts=num,
        observations=seen,
        truncation_rate=record["truncation"],
        governor_cut_rate=0.0,
        expected_cut_rate=expected,
        loop_rate=record["loops"],
    )


def main() -> None:
    if not ANSWERS.exists():
        ANSWERS.write_text(json.dumps(make_answers(), separators=(",", ":")) + "\n")
    answers = json.loads(ANSWERS.read_text())
    found = {}
    for arm, seed, prompts in RUNS:
        rows = answers[prompts]
        model = fit_lengths([Answer(index, tokens, "", length, complete, stuck) for index, tokens, length, complete, stuck in rows])
        assert model is not None
        texts = [json.loads(line)["prompt"] for line in (SUMS / prompts).read_text().splitlines()]
        prompt_tokens = {index: len(text) for index, text in enumerate(texts)}  # the tokenizer's tokens are characters
        records = [json.loads(line) for line in (COLLAPSE / arm / str(seed) / "metrics.jsonl").read_text().splitlines()]
        found[f"{arm}/{seed}"] = watch(records, model, prompt_tokens)
        print(f"{arm}/{seed}: {found[f'{arm}/{seed}']}")
    (HERE / "recorded.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
