"""Losses and metrics: what is built in, what is the user's own, in every method and over a real wire."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from common.errors import ConfigError, WireError
from common.methods import METHODS, settled
from common.methods.base import Smashed
from common.nets.cut import build
from common.objective import loss_of, mean_absolute, mean_square, metric_of
from common.optim import learning_rate, sgd
from common.parts import state_of
from common.run import Run
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from dsl_lab import figures
from dsl_lab.runs import find
from dsl_lab.series import grouped
from dsl_lab.table import comma_separated, markdown
from tests import own
from tests.federation import Batches, federation, serving, small_run
from tests.ordinary import member, refused
from tests.plain import trained
from tests.test_evaluation import Code, closing, whole
from tests.test_evaluation import answers as answered

pytestmark = pytest.mark.timeout(60)

ANY = sorted(name for name, make in METHODS.items() if make().any_loss)


class Numbers(Batches):
    """As the ordinary ones, with made-up numbers for targets."""

    def __init__(self, run: Run, seed: int, samples: int) -> None:
        super().__init__(run, seed, samples)
        self.y = torch.randn(samples, run.numbers, generator=torch.Generator().manual_seed(seed))


def numbers(**settings: Any) -> Run:
    defaults = {"targets": "float:2", "loss": "mse", "metric": "mae"}
    return small_run(**{**defaults, **settings})


# ---------------------------------------------------------------- by name


def test_the_built_in_ones_by_hand() -> None:
    outputs, targets = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[1.0, 4.0], [3.0, -1.0]])
    assert mean_square(outputs, targets).tolist() == [2.0, 4.5]
    assert mean_absolute(outputs, targets).tolist() == [1.0, 1.5]
    assert loss_of(numbers())(outputs, targets).item() == 3.25
    bce = loss_of(numbers(loss="bce"))(torch.zeros(2, 2), torch.ones(2, 2))
    assert bce.item() == pytest.approx(math.log(2))
    right = metric_of(small_run())(torch.tensor([[0.0, 1.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    assert right.tolist() == [True, False]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"loss": "mse"},
            "--loss mse: not for targets of --targets classes; choose cross-entropy or package",
        ),
        ({"metric": "mae"}, "--metric mae: not for targets of --targets classes; choose accuracy or package"),
        (
            {"targets": "float:2"},
            "--loss cross-entropy: not for targets of --targets float:2; choose mse, bce or",
        ),
        ({"targets": "float:2", "loss": "mse"}, "--metric accuracy: not for .* choose mse, mae or package"),
        ({"loss": "focal"}, "--loss 'focal': choose cross-entropy or package.module:function"),
        (
            {"loss": "tests.own:smoth"},
            "--loss tests.own:smoth: tests.own has no function 'smoth'; did you mean",
        ),
        (
            {"loss": "tests.owns:smooth"},
            "--loss tests.owns:smooth: no module named 'tests.owns' here: install",
        ),
        (
            {"loss": "tests.own:each"},
            r"gives \[3\] for 3 samples; it must give the batch's mean, a tensor of",
        ),
        ({"loss": "tests.own:a_number"}, "gives float for 3 samples; it must give the batch's mean"),
        ({"loss": "tests.own:constant"}, "no gradient comes from what it gives; make it of the outputs"),
        ({"loss": "tests.own:broken"}, "its code failed: RuntimeError: weights of 3 classes$"),
        ({"metric": "tests.own:smooth"}, r"gives \[\] for 3 samples; it must give a value a sample, \[3\]"),
        (
            {"method": "cyclesl", "loss": "tests.own:smooth"},
            "--loss tests.own:smooth: cyclesl is of cross-entr",
        ),
        ({"head": "infopro", "loss": "tests.own:smooth"}, "--head infopro has a loss of its own"),
        (
            {"targets": "float:1", "loss": "mse", "metric": "mse", "partition": "dirichlet:1"},
            "--partition dirichlet:1: deals by classes, and targets are float:1; say iid or own",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_the_run_in_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        settled(small_run(**settings))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("targets", ["float", "float:0", "float:x", "floats:2", "class", "float:-1"])
def test_targets_are_classes_or_so_many_numbers(targets: str) -> None:
    with pytest.raises(ConfigError, match=r"--targets .*: choose classes, or float:K"):
        small_run(targets=targets)


def test_a_head_of_cross_entropy_is_no_matter_where_no_client_has_it() -> None:
    settled(small_run(method="csl", head="infopro", loss="tests.own:smooth"))


# ---------------------------------------------------------------- in every method


def three(run: Run) -> list[Batches]:
    kind = Numbers if run.numbers else Batches
    return [kind(run, seed=client, samples=samples) for client, samples in enumerate((16, 16, 12))]


@pytest.mark.parametrize("method", ANY)
def test_a_loss_of_ones_own_that_is_cross_entropy_gives_its_bits(method: str) -> None:
    run = settled(small_run(method=method, clients=3, fixed_order=True))
    mine = settled(small_run(method=method, clients=3, fixed_order=True, loss="tests.own:cross_entropy"))
    ours, theirs = (trained(each, three(run), make=lambda: build(run)) for each in (mine, run))
    for one, other in zip([*ours.clients, *ours.servers], [*theirs.clients, *theirs.servers], strict=True):
        for name, tensor in state_of(one).items():
            assert torch.equal(tensor, state_of(other)[name]), name


@pytest.mark.parametrize("method", ANY)
def test_another_loss_is_what_every_method_learns_from(method: str) -> None:
    """Both ends' parts become others than by cross-entropy, and of numbers they learn as well."""
    run = settled(small_run(method=method, clients=3, fixed_order=True))
    smooth = settled(small_run(method=method, clients=3, fixed_order=True, loss="tests.own:smooth"))
    plain, other = (trained(each, three(run), make=lambda: build(run)) for each in (run, smooth))
    for one, two in zip([*plain.bottoms, *plain.tops], [*other.bottoms, *other.tops], strict=True):
        for ours, theirs in zip(one.parameters(), two.parameters(), strict=True):
            assert not torch.equal(ours, theirs)
    floats = settled(numbers(method=method, clients=3, fixed_order=True, lr=0.01))
    learned = trained(floats, three(floats), make=lambda: build(floats))
    for module in learned.modules:
        assert all(parameter.isfinite().all() for parameter in module.parameters())


# ---------------------------------------------------------------- over a real wire


def test_csl_of_numbers_is_backpropagation_of_mean_squares(tmp_path: Path) -> None:
    run = numbers(method="csl", epochs=2)
    data = Numbers(run, seed=1, samples=44)
    server, (part,), summary = federation(run, tmp_path, [data], kind=Numbers)

    net = build(run)
    both = nn.Sequential(*net.bottom, *net.top)
    optimizer = sgd(both.parameters(), run)
    for epoch in range(run.epochs):
        for index, (x, y) in enumerate(data.epoch(epoch)):
            optimizer.param_groups[0]["lr"] = learning_rate(run, (epoch + index / 6) / run.epochs)
            optimizer.zero_grad()
            ((both(x) - y) ** 2).mean().backward()
            optimizer.step()

    split = [*part.bottom.state_dict().values(), *server.part.top.state_dict().values()]
    for ours, theirs in zip(split, both.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    test = Numbers(run, seed=99, samples=20)
    with torch.no_grad():
        errors = both.eval()(test.x) - test.y
    told = summary["test"]
    assert (told["accuracy"], told["client_only_accuracy"]) == (None, None)
    assert told["metric"] == {"name": "mae", "joined": told["metric"]["joined"], "client_only": None}
    assert told["metric"]["joined"] == pytest.approx(errors.abs().mean().item(), rel=1e-4)
    assert told["loss"] == pytest.approx(errors.square().mean().item(), rel=1e-4)
    assert summary["wire"]["up"]["labels"] == 2 * 44 * 2 * 4, "two epochs of two floats a sample"


@pytest.mark.parametrize("method", ["dsl", "ushape", "fedavg"])
def test_a_metric_of_ones_own_is_scored_by_whichever_end_has_the_last_layer(
    method: str, tmp_path: Path
) -> None:
    run = small_run(method=method, epochs=1, loss="tests.own:smooth", metric="tests.own:top_2")
    data = Batches(run, seed=1, samples=24)
    server, (part,), summary = federation(run, tmp_path, [data])
    layers = {"dsl": [server.part.top], "ushape": [server.part.top, part.tail], "fedavg": [part.tail]}[method]
    test, net = Batches(run, seed=99, samples=20), nn.Sequential(part.bottom, *layers).eval()
    with torch.no_grad():
        outputs = net(test.x)
    told = summary["test"]
    assert told["metric"]["name"] == "tests.own:top_2"
    assert told["metric"]["joined"] == own.top_2(outputs, test.y).sum().item() / 20
    assert told["loss"] == pytest.approx(own.smooth(outputs, test.y).item(), rel=1e-4)
    if part.head is not None:
        with torch.no_grad():
            alone = part.head.eval()(part.bottom(test.x))
        assert told["metric"]["client_only"] == own.top_2(alone, test.y).sum().item() / 20


def test_a_loss_that_fails_in_the_middle_ends_the_run_with_its_name(tmp_path: Path) -> None:
    run = small_run(method="csl", epochs=1, loss="tests.own:fails_later")
    with pytest.raises(
        Exception, match=r"--loss tests.own:fails_later: its code failed: RuntimeError: too many"
    ):
        federation(run, tmp_path, [Batches(run, seed=1, samples=24)])


# ---------------------------------------------------------------- what comes over the wire

SPEC = BatchSpec((3, 5, 2), 8, 10, numbers=3)


def arrive(y: Tensor, spec: BatchSpec = SPEC) -> codec.Arrived:
    (piece,) = codec.pack_batch(pb.TrainRequest, 1, Smashed(torch.rand(4, 3, 5, 2), y), SPEC)
    return codec.unpack_batch(piece, iter(()), spec)


def test_numbers_travel_as_they_are() -> None:
    y = torch.randn(4, 3)
    assert torch.equal(arrive(y).y, y)
    assert arrive(y).y.dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_none_are_refused(bad: float) -> None:
    y = torch.zeros(4, 3)
    y[2, 1] = bad
    with pytest.raises(WireError, match="the targets of batch 1: NaN or infinite values"):
        arrive(y)


@pytest.mark.parametrize(
    ("y", "spec", "words"),
    [
        (torch.zeros(4, 2), SPEC, r"labels: shape \[4, 2\]; the run needs \[4, 3\]"),
        (torch.zeros(4), SPEC, r"labels: shape \[4\]; the run needs \[4, 3\]"),
        (
            torch.zeros(4, 3),
            BatchSpec((3, 5, 2), 8, 10),
            "labels: dtype DTYPE_FLOAT32; the run needs DTYPE_UINT8",
        ),
    ],
)
def test_labels_of_another_kind_are_refused(y: Tensor, spec: BatchSpec, words: str) -> None:
    with pytest.raises(WireError, match=words):
        arrive(y, spec)


@pytest.mark.parametrize("metric", [-3.0, 9.0, 1e300])
def test_a_metric_that_counts_nothing_may_be_any_number(metric: float, tmp_path: Path) -> None:
    run = small_run(method="fedavg", metric="tests.own:top_2")
    with serving(run, tmp_path) as server, member(server) as client:
        for bad in (math.nan, math.inf):
            with refused(Code.INVALID_ARGUMENT, "metrics of"):
                score = pb.Score(samples=8, metric=bad)
                answered(client, whole("fedavg", client, closing(score=score)))
        score = pb.Score(samples=8, metric=metric)
        assert answered(client, whole("fedavg", client, closing(score=score)))[-1].score == score
        assert server.record.test["metric"]["joined"] == metric / 8


# ---------------------------------------------------------------- in a report


def test_a_report_has_runs_of_either_kind(tmp_path: Path) -> None:
    for name, run in (("classes", small_run(epochs=1)), ("numbers", numbers(epochs=1))):
        kind = Numbers if run.numbers else Batches
        federation(run, tmp_path / name, [kind(run, seed=1, samples=16)], kind=kind)
    runs = find(tmp_path)
    scores = [json.loads((run.folder / "summary.json").read_text())["test"] for run in runs]
    (metric,) = (score["metric"] for score in scores if "metric" in score)
    (accuracy,) = (score["accuracy"] for score in scores if score["accuracy"] is not None)
    table = markdown(runs)
    assert f"{metric['joined']:.4g}" in table
    assert f"{metric['client_only']:.4g}" in table
    assert f"{accuracy:.2%}" in table
    assert str(metric["joined"]) in comma_separated(runs)
    drawn = [drawing.name for drawing in figures.suiting(grouped(runs))]
    assert drawn == ["traffic", "memory", "time"], "an accuracy and an error have no axis in common"
    for run in runs:
        group = grouped([run])
        words = [figures.render(drawing, group, "svg")[1] for drawing in figures.suiting(group)]
        assert len(words) == 5
        assert words[0].startswith(f"Lines, test {run.summary.test.name} by epoch.")
