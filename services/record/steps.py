"""What one step is remembered by: telemetry, a line of metrics.jsonl, a few samples."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from opd_governor.actors.governor.actuators import movable, value_of
from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.learner.metrics import POSITION_BUCKETS
from opd_governor.actors.trajectory import LengthLimits, TokenScores, Trajectory
from opd_governor.services.inputs.verifiers import Evaluation
from opd_governor.services.record.batch import Batch
from opd_governor.services.record.conversations import conversation_fields, record_conversations
from opd_governor.services.record.rewards import record_rewards, reward_fields
from opd_governor.services.record.rundir import Record
from opd_governor.services.record.scores import score_fields
from opd_governor.services.record.telemetry import Telemetry
from opd_governor.services.record.thinking import thinking_fields

CLOCK_FIELDS = frozenset({"time", "step_s", "wait_s", "rollout_s", "score_s", "learn_s", "sync_s", "govern_s", "tokens_per_s"})
"""Fields of a step's record that tell time: all others are the same in every strict run of the same job."""
Source = Literal["engine", "teacher", "learner"]
"""Which stage found non-finite values: the engine's log-probs, the teacher's, or the learner's loss or gradient."""


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Seconds. Rollout and score belong to the batch and mostly ran while earlier steps learned; wait is what was not hidden."""

    rollout_s: float
    score_s: float
    learn_s: float
    sync_s: float
    govern_s: float
    """Waited for the governor's decision beyond the sync that it runs beside: what governing adds to a step."""
    total_s: float
    wait_s: float

    def by_phase(self) -> dict[str, float]:
        """Label of opd_step_seconds -> seconds."""
        return {"rollout": self.rollout_s, "score": self.score_s, "learn": self.learn_s, "sync": self.sync_s, "total": self.total_s}


def record_batch(telemetry: Telemetry, batch: Batch, report: StepReport | None, limits: LengthLimits) -> None:
    """Everything a batch and its learner step add to the run's metrics. `limits`: those the learner step ran under."""
    telemetry.record_rollouts(batch.trajectories, batch.limits.cap_tokens, batch.max_new_tokens)
    masked = sum(_tail_masked(scored.trajectory, limits) for scored in batch.scored)
    outcomes = {
        "admitted": len(batch.scored) - masked,
        "masked_tail": masked,
        "over_quota": batch.num_over_quota,
        "unscored": batch.num_unscored,
        "undemonstrated": batch.num_undemonstrated,
    }
    for outcome, number in outcomes.items():
        telemetry.inc("opd_admitted_rollouts_total", number, outcome=outcome)
    record_rewards(telemetry, batch, report)
    record_conversations(telemetry, batch)
    if report is None:
        return
    metrics = report.metrics
    telemetry.inc("opd_learner_steps_total", float(not report.skipped))
    telemetry.inc("opd_learner_skipped_steps_total", float(report.skipped))
    telemetry.inc("opd_learner_tokens_total", int(metrics.num_tokens_P.sum()) - metrics.num_masked_tokens)
    telemetry.set("opd_learner_loss", report.loss)
    telemetry.set("opd_learner_grad_norm", report.grad_norm)
    num_tokens = int(metrics.num_tokens_P.sum())
    if not num_tokens:
        return
    telemetry.set("opd_student_entropy_nats", metrics.entropy_nats / num_tokens)
    for position, nats, tokens in zip(POSITION_BUCKETS, metrics.kl_nats_P, metrics.num_tokens_P, strict=True):
        if tokens and np.isfinite(nats):
            # A counter cannot fall: a bucket whose sampled estimate is below 0 in this step counts as 0.
            telemetry.inc("opd_kl_nats_total", max(0.0, float(nats)), position=position)
            telemetry.inc("opd_kl_tokens_total", int(tokens), position=position)
    telemetry.inc("opd_stop_mass_student_total", metrics.student_stop_mass)
    telemetry.inc("opd_stop_mass_teacher_total", metrics.teacher_stop_mass)
    telemetry.inc("opd_stop_mass_tokens_total", num_tokens)
    for form, logprobs in (("raw", metrics.teacher_stop_logp_raw_M), ("class", metrics.teacher_stop_logp_class_M)):
        telemetry.observe("opd_stop_teacher_logprob", *logprobs.tolist(), form=form)
    telemetry.observe("opd_sample_staleness_steps", *(_staleness(scored.trajectory, report) for scored in batch.scored))


def step_record(
    batch: Batch,
    report: StepReport | None,
    limits: LengthLimits,
    pressure: float,
    times: StepTimes,
    evaluations: Mapping[str, Evaluation],
) -> Record:
    """One line of metrics.jsonl. `limits` and `pressure` are those the learner step ran under; `prompts` are (epoch, index)."""
    num_tokens = sum(len(trajectory.token_ids) for trajectory in batch.trajectories)
    return {
        **_of_batch(batch),
        "pressure": pressure,
        **_of_limits(limits),
        **_of_times(times, num_tokens),
        **(_of_learner(batch, report) if report else {}),
        **score_fields(batch.scored),
        **reward_fields(batch, report),
        **thinking_fields(batch),
        **conversation_fields(batch),
        **evaluation_fields(evaluations),
    }


def _of_batch(batch: Batch) -> Record:
    """Lengths, ends and the terms it was launched under."""
    lengths = np.array([len(t.token_ids) for t in batch.trajectories])
    num = max(1, len(lengths))
    return {
        "step": batch.step,
        "time": time.time(),
        "num_rollouts": len(lengths),
        "prompts": [list(key) for key in dict.fromkeys((t.prompt.epoch, t.prompt.index) for t in batch.trajectories)],
        "lengths": lengths.tolist(),
        "length_mean": float(lengths.mean()) if len(lengths) else 0.0,
        "length_p95": float(np.quantile(lengths, 0.95)) if len(lengths) else 0.0,
        "length_max": int(lengths.max(initial=0)),
        "truncation": sum(t.truncated for t in batch.trajectories) / num,
        "loops": sum(t.loop_onset is not None for t in batch.trajectories) / num,
        "num_admitted": len(batch.scored),
        "num_over_quota": batch.num_over_quota,
        "num_unscored": batch.num_unscored,
        "num_undemonstrated": batch.num_undemonstrated,
        "cap_tokens": batch.limits.cap_tokens,
        "limits_generation": batch.limits.generation,
        "config_generation": batch.config_generation,
    }


def _of_limits(limits: LengthLimits) -> Record:
    return {name: value_of(limits, name) for name in movable() if name != "cap_tokens"}


def _of_times(times: StepTimes, num_tokens: int) -> Record:
    return {
        "step_s": times.total_s,
        "wait_s": times.wait_s,
        "rollout_s": times.rollout_s,
        "score_s": times.score_s,
        "learn_s": times.learn_s,
        "sync_s": times.sync_s,
        "govern_s": times.govern_s,
        "tokens_per_s": num_tokens / times.total_s,
    }


def _of_learner(batch: Batch, report: StepReport) -> Record:
    """What the optimiser step did. Means are over tokens."""
    metrics = report.metrics
    tokens_P = metrics.num_tokens_P
    num_tokens = max(1, int(tokens_P.sum()))
    staleness = [_staleness(scored.trajectory, report) for scored in batch.scored]
    return {
        "weight_version": report.weight_version,
        "loss": report.loss,
        "grad_norm": report.grad_norm,
        "learning_rate": report.learning_rate,
        "skipped": report.skipped,
        "staleness_mean": float(np.mean(staleness)),
        "kl_nats": float(metrics.kl_nats_P.sum()) / num_tokens,
        "kl_by_position": {
            position: float(nats) / int(tokens)
            for position, nats, tokens in zip(POSITION_BUCKETS, metrics.kl_nats_P, tokens_P, strict=True)
            if tokens
        },
        "entropy_nats": metrics.entropy_nats / num_tokens,
        "clipped": metrics.num_clipped_tokens / num_tokens,
        "outliers": metrics.num_outlier_tokens / num_tokens,
        "masked": metrics.num_masked_tokens / num_tokens,
        "stop_mass_student": metrics.student_stop_mass / num_tokens,
        "stop_mass_teacher": metrics.teacher_stop_mass / num_tokens,
        "reference_kl_nats": metrics.reference_kl_nats / num_tokens,
        "golden_nats": metrics.golden_nats / metrics.num_golden_tokens if metrics.num_golden_tokens else None,
    }


def evaluation_fields(evaluations: Mapping[str, Evaluation]) -> Record:
    """eval_accuracy, eval_length, eval_length_p95, eval_truncation of greedy decoding, and the same as eval_sampled_* where sampled too.

    What could not be measured is absent; eval_unanswered and eval_unjudged count problems without an answer or a verdict, where there are
    some.
    """
    fields: Record = {}
    for decoding, evaluation in evaluations.items():
        prefix = "eval" if decoding == "greedy" else f"eval_{decoding}"
        values: Record = {
            "accuracy": evaluation.accuracy_ratio,
            "length": evaluation.length_tokens,
            "length_p95": evaluation.length_p95_tokens,
            "truncation": evaluation.truncation_ratio,
            "unanswered": evaluation.num_unanswered or None,
            "unjudged": evaluation.num_unjudged or None,
        }
        fields |= {f"{prefix}_{name}": value for name, value in values.items() if value is not None}
    return fields


def sample_records(batch: Batch, num: int, decode: Callable[[Sequence[int]], str]) -> list[Record]:
    """A few rollouts a person can read: the longest first, since trouble shows there; the loop's onset as an index into the text."""
    chosen = sorted(batch.trajectories, key=lambda t: -len(t.token_ids))[:num]
    return [
        {
            "step": batch.step,
            "prompt": trajectory.prompt.text,
            "response": decode(trajectory.conversation_ids),
            "finish_reason": trajectory.finish_reason,
            "length_tokens": len(trajectory.token_ids),
            "loop_onset_char": _onset_char(trajectory, decode),
        }
        for trajectory in chosen
    ]


def _onset_char(trajectory: Trajectory, decode: Callable[[Sequence[int]], str]) -> int | None:
    if trajectory.loop_onset is None:
        return None
    between = sum(len(ids) for place, ids in trajectory.observed if place <= trajectory.loop_onset)
    return len(decode(trajectory.conversation_ids[: trajectory.loop_onset + between]))


def nonfinite_record(source: Source, trajectory: Trajectory, scores: TokenScores | None) -> Record:
    """Everything about one sample that spoiled, or would have spoiled, a step. Non-finite values are written as null."""
    prompt = trajectory.prompt
    record: Record = {
        "step": trajectory.step,
        "source": source,
        "epoch": prompt.epoch,
        "prompt": prompt.index,
        "sample": trajectory.sample,
        "weight_version": trajectory.weight_version,
        "text": prompt.text,
        "prompt_ids": list(prompt.token_ids),
        "token_ids": list(trajectory.conversation_ids),
        "logprobs": trajectory.logprobs_T.tolist(),
    }
    if scores is not None:
        record |= {
            "teacher": scores.teacher,
            "teacher_logprobs": scores.sampled_logp_T.tolist(),
            "stop_logprobs": scores.stop_logp_T.tolist(),
        }
    return record


def _staleness(trajectory: Trajectory, report: StepReport) -> int:
    """Learner steps between the weights that began the rollout and those it updated."""
    return report.weight_version - 1 - trajectory.weight_version


def _tail_masked(trajectory: Trajectory, limits: LengthLimits) -> bool:
    return trajectory.loop_onset is not None and limits.loop_tail_weight < 1
