"""Numbers for Prometheus, at a port of their own. Knows how they are asked for, not which there are."""

import platform
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version

from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from common.errors import ConfigError


class Exporter:
    """Bound at once, so that a port in use is told before anything is begun; port 0 is any.

    Raises ConfigError when the port cannot be bound.
    """

    def __init__(self, port: int, host: str) -> None:
        if not 0 <= port <= 65535:
            raise ConfigError(f"--metrics-port {port}: say a port from 0 (any) to 65535")
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        try:
            self._server, self._thread = start_http_server(port, host, self._registry)
        except OSError as error:
            raise ConfigError(
                f"--metrics-port {port}: {host} cannot be bound ({error.strerror}); choose another port, or "
                "--metrics-host"
            ) from error
        self.port = self._server.server_port
        self.greeting = f"metrics at http://{f'[{host}]' if ':' in host else host}:{self.port}/metrics"

    def start(self, collect: Callable[[], Iterable[Metric]]) -> None:
        """From now on also what this gives, anew at each scrape; any thread may call it."""

        class Asked(Collector):
            def collect(self) -> Iterable[Metric]:
                return collect()

            def describe(self) -> Iterable[Metric]:
                return []  # else it would be asked before there is anything

        self._registry.register(Asked())

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def build(program: str) -> Metric:
    """Which program, of which release, on which Python."""
    known = {
        "program": program,
        "version": version("decoupled-split-learning"),
        "python": platform.python_version(),
        "torch": version("torch"),
    }
    return InfoMetricFamily("dsl_build", "The program and what it runs on.", known)


def gauge(name: str, meaning: str, value: float | None) -> Metric:
    """No sample where there is no value."""
    family = GaugeMetricFamily(name, meaning)
    if value is not None:
        family.add_metric([], value)
    return family


def counter(name: str, meaning: str, value: float) -> Metric:
    """name: without `_total`."""
    return CounterMetricFamily(name, meaning, value)


Values = Iterable[tuple[tuple[str, ...], float]]  # each after its labels' values


def gauges(name: str, meaning: str, labels: tuple[str, ...], values: Values) -> Metric:
    return _filled(GaugeMetricFamily(name, meaning, labels=labels), values)


def counters(name: str, meaning: str, labels: tuple[str, ...], values: Values) -> Metric:
    return _filled(CounterMetricFamily(name, meaning, labels=labels), values)


def of_wire(wire: Mapping[str, Mapping[str, int]]) -> Metric:
    """As `Traffic.by_kind` gives it; docs/architecture.md says which kinds there are."""
    values = [((direction, kind), n) for direction, kinds in wire.items() for kind, n in kinds.items()]
    return counters("dsl_bytes", "Serialized bytes by what they are.", ("direction", "kind"), values)


def of_phases(phases: Mapping[str, float]) -> Metric:
    values = [((phase,), seconds) for phase, seconds in phases.items()]
    return counters("dsl_seconds", "Seconds by what they were spent on.", ("phase",), values)


def _filled(family: GaugeMetricFamily | CounterMetricFamily, values: Values) -> Metric:
    for labels, value in values:
        family.add_metric(labels, value)
    return family
