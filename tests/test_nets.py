"""Networks and where they are cut: counts, shapes, first weights, refusals."""

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common.errors import ConfigError
from common.nets.cut import blocks_at_client, build, depth_of, initialise
from common.nets.heads import HEADS
from common.nets.resnet import Block, resnet
from common.run import Run
from tests.federation import small_run

SHAPES = {"s": (16, 32, 32), "m": (16, 32, 32), "d": (32, 16, 16)}  # of ResNet-110's cuts, on 32x32


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def net_of(**settings: Any) -> nn.Sequential:
    """The whole network again: bottom and then top."""
    net = build(small_run(**settings))
    return nn.Sequential(*net.bottom, *net.top)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize(("classes", "count"), [(10, 1_727_962), (100, 1_733_812)])
def test_resnet110_has_the_known_number_of_parameters(classes: int, count: int) -> None:
    assert parameters(resnet(110, classes)) == count


@pytest.mark.parametrize(("depth", "count"), [(20, 269_722), (32, 464_154), (56, 853_018)])
def test_smaller_resnets_have_too(depth: int, count: int) -> None:
    assert parameters(resnet(depth, 10)) == count


@pytest.mark.parametrize("depth", [8, 20, 32, 110])
def test_a_resnet_has_as_many_weighted_layers_as_its_name_says(depth: int) -> None:
    layers = [m for m in resnet(depth, 10).modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


@pytest.mark.parametrize(("image", "channels"), [((3, 32, 32), 3), ((1, 28, 28), 1), ((4, 9, 13), 4)])
def test_images_of_any_shape_are_classified(image: tuple[int, int, int], channels: int) -> None:
    net = initialise(resnet(8, 7, channels), torch.Generator())
    assert net(torch.zeros(2, *image)).shape == (2, 7)


def test_a_shortcut_takes_every_second_pixel_and_adds_channels_of_zeros() -> None:
    x = torch.arange(2 * 16 * 4 * 4, dtype=torch.float32).reshape(2, 16, 4, 4)
    y = Block(16, 32).shortcut(x)
    assert y.shape == (2, 32, 2, 2)
    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()


@pytest.mark.parametrize("stride_channels", [(16, 16), (16, 32)])
def test_a_block_leaves_its_input_as_it_was(stride_channels: tuple[int, int]) -> None:
    x = torch.randn(2, 16, 8, 8)
    before = x.clone()
    Block(*stride_channels)(x)
    assert torch.equal(x, before)


# ---------------------------------------------------------------- the cut


@pytest.mark.parametrize(
    ("model", "split", "blocks"),
    [
        ("resnet110", "s", 12),
        ("resnet110", "m", 17),
        ("resnet110", "d", 26),
        ("resnet20", "s", 2),  # 2.0 of 9
        ("resnet20", "m", 3),  # 2.8
        ("resnet20", "d", 4),  # 4.3
        ("resnet32", "s", 3),  # 3.3 of 15
        ("resnet32", "m", 5),  # 4.7
        ("resnet32", "d", 7),  # 7.2
        ("resnet8", "s", 1),  # 0.7 of 3
        ("resnet8", "d", 1),  # 1.4
    ],
)
def test_a_named_split_is_a_share_of_the_blocks(model: str, split: str, blocks: int) -> None:
    assert blocks_at_client(model, split) == blocks


@pytest.mark.parametrize("blocks", range(1, 9))
def test_any_number_of_blocks_can_be_at_the_client(blocks: int) -> None:
    net = build(small_run(model="resnet20", split=str(blocks)))
    assert len(net.bottom) == 1 + blocks
    assert len(net.top) == 9 - blocks + 1
    z = net.bottom(torch.zeros(2, 3, 8, 8))
    assert z.shape == (2, *net.cut_shape)
    assert net.top(z).shape == (2, 4)


@pytest.mark.parametrize(
    "split",
    ["", "x", "0", "9", "10", "-1", "1.5", "S", " 1", "²", "1_0", "٣", "9" * 5000],
    ids=lambda s: ascii(s[:9]),
)
def test_a_split_that_cannot_be_is_refused_by_name(split: str) -> None:
    with pytest.raises(ConfigError, match=r"--split .*: resnet20 has 9 blocks; choose s, m, d or 1 to 8"):
        build(small_run(model="resnet20", split=split))


@pytest.mark.parametrize(
    "model", ["", "resnet", "resnet2", "resnet21", "resnet18", "resnet-20", "vgg16", "ResNet20", "resnet20 "]
)
def test_a_model_that_does_not_exist_is_refused_by_name(model: str) -> None:
    with pytest.raises(ConfigError, match=f"--model {model!r}: choose resnetN"):
        depth_of(model)


@pytest.mark.parametrize("split", ["1", "2", "4", "7"])
def test_bottom_and_then_top_are_the_whole_network(split: str) -> None:
    """Weights, statistics and gradients: the cut is a place, not a layer."""
    net, x = build(small_run(model="resnet20", split=split)), torch.randn(4, 3, 8, 8)
    whole = initialise(resnet(20, 4), torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 2, 3])

    z = net.bottom(x)
    ours = net.top(z)
    theirs = whole(x)
    assert torch.equal(ours, theirs)
    F.cross_entropy(ours, y).backward()
    F.cross_entropy(theirs, y).backward()
    for mine, other in zip(
        [*net.bottom.parameters(), *net.top.parameters()], whole.parameters(), strict=True
    ):
        assert mine.grad is not None
        assert other.grad is not None
        assert torch.equal(mine, other)
        assert torch.equal(mine.grad, other.grad)


def test_to_find_the_cuts_shape_moves_no_statistics() -> None:
    for module in build(small_run()).bottom.modules():
        assert module.training
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked is not None
            assert module.num_batches_tracked.item() == 0


@pytest.mark.parametrize("split", ["s", "m", "d"])
def test_the_cut_of_resnet110_has_the_known_shape(split: str) -> None:
    run = Run(model="resnet110", split=split)
    assert build(run).cut_shape == SHAPES[split]


# ---------------------------------------------------------------- first weights


def equal(ours: nn.Module, theirs: nn.Module) -> bool:
    pairs = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    first, again, other = (build(small_run(seed=seed)) for seed in (1, 1, 2))
    for part in ("bottom", "top", "head"):
        assert equal(getattr(first, part), getattr(again, part))
        assert not equal(getattr(first, part), getattr(other, part))


@pytest.mark.parametrize("head", HEADS)
def test_weights_do_not_depend_on_the_global_generator(head: str) -> None:
    torch.manual_seed(1)
    first = build(small_run(head=head))
    torch.manual_seed(2)
    again = build(small_run(head=head))
    assert equal(first.bottom, again.bottom)
    assert equal(first.head, again.head)


def test_where_the_cut_is_does_not_change_the_weights() -> None:
    assert equal(net_of(model="resnet20", split="1"), net_of(model="resnet20", split="7"))


def test_threads_that_build_at_once_get_the_same_weights() -> None:
    """As several clients in one process do, while others draw random numbers."""
    expected, stop = build(small_run(seed=5, head="mlp")), threading.Event()

    def disturb() -> None:
        while not stop.is_set():
            torch.rand(10)

    noise = threading.Thread(target=disturb)
    noise.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            nets = list(pool.map(lambda _: build(small_run(seed=5, head="mlp")), range(8)))
    finally:
        stop.set()
        noise.join()
    for net in nets:
        assert equal(net.bottom, expected.bottom)
        assert equal(net.top, expected.top)
        assert equal(net.head, expected.head)
