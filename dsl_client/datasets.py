"""Two torch Datasets, read once into memory: a client's own, by the name of a function or given as objects.

Whether what they hold makes sense is judged in `data`. It knows no run.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import ConfigError, OwnCodeError
from common.own import first_words, function_of
from dsl_client.sources import SPLITS, Raw

Pair = tuple[Dataset[Any], Dataset[Any]]  # to train on, and to test on

_ITEMS = "each item (x, y): x a tensor, y a class or a vector of numbers"


def made_by(source: str) -> Any:
    """What the function of this name (package.module:function) gives. Raises ConfigError."""
    function = function_of("--data", source, "install it, or put its folder on PYTHONPATH")
    return _called(f"--data {source}", function)


def read_pair(where: str, pair: Any) -> Raw:
    """The inputs and labels of both, and the classes' names if the first has an attribute `classes` of them.

    Each item is asked for once, in order, in this process. Raises ConfigError, naming the item.
    """
    if not isinstance(pair, tuple | list) or len(pair) != len(SPLITS):
        raise ConfigError(f"{where}: gives {_kind(pair)}; it must give a pair of Datasets: train, test")
    arrays: dict[str, np.ndarray[Any, Any]] = {}
    for split, dataset in zip(SPLITS, pair, strict=True):
        inputs, labels = _stacked(f"{where}: the {split} set", dataset)
        arrays |= {f"{split}_inputs": inputs.numpy(), f"{split}_labels": labels.numpy()}
    names = getattr(pair[0], "classes", ())
    known = isinstance(names, tuple | list) and all(isinstance(name, str) for name in names)
    return Raw(where, arrays, tuple(names) if known else ())


def _stacked(where: str, dataset: Any) -> tuple[Tensor, Tensor]:
    """(N, ...) and (N, ...): filled item by item, so that nothing is in memory twice."""
    items = _items(where, dataset)
    first = next(items)
    inputs, labels = (tensor.new_empty((len(dataset), *tensor.shape)) for tensor in first)
    for index, (x, y) in enumerate(chain([first], items)):
        for name, tensor, known in (("x", x, first[0]), ("y", y, first[1])):
            if tensor.dtype != known.dtype or tensor.shape != known.shape:
                raise ConfigError(
                    f"{where}: {name} of item {index} is {described(tensor)}, and that of item 0 "
                    f"{described(known)}; make all alike"
                )
        inputs[index], labels[index] = x, y
    return inputs, labels


def _items(where: str, dataset: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """At least one. (Not by iterating: a Dataset need not raise IndexError at its end.)"""
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise ConfigError(
            f"{where} is {_kind(dataset)}; it must be map-style: have a length, and items by index"
        )
    count = _called(where, dataset.__len__)
    if not count:
        raise ConfigError(f"{where} is empty; it must have at least one item")
    for index in range(count):
        item = _called(f"{where}: item {index}", partial(dataset.__getitem__, index))
        if not isinstance(item, tuple | list) or len(item) != 2:
            raise ConfigError(f"{where}: item {index} is {_kind(item)}; give {_ITEMS}")
        x, y = (_tensor(f"{where}: item {index}", value) for value in (_pixels(item[0]), item[1]))
        yield x, y


def _pixels(value: Any) -> Any:
    """A picture, as PIL and so torchvision's data sets give it, as (C, H, W); anything else as it is."""
    if isinstance(value, Tensor | np.ndarray) or not hasattr(value, "__array_interface__"):
        return value
    pixels = np.array(value)
    return torch.from_numpy(pixels if pixels.ndim == 3 else pixels[..., None]).permute(2, 0, 1)


def _tensor(where: str, value: object) -> Tensor:
    """On the host; of whole numbers but for bytes int64, as torch makes them of Python's."""
    try:
        tensor = torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(f"{where} has {_kind(value)}; give {_ITEMS}") from error
    return tensor.contiguous()


def _called(what: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:  # it is someone else's code
        raise OwnCodeError(what, error, first_words(error)) from error


def described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _kind(value: object) -> str:
    return "None" if value is None else f"of type {type(value).__name__}"
