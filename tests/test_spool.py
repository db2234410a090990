"""What a client has sent is kept until no checkpoint can ask for it: in memory, or whole files on disk."""

from pathlib import Path
from typing import Any

import pytest

from common.errors import ClosedError, ConfigError, WireError
from common.wire import pieces
from common.wire.pieces import Digest
from dsl_client.spool import Spool
from tests.frames import BYTES, SAMPLES, frame, numbers, stretch_of
from tests.threads import in_thread, waits

pytestmark = pytest.mark.timeout(60)

OVER = ClosedError("the run is over because the test says so")


@pytest.fixture(params=["memory", "disk"])
def folder(request: Any, tmp_path: Path) -> Path | None:
    return tmp_path / "spool" if request.param == "disk" else None


def filled(folder: Path | None, last: int, limit: int = 10**6) -> Spool:
    spool = Spool(limit, folder)
    for sequence in range(1, last + 1):
        assert spool.append(stretch_of((sequence - 1) // 3), frame(sequence))
    return spool


def raw(spool: Spool, after: int) -> list[bytes]:
    found = spool.after(after)
    assert found is not None
    return [pieces.encode(piece) for piece in found.read()]


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- kept


def test_frames_are_found_by_the_number_before_and_read_as_often_as_they_are_asked_for(
    folder: Path | None,
) -> None:
    spool = filled(folder, 4)
    for after in range(4):
        found = spool.after(after)
        assert found is not None
        assert (found.first, found.last, found.stretch) == (after + 1, after + 1, stretch_of(after // 3))
        assert found.before == after % 3 * SAMPLES, "samples of its epoch that come before it"
        assert numbers(found.read()) == numbers(found.read()) == [after + 1]
        spool.sent(found)
        assert numbers(found.read()) == [after + 1]
    assert spool.after(4) is None
    assert [spool.waiting(after) for after in (0, 3, 4)] == [4, 1, 0]


def test_what_is_read_is_what_was_kept_with_the_digest_of_its_data(folder: Path | None) -> None:
    spool = filled(folder, 1)
    found = spool.after(0)
    assert found is not None
    spool.sent(found)
    (only,) = found.read()
    assert b"".join(only.chunks) == bytes([1]) * BYTES
    assert only.head.batch.digest == Digest(only, iter(())).value != 0


def test_a_frame_with_skipped_batches_is_one_and_is_found_from_any_of_its_numbers(
    folder: Path | None,
) -> None:
    spool = Spool(10**6, folder)
    spool.append(stretch_of(0), frame(1))
    spool.append(stretch_of(0), frame(2, 3))
    for after in (1, 2):
        found = spool.after(after)
        assert found is not None
        assert (found.first, found.last, found.before) == (2, 3, SAMPLES)
    assert spool.last == 3
    spool.trim(2)
    assert spool.after(1) is not None, "a part of it may be asked for yet"
    spool.trim(3)
    assert spool.after(1) is None


def test_what_was_kept_before_is_not_kept_again_whatever_its_bytes(folder: Path | None) -> None:
    spool = filled(folder, 2)
    before = raw(spool, 1)
    assert not spool.append(stretch_of(0), frame(2, size=5))
    assert raw(spool, 1) == before
    spool.trim(2)
    assert not spool.append(stretch_of(0), frame(2))
    assert spool.after(0) is None


def test_what_is_trimmed_is_gone_and_what_follows_stays(folder: Path | None) -> None:
    spool = filled(folder, 4)
    size = spool.size
    spool.trim(3)
    found = spool.after(0)
    assert found is not None
    assert (found.first, spool.last) == (4, 4)
    assert spool.size == size // 4
    spool.trim(4)
    assert spool.size == 0
    if folder:
        assert files(folder) == []


def test_a_full_spool_holds_up_who_sends_until_there_is_room_again(folder: Path | None) -> None:
    spool = filled(folder, 2, limit=2 * (BYTES + 100))
    late = in_thread(spool.append, stretch_of(0), frame(3))
    assert waits(late)
    assert spool.last == 2
    spool.trim(1)
    assert late.result(timeout=5) is True
    assert numbers(iter(found.read() if (found := spool.after(2)) else [])) == [3]


def test_a_frame_that_is_larger_than_the_limit_is_kept_alone(folder: Path | None) -> None:
    spool = Spool(10, folder)
    assert spool.append(stretch_of(0), frame(1))
    late = in_thread(spool.append, stretch_of(0), frame(2))
    assert waits(late)
    spool.trim(1)
    assert late.result(timeout=5) is True


def test_closing_wakes_who_waits_for_room_with_the_first_reason(folder: Path | None) -> None:
    spool = filled(folder, 1, limit=BYTES)
    late = in_thread(spool.append, stretch_of(0), frame(2))
    assert waits(late)
    spool.close(OVER)
    spool.close(ClosedError("later"))
    assert late.exception(timeout=5) is OVER


# ---------------------------------------------------------------- from one process to the next


def test_the_next_process_has_what_the_one_before_kept(tmp_path: Path) -> None:
    before = filled(tmp_path, 5)
    before.trim(1)
    after = Spool(10**6, tmp_path, last=1)
    assert (after.last, after.size) == (5, before.size)
    for sequence in range(1, 5):
        assert raw(after, sequence) == raw(before, sequence)
        one, other = after.after(sequence), before.after(sequence)
        assert one is not None
        assert other is not None
        assert (one.stretch, one.before, one.pieces) == (other.stretch, other.before, None)
    assert after.append(stretch_of(1), frame(6))
    found = after.after(5)
    assert found is not None
    assert found.before == 2 * SAMPLES, "it counts on from what the process before kept"


def test_a_process_that_has_thrown_all_away_goes_on_after_it(tmp_path: Path) -> None:
    spool = Spool(10**6, tmp_path, last=4)
    assert not spool.append(stretch_of(1), frame(4))
    assert spool.append(stretch_of(1), frame(5))


def test_a_file_that_was_being_written_when_its_process_died_is_nothing(tmp_path: Path) -> None:
    filled(tmp_path, 2)
    whole = (tmp_path / f"{2:012}").read_bytes()
    for cut in (0, 3, len(whole) // 2, len(whole)):
        (tmp_path / f".{3:012}.tmp").write_bytes(whole[:cut])
        spool = Spool(10**6, tmp_path)
        assert spool.last == 2
        assert files(tmp_path) == [f"{1:012}", f"{2:012}"]


def test_a_file_is_there_before_it_counts_as_kept_and_not_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def dies(*_: Any) -> None:
        raise KeyboardInterrupt

    spool = filled(tmp_path, 1)
    monkeypatch.setattr("dsl_client.spool.os.rename", dies)
    with pytest.raises(KeyboardInterrupt):
        spool.append(stretch_of(0), frame(2))
    assert spool.last == 1
    monkeypatch.undo()
    assert Spool(10**6, tmp_path).last == 1
    assert files(tmp_path) == [f"{1:012}"]


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff\xff\xff\xff{}", b"\x02\0\0\0{}", b"\x02\0\0\0[]"])
def test_a_file_that_is_none_of_ours_is_refused_by_its_name(content: bytes, tmp_path: Path) -> None:
    (tmp_path / f"{1:012}").write_bytes(content)
    with pytest.raises(ConfigError, match=r"000000000001: a batch that was kept cannot be read"):
        Spool(10**6, tmp_path)


def test_a_file_that_was_cut_off_anywhere_is_never_read_as_a_whole_one(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    file = tmp_path / f"{1:012}"
    whole, expected = file.read_bytes(), raw(Spool(10**6, tmp_path), 0)
    for cut in [*range(0, len(whole) - BYTES, 1), len(whole) - 2, len(whole) - 1]:
        file.write_bytes(whole[:cut])
        try:
            got = raw(Spool(10**6, tmp_path), 0)
        except (ConfigError, WireError):
            continue
        assert got == expected
        raise AssertionError(f"cut at {cut}: it was taken for whole")


def test_a_disk_without_room_is_told_and_leaves_nothing_of_the_frame_until_there_is_some(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[list[str]] = []

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    def some_room(_: float) -> None:
        left.append(files(tmp_path))
        monkeypatch.undo()

    spool = filled(tmp_path, 1)
    monkeypatch.setattr("dsl_client.spool.pieces.encode", full)
    monkeypatch.setattr("common.disk.time.sleep", some_room)
    assert spool.append(stretch_of(0), frame(2))
    assert left == [[f"{1:012}"]]
    assert files(tmp_path) == [f"{1:012}", f"{2:012}"]
