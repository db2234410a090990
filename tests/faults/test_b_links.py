"""B, over links that only the kernel can have: packets late, lost, or gone. As root; else skipped."""

import json
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.faults.namespaces import ADDRESS, Namespaces, why_not
from tests.faults.processes import EPOCHS, SAMPLES, Federation, Process, accounts_of, succeeds
from tests.memory import resident_bytes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(why_not()), reason=f"no network namespaces here: {why_not()}"),
]

PORT = 50061
SERVER = f"{ADDRESS['there']}:{PORT}"
DETECTED_S = 10.0  # a peer that says nothing, by pings


@pytest.fixture
def run(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Federation]:
    """Its server is on the other side of the link."""
    flags = ("--insecure", *request.param)
    federation = Federation(tmp_path / "run", *flags, address=f"0.0.0.0:{PORT}")
    yield federation
    federation.end()


def served(run: Federation, link: Namespaces) -> Process:
    return run.serve(within=link.within("there"))


def joined(
    run: Federation, link: Namespaces, clients: int, side: str = "here", first: int = 0
) -> list[Process]:
    return [
        run.join(index, "--insecure", server=SERVER, within=link.within(side))
        for index in range(first, first + clients)
    ]


def events(run: Federation, kind: str) -> int:
    lines = (run.out / "audit.jsonl").read_text().splitlines()
    return sum(json.loads(line)["event"] == kind for line in lines)


def check_counts(run: Federation, clients: int) -> None:
    """Every batch of every client once, and nobody was taken for dead."""
    summary = json.loads((run.out / "summary.json").read_text())
    assert summary["samples_trained"] == EPOCHS * SAMPLES
    accounts = accounts_of(run.out)
    assert [client for client, *_ in accounts] == list(range(clients))
    assert all(left for _, left, _ in accounts)
    assert sum(applied["samples"] for *_, applied in accounts) == EPOCHS * SAMPLES
    assert events(run, "lost") == 0


@pytest.mark.parametrize(
    "run", [("--clients", 4), ("--clients", 4, "--method", "csl")], ids=["dsl", "csl"], indirect=True
)
def test_b1_a_tenth_of_a_second_and_a_hundredth_of_the_packets_lost_change_no_count(run: Federation) -> None:
    with Namespaces(delay=0.05, loss=0.01) as link:
        server = served(run, link)
        for process in (server, *joined(run, link, 4)):
            succeeds(process)
        assert link.dropped > 0
    check_counts(run, 4)
    assert events(run, "away") == 0, "nobody's silence was taken for death"


@pytest.mark.parametrize("run", [("--clients", 2)], indirect=True)
def test_b2_five_dark_seconds_are_nothing_and_twelve_are_noticed_and_made_up_for(run: Federation) -> None:
    with Namespaces(delay=0.005) as link:
        server = served(run, link)
        clients = joined(run, link, 2)
        run.wait_for(6)
        link.go_dark()
        time.sleep(DETECTED_S + 2)
        assert events(run, "away") == 2, "noticed while it is dark"
        link.come_back()
        for process in (server, *clients):
            succeeds(process)
    check_counts(run, 2)
    assert events(run, "came back") >= 2


@pytest.mark.parametrize("run", [("--clients", 2)], indirect=True)
def test_b6_a_link_that_is_dark_for_two_of_every_four_seconds_ends_exact(run: Federation) -> None:
    with Namespaces(delay=0.005) as link:
        server = served(run, link)
        clients = joined(run, link, 2)
        run.wait_for(1)
        began, flaps = time.monotonic(), 0
        while any(process.poll() is None for process in clients) and time.monotonic() - began < 120:
            link.go_dark()
            time.sleep(2)
            link.come_back()
            time.sleep(2)
            flaps += 1
        for process in (server, *clients):
            succeeds(process)
    assert flaps
    check_counts(run, 2)
    assert events(run, "came back") <= 2 * 2 * flaps, "not more often than the link gives cause"


@pytest.mark.parametrize(
    "run", [("--clients", 3, "--no-deterministic", "--codec", "activations=int4")], indirect=True
)
def test_b7_a_client_on_a_megabit_holds_up_neither_the_others_nor_memory(run: Federation) -> None:
    with Namespaces(delay=0.02, rate=1e6) as link:
        server = served(run, link)
        (slow,) = joined(run, link, 1)
        run.wait_for(1)
        near = [
            run.join(index, "--insecure", server=f"127.0.0.1:{PORT}", within=link.within("there"))
            for index in (1, 2)
        ]
        for process in near:
            succeeds(process)
        assert slow.poll() is None, "the others did not wait for it"
        before, most = resident_bytes(server.pid), 0
        while server.poll() is None and slow.poll() is None:
            with suppress(AssertionError):  # it ends at this moment
                most = max(most, resident_bytes(server.pid))
            time.sleep(0.2)
        assert 0 < most < before + (100 << 20)
        for process in (server, slow):
            succeeds(process)
    check_counts(run, 3)
