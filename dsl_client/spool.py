"""What a client has sent, or is about to send, and the server might still forget: kept until it cannot.

A client that is answered nothing cannot make old activations again, for its weights have moved on. So each
frame is kept, in memory or as a file, until every checkpoint that the server keeps has learned of it. A file
appears by one rename: one that is there is whole, and its number is never given to other bytes.
"""

import json
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from common.disk import until_written
from common.errors import ConfigError, SplitLearningError, WireError
from common.wire import pieces
from common.wire import split_learning_pb2 as pb
from common.wire.codec import sealed
from common.wire.pieces import Piece
from dsl_client.stream import Stretch

_LENGTH = struct.Struct("<I")


@dataclass
class Frame:
    """Consecutive batches that travel together: all skipped but for the last one, or all.

    before: samples of its stretch that come before it. pieces: none where it lies in a file only.
    """

    stretch: Stretch
    first: int
    last: int
    before: int
    size: int
    pieces: list[Piece[Any]] | None
    file: Path | None = None

    def read(self) -> Iterator[Piece[Any]]:
        """Its messages. Raises WireError where its file has been damaged."""
        if self.pieces is not None or self.file is None:
            yield from self.pieces or []
            return
        _, *whole = _parts(self.file.read_bytes())
        if sum(map(len, whole)) != self.size:
            raise WireError(f"{self.file} has been cut off")
        for part in whole:
            yield pieces.decode(pb.StreamActivationsRequest, part)


class Spool:
    """limit: bytes that are kept at most. folder: where, if not in memory. last: the number up to which
    batches have been kept before, be they gone again. on_trouble: told why the disk will not have one.

    Raises ConfigError where the folder holds what cannot be read.
    """

    def __init__(
        self,
        limit: int,
        folder: Path | None = None,
        last: int = 0,
        on_trouble: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._limit, self._folder, self._on_trouble = limit, folder, on_trouble
        self._frames: deque[Frame] = deque()
        self._closed: SplitLearningError | None = None
        self._changed = threading.Condition()
        self.size = 0
        self.last = last  # the number that was kept last
        self._samples = 0  # of its stretch, up to there
        if folder is not None:
            self._read(folder)

    def append(self, stretch: Stretch, frame: Iterable[Piece[Any]]) -> bool:
        """Keeps a frame; False where its batches have been kept before. Waits while there is no room,
        or the disk has none; raises why it is closed."""
        whole = sealed(frame)
        first, last, samples = _contents(whole)
        size = sum(map(pieces.serialized_size, whole))
        if last <= self.last:
            return False  # the process before kept them, and those bytes count
        before = self._samples_before(stretch, first)
        kept = Frame(stretch, first, last, before, size, whole)
        if self._folder is not None:
            write = partial(self._write, self._folder, kept, samples)
            until_written(write, told_of(self._folder, self._on_trouble))
        with self._changed:
            self._changed.wait_for(lambda: self._closed or not self.size or self.size + size <= self._limit)
            if self._closed:
                raise self._closed
            self._frames.append(kept)
            self.size += size
            self.last = last
            self._samples = samples + before
            self._changed.notify_all()
        return True

    def after(self, sequence: int) -> Frame | None:
        """The frame that holds the batch after this one, if it is there yet."""
        with self._changed:
            return next((frame for frame in self._frames if frame.last > sequence), None)

    def waiting(self, sequence: int) -> int:
        """How many frames hold batches after this one."""
        with self._changed:
            return sum(frame.last > sequence for frame in self._frames)

    def trim(self, sequence: int) -> None:
        """The batches up to this one need not be kept."""
        with self._changed:
            while self._frames and self._frames[0].last <= sequence:
                gone = self._frames.popleft()
                self.size -= gone.size
                if gone.file:
                    gone.file.unlink(missing_ok=True)
            self._changed.notify_all()

    def check_made(self, sequence: int) -> None:
        """Raises WireError for the number of a batch that was never kept, and so is still to be made."""
        if sequence > self.last:
            raise WireError(
                f"the server says that it has batch {sequence} of this client, which has made {self.last}: "
                "has an older copy of --state been put back?"
            )

    def sent(self, frame: Frame) -> None:
        """It need not stay in memory, if it is on disk."""
        if frame.file is not None:
            frame.pieces = None

    def close(self, reason: SplitLearningError) -> None:
        with self._changed:
            self._closed = self._closed or reason
            self._changed.notify_all()

    def _samples_before(self, stretch: Stretch, first: int) -> int:
        return 0 if first == stretch.first_sequence else self._samples

    def _write(self, folder: Path, frame: Frame, samples: int) -> None:
        path = folder / f"{frame.first:012}"
        head = {
            "stretch": asdict(frame.stretch),
            "first": frame.first,
            "last": frame.last,
            "before": frame.before,
            "size": frame.size,
            "samples": samples,
        }
        assert frame.pieces is not None, "it has just been made"
        unfinished = folder / f".{path.name}.tmp"
        try:
            with unfinished.open("wb") as file:
                for part in (json.dumps(head).encode(), *map(pieces.encode, frame.pieces)):
                    file.write(_LENGTH.pack(len(part)))
                    file.write(part)
            os.rename(unfinished, path)
        except OSError:
            unfinished.unlink(missing_ok=True)  # the room is needed: to note what may be thrown away
            raise
        frame.file = path

    def _read(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.iterdir()):
            if path.name.startswith("."):
                path.unlink()  # its process was killed while it wrote: nobody has seen it
                continue
            try:
                head = json.loads(next(_parts(path.read_bytes()), b""))
                samples = head.pop("samples")
                stretch = Stretch(**head.pop("stretch"))
                frame = Frame(stretch, **head, pieces=None, file=path)
            except (ValueError, KeyError, TypeError, AttributeError, WireError) as error:
                raise ConfigError(f"{path}: a batch that was kept cannot be read: {error}") from error
            self._frames.append(frame)
            self.size += frame.size
            self.last, self._samples = frame.last, frame.before + samples


def told_of(where: Path, on_trouble: Callable[[str], None]) -> Callable[[str | None], None]:
    """Says where something cannot be written, or can be again."""

    def tell(trouble: str | None) -> None:
        on_trouble(f"{where} cannot be written: {trouble}" if trouble else f"{where} can be written again")

    return tell


def _contents(frame: list[Piece[Any]]) -> tuple[int, int, int]:
    """The first number, the last one, and the samples."""
    sequences, samples = [], 0
    for piece in frame:
        kind = piece.head.WhichOneof("head")
        if kind == "batch":
            sequences.append(piece.head.batch.sequence)
            samples += piece.head.batch.activations.shape[0]
        elif kind == "skipped":
            sequences.append(piece.head.skipped.sequence)
            samples += piece.head.skipped.samples
    return sequences[0], sequences[-1], samples


def _parts(raw: bytes) -> Iterator[bytes]:
    """What a file holds: its head, and its messages. Raises WireError where it ends too soon."""
    place = 0
    while place < len(raw):
        start = place + _LENGTH.size
        place = start + (_LENGTH.unpack_from(raw, place)[0] if start <= len(raw) else 0)
        if place > len(raw):
            raise WireError("the file has been cut off")
        yield raw[start:place]
