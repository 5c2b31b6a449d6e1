"""What Ray's node agent and a vLLM server export, as far as the Fleet board asks for it: made-up values under their real names."""

import json
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, start_http_server

from deploy.grafana.panels import FOREIGN_METRICS

LABELS = {
    "ray_actors": {"State": "ALIVE"},
    "ray_object_store_memory": {"Location": "MMAP_SHM"},
    "ray_node_gpus_utilization": {"GpuIndex": "0"},
}


class ForeignExporter:
    """One /metrics with the series of both."""

    def __init__(self) -> None:
        registry = CollectorRegistry()
        for name in FOREIGN_METRICS:
            labels = LABELS.get(name, {})
            kind = Counter if name.endswith("_total") else Gauge
            metric = kind(name, "made up", list(labels), registry=registry)
            (metric.labels(**labels) if labels else metric).inc(3)
        self.server, self.thread = start_http_server(0, addr="127.0.0.1", registry=registry)

    def announce(self, folder: Path) -> None:
        """Announce the address as Ray's head node does."""
        target = {"labels": {"job": "ray"}, "targets": [f"127.0.0.1:{self.server.server_port}"]}
        (folder / "prom_metrics_service_discovery.json").write_text(json.dumps([target]))

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()
