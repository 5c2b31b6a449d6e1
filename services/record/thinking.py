"""What a step tells of thinking and answer apart. Nothing where no rollout has a thinking part."""

import numpy as np

from opd_governor.services.record.batch import Batch
from opd_governor.services.record.rundir import Record


def thinking_fields(batch: Batch) -> Record:
    """Fields of a step's record, over rollouts that think.

    thinking_share: of all rollouts. thinking_mean, thinking_p95: tokens of the thinking part, its end mark included; answer_mean: tokens
    behind it, of rollouts that came so far. thinking_truncation, answer_truncation: share of rollouts cut in that part; thinking_loops,
    answer_loops: share whose loop begins there. thinking_forced: share whose thinking was ended by rollout.thinking_budget_tokens.
    """
    thinking = [(t, t.num_thinking) for t in batch.trajectories if t.num_thinking is not None]
    if not thinking:
        return {}
    lengths = np.array([num for _, num in thinking])
    behind = [len(t.token_ids) - num for t, num in thinking if len(t.token_ids) > num]
    num_rollouts = len(thinking)

    def share(of: list[bool]) -> float:
        return sum(of) / num_rollouts

    in_thought = [len(t.token_ids) == num for t, num in thinking]
    cut = [t.truncated for t, _ in thinking]
    onsets = [(t.loop_onset, num) for t, num in thinking]
    fields: Record = {
        "thinking_share": num_rollouts / len(batch.trajectories),
        "thinking_mean": float(lengths.mean()),
        "thinking_p95": float(np.quantile(lengths, 0.95)),
        "thinking_truncation": share([c and inside for c, inside in zip(cut, in_thought, strict=True)]),
        "answer_truncation": share([c and not inside for c, inside in zip(cut, in_thought, strict=True)]),
        "thinking_loops": share([onset is not None and onset < num for onset, num in onsets]),
        "answer_loops": share([onset is not None and onset >= num for onset, num in onsets]),
        "thinking_forced": share([t.forced is not None for t, _ in thinking]),
    }
    return fields | ({"answer_mean": float(np.mean(behind))} if behind else {})
