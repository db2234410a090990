"""What the methods' settings may be, which methods are one and the same, and what of each travels."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from common.errors import ConfigError
from common.methods import METHODS, build_method, settled
from common.run import Sync
from dsl_lab.methods import comes_down, goes_up, source
from tests.federation import Batches, federation, small_run
from tests.plain import (
    EQUAL,
    UNEQUAL,
    Trained,
    assert_near,
    assert_same,
    moved,
    network,
    plain_run,
    shares,
    trained,
)

# ---------------------------------------------------------------- settings


def test_an_unknown_method_is_refused_with_all_there_are() -> None:
    with pytest.raises(ConfigError, match="--method 'sgd': choose from dsl, csl, psl, splitfed-v1") as caught:
        build_method(small_run(method="sgd"))
    assert all(name in str(caught.value) for name in METHODS)


@pytest.mark.parametrize(
    ("method", "setting", "said"),
    [
        # no such setting
        ("dsl", "h=2", "dsl has no setting 'h'; it has lambda_, q"),
        ("psl", "alpha=1", "psl has no setting 'alpha'; it has none"),
        ("splitfed-v1", "h=2", "it has none"),
        ("sglr", "beta=1", "sglr has no setting 'beta'; it has alpha, phi, splitavg, phase, fraction"),
        ("sglr", "alpha", "name=value"),
        ("epsl", "share=1", "it has phi"),
        ("gapsl", "k=5", "it has k_min, k_max, eta, lambda_, gda"),
        ("cyclesl", "epochs=2", "it has server_epochs, server_batch"),
        ("cse-fsl", "=2", "it has h"),
        # another type
        ("cse-fsl", "h=2.5", "h=2.5: cse-fsl takes a whole number"),
        ("cse-fsl", "h=", "cse-fsl takes a whole number"),
        ("cyclesl", "server_epochs=many", "cyclesl takes a whole number"),
        ("sglr", "phi=half", "phi=half: sglr takes a number"),
        ("gapsl", "eta=", "gapsl takes a number"),
        ("sglr", "alpha=nan", "alpha=nan: sglr takes a number"),
        ("sglr", "alpha=inf", "alpha=inf: sglr takes a number"),
        ("gapsl", "lambda_=-inf", "gapsl takes a number"),
        # another choice
        ("sglr", "splitavg=mean", "splitavg=mean: sglr takes position, global"),
        ("sglr", "phase=second", "phase=second: sglr takes all, first, last"),
        ("gapsl", "gda=twice", "gda=twice: gapsl takes filter, direction, exact"),
        # out of range
        ("cse-fsl", "h=0", "h 0 is below 1"),
        ("cyclesl", "server_epochs=0", "server_epochs 0 is below 1"),
        ("cyclesl", "server_batch=-1", "server_batch -1 below 0"),
        ("sglr", "phi=1.5", "phi 1.5 .* must be from 0 to 1"),
        ("epsl", "phi=1.5", "epsl: phi 1.5 must be from 0 to 1"),
        ("sglr", "fraction=-0.1", "fraction -0.1 must be from 0 to 1"),
        ("gapsl", "k_min=90", "k_min 90.0 <= k_max 80.0 <= 100 does not hold"),
        ("gapsl", "k_max=101", "k_max 101.0 <= 100 does not hold"),
        ("gapsl", "k_min=-1", "0 <= k_min -1.0"),
    ],
)
def test_a_wrong_setting_is_refused_with_what_is_right(method: str, setting: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_method(small_run(method=method, method_arg=(setting,)))


def test_a_setting_given_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"h=\.\.\.: given 2 times"):
        build_method(small_run(method="cse-fsl", method_arg=("h=2", "h=3")))


def test_modules_are_refused_where_a_method_learns_across_its_end() -> None:
    with pytest.raises(ConfigError, match="--client-modules 2, --server-modules 1: csl learns across"):
        settled(small_run(method="csl", client_modules=2))
    with pytest.raises(ConfigError, match="--head infopro needs the images"):
        settled(small_run(method="dsl", head="infopro", server_modules=2))


def test_a_quorum_of_more_than_all_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quorum 2 is above --clients 1"):
        settled(small_run(quorum=2))
    assert settled(small_run(quorum=2, clients=2)).least_clients == 2


def test_a_relay_cannot_go_on_without_a_client() -> None:
    says = "--quorum 2: a relay needs all of its 3 clients; leave the flag out"
    with pytest.raises(ConfigError, match=says):
        settled(small_run(clients=3, quorum=2, sync="relay"))
    assert settled(small_run(clients=3, quorum=3, sync="relay")).least_clients == 3


def test_settings_reach_the_method() -> None:
    assert build_method(small_run(method="cse-fsl")).send_every == 5
    assert build_method(small_run(method="cse-fsl", method_arg=("h=3",))).send_every == 3
    every = ("alpha=0.5", "phi=1", "splitavg=position", "phase=last", "fraction=0.4")
    build_method(small_run(method="sglr", method_arg=every))


@pytest.mark.parametrize(
    ("method", "sync"),
    [
        ("dsl", "none"),
        ("csl", "none"),
        ("cyclesl", "none"),
        ("psl", "none"),
        ("sglr", "none"),
        ("gapsl", "none"),
        ("epsl", "none"),
        ("splitfed-v3", "none"),
        ("splitfed-v1", "average"),
        ("splitfed-v2", "average"),
        ("cse-fsl", "average"),
    ],
)
def test_sync_is_as_the_method_has_it(method: str, sync: Sync) -> None:
    run = small_run(method=method, clients=2)
    assert settled(run) == replace(run, sync=sync)
    assert settled(settled(run)) == settled(run)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("sync", ["none", "average", "relay"])
def test_another_sync_is_refused_where_the_method_says_it(method: str, sync: Sync) -> None:
    run = small_run(method=method, sync=sync, clients=2)
    needed = build_method(run).sync
    if needed in (None, sync):
        assert settled(run) == run
    else:
        with pytest.raises(ConfigError, match=f"--sync {sync}: {method} needs {needed}; leave the flag out"):
            settled(run)


@pytest.mark.parametrize("method", METHODS)
def test_of_one_client_alone_nothing_is_averaged(method: str) -> None:
    """But where the average is all that the server is told."""
    run = settled(small_run(method=method))
    assert run.sync == ("average" if method == "fedavg" else "none")
    assert settled(run) == run


# ---------------------------------------------------------------- one and the same

ALONE = [
    ("psl",),
    ("splitfed-v1",),
    ("splitfed-v2",),
    ("splitfed-v3",),
    ("sglr", "phi=0"),
    ("gapsl", "lambda_=0"),
    ("epsl", "phi=0.5"),
]


@pytest.mark.parametrize("method", ALONE, ids=" ".join)
def test_with_one_client_it_is_csl(method: tuple[str, ...]) -> None:
    runs = [plain_run("csl", 1), plain_run(method[0], 1, method_arg=method[1:])]
    csl, ours = (trained(run, shares(run, [18]), norm=True) for run in runs)
    assert moved(csl.bottoms, network(norm=True).bottom)
    assert_same(ours.modules, csl.modules)


def test_sglr_without_its_two_additions_is_psl() -> None:
    runs = [plain_run("psl"), plain_run("sglr", method_arg=("phi=0", "alpha=0"))]
    psl, sglr = (trained(run, shares(run, UNEQUAL), norm=True) for run in runs)
    assert_same(sglr.modules, psl.modules)


def test_cse_fsl_that_sends_every_batch_is_dsl_with_averaged_parts() -> None:
    runs = [plain_run("dsl", sync="average"), plain_run("cse-fsl", method_arg=("h=1",))]
    dsl, cse_fsl = (trained(run, shares(run, UNEQUAL), norm=True) for run in runs)
    assert_same(cse_fsl.modules, dsl.modules)


EVERYONE = ("lambda_=0", "eta=-1e6", "k_min=100", "k_max=100")


def gradients_at_first(run: Trained) -> list[Tensor]:
    return [gradient for gradient in run.answers[0].gradients if gradient is not None]


def test_gapsl_that_keeps_every_client_sends_what_psl_sends() -> None:
    runs = [plain_run("psl"), plain_run("gapsl", method_arg=EVERYONE)]
    psl, gapsl = (gradients_at_first(trained(run, shares(run, UNEQUAL))) for run in runs)
    assert len(gapsl) == 3
    for ours, theirs in zip(gapsl, psl, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


def test_gapsl_that_keeps_every_client_steps_on_their_sum_where_psl_takes_the_mean() -> None:
    """So all along it is psl with a server learning rate of C times the clients'."""
    alike: dict[str, Any] = {"weight_decay": 0.0, "lr": 0.03}
    sglr, gapsl = (
        plain_run("sglr", method_arg=("phi=0", "alpha=1"), **alike),
        plain_run("gapsl", method_arg=EVERYONE, **alike),
    )
    theirs, ours = (trained(run, shares(run, EQUAL)) for run in (sglr, gapsl))
    assert [answer.facts["clients_kept"] for answer in ours.answers] == [3] * 10
    assert_near(ours.modules, theirs.modules)


@pytest.mark.parametrize("clients", [2, 3, 8])
def test_identical_clients_move_under_psl_as_one_does_under_csl(clients: int) -> None:
    """The trap: the gradient of a mean over all samples is smaller, the more clients there are."""
    runs = [plain_run("csl", 1), plain_run("psl", clients)]
    csl, psl = (trained(run, [Batches(run, seed=0, samples=18)] * run.clients) for run in runs)
    assert moved(csl.bottoms, network(norm=False).bottom)
    assert_near(psl.bottoms, csl.bottoms * clients)
    assert_near(psl.tops, csl.tops)


@pytest.mark.parametrize("method", ["splitfed-v1", "splitfed-v3"])
def test_splitfed_on_identical_shares_is_csl_in_every_copy(method: str) -> None:
    runs = [plain_run("csl", 1), plain_run(method)]
    csl, ours = (trained(run, [Batches(run, seed=0, samples=18)] * run.clients, norm=True) for run in runs)
    assert_same(ours.tops, ours.tops[:1] * 3)
    assert_same(ours.bottoms, ours.bottoms[:1] * 3)
    assert_near(ours.modules, [*csl.bottoms * 3, *csl.tops * 3])  # a mean of three equals is off by a bit


# ---------------------------------------------------------------- what travels

SAMPLE = 16 * 8 * 8 * 4  # bytes of one sample's activations


def test_cse_fsl_sends_every_third_batch_and_no_gradient_comes_down(tmp_path: Path) -> None:
    run = small_run(method="cse-fsl", method_arg=("h=3",), sync="average", clients=2)
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate((60, 26))]
    server, _, summary = federation(run, tmp_path, data)
    # of 60 samples in 8 batches the 1st, 4th and 7th; of 26 in 4 the 1st and the 4th, of 2 samples
    sent = run.epochs * (8 + 8 + 8 + 8 + 2)
    assert summary["samples_trained"] == sent == server.record.samples_trained
    assert summary["wire"]["up"]["activations"] == sent * SAMPLE
    assert summary["wire"]["up"]["labels"] == sent
    assert summary["wire"]["down"]["gradients"] == 0


def test_gapsl_sends_no_gradient_to_whom_it_leaves_out(tmp_path: Path) -> None:
    run = small_run(method="gapsl", sync="none", clients=3)
    data = [Batches(run, seed=client, samples=24) for client in range(3)]
    _, _, summary = federation(run, tmp_path, data)
    lines = [json.loads(line) for line in (tmp_path / "server" / "metrics.jsonl").read_text().splitlines()]
    kept = sum(line["train"]["clients_kept"] * 3 for line in lines)  # three rounds an epoch
    up, down = summary["wire"]["up"], summary["wire"]["down"]
    assert up["activations"] == run.epochs * 72 * SAMPLE
    assert down["gradients"] == round(kept) * 8 * SAMPLE
    assert down["gradients"] < up["activations"]


def test_gapsl_that_keeps_every_client_sends_as_much_down_as_came_up(tmp_path: Path) -> None:
    run = small_run(method="gapsl", method_arg=EVERYONE, sync="none", clients=2, lr=1e-4, epochs=1)
    data = [Batches(run, seed=0, samples=16)] * 2
    _, _, summary = federation(run, tmp_path, data)
    assert summary["wire"]["down"]["gradients"] == summary["wire"]["up"]["activations"] == 32 * SAMPLE


LABELLED = "activations and labels of"


@pytest.mark.parametrize(
    ("method", "settings", "up", "down"),
    [
        ("dsl", (), f"{LABELLED} every batch", "nothing"),
        ("dsl", ("lambda_=0.5",), f"{LABELLED} every batch", "a gradient a batch"),
        ("dsl", ("lambda_=0.5", "q=3"), f"{LABELLED} every batch", "a gradient for one batch in 3"),
        ("dsl", ("q=3",), f"{LABELLED} every batch", "nothing"),
        ("csl", (), f"{LABELLED} every batch", "a gradient a batch"),
        ("cse-fsl", ("h=3",), f"{LABELLED} one batch in 3, weights", "averaged weights"),
        (
            "fsl-sage",
            ("q=2", "l=4"),
            f"{LABELLED} one batch in 2, weights",
            "averaged weights, a head every 4 epochs",
        ),
        ("ampere", (), f"{LABELLED} every image, once, at the end, weights", "averaged weights"),
        (
            "ushape",
            (),
            "activations of every batch; a gradient for each output",
            "an output a batch, a gradient a batch",
        ),
        (
            "ushape",
            ("learning=dsl",),
            "activations of every batch; a gradient for each output",
            "an output a batch",
        ),
        ("fedavg", (), "weights", "averaged weights"),
        (
            "gapsl",
            (),
            f"{LABELLED} every batch",
            "a gradient a batch, or a skip; in rounds of one batch a client",
        ),
    ],
)
def test_what_travels_in_words(method: str, settings: tuple[str, ...], up: str, down: str) -> None:
    made = build_method(small_run(method=method, method_arg=settings))
    assert (goes_up(made), comes_down(made)) == (up, down)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_can_say_what_travels_and_where_it_comes_from(method: str) -> None:
    made = METHODS[method]()
    assert goes_up(made)
    assert comes_down(made)
    assert source(METHODS[method]).startswith("https://")
