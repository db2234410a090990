"""A part saved and restored: equal bits, or a refusal that changes nothing and runs nothing."""

import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.checkpoint import restore, save
from common.errors import ConfigError
from common.methods import build_method
from common.methods.base import ClientPart, ServerPart, run_step
from common.nets.cut import build
from common.parts import client_part, server_part, state_of
from tests.federation import CPU, Batches, small_run

TENSORS, FACTS = "part.safetensors", "facts.json"


def fresh(**settings: Any) -> ClientPart:
    run = small_run(**settings)
    return client_part(run, build_method(run), build(run), CPU)


def trained(part: ClientPart, epochs: int = 1) -> ClientPart:
    method, data = build_method(small_run()), Batches(small_run(), 3, 24)
    for epoch in range(epochs):
        for x, y in data.epoch(epoch):
            run_step(method.client_step(part, x, y), lambda _: None)
    return part


def same(ours: ClientPart | ServerPart, theirs: ClientPart | ServerPart) -> bool:
    mine, other = state_of(ours), state_of(theirs)
    return list(mine) == list(other) and all(torch.equal(mine[name], other[name]) for name in mine)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(tmp_path, trained(fresh()), {"epoch": 3})
    return tmp_path


def refused(folder: Path, part: ClientPart | None = None) -> str:
    """Why the checkpoint is refused, which leaves the part as it was."""
    part = part or fresh(seed=9)
    before = {name: tensor.clone() for name, tensor in state_of(part).items()}
    with pytest.raises(ConfigError) as caught:
        restore(folder, part)
    for name, tensor in state_of(part).items():
        assert torch.equal(tensor, before[name]), name
    assert str(folder) in str(caught.value)
    return str(caught.value)


def test_what_is_restored_has_equal_bits_momentum_and_statistics_included(tmp_path: Path) -> None:
    part, other = trained(fresh()), fresh(seed=9)
    save(tmp_path, part, {"epoch": 3, "run": {"lr": 0.1}})
    assert restore(tmp_path, other) == {"epoch": 3, "run": {"lr": 0.1}}
    assert same(part, other)
    assert any(name.startswith("momentum.") and tensor.any() for name, tensor in state_of(other).items())


def test_who_goes_on_from_a_checkpoint_trains_as_if_nothing_had_been(tmp_path: Path) -> None:
    part, other = trained(fresh()), fresh(seed=9)
    save(tmp_path, part, {})
    restore(tmp_path, other)
    assert same(trained(part, epochs=2), trained(other, epochs=2))


def test_a_part_that_was_never_trained_can_be_saved_too(tmp_path: Path) -> None:
    run = small_run()
    part = server_part(run, build_method(run), build(run), CPU)
    save(tmp_path, part, {})
    other = server_part(run, build_method(run), build(small_run(seed=4)), CPU)
    restore(tmp_path, other)
    assert same(part, other)


def test_a_later_checkpoint_replaces_the_earlier_and_nothing_else_is_left(saved: Path) -> None:
    part, other = trained(fresh(), epochs=2), fresh()
    save(saved, part, {"epoch": 4})
    assert sorted(path.name for path in saved.iterdir()) == [FACTS, TENSORS]
    assert restore(saved, other) == {"epoch": 4}
    assert same(part, other)


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b", fresh(), {})
    assert (tmp_path / "a" / "b" / TENSORS).exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"split": "2"},
        {"head": "flat"},
        {"head": "conv"},
        {"classes": 5},
        {"image": (1, 8, 8)},
    ],
    ids=str,
)
def test_the_checkpoint_of_another_network_is_refused(settings: dict[str, Any], saved: Path) -> None:
    assert "is of another network, split or head than this run's" in refused(saved, fresh(**settings))


def test_the_checkpoint_of_the_other_end_is_refused(saved: Path) -> None:
    run = small_run()
    with pytest.raises(ConfigError, match="another network"):
        restore(saved, server_part(run, build_method(run), build(run), CPU))


@pytest.mark.parametrize("change", ["type", "shape", "missing", "extra"])
def test_a_checkpoint_with_one_tensor_changed_is_refused(change: str, saved: Path) -> None:
    state = {name: tensor.clone() for name, tensor in state_of(fresh()).items()}
    name = "bottom.0.0.weight"
    if change == "type":
        state[name] = state[name].half()
    elif change == "shape":
        state[name] = state[name].flatten()
    elif change == "missing":
        del state[name]
    else:
        state["bottom.more"] = torch.zeros(1)
    save_file(state, saved / TENSORS)
    assert "another network" in refused(saved)


def test_no_checkpoint_at_all_is_refused(tmp_path: Path) -> None:
    assert "cannot be read" in refused(tmp_path / "absent")


@pytest.mark.parametrize("name", [TENSORS, FACTS])
def test_half_a_checkpoint_is_refused(name: str, saved: Path) -> None:
    (saved / name).unlink()
    assert "cannot be read" in refused(saved)


def test_a_file_cut_off_anywhere_is_refused(saved: Path) -> None:
    raw = (saved / TENSORS).read_bytes()
    for length in [0, 1, 7, 8, 9, 100, 1000, len(raw) // 2, len(raw) - 1]:
        (saved / TENSORS).write_bytes(raw[:length])
        assert "cannot be read" in refused(saved)


def test_a_file_with_more_behind_it_is_refused(saved: Path) -> None:
    with (saved / TENSORS).open("ab") as file:
        file.write(b"\0")
    assert "cannot be read" in refused(saved)


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_header_is_refused_or_was_of_no_account(seed: int, saved: Path) -> None:
    dice, raw = random.Random(seed), (saved / TENSORS).read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    for _ in range(60):
        damaged = bytearray(raw)
        damaged[dice.randrange(end)] ^= 1 << dice.randrange(8)
        (saved / TENSORS).write_bytes(bytes(damaged))
        part = fresh()
        try:
            restore(saved, part)
        except ConfigError:
            continue
        assert bytes(damaged[end:]) == raw[end:]


@pytest.mark.parametrize("length", [2**62, 2**64 - 1, 2**40, 0])
def test_a_header_of_an_absurd_length_is_refused(length: int, saved: Path) -> None:
    raw = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(length.to_bytes(8, "little") + raw[8:])
    assert "cannot be read" in refused(saved)


@pytest.mark.parametrize("facts", [b"", b"{", b"\xff\xfe{}", b"[" * 100_000])
def test_facts_that_are_no_json_are_refused(facts: bytes, saved: Path) -> None:
    (saved / FACTS).write_bytes(facts)
    assert "cannot be read" in refused(saved)


class _Malice:
    def __init__(self, trace: Path) -> None:
        self._trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._trace,)


@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_malicious_pickle_is_refused_and_nothing_of_it_runs(protocol: int, saved: Path) -> None:
    trace = saved / "it-ran"
    malice = pickle.dumps(_Malice(trace), protocol=protocol)
    for name in (TENSORS, FACTS):
        good = (saved / name).read_bytes()
        (saved / name).write_bytes(malice)
        assert "cannot be read" in refused(saved)
        (saved / name).write_bytes(good)
    assert not trace.exists()


def test_a_file_of_torch_save_is_refused(saved: Path) -> None:
    torch.save(state_of(fresh()), saved / TENSORS)
    assert "cannot be read" in refused(saved)
