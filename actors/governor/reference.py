"""How long the teacher's answer to a prompt is: the reference that each rollout is measured against. Pure.

Log length is taken as normal given the prompt: an intercept per domain (shrunk toward the common one), a slope in log prompt length,
one spread. Answers that were cut are censored ("at least this long"), fitted by EM as in Tobin's model (Econometrica 1958); answers in
which the teacher got stuck (a loop, or cut far beyond what the others take) are left out: to get stuck is no length to aim at. A prompt
with a complete answer of its own lies half way between that answer and the fit.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import NormalDist

import numpy as np

from opd_governor.actors.trajectory import Trajectory

MIN_COMPLETE = 5
"""Fewer complete answers say nothing about lengths."""
MIN_SPREAD_NATS = 0.1
"""Answers of one length would make every other length a surprise."""
TAIL_SHARE = 0.01
"""Of the teacher's own answers beyond the tail's threshold, before the margin."""
TAIL_MARGIN = 1.25
"""Factor on the length beyond which the tail begins."""
OWN_WEIGHT = 0.5
"""Weight of a prompt's own answer against the fit: the best where prompts scatter as much as answers to one prompt."""
DOMAIN_PRIOR = 4.0
"""Answers' worth of pull of a domain toward the common intercept."""
CLIP = 4.0
"""Excesses are clipped to this many spreads: one answer is one answer."""
NEVER_ENDS = 3.0
"""A cut answer that was let be this many spreads longer than expected says that the teacher got stuck, not how long its answers are."""
EM_STEPS = 60
NORMAL = NormalDist()


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of the teacher."""

    index: int
    """The prompt's."""
    prompt_tokens: int
    domain: str
    num_tokens: int
    complete: bool
    """Ended by itself, without a loop; else it is only known to be longer."""
    stuck: bool = False
    """Ends in a loop."""


@dataclass(frozen=True, slots=True)
class Aim:
    """What lengths should be: the teacher's times `factor`, and no more than `budget_tokens`."""

    factor: float = 1.0
    budget_tokens: float | None = None


@dataclass(frozen=True, slots=True)
class Excesses:
    """Rollouts against their prompts' references, N of them."""

    expected_N: np.ndarray
    """Log of the reference."""
    nats_N: np.ndarray
    """Log of length over the reference; for a cut rollout the expected log, given that it is longer."""
    in_tail_N: np.ndarray
    """Longer than the tail's threshold, or cut at or before it."""
    tail_probability_N: np.ndarray
    """Of a teacher's answer being there."""


@dataclass(frozen=True, slots=True)
class LengthModel:
    """Log length given the prompt.

    >>> model = fit_lengths([Answer(i, 20, "", 30 + i, True) for i in range(20)])
    >>> 30 < math.exp(model.mu(index=-1, prompt_tokens=20, domain="")) < 50
    True
    """

    intercept: float
    slope: float
    mean_log_prompt: float
    spread_nats: float
    tail_nats: float
    """Residual at which the tail begins."""
    domains: Mapping[str, float] = field(default_factory=dict)
    """Domain -> its intercept's difference to the common one."""
    own: Mapping[int, float] = field(default_factory=dict)
    """Prompt index -> residual of its own complete answer."""
    censored_share: float = 0.0
    num_answers: int = 0

    def mu(self, index: int, prompt_tokens: int, domain: str, aim: Aim | None = None) -> float:
        """Expected log length of an answer to this prompt."""
        mu = self.intercept + self.slope * (math.log(max(1, prompt_tokens)) - self.mean_log_prompt)
        mu += self.domains.get(domain, 0.0) + OWN_WEIGHT * self.own.get(index, 0.0)
        if aim is None:
            return mu
        mu += math.log(aim.factor)
        return mu if aim.budget_tokens is None else min(mu, math.log(aim.budget_tokens))

    def expected_tokens(self, index: int, prompt_tokens: int, domain: str) -> float:
        """Mean length of the teacher's answers to this prompt."""
        return math.exp(self.mu(index, prompt_tokens, domain) + self.spread_nats**2 / 2)

    def longest_tokens(self, index: int, prompt_tokens: int, domain: str) -> float:
        """Length at which their tail begins."""
        return math.exp(self.mu(index, prompt_tokens, domain) + self.tail_nats)

    def quantile_tokens(self, answers: Sequence[Answer], share: float) -> float:
        """Of lengths over these prompts, by the model."""
        mus = sorted(self.mu(-1, a.prompt_tokens, a.domain) for a in answers)
        low, high = mus[0] - 6 * self.spread_nats, mus[-1] + 6 * self.spread_nats
        for _ in range(50):
            middle = (low + high) / 2
            below = sum(NORMAL.cdf((middle - mu) / self.spread_nats) for mu in mus) / len(mus)
            low, high = (middle, high) if below < share else (low, middle)
        return math.exp(high)

    def excesses(self, trajectories: Sequence[Trajectory], aim: Aim | None = None) -> Excesses:
        """Rollouts against their own prompts' references."""
        mus = [self.mu(t.prompt.index, len(t.prompt.token_ids), t.prompt.domain, aim) for t in trajectories]
        lengths, budgets = [len(t.token_ids) for t in trajectories], [t.budget_tokens for t in trajectories]
        return self.measure(np.array(lengths), np.array(budgets), np.array([t.truncated for t in trajectories], dtype=bool), np.array(mus))

    def measure(self, tokens_N: np.ndarray, budget_N: np.ndarray, cut_N: np.ndarray, mu_N: np.ndarray) -> Excesses:
        """Lengths and budgets in tokens, whether the rollout was cut, expected log lengths.

        A budget below the tail's threshold hides the tail: then whatever it cuts is the tail.
        """
        excess_N, room_N = np.log(np.maximum(1, tokens_N)) - mu_N, np.log(np.maximum(1, budget_N)) - mu_N
        hidden_N = room_N <= self.tail_nats
        in_tail_N = cut_N | (~hidden_N & (excess_N > self.tail_nats))
        above = 1.0 - NORMAL.cdf(self.tail_nats / self.spread_nats)
        above_N = np.array(
            [1.0 - NORMAL.cdf(room / self.spread_nats) if hidden else above for room, hidden in zip(room_N, hidden_N, strict=True)]
        )
        z_N = excess_N / self.spread_nats
        for i in np.flatnonzero(cut_N):
            z_N[i] = _mean_above(float(z_N[i]))
        return Excesses(mu_N, np.clip(z_N, -CLIP, CLIP) * self.spread_nats, in_tail_N, above_N)


def fit_lengths(answers: Sequence[Answer]) -> LengthModel | None:
    """None where fewer than MIN_COMPLETE answers are complete: then nothing is known of their lengths."""
    complete = np.array([a.complete for a in answers], dtype=bool)
    if complete.sum() < MIN_COMPLETE:
        return None
    log_prompt = np.log([max(1, a.prompt_tokens) for a in answers])
    observed = np.log([max(1, a.num_tokens) for a in answers])
    centre = float(log_prompt.mean())
    names = sorted({a.domain for a in answers})
    has_slope = float(log_prompt.std() > 0.05)
    columns = [np.ones(len(answers)), has_slope * (log_prompt - centre)]
    columns += [np.array([float(a.domain == name) for a in answers]) for name in names if len(names) > 1]
    beta, spread = _fit_censored(np.stack(columns, axis=1), observed, complete, np.array([a.stuck for a in answers], dtype=bool))
    residual = observed - np.stack(columns, axis=1) @ beta
    highest = float(np.quantile(residual[complete], 1 - TAIL_SHARE))
    return LengthModel(
        intercept=float(beta[0]),
        slope=float(beta[1]) * has_slope,
        mean_log_prompt=centre,
        spread_nats=spread,
        tail_nats=max(-NORMAL.inv_cdf(TAIL_SHARE) * spread, highest) + math.log(TAIL_MARGIN),
        domains={name: float(value) for name, value in zip(names, beta[2:], strict=False)},
        own={a.index: float(r) for a, r in zip(answers, residual, strict=True) if a.complete},
        censored_share=float(1 - complete.mean()),
        num_answers=len(answers),
    )


def _fit_censored(x_NC: np.ndarray, observed_N: np.ndarray, complete_N: np.ndarray, stuck_N: np.ndarray) -> tuple[np.ndarray, float]:
    """(coefficients [C], spread). Begins with the complete answers; each round fills in the cut ones with what is expected of them."""
    prior_CC = np.diag([0.0, 1e-3, *[DOMAIN_PRIOR] * (x_NC.shape[1] - 2)])
    filled_N, variance_N, used_N = observed_N.copy(), np.zeros(len(observed_N)), complete_N
    for _ in range(2 if complete_N.all() else EM_STEPS):
        x, y = x_NC[used_N], filled_N[used_N]
        beta = np.linalg.solve(x.T @ x + prior_CC, x.T @ y)
        spread = max(MIN_SPREAD_NATS, float(np.sqrt(np.mean((y - x @ beta) ** 2 + variance_N[used_N]))))
        z_N = (observed_N - x_NC @ beta) / spread
        used_N = complete_N | (~stuck_N & (z_N < NEVER_ENDS))
        for i in np.flatnonzero(~complete_N & used_N):
            above = _mean_above(float(z_N[i]))
            filled_N[i] = observed_N[i] + spread * (above - z_N[i])
            variance_N[i] = spread**2 * max(0.0, 1 + z_N[i] * above - above**2)
    return beta, spread


def _mean_above(z: float) -> float:
    """Mean of a standard normal value, given that it is above z (the inverse Mills ratio)."""
    above = 1.0 - NORMAL.cdf(z)
    return NORMAL.pdf(z) / above if above > 1e-12 else z + 1.0 / max(1.0, z)
