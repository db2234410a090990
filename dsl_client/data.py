"""The private data: with `sources` and `datasets`, the only place where it is. No server reads a data set.

Every source becomes the same thing, a train and a test `Dataset`, judged once on the way in by what the run
and its network take. It knows nothing of files, batches, clients or the wire.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import ConfigError
from dsl_client.datasets import Pair, described, made_by, read_pair
from dsl_client.sources import SPLITS, Raw, is_own, read

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Dataset:
    """Inputs and their labels, in memory: images as bytes, anything else as the network takes it."""

    inputs: Tensor  # (N, C, H, W) uint8; a grey image's channels may share memory: only read it. Or (N, ...)
    labels: Tensor  # (N,) int64, from 0 to classes - 1; or (N, K) float32
    classes: int  # 0 where labels are numbers
    names: tuple[str, ...] = ()  # of the classes in label order, where the source has them

    def __len__(self) -> int:
        return len(self.labels)


def load(
    source: str | Pair, shape: Shape, classes: int, dtype: torch.dtype = torch.float32, numbers: int = 0
) -> tuple[Dataset, Dataset]:
    """The train and the test set of a source (sources.SOURCES) or of two torch Datasets, as the run wants it.

    shape, dtype: of one sample as the network takes it, images (C, H, W). classes: how many the network
    tells apart; or numbers: how many a label has. Raises ConfigError for a source that is unknown, cannot be
    read or breaks its format, or does not suit the run.
    """
    raw = _read(source, shape)
    inputs = [_inputs(raw, split, shape, dtype) for split in SPLITS]
    if numbers:
        train, test = (
            Dataset(x, _numbers(raw, split, numbers), 0) for x, split in zip(inputs, SPLITS, strict=True)
        )
        return train, test
    labels = [_labels(raw, split) for split in SPLITS]
    found = len(raw.names) or 1 + max(int(raw.arrays[f"{split}_labels"].max()) for split in SPLITS)
    if found > classes:
        remedy = f"start the server with --classes {found}"
        raise ConfigError(f"{raw.where} has {found} classes but the run has {classes}; {remedy}")
    train, test = (Dataset(x, y, found, raw.names) for x, y in zip(inputs, labels, strict=True))
    return train, test


def fit(images: Tensor, image: Shape) -> Tensor:
    """(N, C, H, W) as (N, *image): zeros all around, and a grey channel repeated.

    Raises ConfigError where that cannot reach `image`: nothing is cut off and nothing is scaled.
    """
    channels, height, width = image
    have = images.shape[1:]
    down, right = height - have[1], width - have[2]
    if down < 0 or right < 0 or have[0] not in (1, channels):
        found, wanted = ("x".join(map(str, sizes)) for sizes in (have, image))
        remedy = f"start the server with --image {' '.join(map(str, have))}"
        raise ConfigError(f"the images are {found} but the run takes {wanted}; {remedy}")
    if down or right:
        margins = (right // 2, right - right // 2, down // 2, down - down // 2)
        images = F.pad(images, margins)
    return images.expand(-1, channels, -1, -1)  # a view: grey images take no more memory


def _read(source: str | Pair, shape: Shape) -> Raw:
    if not isinstance(source, str):
        return read_pair("the data given", source)
    return read_pair(f"--data {source}", made_by(source)) if is_own(source) else read(source, shape)


def _inputs(raw: Raw, split: str, shape: Shape, dtype: torch.dtype) -> Tensor:
    """(N, ...): images (N, C, H, W) uint8, or what the network takes as it is."""
    if f"{split}_images" in raw.arrays:
        name, inputs, images = f"{split}_images", _images(raw, split), True
    else:
        name, inputs = f"{split}_inputs", _tensor(raw, f"{split}_inputs")
        images = inputs.dtype == torch.uint8 and inputs.dim() == 4
    if images and len(shape) == 3 and dtype == torch.float32:
        return fit(inputs, shape)
    if inputs.dtype != dtype or inputs.shape[1:] != shape:
        also = ", or images as uint8" if len(shape) == 3 and dtype == torch.float32 else ""
        raise ConfigError(
            f"{raw.where}: one sample of {name} is {described(inputs[0])}, and the network takes "
            f"{_text(dtype)} {list(shape)}{also}: give it that, or start the server with another --model"
        )
    if inputs.is_floating_point() and not inputs.isfinite().all():
        raise ConfigError(f"{raw.where}: {name} have values that are not finite; mend the data")
    return inputs


def _images(raw: Raw, split: str) -> Tensor:
    """(N, C, H, W) uint8, a copy that is the caller's own."""
    images = raw.arrays[f"{split}_images"]
    stacked = images[..., None] if images.ndim == 3 else images
    fits = stacked.ndim == 4 and stacked.shape[-1] in (1, 3) and 0 not in stacked.shape
    if not fits or images.dtype != np.uint8:
        wanted = "save them as uint8 of shape (N, H, W) or (N, H, W, 3), at least one"
        found = f"{images.dtype} of shape {images.shape}"
        raise ConfigError(
            f"{raw.where}: {split}_images are {found}; {wanted}; or, as no images, as {split}_inputs"
        )
    return torch.from_numpy(np.array(stacked.transpose(0, 3, 1, 2), order="C"))


def _tensor(raw: Raw, name: str) -> Tensor:
    """(N, ...), of a type that networks take, at least one."""
    array = raw.arrays[name]
    if array.dtype not in (np.uint8, np.float32, np.int64) or array.ndim < 2 or 0 in array.shape:
        found = f"{array.dtype} of shape {array.shape}"
        wanted = "float32, int64 (tokens) or uint8 (images), of shape (N, ...), at least one"
        raise ConfigError(f"{raw.where}: {name} are {found}; give them as {wanted}")
    return torch.from_numpy(array)


def _labels(raw: Raw, split: str) -> Tensor:
    """(N,) int64, one for each sample, each a class."""
    labels, key = raw.arrays[f"{split}_labels"], f"{raw.where}: {split}_labels"
    count = _count(raw, split)
    if labels.shape != count or labels.dtype.kind not in "iu" or not labels.size:
        found = f"{labels.dtype} of shape {labels.shape}"
        width = labels.shape[1] if labels.ndim == 2 else 1
        other = f"; or, to learn numbers, start the server with --targets float:{width}"
        remedy = f"save one whole number an image: shape {count}"
        raise ConfigError(f"{key} are {found}; {remedy}{other if labels.dtype.kind == 'f' else ''}")
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or (raw.names and most >= len(raw.names)):
        remedy = f"count from 0 to {len(raw.names) - 1}" if raw.names else "count from 0"
        raise ConfigError(f"{key} run from {least} to {most}; {remedy}")
    return torch.from_numpy(labels.astype(np.int64))


def _numbers(raw: Raw, split: str, numbers: int) -> Tensor:
    """(N, K) float32, all finite."""
    labels, key = raw.arrays[f"{split}_labels"], f"{raw.where}: {split}_labels"
    (count,) = _count(raw, split)
    rows = labels[:, None] if labels.ndim == 1 else labels
    if rows.shape != (count, numbers) or labels.dtype.kind != "f":
        found = f"{labels.dtype} of shape {labels.shape}"
        remedy = f"give {numbers} a sample as float32: shape ({count}, {numbers})"
        raise ConfigError(f"{key} are {found}; {remedy}; or start the server with other --targets")
    if not np.isfinite(rows).all():
        raise ConfigError(f"{key} have values that are not finite; mend the data")
    return torch.from_numpy(rows.astype(np.float32))


def _count(raw: Raw, split: str) -> tuple[int]:
    name = f"{split}_images" if f"{split}_images" in raw.arrays else f"{split}_inputs"
    return (len(raw.arrays[name]),)


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
