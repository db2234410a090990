"""Where a client's part is while nothing is computed with it: where it was, in the host's memory, or on disk.

Of many clients in one process only those that compute have their parts at hand. A part is put away storage
by storage, as bytes, and its tensors keep their places in modules and optimizer: so what comes back is the
same bits, laid out alike, whatever the network is. It knows neither turns nor the wire.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.disk import until_written
from common.errors import ConfigError
from common.methods.base import Part
from dsl_client.spool import told_of

Place = Literal["memory", "disk"]  # "memory": the host's
Kept = dict[str, Tensor]  # bytes of storages, (N,) uint8, by a number of their own


@dataclass(frozen=True)
class _Bed:
    """Where in which storage a tensor lies."""

    tensor: Tensor
    storage: str
    offset: int
    size: torch.Size
    stride: tuple[int, ...]


class Rest:
    """folder: where the bytes go, if not into the host's memory. on_trouble: told why the disk will not have
    them, while it will not."""

    def __init__(
        self, folder: Path | None = None, on_trouble: Callable[[str], None] = lambda _: None
    ) -> None:
        self._file = folder / "resting.safetensors" if folder else None
        self._on_trouble = on_trouble

    @contextmanager
    def of(self, part: Part) -> Iterator[None]:
        """Within it the part rests. Between two steps: what its last one left as gradients is dropped."""
        for module in part.modules.values():
            for parameter in module.parameters():
                parameter.grad = None
        wake = self._put(list(_tensors(part)))
        try:
            yield
        finally:
            wake()

    def _put(self, tensors: Sequence[Tensor]) -> Callable[[], None]:
        """Puts them away; what brings them back."""
        if self._file is not None:
            file = self._file
            beds, kept = _laid(tensors)
            sizes = {name: storage.nbytes for name, storage in kept.items()}
            until_written(partial(_write, file, kept), told_of(file.parent, self._on_trouble))
            _empty(beds)

            def wake() -> None:
                _bring_back(beds, _read(file, sizes))
                file.unlink(missing_ok=True)

            return wake
        if all(tensor.device.type == "cpu" for tensor in tensors):
            return lambda: None  # where they are is where they would go
        beds, kept = _laid(tensors)
        _empty(beds)
        return partial(_bring_back, beds, kept)


def _tensors(part: Part) -> Iterator[Tensor]:
    """Weights, buffers and momentum, each once."""
    modules = part.modules.values()
    held = [tensor for module in modules for tensor in chain(module.parameters(), module.buffers())]
    states = part.optimizer.state.values()
    held += [tensor for state in states for tensor in state.values() if isinstance(tensor, Tensor)]
    yield from {id(tensor): tensor for tensor in held}.values()


def _laid(tensors: Sequence[Tensor]) -> tuple[list[_Bed], Kept]:
    """Where they lie, and on the host what lies there: a storage that several share once."""
    numbers: dict[int, str] = {}
    beds, kept = list[_Bed](), Kept()
    for tensor in tensors:
        storage = tensor.untyped_storage()
        name = numbers.setdefault(storage._cdata, str(len(numbers)))
        if name not in kept:
            kept[name] = torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage).cpu()
        offset = int(tensor.storage_offset())
        beds.append(_Bed(tensor, name, offset, tensor.shape, tensor.stride()))
    return beds, kept


def _empty(beds: Sequence[_Bed]) -> None:
    for bed in beds:
        bed.tensor.data = bed.tensor.new_empty(0)


def _bring_back(beds: Sequence[_Bed], kept: Kept) -> None:
    device = beds[0].tensor.device
    storages = {name: whole.to(device, copy=True).untyped_storage() for name, whole in kept.items()}
    for bed in beds:
        lying = bed.tensor.new_empty(0)
        bed.tensor.data = lying.set_(storages[bed.storage], bed.offset, bed.size, bed.stride)


def _write(file: Path, kept: Kept) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        save_file(kept, file)
    except SafetensorError as error:  # of the disk: the tensors are ours
        raise OSError(str(error)) from error


def _read(file: Path, sizes: dict[str, int]) -> Kept:
    """Raises ConfigError where they are not what was put there."""
    try:
        kept = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file}: a part that rested there cannot be read: {error}") from error
    if {name: tensor.nbytes for name, tensor in kept.items()} != sizes:
        raise ConfigError(f"{file}: a part that rested there is not what was written; does another use it?")
    return kept
