"""Weights that lie divided over places come to what whole ones come to; with real processes, by gloo."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.errors import NonFiniteError
from common.methods import build_method
from common.methods.base import Received, ServerPart
from common.methods.divided import Divided
from common.methods.hosting import Hosting
from common.optim import sgd
from common.parts import copied, server_part, state_of
from common.run import Run
from tests.federation import CPU
from tests.plain import network, plain_run
from tests.ranks import Meeting, Spawn, all_end_well, loaded, spawning

pytestmark = pytest.mark.timeout(240)
PLACES = 2
TICKS: list[list[list[int]]] = [[[8, 3], [5]], [[], [8]], [[8], []], [[4], [2, 2, 8]]]  # samples, by place


class Opaque(nn.Module):
    """A top whose layers nobody sees from without."""

    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, z: Tensor) -> Tensor:
        out: Tensor = self.layers(z)
        return out


def batch(seed: int, samples: int) -> Received:
    g = torch.Generator().manual_seed(seed)
    z, y = torch.randn(samples, 4, 4, 4, generator=g), torch.randint(0, 4, (samples,), generator=g)
    return Received(z, y, client=0, progress=0.25)


def ticks() -> Iterator[list[list[Received]]]:
    """The batches of each place."""
    seeds = iter(range(100))
    for tick in TICKS:
        yield [[batch(next(seeds), samples) for samples in place] for place in tick]


def hosting_of(run: Run, opaque: bool) -> Hosting:
    method = build_method(run)
    part = server_part(run, method, network(norm=True), CPU)
    if opaque:
        top = Opaque(part.top)
        part = ServerPart(top, sgd(top.parameters(), run), part.generator, loss=part.loss)
    return Hosting(run, method, part)


def told(hosting: Hosting, here: Sequence[Received], all_: Sequence[Received], summed: Any, most: int) -> Any:
    """What a step answers the batches that lie here."""
    fresh = [replace(each, z=each.z.clone()) for each in here]
    answers = hosting.joint_step(fresh, sum(len(each.z) for each in all_), 0.25, summed, most)
    return [[answer.loss, *answer.gradients] for answer in answers]


def divided(meeting: Meeting, folder: str) -> None:
    """By each process: the same steps, of whole weights by itself, and of divided ones with the others."""
    ranks = meeting.ranks("divided", PLACES)
    facts: dict[str, Any] = {}
    for opaque in (False, True):
        run = plain_run(method="csl", momentum=0.9, weight_decay=5e-4, on_nonfinite="halt")
        whole, ours = hosting_of(run, opaque), hosting_of(run, opaque)
        # What was learned before it was divided is not forgotten.
        for hosting in (whole, ours):
            told(hosting, [batch(500, 8)], [batch(500, 8)], lambda _: None, 1)
        (part,) = ours.parts
        total = sum(weight.numel() for weight in part.top.parameters())
        ours.divide(Divided(part, ranks.mesh(), batch(0, 2)), ranks.sum)
        slices = [weight for weight in part.top.parameters() if isinstance(weight, DTensor)]
        facts[f"{opaque} share"] = sum(weight.to_local().numel() for weight in slices) / total
        gaps = []
        for tick in ticks():
            everything = [each for place in tick for each in place]
            expected = told(whole, everything, everything, lambda _: None, len(everything))
            mine = slice(sum(map(len, tick[: ranks.rank])), sum(map(len, tick[: ranks.rank + 1])))
            got = told(ours, tick[ranks.rank], everything, ranks.sum, max(map(len, tick)))
            for one, other in zip(got, expected[mine], strict=True):
                gaps += [(a - b).abs().max().item() for a, b in zip(one, other, strict=True)]
        facts[f"{opaque} gap"] = max(gaps)

        ours.put_together(wanted=True)
        before = dict(ours.state_of(part))
        bad = batch(900, 4)
        bad.z[0, 0, 0, 0] = float("inf") if ranks.rank == 1 else bad.z[0, 0, 0, 0]
        try:
            told(ours, [bad], [bad, bad], ranks.sum, 1)
        except NonFiniteError as error:
            facts[f"{opaque} refused"] = str(error)
        ours.put_together(wanted=True)
        facts[f"{opaque} unchanged"] = all(
            torch.equal(tensor, before[name]) for name, tensor in ours.state_of(part).items()
        )
        if ranks.first:
            outputs = [ours.output(batch(700, 6).z)]
        else:
            ours.accompany()
            outputs = []
        for output in outputs:
            facts[f"{opaque} output gap"] = (output - whole.output(batch(700, 6).z)).abs().max().item()
        save_file(copied(state_of(whole.parts[0])), Path(folder) / f"whole {opaque} {ranks.rank}")
        save_file(ours.state_of(part), Path(folder) / f"divided {opaque} {ranks.rank}")
    (Path(folder) / f"facts {ranks.rank}").write_text(json.dumps(facts))
    ranks.end()


@pytest.fixture(scope="module")
def spawn() -> Iterator[Spawn]:
    with spawning() as start:
        yield start


@pytest.fixture(scope="module")
def folder(spawn: Spawn, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("divided")
    all_end_well(spawn(PLACES, "tests.test_divided", "divided", folder))
    return folder


def facts_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads((folder / f"facts {rank}").read_text()) for rank in range(PLACES)]


@pytest.mark.parametrize("opaque", [False, True])
@pytest.mark.parametrize("rank", range(PLACES))
def test_steps_of_divided_weights_are_those_of_whole_ones(folder: Path, opaque: bool, rank: int) -> None:
    """Weights, statistics and momentum; also where a place has fewer batches than another, or none."""
    whole, ours = (loaded(folder / f"{which} {opaque} {rank}") for which in ("whole", "divided"))
    assert any(name.startswith("momentum.") for name in whole)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)
    assert facts_of(folder)[rank][f"{opaque} gap"] < 1e-6, "losses, and gradients at the cut"


@pytest.mark.parametrize("opaque", [False, True])
def test_each_place_has_its_slices_only(folder: Path, opaque: bool) -> None:
    shares = [facts[f"{opaque} share"] for facts in facts_of(folder)]
    assert sum(shares) == 1
    assert max(shares) < 0.6


@pytest.mark.parametrize("opaque", [False, True])
def test_what_is_not_finite_at_one_place_is_refused_by_all_and_leaves_nothing(
    folder: Path, opaque: bool
) -> None:
    for facts in facts_of(folder):
        assert "not finite" in facts[f"{opaque} refused"]
        assert facts[f"{opaque} unchanged"]


@pytest.mark.parametrize("opaque", [False, True])
def test_one_place_scores_while_the_others_go_along(folder: Path, opaque: bool) -> None:
    first, _ = facts_of(folder)
    assert first[f"{opaque} output gap"] < 1e-6
