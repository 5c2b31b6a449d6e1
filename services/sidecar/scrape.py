"""A trainer's own /metrics read in place of posted steps: gauges by name, lengths from a histogram, ends from a counter."""

import asyncio
import logging
import math
from dataclasses import replace
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from opd_governor.services.sidecar.policy_file import ScrapeSettings
from opd_governor.services.sidecar.post import REASONS
from opd_governor.services.sidecar.runs import Runs
from opd_governor.services.sidecar.seen import StepSeen

log = logging.getLogger(__name__)
Samples = list[tuple[str, dict[str, str], float]]


def parse(text: str) -> Samples:
    """(name, labels, value) of every sample. Raises ValueError for what is no Prometheus text."""
    return [(s.name, s.labels, s.value) for family in text_string_to_metric_families(text) for s in family.samples]


def read_step(settings: ScrapeSettings, samples: Samples, before: Samples | None) -> StepSeen | None:
    """What these samples tell about the step they name; histograms and counters count since `before`. None: no step is told.

    >>> read_step(ScrapeSettings(run="a", url="http://x", step="s", names={"loss": "l"}), [("s", {}, 3.0), ("l", {}, 0.5)], None).loss
    0.5
    """
    step = _gauge(samples, settings.step)
    if step is None:
        return None
    seen = StepSeen(step=int(step))
    told: dict[str, Any] = {}
    for name, metric in settings.names.items():
        if name == "length_tokens":
            told |= _lengths(samples, before or [], metric)
        elif name == "finished":
            told |= _ends(samples, before or [], metric)
        elif (value := _gauge(samples, metric)) is not None:
            told[name] = value
    return replace(seen, **told)


def _gauge(samples: Samples, name: str) -> float | None:
    return next((value for found, _, value in samples if found == name and math.isfinite(value)), None)


def _total(samples: Samples, name: str, **labels: str) -> float:
    return sum(value for found, held, value in samples if found == name and labels.items() <= held.items())


def _lengths(samples: Samples, before: Samples, name: str) -> dict[str, float]:
    number = _total(samples, f"{name}_count") - _total(before, f"{name}_count")
    if number <= 0:
        return {}
    mean = (_total(samples, f"{name}_sum") - _total(before, f"{name}_sum")) / number
    edges = sorted({float(held["le"]) for found, held, _ in samples if found == f"{name}_bucket" and "le" in held})
    grown = [(edge, _bucket(samples, name, edge) - _bucket(before, name, edge)) for edge in edges]
    reached = {
        share: next((edge for edge, count in grown if count >= share * number and math.isfinite(edge)), None) for share in (0.95, 1.0)
    }
    told = {"num_rollouts": number, "length_mean_tokens": mean, "length_p95_tokens": reached[0.95], "length_max_tokens": reached[1.0]}
    return {key: value for key, value in told.items() if value is not None}


def _bucket(samples: Samples, name: str, edge: float) -> float:
    return sum(value for found, held, value in samples if found == f"{name}_bucket" and float(held.get("le", "nan")) == edge)


def _ends(samples: Samples, before: Samples, name: str) -> dict[str, float]:
    ends: dict[str, float] = {}
    for group, sign in ((samples, 1.0), (before, -1.0)):
        for found, held, value in group:
            if found == name and (reason := held.get("finished_reason") or held.get("finish_reason")):
                end = REASONS.get(reason, "error")
                ends[end] = ends.get(end, 0.0) + sign * value
    number = sum(value for end, value in ends.items() if end != "error")
    cut = ends.get("length", 0.0) + ends.get("repetition", 0.0)
    return {"num_rollouts": number, "truncation": min(1.0, max(0.0, cut / number))} if number > 0 else {}


class Scraper:
    """Reads one trainer until it is cancelled. A reading that fails is no step, and is told once."""

    def __init__(self, settings: ScrapeSettings, runs: Runs) -> None:
        self._settings, self._runs = settings, runs
        self._before: Samples | None = None
        self._step: int | None = None
        self._trouble = ""

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=5.0, trust_env=False) as client:
            while True:
                try:
                    answer = (await client.get(self._settings.url)).raise_for_status()
                    self.take(parse(answer.text))
                    self._say("")
                except (httpx.HTTPError, ValueError) as error:
                    self._say(f"{self._settings.url}: {type(error).__name__}: {error}")
                await asyncio.sleep(self._settings.every_s)

    def take(self, samples: Samples) -> None:
        """A step of the run where the trainer's step has moved since the last reading."""
        seen = read_step(self._settings, samples, self._before)
        if seen is None or seen.step == self._step:
            return
        if self._step is not None:
            self._runs.open(self._settings.run).observe(seen)
        self._before, self._step = samples, seen.step

    def _say(self, trouble: str) -> None:
        if trouble and trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble
