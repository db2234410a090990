"""What is to be predicted: pictures without labels, or a data source; a batch at a time, in order.

It knows no network and no wire. Pictures are read when their batch is due.
"""

import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.ended import Ended
from common.errors import ConfigError
from common.methods.base import ClientPart
from common.run import Run
from dsl_client import data
from dsl_client.batches import Batches, limited, normalise
from dsl_client.sources import PICTURES, SPLITS, picture


@dataclass(frozen=True)
class Portion:
    """x: a batch (B, C, H, W) as the network takes it. names: what each is called. labels: where known."""

    x: Tensor
    names: Sequence[str]
    labels: Sequence[int] = ()


@dataclass(frozen=True)
class Samples:
    """count: of all; classes: their names, where the source has them."""

    count: int
    portions: Iterator[Portion]
    classes: tuple[str, ...] = ()


def of_pictures(paths: Sequence[Path], ended: Ended[ClientPart], size: int, device: torch.device) -> Samples:
    """Of files, of folders (and those within), and of npz files with an array `images`.

    Raises ConfigError where there are none; later for one that cannot be read.
    """
    run, (shape, _, dtype) = ended.run, _wanted(ended)
    if (shape, dtype) != (tuple(run.image_shape), torch.float32):
        raise ConfigError(f"{ended.folder}: its network takes {list(shape)}, and no pictures; say --data")
    archives = [path for path in paths if path.suffix == ".npz"]
    files = [file for path in paths if path not in archives for file in _files(path)]
    arrays = [(path, _archive(path, run.image_shape)) for path in archives]
    count = len(files) + sum(len(images) for _, images in arrays)

    def portions() -> Iterator[Portion]:
        for start in range(0, len(files), size):
            some = files[start : start + size]
            stacked = np.stack([picture(file, run.image_shape) for file in some])  # (B, H, W, C)
            images = data.fit(torch.from_numpy(stacked).permute(0, 3, 1, 2), run.image_shape)
            yield Portion(normalise(images.to(device)), list(map(str, some)))
        for path, images in arrays:
            for start in range(0, len(images), size):
                names = [f"{path}:{index}" for index in range(start, min(start + size, len(images)))]
                yield Portion(normalise(images[start : start + size].to(device)), names)

    return Samples(count, portions())


def of_source(source: str, split: str, ended: Ended[ClientPart], size: int, device: torch.device) -> Samples:
    """Of a data source's train or test set, all of it. Raises ConfigError."""
    sets = data.load(source, *_wanted(ended))
    return _of_set(sets[SPLITS.index(split)], ended.run, size, device)


def of_run(ended: Ended[ClientPart], size: int, device: torch.device) -> Samples:
    """Of the test set that the run was scored on. Raises ConfigError."""
    run = ended.run
    _, test = data.load(ended.data, *_wanted(ended))
    return _of_set(limited(test, run.test_limit, run.seed), run, size, device)


def _wanted(ended: Ended[ClientPart]) -> tuple[tuple[int, ...], int, torch.dtype]:
    """What the network takes, and how many classes it tells apart. Raises ConfigError where it tells none."""
    if ended.run.numbers:
        raise ConfigError(
            f"{ended.folder}: that run learned numbers (--targets {ended.run.targets}); only classes are "
            "predicted so: dsl export gives the network"
        )
    dtype, shape = ended.net.takes
    return shape, ended.run.class_count, dtype


def _of_set(dataset: data.Dataset, run: Run, size: int, device: torch.device) -> Samples:
    batches = Batches(dataset, None, size, seed=run.seed, shuffle=False, device=device)

    def portions() -> Iterator[Portion]:
        first = 0
        for x, y in batches.plain():
            yield Portion(x, [str(index) for index in range(first, first + len(y))], y.tolist())
            first += len(y)

    return Samples(batches.samples, portions(), dataset.names)


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in PICTURES)
    if not found:
        raise ConfigError(f"{path} holds no pictures ({', '.join(sorted(PICTURES))}) and is none")
    return found


def _archive(path: Path, image: tuple[int, int, int]) -> Tensor:
    """(N, C, H, W) uint8."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            images = archive["images"]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        words = " ".join(str(error).split())
        raise ConfigError(
            f"{path} cannot be read ({words}): it needs an array `images`; one with train_images and so on "
            f"is --data npz:{path}"
        ) from error
    stacked = images[..., None] if images.ndim == 3 else images
    if stacked.ndim != 4 or stacked.shape[-1] not in (1, 3) or images.dtype != np.uint8:
        found = f"{images.dtype} of shape {images.shape}"
        raise ConfigError(
            f"{path}: images are {found}; save them as uint8 of shape (N, H, W) or (N, H, W, 3)"
        )
    return data.fit(torch.from_numpy(np.array(stacked.transpose(0, 3, 1, 2), order="C")), image)
