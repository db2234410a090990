"""A part that rested is the same, bit for bit, and took no room meanwhile."""

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from common.errors import ConfigError
from common.methods import build_method
from common.methods.base import ClientPart, run_step
from common.nets.cut import build
from common.optim import sgd
from common.parts import client_part, copied, state_of
from dsl_client.rest import Rest
from tests.federation import CPU, small_run


def trained_part() -> ClientPart:
    run = small_run()
    method = build_method(run)
    part = client_part(run, method, build(run), CPU)
    step(part)
    return part


def step(part: ClientPart) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(4, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 3])
    run_step(build_method(small_run()).client_step(part, x, y), lambda _: None)


def bytes_of(part: ClientPart) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in state_of(part).values())


def test_a_part_on_disk_takes_no_memory_and_comes_back_as_it_was(tmp_path: Path) -> None:
    part = trained_part()
    other = copy.deepcopy(part)
    before, size = copied(state_of(part)), bytes_of(part)
    next(part.bottom.parameters()).detach().numpy()  # a storage that torch will not resize any more
    with Rest(tmp_path).of(part):
        assert bytes_of(part) == 0 < size
        assert (tmp_path / "resting.safetensors").stat().st_size >= size
    after = state_of(part)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not list(tmp_path.iterdir())
    step(part)
    step(other)  # which never rested
    ours, theirs = state_of(part), state_of(other)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_in_memory_only_gradients_are_dropped(tmp_path: Path) -> None:
    part = trained_part()
    size = bytes_of(part)
    assert any(p.grad is not None for p in part.bottom.parameters())
    with Rest().of(part):
        assert bytes_of(part) == size
        assert all(p.grad is None for p in part.bottom.parameters())


def test_weights_that_are_shared_rest_once_and_stay_shared(tmp_path: Path) -> None:
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.weight = first.weight
    bottom = nn.Sequential(first, second)
    part = ClientPart(bottom, None, sgd(list(bottom.parameters()), small_run()))
    with Rest(tmp_path).of(part):
        # one weight of 64 bytes and two biases of 16, each with its momentum
        assert (tmp_path / "resting.safetensors").stat().st_size < 2 * (64 + 2 * 16) + 1024
    assert first.weight.data_ptr() == second.weight.data_ptr()


@pytest.mark.parametrize("damage", [b"", b"not tensors"])
def test_a_part_that_was_damaged_is_told_of(damage: bytes, tmp_path: Path) -> None:
    part = trained_part()
    with (
        pytest.raises(ConfigError, match="a part that rested there cannot be read"),
        Rest(tmp_path).of(part),
    ):
        (tmp_path / "resting.safetensors").write_bytes(damage)


def test_another_part_in_its_place_is_told_of(tmp_path: Path) -> None:
    part, run = trained_part(), small_run(split="2")
    other = client_part(run, build_method(run), build(run), CPU)
    file = tmp_path / "resting.safetensors"
    with Rest(tmp_path).of(other):
        foreign = file.read_bytes()
    with pytest.raises(ConfigError, match="is not what was written"), Rest(tmp_path).of(part):
        file.write_bytes(foreign)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_part_of_a_gpu_rests_in_the_hosts_memory() -> None:
    run, gpu = small_run(), torch.device("cuda")
    part = client_part(run, build_method(run), build(run), gpu)
    before, held = copied(state_of(part)), torch.cuda.memory_allocated()
    with Rest().of(part):
        assert torch.cuda.memory_allocated() < held
    after = state_of(part)
    assert all(torch.equal(before[name], after[name].cpu()) for name in before)
