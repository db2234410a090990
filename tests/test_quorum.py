"""Clients that die, fail or are late while others train: with a quorum the rest go on, without it none."""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ClosedError, SplitLearningError
from common.methods import build_method
from common.methods.base import Received
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import server_part, state_of
from common.run import Run
from dsl_client.connection import Connection
from dsl_server.server import Server
from tests.federation import CPU, Batches, connect, serving, small_run, train
from tests.ordinary import smashed
from tests.test_hangs import gone
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

SOON_S = 20.0  # ample for what should take a moment
SAMPLES = 40  # of each client: 5 batches of 8
WENT = "client 2 (c) went away before the end of the run"


class Interrupted(Batches):
    """Batches among which something happens: before this batch of this epoch."""

    def __init__(self, run: Run, seed: int, epoch: int, batch: int, what: Callable[[], None]) -> None:
        super().__init__(run, seed, SAMPLES)
        self._at, self._what = (epoch, batch), what

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        for batch, images in enumerate(super().epoch(number)):
            if (number, batch) == self._at:
                self._what()
            yield images


class Federation:
    """Three members of a server's run; `start` has them train, each on data of its own."""

    def __init__(self, server: Server) -> None:
        self.server, self.run = server, server.run
        self.connections: list[Connection] = [connect(server, name)[0] for name in "abc"]

    def start(self, data: dict[int, Batches], test: dict[int, Batches] | None = None) -> list[Future[Any]]:
        """`data`, `test`: of those whose data is out of the ordinary."""
        ours = [data.get(i, Batches(self.run, i, SAMPLES)) for i in range(3)]
        theirs = [(test or {}).get(i, Batches(self.run, 99, 20)) for i in range(3)]
        return [
            in_thread(train, self.run, connection, i, ours[i], theirs[i])
            for i, connection in enumerate(self.connections)
        ]

    def dying(self, epoch: int, batch: int, client: int = 2) -> Batches:
        """Data amid which this client's process ends as if killed."""
        return Interrupted(self.run, client, epoch, batch, lambda: gone(self.connections[client]))

    def finished(self, clients: Sequence[Future[Any]]) -> dict[str, Any]:
        """The summary, once these clients, who are all that remain, have trained to the end."""
        for client in clients:
            client.result(timeout=SOON_S)
        assert self.server.wait(timeout=SOON_S)
        for connection in self.connections:
            connection._channels[-1].close()
        return self.server.finish()


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "server/metrics.jsonl").read_text().splitlines()]


def ended(server: Server, everyone: Sequence[Future[Any]]) -> list[str]:
    """What ended the run, as the server and these clients are told."""
    with pytest.raises(SplitLearningError) as caught:
        server.wait(timeout=SOON_S)
    errors = [caught.value, *(client.exception(timeout=SOON_S) for client in everyone)]
    assert all(isinstance(error, SplitLearningError) for error in errors), errors
    return [str(error) for error in errors]


# ---------------------------------------------------------------- a client dies


@pytest.mark.parametrize("method", ["psl", "splitfed-v1", "splitfed-v2", "csl"])
def test_the_others_finish_without_a_client_that_dies(method: str, tmp_path: Path) -> None:
    with serving(small_run(method=method, clients=3, quorum=2), tmp_path) as server:
        us = Federation(server)
        ann, bob, cid = us.start({2: us.dying(epoch=0, batch=3)})
        summary = us.finished([ann, bob])
        assert cid.exception(timeout=SOON_S) is not None
        lost = [str(member.lost) for member in server.rounds.members() if member.lost]
    assert lost == [WENT]
    assert summary["samples_trained"] == 2 * 2 * SAMPLES + 3 * 8, "it had the answers to 3 of 8"
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]
    assert 0 <= summary["test"]["accuracy"] <= 1
    assert summary["test"] == lines(tmp_path)[-1]["test"]


@pytest.mark.parametrize("method", ["splitfed-v1", "dsl"])
def test_those_that_remain_end_up_with_one_and_the_same_part(method: str, tmp_path: Path) -> None:
    run = small_run(method=method, clients=3, quorum=2, sync="average")
    with serving(run, tmp_path) as server:
        us = Federation(server)
        ann, bob, _ = us.start({2: us.dying(epoch=0, batch=3)})
        summary = us.finished([ann, bob])
        parts = [state_of(client.result(), momentum=False) for client in (ann, bob)]
        for name, tensor in parts[0].items():
            assert torch.equal(tensor, parts[1][name]), name
    came = summary["samples_trained"] - 2 * 2 * SAMPLES
    assert came in range(0, 3 * 8 + 1, 8), "DSL's batches are not answered: some may be under way"
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


@pytest.mark.parametrize("quorum", [0, 3])
@pytest.mark.parametrize(
    ("method", "sync"), [("psl", "none"), ("splitfed-v1", "average"), ("dsl", "average")]
)
def test_without_a_quorum_everyone_is_told_who_died(
    method: str, sync: str, quorum: int, tmp_path: Path
) -> None:
    run = small_run(method=method, sync=sync, clients=3, quorum=quorum)
    with serving(run, tmp_path) as server:
        us = Federation(server)
        ann, bob, _ = us.start({2: us.dying(epoch=0, batch=3)})
        assert all(WENT in told for told in ended(server, [ann, bob]))


def test_one_loss_too_many_ends_the_run(tmp_path: Path) -> None:
    with serving(small_run(method="psl", clients=3, quorum=2), tmp_path) as server:
        us = Federation(server)
        ann, _, _ = us.start({2: us.dying(epoch=0, batch=2), 1: us.dying(epoch=1, batch=2, client=1)})
        assert all("client 1 (b) went away" in told for told in ended(server, [ann]))


def test_a_batch_that_waits_for_its_group_goes_with_its_client(tmp_path: Path) -> None:
    with serving(small_run(method="psl", clients=3, quorum=2), tmp_path) as server:
        us = Federation(server)

        def cid_dies() -> None:
            cid = server.rounds.members()[2]
            wait_for(lambda: cid.laid == 2 and len(server.inbox._lanes[2]) == 1)
            gone(us.connections[2])
            wait_for(lambda: cid.lost)

        slow = Interrupted(us.run, 0, 0, 1, cid_dies)
        ann, bob, cid = us.start({0: slow})
        summary = us.finished([ann, bob])
        assert cid.exception(timeout=SOON_S) is not None
    assert summary["samples_trained"] == 2 * 2 * SAMPLES + 8


def test_a_client_that_fails_says_why_and_the_others_go_on(tmp_path: Path) -> None:
    def fail() -> None:
        raise RuntimeError("the disk is full")

    with serving(small_run(method="psl", clients=3, quorum=2), tmp_path) as server:
        us = Federation(server)
        ann, bob, cid = us.start({2: Interrupted(us.run, 2, 1, 1, fail)})
        us.finished([ann, bob])
        assert isinstance(cid.exception(timeout=SOON_S), RuntimeError)
        assert str(server.rounds.members()[2].lost) == "client 2 (c) failed: 'the disk is full'"


@pytest.mark.parametrize("method", ["psl", "splitfed-v1", "dsl"])
def test_a_client_that_joined_and_died_before_it_sent_anything_is_not_waited_for(
    method: str, tmp_path: Path
) -> None:
    run = small_run(method=method, clients=3, quorum=2, **({"sync": "average"} if method == "dsl" else {}))
    with serving(run, tmp_path) as server:
        silent, _ = connect(server, "silent")
        others = [connect(server, name) for name in "ab"]
        test = Batches(server.run, 99, 20)
        training = [
            in_thread(train, server.run, c, i, Batches(server.run, i, SAMPLES), test) for c, i in others
        ]
        assert all(waits(each) for each in training)
        gone(silent)
        for each in training:
            each.result(timeout=SOON_S)
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 2 * 2 * SAMPLES
        for connection, _ in others:
            connection.close()


@pytest.mark.parametrize("method", ["psl", "dsl"])
def test_a_loss_completes_the_evaluation_that_waits_for_the_lost_client(method: str, tmp_path: Path) -> None:
    """In DSL as it comes the others have left by then: the loss finishes the run."""
    with serving(small_run(method=method, clients=3, quorum=2, epochs=1), tmp_path) as server:
        us = Federation(server)
        others: list[Future[Any]] = []

        def die() -> None:
            wait_for(lambda: len(others) == 2)
            if method == "dsl":
                wait_for(lambda: all(each.done() for each in others))
                assert lines(tmp_path) == []
            gone(us.connections[2])

        ann, bob, _ = us.start({}, {2: Interrupted(us.run, 99, 0, 0, die)})
        others += [ann, bob]
        summary = us.finished(others)
    assert [line["epoch"] for line in lines(tmp_path)] == [1]
    assert summary["test"]["accuracy"] is not None


def test_a_lost_clients_place_is_not_given_away(tmp_path: Path) -> None:
    with serving(small_run(method="psl", clients=3, quorum=2), tmp_path) as server:
        us = Federation(server)
        gone(us.connections[2])
        wait_for(lambda: server.rounds.members()[2].lost)
        with pytest.raises(ClosedError, match="'late' is one too many"):
            connect(server, "late")
        us.finished(us.start({})[:2])


# ---------------------------------------------------------------- a client is late


def test_the_others_go_on_without_a_client_that_is_late_and_it_catches_up(tmp_path: Path) -> None:
    run = small_run(method="psl", clients=3, quorum=1, round_timeout=0.3)
    with serving(run, tmp_path) as server:
        us = Federation(server)
        theirs = 8 + 2 * SAMPLES  # one batch of cid's, and ann's and bob's whole first epoch
        late = Interrupted(us.run, 2, 0, 1, lambda: wait_for(lambda: server.record.samples_trained >= theirs))
        summary = us.finished(us.start({2: late}))
        assert not any(member.lost for member in server.rounds.members())
    assert summary["samples_trained"] == 2 * 3 * SAMPLES
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


def test_without_a_quorum_everyone_is_told_who_was_late(tmp_path: Path) -> None:
    with serving(small_run(method="psl", clients=3, round_timeout=2.5), tmp_path) as server:
        us = Federation(server)
        over = server.rounds.wait_until_finished
        late = Interrupted(us.run, 2, 1, 1, lambda: in_thread(over).exception(timeout=SOON_S) and None)
        everyone = us.start({2: late})
        for told in ended(server, everyone):
            assert told == (
                "client 2 kept the others waiting for more than 2.5 s: raise --round-timeout, "
                "or allow a --quorum below 3"
            )


# ---------------------------------------------------------------- shards of different sizes


@pytest.mark.parametrize("method", ["psl", "splitfed-v1"])
def test_a_client_that_is_out_of_batches_is_not_waited_for_until_the_next_epoch(
    method: str, tmp_path: Path
) -> None:
    with serving(small_run(method=method, clients=3), tmp_path) as server:
        us = Federation(server)
        summary = us.finished(us.start({1: Batches(us.run, 1, 11), 2: Batches(us.run, 2, 24)}))
    assert summary["samples_trained"] == 2 * (SAMPLES + 11 + 24)
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]


# ---------------------------------------------------------------- the server's copies


def hosting_of(run: Run) -> Hosting:
    method = build_method(run)
    return Hosting(run, method, server_part(run, method, build(run), CPU))


def test_the_copy_of_a_lost_client_has_no_weight_in_the_average() -> None:
    run = small_run(method="splitfed-v1", clients=3)
    hosting = hosting_of(run)
    for client in (0, 1):
        batch = smashed(run, samples=4 * (client + 1), seed=client)
        hosting.step([Received(batch.z, batch.y, client=client, progress=0.5)])
    ours = [
        {name: tensor.clone() for name, tensor in state_of(part, momentum=False).items()}
        for part in hosting.parts
    ]
    hosting.end_round()
    for part in hosting.parts:
        for name, tensor in state_of(part, momentum=False).items():
            if tensor.is_floating_point():
                expected = (4 * ours[0][name].double() + 8 * ours[1][name].double()) / 12
                assert torch.allclose(tensor.double(), expected, atol=1e-7), name


def test_a_round_without_a_single_batch_changes_nothing() -> None:
    run = small_run(method="splitfed-v3", clients=2)
    hosting = hosting_of(run)
    before = {name: tensor.clone() for name, tensor in state_of(hosting.parts[1]).items()}
    hosting.end_round()
    for name, tensor in state_of(hosting.parts[1]).items():
        assert torch.equal(tensor, before[name]), name
