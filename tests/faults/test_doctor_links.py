"""`dsl doctor` over links that are slow, and far: what it measures is what the proxy lets through."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dsl_lab.checks import Finding, Patient, examine
from tests.faults.proxy import Proxy
from tests.federation import serving, small_run

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[Proxy]:
    with serving(small_run(), tmp_path) as server, Proxy(server.port) as proxy:
        yield proxy


def seen(proxy: Proxy) -> dict[str, Finding]:
    findings = examine(Patient(f"127.0.0.1:{proxy.port}", None, False))
    return {finding.check: finding for finding in findings}


def rates(finding: Finding) -> tuple[float, float]:
    """Up and down, in bytes per second."""
    found = re.findall(r"([0-9.]+) MB/s", finding.found)
    return float(found[0]) * 1e6, float(found[1]) * 1e6


def test_a_slow_link_is_measured_each_way(proxy: Proxy) -> None:
    proxy.throttle(400_000.0, "up")
    proxy.throttle(1_600_000.0, "down")
    finding = seen(proxy)["bandwidth"]
    up, down = rates(finding)
    assert 40_000 < up < 600_000  # on a machine with other work it is less, and never more
    assert 160_000 < down < 2_400_000
    assert "--link auto" in finding.remedy


def test_a_link_on_which_nothing_large_passes(proxy: Proxy) -> None:
    proxy.throttle(1000.0)
    finding = seen(proxy)["bandwidth"]
    assert finding.state == "failed"
    assert "a large message did not pass" in finding.found
    assert "too slow to train over" in finding.remedy


def test_a_far_server_has_its_round_trip(proxy: Proxy) -> None:
    proxy.delay(0.05)
    findings = seen(proxy)
    milliseconds = re.match(r"([0-9.]+) ms", findings["round trip"].found)
    assert milliseconds is not None
    assert float(milliseconds[1]) >= 100
    assert findings["clock"].state == "ok"
    found = re.search(r"is ([0-9.]+) s .* \(give or take ([0-9.]+) s\)", findings["clock"].found)
    assert found is not None
    apart, doubt = map(float, found.groups())
    assert doubt >= 0.05
    assert apart < doubt / 2, "what the way takes is no difference of the clocks"
