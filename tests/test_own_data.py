"""Data of any kind: torch Datasets by name or as objects, npz of other inputs; judged right after Join."""

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import TensorDataset

from common.ended import Ended
from common.errors import ClosedError, ConfigError, RefusedError, SplitLearningError
from common.methods import build_method
from common.nets.cut import build
from common.parts import client_part
from common.run import Run
from common.wire import split_learning_pb2 as pb
from dsl_client import samples
from dsl_client.batches import Batches, limited, normalise
from dsl_client.client import Client
from dsl_client.data import Dataset, load
from dsl_client.datasets import read_pair
from dsl_client.sources import is_own
from dsl_server.rounds import Rounds
from dsl_server.server import Server
from tests import own
from tests.federation import CPU, serving, small_run
from tests.ordinary import DEADLINE_S, Ordinary, member, refused
from tests.own import Made
from tests.test_evaluation import Code
from tests.test_rounds import joined

pytestmark = pytest.mark.timeout(60)

ROWS = {"model": "tests.own:rows", "cut": "first"}
TOKENS = {"model": "tests.networks:text", "cut": "encoder.layers.0"}


# ---------------------------------------------------------------- two Datasets, read


def test_each_item_is_asked_for_once_and_in_order() -> None:
    train, test = own.sums()
    raw = read_pair("here", (train, test))
    assert (train.asked, test.asked) == (list(range(96)), list(range(32)))
    np.testing.assert_array_equal(raw.arrays["train_inputs"], train.x.numpy())
    np.testing.assert_array_equal(raw.arrays["test_labels"], test.y.numpy())
    assert raw.names == ()


@pytest.mark.parametrize(
    "y",
    [[0, 1, 1], torch.tensor([0, 1, 1]), np.array([0, 1, 1], np.uint8), [torch.tensor(i) for i in (0, 1, 1)]],
)
def test_classes_come_as_numbers_of_python_numpy_or_torch(y: Any) -> None:
    pair = Made(np.ones((3, 6), np.float32), y), Made(torch.ones(3, 6), [1, 0, 0])
    train, test = load(pair, (6,), 2)
    assert (train.labels.tolist(), test.labels.tolist()) == ([0, 1, 1], [1, 0, 0])
    assert train.labels.dtype == torch.int64


def test_torchs_own_datasets_do() -> None:
    pair = TensorDataset(torch.ones(4, 6), torch.arange(4)), TensorDataset(torch.ones(2, 6), torch.arange(2))
    assert len(load(pair, (6,), 4)[0]) == 4


def test_images_are_bytes_and_are_fitted_to_the_run() -> None:
    train, _ = load("tests.own:pictures", (3, 10, 8), 4)
    given = own.pictures()[0].x
    assert train.names == ("cat", "dog", "owl", "wolf")
    assert torch.equal(train.inputs[:, :, 1:9], given)
    assert not train.inputs[:, :, [0, 9]].any()


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_pictures_are_images(mode: str) -> None:
    """As a data set of torchvision's gives them, where nobody has them transformed."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 4, *([3] if mode == "RGB" else [])), np.uint8)
    pictures = [(Image.fromarray(each), index % 2) for index, each in enumerate(pixels)]
    train, _ = load((pictures, pictures[:2]), (3, 5, 4), 2)
    stacked = torch.from_numpy(pixels if mode == "RGB" else pixels[..., None].repeat(3, axis=3))
    assert torch.equal(train.inputs, stacked.permute(0, 3, 1, 2))
    assert train.labels.tolist() == [0, 1, 0, 1, 0, 1]


class Short(Made):
    def __init__(self, length: Any) -> None:
        super().__init__([], [])
        self.length = length

    def __len__(self) -> int:
        return int(self.length)


class Raising(Made):
    def __getitem__(self, index: int) -> Any:
        raise KeyError(f"patient {index}\nof ward 7")


GOOD = Made(torch.ones(2, 6), [0, 1])


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (GOOD, "here: gives of type Made; it must give a pair of Datasets: train, test"),
        (None, "here: gives None; it must give a pair"),
        ((GOOD,), "here: gives of type tuple; it must give a pair"),
        ((GOOD, [].__iter__()), "here: the test set is of type list_iterator; it must be map-style"),
        ((GOOD, Made([], [])), "here: the test set is empty; it must have at least one item"),
        ((GOOD, Short("x")), "here: the test set: its code failed: ValueError: invalid literal"),
        ((Raising([1, 2], [1, 2]), GOOD), "the train set: item 0: its code failed: KeyError: 'patient 0"),
        ((GOOD, [torch.ones(6)]), "here: the test set: item 0 is of type Tensor; give each item"),
        ((Made(["a", "b"], [0, 1]), GOOD), "the train set: item 0 has of type str; give each item"),
        (
            (Made([torch.ones(6), torch.ones(5)], [0, 1]), GOOD),
            r"the train set: x of item 1 is float32 \[5\], and that of item 0 float32 \[6\]; make all alike",
        ),
        (
            (Made(torch.ones(2, 6), [0, 0.5]), GOOD),
            r"y of item 1 is float32 \[\], and that of item 0 int64 \[\]",
        ),
    ],
)
def test_what_are_no_data_sets_is_refused_by_name(pair: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        read_pair("here", pair)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("source", "own_code"),
    [
        ("tests.own:sums", True),
        ("mine:sets", True),
        ("npz:sets", False),
        ("folder:sets", False),
        ("cifar10:x", False),
        ("sample", False),
        ("mine:/sets", False),
    ],
)
def test_a_function_is_told_from_a_file(source: str, own_code: bool) -> None:
    assert is_own(source) is own_code


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("tests.own:summs", "--data tests.own:summs: tests.own has no function 'summs'; did you mean 'sums'"),
        (
            "tests.owns:sums",
            "--data tests.owns:sums: no module named 'tests.owns' here: install it, or put its",
        ),
        ("tests.own:breaks", "--data tests.own:breaks: its code failed: OSError: no such folder: /data$"),
        ("tests.own:not_a_pair", "--data tests.own:not_a_pair: gives of type Made; it must give a pair"),
    ],
)
def test_a_function_that_gives_no_data_is_named(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(source, (6,), 4)


# ---------------------------------------------------------------- what suits the run, and what does not


def pair_of(x: Any, y: Any) -> tuple[Made, Made]:
    return Made(x, y), Made(x, y)


FLOATS, INTS = torch.float32, torch.int64


@pytest.mark.parametrize(
    ("x", "shape", "dtype", "words"),
    [
        (
            torch.ones(2, 5),
            (6,),
            FLOATS,
            r"train_inputs is float32 \[5\], and the network takes float32 \[6\]: giv",
        ),
        (torch.ones(2, 6), (6,), INTS, r"train_inputs is float32 \[6\], and the network takes int64 \[6\]"),
        (
            torch.ones(2, 6).long(),
            (6,),
            FLOATS,
            r"is int64 \[6\], and the network takes float32 \[6\]: give it",
        ),
        (
            torch.ones(2, 6).byte(),
            (6,),
            FLOATS,
            r"is uint8 \[6\], and the network takes float32 \[6\]: give it",
        ),
        (
            torch.ones(2, 3, 8, 8),
            (3, 9, 9),
            FLOATS,
            r"takes float32 \[3, 9, 9\], or images as uint8: give it",
        ),
        (
            torch.ones(2, 3, 8, 8).byte(),
            (6,),
            FLOATS,
            r"is uint8 \[3, 8, 8\], and the network takes float32 \[6\]",
        ),
        (torch.ones(2, 3, 9, 9).byte(), (3, 8, 8), FLOATS, "the images are 3x9x9 but the run takes 3x8x8"),
        (
            torch.ones(2, 6).double(),
            (6,),
            FLOATS,
            r"train_inputs are float64 of shape \(2, 6\); give them as float32",
        ),
        (torch.ones(2), (), FLOATS, r"train_inputs are float32 of shape \(2,\); give them as"),
        (
            torch.tensor([[1.0], [float("nan")]]),
            (1,),
            FLOATS,
            "train_inputs have values that are not finite; mend",
        ),
    ],
)
def test_inputs_that_the_network_does_not_take(
    x: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype, words: str
) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        load(pair_of(x, [0, 1]), shape, 2, dtype)
    assert str(refused.value).startswith("the ")


@pytest.mark.parametrize(
    ("y", "numbers", "words"),
    [
        ([0, 2], 0, "the data given has 3 classes but the run has 2; start the server with --classes 3"),
        ([0, -1], 0, "train_labels run from -1 to 0; count from 0"),
        (
            [[0.5], [1.0]],
            0,
            r"train_labels are float32 of shape \(2, 1\); .*start the server with --targets float:1",
        ),
        ([0, 1], 1, r"train_labels are int64 of shape \(2,\); give 1 a sample as float32: shape \(2, 1\)"),
        ([[0.5], [1.0]], 2, r"are float32 of shape \(2, 1\); give 2 a sample as float32: shape \(2, 2\)"),
        ([[0.5], [float("nan")]], 1, "train_labels have values that are not finite; mend the data"),
        ([[0.5], [float("inf")]], 1, "train_labels have values that are not finite; mend the data"),
    ],
)
def test_labels_that_are_not_the_runs(y: Any, numbers: int, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        load(pair_of(torch.ones(2, 6), torch.tensor(y)), (6,), 2, numbers=numbers)


def test_numbers_may_be_doubles_and_one_a_sample_may_stand_alone() -> None:
    train, _ = load(pair_of(torch.ones(2, 6), torch.tensor([0.5, 1.5]).double()), (6,), 2, numbers=1)
    assert train.labels.tolist() == [[0.5], [1.5]]
    assert (train.labels.dtype, train.classes) == (torch.float32, 0)


def test_an_npz_has_tokens_or_numbers_as_inputs(tmp_path: Path) -> None:
    tokens, labels = np.arange(24).reshape(4, 6), np.array([0, 1, 1, 0])
    arrays = {
        f"{split}_{kind}": a
        for split in ("train", "test")
        for kind, a in (("inputs", tokens), ("labels", labels))
    }
    np.savez(tmp_path / "set.npz", allow_pickle=False, **arrays, classes=np.array(["ham", "spam"]))
    source = f"npz:{tmp_path / 'set.npz'}"
    train, test = load(source, (6,), 2, torch.int64)
    np.testing.assert_array_equal(train.inputs.numpy(), tokens)
    assert (test.labels.tolist(), test.names) == ([0, 1, 1, 0], ("ham", "spam"))
    with pytest.raises(ConfigError, match=r"set.npz: one sample of train_inputs is int64"):
        load(source, (3, 32, 32), 2)
    del arrays["test_inputs"]
    np.savez(tmp_path / "set.npz", allow_pickle=False, **arrays)
    with pytest.raises(ConfigError, match=r"set.npz has no test_inputs; write one"):
        load(source, (6,), 2, torch.int64)


def test_pictures_are_not_for_a_network_of_rows(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"folder:.* has pictures, and the network takes \[6\]; give other --data"
    ):
        load(f"folder:{tmp_path}", (6,), 2)
    with pytest.raises(
        ConfigError, match=r"sample: one sample of train_images is uint8 \[1, 28, 28\], and the"
    ):
        load("sample", (6,), 10)


# ---------------------------------------------------------------- in batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_what_is_no_image_comes_as_it_is_whatever_augments(dtype: torch.dtype) -> None:
    x = torch.arange(48).reshape(8, 6).to(dtype)
    batches = Batches(Dataset(x, torch.arange(8), 8), None, 3, seed=0, augment=True, device=CPU)
    for each, y in [*batches.epoch(0), *batches.plain()]:
        assert each.dtype == dtype
        assert torch.equal(each, x[y])


def test_images_of_floats_are_neither_cropped_nor_normalised() -> None:
    x = torch.randn(4, 3, 8, 8)
    batches = Batches(Dataset(x, torch.arange(4), 4), None, 4, seed=0, augment=True, device=CPU)
    ((each, y),) = batches.epoch(0)
    assert torch.equal(each, x[y])


def test_a_limit_draws_inputs_with_their_labels() -> None:
    x = torch.arange(20).reshape(20, 1)
    some = limited(Dataset(x, torch.arange(20), 20), 5, seed=0)
    assert torch.equal(some.inputs[:, 0], some.labels)
    assert len(some) == 5
    assert normalise(torch.zeros(1, 1, 1, 1).byte()).item() == -2


# ---------------------------------------------------------------- at Join


def run_of(**settings: Any) -> Run:
    defaults = {**ROWS, "data": "tests.own:sums", "targets": "float:2", "loss": "mse", "metric": "mse"}
    return small_run(**{**defaults, "split": "m", "batch_size": 16, **settings})


@contextlib.contextmanager
def a_client(server: Server, name: str = "ward", **settings: Any) -> Iterator[Client]:
    """Joined. Told of a failure, as the program tells it."""
    client = Client(f"127.0.0.1:{server.port}", name, CPU, **settings)
    failure: SplitLearningError | str = ""
    try:
        client.join(patience=10)
        yield client
    except SplitLearningError as error:
        failure = error
        raise
    finally:
        client.close(failure)


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_numbers_are_learned_of_rows_by_clients_with_data_of_their_own(method: str, tmp_path: Path) -> None:
    """One names its data, the other gives objects; the sums of six numbers are linear, and so are learned."""
    run = run_of(method=method, clients=2, partition="own", sync="average", epochs=40, lr=0.05)

    def train(index: int) -> None:
        given = {"source": (own.linear(96, 2), own.linear(32, 3))} if index else {}
        allow = ["tests.own:rows", "tests.own:sums"]
        with a_client(server, f"ward-{index}", allow=allow, **given) as client:
            client.train(tmp_path / f"client-{index}")

    with serving(run, tmp_path) as server:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(train, range(2)))
        assert server.wait(timeout=10)
        summary = server.finish()
    lines = [json.loads(line) for line in (tmp_path / "server/metrics.jsonl").read_text().splitlines()]
    first, last = lines[0]["test"]["metric"]["joined"], lines[-1]["test"]["metric"]["joined"]
    assert last < first / 4
    assert summary["test"]["metric"]["name"] == "mse"
    told = [json.loads(line) for line in (tmp_path / "client-0/metrics.jsonl").read_text().splitlines()]
    assert told[-1]["metric"] == "mse"
    assert (told[-1]["alone"] is None) == (method == "csl")


CONSENTS: tuple[tuple[list[str], str], ...] = (
    (
        [],
        "--model tests.own:rows, .* with --allow tests.own:rows tests.own:top_2 tests.own:sums$",
    ),
    (["tests.own:rows"], "--metric tests.own:top_2, and it is not for a server to say which code runs here"),
    (["tests.own:rows", "tests.own:top_2"], "--data tests.own:sums, and it is not for a server to say"),
)


@pytest.mark.parametrize(("allow", "words"), CONSENTS)
def test_code_that_a_client_does_not_name_it_does_not_run(
    allow: list[str], words: str, tmp_path: Path
) -> None:
    run = run_of(metric="tests.own:top_2", targets="classes", loss="cross-entropy")
    with (
        serving(run, tmp_path) as server,
        pytest.raises(ConfigError, match=words),
        a_client(server, allow=allow) as client,
    ):
        client.train(tmp_path / "client")


def test_data_that_a_client_names_itself_it_need_not_allow(tmp_path: Path) -> None:
    run = run_of(epochs=1)
    with serving(run, tmp_path) as server:
        with a_client(server, allow=["tests.own:rows"], source="tests.own:sums") as client:
            client.train(tmp_path / "client")
        assert server.wait(timeout=10)


WRONG: tuple[tuple[dict[str, Any], Callable[[], Any], str], ...] = (
    ({}, lambda: pair_of(torch.ones(4, 5), torch.ones(4, 2)), r"the network takes float32 \[6\]"),
    ({}, lambda: pair_of(torch.ones(4, 6), torch.ones(4, 3)), "start the server with other --targets"),
    ({}, lambda: pair_of(torch.ones(4, 6), torch.full((4, 2), torch.nan)), "not finite; mend the data"),
    (
        {},
        lambda: (Raising([1], [1]), GOOD),
        "the data given: the train set: item 0: its code failed: KeyError",
    ),
    (
        {**TOKENS, "targets": "classes", "loss": "cross-entropy", "metric": "accuracy"},
        lambda: pair_of(torch.full((4, 12), 50), [0, 1, 2, 3]),
        "the network does not take whole numbers from 50 to 50, which the data have: IndexError",
    ),
)


@pytest.mark.parametrize(("settings", "given", "words"), WRONG)
def test_data_that_are_not_the_runs_end_the_client_before_it_trains_and_the_server_is_told(
    settings: dict[str, Any], given: Callable[[], Any], words: str, tmp_path: Path
) -> None:
    run = run_of(**settings)
    with serving(run, tmp_path) as server:
        refusing = pytest.raises(ConfigError, match=words)
        with refusing as refused, a_client(server, allow=[run.model], source=given()) as client:
            client.train(tmp_path / "client")
        assert len(str(refused.value).splitlines()) == 1
        with pytest.raises(ClosedError, match=r"client 0 \(ward\) failed: ..*" + words):
            server.wait(timeout=10)
        assert server.record.samples_trained == 0


# ---------------------------------------------------------------- what the classes are called


def test_clients_whose_classes_have_other_names_are_refused_and_the_server_is_told(tmp_path: Path) -> None:
    run = small_run(clients=2, partition="own", data="folder:there", epochs=1)
    says = (
        r"the classes of client 1 \(ward-b\) are 'cat', 'dog', 'hen', 'wolf', and those of the run "
        r"'cat', 'dog', 'owl', 'wolf', as client 0 \(ward-a\) has them: give every client a folder of"
    )
    with serving(run, tmp_path) as server, member(server, "ward-a") as first:
        first.stub.Describe(
            pb.DescribeRequest(session=first.session, class_names=["cat", "dog", "owl", "wolf"]),
            timeout=DEADLINE_S,
        )
        refusing = pytest.raises(RefusedError, match=says)
        with refusing, a_client(server, "ward-b", source=own.other_pictures()) as client:
            client.train(tmp_path / "client")
        with pytest.raises(ClosedError, match=r"client 1 \(ward-b\) failed: .*the classes of client 1"):
            server.wait(timeout=10)
        assert server.record.samples_trained == 0


def test_folders_of_the_same_names_train_together(tmp_path: Path) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "ward-0" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                Image.new("RGB", (8, 8), (index * 20, 0, 0)).save(folder / f"{index}.png")
    shutil.copytree(tmp_path / "ward-0", tmp_path / "ward-1")
    run = small_run(clients=2, partition="own", data="folder:there", epochs=1, classes=2)

    def train(index: int) -> None:
        with a_client(server, f"ward-{index}", source=f"folder:{tmp_path / f'ward-{index}'}") as client:
            client.train(tmp_path / f"client-{index}")

    with serving(run, tmp_path) as server:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(train, range(2)))
        assert server.wait(timeout=10)


def test_the_names_that_are_told_first_are_the_runs_also_after_a_restart() -> None:
    rounds = Rounds(small_run(clients=3))
    first, second = joined(rounds, "ann"), joined(rounds, "bob")
    rounds.agree(first, ["cat", "dog"])
    rounds.agree(second, ["cat", "dog"])
    tensors, facts = rounds.state()
    again = Rounds(small_run(clients=3), ledger=rounds.ledger)
    again.restore(tensors, json.loads(json.dumps(facts)), [])
    for each in (rounds, again):
        with pytest.raises(
            RefusedError, match=r"client 1 \(bob\) are 'dog', 'cat', .* as client 0 \(ann\) has them"
        ):
            each.agree(second, ["dog", "cat"])


def test_many_long_names_make_a_short_message() -> None:
    rounds = Rounds(small_run(clients=2))
    rounds.agree(joined(rounds, "ann"), ["x" * 1000] * 50)
    with pytest.raises(RefusedError, match="and 42 more") as refused:
        rounds.agree(joined(rounds, "bob"), ["y" * 1000] * 50)
    assert len(str(refused.value)) < 1200


@pytest.mark.parametrize("names", [["a"] * 5, ["a"] * 10_000])
def test_more_names_than_classes_are_refused(names: list[str], tmp_path: Path) -> None:
    def describe(client: Ordinary, class_names: list[str], session: str) -> None:
        client.stub.Describe(pb.DescribeRequest(session=session, class_names=class_names), timeout=DEADLINE_S)

    with serving(small_run(), tmp_path) as server, member(server) as client:
        with refused(Code.INVALID_ARGUMENT, f"names of {len(names)} classes: the run has 4"):
            describe(client, names, client.session)
        with refused(Code.FAILED_PRECONDITION):
            describe(client, ["a"], "0" * 32)
        describe(client, ["a", "b"], client.session)


@pytest.mark.parametrize(
    ("settings", "takes", "words"),
    [
        (
            {"targets": "float:2", "loss": "mse", "metric": "mae"},
            (torch.float32, (3, 8, 8)),
            "learned numbers",
        ),
        ({}, (torch.int64, (12,)), r"takes \[12\], and no pictures"),
    ],
)
def test_pictures_are_predicted_by_classifiers_of_pictures_alone(
    settings: dict[str, Any], takes: tuple[torch.dtype, tuple[int, ...]], words: str, tmp_path: Path
) -> None:
    run = small_run(**settings)
    method, net = build_method(run), replace(build(run), takes=takes)
    ended = Ended(tmp_path, run, method, net, (4,), client_part(run, method, net, CPU), "")
    with pytest.raises(ConfigError, match=words):
        samples.of_pictures([tmp_path], ended, 4, CPU)
