"""What a server says it is doing equals what it has done: summary.json, metrics.jsonl, what clients sent."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common import meter
from common.errors import ClosedError, SplitLearningError
from common.meter import Clock, Rate, Traffic
from common.methods import build_method, settled
from common.run import Run
from common.rundir import RunFolder
from dsl_client.connection import Connection
from dsl_client.memory import Memory
from dsl_server import tally, watch
from dsl_server.server import Server
from dsl_server.tally import Tally
from dsl_server.watch import ClientView, View
from tests.federation import CPU, Batches, federation, serving, small_run
from tests.test_quorum import Federation, Interrupted
from tests.threads import wait_for

pytestmark = pytest.mark.timeout(60)

SIZES = [40, 24, 11]  # images of each client


def states(server: Server) -> list[str]:
    return [client.state for client in server.watch.view().clients]


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dsl"},
        {"method": "dsl", "sync": "relay"},
        {"method": "csl", "sync": "average"},
        {"method": "splitfed-v1"},
        {"method": "cyclesl"},
        {"method": "ushape"},
        {"method": "fedavg"},
        {"method": "ampere"},
    ],
    ids=lambda settings: "-".join(settings.values()),
)
def test_the_last_view_is_the_summary(settings: dict[str, Any], tmp_path: Path) -> None:
    run = settled(small_run(clients=3, **settings))
    data = [Batches(run, seed, samples) for seed, samples in enumerate(SIZES)]
    server, _, summary = federation(run, tmp_path, data)
    view = server.watch.view()

    assert (view.finished, view.reason, view.epoch, view.done) == (True, None, run.epochs - 1, 1.0)
    assert view.samples == summary["samples_trained"]
    assert view.test == summary["test"]
    wire = dict(summary["wire"])
    counted = wire.pop("socket")
    assert view.wire == wire
    assert (view.socket is None) == (counted is None), "and it counts on until connections have ended"
    assert view.seconds == summary["seconds"]["wall"]
    assert view.phases == pytest.approx(summary["seconds"]["server"], abs=1e-9)
    lines = (tmp_path / "server/metrics.jsonl").read_text().splitlines()
    assert list(view.lines) == [json.loads(line) for line in lines]

    assert [client.state for client in view.clients] == ["left"] * 3
    assert [client.name for client in view.clients] == ["client-0", "client-1", "client-2"]
    once = 1 if build_method(run).afterwards else run.epochs
    assert [client.samples for client in view.clients] == [once * samples for samples in SIZES]
    for direction in ("up", "down"):
        theirs = sum(getattr(client, direction) for client in view.clients)
        assert theirs == sum(summary["wire"][direction].values()), direction
    assert all(client.loss is not None and client.loss > 0 for client in view.clients)
    assert json.loads(json.dumps(view.to_dict())) == view.to_dict(), "in terms of JSON"


def test_states_are_those_that_a_run_goes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Client 2 is late, so that the others wait in turn; then it dies, and the others go on."""
    monkeypatch.setattr(watch, "STALLED_S", 0.05)
    run = small_run(method="csl", clients=3, quorum=2, fixed_order=True)
    seen: list[View] = []

    def late() -> None:
        wait_for(lambda: states(server)[:2] == ["waiting", "waiting"])
        seen.append(server.watch.view())
        us.connections[2]._channels[-1].close()  # as if its process were killed

    with serving(run, tmp_path) as server:
        assert states(server) == ["awaited"] * 3
        us = Federation(server)
        assert states(server) == ["training"] * 3
        ends = us.start({2: Interrupted(server.run, 2, 0, 2, late)})
        us.finished(ends[:2])
        assert states(server) == ["left", "left", "lost"]
        assert server.watch.view().clients[2].reason.startswith("client 2 (c) went away")
        with pytest.raises(SplitLearningError):
            ends[2].result(timeout=20)
    (then,) = seen
    assert [client.queue for client in then.clients] == [1, 1, 0], "one batch each, which is to be answered"
    assert [client.samples for client in then.clients] == [16, 16, 16]
    assert all(client.lag_s > 0 for client in then.clients)
    assert 0 < then.done < 1
    assert not then.finished


def test_who_waits_for_its_turn_or_for_an_average_waits(tmp_path: Path) -> None:
    run = small_run(clients=3, sync="relay")
    with serving(run, tmp_path) as server:
        us = Federation(server)
        seen: list[list[str]] = []

        def look() -> None:
            wait_for(lambda: states(server)[1:] == ["waiting", "waiting"])
            seen.append(states(server))

        us.finished(us.start({0: Interrupted(server.run, 0, 0, 1, look)}))
    assert seen == [["training", "waiting", "waiting"]]


def test_why_a_run_ended_is_told(tmp_path: Path) -> None:
    with serving(small_run(clients=3), tmp_path) as server:
        us = Federation(server)
        us.connections[1]._channels[-1].close()
        wait_for(lambda: server.watch.view().reason is not None)
        view = server.watch.view()
    assert view.reason == "client 1 (b) went away before the end of the run"
    assert not view.finished
    assert view.left_s is None


def test_after_a_checkpoint_it_goes_on_counting() -> None:
    ours = Tally(2, {"a": 0, "b": 1}.get)
    ours.began(1, epoch=3, batches=2, of=5)
    ours.trained(1, 8, 2.0)
    ours.told(1, 1.5)
    state = json.loads(json.dumps(ours.state()))
    theirs = Tally(2, {}.get)
    theirs.restore(state)
    assert theirs.state() == state
    mine = theirs.learned[1]
    assert (mine.epoch, mine.batches, mine.of, mine.samples, mine.loss, mine.own_loss) == (
        3,
        3,
        5,
        8,
        2.0,
        1.5,
    )


def test_a_server_that_goes_on_shows_what_was(tmp_path: Path) -> None:
    run = settled(small_run(clients=2))
    before, *_ = federation(run, tmp_path, [Batches(run, seed, 20) for seed in range(2)])
    state = json.loads(json.dumps(before.record.state()))
    state["lines"] = 1  # the second one came after the checkpoint
    again = Server(run, "127.0.0.1:0", CPU, RunFolder(tmp_path / "server", run, "server", goes_on=True))
    again.record.restore(state, [])
    then, now = before.watch.view(), again.watch.view()
    assert now.lines == then.lines[:1]
    assert len((tmp_path / "server/metrics.jsonl").read_text().splitlines()) == 1
    assert (now.samples, now.test, now.wire, now.epoch) == (then.samples, then.test, then.wire, then.epoch)
    for ours, theirs in zip(now.clients, then.clients, strict=True):
        assert (ours.samples, ours.up, ours.down) == (theirs.samples, theirs.up, theirs.down)
        assert (ours.epoch, ours.loss, ours.state) == (theirs.epoch, theirs.loss, "awaited")
    again.stop(ClosedError("the test is over"))


def test_a_client_that_may_come_back_is_away(tmp_path: Path) -> None:
    run = small_run(clients=2, checkpoint_every=0.05)
    with serving(run, tmp_path) as server:
        connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), memory=Memory())
        connection.join("someone", patience=10)
        assert states(server) == ["training", "awaited"]
        connection.close()
        wait_for(lambda: states(server) == ["away", "awaited"])
        view = server.watch.view()
        assert view.saved_s is not None, "who joins has a place in a checkpoint"
        assert view.here == 0


# ---------------------------------------------------------------- numbers by hand


@pytest.fixture
def hand(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    hand = SimpleNamespace(now=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: hand.now))
    return hand


def test_a_rate_is_right_from_the_second_on_and_fades(hand: SimpleNamespace) -> None:
    rate = Rate(window_s=5.0)
    assert rate.per_second() == 0
    rate.add(1000)  # how long it took is not known
    assert rate.per_second() == 0
    for _ in range(2000):
        hand.now += 0.01
        rate.add(3)
        if hand.now > 100.05:
            assert rate.per_second() == pytest.approx(300, rel=0.02)
    hand.now += 5.0
    assert rate.per_second() == pytest.approx(300 / 2.718, rel=0.03), "by a factor e in a window"


def test_a_clients_loss_is_a_running_mean() -> None:
    ours = Tally(1, {}.get)
    for loss in (2.0, 1.0, None, 4.0):
        ours.trained(0, 8, loss)
    assert ours.learned[0].loss == pytest.approx(0.95 * (0.95 * 2.0 + 0.05 * 1.0) + 0.05 * 4.0)
    assert ours.learned[0].samples == 32
    assert tally._KEPT == 0.95


def test_phases_never_fall(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A forward pass is counted before the step that it is of: what is left of the step dips."""
    told = iter([{"forward": 1.0, "backward": 2.0}, {"forward": 1.5, "backward": 1.5}, {"backward": -1.0}])
    with serving(small_run(), tmp_path) as server:
        monkeypatch.setattr(server.record, "phases", lambda: next(told))
        seen = [dict(server.watch.view().phases) for _ in range(3)]
    assert seen == [{"forward": 1.0, "backward": 2.0}, {"forward": 1.5, "backward": 2.0}, {"backward": 2.0}]


def test_what_json_has_no_number_for_is_none() -> None:
    view = a_view([a_client(0, loss=float("nan"))])
    assert view.to_dict()["clients"][0]["loss"] is None
    assert view.to_dict()["place"] == "m"


def a_client(client: int, **changes: Any) -> ClientView:
    """Of a made-up run, training in its third epoch of four."""
    usual = ClientView(
        client=client,
        name=f"ward-{client}",
        state="training",
        epoch=2,
        done=0.625,
        samples=2500,
        rate=123.4,
        queue=1,
        up=1_234_500_000,
        down=60_000,
        loss=1.25,
        lag_s=0.42,
    )
    return ClientView(**{**asdict(usual), **changes})


def a_view(clients: list[ClientView], **changes: Any) -> View:
    run = Run()
    usual = {
        "name": run.name,
        "method": run.method,
        "model": run.model,
        "place": run.place,
        "clients_expected": len(clients),
        "epoch": 2,
        "epochs": 4,
        "done": 0.625,
        "seconds": 100.0,
        "left_s": 60.0,
        "samples": 2500 * len(clients),
        "rate": 123.4 * len(clients),
        "loss": 1.25,
        "test": {"accuracy": 0.5, "loss": 1.5, "client_only_accuracy": None},
        "wire": {"up": {"activations": 1_234_500_000}, "down": {"control": 60_000}},
        "socket": None,
        "finished": False,
        "reason": None,
        "clients": tuple(clients),
        "lines": (),
        "phases": {},
    }
    return View(**{**usual, **changes})
