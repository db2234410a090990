"""What a server keeps of what it received, to learn from it again: among the least used, the newest first.

The order is that of E. Belilovsky et al., "Decoupled Greedy Learning of CNNs", ICML 2020,
https://arxiv.org/abs/1901.08164, algorithm 2, which lets a module go on while the one before it is late.
Batches are kept as they travelled, so that a codec saves memory as it saves traffic.
"""

import heapq
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from common.codecs import Encoded, Parcel, parse
from common.methods.base import Received


@dataclass(frozen=True)
class Kept:
    """A batch on the shelf: all of it but its activations, and those closed. size: in bytes."""

    batch: Received
    parcel: Callable[[], Parcel]
    size: int


class Shelf:
    """Where parcels lie. This one has them in memory."""

    def put(self, number: int, parcel: Parcel) -> Callable[[], Parcel]:
        """Gives what gets it back."""
        return lambda: parcel

    def drop(self, number: int) -> None:
        pass


class Replay:
    """limit: bytes of all that is kept. reuse: how often a batch is learned from at most, from 2 on.

    A batch that has been used so often, or for which there is no room, goes: the most used first, then
    the oldest.
    """

    def __init__(self, limit: int, reuse: int, shelf: Shelf | None = None) -> None:
        self._limit, self._reuse, self._shelf = limit, reuse, shelf or Shelf()
        self._kept: dict[int, Kept] = {}  # by the order in which they came
        self._queue: list[tuple[int, int]] = []  # a heap of (uses, -number)
        self._came = 0
        self.size = 0

    @property
    def left(self) -> int:
        """How many uses of what is kept are left."""
        return sum(self._reuse - uses for uses, _ in self._queue)

    def __bool__(self) -> bool:
        return bool(self._queue)

    def keep(self, batch: Received) -> None:
        """Of a batch that has just been learned from once."""
        assert batch.parcel is not None, "who received it has what it came as"
        size = batch.parcel.size + batch.y.numel() * batch.y.itemsize
        if size > self._limit:
            return
        while self.size + size > self._limit:
            self._drop(max(self._queue, key=lambda entry: (entry[0], entry[1])))
        self._came += 1
        nothing = batch.z.new_empty(0)  # a slice would keep all of its activations in memory
        closed = Received(nothing, batch.y, batch.client, batch.progress, batch.wanted)
        self._kept[self._came] = Kept(closed, self._shelf.put(self._came, batch.parcel), size)
        self.size += size
        heapq.heappush(self._queue, (1, -self._came))

    def take(self) -> Received:
        """The one to learn from next, opened; that counts as a use of it."""
        uses, place = heapq.heappop(self._queue)
        kept = self._kept[-place]
        parcel = kept.parcel()
        if uses + 1 < self._reuse:
            heapq.heappush(self._queue, (uses + 1, place))
        else:
            self._forget(-place)
        z: Tensor = parcel.open()
        return replace(kept.batch, z=z.to(kept.batch.z.device))

    def state(self) -> dict[str, Tensor]:
        """All that is kept, still closed: payloads and labels (B,) by number; and how often each was used."""
        state = {}
        for uses, place in self._queue:
            kept = self._kept[-place]
            parcel, batch = kept.parcel(), kept.batch
            facts = {
                "codec": parcel.codec.name,
                "shape": list(parcel.encoded.shape),
                "size": kept.size,
                "uses": uses,
                "client": batch.client,
                "progress": batch.progress,
            }
            name = str(-place)
            state[f"{name}.facts"] = torch.tensor(list(json.dumps(facts).encode()), dtype=torch.uint8)
            state[f"{name}.y"] = batch.y.cpu()
            for index, tensor in enumerate(parcel.encoded.tensors):
                state[f"{name}.{index}"] = tensor.cpu()
        return state

    def load(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Has what `state` gave; labels (B,) on the device."""
        for number in sorted(int(name.partition(".")[0]) for name in state if name.endswith(".facts")):
            facts = json.loads(bytes(state[f"{number}.facts"].tolist()))
            payload: list[Tensor] = []
            while (tensor := state.get(f"{number}.{len(payload)}")) is not None:
                payload.append(tensor)
            parcel = Parcel(parse(facts["codec"]), Encoded(tuple(facts["shape"]), payload))
            y = state[f"{number}.y"].to(device)
            nothing = torch.empty(0, device=device)
            batch = Received(nothing, y, facts["client"], facts["progress"], wanted=False)
            self._kept[number] = Kept(batch, self._shelf.put(number, parcel), facts["size"])
            self._queue.append((facts["uses"], -number))
            self.size += facts["size"]
            self._came = number
        heapq.heapify(self._queue)

    def _drop(self, entry: tuple[int, int]) -> None:
        self._queue.remove(entry)
        heapq.heapify(self._queue)
        self._forget(-entry[1])

    def _forget(self, number: int) -> None:
        self.size -= self._kept.pop(number).size
        self._shelf.drop(number)
