"""Prometheus: the newest value of every metric, to be scraped over HTTP. Needs the package ``prometheus-client``.

Who can reach the page can read it, so it listens on this machine alone unless ``--prometheus-address`` says otherwise.
``rollout/response_len/mean`` is ``miles_rollout_response_len_mean{run="..."}``.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from miles.tracking.tracker import Begun, Examples, Outcome, Point, RunInfo

_OTHER = re.compile(r"\W+", re.ASCII)
MAX_SERIES = 2000
"""Names of metrics that this run shows; user code may make any number of them."""


class PrometheusTracker:
    """See the module's docstring."""

    name: ClassVar[str] = "Prometheus"

    def __init__(self) -> None:
        self._registry: Any = None
        self._server: Any = None
        self._label = ""
        self._gauges: dict[str, Any] = {}
        self._taken: set[str] = set()

    def begin(self, run: RunInfo, before: Mapping[str, Any]) -> Begun:
        """Listen. Port 0 is one that is free."""
        from prometheus_client import CollectorRegistry, Gauge, start_http_server

        settings = run.settings
        registry = self._registry = CollectorRegistry()
        self._label = settings.get("prometheus_run_name") or run.name
        address, port = str(settings["prometheus_address"]), int(settings["prometheus_port"])
        self._server, _ = start_http_server(port, addr=address, registry=registry)
        info = Gauge("miles_run_info", "The run; always 1", ["run", "run_id"], registry=registry)
        info.labels(self._label, run.run_id).set(1)
        self._gauges["time"] = Gauge(
            "miles_last_record_timestamp_seconds", "When metrics came last", ["run"], registry=registry
        )
        self._taken |= {"miles_run_info", "miles_last_record_timestamp_seconds"}
        shown = f"[{address}]" if ":" in address else address
        return Begun({}, f"Prometheus: http://{shown}:{self._server.server_port}/metrics")

    def log(self, point: Point) -> None:
        """The values of the metrics from now on."""
        for name, value in {**point.metrics, **point.steps}.items():
            if (gauge := self._gauge(name)) is not None:
                gauge.labels(self._label).set(value)
        self._gauges["time"].labels(self._label).set(point.time)

    def _gauge(self, name: str) -> Any:
        from prometheus_client import Gauge

        key = f"metric {name}"
        if key not in self._gauges and len(self._gauges) < MAX_SERIES:
            plain = plain_name(name)
            if plain in self._taken:
                plain = f"{plain}_{zlib.crc32(name.encode()):08x}"
            self._taken.add(plain)
            self._gauges[key] = Gauge(plain, name, ["run"], registry=self._registry)
        return self._gauges.get(key)

    def examples(self, examples: Examples) -> None:
        """Prometheus has no place for texts."""

    def artefact(self, path: Path) -> None:
        """Prometheus has no place for files."""

    def finish(self, outcome: Outcome) -> str:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
        return ""


def plain_name(name: str) -> str:
    """A metric's name as Prometheus takes it."""
    return "miles_" + _OTHER.sub("_", name.replace("@", "_at_")).strip("_")
