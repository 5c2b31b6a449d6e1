"""Where snapshots come from: the run's own /metrics, or a Prometheus server that scrapes it."""

from functools import cached_property
from typing import Protocol

import httpx
from prometheus_client.parser import text_string_to_metric_families

from actors.governor.signals import Snapshot


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

    @cached_property  # a source travels to the governor's actor; its connections do not
    def _client(self) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self._token}"} if self._token else {}
        return httpx.Client(timeout=self._timeout_s, trust_env=False, headers=headers)

    def read(self) -> Snapshot:
        text = _get(self._client, self.url, {}).text
        try:
            samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        except ValueError as error:
            raise SourceDownError(f"{self.url}: not Prometheus text: {error}") from error
        return Snapshot.of((s.name, s.labels, s.value) for s in samples if s.name.startswith("opd_") and s.labels.get("run") == self.run)


class PrometheusServer:
    """A Prometheus server: one instant query for all series of the run.

    >>> PrometheusServer("http://127.0.0.1:9090", run="sums").query
    '{__name__=~"opd_.*",run="sums"}'
    """

    def __init__(self, url: str, run: str, timeout_s: float = 2.0) -> None:
        self.url = url.rstrip("/") + "/api/v1/query"
        self.query = f'{{__name__=~"opd_.*",run="{run}"}}'
        self._timeout_s = timeout_s

    @cached_property
    def _client(self) -> httpx.Client:
        return httpx.Client(timeout=self._timeout_s, trust_env=False)

    def read(self) -> Snapshot:
        response = _get(self._client, self.url, {"query": self.query})
        try:
            samples = response.json()["data"]["result"]
            return Snapshot.of((s["metric"]["__name__"], _without_name(s["metric"]), float(s["value"][1])) for s in samples)
        except (ValueError, KeyError, TypeError) as error:
            raise SourceDownError(f"{self.url}: not an answer of Prometheus: {error!r}") from error


def _get(client: httpx.Client, url: str, params: dict[str, str]) -> httpx.Response:
    try:
        return client.get(url, params=params).raise_for_status()
    except httpx.HTTPError as error:
        raise SourceDownError(f"{url}: {error or type(error).__name__}") from error


def _without_name(labels: dict[str, str]) -> dict[str, str]:
    return {key: value for key, value in labels.items() if key != "__name__"}
