"""Codecs on the wire: what is declared is judged first, sizes are the codec's formula, and chance repeats."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from common.codecs.travel import KINDS, Travel, Way
from common.errors import ConfigError, StepError, WireError
from common.methods import settled
from common.methods.base import Smashed
from common.nets.cut import build
from common.run import Run, defaults_from
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece, decode, encode
from tests.federation import Batches, connect, federation, serving, small_run, train

pytestmark = pytest.mark.timeout(60)

INT4 = BatchSpec((3, 5, 2), 8, 10, travel=Travel.of(["activations=int4", "gradients=fp16"], seed=1))
PLAIN = BatchSpec((3, 5, 2), 8, 10)


def batch(samples: int = 4) -> Smashed:
    g = torch.Generator().manual_seed(0)
    return Smashed(torch.randn(samples, 3, 5, 2, generator=g).relu(), torch.arange(samples))


def sent(spec: BatchSpec, sequence: int = 1, client: int = 0) -> Piece[Any]:
    (piece,) = codec.pack_batch(pb.TrainRequest, sequence, batch(), spec, client)
    return decode(pb.TrainRequest, encode(piece))


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("int4",), "--codec int4: say activations=NAME, gradients=NAME"),
        (("weights=int4",), "--codec weights=int4: say activations=NAME"),
        (("activations=int5",), "codec 'int5': choose fp32, fp16, bf16"),
        (("activations=int4", "activations=int2"), r"--codec activations=\.\.\.: given twice"),
    ],
)
def test_a_wrong_codec_is_refused_before_the_run(settings: tuple[str, ...], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        settled(small_run(codec=settings))


def test_a_file_has_a_table_of_codecs(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('[codec]\nactivations = "int4+zstd"\ngradients = "fp16"\n')
    run = defaults_from(file, None)
    assert run.codec == ("activations=int4+zstd", "gradients=fp16")
    assert Run.from_json(run.to_json()) == run


# ---------------------------------------------------------------- chance


def test_the_dice_of_a_tensor_are_its_own_and_repeat() -> None:
    z, travel = batch().z, INT4.travel

    def packed(way: Way = Way.BATCH, client: int = 0, sequence: int = 1, by: Travel = travel) -> bytes:
        return by.encode(way, z, client, sequence).encoded.tensors[-1].numpy().tobytes()

    other_seed = Travel.of(["activations=int4"], seed=2)
    thrown = [packed(), packed(client=1), packed(sequence=2), packed(Way.EXAM), packed(by=other_seed)]
    assert len(set(thrown)) == len(thrown)
    assert packed() == thrown[0]


def test_what_arrives_is_what_one_thread_says_it_is() -> None:
    first = sent(INT4, sequence=7, client=2)
    got = codec.unpack_batch(first, iter([]), INT4)
    assert got.sequence == 7
    assert torch.equal(got.z, INT4.travel.through(Way.BATCH, batch().z, 2, 7))
    assert torch.equal(got.y, batch().y)


# ---------------------------------------------------------------- what is judged


def without_payload(head: pb.Batch) -> None:
    del head.payload[:]


def one_more(head: pb.Batch) -> None:
    head.payload.append(pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=[1]))


def huge(head: pb.Batch) -> None:
    head.payload[-1].shape[:] = [2**40]


def of_another_type(head: pb.Batch) -> None:
    head.payload[-1].dtype = pb.DTYPE_INT64


def of_no_type(head: pb.Batch) -> None:
    head.payload[-1].dtype = 99  # type: ignore[assignment]


@pytest.mark.parametrize("change", [without_payload, one_more, huge, of_another_type, of_no_type])
def test_a_payload_that_is_not_the_codec_s_is_refused_before_it_is_read(
    change: Callable[[pb.Batch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("nothing may be allocated for it")

    monkeypatch.setattr(codec, "_fill", never)
    first = sent(INT4)
    change(first.head.batch)
    with pytest.raises(WireError, match="int4"):
        codec.unpack_batch(first, iter([]), INT4)


def test_a_payload_where_tensors_travel_as_they_are_is_refused() -> None:
    with pytest.raises(WireError, match="in this run tensors travel as they are"):
        codec.unpack_batch(sent(INT4), iter([]), PLAIN)


def test_a_plain_batch_where_there_is_a_codec_is_refused() -> None:
    with pytest.raises(WireError, match="int4: 0 tensors came"):
        codec.unpack_batch(sent(PLAIN), iter([]), INT4)


@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_activations_that_cannot_be_encoded_end_the_client_with_the_reason(
    method: str, tmp_path: Path
) -> None:
    """Before they are handed to gRPC's thread, whose errors it would call UNKNOWN."""
    run = settled(small_run(method=method, codec=("activations=int8",)))
    data, test = Batches(run, seed=1, samples=24), Batches(run, seed=2, samples=8)
    data.x[9] = math.nan
    with serving(run, tmp_path) as server:
        connection, client = connect(server)
        with pytest.raises(StepError, match="is not finite"):
            train(run, connection, client, data, test)


# ---------------------------------------------------------------- sizes

Z = 16 * 8 * 8  # elements of one sample's activations
PACKED = {
    "fp16": lambda samples: samples * Z * 2,
    "int8": lambda samples: samples * Z + 16 * 4 + 1,  # a scale a channel, and whether there are signs
    "int4": lambda samples: samples * Z // 2 + 16 * 4 + 1,
    "int2": lambda samples: samples * Z // 4 + 16 * 4 + 1,
}


@pytest.mark.parametrize("name", PACKED)
def test_as_many_bytes_travel_as_the_codec_says(name: str, tmp_path: Path) -> None:
    settings = (f"activations={name}", f"gradients={name}")
    run = small_run(method="csl", codec=settings, clients=2, epochs=1)
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate((20, 11))]
    _, _, summary = federation(run, tmp_path, data)
    expected = sum(PACKED[name](samples) for samples in (8, 8, 4, 8, 3))
    up, down = summary["wire"]["up"], summary["wire"]["down"]
    assert (up["activations"], up["labels"], down["gradients"]) == (expected, 31, expected)
    assert up["evaluation"] == 2 * (2 * PACKED[name](8) + PACKED[name](4) + 20)


# ---------------------------------------------------------------- training


@pytest.mark.parametrize("method", ["csl", "dsl"])
def test_training_in_fp16_follows_that_in_fp32_closely(method: str, tmp_path: Path) -> None:
    """After 12 steps the weights are apart by hundredths of the way that they came; in int2 by a third."""
    runs = [
        small_run(method=method, lr=0.01, codec=tuple(f"{kind}={name}" for kind in KINDS))
        for name in ("fp32", "fp16", "int2")
    ]
    data, begin = [Batches(runs[0], seed=1, samples=44)], build(runs[0]).top.state_dict()
    tops = [federation(run, tmp_path / run.codec[0], data)[0].part.top for run in runs]
    full, half, coarse = (
        torch.cat([(top.state_dict()[name] - begin[name]).flatten() for name, _ in top.named_parameters()])
        for top in tops
    )
    assert 0 < (full - half).norm() < 0.06 * full.norm()
    assert (full - coarse).norm() > 0.3 * full.norm()


def test_kinds_can_stand_in_one_word_with_a_comma() -> None:
    travel = Travel.of(["activations=int4,gradients=fp16"], seed=0)
    assert (travel.activations.name, travel.gradients.name) == ("int4", "fp16")
