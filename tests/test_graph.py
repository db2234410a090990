"""Any network cut at a layer: joined it is the whole, bit for bit; what crosses; whose weights; refusals."""

import copy
import functools
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import StepError
from common.nets.cut import build
from common.nets.graph import Halves, cut_at, cut_traced, together, traces
from common.nets.named import build_named, example_of
from common.nets.proof import prove
from common.nets.trace import Trace
from common.optim import learning_rate, sgd
from common.run import Run
from tests.federation import Batches, federation, small_run
from tests.test_transparency import assert_as_in_one_thread

ROOT = Path(__file__).parent.parent
IMAGE = (3, 8, 8)
# model, image, cut, what crosses
CUTS: tuple[tuple[str, tuple[int, int, int], str, tuple[int, ...]], ...] = (
    ("torchvision:resnet18", (3, 32, 32), "layer1", (64, 8, 8)),
    ("torchvision:resnet18", (3, 32, 32), "layer3.0", (256, 2, 2)),
    ("torchvision:mobilenet_v3_small", (3, 32, 32), "features.3", (24, 4, 4)),
    ("torchvision:mobilenet_v3_small", (3, 32, 32), "features.8.block.1", (192, 2, 2)),
    ("tests.networks:vit_with_dropout", IMAGE, "encoder.dropout", (5, 16)),
    ("tests.networks:vit_with_dropout", IMAGE, "encoder.layers.encoder_layer_0", (5, 16)),
    ("tests.networks:text", IMAGE, "words", (12, 16)),
    ("tests.networks:text", IMAGE, "encoder.layers.0", (12, 16)),
    ("tests.networks:skip", IMAGE, "second", (8, 8, 8)),  # two of 4 maps
    ("tests.networks:skip_of_two_sizes", IMAGE, "second", (4 * 8 * 8 + 6 * 4 * 4,)),
)


def any_run(**settings: Any) -> Run:
    return small_run(**{"split": "m", "epochs": 1, **settings})


@functools.cache
def followed(model: str, image: tuple[int, int, int], seed: int) -> tuple[nn.Module, Tensor, Sequence[Trace]]:
    """torch.export takes seconds; a network is followed once."""
    net = build_named(model, 4, 3, seed)
    example = example_of(net, image)
    return net, example, traces(model, net, example)


def halves(model: str, image: tuple[int, int, int], layer: str, seed: int = 0) -> tuple[nn.Module, Halves]:
    """The whole network, and another one of the same weights in two."""
    net, example, modes = followed(model, image, seed)
    parts = cut_traced(model, net, modes, layer)
    prove(model, net, [parts.bottom, parts.top], example)
    return copy.deepcopy(net), copy.deepcopy(parts)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Has a network that was cut once cut at once."""

    def cut(model: str, net: nn.Module, example: Tensor, layer: str) -> Halves:
        image = tuple(example.shape[1:]) if example.is_floating_point() else IMAGE
        return halves(model, image, layer)[1]  # of seed 0

    monkeypatch.setattr("common.nets.cut.cut_at", cut)


def samples(net: nn.Module, image: tuple[int, int, int], count: int) -> Tensor:
    example = example_of(net, image)
    generator = torch.Generator().manual_seed(2)
    if not example.is_floating_point():
        return torch.randint(0, 50, (count, *example.shape[1:]), generator=generator)
    return torch.randn(count, *example.shape[1:], generator=generator)


# ---------------------------------------------------------------- joined, it is the whole


@pytest.mark.parametrize(("model", "image", "layer", "shape"), CUTS)
def test_joined_parts_are_the_whole_bit_for_bit(
    model: str, image: tuple[int, int, int], layer: str, shape: tuple[int, ...]
) -> None:
    """Three steps of training, with dropout and BatchNorm; then evaluation: logits, gradients, statistics."""
    whole, parts = halves(model, image, layer)
    assert parts.shape == shape
    both = nn.ModuleList([parts.bottom, parts.top])
    ours, theirs = (torch.optim.SGD(net.parameters(), 0.1) for net in (both, whole))
    for size in (5, 2, 7):
        x = samples(whole, image, size)
        y = torch.arange(size) % 4
        results = []
        for net in (whole, lambda x: parts.top(parts.bottom(x))):
            torch.manual_seed(size)
            logits = net(x)
            both.zero_grad()
            whole.zero_grad()
            F.cross_entropy(logits, y).backward()
            results.append((logits, torch.get_rng_state()))
            (theirs if net is whole else ours).step()
        (expected, theirs_drawn), (logits, ours_drawn) = results
        assert torch.equal(logits, expected)
        assert torch.equal(ours_drawn, theirs_drawn), "as much chance was taken"
    assert_same_state(whole, parts)
    for net in (whole, both):
        net.eval()
    for size in (1, 4):
        x = samples(whole, image, size)
        assert torch.equal(parts.top(parts.bottom(x)), whole(x))
    assert_same_state(whole, parts)


def assert_same_state(whole: nn.Module, parts: Halves) -> None:
    state = parts.bottom.state_dict() | parts.top.state_dict()
    expected = whole.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("layer", ["layer1", "layer3.0"])
def test_each_weight_has_one_owner_and_the_name_that_it_has_in_the_whole(layer: str) -> None:
    whole, parts = halves("torchvision:resnet18", (3, 32, 32), layer)
    mine, theirs = (dict(part.named_parameters()) for part in (parts.bottom, parts.top))
    assert not mine.keys() & theirs.keys()
    assert [*mine, *theirs] == [name for name, _ in whole.named_parameters()]


def test_what_is_tied_within_one_part_stays_tied() -> None:
    parts = cut_at("tied", Twice(), torch.zeros(2, 8), "first")
    assert [name for name, _ in parts.top.named_parameters()] == ["second.weight"]


class Twice(nn.Module):
    """Its second and third layer are of one weight, which the top has; the whole has it by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Linear(8, 8, bias=False) for _ in range(3))
        self.third.weight = self.second.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.third(self.second(self.first(x)))
        return out


def test_what_needs_no_sample_is_made_by_who_needs_it() -> None:
    """The mask of attention, and the number of samples: neither crosses."""
    _, parts = halves("tests.networks:text", IMAGE, "encoder.layers.0")
    assert parts.shape == (12, 16)
    assert "aten.arange" in parts.top.text
    assert parts.top(torch.zeros(7, 12, 16)).shape == (7, 4)


def test_what_is_given_is_left_as_it_was_even_where_the_code_changes_it() -> None:
    """resnet18 adds its shortcuts, and takes ReLU, in place; what it is given is being sent, or kept."""
    _, parts = halves("torchvision:resnet18", (3, 32, 32), "bn1")
    z = torch.randn(2, *parts.shape)
    before = z.clone()
    parts.top(z.requires_grad_()).sum().backward()
    assert torch.equal(z, before)
    assert z.grad is not None


def test_a_batch_that_is_too_small_to_learn_from_is_refused() -> None:
    """By BatchNorm of maps of 1x1, as in the whole; without that its variance would be no number."""
    _, parts = halves("torchvision:resnet18", (3, 32, 32), "layer3.0")
    one = torch.randn(1, *parts.shape)
    with pytest.raises(StepError, match="BatchNorm of this network cannot learn from a batch of one sample"):
        parts.top(one)
    assert parts.top.eval()(one).shape == (1, 4)
    _, fits = halves("tests.networks:skip", IMAGE, "first")
    assert fits.top(torch.randn(1, *fits.shape)).shape == (1, 4)


def test_sections_can_be_copied_moved_and_loaded() -> None:
    _, parts = halves("tests.networks:text", IMAGE, "words")
    twin, z = copy.deepcopy(parts.top).eval(), torch.randn(2, *parts.shape)
    parts.top.eval()
    assert torch.equal(twin(z), parts.top(z))
    with torch.no_grad():
        next(twin.parameters()).zero_()
    assert not torch.equal(twin(z), parts.top(z))
    twin.load_state_dict(parts.top.state_dict())
    assert torch.equal(twin(z), parts.top(z))
    assert twin.to("meta")(z.to("meta")).device.type == "meta", "and makes its masks there"


# ---------------------------------------------------------------- several tensors as one


@pytest.mark.parametrize(
    ("shapes", "shape"),
    [
        ([(4, 8, 8)], (4, 8, 8)),
        ([(4, 8, 8), (2, 8, 8)], (6, 8, 8)),
        ([(5, 16), (5, 2)], (5, 18)),
        ([(5, 16), (4, 16)], (144,)),
        ([(4, 8, 8), (4, 4, 4)], (320,)),
        ([(7,), (3,)], (10,)),
    ],
)
def test_what_several_tensors_travel_as(shapes: list[tuple[int, ...]], shape: tuple[int, ...]) -> None:
    assert together(shapes) == shape


# ---------------------------------------------------------------- fingerprints and seeds


@pytest.mark.usefixtures("quick")
def test_both_ends_have_the_same_fingerprint_and_other_networks_have_others() -> None:
    run = {"model": "tests.networks:vit", "cut": "encoder.dropout"}
    code = (
        "from common.nets.cut import build; from tests.test_graph import any_run; "
        f"print(build(any_run(**{run!r}, seed=7)).fingerprint)"
    )
    command = [sys.executable, "-c", code]
    there = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    others = [
        {"model": "tests.networks:vit", "cut": "encoder.layers.encoder_layer_0"},
        {"model": "tests.networks:vit_with_dropout", "cut": "encoder.dropout"},
        {"model": "resnet8", "split": "1"},
        {"model": "resnet8", "split": "2"},
    ]
    here = [build(any_run(**settings)).fingerprint for settings in (run, *others)]
    assert here[0] == there.stdout.strip()
    assert len(set(here)) == 5


def test_the_seed_alone_gives_the_weights() -> None:
    torch.rand(5)
    first, again, other = (build_named("tests.networks:vit", 4, 3, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


# ---------------------------------------------------------------- over the wire


WIRED = [*CUTS, ("tests.networks:vit", IMAGE, "encoder.dropout", ())]
CERTAIN = (
    "torchvision:resnet18",
    "tests.networks:vit",
    "tests.networks:skip",
    "tests.networks:skip_of_two_sizes",
)


class Tokens(Batches):
    """Made-up sequences of words in place of images."""

    def __init__(self, run: Run, seed: int, samples: int) -> None:
        super().__init__(run, seed, samples)
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.randint(0, 50, (samples, 12), generator=generator)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("method", ["dsl", "csl"])
@pytest.mark.parametrize(("model", "image", "layer", "shape"), WIRED)
def test_it_trains_over_the_wire(
    method: str,
    model: str,
    image: tuple[int, int, int],
    layer: str,
    shape: tuple[int, ...],
    tmp_path: Path,
) -> None:
    """Both parts learn; where there is no dropout, which in one process draws from one generator, as in one
    thread bit for bit."""
    kind = Tokens if model.endswith("text") else Batches
    run = any_run(method=method, model=model, image=image, cut=layer, lr=0.01)
    data = [kind(run, 0, 18)]
    server, (client,), summary = federation(run, tmp_path, data, kind=kind)
    first = build(run)
    assert moved(client.bottom, first.bottom)
    assert moved(server.part.top, first.top)
    assert (summary["model"], summary["split"], summary["samples_trained"]) == (model, layer, 18)
    assert (summary["wire"]["down"]["gradients"] > 0) == (method == "csl")
    if model in CERTAIN:
        assert_as_in_one_thread(server.run, data, server.part, [client])


def moved(part: nn.Module, first: nn.Module) -> bool:
    """Whether every weight has changed that had a gradient."""
    before = first.state_dict()
    return all(not torch.equal(tensor, before[name]) for name, tensor in part.named_parameters())


@pytest.mark.usefixtures("quick")
def test_csl_is_backpropagation_through_the_whole(tmp_path: Path) -> None:
    run = any_run(method="csl", model="torchvision:resnet18", image=(3, 32, 32), cut="layer1")
    data = Batches(run, 0, 24)
    server, (client,), _ = federation(run, tmp_path, [data])

    whole = build_named(run.model, 4, 3, run.seed)
    optimizer = sgd(whole.parameters(), run)
    for index, (x, y) in enumerate(data.epoch(0)):
        optimizer.param_groups[0]["lr"] = learning_rate(run, index / 3)
        optimizer.zero_grad()
        F.cross_entropy(whole(x), y).backward()
        optimizer.step()

    state = client.bottom.state_dict() | server.part.top.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.state_dict().items())
