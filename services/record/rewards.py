"""What a step tells of its rewards and of the two signals that moved the student: teacher and verifier apart. Nothing without a reward."""

from collections import Counter

import numpy as np

from opd_governor.actors.learner.actor import StepReport
from opd_governor.actors.learner.metrics import BatchMetrics, SignalSums
from opd_governor.actors.trajectory import PASS
from opd_governor.services.record.batch import Batch
from opd_governor.services.record.rundir import Record
from opd_governor.services.record.telemetry import Telemetry


def reward_fields(batch: Batch, report: StepReport | None) -> Record:
    """Fields of a step's record; what could not be measured is absent.

    reward_mean, reward_spread: of the scores. reward_passed: share of judged rollouts. reward_mixed: share of prompts whose samples differ
    in score, the only ones that a group baseline learns from. reward_length_correlation: near 1, longer answers are the better paid.
    unjudged: rollouts without a score, by reason. signal_distillation_*, signal_reward_*: mean and spread of what each asks of a token,
    nats. signal_reward_share: the reward's part of both signals' squares together, weighed as the loss weighs them.
    """
    fields: Record = {}
    if batch.unjudged:
        fields["unjudged"] = dict(Counter(verdict.reason for verdict in batch.unjudged))
    judged = [(t.reward, len(t.token_ids)) for t in batch.trajectories if t.reward is not None]
    if judged:
        scores, lengths = np.array(judged, np.float64).T
        fields |= {
            "reward_mean": float(scores.mean()),
            "reward_spread": float(scores.std()),
            "reward_passed": float((scores >= PASS).mean()),
        }
        fields["reward_mixed"] = _mixed(batch)
        if scores.std() > 0 and lengths.std() > 0:
            fields["reward_length_correlation"] = float(np.corrcoef(scores, lengths)[0, 1])
        if report is not None:
            fields |= signal_fields(report.metrics)
    return fields


def record_rewards(telemetry: Telemetry, batch: Batch, report: StepReport | None) -> None:
    """The same for /metrics; a gauge that is not known any more goes."""
    fields = reward_fields(batch, report)
    for reason, number in fields.get("unjudged", {}).items():
        telemetry.inc("opd_verifier_failures_total", number, reason=reason)
    judged = [t.reward for t in batch.trajectories if t.reward is not None]
    if judged:
        telemetry.inc("opd_rewards_judged_total", len(judged))
        telemetry.inc("opd_rewards_passed_total", sum(reward >= PASS for reward in judged))
    _show(telemetry, "opd_reward_mean", fields.get("reward_mean"))
    _show(telemetry, "opd_reward_spread", fields.get("reward_spread"))
    share = fields.get("signal_reward_share")
    for signal, part in (("distillation", None if share is None else 1 - share), ("reward", share)):
        _show(telemetry, "opd_signal_share_ratio", part, signal=signal)
        _show(telemetry, "opd_signal_mean_nats", fields.get(f"signal_{signal}_mean"), signal=signal)
        _show(telemetry, "opd_signal_spread_nats", fields.get(f"signal_{signal}_spread"), signal=signal)


def _show(telemetry: Telemetry, name: str, value: float | None, **labels: str) -> None:
    if value is None:
        telemetry.drop(name, **labels)
    else:
        telemetry.set(name, value, **labels)


def _mixed(batch: Batch) -> float:
    scores: dict[tuple[int, int], set[float]] = {}
    for t in batch.trajectories:
        if t.reward is not None:
            scores.setdefault((t.prompt.epoch, t.prompt.index), set()).add(t.reward)
    return sum(len(found) > 1 for found in scores.values()) / len(scores)


def signal_fields(metrics: BatchMetrics) -> Record:
    """Mean and spread of each signal, and the reward's part of both."""
    fields: Record = {}
    signals: dict[str, SignalSums] = {"distillation": metrics.teacher_signal, "reward": metrics.reward_signal}
    for name, sums in signals.items():
        if sums.num_tokens:
            fields |= {f"signal_{name}_mean": sums.mean, f"signal_{name}_spread": sums.spread}
    if (total := sum(sums.pull for sums in signals.values())) > 0:
        fields["signal_reward_share"] = metrics.reward_signal.pull / total
    return fields
