"""From a data set to batches: who gets which samples, in which order, cropped and flipped how.

Every choice here is a pure function of numbers that both ends know (seed, client, epoch, batch), so
a client that restarts makes the very batches that it would have made. It knows no file and no wire.
"""

import math
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.crops import crop_and_flip
from common.errors import ConfigError
from common.run import MEAN, STD
from dsl_client.data import Dataset

Indices = NDArray[np.int64]

MARGIN = 4  # pixels of zeros around an image before a crop, as for CIFAR in He et al. (2015)
TRIES = 50  # dealings before an uneven one is mended by hand
FEWEST = 10  # samples that a dirichlet dealing leaves every client, where there are enough


def partition(labels: Tensor, scheme: str, clients: int, seed: int) -> list[Indices]:
    """Deals every sample to exactly one client: the sorted positions of each client's own.

    labels: (N,) int64, of which `iid` takes only the number. scheme: `iid`, equal shares of a shuffle; or
    `dirichlet:ALPHA`, each class dealt by its own draw from Dirichlet(ALPHA), the smaller the more uneven
    (Yurochkin et al., 2019, https://arxiv.org/abs/1905.12022). Equal arguments give equal parts on every
    machine. Raises ConfigError for another scheme, a bad ALPHA, or more clients than samples.
    """
    if not 1 <= clients <= len(labels):
        have = f"{len(labels)} training samples"
        raise ConfigError(f"{have} cannot serve {clients} clients; ask for 1 to {len(labels)}")
    rng = np.random.default_rng(seed)
    match scheme.partition(":"):
        case ("iid", "", ""):
            parts = np.array_split(rng.permutation(len(labels)), clients)
        case ("dirichlet", ":", alpha):
            parts = _dirichlet(labels.cpu().numpy(), _alpha(alpha), clients, rng)
        case _:
            raise ConfigError(f"unknown partition {scheme!r}; use iid or dirichlet:ALPHA")
    return [np.sort(part) for part in parts]


def _alpha(text: str) -> float:
    """The number after `dirichlet:`."""
    try:
        alpha = float(text)
    except ValueError:
        alpha = math.nan
    if not 0 < alpha <= 1e6:  # nan is caught here too
        wanted = "a number above 0 and at most 1000000, such as dirichlet:0.5"
        raise ConfigError(f"the partition 'dirichlet:{text}' needs {wanted}")
    return alpha


def _dirichlet(labels: Indices, alpha: float, clients: int, rng: np.random.Generator) -> list[Indices]:
    """Deals anew until everyone has enough, as is usual; after TRIES takes from the largest."""
    enough = min(FEWEST, len(labels) // clients)
    for _ in range(TRIES):
        parts = _deal(labels, alpha, clients, rng)
        if min(map(len, parts)) >= enough:
            break
    return _level(parts, enough)


def _deal(labels: Indices, alpha: float, clients: int, rng: np.random.Generator) -> list[Indices]:
    """One dealing, class by class; a client may come out with nothing."""
    hands: list[list[Indices]] = [[] for _ in range(clients)]
    for label in np.unique(labels):
        mine = rng.permutation(np.flatnonzero(labels == label))
        shares = rng.dirichlet(np.full(clients, alpha))
        cuts = (np.cumsum(shares)[:-1] * len(mine)).astype(np.int64)
        for hand, piece in zip(hands, np.split(mine, cuts), strict=True):
            hand.append(piece)
    return [np.concatenate(hand) for hand in hands]


def _level(parts: list[Indices], enough: int) -> list[Indices]:
    """Fills every part up to `enough` samples from whichever is the largest at the time."""
    parts = list(parts)
    for poor in range(len(parts)):
        while (lacking := enough - len(parts[poor])) > 0:
            rich = max(range(len(parts)), key=lambda i: len(parts[i]))
            given = min(lacking, len(parts[rich]) - enough)
            parts[poor] = np.concatenate([parts[poor], parts[rich][-given:]])
            parts[rich] = parts[rich][:-given]
    return parts


def limited(dataset: Dataset, limit: int, seed: int) -> Dataset:
    """At most `limit` of its samples, drawn by the seed, the same at every client; 0: all of them."""
    if not 0 < limit < len(dataset):
        return dataset
    drawn = torch.from_numpy(np.random.default_rng(seed).permutation(len(dataset))[:limit])
    return replace(dataset, inputs=dataset.inputs[drawn], labels=dataset.labels[drawn])


def _are_images(inputs: Tensor) -> bool:
    return inputs.dtype == torch.uint8


def _floats(inputs: Tensor) -> Tensor:
    """Images normalised; of anything else, itself."""
    return normalise(inputs) if _are_images(inputs) else inputs


def normalise(images: Tensor) -> Tensor:
    """(B, C, H, W) uint8 as float32 of about zero mean and unit spread: 0 is -2, 255 is 2."""
    return images.to(torch.float32).div_(255).sub_(MEAN).div_(STD)


class Batches:
    """One client's samples, epoch after epoch.

    Images wait as bytes on the device, a quarter of what floats would take, and become floats a
    batch at a time; other inputs are given as they are. The last batch of an epoch is the short one,
    and is kept even if it is a single sample: BatchNorm over (1, C, H, W) is sound as long as H * W > 1.
    """

    def __init__(
        self,
        dataset: Dataset,
        indices: Indices | None,
        batch_size: int,
        *,
        seed: int,
        client: int = 0,
        augment: bool = False,
        shuffle: bool = True,
        device: torch.device,
    ) -> None:
        """indices: this client's part of the data set, None for all. seed, client: 0 or more."""
        assert batch_size > 0, batch_size
        mine = slice(None) if indices is None else torch.from_numpy(indices)
        self._inputs = dataset.inputs[mine].to(device)  # (N, C, H, W) uint8, or (N, ...)
        self._labels = dataset.labels[mine].to(device)  # (N,), or (N, K)
        self._size, self._seed, self._client = batch_size, seed, client
        self._augment, self._shuffle = augment, shuffle

    @property
    def samples(self) -> int:
        """How many samples an epoch goes over."""
        return len(self._labels)

    def __len__(self) -> int:
        """How many batches an epoch has."""
        return math.ceil(self.samples / self._size)

    def size(self, batch: int) -> int:
        """How many samples the batch of this index has."""
        return min(self._size, self.samples - batch * self._size)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Epoch `number` from its batch `start` on: x (B, C, H, W) float32, y (B,) int64; or of other kinds.

        Any batch can be the first: none depends on those before it. number: 0 or more.
        """
        places = self._order(number).split(self._size)
        for batch in range(start, len(self)):  # none for no samples; split would give one
            x = self._inputs[places[batch]]
            if self._augment and _are_images(x):
                x = crop_and_flip(x, MARGIN, self._generator(number, batch))
            yield _floats(x), self._labels[places[batch]]

    def plain(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Every batch once, x (B, ...) and y (B,) or (B, K), in their order, none of them augmented."""
        for batch in range(len(self)):
            some = slice(batch * self._size, (batch + 1) * self._size)
            yield _floats(self._inputs[some]), self._labels[some]

    def _order(self, number: int) -> Tensor:
        """The order of an epoch: (N,) places in the client's own part."""
        if not self._shuffle:
            return torch.arange(self.samples, device=self._labels.device)
        order = torch.randperm(self.samples, generator=self._generator(number))
        return order.to(self._labels.device)

    def _generator(self, *stream: int) -> torch.Generator:
        """Random numbers of an epoch's order (number) or of a batch's crops (number, batch)."""
        # As a spawn key: in plain entropy a trailing 0 counts for nothing, and batch 0 would draw
        # the numbers of the order.
        mixed = np.random.SeedSequence([self._seed, self._client], spawn_key=stream)
        return torch.Generator().manual_seed(int(mixed.generate_state(1, np.uint64)[0]))
