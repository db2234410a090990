"""Where data comes from: an npz file, a folder of pictures, a public data set, the packed sample.

Each is read into plain arrays; whether those make sense is judged in `data`. It knows no tensor.
torchvision and PIL are imported only by the sources that need them.
"""

import difflib
import fcntl
import gzip
import io
import lzma
import os
import threading
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from importlib import resources
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError
from common.own import is_function

SOURCES = (
    "cifar10",
    "cifar100",
    "fashion-mnist",
    "sample",
    "npz:FILE",
    "folder:DIR",
    "package.module:function",
)
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
FASHION_NAMES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
PICTURES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
SPLITS = ("train", "test")
ARRAYS = ("train_images", "train_labels", "test_images", "test_labels")
INPUTS = ("train_inputs", "train_labels", "test_inputs", "test_labels")  # of data that are no images
_NPZ = (
    f"write one with numpy.savez: {', '.join(ARRAYS)} (and classes, the names); what is no images as "
    "train_inputs, test_inputs"
)


_KINDS = {known.partition(":")[0]: known for known in SOURCES}


@dataclass(frozen=True)
class Raw:
    """What a source holds, not judged yet: (N, H, W) or (N, H, W, C) images, or (N, ...) inputs as a network
    takes them; (N,) classes or (N, K) numbers as labels."""

    where: str
    arrays: dict[str, NDArray[Any]]  # by the names in ARRAYS, or INPUTS
    names: tuple[str, ...]


def read(source: str, image: tuple[int, ...]) -> Raw:
    """What a source of SOURCES holds, but for a function's. image: the (C, H, W) that pictures are scaled to.

    Raises ConfigError if it is unknown, or cannot be read.
    """
    match source.partition(":"):
        case ("npz", ":", path) if path:
            return _npz(Path(path).expanduser(), source)
        case ("folder", ":", path) if path:
            if len(image) != 3:
                raise ConfigError(
                    f"{source} has pictures, and the network takes {list(image)}; give other --data"
                )
            channels, height, width = image
            return _folder(Path(path).expanduser(), (channels, height, width))
        case ("cifar10" | "cifar100" | "fashion-mnist" as name, "", ""):
            return _public(name)
        case ("sample", "", ""):
            packed = resources.files("dsl_client.sample") / "fashion-mnist.npz.xz"
            return _arrays(io.BytesIO(lzma.decompress(packed.read_bytes())), source)
    near = difflib.get_close_matches(source.partition(":")[0], _KINDS, 1)
    hint = f"did you mean {_KINDS[near[0]]}? " if near else ""
    raise ConfigError(f"unknown data source {source!r}; {hint}known: {', '.join(SOURCES)}")


def is_own(source: str) -> bool:
    """Whether it is a function of the user's own that gives the data."""
    return is_function(source) and source.partition(":")[0] not in _KINDS


def _npz(path: Path, where: str) -> Raw:
    """A file as numpy.savez writes it."""
    try:
        with path.open("rb") as file:  # not left to numpy, which forgets to close a broken one
            return _arrays(file, where)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ConfigError(f"{where} cannot be read ({_line(error)}); {_NPZ}") from error


# numpy parses each array's header as Python, which before 3.11.8 and 3.12.2 fails now and then with a
# SystemError where several threads do so (python/cpython#106905), as the clients of one process would.
_parsing = threading.Lock()


def _arrays(file: IO[bytes], where: str) -> Raw:
    """The arrays of ARRAYS or INPUTS and, if it is there, `classes`: the names in label order."""
    with _parsing:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ConfigError(f"{where} holds one lone array; {_NPZ}")
        with archive:
            wanted = INPUTS if any(key in archive for key in set(INPUTS) - set(ARRAYS)) else ARRAYS
            missing = [key for key in wanted if key not in archive]
            if missing:
                raise ConfigError(f"{where} has no {missing[0]}; {_NPZ}")
            names = tuple(map(str, np.ravel(archive["classes"]))) if "classes" in archive else ()
            return Raw(where, {key: archive[key] for key in wanted}, names)


def _folder(path: Path, image: tuple[int, int, int]) -> Raw:
    """train/ and test/, each with one folder of pictures a class; scaled to the run's size."""
    names, others = (_class_names(path / split) for split in SPLITS)
    if names != others:
        lone = ", ".join(sorted(set(names) ^ set(others)))
        raise ConfigError(f"{path}: only one of train/ and test/ has {lone}; give both a folder")
    arrays: dict[str, NDArray[Any]] = {}
    for split in SPLITS:
        images, labels = _pictures(path / split, names, image)
        arrays |= {f"{split}_images": images, f"{split}_labels": labels}
    return Raw(f"folder:{path}", arrays, names)


def _class_names(folder: Path) -> tuple[str, ...]:
    """The sub-folders, sorted."""
    layout = "a data folder has train/ and test/, and in each a folder of pictures for each class"
    try:
        inside = [entry for entry in folder.iterdir() if entry.is_dir()]
    except OSError as error:
        raise ConfigError(f"{folder} cannot be read ({_line(error)}); {layout}") from error
    names = tuple(sorted(entry.name for entry in inside if not entry.name.startswith(".")))
    if not names:
        raise ConfigError(f"{folder} has no class folders; {layout}")
    return names


def _pictures(
    folder: Path, names: tuple[str, ...], image: tuple[int, int, int]
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Every picture of a split: (N, H, W, 1 or 3), (N,)."""
    found = [
        (file, label)
        for label, name in enumerate(names)
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in PICTURES
    ]
    if not found:
        raise ConfigError(f"{folder} has no pictures; put {', '.join(sorted(PICTURES))} files there")
    channels, height, width = image
    images = np.empty((len(found), height, width, 1 if channels == 1 else 3), np.uint8)
    for row, (file, _) in enumerate(found):
        images[row] = picture(file, image)
    return images, np.array([label for _, label in found])


def picture(file: Path, image: tuple[int, int, int]) -> NDArray[np.uint8]:
    """One picture as (H, W, C), grey where the run's C is 1. Raises ConfigError."""
    from PIL import Image

    channels, height, width = image
    try:
        with Image.open(file) as opened:
            if opened.mode[0] in "IF":  # PIL would clip 16 bits to white, silently
                raise ConfigError(f"{file} has more than 8 bits a channel; save it with 8")
            flat = opened.convert("L" if channels == 1 else "RGB")
            flat = flat.resize((width, height), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{file} is no readable picture ({_line(error)}); remove it") from error
    return np.asarray(flat).reshape(height, width, -1)


def _public(name: str) -> Raw:
    """cifar10, cifar100 or fashion-mnist, downloaded on first use to $DSL_DATA or ~/.cache/dsl."""
    if name == "fashion-mnist" and FASHION_MNIST.is_dir():
        return _fashion_mnist(FASHION_MNIST)
    root = Path(os.environ.get("DSL_DATA") or "~/.cache/dsl").expanduser()
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root):
            return _fetched_fashion(root) if name == "fashion-mnist" else _cifar(name, root)
    # RuntimeError: torchvision's for a bad checksum, and for a torch that it was not built for
    except (ImportError, OSError, RuntimeError, HTTPException) as error:
        remedy = "check the network, set DSL_DATA to a folder that has it, or use the source sample"
        raise ConfigError(f"{name} is not in {root} ({_line(error)}); {remedy}") from error


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One process at a time downloads into root: the next one finds the files there."""
    if not os.access(root, os.W_OK):  # a read-only mount: nobody downloads into it
        yield
        return
    with (root / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _cifar(name: str, root: Path) -> Raw:
    """Through torchvision, which unpickles the archive's files only if their checksums are right."""
    from torchvision import datasets

    kind = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    arrays: dict[str, NDArray[Any]] = {}
    for split in SPLITS:
        part = kind(root, train=split == "train", download=True)
        arrays |= {f"{split}_images": part.data, f"{split}_labels": np.array(part.targets)}
    return Raw(name, arrays, tuple(part.classes))


def _fetched_fashion(root: Path) -> Raw:
    """Fashion-MNIST's four files, from where torchvision has them."""
    from torchvision.datasets import FashionMNIST
    from torchvision.datasets.utils import download_url

    folder = root / "fashion-mnist"
    for file, md5 in FashionMNIST.resources:
        download_url(FashionMNIST.mirrors[0] + file, folder, md5=md5)
    return _fashion_mnist(folder)


def _fashion_mnist(folder: Path) -> Raw:
    """The four gzipped idx files of a folder."""
    arrays: dict[str, NDArray[Any]] = {}
    for split, stem in (("train", "train"), ("test", "t10k")):
        arrays[f"{split}_images"] = read_idx(folder / f"{stem}-images-idx3-ubyte.gz")
        arrays[f"{split}_labels"] = read_idx(folder / f"{stem}-labels-idx1-ubyte.gz")
    return Raw("fashion-mnist", arrays, FASHION_NAMES)


def read_idx(path: Path) -> NDArray[np.uint8]:
    """A gzipped idx file of bytes: 0, 0, 8, the number of axes, each axis as >u4, the data.

    Raises ConfigError where it is none.
    """
    try:
        raw = gzip.decompress(path.read_bytes())
        axes = np.frombuffer(raw, ">u4", count=raw[3], offset=4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * len(axes)).reshape(axes)
    except (OSError, ValueError, IndexError, EOFError, zlib.error) as error:
        raise ConfigError(f"{path} is no idx file ({_line(error)}); install it again") from error


def _line(error: Exception) -> str:
    """What an error says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
