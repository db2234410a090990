"""A step that many batches make together is one step, wherever they lie; against a loop in plain torch."""

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import NonFiniteError
from common.methods import build_method
from common.methods.base import Received
from common.methods.hosting import Hosting
from common.parts import server_part, state_of
from common.run import Run
from tests.federation import CPU
from tests.plain import network, plain_run

SAMPLES = (8, 3, 5, 8)


def batches(samples: Sequence[int] = SAMPLES) -> list[Received]:
    g = torch.Generator().manual_seed(5)
    return [
        Received(torch.randn(n, 4, 4, 4, generator=g), torch.randint(0, 4, (n,), generator=g), client, 0.25)
        for client, n in enumerate(samples)
    ]


def hosting(run: Run) -> Hosting:
    return Hosting(run, build_method(run), server_part(run, build_method(run), network(norm=True), CPU))


class Places:
    """Sums tensors over threads, each of which is a place."""

    def __init__(self, places: int) -> None:
        self._met, self._given = threading.Barrier(places, timeout=20), dict[int, Tensor]()

    def summed(self, place: int, tensor: Tensor) -> None:
        self._given[place] = tensor.clone()
        self._met.wait()
        total = torch.stack([self._given[each] for each in sorted(self._given)]).sum(0)
        self._met.wait()
        tensor.copy_(total)


def stepped(run: Run, ticks: Sequence[Sequence[Sequence[Received]]]) -> list[Hosting]:
    """The hostings of all places after these ticks: of each the batches by place."""
    places = len(ticks[0])
    met, hosts, errors = Places(places), [hosting(run) for _ in range(places)], list[Exception]()

    def work(place: int) -> None:
        for tick in ticks:
            everywhere = [batch for group in tick for batch in group]
            samples = sum(len(batch.z) for batch in everywhere)
            mine = [replace(batch, z=batch.z.clone()) for batch in tick[place]]
            try:
                hosts[place].joint_step(mine, samples, 0.25, lambda tensor: met.summed(place, tensor))
            except NonFiniteError as error:
                errors.append(error)

    threads = [threading.Thread(target=work, args=[place]) for place in range(places)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        assert len(errors) == places
        raise errors[0]
    return hosts


def plain(run: Run, ticks: int) -> dict[str, Tensor]:
    """The same by hand: the mean of the batches' gradients and of their statistics, by samples."""
    top = network(norm=True).top
    weights, velocity = list(top.parameters()), [torch.zeros_like(p) for p in top.parameters()]
    for _ in range(ticks):
        before = {name: buffer.clone() for name, buffer in top.named_buffers()}
        gradients, after = [torch.zeros_like(p) for p in weights], dict.fromkeys(before, torch.zeros(()))
        for batch in batches():
            share = len(batch.z) / sum(SAMPLES)
            loss = F.cross_entropy(top(batch.z), batch.y)
            for total, gradient in zip(gradients, torch.autograd.grad(loss, weights), strict=True):
                total += share * gradient
            for name, buffer in top.named_buffers():
                after[name] = after[name] + share * buffer
                buffer.copy_(before[name])
        for name, buffer in top.named_buffers():
            buffer.copy_(after[name] if buffer.is_floating_point() else before[name] + 1)
        with torch.no_grad():
            for weight, v, gradient in zip(weights, velocity, gradients, strict=True):
                v.mul_(run.momentum).add_(gradient + run.weight_decay * weight)
                weight -= run.lr * v
    return {f"top.{name}": tensor for name, tensor in top.state_dict().items()}


DEALT = {
    "at one place": [[0, 1, 2, 3]],
    "at two": [[0, 2], [1, 3]],
    "at three, one of which has none": [[0, 1, 2], [], [3]],
    "in another order": [[3, 0], [2, 1]],
}


@pytest.mark.parametrize("dealt", DEALT.values(), ids=DEALT)
def test_it_does_not_matter_which_batch_lies_where(dealt: list[list[int]]) -> None:
    run = plain_run("dsl", clients=4)
    tick = [[batches()[index] for index in place] for place in dealt]
    by_hand = plain(run, ticks=3)
    for host in stepped(run, [tick] * 3):
        ours = state_of(host.parts[0], momentum=False)
        torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-6)


def test_all_places_have_the_same_bits() -> None:
    tick = [batches()[:1], batches()[1:3], batches()[3:]]
    one, *others = [state_of(host.parts[0]) for host in stepped(plain_run("dsl"), [tick] * 2)]
    for other in others:
        assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_batch_alone_makes_the_step_that_it_always_makes() -> None:
    run = plain_run("csl")
    (batch, *_), alone, joint = batches(), hosting(run), hosting(run)
    for _ in range(3):
        theirs = alone.step([replace(batch, z=batch.z.clone())])
        (ours,) = joint.joint_step([replace(batch, z=batch.z.clone())], len(batch.z), 0.25, lambda _: None)
        assert ours.loss == theirs.loss
        assert torch.equal(ours.gradients[0], theirs.gradients[0])  # type: ignore[arg-type]
    theirs_state = state_of(alone.parts[0])
    for name, tensor in state_of(joint.parts[0]).items():
        assert torch.equal(tensor, theirs_state[name]), name


@pytest.mark.parametrize("policy", ["halt", "skip"])
def test_what_is_not_finite_at_one_place_leaves_no_trace_at_any(policy: str) -> None:
    run = plain_run("dsl", on_nonfinite=policy)
    whole, other = batches()[:2]
    broken = replace(other, z=torch.full_like(other.z, 1e30))
    before = {name: tensor.clone() for name, tensor in state_of(hosting(run).parts[0]).items()}
    if policy == "halt":
        with pytest.raises(NonFiniteError, match="--on-nonfinite skip"):
            stepped(run, [[[whole], [broken]]])
        return
    for host in stepped(run, [[[whole], [broken]]]):
        assert host.skipped == 1
        assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(host.parts[0]).items())


def test_the_mean_over_places_is_that_of_weights_statistics_and_momentum() -> None:
    run, met = plain_run("dsl"), Places(2)
    hosts = [hosting(run), hosting(run)]
    for host, batch in zip(hosts, batches(), strict=False):
        host.step([batch])
    states = [{name: t.clone() for name, t in state_of(host.parts[0]).items()} for host in hosts]
    shares = (8 / 11, 3 / 11)

    def work(place: int) -> None:
        hosts[place].mean_over_places(shares[place], lambda tensor: met.summed(place, tensor))

    threads = [threading.Thread(target=work, args=[place]) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, tensor in state_of(hosts[0].parts[0]).items():
        mean = shares[0] * states[0][name] + shares[1] * states[1][name]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, mean, rtol=0, atol=1e-6)
        assert torch.equal(tensor, state_of(hosts[1].parts[0])[name])
