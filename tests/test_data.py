"""The sources, the dealing of samples to clients, the crops and flips, the order of batches."""

import ast
import gc
import gzip
import hashlib
import pickle
import struct
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from common.crops import crop_and_flip
from common.errors import ConfigError
from dsl_client import data, sources
from dsl_client.batches import MARGIN, Batches, normalise, partition
from dsl_client.data import Dataset, fit, load

CPU = torch.device("cpu")
RGB32, GREY28 = (3, 32, 32), (1, 28, 28)
Arrays = dict[str, np.ndarray[Any, Any]]


def some_images(count: int, *shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).integers(0, 256, (count, *shape), dtype=np.uint8)


# -- the packed sample


@pytest.fixture(scope="module")
def sample() -> tuple[Dataset, Dataset]:
    return load("sample", RGB32, 10)


def test_the_sample_is_class_balanced(sample: tuple[Dataset, Dataset]) -> None:
    for dataset, count in zip(sample, (1000, 200), strict=True):
        assert dataset.inputs.shape == (10 * count, *RGB32)
        assert dataset.inputs.dtype == torch.uint8
        assert dataset.labels.dtype == torch.int64
        assert torch.bincount(dataset.labels).tolist() == [count] * 10
        assert dataset.labels[:500].unique().numel() == 10  # mixed, not class after class
        assert (dataset.classes, len(dataset.names)) == (10, 10)


def test_the_sample_is_grey_28x28_in_a_frame_of_zeros(sample: tuple[Dataset, Dataset]) -> None:
    small, _ = load("sample", GREY28, 10)
    wide = sample[0].inputs
    assert small.inputs.shape == (10_000, *GREY28)
    assert all(torch.equal(wide[:, c, 2:30, 2:30], small.inputs[:, 0]) for c in range(3))
    assert int(wide.sum(dtype=torch.int64)) == 3 * int(small.inputs.sum(dtype=torch.int64))
    assert 0.2 < float(small.inputs.float().mean() / 255) < 0.4  # 0.286 over all of Fashion-MNIST
    assert len({image.numpy().tobytes() for image in small.inputs}) > 9_990  # it has a few twins


# -- what suits a run, and what does not


def test_fit_puts_an_odd_margin_below_and_right() -> None:
    wide = fit(torch.full((1, 1, 2, 3), 7, dtype=torch.uint8), (3, 5, 4))
    assert wide[0, 2].tolist() == [[0] * 4, [7, 7, 7, 0], [7, 7, 7, 0], [0] * 4, [0] * 4]
    assert torch.equal(wide[0, 0], wide[0, 2])


@pytest.mark.parametrize("image", [(1, 32, 32), (3, 31, 32), (3, 32, 31), (4, 32, 32)])
def test_fit_refuses_what_padding_cannot_reach(image: tuple[int, int, int]) -> None:
    wanted = f"3x32x32 but the run takes {'x'.join(map(str, image))}; .*--image 3 32 32"
    with pytest.raises(ConfigError, match=wanted):
        fit(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), image)


def test_more_classes_than_the_run_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"sample has 10 classes but the run has 7; .*--classes 10"):
        load("sample", RGB32, 7)


@pytest.mark.parametrize(
    ("source", "hint"),
    [
        ("cifr10", "did you mean cifar10"),
        ("npz", "did you mean npz:FILE"),
        ("npz:", "did you mean npz:FILE"),
        ("fashion", "did you mean fashion-mnist"),
        ("cifar100:x", "did you mean cifar100"),
        ("", "known: cifar10, cifar100, fashion-mnist, sample, npz:FILE, folder:DIR"),
    ],
)
def test_an_unknown_source_is_named_with_the_nearest(source: str, hint: str) -> None:
    with pytest.raises(ConfigError, match=hint) as error:
        load(source, RGB32, 10)
    assert repr(source) in str(error.value)


@pytest.mark.parametrize("module", [data, sources])
def test_torchvision_and_pil_are_not_imported_with_the_module(module: Any) -> None:
    body = ast.parse(Path(module.__file__).read_text()).body
    names = [alias.name for node in body if isinstance(node, ast.Import) for alias in node.names]
    names += [str(node.module) for node in body if isinstance(node, ast.ImportFrom)]
    assert names
    assert not {"torchvision", "PIL"} & {name.split(".")[0] for name in names}


# -- npz


def good_arrays() -> Arrays:
    return {
        "train_images": some_images(6, 32, 32, 3),
        "train_labels": np.array([0, 1, 2, 0, 1, 2], np.uint8),
        "test_images": some_images(3, 32, 32, 3, seed=1),
        "test_labels": np.array([2, 1, 0], np.uint8),
        "classes": np.array(["ant", "bee", "cat"]),
    }


def npz(folder: Path, arrays: Arrays) -> str:
    np.savez(folder / "set.npz", allow_pickle=True, **arrays)
    return f"npz:{folder / 'set.npz'}"


def test_npz_round_trip(tmp_path: Path) -> None:
    arrays = good_arrays()
    for split, dataset in zip(("train", "test"), load(npz(tmp_path, arrays), RGB32, 10), strict=True):
        back = dataset.inputs.permute(0, 2, 3, 1).numpy()
        np.testing.assert_array_equal(back, arrays[f"{split}_images"])
        np.testing.assert_array_equal(dataset.labels.numpy(), arrays[f"{split}_labels"])
        assert (dataset.classes, dataset.names) == (3, ("ant", "bee", "cat"))
        assert len(dataset) == len(dataset.labels)


def test_npz_of_grey_images_without_names(tmp_path: Path) -> None:
    arrays = good_arrays() | {"train_images": some_images(6, 28, 28), "test_images": some_images(3, 28, 28)}
    del arrays["classes"]
    train, test = load(npz(tmp_path, arrays), RGB32, 3)
    np.testing.assert_array_equal(train.inputs[:, 1, 2:-2, 2:-2].numpy(), arrays["train_images"])
    assert (train.classes, test.classes, train.names) == (3, 3, ())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"test_labels": None}, "has no test_labels; write one"),
        ({"train_images": some_images(6, 32, 32, 3) / 255}, "train_images are float64 of shape"),
        ({"test_images": some_images(3, 3, 32, 32)}, r"test_images are uint8 of shape \(3, 3, 32, 32\)"),
        ({"train_images": some_images(6, 32)}, r"of shape \(6, 32\); save them as uint8"),
        ({"train_labels": np.zeros(5, np.uint8)}, r"train_labels are uint8 of shape \(5,\)"),
        ({"train_labels": np.zeros((6, 1), np.uint8)}, r"of shape \(6, 1\); .*shape \(6,\)"),
        ({"train_labels": np.zeros(6)}, "train_labels are float64"),
        ({"test_labels": np.array([0, 1, -1])}, "test_labels run from -1 to 1; count from 0 to 2"),
        ({"test_labels": np.array([0, 1, 3])}, "test_labels run from 0 to 3; count from 0 to 2"),
        ({"classes": None, "test_labels": np.array([0, 1, -4])}, "run from -4 to 1; count from 0"),
        ({"classes": None, "test_labels": np.array([0, 1, 2**63], np.uint64)}, "--classes 9223"),
        ({"test_images": some_images(0, 32, 32, 3), "test_labels": np.zeros(0, int)}, "at least|one whole"),
        ({"train_labels": np.array([None] * 6)}, "cannot be read .*allow_pickle=False"),
    ],
)
def test_a_bad_npz_is_refused_by_name(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    arrays = {k: v for k, v in (good_arrays() | change).items() if v is not None}
    source = npz(tmp_path, arrays)
    with pytest.raises(ConfigError, match=message) as error:
        load(source, RGB32, 10)
    assert source in str(error.value)
    assert "\n" not in str(error.value)


def lone_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, np.zeros(3))


def cut_short(path: Path) -> None:
    np.savez_compressed(path, allow_pickle=False, **good_arrays())
    path.write_bytes(path.read_bytes()[:-200])


def bit_flipped(path: Path) -> None:
    np.savez_compressed(path, allow_pickle=False, **good_arrays())
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)


@pytest.mark.parametrize(
    "write",
    [
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive"),
        lambda path: path.write_bytes(pickle.dumps(good_arrays())),
        lone_array,
        cut_short,
        bit_flipped,
    ],
    ids=["missing", "folder", "empty", "text", "pickle", "npy", "cut short", "bit flipped"],
)
def test_a_file_that_is_no_npz_is_refused_by_name(tmp_path: Path, write: Callable[[Path], None]) -> None:
    path = tmp_path / "x.npz"
    write(path)
    with pytest.raises(ConfigError, match=r"x\.npz (cannot be read|holds one lone array).*numpy\.savez"):
        load(f"npz:{path}", RGB32, 10)


def test_threads_read_npz_files_at_once(tmp_path: Path) -> None:
    """In a Python whose parser is not for two threads at once, too: between two objects of what it has parsed
    the collector may run, and here lets the others on (numpy parses the header of each array)."""
    sets = {"images": some_images(2, 8, 8), "labels": np.zeros(2, int)}
    np.savez(
        tmp_path / "x.npz", **{f"{part}_{key}": x for part in ("train", "test") for key, x in sets.items()}
    )

    def lets_others_on(*_: object) -> None:
        time.sleep(0)

    threshold = gc.get_threshold()
    gc.callbacks.append(lets_others_on)
    gc.set_threshold(20)
    try:
        with ThreadPoolExecutor(4) as pool:
            for done in [pool.submit(load, f"npz:{tmp_path}/x.npz", GREY28, 10) for _ in range(400)]:
                done.result(30)
    finally:
        gc.set_threshold(*threshold)
        gc.callbacks.remove(lets_others_on)


# -- folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Two pictures of each of two classes for training, one for testing, 32x32, told apart by seed."""
    for split, each in (("train", 2), ("test", 1)):
        for label, name in enumerate(("zebra", "ape")):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(each):
                pixels = some_images(1, 32, 32, 3, seed=10 * label + i)[0]
                Image.fromarray(pixels).save(tmp_path / split / name / f"{i}.png")
    (tmp_path / "train" / "ape" / "notes.txt").write_text("not a picture")
    return tmp_path


def test_folder(pictures: Path) -> None:
    train, test = load(f"folder:{pictures}", RGB32, 10)
    assert train.names == ("ape", "zebra")
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 0, 1, 1], [0, 1])
    for image, seed in zip(train.inputs, (10, 11, 0, 1), strict=True):
        np.testing.assert_array_equal(image.permute(1, 2, 0).numpy(), some_images(1, 32, 32, 3, seed=seed)[0])


@pytest.mark.parametrize("image", [(1, 8, 8), (3, 48, 20)])
def test_pictures_are_scaled_to_the_run(pictures: Path, image: tuple[int, int, int]) -> None:
    Image.new("L", (100, 50), 77).save(pictures / "test" / "ape" / "0.png")
    train, test = load(f"folder:{pictures}", image, 2)
    assert train.inputs.shape == (4, *image)
    assert test.inputs[0].unique().tolist() == [77]


def test_a_class_in_only_one_half_is_refused(pictures: Path) -> None:
    (pictures / "test" / "cow").mkdir()
    with pytest.raises(ConfigError, match="only one of train/ and test/ has cow"):
        load(f"folder:{pictures}", RGB32, 10)


def test_a_bad_folder_is_refused_by_name(pictures: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere/train cannot be read .*train/ and test/"):
        load(f"folder:{pictures}/nowhere", RGB32, 10)
    with pytest.raises(ConfigError, match=r"run takes 2x32x32; .*--image 3 32 32"):
        load(f"folder:{pictures}", (2, 32, 32), 10)
    for name in ("ape", "zebra"):
        (pictures / "test" / name / "0.png").unlink()
    with pytest.raises(ConfigError, match=r"test has no pictures; put \.bmp"):
        load(f"folder:{pictures}", RGB32, 10)


def test_a_bad_picture_is_refused_by_name(pictures: Path) -> None:
    file = pictures / "train" / "ape" / "1.png"
    file.write_bytes(file.read_bytes()[:500])
    with pytest.raises(ConfigError, match=r"ape/1\.png is no readable picture"):
        load(f"folder:{pictures}", RGB32, 10)
    Image.fromarray(np.full((32, 32), 40_000, np.uint16)).save(file)
    with pytest.raises(ConfigError, match=r"ape/1\.png has more than 8 bits a channel"):
        load(f"folder:{pictures}", RGB32, 10)


# -- the public sets, from archives made here and served on loopback


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """The address at which tmp_path is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def idx_folder(folder: Path) -> Arrays:
    """The four files of a tiny Fashion-MNIST, and what is in them."""
    folder.mkdir(parents=True)
    arrays: Arrays = {}
    for split, stem, count in (("train", "train", 20), ("test", "t10k", 10)):
        arrays[f"{split}_images"] = some_images(count, 28, 28)
        arrays[f"{split}_labels"] = np.arange(count, dtype=np.uint8) % 10
        for kind in ("images-idx3", "labels-idx1"):
            array = arrays[f"{split}_{kind[:6]}"]
            header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{stem}-{kind}-ubyte.gz").write_bytes(gzip.compress(header + array.tobytes()))
    return arrays


def test_fashion_mnist_of_the_debian_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = idx_folder(tmp_path / "deb")
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "deb")
    train, test = load("fashion-mnist", GREY28, 10)
    np.testing.assert_array_equal(train.inputs[:, 0].numpy(), arrays["train_images"])
    np.testing.assert_array_equal(test.labels.numpy(), arrays["test_labels"])
    assert train.names[9] == "Ankle boot"
    file = tmp_path / "deb" / "t10k-images-idx3-ubyte.gz"
    for content in (b"", b"text", gzip.compress(b""), gzip.compress(b"\0\0\x08\x01\0\0\0\x09"), None):
        file.unlink() if content is None else file.write_bytes(content)
        with pytest.raises(ConfigError, match=r"t10k-images-idx3-ubyte\.gz is no idx file"):
            load("fashion-mnist", GREY28, 10)


def test_fashion_mnist_downloaded_once(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import FashionMNIST

    arrays = idx_folder(tmp_path / "web")
    resources = [(file.name, md5(file)) for file in (tmp_path / "web").iterdir()]
    monkeypatch.setattr(FashionMNIST, "resources", resources)
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{web}/web/"])
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "no deb")
    monkeypatch.setenv("DSL_DATA", str(tmp_path / "cache"))
    for _ in range(2):
        train, _ = load("fashion-mnist", GREY28, 10)
        np.testing.assert_array_equal(train.inputs[:, 0].numpy(), arrays["train_images"])
        monkeypatch.setattr(FashionMNIST, "mirrors", ["file:///nowhere/"])


def cifar10_archive(folder: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> Arrays:
    """Lets torchvision's CIFAR-10 be a tiny archive; gives its pixels as (N, 3, 32, 32)."""
    from torchvision.datasets import CIFAR10

    inner = folder / "cifar-10-batches-py"
    inner.mkdir()
    pixels = {"data_batch_1": some_images(10, 3, 32, 32), "test_batch": some_images(5, 3, 32, 32)}
    for name, images in pixels.items():
        labels = [i % 10 for i in range(len(images))]
        (inner / name).write_bytes(pickle.dumps({"data": images.reshape(-1, 3072), "labels": labels}))
    (inner / "batches.meta").write_bytes(pickle.dumps({"label_names": list("abcdefghij")}))
    with tarfile.open(folder / "c.tar.gz", "w:gz") as tar:
        tar.add(inner, inner.name)
    changes = {
        "url": f"{web}/c.tar.gz",
        "tgz_md5": md5(folder / "c.tar.gz"),
        "train_list": [["data_batch_1", md5(inner / "data_batch_1")]],
        "test_list": [["test_batch", md5(inner / "test_batch")]],
        "meta": CIFAR10.meta | {"md5": md5(inner / "batches.meta")},
    }
    for name, value in changes.items():
        monkeypatch.setattr(CIFAR10, name, value)
    return pixels


def test_cifar10_through_torchvision(tmp_path: Path, web: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels = cifar10_archive(tmp_path, web, monkeypatch)
    monkeypatch.setenv("DSL_DATA", str(tmp_path / "cache"))
    train, test = load("cifar10", RGB32, 10)
    np.testing.assert_array_equal(train.inputs.numpy(), pixels["data_batch_1"])
    np.testing.assert_array_equal(test.inputs.numpy(), pixels["test_batch"])
    assert test.labels.tolist() == [0, 1, 2, 3, 4]
    assert train.names == tuple("abcdefghij")


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_failed_download_names_the_remedy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchvision import datasets

    for kind in (datasets.CIFAR10, datasets.CIFAR100):
        monkeypatch.setattr(kind, "url", "file:///nowhere/x.tar.gz")
    monkeypatch.setattr(datasets.FashionMNIST, "mirrors", ["file:///nowhere/"])
    monkeypatch.setattr(sources, "FASHION_MNIST", tmp_path / "no deb")
    monkeypatch.setenv("DSL_DATA", str(tmp_path / "cache"))
    with pytest.raises(ConfigError, match=f"{name} is not in {tmp_path}/cache .*set DSL_DATA") as error:
        load(name, RGB32, 100)
    assert "\n" not in str(error.value)


def test_two_processes_do_not_download_at_once(tmp_path: Path) -> None:
    entered = threading.Event()

    def second() -> None:
        with sources._alone(tmp_path):
            entered.set()

    with sources._alone(tmp_path):
        thread = threading.Thread(target=second)
        thread.start()
        assert not entered.wait(0.1)
    assert entered.wait(10)
    thread.join()


# -- who gets what

SCHEMES = st.sampled_from(["iid", "dirichlet:0.01", "dirichlet:0.5", "dirichlet:1000"])


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 150), st.integers(1, 12), st.integers(1, 12), SCHEMES, st.integers(0, 2**40))
def test_every_sample_goes_to_exactly_one_client(
    samples: int, classes: int, clients: int, scheme: str, seed: int
) -> None:
    labels = torch.from_numpy(np.random.default_rng(seed).integers(0, classes, samples))
    clients = min(clients, samples)
    parts = partition(labels, scheme, clients, seed)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts).tolist()) == list(range(samples))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= min(10, samples // clients)
    if scheme == "iid":
        assert max(sizes) - min(sizes) <= 1
    again = partition(labels, scheme, clients, seed)
    assert all(np.array_equal(one, other) for one, other in zip(parts, again, strict=True))


def skew(labels: Tensor, parts: list[Any]) -> float:
    """Mean over clients of the total variation from the even class mix: 0 even, near 1 one class."""
    shares = [torch.bincount(labels[part], minlength=10) / len(part) for part in parts]
    return float(torch.stack([(share - 0.1).abs().sum() / 2 for share in shares]).mean())


def test_a_smaller_alpha_is_more_uneven(sample: tuple[Dataset, Dataset]) -> None:
    labels = sample[0].labels
    schemes = ("dirichlet:0.1", "dirichlet:1", "dirichlet:100", "iid")
    skews = [skew(labels, partition(labels, scheme, 10, seed=0)) for scheme in schemes]
    assert skews[0] > 0.5 > skews[1] > 0.15 > skews[2]
    assert max(skews[2:]) < 0.1


def test_another_seed_deals_otherwise() -> None:
    labels = torch.arange(100) % 10
    for scheme in ("iid", "dirichlet:1"):
        one, other = (partition(labels, scheme, 2, seed)[0] for seed in (0, 1))
        assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("scheme", "message"),
    [
        ("even", "unknown partition 'even'; use iid or dirichlet:ALPHA"),
        ("iid:3", "unknown partition 'iid:3'"),
        ("dirichlet", "unknown partition 'dirichlet'"),
        *((f"dirichlet:{a}", f"'dirichlet:{a}' needs") for a in ("", "x", "0", "-1", "nan", "inf", "1e9")),
    ],
)
def test_a_bad_partition_is_refused_by_name(scheme: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        partition(torch.zeros(10, dtype=torch.int64), scheme, 2, 0)


@pytest.mark.parametrize("clients", [0, 4])
def test_more_clients_than_samples_are_refused(clients: int) -> None:
    with pytest.raises(ConfigError, match=f"3 training samples cannot serve {clients} clients"):
        partition(torch.zeros(3, dtype=torch.int64), "iid", clients, 0)


# -- crops and flips


def variants(image: np.ndarray[Any, Any]) -> Iterator[np.ndarray[Any, Any]]:
    """Every crop of one (C, H, W) image in its frame of zeros, as it is and flipped."""
    channels, height, width = image.shape
    frame = np.zeros((channels, height + 2 * MARGIN, width + 2 * MARGIN), image.dtype)
    frame[:, MARGIN : MARGIN + height, MARGIN : MARGIN + width] = image
    for top in range(2 * MARGIN + 1):
        for left in range(2 * MARGIN + 1):
            crop = frame[:, top : top + height, left : left + width]
            yield crop
            yield crop[:, :, ::-1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_a_crop_and_flip_is_one_of_the_same_sample(dtype: torch.dtype) -> None:
    images = torch.from_numpy(some_images(40, 3, 6, 5)).to(dtype)
    results = crop_and_flip(images, MARGIN, torch.Generator().manual_seed(3))
    for image, result in zip(images, results, strict=True):
        assert result.dtype == dtype
        assert any(np.array_equal(result.numpy(), possible) for possible in variants(image.numpy()))


def test_each_sample_draws_its_own_and_every_variant_is_reached() -> None:
    image = torch.from_numpy(some_images(1, 1, 6, 6) | 1)  # no zeros: all variants differ
    found = crop_and_flip(image.expand(4000, -1, -1, -1), MARGIN, torch.Generator().manual_seed(0))
    counts: dict[bytes, int] = {}
    for result in found:
        counts[result.numpy().tobytes()] = counts.get(result.numpy().tobytes(), 0) + 1
    assert counts.keys() == {possible.tobytes() for possible in variants(image[0].numpy())}
    assert len(counts) == 162
    assert max(counts.values()) < 60  # 24.7 are due to each: about equally likely


def test_crops_and_flips_are_a_function_of_the_generator() -> None:
    images = torch.from_numpy(some_images(16, 3, 8, 8))
    one, same, other = (crop_and_flip(images, MARGIN, torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_every_batch_can_be_had_once_as_it_is() -> None:
    made = batches(augment=True)
    assert [len(y) for _, y in made.plain()] == [made.size(index) for index in range(len(made))]
    x, y = (torch.cat(tensors) for tensors in zip(*made.plain(), strict=True))
    assert torch.equal(x, normalise(numbered().inputs))
    assert torch.equal(y, numbered().labels)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_gets_the_same_batches() -> None:
    for (x, y), (x_gpu, y_gpu) in zip(
        batches(augment=True).epoch(1), batches(augment=True, device="cuda").epoch(1), strict=True
    ):
        assert x_gpu.is_cuda
        assert torch.equal(y, y_gpu.cpu())
        torch.testing.assert_close(x, x_gpu.cpu(), rtol=0, atol=1e-6)


# -- batches


def numbered(samples: int = 50) -> Dataset:
    """Samples whose label is their number, so that a batch tells which it has."""
    images = torch.from_numpy(some_images(samples, 3, 8, 8))
    return Dataset(images, torch.arange(samples), samples)


def batches(
    indices: Any = None,
    size: int = 8,
    seed: int = 0,
    client: int = 0,
    augment: bool = False,
    shuffle: bool = True,
    device: str = "cpu",
) -> Batches:
    place = torch.device(device)
    return Batches(
        numbered(), indices, size, seed=seed, client=client, augment=augment, shuffle=shuffle, device=place
    )


def order(made: Batches, epoch: int) -> list[int]:
    return torch.cat([y for _, y in made.epoch(epoch)]).tolist()


def pixels(made: Batches, epoch: int, start: int = 0) -> Tensor:
    return torch.cat([x for x, _ in made.epoch(epoch, start)])


def test_an_epoch_goes_over_each_sample_once() -> None:
    mine = np.array([3, 4, 9, 20, 21, 22, 23, 31, 40, 41, 49])
    made = batches(mine, size=5)
    assert (made.samples, len(made)) == (11, 3)
    got = list(made.epoch(0))
    assert [len(y) for _, y in got] == [5, 5, 1]  # the short one is kept
    assert sorted(order(made, 0)) == mine.tolist()
    for x, y in got:
        assert (x.dtype, y.dtype) == (torch.float32, torch.int64)
        assert torch.equal(x, normalise(numbered().inputs[y]))


@pytest.mark.parametrize("samples", [0, 1, 7, 8, 9])
def test_there_are_as_many_batches_as_said(samples: int) -> None:
    made = batches(np.arange(samples))
    assert (len(made), made.samples) == (len(list(made.epoch(0))), samples)


def test_without_shuffle_the_order_is_the_data_set_s() -> None:
    assert order(batches(shuffle=False), 0) == order(batches(shuffle=False), 5) == list(range(50))


def test_order_is_a_function_of_seed_client_and_epoch() -> None:
    first = order(batches(), 1)
    assert first == order(batches(), 1)
    others = [order(batches(), 2), order(batches(seed=1), 1), order(batches(client=1), 1)]
    assert all(first != other for other in others)
    assert order(batches(augment=True), 1) == first


def test_crops_are_a_function_of_seed_client_and_epoch() -> None:
    first = pixels(batches(augment=True, shuffle=False), 1)
    assert torch.equal(first, pixels(batches(augment=True, shuffle=False), 1))
    for seed, client, epoch in ((0, 0, 2), (1, 0, 1), (0, 1, 1)):
        other = batches(seed=seed, client=client, augment=True, shuffle=False)
        assert not torch.equal(first, pixels(other, epoch))


def test_each_batch_draws_crops_of_its_own() -> None:
    twice = torch.from_numpy(some_images(8, 3, 8, 8)).repeat(2, 1, 1, 1)  # two equal batches
    dataset = Dataset(twice, torch.arange(16), 16)
    made = Batches(dataset, None, 8, seed=0, augment=True, shuffle=False, device=CPU)
    (one, _), (other, _) = made.epoch(0)
    assert not torch.equal(one, other)


def test_an_epoch_can_be_taken_up_at_any_batch() -> None:
    whole = pixels(batches(augment=True), 3)
    for start in range(len(batches()) + 1):
        rest = [x for x, _ in batches(augment=True).epoch(3, start)]
        assert torch.equal(torch.cat([whole[: 8 * start], *rest]), whole)


def test_normalise_is_the_same_for_everyone() -> None:
    bytes_ = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    torch.testing.assert_close(normalise(bytes_).flatten(), torch.tensor([-2.0, -1.2, 2.0]))
