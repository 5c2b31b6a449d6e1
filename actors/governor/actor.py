"""The governor of one run: reads a snapshot, asks the law, keeps its state.

    loop --tick(step)--> Governor --read--> /metrics or Prometheus
         <--Decision----          --decide--> law

A plain class: the loop wraps it with `ray.remote`. It holds no file; the loop writes the records.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from opd_governor.actors.governor.law import decide, start
from opd_governor.actors.governor.policy import Policy
from opd_governor.actors.governor.signals import Signals, compute
from opd_governor.actors.governor.snapshot import Snapshot
from opd_governor.actors.governor.sources import MetricsSource, SourceDownError
from opd_governor.actors.governor.state import Decision, State
from opd_governor.actors.trajectory import LengthLimits

CLOCK_TOLERANCE_S = 5.0
"""A scrape further than this in the future means that a clock jumped."""


class Governor:
    """Decides the limits at every step border.

    >>> governor = Governor(source, Policy(), base=LengthLimits(cap_tokens=192))   # doctest: +SKIP
    >>> decision, record = governor.tick(step=12)                                  # doctest: +SKIP
    >>> decision.limits.cap_tokens, decision.command                               # doctest: +SKIP
    (192, None)
    """

    def __init__(
        self,
        source: MetricsSource,
        policy: Policy,
        base: LengthLimits,
        generation: int = 0,
        now_s: Callable[[], float] = time.time,
        monotonic_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """`base`: the job's own settings, what holds at zero pressure. `generation`: of the configuration they come from."""
        self._source = source
        self._now_s, self._monotonic_s = now_s, monotonic_s
        self._policy, self._base, self._generation = policy, base, generation
        self._state = start(policy, base)
        self._recorded: dict[str, Any] | None = None
        self._news = ""
        # A new run counts from zero.
        self._previous: Snapshot | None = Snapshot()
        self._taken_s: float | None = None
        self._age_s = 0.0
        self._age_read_at_s = monotonic_s()

    def set_policy(self, policy: Policy, base: LengthLimits, generation: int) -> None:
        """A person's change; takes effect at the next tick. Where it is of more than the governor's own keys, the tests are told."""
        if policy == self._policy or base != self._base:
            self.tell(f"settings changed (generation {generation})")
        self._policy, self._base, self._generation = policy, base, generation

    def tell(self, news: str) -> None:
        """A change that the tests must not take for sickness, in words: settings, a rollback, a resume."""
        self._news = f"{self._news}, {news}" if self._news else news

    def limits(self) -> LengthLimits:
        """In force now."""
        assert self._state.limits is not None
        return self._state.limits

    def state(self) -> dict[str, Any]:
        """For the checkpoint, JSON values: what the law remembers, the reading that the next one is held against, what was recorded."""
        previous = None if self._previous is None else self._previous.to_json()
        return {"law": self._state.to_json(), "previous": previous, "recorded": self._recorded, "news": self._news}

    def restore(self, state: dict[str, Any]) -> None:
        """When a run is resumed or this actor was restarted; not on a rollback, whose pressure must outlive it."""
        self._state = State.from_json(state["law"])
        self._previous = None if state["previous"] is None else Snapshot.from_json(state["previous"])
        self._recorded, self._news = state["recorded"], state["news"]

    def tick(self, step: int) -> tuple[Decision, dict[str, Any]]:
        """Decide at the border after `step`. Returns the decision and its record, one line of decisions.jsonl."""
        policy, base, generation = self._policy, self._base, self._generation
        signals = Signals(time_s=self._now_s()) if policy.mode == "off" else self._look(policy)
        self._state, _, decision = decide(self._state, signals, policy, base, step, self._news)
        self._news = ""
        record = decision.to_json() | {"config_generation": generation}
        terms = {"policy": policy.model_dump(mode="json"), "base": asdict(base)}
        if terms != self._recorded:
            # Once for as long as they hold: with them a directory replays alone.
            record |= terms
            self._recorded = terms
        return decision, record

    def _look(self, policy: Policy) -> Signals:
        now_s = self._now_s()
        try:
            snapshot = self._source.read()
        except SourceDownError as error:
            return self._blind(now_s, str(error))
        taken_s = now_s if snapshot.taken_s is None else snapshot.taken_s
        if taken_s > now_s + CLOCK_TOLERANCE_S:
            return self._blind(now_s, f"scraped {taken_s - now_s:.0f} s in the future: a clock jumped")
        if taken_s != self._taken_s:
            self._set_age(max(0.0, now_s - taken_s))
            self._taken_s = taken_s
        age_s = self._aged()
        if age_s > policy.blind_after_s:
            return Signals(time_s=now_s, data_age_s=age_s, blind=True, blind_reason="the last scrape is old")
        previous = snapshot if self._previous is None else self._previous
        signals = replace(compute(previous, snapshot), time_s=now_s, data_age_s=age_s)
        if signals.num_rollouts is None:
            return replace(signals, blind=True, blind_reason="opd_rollouts_total is missing or not a number")
        if signals.num_rollouts > 0 or self._previous is None:
            self._previous = snapshot
        return signals

    def _blind(self, now_s: float, reason: str) -> Signals:
        return Signals(time_s=now_s, data_age_s=self._aged(), blind=True, blind_reason=reason)

    def _aged(self) -> float:
        """The age at the last new data plus the time since, on a clock that cannot jump."""
        return self._age_s + self._monotonic_s() - self._age_read_at_s

    def _set_age(self, age_s: float) -> None:
        self._age_s, self._age_read_at_s = age_s, self._monotonic_s()
