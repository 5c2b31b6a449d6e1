"""What a run learns from beside its own samples: the prompt stream, golden answers, the reference length."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from opd_governor.actors.trajectory import Prompt
from opd_governor.services.inputs.prompts import PromptStream
from opd_governor.services.run.collect import JudgeRollouts
from opd_governor.services.run.demonstrations import Demonstrations
from opd_governor.services.run.rewards import Rewards


@dataclass(frozen=True, slots=True)
class TrainingData:
    """Prompts in their order, and the golden pass over them."""

    stream: PromptStream
    golden: Sequence[Prompt]
    """The prompts that have a golden answer."""
    golden_key: str
    """Names the golden answers: equal keys, equal answers."""
    reference_tokens: float
    """Mean length of a golden answer."""
    demonstrations: Demonstrations | None = None
    """None: teachers are shown none of the student's answers."""
    judge: JudgeRollouts | None = None
    """None: no reward, and rollouts are not judged."""
    rewards: Rewards | None = None
    reads: Mapping[str, Any] = field(default_factory=dict)
    """What the run reads, for its checkpoints (see `reads`)."""

    def golden_for(self, step: int, num_rollouts: int, ratio: float) -> list[Prompt]:
        """Golden answers to learn from beside `num_rollouts` rollouts: `ratio` of their number, at least one, in turn."""
        if not self.golden:
            return []
        num = max(1, round(ratio * num_rollouts))
        return [self.golden[(step * num + i) % len(self.golden)] for i in range(num)]
