"""From a verifier's scores to advantages, and what is remembered of earlier steps for them.

batch of trajectories with scores --weigh--> ScoredRollout with an advantage
                                       |
                                  running mean of a domain (baseline running), kept in checkpoints
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from opd_governor.actors.learner.settings import RewardSettings
from opd_governor.actors.trajectory import ScoredRollout, Trajectory
from opd_governor.services.inputs.outcomes import Outcomes

SHARE_OF_A_STEP = 0.1
"""What one step moves a running mean by: it remembers the last ten steps or so."""
LEAST_SPREAD = 1e-6
"""Where scores do not differ there is no advantage to divide."""

Moments = tuple[float, float]
"""Mean of scores, and of their squares."""
Key = tuple[int, int]


class Rewards:
    """Advantages of one step's rollouts after the other, in the order that they are learned from."""

    def __init__(self, settings: RewardSettings, outcomes: Outcomes | None = None) -> None:
        """`outcomes`: told every verdict."""
        self._settings, self._outcomes = settings, outcomes
        self._running: dict[str, Moments] = {}

    def weigh(self, trajectories: Sequence[Trajectory], scored: Sequence[ScoredRollout]) -> list[ScoredRollout]:
        """The scored rollouts with their advantages. Every judged rollout counts in the baseline, also one that is not learned from.

        Without a verdict, or a baseline to hold it against, a rollout has the advantage 0.
        """
        if self._settings.baseline == "running":
            before = self._running or _moments((t.prompt.domain, t.reward) for t in trajectories)
            advantages = [self._over(s.trajectory.reward, before.get(s.trajectory.prompt.domain)) for s in scored]
            self._remember(trajectories)
        elif self._settings.baseline == "group":
            groups: dict[Key, list[float]] = defaultdict(list)
            for trajectory in trajectories:
                if trajectory.reward is not None:
                    groups[_key(trajectory)].append(trajectory.reward)
            advantages = [self._in_group(s.trajectory.reward, groups[_key(s.trajectory)]) for s in scored]
        else:
            advantages = [s.trajectory.reward or 0.0 for s in scored]
        if self._outcomes is not None:
            self._outcomes.note(trajectories)
        return [replace(one, advantage=advantage) for one, advantage in zip(scored, advantages, strict=True)]

    def state(self) -> dict[str, Any]:
        """Of a checkpoint, as JSON."""
        running = {domain: list(moments) for domain, moments in self._running.items()}
        return {"running": running, "outcomes": self._outcomes.state() if self._outcomes else {}}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Back to a checkpoint; an empty state is that before the first step."""
        self._running = {domain: (mean, square) for domain, (mean, square) in state.get("running", {}).items()}
        if self._outcomes is not None:
            self._outcomes.restore(state.get("outcomes", {}))

    def _in_group(self, reward: float | None, rewards: Sequence[float]) -> float:
        """Over the mean of the group's others: r - (sum - r) / (n - 1). Source: leave-one-out, Kool et al. 2019; arXiv 2402.14740."""
        num = len(rewards)
        if reward is None or num < 2:
            return 0.0
        mean = sum(rewards) / num
        advantage = (reward - mean) * num / (num - 1)
        return self._divided(advantage, (mean, sum(r * r for r in rewards) / num))

    def _over(self, reward: float | None, moments: Moments | None) -> float:
        """Over a running mean; a domain that was never seen has none yet."""
        return 0.0 if reward is None or moments is None else self._divided(reward - moments[0], moments)

    def _divided(self, advantage: float, moments: Moments) -> float:
        if not self._settings.normalise:
            return advantage
        mean, square = moments
        return advantage / max(max(0.0, square - mean**2) ** 0.5, LEAST_SPREAD)

    def _remember(self, trajectories: Sequence[Trajectory]) -> None:
        for domain, (mean, square) in _moments((t.prompt.domain, t.reward) for t in trajectories).items():
            old_mean, old_square = self._running.get(domain, (mean, square))
            share = SHARE_OF_A_STEP
            self._running[domain] = (old_mean + share * (mean - old_mean), old_square + share * (square - old_square))


def _moments(rewards: Iterable[tuple[str, float | None]]) -> dict[str, Moments]:
    """By domain."""
    by_domain: dict[str, list[float]] = defaultdict(list)
    for domain, reward in rewards:
        if reward is not None:
            by_domain[domain].append(reward)
    return {domain: (sum(found) / len(found), sum(r * r for r in found) / len(found)) for domain, found in by_domain.items()}


def _key(trajectory: Trajectory) -> Key:
    return trajectory.prompt.epoch, trajectory.prompt.index
