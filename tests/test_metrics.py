"""What Prometheus is told of a real run is what summary.json says; and Grafana asks for nothing else."""

import contextlib
import itertools
import json
import re
import socket
import time
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsl_server.trackers import numbers_of
from tests.programs import Start, ends, programs, refuses, serve
from tests.test_trackers import read_back

ROOT = Path(__file__).parent.parent
Scrape = dict[tuple[str, frozenset[tuple[str, str]]], float]  # by name and labels

pytestmark = pytest.mark.timeout(110)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with programs(tmp_path) as start:
        yield start


def scrape(address: str) -> Scrape:
    with urllib.request.urlopen(address, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def of(scraped: Scrape, metric: str, /, **labels: str) -> float:
    return scraped[metric, frozenset(labels.items())]


def told(process: Any) -> str:
    """Where a program says its metrics are."""
    for line in process.stdout:
        if found := re.search(r"metrics at (\S+)", line):
            return found[1]
    raise AssertionError("it told no address")


def falls(before: Scrape, after: Scrape) -> list[str]:
    """Counters that are less than they were."""
    return [key[0] for key, value in before.items() if key[0].endswith("_total") and after[key] < value]


def test_a_real_run_is_told_as_its_summary_has_it(start: Start, tmp_path: Path) -> None:
    """Two clients and TensorBoard; scraped all the while, and at the end."""
    watched = ["--metrics-port", 0, "--linger", 60, "--tensorboard", tmp_path / "tb"]
    server, address = serve(
        start, *watched, "--clients", 2, "--epochs", 2, "--checkpoint-every", 2, "--test-limit", 20
    )
    metrics = told(server)
    clients = [
        start("dsl-client", "--server", address, "--name", name, "--metrics-port", 0) for name in ("a", "b")
    ]
    at_client = told(clients[0])
    seen, theirs = [scrape(metrics)], {}
    while not of(seen[-1], "dsl_finished"):
        with contextlib.suppress(OSError):  # it ends before the server does
            theirs |= scrape(at_client)
        seen.append(scrape(metrics))
        time.sleep(0.2)
    for process in clients:
        assert ends(process, 30)[0] == 0
    for before, after in itertools.pairwise(seen):
        assert falls(before, after) == []

    wait_until_summed(tmp_path / "dsl-server-0/summary.json")
    last = scrape(metrics)
    server.send_signal(2)  # it lingers
    code, words = ends(server, 30)
    assert code == 0, words

    summary = json.loads((tmp_path / "dsl-server-0/summary.json").read_text())
    assert of(last, "dsl_samples_trained_total") == summary["samples_trained"] == 400
    for name, value in summary["test"].items():
        assert of(last, f"dsl_test_{name}") == value
    for direction in ("up", "down"):
        for kind, count in summary["wire"][direction].items():
            assert of(last, "dsl_bytes_total", direction=direction, kind=kind) == count
        later = of(last, "dsl_socket_bytes_total", direction=direction) - summary["wire"]["socket"][direction]
        assert 0 <= later < 4096, "connections end after the summary"
    for phase, seconds in summary["seconds"]["server"].items():
        assert of(last, "dsl_seconds_total", phase=phase) == pytest.approx(seconds, abs=1e-9)
    assert of(last, "dsl_run_seconds") == summary["seconds"]["wall"]
    assert of(last, "dsl_clients", state="left") == 2
    assert of(last, "dsl_done_ratio") == 1
    each = [dict(labels) for name, labels in last if name == "dsl_client_samples_trained_total"]
    assert sorted(label["name"] for label in each) == ["a", "b"]
    assert sum(of(last, "dsl_client_samples_trained_total", **labels) for labels in each) == 400
    up = sum(of(last, "dsl_client_bytes_total", **labels, direction="up") for labels in each)
    assert up == sum(summary["wire"]["up"].values())
    assert of(last, "dsl_build_info", **build_of(last))
    assert (
        build_of(last)["version"]
        == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    )

    lines = [json.loads(line) for line in (tmp_path / "dsl-server-0/metrics.jsonl").read_text().splitlines()]
    assert read_back(tmp_path / "tb") == {line["epoch"]: numbers_of(line) for line in lines}

    names = {name for name, _ in last} | {name for name, _ in theirs}
    assert {"dsl_outbox_batches", "dsl_checkpoint_age_seconds"} < names
    if not (ROOT / "docker").exists() or not (ROOT / "docs").exists():
        pytest.skip("docker/ and docs/ are not in this distribution")
    asked = asked_by_grafana()
    assert len(asked) > 15
    assert asked <= names
    described = set(re.findall(r"`(dsl_[a-z_]+)", (ROOT / "docs/watching.md").read_text()))
    assert described == {name for name in names if name.startswith("dsl_")}


def wait_until_summed(summary: Path) -> None:
    for _ in range(300):
        if summary.exists():
            return
        time.sleep(0.1)
    raise AssertionError("no summary")


def build_of(scraped: Scrape) -> dict[str, str]:
    return next(dict(labels) for name, labels in scraped if name == "dsl_build_info")


def asked_by_grafana() -> set[str]:
    dashboard = json.loads((ROOT / "docker/grafana/dashboard.json").read_text())
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    asked += [variable["definition"] for variable in dashboard["templating"]["list"]]
    return {name for text in asked for name in re.findall(r"\b(?:dsl|process)_\w+", text)}


def test_grafana_finds_its_source_and_every_panel_its_place() -> None:
    if not (ROOT / "docker").exists():
        pytest.skip("docker/ is not in this distribution")
    dashboard = json.loads((ROOT / "docker/grafana/dashboard.json").read_text())
    panels = dashboard["panels"]
    source = (ROOT / "docker/grafana/provisioning/datasources/prometheus.yaml").read_text()
    for asks in (*panels, *(target for panel in panels for target in panel["targets"])):
        assert f"uid: {asks['datasource']['uid']}\n" in source
    taken = [
        (x, y)
        for place in (panel["gridPos"] for panel in panels)
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(taken) == len(set(taken)), "none lies on another"
    assert {x for x, _ in taken} <= set(range(24))
    jobs = set(re.findall(r"job_name: (\S+)", (ROOT / "docker/prometheus.yml").read_text()))
    assert jobs == {"dsl-server", "dsl-client"}
    text = json.dumps(dashboard)
    assert all(job in jobs for job in re.findall(r'job=\\"([^\\]+)\\"', text))


@pytest.mark.parametrize("name", ["dsl-server", "dsl-client"])
def test_a_port_in_use_is_told_in_a_line(name: str, start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        flags = ["--server", f"127.0.0.1:{port}"] if name == "dsl-client" else ["--listen", "127.0.0.1:0"]
        said = refuses(start(name, *flags, "--metrics-port", port))
    assert said == (
        f"{name}: error: --metrics-port {port}: 127.0.0.1 cannot be bound (Address already in use); choose "
        "another port, or --metrics-host\n"
    )


@pytest.mark.parametrize("port", [-1, 65536])
def test_what_is_no_port_is_told_in_a_line(port: int, start: Start) -> None:
    said = refuses(start("dsl-server", "--metrics-port", port))
    assert said == f"dsl-server: error: --metrics-port {port}: say a port from 0 (any) to 65535\n"


def test_a_host_that_is_not_this_one_is_told_in_a_line(start: Start) -> None:
    said = refuses(start("dsl-server", "--metrics-port", 0, "--metrics-host", "192.0.2.1"))
    assert "--metrics-port 0: 192.0.2.1 cannot be bound (Cannot assign requested address)" in said
