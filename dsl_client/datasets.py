"""Data that is there already, as objects: ours, or any map-style torch Dataset of uint8 images and labels."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError
from dsl_client.data import Dataset, fit

Pair = tuple[Any, Any]  # (train, test)


def taken(pair: Pair, image: tuple[int, int, int], classes: int) -> tuple[Dataset, Dataset]:
    """The train and the test set as the run wants them. image: its (C, H, W).

    Raises ConfigError, naming which of the two and what, where they do not suit it.
    """
    train, test = (
        _taken(data, name, image, classes) for data, name in zip(pair, ("train", "test"), strict=True)
    )
    return train, test


def _taken(data: Any, name: str, image: tuple[int, int, int], classes: int) -> Dataset:
    if isinstance(data, Dataset):
        return Dataset(fit(data.images, image), _judged(data.labels, name, classes), classes, data.names)
    try:
        items = [(_pixels(x), int(y)) for x, y in (data[index] for index in range(len(data)))]
        images, labels = torch.stack([x for x, _ in items]), torch.tensor([y for _, y in items])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"data, {name}: its items must be pairs of a uint8 image, all of one shape, and a label: {error}"
        ) from error
    return Dataset(fit(images, image), _judged(labels, name, classes), classes)


def _pixels(x: Any) -> Tensor:
    """(C, H, W) uint8: of a tensor that is so, or (H, W); of an array or picture (H, W) or (H, W, C)."""
    if isinstance(x, Tensor):
        image = x if x.dim() == 3 else x[None]
    else:
        array = np.asarray(x)
        image = torch.from_numpy(np.array(array if array.ndim == 3 else array[..., None])).permute(2, 0, 1)
    if image.dtype != torch.uint8:
        raise ValueError(f"an image is {image.dtype}, not uint8")
    return image


def _judged(labels: Tensor, name: str, classes: int) -> Tensor:
    least, most = int(labels.min()), int(labels.max())
    if least < 0 or most >= classes:
        raise ConfigError(
            f"data, {name}: labels run from {least} to {most}, and the run has {classes} classes, from 0: "
            f"say classes={most + 1}"
        )
    return labels.to(torch.int64)
