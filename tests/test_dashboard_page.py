"""The page in a real browser, headless: of a real run by real processes, and of made-up ones."""

import dataclasses
import json
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

import pytest

from dsl_server.watch import View
from tests.programs import Start, programs, serve
from tests.views import client, line, shown, view

playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
LINES = (line(1), line(2))
SOON_MS = 20_000
LOADED_S = 150.0  # for processes that import torch and train, on a machine with other work


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"no browser here: none of {', '.join(BROWSERS)}; apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


class Tab:
    """A page that is open, what it asked for, and what it complained about."""

    def __init__(self, page: Any, address: str) -> None:
        self.page, self.address = page, address
        self.asked: list[str] = []
        self.complaints: list[str] = []
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("console", lambda said: self.complaints.append(said.text))
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.set_default_timeout(SOON_MS)
        page.goto(address)

    def text(self, selector: str) -> str:
        text: str = self.page.locator(selector).inner_text()
        return text

    def rows(self, table: str) -> list[list[str]]:
        """The cells of a table's body, whether or not it is open."""
        cells: list[list[str]] = self.page.eval_on_selector_all(
            f"#{table} tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.textContent))"
        )
        return cells

    def values(self, table: str) -> list[list[float | None]]:
        """The same numbers as they came, before they were rounded."""
        script = """rows => rows.map(row => [...row.cells].map(cell => {
            const {value} = cell.querySelector("data");
            return value === "" ? null : Number(value);
        }))"""
        values: list[list[float | None]] = self.page.eval_on_selector_all(f"#{table} tbody tr", script)
        return values

    def wait_until(self, said: Callable[[], bool], seconds: float = SOON_MS / 1000) -> None:
        deadline = time.monotonic() + seconds
        while not said():
            assert time.monotonic() < deadline, self.text("body")
            self.page.wait_for_timeout(50)

    def overflows(self) -> bool:
        """Whether the page as a whole scrolls sideways."""
        wide: bool = self.page.evaluate(
            "document.documentElement.scrollWidth > document.documentElement.clientWidth"
        )
        return wide


@pytest.fixture
def tab(browser: Any) -> Iterator[Callable[[str], Tab]]:
    """tab(address) opens it."""
    contexts = []

    def open_one(address: str, **settings: Any) -> Tab:
        contexts.append(browser.new_context(viewport={"width": 1200, "height": 900}, **settings))
        return Tab(contexts[-1].new_page(), address)

    yield open_one
    for context in contexts:
        context.close()


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with programs(tmp_path) as start:
        yield start


def address_of(process: subprocess.Popen[str]) -> str:
    """Where the server says that its page is: its second line."""
    assert process.stdout is not None
    said = process.stdout.readline()
    found = re.search(r"the run is shown at (http://127\.0\.0\.1:\d+)$", said.strip())
    assert found, said
    return found[1]


def rounded(value: float | None, digits: int, times: float = 1) -> str:
    """As a person expects it, by decimal arithmetic."""
    if value is None:
        return "–"
    exact = Decimal(value) * Decimal(times)
    return f"{exact.quantize(Decimal(1).scaleb(-digits), ROUND_HALF_UP):,}"


def megabytes(count: int) -> str:
    return "<0.01" if 0 < count < 5000 else rounded(count, 2, 1e-6)


# ------------------------------------------------------------------ a real run


@pytest.mark.timeout(500)
def test_a_run_is_followed_to_its_end_and_its_numbers_are_those_of_metrics_jsonl(
    start: Start, tab: Callable[[str], Tab], tmp_path: Path
) -> None:
    flags = ["--clients", 2, "--quorum", 1, "--epochs", 4, "--train-limit", 800, "--name", "wards"]
    server, address = serve(start, *flags, "--dashboard", 0)
    shown = tab(address_of(server))
    shown.wait_until(lambda: shown.text("#stage") == "waiting for clients, 0 of 2 came")
    assert [row[1] for row in shown.rows("clients-table")] == ["awaited", "awaited"]

    stays, goes = (start("dsl-client", "--server", address, "--name", name) for name in ("ward-1", "ward-2"))
    shown.wait_until(lambda: len(shown.rows("accuracy-table")) >= 1, LOADED_S)
    assert shown.text("#stage") == "training"
    at_work = {row[0]: row[1] in ("training", "waiting") for row in shown.rows("clients-table")}
    assert at_work == {"ward-1": True, "ward-2": True}
    stays.send_signal(signal.SIGSTOP)  # else the run's end soon takes the place of what is told here
    goes.kill()
    shown.wait_until(lambda: shown.rows("clients-table")[0][:2] == ["ward-2", "lost"])
    shown.wait_until(lambda: "ward-2 is lost" in shown.text("#news"))
    stays.send_signal(signal.SIGCONT)

    assert stays.wait(timeout=LOADED_S) == 0
    assert server.wait(timeout=LOADED_S) == 0
    shown.wait_until(lambda: shown.text("#stage") == "finished")
    check_numbers(shown, tmp_path / "dsl-server-0")
    assert [row[:2] for row in shown.rows("clients-table")] == [["ward-2", "lost"], ["ward-1", "left"]]
    assert shown.page.locator("#trouble").is_hidden(), (
        "a run that is finished is not a connection that is lost"
    )
    assert shown.complaints == []
    assert {url.split("/")[2] for url in shown.asked} == {shown.address.split("/")[2]}, (
        "nothing from elsewhere"
    )


def check_numbers(shown: Tab, folder: Path) -> None:
    """Every cell against the run's own files, read here."""
    lines = [json.loads(each) for each in (folder / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((folder / "summary.json").read_text())
    assert [each["epoch"] for each in lines] == [1, 2, 3, 4]
    tests, trains = [each["test"] for each in lines], [each["train"] for each in lines]

    accuracies = [
        [each["epoch"], t["accuracy"], t["client_only_accuracy"]]
        for each, t in zip(lines, tests, strict=True)
    ]
    assert shown.values("accuracy-table") == accuracies
    assert shown.rows("accuracy-table") == [
        [str(e), rounded(a, 2, 100), rounded(b, 2, 100)] for e, a, b in accuracies
    ]
    losses = [
        [each["epoch"], test["loss"], train["loss"], train["client_loss"]]
        for each, test, train in zip(lines, tests, trains, strict=True)
    ]
    assert shown.values("loss-table") == losses
    assert shown.rows("loss-table") == [
        [str(epoch), *(rounded(each, 4) for each in of)] for epoch, *of in losses
    ]
    counts = [[each[k] for k in ("epoch", "seconds", "samples_trained")] for each in lines]
    moved = [[each["wire"]["up"], each["wire"]["down"]] for each in lines]
    assert shown.values("lines-table") == [[*a, *b] for a, b in zip(counts, moved, strict=True)]
    assert shown.rows("lines-table") == [
        [str(epoch), rounded(seconds, 1), f"{samples:,}", megabytes(up), megabytes(down)]
        for (epoch, seconds, samples), (up, down) in zip(counts, moved, strict=True)
    ]

    assert shown.text("#accuracy") == f"{rounded(tests[-1]['accuracy'], 2, 100)} %"
    assert shown.text("#alone") == f"client alone {rounded(tests[-1]['client_only_accuracy'], 2, 100)}%"
    assert shown.text("#loss").strip() == rounded(tests[-1]["loss"], 4)
    assert shown.text("#samples") == f"{summary['samples_trained']:,} samples, mean of the run"
    up, down = summary["wire"]["up"], summary["wire"]["down"]
    kinds = {row[0]: row[1:] for row in shown.rows("traffic-table")}
    for kind in ("activations", "labels", "evaluation", "framing"):
        assert kinds[kind] == [megabytes(up[kind]), megabytes(down.get(kind, 0))], kind
    assert "gradients" not in kinds, "none travel in DSL"
    label = shown.page.get_attribute("#accuracy-chart [role=img]", "aria-label")
    assert f"joined {rounded(tests[-1]['accuracy'], 2, 100)}%" in label


# ------------------------------------------------------------------ how it looks


def test_on_a_phone_nothing_is_cut_off_in_the_light_and_in_the_dark(tab: Callable[..., Tab]) -> None:
    long = "a-run-with-a-name-that-is-longer-than-any-phone-is-wide-" * 3
    now = view(
        name=long, lines=LINES, clients=(client(0, name=long, up=123_456_789_012), client(1, state="away"))
    )
    grounds = set()
    with shown(lambda: now) as page:
        for scheme in ("light", "dark"):
            phone = tab(f"http://127.0.0.1:{page.port}", color_scheme=scheme)
            for width in (360, 390, 768, 1200, 1920):
                phone.page.set_viewport_size({"width": width, "height": 740})
                phone.wait_until(lambda: phone.text("#accuracy") == "25.00 %")  # noqa: B023
                phone.page.eval_on_selector_all("details", "all => all.forEach(each => each.open = true)")
                phone.page.wait_for_timeout(100)
                assert not phone.overflows(), (scheme, width)
            grounds.add(phone.page.evaluate("getComputedStyle(document.body).backgroundColor"))
            assert phone.complaints == []
    assert len(grounds) == 2


def test_charts_are_drawn_and_follow_the_pointer(tab: Callable[[str], Tab]) -> None:
    now = view(lines=LINES)
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        legend = "#accuracy-chart .legend li:first-child b"
        open_one.wait_until(lambda: open_one.text(legend) == "25.00%")
        drawn = """canvas => canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height)
            .data.some(value => value > 0)"""
        assert open_one.page.eval_on_selector("#accuracy-chart canvas", drawn)
        over = open_one.page.locator("#accuracy-chart .u-over")
        over.hover(position={"x": 25, "y": 40})
        open_one.wait_until(lambda: open_one.text(legend) == "12.50%")
        now = view(lines=(*LINES, line(3)))
        open_one.wait_until(lambda: open_one.text("#accuracy") == "37.50 %")
        assert open_one.text(legend) == "12.50%", "the pointer is still there"
        open_one.page.mouse.move(0, 0)
        open_one.wait_until(lambda: open_one.text(legend) == "37.50%")
        pixels = """canvas => canvas.toDataURL()"""
        light = open_one.page.eval_on_selector("#accuracy-chart canvas", pixels)
        open_one.page.emulate_media(color_scheme="dark")
        open_one.wait_until(lambda: open_one.page.eval_on_selector("#accuracy-chart canvas", pixels) != light)
        names = open_one.page.locator("#accuracy-chart .legend li:visible")
        assert names.count() == 1, "a line that has no numbers is not named"


def test_another_metric_is_called_by_its_name_and_is_no_share(tab: Callable[[str], Tab]) -> None:
    told = [
        {"name": "mypackage.goals:mae", "joined": value, "client_only": 2 * value} for value in (3.5, 1.25)
    ]
    lines = tuple(line(epoch, accuracy=None, metric=one) for epoch, one in enumerate(told, 1))
    now = view(lines=lines, metric="mae")
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: len(open_one.rows("accuracy-table")) == 2)
        assert open_one.values("accuracy-table") == [[1, 3.5, 7.0], [2, 1.25, 2.5]]
        open_one.wait_until(lambda: open_one.text("#accuracy").strip() == "1.2500")
        assert open_one.text("#alone") == "client alone 2.5000"
        assert open_one.text("#accuracy-title") == "Test mae"
        assert open_one.text("#accuracy-chart .legend li:first-child b") == "1.2500"
        named = open_one.page.locator("#accuracy-table caption").text_content()
        assert named == "Test mae after each epoch that was scored"
        assert "ccuracy" not in open_one.text("body")
        assert open_one.complaints == []


def test_tables_open_by_the_keyboard_and_are_named_for_who_listens(tab: Callable[[str], Tab]) -> None:
    now = view(lines=LINES)
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: len(open_one.rows("accuracy-table")) == 2)
        summary = open_one.page.get_by_text("Test accuracy as a table")
        for _ in range(20):
            open_one.page.keyboard.press("Tab")
            if summary.evaluate("each => each === document.activeElement"):
                break
        open_one.page.keyboard.press("Enter")
        table = open_one.page.get_by_role("table", name="Test accuracy after each epoch that was scored")
        assert table.is_visible()
        assert table.get_by_role("columnheader").all_inner_texts() == [
            "epoch",
            "joined, %",
            "client alone, %",
        ]
        assert table.get_by_role("rowheader").all_inner_texts() == ["1", "2"]
        tables = open_one.page.locator("table")
        for index in range(tables.count()):
            assert tables.nth(index).locator("caption").count() == 1
        for width in (1200, 360):  # laid out as a table, and as cards
            open_one.page.set_viewport_size({"width": width, "height": 740})
            clients = open_one.page.get_by_role("table", name="Each client, those that need a look first")
            assert clients.get_by_role("row").count() == 3
            assert clients.get_by_role("rowheader").all_inner_texts() == ["ward-0", "ward-1"]
            assert clients.get_by_role("cell").count() == 2 * 9


def test_hundreds_of_clients_those_that_lag_first(tab: Callable[[str], Tab]) -> None:
    clients = [client(index) for index in range(300)]
    clients[7] = client(7, state="away", lag_s=31.0)
    clients[120] = client(120, lag_s=12.0)
    clients[250] = client(250, lag_s=48.0)
    clients[299] = client(299, state="lost", reason="its connection was lost")
    clients[3] = client(3, state="left")
    now = view(clients_expected=300, clients=tuple(clients))
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: len(open_one.rows("clients-table")) == 300)
        names = [row[0] for row in open_one.rows("clients-table")]
        assert names[:5] == ["ward-299", "ward-7", "ward-250", "ward-120", "ward-0"]
        assert names[-1] == "ward-3"
        assert open_one.text("#clients-count") == "1 lost, 1 away, 297 training, 1 left"
        assert open_one.text("#reasons") == "its connection was lost"
        box = open_one.page.locator(".tall").bounding_box()
        assert box["height"] < 700, "they scroll in a box of their own"


def test_names_are_shown_and_never_obeyed(tab: Callable[[str], Tab]) -> None:
    """A client says its name: it may be anything."""
    name = "<img src=x onerror=\"document.title='taken'\"><b>bold</b>"
    now = view(name=name, clients=(client(0, name=name), client(1, state="lost", reason=name)))
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: open_one.text("h1") == name)
        assert sorted(row[0] for row in open_one.rows("clients-table")) == sorted([name, "ward-1"])
        assert open_one.page.locator("img, b:text('bold')").count() == 0
        assert "taken" not in open_one.page.title().replace(name, "")
        assert open_one.complaints == []


def test_what_not_every_run_has_is_said_where_it_is(tab: Callable[[str], Tab]) -> None:
    now = view(saved_s=75.0, skipped=2, replayed=12_800)
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: "2 steps left out" in open_one.text("#also"))
        assert "last checkpoint 1:15 ago" in open_one.text("#also")
        assert "12,800 samples learned from once more" in open_one.text("#also")
        assert "about 0:21 left" in open_one.text(".stage")


# ------------------------------------------------------------------ when it ends


def test_why_a_run_ended_early_is_said(tab: Callable[[str], Tab]) -> None:
    now = view()
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: open_one.text("#stage") == "training")
        now = view(reason="client 1 (ward-1) was lost")
        page.stop()
        open_one.wait_until(lambda: open_one.text("#stage") == "ended early")
        assert "ended before it was finished: client 1 (ward-1) was lost" in open_one.text("#trouble")


def test_a_connection_that_is_lost_is_said_and_found_again(tab: Callable[[str], Tab]) -> None:
    now: View = view(lines=LINES)
    with shown(lambda: now) as page:
        open_one = tab(f"http://127.0.0.1:{page.port}")
        open_one.wait_until(lambda: open_one.text("#stage") == "training")
        page.stop()  # without a word of the run's end, as when the server dies
        open_one.wait_until(lambda: "connection to the server is lost" in open_one.text("#trouble"))
        assert open_one.text("#accuracy") == "25.00 %", "the last numbers stay"
        now = dataclasses.replace(view(lines=LINES[:1]), name="resumed")
        with shown(lambda: now, page.port):
            open_one.wait_until(lambda: open_one.text("h1") == "resumed")
            assert open_one.page.locator("#trouble").is_hidden()
            assert [row[0] for row in open_one.rows("accuracy-table")] == ["1"], "nothing is left of what was"
