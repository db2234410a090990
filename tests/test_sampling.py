"""Clients that sit rounds out: who is drawn, what is averaged, what travels, what wrong input gets."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch.nn import functional as F

from common.errors import ConfigError, WireError
from common.methods import build_method, settled
from common.parts import state_of
from common.run import Run
from common.sampling import drawn
from dsl_server.rounds import Rounds
from tests.faults.crashes import Life, live
from tests.federation import Batches, federation, small_run
from tests.plain import (
    assert_near,
    copies,
    mean_into,
    moved,
    network,
    optimizer_of,
    plain_run,
    shares,
    trained,
)
from tests.test_rounds import joined, part
from tests.test_tails import joined as whole
from tests.test_transparency import assert_as_in_one_thread
from tests.threads import in_thread

pytestmark = pytest.mark.timeout(60)

SAMPLES = (20, 18, 11, 16)


def sampled(method: str, fraction: float = 0.5, **settings: Any) -> Run:
    defaults = {"clients": len(SAMPLES), "epochs": 5, "sync": "average", "batch_size": 4}
    return settled(small_run(method=method, sample_fraction=fraction, **{**defaults, **settings}))


# ---------------------------------------------------------------- who is drawn


@pytest.mark.parametrize(("clients", "fraction", "some"), [(10, 0.1, 1), (10, 0.25, 2), (3, 0.01, 1)])
def test_a_fraction_is_drawn_and_never_nobody(clients: int, fraction: float, some: int) -> None:
    run = small_run(clients=clients, sample_fraction=fraction)
    for epoch in range(20):
        assert len(drawn(run, epoch)) == some
        assert set(drawn(run, epoch)) <= set(range(clients))


def test_each_round_and_each_seed_draws_anew_and_everybody_alike() -> None:
    run = small_run(clients=20, sample_fraction=0.3)
    counted = Counter(client for epoch in range(1000) for client in drawn(run, epoch))
    # Of 1000 rounds each client is in 300, give or take 5 standard deviations of 14.5.
    assert all(228 < counted[client] < 372 for client in range(20))
    other = replace(run, seed=1)
    assert [drawn(run, epoch) for epoch in range(9)] != [drawn(other, epoch) for epoch in range(9)]


def test_a_round_of_several_epochs_has_the_same_clients_in_each() -> None:
    run = small_run(clients=20, sample_fraction=0.3, sync_every=3)
    draws = [drawn(run, epoch) for epoch in range(9)]
    assert draws[0] == draws[1] == draws[2] != draws[3] == draws[4] == draws[5]


def test_all_are_drawn_where_nothing_is_said() -> None:
    assert list(drawn(small_run(clients=3), 5)) == [0, 1, 2]


# ---------------------------------------------------------------- what is learned


def test_fedavg_averages_those_who_were_drawn_and_gives_it_to_all() -> None:
    """Against plain torch: McMahan et al., algorithm 1."""
    run = plain_run("fedavg", len(SAMPLES), sample_fraction=0.5, epochs=4)
    data = shares(run, SAMPLES)
    ours = trained(run, data)

    net = network(norm=False)
    wholes = copies(whole(net.bottom, net.top), len(SAMPLES))
    moves = [optimizer_of(run, one) for one in wholes]
    for epoch in range(run.epochs):
        chosen = sorted(drawn(run, epoch))
        for client in chosen:
            for x, y in data[client].epoch(0):
                moves[client].zero_grad()
                F.cross_entropy(wholes[client](x), y).backward()
                moves[client].step()
        mean_into([wholes[client] for client in chosen], [SAMPLES[client] for client in chosen])
        for one in wholes:
            one.load_state_dict(wholes[chosen[0]].state_dict())

    assert moved([one[0] for one in wholes], whole(network(norm=False).bottom)[0])
    assert_near([whole(part.bottom, part.tail) for part in ours.clients], wholes)


METHODS: dict[str, dict[str, Any]] = {
    "fedavg": {},
    "dsl": {},
    "csl": {},
    "splitfed-v1": {},
    "splitfed-v2": {},
    "cse-fsl": {"sync_every": 2},
    "cyclesl": {},
    "ushape": {"codec": ("activations=randtopk:0.2",)},
}


@pytest.mark.parametrize("method", METHODS)
def test_over_a_wire_it_is_as_in_one_thread_bit_for_bit(method: str, tmp_path: Path) -> None:
    run = sampled(method, fixed_order=True, eval_every=2, **METHODS[method])
    data = [Batches(run, seed, samples) for seed, samples in enumerate(SAMPLES)]
    server, clients, summary = federation(run, tmp_path, data)
    assert_as_in_one_thread(run, data, server.part, clients)
    every = build_method(run).send_every or 1
    counted = [sum(share.size(i) for i in range(0, len(share), every)) for share in data]
    planned = sum(counted[client] for epoch in range(run.epochs) for client in drawn(run, epoch))
    assert 0 < planned < run.epochs * sum(counted)
    assert summary["samples_trained"] == planned


def test_parts_travel_up_from_those_who_were_drawn_and_down_where_they_are_needed(tmp_path: Path) -> None:
    run = sampled("fedavg", 0.25, eval_every=0, epochs=6)
    data = [Batches(run, seed, samples) for seed, samples in enumerate(SAMPLES)]
    _, clients, summary = federation(run, tmp_path, data)
    weights = sum(t.nbytes for t in state_of(clients[0], momentum=False).values())
    wire = summary["wire"]
    given = sum(len(drawn(run, epoch)) for epoch in range(run.epochs))
    last = run.epochs - 1
    taken = sum(
        client in drawn(run, epoch) or epoch == last or client in drawn(run, epoch + 1)
        for epoch in range(run.epochs)
        for client in range(run.clients)
    )
    assert given < taken < run.epochs * run.clients
    assert given * weights <= wire["up"]["weights"] < given * weights * 1.1
    assert taken * weights <= wire["down"]["weights"] < taken * weights * 1.1


# ---------------------------------------------------------------- where clients or the server go


@pytest.mark.parametrize("method", ["dsl", "csl", "fedavg", "splitfed-v1"])
def test_a_server_that_dies_leaves_no_trace_in_it(method: str, tmp_path: Path) -> None:
    def disturb(life: Life) -> None:
        for samples in (30, 90):
            if life.wait_for_samples(samples):
                life.crash()
                life.start(resume=True)

    run = sampled(method, epochs=6, checkpoint_every=0.05, deterministic=True)
    data = [Batches(run, seed, samples) for seed, samples in enumerate(SAMPLES)]
    still = live(run, tmp_path / "still", data)
    shaken = live(run, tmp_path / "shaken", data, disturb)
    assert shaken.summary["samples_trained"] == still.summary["samples_trained"]
    assert [a["applied"] for a in shaken.ledger["accounts"]] == [
        a["applied"] for a in still.ledger["accounts"]
    ]
    assert shaken.same_as(still)


def test_where_all_who_were_drawn_are_lost_the_average_before_stands() -> None:
    run = small_run(clients=3, sync="average", sample_fraction=0.34, quorum=1, epochs=40)
    first = next(epoch for epoch in range(40) if drawn(run, epoch) == frozenset({0}))
    rounds = Rounds(replace(run, epochs=first + 3))
    ann, bob, cid = (joined(rounds, name) for name in ("ann", "bob", "cid"))
    rounds._averages_made, rounds._average = first, part(7.0)
    waiting = in_thread(rounds.await_average, bob, first)
    rounds.lost(ann.account)
    assert rounds.await_average(cid, first)["w"][0] == waiting.result(timeout=5)["w"][0] == 7.0


def test_who_was_not_drawn_gives_no_part_and_who_was_gives_one() -> None:
    run = small_run(clients=3, sync="average", sample_fraction=0.34)
    rounds = Rounds(run)
    members = [joined(rounds, name) for name in ("ann", "bob", "cid")]
    (chosen,) = drawn(run, 0)
    with pytest.raises(WireError, match="a part of epoch 0, for whose round it was not drawn"):
        rounds.average(members[chosen - 1], 0, part(1.0), 1)
    with pytest.raises(WireError, match="no part of epoch 0, for whose round it was drawn"):
        rounds.await_average(members[chosen], 0)


# ---------------------------------------------------------------- what wrong input gets


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"method": "dsl", "sync": "none"}, "--sample-fraction 0.5: only rounds that end with an average"),
        ({"method": "splitfed-v3", "sync": "auto"}, "splitfed-v3 with --clients 4 allows it"),
        ({"method": "csl", "sync": "relay"}, "only rounds that end with an average"),
        ({"method": "fedavg", "fraction": 0.0}, "--sample-fraction 0.0 is not a fraction above 0"),
        ({"method": "fedavg", "fraction": 1.5}, "--sample-fraction 1.5 is not a fraction above 0"),
        ({"method": "fsl-sage"}, "fsl-sage needs every client in every round"),
        ({"method": "ampere"}, "ampere needs every client in every round"),
        ({"method": "dsl", "budget": "1MB"}, "--sample-fraction 0.5 and --budget"),
    ],
)
def test_what_cannot_be_sampled_is_told_in_one_line(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        sampled(**settings)
