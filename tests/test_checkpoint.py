"""A part saved and restored: equal bits, or a refusal that changes nothing and runs nothing; states of a run
under way: written whole or not at all."""

import hashlib
import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from common import checkpoint
from common.checkpoint import Checkpoints, Saved, restore, save
from common.errors import ConfigError
from common.methods import build_method
from common.methods.base import ClientPart, ServerPart, run_step
from common.nets.cut import build
from common.parts import client_part, server_part, state_of
from tests.federation import CPU, Batches, small_run

pytestmark = pytest.mark.timeout(60)

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
    save(tmp_path, state_of(trained(fresh())), {"epoch": 3})
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
    save(tmp_path, state_of(part), {"epoch": 3, "run": {"lr": 0.1}})
    assert restore(tmp_path, other) == {"epoch": 3, "run": {"lr": 0.1}}
    assert same(part, other)
    assert any(name.startswith("momentum.") and tensor.any() for name, tensor in state_of(other).items())


def test_who_goes_on_from_a_checkpoint_trains_as_if_nothing_had_been(tmp_path: Path) -> None:
    part, other = trained(fresh()), fresh(seed=9)
    save(tmp_path, state_of(part), {})
    restore(tmp_path, other)
    assert same(trained(part, epochs=2), trained(other, epochs=2))


def test_a_part_that_was_never_trained_can_be_saved_too(tmp_path: Path) -> None:
    run = small_run()
    part = server_part(run, build_method(run), build(run), CPU)
    save(tmp_path, state_of(part), {})
    other = server_part(run, build_method(run), build(small_run(seed=4)), CPU)
    restore(tmp_path, other)
    assert same(part, other)


def test_a_later_checkpoint_replaces_the_earlier_and_nothing_else_is_left(saved: Path) -> None:
    part, other = trained(fresh(), epochs=2), fresh()
    save(saved, state_of(part), {"epoch": 4})
    assert sorted(path.name for path in saved.iterdir()) == [FACTS, TENSORS]
    assert restore(saved, other) == {"epoch": 4}
    assert same(part, other)


def test_a_folder_that_is_not_there_yet_is_made(tmp_path: Path) -> None:
    save(tmp_path / "a" / "b", state_of(fresh()), {})
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
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, saved / TENSORS)
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


# ---------------------------------------------------------------- of a run under way


def state(number: int) -> Saved:
    tensors = {"w": torch.arange(6.0).reshape(2, 3) * number, "n": torch.tensor(number), "e": torch.empty(0)}
    return Saved(number, tensors, {"number": number, "who": ["ann", None, 0.1]})


@pytest.fixture
def three(tmp_path: Path) -> tuple[Path, Checkpoints]:
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for number in (1, 2, 12):
        checkpoints.write(state(number))
    return tmp_path / "checkpoints", checkpoints


def found(checkpoints: Checkpoints) -> tuple[list[int], list[str]]:
    """Those that can be read, the newest first, and what was told of the others."""
    told: list[str] = []
    numbers = [saved.number for saved in checkpoints.newest(told.append)]
    return numbers, told


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_state_is_read_as_it_was_written(on_disk: bool, tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path / "a" / "b", on_disk)
    assert checkpoints.numbers() == []
    checkpoints.write(state(3))
    read = checkpoints.read(3)
    assert read.facts == state(3).facts
    assert read.tensors.keys() == state(3).tensors.keys()
    for name, tensor in state(3).tensors.items():
        assert read.tensors[name].dtype is tensor.dtype
        assert torch.equal(read.tensors[name], tensor)


def test_states_are_in_the_order_of_their_numbers_and_the_newest_is_found_first(three: Any) -> None:
    assert three[1].numbers() == [1, 2, 12]
    assert found(three[1]) == ([12, 2, 1], [])


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flip_a_bit(file: Path) -> None:
    raw = bytearray(file.read_bytes())
    raw[-5] ^= 1
    file.write_bytes(raw)


def remove(file: Path) -> None:
    file.unlink()


def make_empty(file: Path) -> None:
    file.write_bytes(b"")


def take_that_of_another(file: Path) -> None:
    file.write_bytes((file.parent.parent / f"{1:08}" / file.name).read_bytes())


def nest(file: Path) -> None:
    file.write_bytes(b"[" * 100_000)


DAMAGES = [cut_short, flip_a_bit, remove, make_empty, take_that_of_another, nest]


@pytest.mark.parametrize("name", [TENSORS, FACTS])
@pytest.mark.parametrize("spoil", DAMAGES, ids=lambda spoil: spoil.__name__)
def test_a_damaged_state_is_told_of_loudly_and_the_one_before_is_used(
    spoil: Any, name: str, three: Any
) -> None:
    folder, checkpoints = three
    spoil(folder / f"{12:08}" / name)
    if spoil is take_that_of_another and name == FACTS:  # whole, but not beside these tensors
        assert "its tensors are not those that were written" in found(checkpoints)[1][0]
    numbers, told = found(checkpoints)
    assert numbers == [2, 1]
    (only,) = told
    assert f"checkpoint {folder / f'{12:08}'} is damaged: " in only
    assert only.endswith("; the one before is used")
    with pytest.raises(ConfigError, match="is damaged"):
        checkpoints.read(12)


def test_where_all_are_damaged_none_is_used_and_each_is_told_of(three: Any) -> None:
    folder, checkpoints = three
    for number in (1, 2, 12):
        flip_a_bit(folder / f"{number:08}" / TENSORS)
    numbers, told = found(checkpoints)
    assert (numbers, len(told)) == ([], 3)


def test_any_bit_that_is_flipped_is_seen(tmp_path: Path) -> None:
    checkpoints, chance = Checkpoints(tmp_path), random.Random(0)
    checkpoints.write(state(1))
    for name in (TENSORS, FACTS):
        file = tmp_path / f"{1:08}" / name
        good = file.read_bytes()
        for _ in range(200):
            place, bit = chance.randrange(len(good)), chance.randrange(8)
            file.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            try:
                read = checkpoints.read(1)
            except ConfigError:
                continue
            raise AssertionError(f"bit {bit} of byte {place} of {name}: {read}")
        file.write_bytes(good)


@pytest.mark.parametrize("protocol", [0, 5])
def test_a_malicious_pickle_among_the_states_is_refused_and_nothing_of_it_runs(
    protocol: int, three: Any, tmp_path: Path
) -> None:
    folder, checkpoints = three
    trace = tmp_path / "it-ran"
    malice = pickle.dumps(_Malice(trace), protocol=protocol)
    digest = hashlib.sha256(malice).hexdigest()
    facts = json.loads((folder / f"{12:08}" / FACTS).read_text())
    (folder / f"{12:08}" / TENSORS).write_bytes(malice)
    (folder / f"{12:08}" / FACTS).write_text(json.dumps(facts | {"tensors": digest}))  # as one who knows how
    (folder / f"{2:08}" / FACTS).write_bytes(malice)
    assert found(checkpoints)[0] == [1]
    assert not trace.exists()


class _Refused:
    """A call that fails as that of a disk does, at its n-th time."""

    def __init__(self, real: Any, nth: int, error: BaseException) -> None:
        self._real, self._left, self._error = real, nth, error

    def __call__(self, *arguments: Any, **settings: Any) -> Any:
        self._left -= 1
        if self._left == 0:
            raise self._error
        return self._real(*arguments, **settings)


@pytest.mark.parametrize(
    ("what", "nth"),
    [
        ("Path.rename", 1),
        ("save_file", 1),
        ("sync", 1),
        ("sync", 2),
        ("sync", 3),
        ("sync", 4),
        ("json.dumps", 1),
        ("json.dumps", 2),
    ],
)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=str)
def test_what_cannot_be_written_leaves_nothing_and_the_ones_before_are_whole(
    what: str, nth: int, error: BaseException, three: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, checkpoints = three
    real = {
        "Path.rename": Path.rename,
        "save_file": save_file,
        "sync": checkpoint.sync,
        "json.dumps": json.dumps,
    }
    monkeypatch.setattr(f"common.checkpoint.{what}", _Refused(real[what], nth, error))
    with pytest.raises(type(error)):
        checkpoints.write(state(13))
    assert entries(folder) == [f"{number:08}" for number in (1, 2, 12)]
    assert found(checkpoints) == ([12, 2, 1], [])
    monkeypatch.undo()
    checkpoints.write(state(13))
    assert found(checkpoints)[0] == [13, 12, 2, 1]


def test_a_full_disk_is_an_oserror_also_where_safetensors_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = SafetensorError("I/O error: No space left on device (os error 28)")
    monkeypatch.setattr("common.checkpoint.save_file", _Refused(save_file, 1, full))
    with pytest.raises(OSError, match="No space left on device"):
        Checkpoints(tmp_path).write(state(1))
    assert entries(tmp_path) == []


def test_what_a_process_left_that_was_killed_while_it_wrote_is_no_state_and_is_removed(three: Any) -> None:
    folder, checkpoints = three
    for left in (".13.tmp", ".2.old"):
        (folder / left).mkdir()
        (folder / left / TENSORS).write_bytes(b"half")
    assert checkpoints.numbers() == [1, 2, 12]
    checkpoints.tidy()
    assert entries(folder) == [f"{number:08}" for number in (1, 2, 12)]
    Checkpoints(folder / "absent").tidy()


def test_what_such_a_process_left_does_not_keep_the_next_from_writing_the_same_number(three: Any) -> None:
    folder, checkpoints = three
    (folder / ".13.tmp").mkdir()
    (folder / ".13.tmp" / TENSORS).write_bytes(b"half")
    checkpoints.write(state(13))
    assert found(checkpoints) == ([13, 12, 2, 1], [])


def test_only_those_to_keep_are_kept_and_nothing_is_left_of_the_others(three: Any) -> None:
    folder, checkpoints = three
    checkpoints.drop(keep=lambda number: number > 1)
    assert entries(folder) == [f"{number:08}" for number in (2, 12)]
    (folder / f"{2:08}" / TENSORS).unlink()  # a damaged one goes, too
    checkpoints.drop(keep=lambda number: number > 2)
    assert entries(folder) == [f"{12:08}"]


def test_what_is_removed_in_part_only_is_no_state_any_more(
    three: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, checkpoints = three
    monkeypatch.setattr("common.checkpoint.shutil.rmtree", lambda *_, **__: None)
    checkpoints.drop(keep=lambda number: number > 1)
    assert checkpoints.numbers() == [2, 12]
    monkeypatch.undo()
    checkpoints.tidy()
    assert entries(folder) == [f"{number:08}" for number in (2, 12)]
