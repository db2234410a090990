"""Several processes that are one server, its ranks: what goes from one to the others.

Started by torchrun, and joined by torch.distributed: gloo between CPUs, nccl between GPUs. Knows tensors and
bytes; knows no clients, no wire, no files.

Two ways lead from one rank to another. Collectives are made by the trainers' threads, in step, each as often
as every other. The board is read and written by any thread at any time: a few short notes by name, kept by
torchrun's own store, which outlives a rank."""

import json
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, fields
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from common.errors import ClosedError, ConfigError, LostRankError, StaleError

MEETING_S = 600.0  # for the ranks to start: one may have to fetch its image first
GRACE_S = 3.0  # for the others to say that they live, when one is lost


@dataclass(frozen=True)
class Header:
    """What a rank says of itself before each step. Numbers all, so that it travels in one collective."""

    batches: float = 0.0  # that it would step on
    samples: float = 0.0  # in these
    progress: float = 0.0  # of these, each with the fraction of the run before it: their sum
    ready: float = 0.0  # in fixed order: it has one batch of each of its clients, or stands, or has ended
    at_round_end: float = 0.0
    at_save: float = 0.0  # it has stopped for a checkpoint
    in_step: float = 0.0  # its clients can come back to where they are
    ended: float = 0.0  # its clients have all left
    wants_save: float = 0.0
    save_now: float = 0.0  # of the first rank: all are to stop for a checkpoint
    errands: float = 0.0  # of a divided part, which all ranks go along with
    wants_mean: float = 0.0  # in local steps: it must not go on before the ranks' weights are one
    part_samples: float = 0.0  # behind its clients' parts, once all have given theirs for an average
    parts_ready: float = 0.0  # no client of its own is still to give its part
    counted: float = 0.0  # samples that it has learned from since its last header,
    scored: float = 0.0  # of these, those whose loss it knows,
    loss: float = 0.0  # the sum of their losses,
    skipped: float = 0.0  # steps left out
    news: float = 0.0  # bytes that it has to tell
    failed: float = 0.0  # it ends, and has said why


class Headers:
    """Those of all ranks, of one exchange, as they are added up."""

    def __init__(self, rows: Tensor) -> None:
        self._rows = rows.tolist()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, rank: int) -> Header:
        return Header(*self._rows[rank])

    def total(self, name: str) -> float:
        """The sum over the ranks, in their order: the same bits at each."""
        column = _COLUMNS[name]
        return float(sum(row[column] for row in self._rows))

    def most(self, name: str) -> int:
        return int(max(row[_COLUMNS[name]] for row in self._rows))

    def any(self, name: str) -> bool:
        return any(row[_COLUMNS[name]] for row in self._rows)

    def all(self, *names: str) -> bool:
        """Whether of every rank at least one of these is so."""
        return all(any(row[_COLUMNS[name]] for name in names) for row in self._rows)


_COLUMNS = {field.name: index for index, field in enumerate(fields(Header))}


class Ranks:
    """store: torch's, where the ranks have met. timeout: seconds that one may keep the others waiting.

    After an error of any of its methods nothing more comes of it.
    """

    def __init__(self, store: Store, rank: int, size: int, device: torch.device, timeout: float) -> None:
        self.rank, self.size = rank, size
        self.tick = 0  # exchanges so far
        self.common = ""  # a word that all ranks drew together, and that no others have
        self.device = device
        self.in_doubt = False  # a collective has failed, and who is lost is being found out
        self._said = self._over = False
        self._lock = threading.Lock()
        if device.type == "cuda":
            torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        met = PrefixStore("collectives", store)
        try:
            dist.init_process_group(
                backend, store=met, rank=rank, world_size=size, timeout=timedelta(seconds=timeout)
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"rank {rank} of {size} cannot join the others: {_line(error)}") from error
        self.common = self.from_first(secrets.token_bytes(8) if self.first else None).hex()
        self._board = PrefixStore(f"board/{self.common}", store)

    @classmethod
    def met(cls, device: torch.device, timeout: float) -> "Ranks":
        """As torchrun's environment says. Raises ConfigError where the others do not come."""
        try:
            store, rank, size = next(rendezvous("env://", timeout=timedelta(seconds=MEETING_S)))
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"the ranks cannot meet at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}: "
                f"{_line(error)}; start the server by torchrun"
            ) from error
        return cls(afresh(store, rank, size, MEETING_S), rank, size, device, timeout)

    @property
    def first(self) -> bool:
        return self.rank == 0

    def mesh(self) -> DeviceMesh:
        """The ranks in a row, for weights that lie divided over them."""
        return init_device_mesh(self.device.type, (self.size,))

    # ------------------------------------------------------------ in step with the others

    def exchange(self, header: Header) -> Headers:
        """Everyone's. Raises why there are no others any more, as everything of this section does."""
        self.tick += 1
        row = torch.tensor(astuple(header), dtype=torch.float64)
        rows = torch.empty(self.size * len(row), dtype=torch.float64)
        self._collective(lambda: dist.all_gather_into_tensor(rows, row))
        return Headers(rows.view(self.size, -1))

    def sum(self, tensor: Tensor) -> None:
        """In place: the sum over the ranks, the same bits at each."""
        self._collective(lambda: dist.all_reduce(tensor))

    def largest(self, tensor: Tensor) -> None:
        """In place: the maximum over the ranks."""
        self._collective(lambda: dist.all_reduce(tensor, dist.ReduceOp.MAX))

    def from_each(self, told: bytes) -> list[bytes]:
        """What each tells all, by rank."""
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(told)
        self.sum(sizes)
        longest = max(1, int(sizes.max()))
        mine, all_ = (
            torch.zeros(longest, dtype=torch.uint8),
            torch.empty(self.size * longest, dtype=torch.uint8),
        )
        mine[: len(told)] = _tensor(told)
        self._collective(lambda: dist.all_gather_into_tensor(all_, mine))
        rows = zip(all_.view(self.size, -1), sizes.tolist(), strict=True)
        return [row[:size].numpy().tobytes() for row, size in rows]

    def to_first(self, told: bytes) -> list[bytes]:
        """What each tells the first, by rank; at the others nothing."""
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(told)
        self.sum(sizes)
        if not self.first:
            self._collective(lambda: dist.send(_tensor(told), 0))
            return []
        gathered = [told]
        for rank, size in enumerate(sizes.tolist()[1:], start=1):
            incoming = torch.empty(size, dtype=torch.uint8)
            self._collective(lambda to=incoming, source=rank: dist.recv(to, source))  # type: ignore[misc]
            gathered.append(incoming.numpy().tobytes())
        return gathered

    def from_first(self, told: bytes | None) -> bytes:
        """What the first tells all."""
        size = torch.tensor([len(told or b"")])
        self._collective(lambda: dist.broadcast(size, 0))
        content = _tensor(told) if told else torch.empty(int(size), dtype=torch.uint8)
        if size:
            self._collective(lambda: dist.broadcast(content, 0))
        return told if told is not None else content.numpy().tobytes()

    # ------------------------------------------------------------ the board

    def note(self, name: str, text: str) -> None:
        """Raises LostRankError, as everything of this section, where the board is gone."""
        with _board():
            self._board.set(name, text)

    def noted(self, name: str) -> str | None:
        with _board():
            return self._board.get(name).decode() if self._board.check([name]) else None

    def note_first(self, name: str, text: str) -> str:
        """Notes it if nothing is; what is noted then, of whichever rank it is."""
        with _board():
            return bytes(self._board.compare_set(name, "", text)).decode()

    # ------------------------------------------------------------ the end

    def fail(self, reason: Exception) -> None:
        """Tells the others why this rank ends before them, and is theirs no more."""
        self.say(reason)
        self.close()

    def say(self, reason: Exception) -> None:
        """Why this rank is about to end, for the others to read. The first reason stands."""
        with self._lock:
            if self._said or self._over:
                return
            self._said = True
        stale = isinstance(reason, StaleError)
        with suppress(LostRankError):
            self.note(f"failed/{self.rank}", json.dumps({"stale": stale, "text": str(reason)}))

    def said(self) -> ClosedError | None:
        """Why another rank has ended, if one has said so."""
        for rank in range(self.size):
            told = self.noted(f"failed/{rank}") if rank != self.rank else None
            if told is not None:
                reason: Mapping[str, object] = json.loads(told)
                kind, text = StaleError if reason["stale"] else ClosedError, str(reason["text"])
                return kind(text if text.startswith("rank ") else f"rank {rank} ended the run: {text}")
        return None

    def end(self) -> None:
        """Once all have come to their end: `close`, when none of them still reads what this one has sent."""
        self.note(f"ended/{self.rank}", "")
        # They may take longer; and the first rank may have the board, and be gone with it.
        with suppress(LostRankError), _board():
            self._board.wait([f"ended/{rank}" for rank in range(self.size)], timedelta(seconds=GRACE_S))
        self.close()

    def close(self) -> None:
        """From now on there are no others."""
        with self._lock:
            if self._over:
                return
            self._over = True
        dist.destroy_process_group()

    def _collective(self, made: Callable[[], object]) -> None:
        if self._over:
            raise LostRankError(f"rank {self.rank} has left the others")
        try:
            made()
        except RuntimeError as error:
            raise self._why(error) from None

    @contextmanager
    def together(self) -> Iterator[None]:
        """For what makes collectives by itself, as FSDP does."""
        try:
            yield
        except RuntimeError as error:
            # gloo raises nothing of its own, but names its source.
            if isinstance(error, dist.DistError) or "gloo/" in str(error):
                raise self._why(error) from None
            raise

    def _why(self, error: RuntimeError) -> ClosedError:
        """What has become of the others: their own reason, or who of them is silent."""
        self.in_doubt = True
        self.note(f"alive/{self.rank}", "")
        self.close()  # so that those who wait for this one learn of it, and say that they live
        others = [rank for rank in range(self.size) if rank != self.rank]
        end = time.monotonic() + GRACE_S
        while True:
            if reason := self.said():
                return reason
            silent = [rank for rank in others if self.noted(f"alive/{rank}") is None]
            if not silent or time.monotonic() >= end:
                break
            time.sleep(0.05)
        who = f"rank {', '.join(map(str, silent))} was" if silent else "the connection of the ranks was"
        return LostRankError(f"{who} lost in tick {self.tick}: {_line(error)}")


def afresh(store: Store, rank: int, size: int, timeout: float) -> Store:
    """A part of the store in which nothing stands yet, the same for all who meet now.

    torchrun's store may outlive a server, and the next one's ranks would take the last one's words for each
    other's: its addresses, for instance. So the first rank draws a word; each of the others answers with it
    and a word of its own; and it is settled once the first has heard all of these. Raises ConfigError where
    they do not all come."""
    own, end = secrets.token_hex(8), time.monotonic() + timeout
    if rank == 0:
        store.set("drawn", own)
    while time.monotonic() < end:
        if rank == 0:
            answers = [_word(store, f"answer/{other}").split() for other in range(1, size)]
            if all(answer[:1] == [own] for answer in answers):
                store.set("settled", " ".join([own, *(word for _, word in answers)]))
                return PrefixStore(own, store)
        else:
            store.set(f"answer/{rank}", f"{_word(store, 'drawn')} {own}")
            settled = _word(store, "settled").split()
            if own in settled:
                return PrefixStore(settled[0], store)
        time.sleep(0.05)
    raise ConfigError(f"rank {rank}: the {size} ranks did not all come within {timeout:g} s")


def _word(store: Store, name: str) -> str:
    return store.get(name).decode() if store.check([name]) else "-"


@contextmanager
def _board() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise LostRankError(f"the store of torchrun, where the ranks meet, is gone: {_line(error)}") from None


def _tensor(content: bytes) -> Tensor:
    return (
        torch.frombuffer(bytearray(content), dtype=torch.uint8)
        if content
        else torch.empty(0, dtype=torch.uint8)
    )


def _line(error: Exception) -> str:
    """The first sentence of what torch says, without where in its source it says so."""
    text = str(error).partition("\n")[0]
    return text[text.find("] ") + 2 :][:160] if text.startswith("[") else text[:160]
