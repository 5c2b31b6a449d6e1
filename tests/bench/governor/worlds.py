"""Synthetic runs with a known truth: lengths drawn step by step, healthy or sick from a known step on.

Log length is a prompt's own mean plus normal noise so that the teacher's answers and the student's
come from one law until something happens. The reference is fitted on a golden pass of the same world, with its error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from opd_governor.actors.governor.reference import Answer, LengthModel, fit_lengths

ONSET = 40
"""Step at which sick worlds fall ill."""
NUM_GOLDEN = 256
DOMAINS = ("maths", "writing", "code")

Course = Callable[[int], float]


def never(_: int) -> float:
    return 0.0


@dataclass(frozen=True)
class World:
    """One kind of run."""

    name: str
    sick: bool = False
    sigma: float = 0.5
    batch: int = 32
    cap_ratio: float = 2.0
    """Cap over the p99 of the teacher's answers."""
    shift: Course = never
    """Step -> log factor on all lengths."""
    loops: Course = never
    """Step -> probability that a rollout loops to the cap."""
    kl: Course = field(default=lambda step: 0.4)
    """Step -> mean KL a token, nats."""
    stop_mass: Course = never
    """Step -> log of the student's stop probability over the teacher's."""
    domains: int = 1
    curriculum: bool = False
    """Prompts grow: steps of new, longer prompts."""
    step_effect: float = 0.0
    """Standard deviation of what all rollouts of a step share, nats."""
    same_prompt: int = 1
    """Samples a prompt."""
    num_steps: int = 300


@dataclass(frozen=True)
class Step:
    """What one step of a world shows."""

    tokens_N: np.ndarray
    cut_N: np.ndarray
    loops: int
    mu_N: np.ndarray
    kl_nats: float
    stop_mass_ratio: float
    truncation: float
    """The true probability of being cut, averaged over prompts."""


class Run:
    """One seed of a world."""

    def __init__(self, world: World, seed: int) -> None:
        self.world = world
        self._rng = np.random.default_rng([seed, sum(map(ord, world.name))])
        mus = self._mus(NUM_GOLDEN, 0.0)
        lengths = np.exp(mus + self._noise(NUM_GOLDEN))
        answers = [
            Answer(index, int(prompt), DOMAINS[domain], int(max(1, length)), True)
            for index, (length, prompt, domain) in enumerate(zip(lengths, self._prompt_N, self._domain_N, strict=True))
        ]
        model = fit_lengths(answers)
        assert model is not None
        self.model: LengthModel = model
        self.mean_tokens, self.p99_tokens = float(lengths.mean()), float(np.quantile(lengths, 0.99))
        self.cap_tokens = max(4, int(world.cap_ratio * self.p99_tokens))

    def _mus(self, num: int, growth: float) -> np.ndarray:
        """True expected log lengths of new prompts; remembers the prompts."""
        rng = self._rng
        distinct = -(-num // self.world.same_prompt)
        prompt = np.exp(rng.normal(3.5 + growth, 0.4, distinct)).round().clip(3)
        domain = rng.integers(0, self.world.domains, distinct)
        self._prompt_N = np.repeat(prompt, self.world.same_prompt)[:num]
        self._domain_N = np.repeat(domain, self.world.same_prompt)[:num]
        own = np.repeat(rng.normal(0, 0.3 * self.world.sigma, distinct), self.world.same_prompt)[:num]
        return np.asarray(1.5 + 0.8 * np.log(self._prompt_N) + 0.7 * self._domain_N + own)

    def _noise(self, num: int) -> np.ndarray:
        return self._rng.normal(0, self.world.sigma, num)

    def step(self, number: int) -> Step:
        world, rng = self.world, self._rng
        growth = 0.3 * (number // 100) if world.curriculum else 0.0
        mus = self._mus(world.batch, growth) + rng.normal(0, world.step_effect) * (world.step_effect > 0)
        shift, loop_share = world.shift(number), world.loops(number)
        looping_N = rng.random(world.batch) < loop_share
        lengths = np.where(looping_N, math.inf, np.exp(mus + shift + self._noise(world.batch)))
        cut_N = lengths > self.cap_tokens
        model_mu_N = np.array([self.model.mu(-1, int(p), DOMAINS[d]) for p, d in zip(self._prompt_N, self._domain_N, strict=True)])
        room = (math.log(self.cap_tokens) - self.spread_mus - shift) / world.sigma
        above = float(np.mean([0.5 * math.erfc(z / math.sqrt(2)) for z in room]))
        return Step(
            tokens_N=np.minimum(lengths, self.cap_tokens).astype(int).clip(1),
            cut_N=cut_N,
            loops=int(looping_N.sum()),
            mu_N=model_mu_N,
            kl_nats=world.kl(number) * float(np.exp(rng.normal(0, 0.15))),
            stop_mass_ratio=math.exp(world.stop_mass(number) + rng.normal(0, 0.15)),
            truncation=loop_share + (1 - loop_share) * above,
        )

    @cached_property
    def spread_mus(self) -> np.ndarray:
        """Expected log lengths over which the true truncation is averaged."""
        return np.asarray(self._mus(64, 0.0))


def grows(rate: float) -> Course:
    return lambda step: max(0.0, math.log1p(rate) * (step - ONSET))


def jumps(to: float) -> Course:
    return lambda step: to if step >= ONSET else 0.0


def ramps(rate: float) -> Course:
    return lambda step: min(0.95, max(0.0, rate * (step - ONSET)))


def null_worlds() -> list[World]:
    worlds = [
        World(f"lengths {s:g} wide, batch {n}, cap {c:g} x p99", sigma=s, batch=n, cap_ratio=c)
        for s, n, c in (
            (0.3, 8, 2), (0.3, 1024, 2), (0.3, 32, 1.05), (0.5, 32, 8), (0.5, 256, 1.05), (0.8, 8, 2), (0.8, 32, 1.05), (0.8, 256, 2),
            (1.0, 16, 2), (1.0, 1024, 1.05), (1.2, 8, 1.05), (1.2, 32, 8), (1.2, 64, 2), (1.2, 1024, 2),
        )
    ]  # fmt: skip
    worlds += [
        World("loops by chance, 1 %", loops=lambda _: 0.01),
        World("loops by chance, 1 %, batch 256", batch=256, loops=lambda _: 0.01),
        World("three domains", sigma=0.8, domains=3),
        World("curriculum of longer prompts", sigma=0.5, curriculum=True, cap_ratio=8),
        World("KL drifts up sixfold", kl=lambda step: 0.01 * 6 ** min(1.0, step / 150)),
        World("KL doubles at once with the prompts", kl=lambda step: 0.4 if step < 100 else 0.8),
        World("steps share an effect of .1 nats", sigma=0.8, batch=256, step_effect=0.1),
        World("eight samples a prompt", sigma=0.8, batch=64, same_prompt=8),
        World("student a fifth longer than its teacher", sigma=0.5, shift=lambda _: math.log(1.2)),
        World("student becomes as long as its teacher", sigma=0.5, shift=lambda step: -0.7 * math.exp(-step / 40)),
    ]
    return worlds


def sick_worlds() -> list[World]:
    worlds = [
        World(f"growth {rate:.0%} a step, {s:g} wide, batch {n}", sick=True, sigma=s, batch=n, cap_ratio=c, shift=grows(rate))
        for rate, s, n, c in (
            (0.01, 0.3, 32, 2), (0.01, 0.8, 256, 2), (0.03, 0.5, 32, 2), (0.03, 0.8, 32, 1.25), (0.1, 0.3, 32, 2), (0.1, 0.8, 32, 2),
            (0.1, 0.5, 8, 2), (0.1, 1.2, 1024, 1.25),
        )
    ]  # fmt: skip
    worlds += [
        World("sudden loops, a fifth", sick=True, loops=jumps(0.2)),
        World("sudden loops, a fifth, batch 8", sick=True, batch=8, loops=jumps(0.2)),
        World("loops grow .1 % a step", sick=True, batch=64, loops=ramps(0.001)),
        World("loops grow 1 % a step", sick=True, loops=ramps(0.01)),
        World("lengths collapse 5 % a step", sick=True, shift=lambda step: -0.05 * max(0, step - ONSET)),
        World(
            "teacher swapped for one that gets stuck", sick=True, loops=ramps(0.01), kl=lambda step: 0.1 if step < ONSET else 0.6,
            stop_mass=lambda step: -0.05 * max(0, step - ONSET),
        ),
        World(
            "poisoned shard", sick=True, loops=lambda step: min(0.9, 0.08 * max(0, step - ONSET)),
            kl=lambda step: 0.02 if step < ONSET else 0.5,
        ),
    ]  # fmt: skip
    return worlds
