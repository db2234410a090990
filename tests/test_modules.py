"""Ends that are cut again: what each module learns from, and that one's activations are held at a time."""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import ConfigError
from common.methods import build_method, settled
from common.methods.base import ClientPart, Part, Received, ServerPart, run_step
from common.nets.cut import build, initialise, slices
from common.nets.resnet import Block, resnet
from common.parts import client_part, server_part, state_of
from common.run import Run
from tests.federation import CPU, Batches, small_run
from tests.plain import (
    ALONE,
    UNEQUAL,
    assert_near,
    assert_same,
    copies,
    gradients_of,
    mean_into,
    move,
    optimizer_of,
    plain_run,
    rounds,
    shares,
    trained,
)

# ResNet-14 is a stem, six blocks and a classifier: of each module, the layer after its last one.
CUTS = [("2", (2, 3), (5, 8)), ("1", (2,), (5, 8)), ("3", (3, 4), (5, 6, 8)), ("4", (2, 3, 4, 5), (8,))]

BINARY = (20, 8, 4)  # weights of 5/8, 1/4 and 1/8, which round nothing: averages too are the same to the bit


@pytest.mark.parametrize(("split", "client_ends", "server_ends"), CUTS)
@pytest.mark.parametrize(
    ("samples", "sync"), [(UNEQUAL, "none"), (BINARY, "average"), (ALONE, "none")], ids=str
)
def test_every_module_learns_from_its_own_head_and_nothing_else(
    split: str, client_ends: Sequence[int], server_ends: Sequence[int], samples: Sequence[int], sync: str
) -> None:
    modules = {"client_modules": len(client_ends), "server_modules": len(server_ends)}
    run = plain_run("dsl", len(samples), model="resnet14", split=split, head="conv", sync=sync, **modules)
    data = shares(run, samples)
    ours = trained(run, data, make=partial(build, run))

    net = build(run)
    layers = [*net.bottom, *net.top]
    ends = [*client_ends, *server_ends]
    bodies = [nn.Sequential(*layers[i:j]) for i, j in pairwise([0, *ends])]
    heads = [*net.bottom_heads, net.head, *net.top_heads, nn.Identity()]
    here = len(client_ends)
    stages = [nn.ModuleList(pair) for pair in zip(bodies, heads, strict=True)]
    clients = [copies(stage, len(data)) for stage in stages[:here]]  # by module, then by client
    servers = stages[here:]
    moves = {stage: optimizer_of(run, stage) for stage in chain(*clients, servers)}
    for _ in range(run.epochs):
        for tick in rounds(data):
            for k, h, y in tick:
                for stage in [*(stages[k] for stages in clients), *servers]:
                    body, head = stage
                    out = body(h.detach())
                    (gradients,) = gradients_of(F.cross_entropy(head(out), y), [stage])
                    move(moves[stage], gradients)
                    h = out
        for alike in clients if sync == "average" else ():
            mean_into(alike, samples)

    for k, part in enumerate(ours.clients):
        assert_same(
            [part.bottom, *(stage.head for stage in part.inner), *ours.heads[k : k + 1]],
            [joined(stages[k] for stages in clients), *(stages[k][1] for stages in clients)],
        )
    (server,) = ours.servers
    learned = [joined([(server.top, None)]), *(stage.head for stage in server.inner)]
    assert_same(learned, [joined(servers), *(stage[1] for stage in servers[:-1])])


def test_with_lambda_the_last_module_here_learns_from_the_first_ones_loss_there() -> None:
    """It is the only one of the server's losses that has a derivative at the cut."""
    settings = {"client_modules": 2, "server_modules": 2, "method_arg": ("lambda_=0.5",), "lr": 0.02}
    run = plain_run("dsl", 1, model="resnet14", split="2", **settings)
    (data,) = shares(run, ALONE)
    ours = trained(run, [data], make=partial(build, run))

    net = build(run)
    bodies = [net.bottom[:2], net.bottom[2:], net.top[:2], net.top[2:]]
    heads = [*net.bottom_heads, net.head, *net.top_heads, nn.Identity()]
    stages = [nn.ModuleList(pair) for pair in zip(bodies, heads, strict=True)]
    moves = [optimizer_of(run, stage) for stage in stages]
    for _ in range(run.epochs):
        for x, y in data.epoch(0):
            h = bodies[0](x)
            z = bodies[1](h.detach())
            u = bodies[2](z)
            outs = [h, z, u, bodies[3](u.detach())]
            losses = [F.cross_entropy(head(out), y) for head, out in zip(heads, outs, strict=True)]
            losses[1] = losses[1] + 0.5 * losses[2]
            gradients = [
                gradients_of(loss, [stage], retain_graph=True)[0]
                for loss, stage in zip(losses, stages, strict=True)
            ]
            for optimizer, some in zip(moves, gradients, strict=True):
                move(optimizer, some)

    (client,), (server,) = ours.clients, ours.servers
    near = [client.bottom, client.inner[0].head, *ours.heads, server.top, server.inner[0].head]
    assert_near(near, [net.bottom, *net.bottom_heads, net.head, net.top, *net.top_heads])


def joined(stages: Any) -> nn.Sequential:
    return nn.Sequential(*(layer for body, _ in stages for layer in body))


# ---------------------------------------------------------------- one module an end


def parts_of(run: Run) -> tuple[ClientPart, ServerPart]:
    method, net = build_method(run), build(run)
    return client_part(run, method, net, CPU), server_part(run, method, net, CPU)


def ends_of(run: Run) -> list[Part]:
    return [*parts_of(run)]


def test_one_module_an_end_is_dsl_with_the_first_weights_it_always_had() -> None:
    run = small_run(method="dsl", client_modules=1, server_modules=1, seed=4)
    dice = torch.Generator().manual_seed(4)
    whole = initialise(resnet(8, 4), dice)
    head = initialise(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 4)), dice)
    expected = [
        {**named("bottom", whole[:2]), **named("head", head)},
        named("top", whole[2:]),
    ]
    for part, state in zip(ends_of(run), expected, strict=True):
        assert list(state_of(part, momentum=False)) == list(state)
        assert all(torch.equal(t, state[name]) for name, t in state_of(part, momentum=False).items())
        assert (part.inner, part.last) == ([], None)


def named(part: str, module: nn.Module) -> dict[str, Tensor]:
    return {f"{part}.{name}": tensor for name, tensor in module.state_dict().items()}


def test_more_modules_add_heads_and_change_no_first_weight() -> None:
    alike = {"model": "resnet14", "split": "2", "seed": 4}
    one, more = small_run(**alike), small_run(client_modules=2, server_modules=3, **alike)
    added = [{"heads.0"}, {"heads.0", "heads.1"}]
    for part, cut, heads in zip(ends_of(one), ends_of(more), added, strict=True):
        before, after = state_of(part, momentum=False), state_of(cut, momentum=False)
        assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
        assert {name.rsplit(".", 2)[0] for name in after.keys() - before.keys()} == heads


# ---------------------------------------------------------------- memory


class Held:
    """Bytes that autograd's graphs hold of activations, each storage once; and the most there were."""

    def __init__(self, part: Part) -> None:
        self.most = self.now = 0
        self._holders: Counter[int] = Counter()
        self._weights = {tensor.untyped_storage().data_ptr() for tensor in state_of(part).values()}

    def during(self, work: Callable[[], object]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(partial(_Saved, self), lambda saved: saved.tensor):
            work()
        assert self.now == 0, "and nothing is held afterwards"
        return self.most

    def count(self, tensor: Tensor, change: int) -> None:
        storage = tensor.untyped_storage()
        where = storage.data_ptr()
        if where in self._weights:
            return
        before = self._holders[where] > 0
        self._holders[where] += change
        self.now += storage.nbytes() * ((self._holders[where] > 0) - before)
        self.most = max(self.most, self.now)


class _Saved:
    """A tensor that a graph has saved, for as long as the graph holds it."""

    def __init__(self, held: Held, tensor: Tensor) -> None:
        self._held, self.tensor = held, tensor
        held.count(tensor, +1)

    def __del__(self) -> None:
        self._held.count(self.tensor, -1)


MAP = 8 * 16 * 8 * 8 * 4  # bytes of one map of the first stage: a batch of 8, 16 channels, 8x8


def deep(**modules: int) -> Run:
    """ResNet-56, cut after its first stage: a stem and 9 blocks at the client, 18 and a classifier beyond."""
    return small_run(method="dsl", model="resnet56", split="9", **modules)


# A block's graph holds 4 maps beside its input: both convolutions' outputs, and both ReLUs'. The stem's
# holds 2 beside the image, which is 3/16 of a map. In the second stage a map is half as large, in the
# third a quarter. The heads, one pool and one linear layer, hold next to nothing.
# The first module is the largest.
CLIENT = {modules: 3 / 16 + 2 + blocks * 4 for modules, blocks in ((1, 9), (2, 5), (5, 2), (9, 1))}
SERVER = {1: 1 + 9 * 2 + 9, 2: 1 + 9 * 2, 4: 1 + 5 * 2, 10: 1 + 2 * 2}


@pytest.mark.parametrize(("modules", "maps"), CLIENT.items())
def test_a_client_holds_the_activations_of_one_module_at_a_time(modules: int, maps: float) -> None:
    run = deep(client_modules=modules)
    part, _ = parts_of(run)
    (x, y), *_ = Batches(run, seed=1, samples=8).epoch(0)
    held = Held(part).during(lambda: run_step(build_method(run).client_step(part, x, y), lambda _: None))
    assert held == pytest.approx(maps * MAP, rel=0.03)


@pytest.mark.parametrize(("modules", "maps"), SERVER.items())
def test_a_server_holds_the_activations_of_one_module_at_a_time(modules: int, maps: float) -> None:
    run = deep(server_modules=modules)
    _, part = parts_of(run)
    received = Received(torch.randn(8, 16, 8, 8), torch.arange(8) % 4, 0, 0.0, wanted=False)
    held = Held(part).during(lambda: build_method(run).server_step(part, [received]))
    assert held == pytest.approx(maps * MAP, rel=0.03)


# ---------------------------------------------------------------- what may be cut


@pytest.mark.parametrize(("setting", "blocks"), [("client_modules", 1), ("server_modules", 2)])
def test_there_are_no_more_modules_than_blocks(setting: str, blocks: int) -> None:
    """ResNet-8 cut after its first block."""
    build(small_run(**{setting: blocks}))
    says = (
        f"--{setting.replace('_', '-')} {blocks + 1}: modules are made of blocks, and this end has {blocks}"
    )
    with pytest.raises(ConfigError, match=says):
        build(small_run(**{setting: blocks + 1}))


# Blocks of ResNet-110's modules where the authors' code has 15, 15, 12 and 20, 17: the first is the largest.
@pytest.mark.parametrize(
    ("split", "count", "expected"), [("s", 3, [14, 14, 14]), ("m", 2, [19, 18]), ("d", 1, [28])]
)
def test_the_paper_s_server_is_cut_into_modules_of_as_many_blocks(
    split: str, count: int, expected: list[int]
) -> None:
    net = build(Run(model="resnet110", split=split, server_modules=count))
    parts = slices(net.top, count)
    assert [sum(isinstance(layer, Block) for layer in part) for part in parts] == expected
    assert len(net.top_heads) == count - 1


@pytest.mark.parametrize("method", ["csl", "fsl-sage", "ampere", "ushape", "fedavg"])
def test_only_methods_that_detach_anyway_may_be_cut_again(method: str) -> None:
    with pytest.raises(ConfigError, match=f"{method} learns across each end as a whole"):
        settled(small_run(method=method, server_modules=2))
