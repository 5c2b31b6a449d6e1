"""Where snapshots come from: the run's own /metrics, or a Prometheus server that scrapes it."""

from functools import cached_property
from typing import Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

from opd_governor.actors.governor.snapshot import Snapshot


class SourceDownError(Exception):
    """The source did not answer, or not in its format. For the governor that is a state, blindness, and not a failure."""


class MetricsSource(Protocol):
    """Anything that can be asked for all series of the run."""

    def read(self) -> Snapshot:
        """Raises SourceDownError."""
        ...


class OwnMetrics:
    """The run's own /metrics in Prometheus text format.

    >>> OwnMetrics("http://127.0.0.1:9300/metrics", run="sums").url
    'http://127.0.0.1:9300/metrics'
    """

    def __init__(self, url: str, run: str, token: str | None = None, timeout_s: float = 2.0) -> None:
        self.url = url
        self.run = run
        self._token, self._timeout_s = token, timeout_s

    @cached_property  # a source travels to the governor's actor, its client does not
    def _client(self) -> httpx.Client:
        return _client(self._timeout_s, {"Authorization": f"Bearer {self._token}"} if self._token else {})

    def read(self) -> Snapshot:
        text = _get(self._client, self.url, {}).text
        try:
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        except ValueError as error:
            raise SourceDownError(f"{self.url}: not Prometheus text: {error}") from error
        ours = [(s.name, s.labels, s.value) for s in samples if s.name.startswith("opd_") and s.labels.get("run") == self.run]
        if not ours:
            raise SourceDownError(f"{self.url}: no metrics of run {self.run}")
        return Snapshot.of(ours)


class PrometheusServer:
    """A Prometheus server: one instant query for all series of the run and the time of their scrape."""

    def __init__(self, url: str, run: str, timeout_s: float = 2.0) -> None:
        self.url = url.rstrip("/") + "/api/v1/query"
        self.run = run
        scraped = f'timestamp(opd_heartbeat_timestamp_seconds{{run="{run}"}})'
        # `or` drops what has the same labels apart from the name: the time of the scrape needs a label of its own.
        self.query = f'{{__name__=~"opd_.*",run="{run}"}} or label_replace({scraped}, "is", "scrape_time", "", "")'
        self._timeout_s = timeout_s

    @cached_property
    def _client(self) -> httpx.Client:
        return _client(self._timeout_s, {})

    def read(self) -> Snapshot:
        response = _get(self._client, self.url, {"query": self.query})
        try:
            answers = [(dict(each["metric"]), float(each["value"][1])) for each in response.json()["data"]["result"]]
        except (ValueError, KeyError, TypeError) as error:
            raise SourceDownError(f"{self.url}: not an answer of Prometheus: {error!r}") from error
        times = [value for labels, value in answers if labels.get("is") == "scrape_time"]
        if not times:
            raise SourceDownError(f"{self.url}: no metrics of run {self.run}")
        return Snapshot.of(((labels.pop("__name__"), labels, value) for labels, value in answers if "__name__" in labels), max(times))


def _client(timeout_s: float, headers: dict[str, str]) -> httpx.Client:
    # Readings lie a step apart: a connection kept open would only be found dead.
    return httpx.Client(timeout=timeout_s, trust_env=False, headers=headers, limits=httpx.Limits(max_keepalive_connections=0))


def _get(client: httpx.Client, url: str, params: dict[str, str]) -> httpx.Response:
    try:
        return client.get(url, params=params).raise_for_status()
    except httpx.HTTPError as error:
        raise SourceDownError(f"{url}: {error or type(error).__name__}") from error
