"""Batches that are learned from again, on disk: a file each, gone when it is used up."""

from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from common.codecs import Encoded, Parcel
from common.errors import StepError
from common.methods.replay import Shelf


class DiskShelf(Shelf):
    """Raises StepError where the disk has no room, or lost what it was given."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def put(self, number: int, parcel: Parcel) -> Callable[[], Parcel]:
        """Writes the parcel under this number; how to have it back. Raises StepError when the disk fails."""
        file = self._file(number)
        tensors = {str(index): tensor for index, tensor in enumerate(parcel.encoded.tensors)}
        try:
            self._folder.mkdir(exist_ok=True)
            save_file(tensors, file)
        except (OSError, SafetensorError) as error:
            raise StepError(f"--replay-on disk: {file} cannot be written: {error}") from error
        codec, shape, device = parcel.codec, parcel.encoded.shape, tensors["0"].device

        def get() -> Parcel:
            try:
                lying = load_file(file, device=str(device))
            except (OSError, SafetensorError) as error:
                raise StepError(f"--replay-on disk: {file} cannot be read: {error}") from error
            return Parcel(codec, Encoded(shape, [lying[str(index)] for index in range(len(lying))]))

        return get

    def drop(self, number: int) -> None:
        self._file(number).unlink(missing_ok=True)

    def _file(self, number: int) -> Path:
        return self._folder / f"{number}.safetensors"
