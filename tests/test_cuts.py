"""`dsl cuts`: every possible cut, its costs held to networks that are really run, the best one, refusals."""

import io
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from common.errors import ConfigError
from dsl_lab.costs import Costs, Side, costs_of, places_in
from dsl_lab.cuts import Cuts, best_of, cuts
from tests.test_graph import halves

IMAGE = (3, 8, 8)


def printed(**settings: Any) -> str:
    console = Console(file=io.StringIO(), width=40)
    cuts(Cuts(**{"model": "tests.networks:skip", "input": "3x8x8", "classes": 4, **settings}), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def kept(part: nn.Module, x: Tensor) -> tuple[Tensor, int]:
    """What it makes of x, and the bytes that it keeps for its gradient, x and weights left out."""
    weights = {weight.untyped_storage().data_ptr() for weight in part.state_dict().values()}
    blocks: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        blocks[storage.data_ptr()] = storage.nbytes(), storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = part(x)
    blocks = {key: value for key, value in blocks.items() if key not in weights}
    blocks[out.untyped_storage().data_ptr()] = out.untyped_storage().nbytes(), out
    return out, sum(size for size, _ in blocks.values())


@pytest.mark.parametrize(("model", "layer"), [("tests.networks:vit", "encoder.dropout")])
def test_what_is_said_of_a_cut_is_true_of_the_parts(model: str, layer: str) -> None:
    costs = {row.layer: row for row in costs_of(places_in(model, IMAGE, 4))}[layer]
    _, parts = halves(model, IMAGE, layer)
    for part, side in ((parts.bottom, costs.client), (parts.top, costs.server)):
        assert side.parameters == sum(parameter.numel() for parameter in part.parameters())
    z, held = kept(parts.bottom, torch.randn(2, *IMAGE))
    assert costs.sent_bytes == z[0].numel() * 4
    assert costs.client.activation_bytes == pytest.approx(held / 2, rel=0.01)
    out, held = kept(parts.top, z.detach())
    theirs = held / 2 - out[0].numel() * 4
    assert costs.server.activation_bytes == pytest.approx(theirs, rel=0.01)


def test_multiply_adds_are_those_worked_out_by_hand() -> None:
    """skip: 3x3 convolutions of 3 to 4, 4 to 4 and 4 to 4 maps of 8x8, and 4 x 4 at the end."""
    rows = {row.layer: row for row in costs_of(places_in("tests.networks:skip", IMAGE, 4))}
    first, whole = 9 * 3 * 4 * 64, 9 * (3 + 4 + 4) * 4 * 64 + 16
    assert rows["first"].client.macs == first
    assert rows["first"].server.macs == whole - first
    assert [list(row.shapes) for row in rows.values()][-2:] == [[(4, 8, 8), (4, 8, 8)]] * 2


def test_a_resnet_s_cuts_are_its_blocks() -> None:
    rows = costs_of(places_in("resnet20", (3, 32, 32), 10))
    assert [row.layer for row in rows] == [str(blocks) for blocks in range(1, 9)]
    assert (rows[2].client.parameters, round(rows[2].client.macs / 1e6, 1)) == (14_480, 14.6)


def row(layer: str, sent: int, macs: int, activations: int) -> Costs:
    return Costs(layer, [(sent,)], Side(0, macs, activations), Side(0, 0, 0))


ROWS = [row("early", 1000, 10**6, 100), row("middle", 500, 4 * 10**6, 200), row("late", 10, 10**8, 300)]


@pytest.mark.parametrize(
    ("rate", "memory", "best"),
    [
        (0, 0, "late"),  # sends the least
        (0, 2500, "middle"),  # of those that fit ten samples
        (0, 500, None),
        (1e9, 0, "early"),  # 0.3 ms of work, 0.03 ms of link
        (1e7, 0, "middle"),  # 1.2 ms of work; early: 3.2 ms of link
        (1e4, 0, "late"),  # 32 ms of link; middle: 1.6 s
        (1e4, 2500, "middle"),
    ],
)
def test_the_best_is_the_one_at_which_the_slower_of_work_and_link_is_fastest(
    rate: float, memory: int, best: str | None
) -> None:
    found = best_of(ROWS, 10, rate, memory, speed=10)
    assert (found and found.layer) == best


def test_the_table_has_every_cut_and_the_command_for_the_best() -> None:
    text = printed(link="10Mbit", memory="10MB", batch_size=32)
    for word in ("first.0", "first", "second", "third", "4x8x8 + 4x8x8", "samples/s", "best"):
        assert word in text
    assert "Best for 10Mbit and 10MB: dsl-server --model tests.networks:skip --cut first" in text
    assert "best" not in printed()
    assert "No cut fits 1kB with a batch of 128; first.0 takes the least" in printed(memory="1kB")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"input": "3,8,8"}, "--input '3,8,8': say channels x height x width"),
        ({"input": "3x0x8"}, "--input '3x0x8'"),
        ({"link": "fast"}, "--link 'fast': say a rate, such as 10Mbit"),
        ({"link": "0Mbit"}, "--link '0Mbit'"),
        ({"memory": "lots"}, "--memory 'lots' is not a size"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"model": "tests.networks:tied"}, "there is no layer that it can be cut after"),
        ({"model": "vgg16"}, "--model 'vgg16': choose resnetN"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        printed(**settings)
