"""What a step tells of its conversations: turns, what environments said, repeated calls. Records of one-turn rollouts leave it out."""

from collections import Counter

import numpy as np

from opd_governor.services.record.batch import Batch
from opd_governor.services.record.rundir import Record
from opd_governor.services.record.telemetry import Telemetry


def conversation_fields(batch: Batch) -> Record:
    """Fields of a step's record.

    turns_mean, turns_max: of the student, in a conversation. observed_mean: tokens that the environment put in between; length_mean counts
    sampled ones only. out_of_turns: share of conversations that had all the turns they may have. repeated_calls: share of turns that say
    word for word what the turn before said. environment_failures: conversations without an answer of the environment, by reason.
    """
    fields: Record = {}
    if failures := Counter(t.failure for t in batch.trajectories if t.failure):
        fields["environment_failures"] = dict(failures)
    held = [t for t in batch.trajectories if t.finish_reason != "error"]
    if not any(t.num_turns > 1 for t in held):
        return fields
    turns = np.array([t.num_turns for t in held])
    return fields | {
        "turns_mean": float(turns.mean()),
        "turns_max": int(turns.max()),
        "observed_mean": sum(len(ids) for t in held for _, ids in t.observed) / len(held),
        "out_of_turns": sum(t.finish_reason == "turns" for t in held) / len(held),
        "repeated_calls": sum(t.repeated_calls for t in held) / int(turns.sum()),
    }


def record_conversations(telemetry: Telemetry, batch: Batch) -> None:
    """The same for /metrics, where a rollout without an environment is a conversation of one turn."""
    for reason, number in Counter(t.failure for t in batch.trajectories if t.failure).items():
        telemetry.inc("opd_environment_failures_total", number, reason=reason)
    held = [t for t in batch.trajectories if t.finish_reason != "error"]
    if not held:
        return
    num_turns = sum(t.num_turns for t in held)
    telemetry.inc("opd_turns_total", num_turns)
    telemetry.inc("opd_observed_tokens_total", sum(len(ids) for t in held for _, ids in t.observed))
    telemetry.inc("opd_repeated_calls_total", sum(t.repeated_calls for t in held))
    telemetry.set("opd_conversation_turns", num_turns / len(held))
