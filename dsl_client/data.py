"""The private data: with `sources`, the only place where raw images exist. No server reads a data set.

Every source becomes the same thing, a train and a test `Dataset` of bytes, judged once on the way
in. It knows nothing of files, batches, clients or the wire.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from dsl_client.sources import SPLITS, Raw, read


@dataclass(frozen=True)
class Dataset:
    """Images and their labels, as bytes in memory."""

    images: Tensor  # (N, C, H, W) uint8; a grey image's channels may share memory: only read it
    labels: Tensor  # (N,) int64, from 0 to classes - 1
    classes: int
    names: tuple[str, ...] = ()  # of the classes in label order, where the source has them

    def __len__(self) -> int:
        return len(self.labels)


def load(source: str, image: tuple[int, int, int], classes: int) -> tuple[Dataset, Dataset]:
    """The train and the test set of a source (see sources.SOURCES), as the run wants them.

    image: the run's (C, H, W); classes: how many the run's network tells apart. Raises ConfigError
    for a source that is unknown, cannot be read or breaks its format, or does not suit the run.
    """
    raw = read(source, image)
    labels = [_labels(raw, split) for split in SPLITS]
    found = len(raw.names) or 1 + max(int(raw.arrays[f"{split}_labels"].max()) for split in SPLITS)
    if found > classes:
        remedy = f"start the server with --classes {found}"
        raise ConfigError(f"{source} has {found} classes but the run has {classes}; {remedy}")
    images = [fit(_images(raw, split), image) for split in SPLITS]
    train, test = (Dataset(x, y, found, raw.names) for x, y in zip(images, labels, strict=True))
    return train, test


def fit(images: Tensor, image: tuple[int, int, int]) -> Tensor:
    """(N, C, H, W) as (N, *image): zeros all around, and a grey channel repeated.

    Raises ConfigError where that cannot reach `image`: nothing is cut off and nothing is scaled.
    """
    channels, height, width = image
    have = images.shape[1:]
    down, right = height - have[1], width - have[2]
    if down < 0 or right < 0 or have[0] not in (1, channels):
        shape, wanted = ("x".join(map(str, sizes)) for sizes in (have, image))
        remedy = f"start the server with --image {' '.join(map(str, have))}"
        raise ConfigError(f"the images are {shape} but the run takes {wanted}; {remedy}")
    if down or right:
        margins = (right // 2, right - right // 2, down // 2, down - down // 2)
        images = F.pad(images, margins)
    return images.expand(-1, channels, -1, -1)  # a view: grey images take no more memory


def _images(raw: Raw, split: str) -> Tensor:
    """(N, C, H, W) uint8, a copy that is the caller's own."""
    images = raw.arrays[f"{split}_images"]
    stacked = images[..., None] if images.ndim == 3 else images
    fits = stacked.ndim == 4 and stacked.shape[-1] in (1, 3) and 0 not in stacked.shape
    if not fits or images.dtype != np.uint8:
        wanted = "save them as uint8 of shape (N, H, W) or (N, H, W, 3), at least one"
        found = f"{images.dtype} of shape {images.shape}"
        raise ConfigError(f"{raw.where}: {split}_images are {found}; {wanted}")
    return torch.from_numpy(np.array(stacked.transpose(0, 3, 1, 2), order="C"))


def _labels(raw: Raw, split: str) -> Tensor:
    """(N,) int64, one for each image, each a class."""
    labels, key = raw.arrays[f"{split}_labels"], f"{raw.where}: {split}_labels"
    count = raw.arrays[f"{split}_images"].shape[:1]
    if labels.shape != count or labels.dtype.kind not in "iu" or not labels.size:
        found = f"{labels.dtype} of shape {labels.shape}"
        raise ConfigError(f"{key} are {found}; save one whole number an image: shape {count}")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or (raw.names and most >= len(raw.names)):
        remedy = f"count from 0 to {len(raw.names) - 1}" if raw.names else "count from 0"
        raise ConfigError(f"{key} run from {least} to {most}; {remedy}")
    return torch.from_numpy(labels.astype(np.int64))
