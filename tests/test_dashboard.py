"""The page's server: what it answers, to whom, and how it ends. test_dashboard_page.py has a browser."""

import asyncio
import dataclasses
import http.client
import itertools
import json
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest

from common.errors import ConfigError
from dsl_server.dashboard.feed import Feed
from dsl_server.dashboard.history import POINTS, History, Point
from dsl_server.dashboard.serve import READERS, Dashboard
from dsl_server.watch import State, View
from tests.programs import Start, ends, programs, refuses, serve
from tests.views import line, shown, view

LINES = (line(1), line(2, client_only_accuracy=0.2))
Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def page() -> Iterator[Dashboard]:
    with shown(lambda: view(lines=LINES)) as page:
        yield page


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with programs(tmp_path) as start:
        yield start


def ask(page: Dashboard, path: str, method: str = "GET", host: str | None = None) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
    try:
        connection.request(method, path, headers={"Host": host} if host is not None else {})
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def events_of(text: str) -> list[tuple[str, Any]]:
    """Server-sent events by their specification: fields in lines, a blank line after each event."""
    assert text.endswith("\n\n")
    found = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        fields = dict(part.split(": ", 1) for part in block.split("\n"))
        if "data" in fields:
            found.append((fields["event"], json.loads(fields["data"])))
    return found


# ------------------------------------------------------------------ what is told


def test_a_reader_is_told_the_whole_and_then_what_has_changed() -> None:
    now = view()
    feed = Feed(lambda: now)

    async def read() -> list[tuple[str, Any]]:
        nonlocal now
        text = ""
        async for chunk in feed.events():
            text += chunk
            if text.count("event: view") == 1 and chunk.startswith("event: view"):
                feed.tick()  # the very same again
                await asyncio.sleep(0.5)
                now = view(lines=LINES)
                feed.tick()
            elif chunk.startswith("event: view"):
                now = view(lines=LINES, finished=True)
                feed.end()
        return events_of(text)

    told = asyncio.run(asyncio.wait_for(read(), 20))
    assert [name for name, _ in told] == ["points", "lines", "view", "lines", "view", "view"]
    assert told[1][1] == []
    assert told[3][1] == [dict(each) for each in LINES]
    assert [data["finished"] for name, data in told if name == "view"] == [False, False, True]
    plain = view().to_dict()
    del plain["lines"]
    assert told[2][1] == plain


def test_a_run_that_is_finished_stays_so_when_its_server_is_stopped() -> None:
    now = view(finished=True)
    feed = Feed(lambda: now)
    now = view(finished=False, reason="the run is over")
    feed.end()
    told = json.loads(feed.texts()["view"])
    assert (told["finished"], told["reason"]) == (True, None)


def test_why_a_run_ended_early_is_the_last_thing_told() -> None:
    now = view()
    feed = Feed(lambda: now)
    now = view(reason="client 1 (ward-1) was lost")
    feed.end()
    assert json.loads(feed.texts()["view"])["reason"] == "client 1 (ward-1) was lost"


def test_a_history_stays_small_and_spans_the_run() -> None:
    history = History()
    seconds = range(10_000)
    for second in seconds:
        history.add(Point(float(second), 7 * second, 100 * second, second))
    points = history.points
    assert POINTS / 2 <= len(points) <= POINTS
    assert points[0] == Point(0.0, 0, 0, 0)
    assert points[-1].seconds > 10_000 * (1 - 4 / POINTS)
    spans = [later.seconds - before.seconds for before, later in itertools.pairwise(points)]
    assert len(set(spans)) == 1, "evenly spread"
    assert all(point.samples == 7 * point.seconds for point in points), "counts, so that every mean is exact"


# ------------------------------------------------------------------ what is answered


def test_every_answer_forbids_what_the_page_does_not_need(page: Dashboard) -> None:
    for path in ("/", "/view.json", "/metrics.jsonl", "/static/page.js", "/nothing"):
        status, headers, _ = ask(page, path)
        assert status == (404 if path == "/nothing" else 200)
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'self';")
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"
        assert "access-control-allow-origin" not in headers
        assert "server" not in headers


def test_the_page_has_no_code_or_style_in_it_and_names_only_its_own_files(page: Dashboard) -> None:
    _, headers, body = ask(page, "/")
    text = body.decode()
    assert headers["content-type"] == "text/html; charset=utf-8"
    assert re.findall(r"<script(?! src=)[^>]*>|<style|\son\w+=|\sstyle=|javascript:", text) == []
    ids = re.findall(r'\sid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    assert {f"state-{state}" for state in get_args(State)} <= set(ids), "each state has a shape"
    named = re.findall(r'(?:src|href)="([^#"]+)"', text)
    assert named
    for path in named:
        status, kind, _ = ask(page, f"/{path}")
        assert status == 200, path
        assert path.endswith((".js", ".css", ".svg", "json", "jsonl")), path
        assert ("javascript" in kind["content-type"]) == path.endswith(".js")


def test_the_lines_are_those_of_the_file_byte_for_byte(page: Dashboard) -> None:
    _, headers, body = ask(page, "/metrics.jsonl")
    assert headers["content-type"] == "application/jsonl"
    assert body.decode() == "".join(json.dumps(each) + "\n" for each in LINES)


def test_the_view_is_one_json_text(page: Dashboard) -> None:
    told = json.loads(ask(page, "/view.json")[2])
    assert set(told) == {"view", "lines", "points"}
    assert told["lines"] == [dict(each) for each in LINES]
    assert told["points"] == [[3.0, 100, 4_502_100, 90]]
    assert told["view"]["test"] == LINES[-1]["test"]


def test_events_come_as_a_stream_that_ends_with_the_run() -> None:
    now = view()
    with shown(lambda: now) as page:
        connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=10)
        connection.request("GET", "/events")
        answer = connection.getresponse()
        assert answer.getheader("content-type") == "text/event-stream; charset=utf-8"
        text = ""
        while not text.endswith("\n\n") or "event: view" not in text:
            text += answer.readline().decode()
        now = dataclasses.replace(now, finished=True)
        page.stop()
        told = events_of(text + answer.read().decode())
        connection.close()
    assert [data["finished"] for name, data in told if name == "view"] == [False, True]


@pytest.mark.timeout(240)
def test_who_reads_is_told_that_the_server_was_stopped(start: Start) -> None:
    server, _ = serve(start, "--dashboard", 0)
    assert server.stdout is not None
    port = int(server.stdout.readline().rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", "/events")
    answer = connection.getresponse()
    server.send_signal(signal.SIGINT)
    told = events_of(answer.read().decode())
    connection.close()
    assert ends(server, 30)[0] == 130
    assert told[-1][0] == "view"
    assert told[-1][1]["reason"] == "the server was stopped (Ctrl-C)"


def test_it_only_tells(page: Dashboard) -> None:
    for path in ("/", "/view.json", "/metrics.jsonl", "/events", "/static/page.js"):
        for method in ("POST", "PUT", "DELETE", "PATCH"):
            assert ask(page, path, method)[0] == 405, (path, method)
        assert ask(page, path, "HEAD")[0] == 200
        assert ask(page, path, "HEAD")[2] == b""


@pytest.mark.parametrize(
    "path", ["/static/../app.py", "/static/%2e%2e/app.py", "/static//etc/passwd", "/static"]
)
def test_no_other_file_is_served(page: Dashboard, path: str) -> None:
    assert ask(page, path)[0] in (307, 404, 405)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_another_name_for_this_machine_is_refused(page: Dashboard, host: str) -> None:
    """A page from elsewhere that has its own name lead here (DNS rebinding) comes under that name."""
    for path in ("/", "/view.json", "/events", "/static/page.js"):
        status, headers, body = ask(page, path, host=host)
        assert status == 421
        assert b"wards" not in body
        assert "content-security-policy" in headers


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:1", "[::1]:8080", "LOCALHOST:80"])
def test_this_machine_may_be_named_as_it_is_also_through_a_tunnel(page: Dashboard, host: str) -> None:
    assert ask(page, "/view.json", host=host)[0] == 200


def test_whoever_says_another_address_may_use_any_name() -> None:
    page = Dashboard(0, "0.0.0.0")
    page.start(view)
    try:
        assert (
            page.greeting == f"the run is shown, unencrypted and to anyone, at http://THIS-HOST:{page.port}"
        )
        assert ask(page, "/view.json", host="gpu-host.example")[0] == 200
    finally:
        page.stop()


def test_readers_are_so_many_and_no_more(page: Dashboard) -> None:
    readers = [socket.create_connection(("127.0.0.1", page.port)) for _ in range(READERS)]
    try:
        assert ask(page, "/view.json")[0] == 503
    finally:
        for reader in readers:
            reader.close()


# ------------------------------------------------------------------ what cannot be


def test_a_port_in_use_is_told_before_anything_is_begun(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refuses(start("dsl-server", "--dashboard", port))
    assert said == (
        f"dsl-server: error: --dashboard {port}: 127.0.0.1 cannot be bound (Address already in use); choose "
        "another port, or --dashboard-host\n"
    )


@pytest.mark.parametrize(
    ("port", "host", "words"),
    [
        (65536, "127.0.0.1", "--dashboard 65536: say a port from 0 (any) to 65535"),
        (0, "192.0.2.1", "--dashboard 0: 192.0.2.1 cannot be bound (Cannot assign requested address)"),
        (0, "no such host", "--dashboard 0: no such host cannot be bound ("),
    ],
)
def test_what_cannot_be_bound_is_named(port: int, host: str, words: str) -> None:
    with pytest.raises(ConfigError) as told:
        Dashboard(port, host)
    assert str(told.value).startswith(words)


@pytest.mark.parametrize("missing", ["starlette", "uvicorn"])
def test_what_is_not_installed_is_named_with_the_remedy(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)  # as Python marks what cannot be imported
    with pytest.raises(ConfigError) as told:
        Dashboard(0, "127.0.0.1")
    assert str(told.value) == f"--dashboard needs {missing}: pip install 'decoupled-split-learning[ui]'"


def test_a_view_is_json_whatever_is_not_a_number() -> None:
    strange = view(lines=({**line(1), "train": {"loss": float("nan"), "client_loss": None}},))

    def reject(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    texts = Feed(lambda: strange).texts()
    for text in texts.values():
        json.loads(text, parse_constant=reject)
    assert json.loads(texts["lines"])[0]["train"]["loss"] is None


def test_the_last_view_of_the_type_is_what_is_told() -> None:
    """Every number of a view reaches the page, under the name that it has."""
    told = json.loads(Feed(view).texts()["view"])
    assert set(told) == {each.name for each in dataclasses.fields(View)} - {"lines"}
