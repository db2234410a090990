"""What of each method crosses a real wire, in bytes worked by hand; and where no label does.

ResNet-8 on 8x8 images, cut after its first block: z is 16 x 8 x 8, u (what the last layers take) 64 x 2 x 2.
Two clients of 60 and 26 samples have 8 and 4 batches of 8 an epoch, the last ones of 4 and 2.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from common.meter import Direction, Traffic
from common.run import Run
from common.wire.rpc import Rpc
from tests.federation import Batches, federation, small_run

Z, U = 16 * 8 * 8 * 4, 64 * 2 * 2 * 4  # bytes of one sample
HEAD = (16 * 4 + 4) * 4  # bytes: pool, and one linear layer to 4 classes
# Stem and first block: three convolutions, and three BatchNorms of 4 vectors and a counter of 8 bytes.
BOTTOM = (3 * 16 * 9 + 2 * 16 * 16 * 9 + 3 * 4 * 16) * 4 + 3 * 8
TOP = ((16 + 32) * 32 * 9 + (32 + 64) * 64 * 9 + 2 * 4 * (32 + 64) + 64 * 4 + 4) * 4 + 4 * 8
SAMPLES = (60, 26)


class Wire:
    """Every message that was written, as bytes."""

    def __init__(self) -> None:
        self.messages: list[tuple[str, Direction, bytes]] = []

    def bytes_of(self, direction: Direction, rpc: str = "") -> list[bytes]:
        return [raw for name, way, raw in self.messages if way == direction and rpc in ("", name)]


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    wire, writing = Wire(), Traffic.writing

    def recording(traffic: Traffic, rpc: Rpc, direction: Direction, write: Any) -> Any:
        def recorded(message: Any) -> bytes:
            raw: bytes = write(message)
            wire.messages.append((rpc.name, direction, raw))
            return raw

        return writing(traffic, rpc, direction, recorded)

    monkeypatch.setattr(Traffic, "writing", recording)
    return wire


def travelled(run: Run, folder: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes up and bytes down, by kind."""
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate(SAMPLES)]
    _, _, summary = federation(run, folder, data)
    return summary["wire"]["up"], summary["wire"]["down"]


def two(method: str, *settings: str, **others: Any) -> Run:
    return small_run(method=method, method_arg=settings, clients=2, **others)


# ---------------------------------------------------------------- local losses


@pytest.mark.parametrize(
    "run",
    [
        two("dsl"),
        two("dsl", model="resnet14", split="2", client_modules=2, server_modules=3),
        two("dsl", sync="average"),
        two("cse-fsl"),
        two("ampere"),
    ],
    ids=["dsl", "modules", "average", "cse-fsl", "ampere"],
)
def test_in_training_nothing_comes_down_but_averages(run: Run, wire: Wire, tmp_path: Path) -> None:
    up, down = travelled(run, tmp_path)
    assert down["gradients"] == 0
    assert down["activations"] == 0
    assert down["weights"] == up["weights"]
    assert wire.bytes_of("down", "Train") == []
    receipts = wire.bytes_of("down", "StreamActivations")
    assert max(map(len, receipts)) < 8, "each the number of a batch"


@pytest.mark.parametrize("epochs", [1, 3])
def test_ampere_sends_each_sample_once_however_many_epochs(epochs: int, tmp_path: Path) -> None:
    up, _ = travelled(two("ampere", "server_epochs=2", epochs=epochs), tmp_path)
    assert up["activations"] == sum(SAMPLES) * Z
    assert up["labels"] == sum(SAMPLES)
    assert up["weights"] == epochs * 2 * (BOTTOM + HEAD)


def test_parts_are_averaged_every_so_many_epochs_and_at_the_end(tmp_path: Path) -> None:
    up, _ = travelled(two("dsl", sync="average", sync_every=2, epochs=5), tmp_path)
    assert up["weights"] == 3 * 2 * (BOTTOM + HEAD), "after epochs 2, 4 and 5"


def test_one_client_alone_sends_no_weights_to_be_averaged(tmp_path: Path) -> None:
    run = small_run(method="ampere", method_arg=("server_epochs=2",))
    _, _, summary = federation(run, tmp_path, [Batches(run, seed=0, samples=20)])
    assert summary["wire"]["up"]["weights"] == summary["wire"]["down"]["weights"] == 0


def test_what_ampere_sends_is_of_images_as_they_are(tmp_path: Path) -> None:
    """The epochs of training are 0 and 1; after them no other one is asked for."""

    class Asked(Batches):
        asked: ClassVar[list[object]] = []

        def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
            self.asked.append(number)
            return super().epoch(number)

        def plain(self) -> Iterator[tuple[Tensor, Tensor]]:
            self.asked.append("plain")
            return super().plain()

    run = small_run(method="ampere", method_arg=("server_epochs=2",))
    federation(run, tmp_path, [Asked(run, seed=0, samples=20)])
    assert [asked for asked in Asked.asked if asked != "plain"] == [0, 1]
    assert Asked.asked[-1] == "plain"


def test_with_lambda_a_gradient_comes_down_for_every_third_batch(wire: Wire, tmp_path: Path) -> None:
    """Of 8 batches for the 1st, 4th and 7th, of 4 for the 1st and the 4th, of 2 samples: 34 samples."""
    up, down = travelled(two("dsl", "lambda_=0.5", "q=3"), tmp_path)
    assert up["activations"] == 2 * sum(SAMPLES) * Z
    assert down["gradients"] == 2 * 34 * Z
    assert down["activations"] == 0
    assert len(wire.bytes_of("down", "Train")) == 2 * 5, "and for the others there is no message"


def test_fsl_sage_sends_every_third_batch_and_gets_a_head_every_second_epoch(tmp_path: Path) -> None:
    up, down = travelled(two("fsl-sage", "q=3", "l=2", epochs=5), tmp_path)
    assert up["activations"] == 5 * 34 * Z
    assert up["labels"] == 5 * 34
    assert up["weights"] == 2 * 5 * BOTTOM
    assert down["weights"] == 2 * (5 * BOTTOM + 2 * HEAD)
    assert down["gradients"] == 0
    assert down["activations"] == 0


# ---------------------------------------------------------------- last layers at the client


def test_of_fedavg_only_weights_travel(wire: Wire, tmp_path: Path) -> None:
    up, down = travelled(two("fedavg", epochs=3), tmp_path)
    assert {kind: up[kind] for kind in ("activations", "labels", "evaluation")} == dict.fromkeys(
        ("activations", "labels", "evaluation"), 0
    )
    assert up["weights"] == down["weights"] == 3 * 2 * (BOTTOM + TOP)
    assert down["gradients"] == 0
    assert {name for name, *_ in wire.messages} == {"Join", "SyncWeights", "Evaluate", "Leave"}


@pytest.mark.parametrize(("learning", "comes_down"), [("csl", Z), ("dsl", 0)])
def test_ushape_sends_activations_and_gradients_both_ways(
    learning: str, comes_down: int, tmp_path: Path
) -> None:
    up, down = travelled(two("ushape", f"learning={learning}"), tmp_path)
    trained = 2 * sum(SAMPLES)
    assert up["activations"] == trained * Z
    assert down["activations"] == up["gradients"] == trained * U
    assert down["gradients"] == trained * comes_down
    assert up["labels"] == up["weights"] == 0


NUMBERS = (torch.uint8, torch.uint16, torch.int32, torch.int64, torch.float32, torch.float64)


def spelt(labels: Tensor) -> Iterator[bytes]:
    """The labels, as whatever numbers they may travel; torch's bytes are little-endian here."""
    for dtype in NUMBERS:
        yield labels.to(dtype).numpy().tobytes()


def leaks(messages: Sequence[bytes], labels: Tensor) -> bool:
    """Whether some message has these labels, or eight of them in a row."""
    return any(word in raw for some in labels.unfold(0, 8, 8) for word in spelt(some) for raw in messages)


@pytest.mark.parametrize(
    ("method", "settings", "expected"),
    [
        ("ushape", ("learning=csl",), False),
        ("ushape", ("learning=dsl",), False),
        ("fedavg", (), False),
        ("csl", (), True),
    ],
)
def test_labels_are_in_no_byte_that_travels(
    method: str, settings: tuple[str, ...], expected: bool, wire: Wire, tmp_path: Path
) -> None:
    """Eight labels of 200 classes would come about by chance once in 10 ** 18 places. CSL has them."""
    run = small_run(method=method, method_arg=settings, classes=200)
    data = Batches(run, seed=1, samples=44)
    server, _, _ = federation(run, tmp_path, [data])
    for direction in ("up", "down"):
        sizes = map(len, wire.bytes_of(direction))
        assert sum(sizes) == server.traffic.total(direction) > 0, "no message is missing here"
    messages = wire.bytes_of("up") + wire.bytes_of("down")
    assert leaks(messages, data.y) == expected
    assert leaks(messages, Batches(run, seed=99, samples=20).y) == expected, "those of the test set"
