"""Auxiliary heads: counts, shapes, what they leave alone, what learns from them, one sample, refusals."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError
from common.methods import build_method
from common.methods.base import run_step
from common.nets.cut import build
from common.nets.heads import HEADS, Cut, InfoPro, Shape, build_head, local_loss
from common.nets.resnet import Block
from common.parts import client_part
from common.run import Run
from dsl_client.batches import normalise
from tests.federation import CPU, small_run

CUTS = [("resnet8", 1), ("resnet8", 2), *(("resnet20", blocks) for blocks in range(1, 9))]  # all there are


def parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def cut_at(shape: Shape, classes: int = 4, image: Shape = (3, 8, 8)) -> Cut:
    """A cut that one block follows, 64 channels wide."""
    return Cut(shape, image, classes, nn.Sequential(Block(shape[0], 64)))


def infopro(**settings: Any) -> InfoPro:
    head = build(small_run(head="infopro", **settings)).head
    assert isinstance(head, InfoPro)
    return head


# ---------------------------------------------------------------- all heads


@pytest.mark.parametrize(
    ("head", "split", "count"),
    [
        ("gap", "s", 170),
        ("gap", "d", 330),
        ("flat", "s", 163_850),
        ("flat", "d", 81_930),
        ("conv", "s", 14_378),
        ("conv", "d", 54_858),
        ("mlp", "s", 152_330),
        ("mlp", "d", 168_714),
        # 16 to 32 and 32 to 64: (4608 + 64 + 9216 + 64) + (18432 + 128 + 36864 + 128), and 650
        ("copy", "s", 70_154),
        # 32 to 64 and 64 to 64: (18432 + 128 + 36864 + 128) + 2 (36864 + 128), and 650
        ("copy", "d", 130_186),
        # 1c2f: 4608 + 64, 4224, 1290; the decoder: 1728 + 24, 327
        ("infopro", "s", 10_186 + 2_079),
        # 1c2f: 18432 + 128, 8320, 1290; the decoder: 3456 + 24, 327
        ("infopro", "d", 28_170 + 3_807),
    ],
)
def test_a_head_has_the_known_number_of_parameters(head: str, split: str, count: int) -> None:
    assert parameters(build(Run(model="resnet110", split=split, head=head)).head) == count


@pytest.mark.parametrize(("head", "count"), [("strided", 23_882), ("copy", 70_154), ("infopro", 12_265)])
def test_and_at_m_of_resnet20_that_of_the_docs(head: str, count: int) -> None:
    assert parameters(build(Run(model="resnet20", split="m", head=head)).head) == count


@pytest.mark.parametrize(
    "shape", [(16, 32, 32), (32, 16, 16), (64, 8, 8), (16, 8, 8), (16, 5, 7), (64, 2, 2), (64, 1, 1)]
)
@pytest.mark.parametrize("head", HEADS)
def test_a_head_classifies_activations_of_any_shape(head: str, shape: Shape) -> None:
    assert build_head(head, cut_at(shape, 7))(torch.randn(3, *shape)).shape == (3, 7)


@pytest.mark.parametrize(("model", "blocks"), CUTS)
@pytest.mark.parametrize("head", HEADS)
def test_every_cut_can_have_every_head_and_train_on_one_sample(head: str, model: str, blocks: int) -> None:
    """One sample: the last of an epoch, perhaps. It must not stop the run nor spoil the statistics."""
    net = build(small_run(model=model, split=str(blocks), head=head))
    assert net.head(net.bottom(torch.randn(2, 3, 8, 8))).shape == (2, 4)

    x = torch.randn(1, 3, 8, 8)
    loss = local_loss(net.head, net.bottom(x), x, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite()
    for part in (net.bottom, net.head):
        for name, parameter in part.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
        for name, buffer in part.named_buffers():
            assert buffer.isfinite().all(), name


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_no_head_changes_the_activations_that_are_being_sent(head: str, training: bool) -> None:
    z, x, y = torch.randn(4, 16, 8, 8), torch.randn(4, 3, 8, 8), torch.arange(4)
    before, leaf = z.clone(), z.requires_grad_()
    module = build_head(head, cut_at((16, 8, 8))).train(training)
    module(leaf).sum().backward()
    local_loss(module, leaf, x, y).backward()
    assert torch.equal(z, before)


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_of_a_head_learns(head: str) -> None:
    net, x = build(small_run(head=head)), torch.randn(8, 3, 8, 8)
    local_loss(net.head, net.bottom(x), x, torch.arange(8) % 4).backward()
    for name, parameter in net.head.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("head", HEADS)
def test_the_clients_rule_minimises_the_local_loss(head: str) -> None:
    run = small_run(head=head)
    method = build_method(run)
    part, same = client_part(run, method, build(run), CPU), build(run)
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4
    expected = local_loss(same.head, same.bottom(x), x, y)
    loss = run_step(method.client_step(part, x, y), lambda _: None)
    assert loss is not None
    assert torch.equal(loss, expected.detach())
    assert part.head is not None
    for (name, after), before in zip(part.head.named_parameters(), same.head.parameters(), strict=True):
        assert not torch.equal(after, before), name


@pytest.mark.parametrize("head", sorted(set(HEADS) - {"infopro"}))
def test_a_plain_heads_loss_is_mean_cross_entropy(head: str) -> None:
    module, z = build_head(head, cut_at((16, 8, 8))), torch.randn(4, 16, 8, 8)
    ours = local_loss(module, z, torch.randn(4, 3, 8, 8), torch.tensor([3, 1, 0, 1]))
    right = module(z).log_softmax(1)[torch.arange(4), torch.tensor([3, 1, 0, 1])]
    torch.testing.assert_close(ours, -right.mean())


def test_a_head_that_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="--head 'foot': choose from gap, flat, mlp, conv"):
        build_head("foot", cut_at((16, 8, 8)))


# ---------------------------------------------------------------- copy


def copied(cut: Cut) -> list[Block]:
    return [layer for layer in build_head("copy", cut).children() if isinstance(layer, Block)]


@pytest.mark.parametrize(
    ("last", "layers"),
    [  # of ResNet-110's 55, the stem being 0
        (12, [33, 54]),  # s: 12 + 42 / 2, 12 + 42
        (17, [36, 54]),  # m: 17 + 37 / 2 = 35.5
        (26, [40, 54]),  # d: 26 + 28 / 2
        (51, [53, 54]),  # 51 + 3 / 2 = 52.5: up
        (52, [53, 54]),  # both
        (53, [54]),  # all there is
    ],
)
def test_copy_samples_the_layers_that_follow_evenly(last: int, layers: list[int]) -> None:
    with torch.device("meta"):  # no memory: the blocks are told apart by their widths
        following = nn.Sequential(*(Block(1000 + i, 1000 + i) for i in range(last + 1, 55)), nn.Flatten())
        blocks = copied(Cut((16, 32, 32), (3, 32, 32), 10, following))
    assert [block.conv2.out_channels - 1000 for block in blocks] == layers


def test_copy_takes_the_architecture_and_not_the_weights() -> None:
    net = build(Run(model="resnet20", split="m", head="copy"))
    first, second = (layer for layer in net.head.children() if isinstance(layer, Block))
    assert [first.conv1.in_channels, first.conv1.out_channels, first.stride] == [16, 32, 2]  # as block 4 is
    assert [second.conv1.in_channels, second.conv1.out_channels, second.stride] == [32, 64, 2]  # as 7 is
    theirs = {id(parameter) for parameter in net.top.parameters()}
    assert not theirs & {id(parameter) for parameter in net.head.parameters()}


def test_a_copied_block_may_widen_fourfold() -> None:
    (block,) = copied(cut_at((16, 8, 8)))
    x = torch.randn(2, 16, 8, 8)
    assert block(x).shape == (2, 64, 4, 4)
    assert torch.equal(block.shortcut(x)[:, 24:40], x[:, :, ::2, ::2])


# ---------------------------------------------------------------- infopro


def enlarging(small: int, large: int) -> Tensor:
    """(large, small): linear interpolation of a line, its ends kept."""
    matrix = torch.zeros(large, small)
    for i in range(large):
        place = i * (small - 1) / (large - 1)
        left = min(int(place), small - 2)
        matrix[i, left], matrix[i, left + 1] = 1 - (place - left), place - left
    return matrix


def normed(x: Tensor) -> Tensor:
    """A fresh BatchNorm in training."""
    mean, var = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), correction=0, keepdim=True)
    return (x - mean) / (var + 1e-5).sqrt()


@pytest.mark.parametrize("image", [(3, 16, 16), (1, 14, 14), (4, 9, 13)])
def test_infopros_loss_is_that_of_the_paper(image: Shape) -> None:
    head = infopro(image=image, model="resnet20", split="5")  # after the first stride
    height, width = -(-image[1] // 2), -(-image[2] // 2)
    z = torch.randn(4, 32, height, width)
    pixels = torch.randint(256, (4, *image), dtype=torch.uint8)
    y = torch.tensor([3, 1, 0, 1])
    w = head.state_dict()

    large = torch.einsum("yh,xw,bchw->bcyx", enlarging(height, image[1]), enlarging(width, image[2]), z)
    hidden = normed(F.conv2d(large, w["decoder.0.weight"], padding=1)).clamp(min=0)
    q = F.conv2d(hidden, w["decoder.3.weight"], w["decoder.3.bias"], padding=1).double().sigmoid()
    p = pixels.double() / 255
    reconstruction = -(p * q.log() + (1 - p) * (1 - q).log()).mean()

    features = normed(F.conv2d(z, w["classifier.0.weight"], stride=2, padding=1)).clamp(min=0).mean((2, 3))
    hidden = (features @ w["classifier.5.weight"].T + w["classifier.5.bias"]).clamp(min=0)
    logits = hidden @ w["classifier.7.weight"].T + w["classifier.7.bias"]
    classification = -logits.log_softmax(1)[torch.arange(4), y].mean()

    expected = (5 * reconstruction + 0.5 * classification).float()
    torch.testing.assert_close(local_loss(head, z, normalise(pixels), y), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(head(z), logits, rtol=1e-4, atol=1e-5)


def test_the_bottom_learns_from_both_of_infopros_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    net = build(small_run(head="infopro"))
    x, y = torch.randn(8, 3, 8, 8), torch.arange(8) % 4

    def gradients(reconstruction: float, classification: float) -> list[Tensor]:
        monkeypatch.setattr(InfoPro, "RECONSTRUCTION", reconstruction)
        monkeypatch.setattr(InfoPro, "CLASSIFICATION", classification)
        loss = local_loss(net.head, net.bottom(x), x, y)
        return list(torch.autograd.grad(loss, list(net.bottom.parameters())))

    both, image, label = gradients(5, 0.5), gradients(5, 0), gradients(0, 0.5)
    for whole, first, second in zip(both, image, label, strict=True):
        assert first.any()
        assert second.any()
        torch.testing.assert_close(whole, first + second, rtol=1e-3, atol=1e-5)


def test_infopros_decoder_is_only_for_training() -> None:
    head = infopro().eval()
    z = torch.randn(2, 16, 8, 8)
    before = head(z)
    nn.init.zeros_(head.decoder[0].weight)
    assert torch.equal(head(z), before)
