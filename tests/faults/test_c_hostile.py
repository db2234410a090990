"""C: hostile or wrong input. It gets its status, nothing of it is applied, and the next valid call works.

One server stands for many of these tests, and its run is brought to its end when all are done.
"""

import contextlib
import dataclasses
import json
import math
import socket
import ssl
import struct
import sys
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from torch import Tensor

from common.codecs import parse
from common.methods.base import Smashed
from common.run import Run
from common.tls import Credentials
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.options import METADATA_BYTES
from tests.certificates import make
from tests.faults import http2
from tests.faults.site import (
    KINDS,
    MIB,
    SHAPE,
    SOON_S,
    Z_BYTES,
    Change,
    Site,
    averaged,
    encoded_site,
    same,
    site_of,
    weights,
)
from tests.federation import Batches, connect, serving, small_run, spec_of, train
from tests.memory import grows_by_less_than
from tests.ordinary import DEADLINE_S, MANY, Ordinary, member, refused, smashed
from tests.threads import in_thread, wait_for

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Site]]:
    with contextlib.ExitStack() as stack:
        yield {
            method: stack.enter_context(
                site_of(small_run(method=method, epochs=MANY), tmp_path_factory.mktemp(method))
            )
            for method in KINDS
        }


@pytest.fixture(params=KINDS)
def site(request: pytest.FixtureRequest, standing: dict[str, Site]) -> Site:
    return standing[request.param]


@pytest.fixture
def dsl(standing: dict[str, Site]) -> Site:
    return standing["dsl"]


def shaped(*shape: int) -> Change:
    def change(message: Any) -> None:
        message.batch.activations.shape[:] = shape

    return change


def with_value(value: float, place: int = 100) -> Change:
    def change(message: Any) -> None:
        at = 4 * place
        message.data = message.data[:at] + struct.pack("<f", value) + message.data[at + 4 :]

    return change


def with_label(label: int) -> Change:
    def change(message: Any) -> None:
        message.data = message.data[:-1] + bytes([label])

    return change


def changed(field: str, value: Any) -> Change:
    """Of the batch's head, `labels.dtype` for example."""

    def change(message: Any) -> None:
        *path, name = field.split(".")
        target = message.batch
        for step in path:
            target = getattr(target, step)
        if name == "shape":
            target.shape[:] = value
        else:
            setattr(target, name, value)

    return change


def without_head(message: Any) -> None:
    message.ClearField("batch")


def longer(by: int) -> Change:
    def change(message: Any) -> None:
        message.data = message.data[:by] if by < 0 else message.data + bytes(by)

    return change


def all_of(*changes: Change) -> Change:
    def change(message: Any) -> None:
        for each in changes:
            each(message)

    return change


# ---------------------------------------------------------------- C2: shapes

SHAPES: dict[str, tuple[Change, str]] = {
    "no dimension": (shaped(), "a batch of 0 samples"),
    "three dimensions": (shaped(8, 16, 64), "activations: shape [8, 16, 64]"),
    "five dimensions": (shaped(8, 16, 8, 8, 1), "activations: shape"),
    "a thousand dimensions": (shaped(*[8] * 1000), "activations: shape [8, 8, 8, 8, 8, 8, 8, 8]"),
    "another image": (shaped(8, 16, 4, 16), "the run needs [8, 16, 8, 8]"),
    "other channels": (shaped(8, 8, 16, 8), "the run needs [8, 16, 8, 8]"),
    "no channels": (shaped(8, 0, 8, 8), "the run needs [8, 16, 8, 8]"),
    "no samples": (shaped(0, 16, 8, 8), "a batch of 0 samples"),
    "fewer than no samples": (shaped(-8, 16, 8, 8), "a batch of -8 samples"),
    "the fewest samples": (shaped(-(2**63), 16, 8, 8), "a batch of -9223372036854775808 samples"),
    "a sample too many": (shaped(9, 16, 8, 8), "the run allows 1 to 8"),
    "two negative sides": (shaped(8, 16, -8, -8), "activations: shape"),
    "no head": (without_head, "expected the beginning of a frame (batch), got only data"),
}


@pytest.mark.parametrize("what", SHAPES)
def test_c2_a_batch_of_another_shape_is_refused(what: str, site: Site) -> None:
    site.refuses(*SHAPES[what])


# ---------------------------------------------------------------- C3: types

TYPES: dict[str, tuple[Change, str]] = {
    "whole numbers": (changed("activations.dtype", pb.DTYPE_INT64), "activations: dtype DTYPE_INT64"),
    "half as wide": (changed("activations.dtype", pb.DTYPE_FLOAT16), "activations: dtype DTYPE_FLOAT16"),
    "none": (changed("activations.dtype", 0), "activations: dtype DTYPE_UNSPECIFIED"),
    "of another time": (changed("activations.dtype", 99), "activations: dtype 99"),
    "below zero": (changed("activations.dtype", -1), "activations: dtype -1"),
}


@pytest.mark.parametrize("what", TYPES)
def test_c3_activations_of_another_type_are_refused(what: str, site: Site) -> None:
    site.refuses(*TYPES[what])


def test_c3_sparse_activations_are_refused_where_the_run_has_them_dense(site: Site) -> None:
    def sparse(message: Any) -> None:
        sent = Smashed(smashed(site.run).z, smashed(site.run).y)
        spec = spec_of(dataclasses.replace(site.run, codec=("activations=topk",)))
        (piece,) = codec.pack_batch(type(message), message.batch.sequence, sent, spec)
        message.batch.payload.extend(piece.head.batch.payload)
        message.data = b"".join(piece.chunks)

    site.refuses(sparse, "a payload of 2 tensors; in this run tensors travel as they are")


# ---------------------------------------------------------------- C4, C5: sizes

LENGTHS: dict[str, tuple[Change, str]] = {
    "a byte too few": (longer(-1), "the stream ended 1 bytes before the end of a frame"),
    "an element too few": (longer(-4), "the stream ended 4 bytes before the end of a frame"),
    "no bytes": (longer(-(10**9)), "before the end of a frame"),
    "a byte too many": (longer(1), "declared bytes has more"),
    "twice as many": (longer(Z_BYTES + 8), "declared bytes has more"),
    # 8 * 16 * 8 * (8 + 2**54) elements are 8192 and 2**64: in 64 bits just those that come.
    "a product that overflows to what came": (shaped(8, 16, 8, 8 + 2**54), "activations: shape"),
    "a product that overflows to nothing": (shaped(8, 2**62, 2**62, 2**62), "activations: shape"),
}


@pytest.mark.parametrize("what", LENGTHS)
def test_c4_a_length_that_is_not_that_of_the_shape_is_refused(what: str, site: Site) -> None:
    site.refuses(*LENGTHS[what])


TERABYTES: dict[str, Change] = {
    "in a side": shaped(8, 16, 8, 2**28),
    "in samples": shaped(2**28, 16, 8, 8),
    "of labels": changed("labels.shape", [2**40]),
    "of samples and labels": all_of(shaped(2**40, 16, 8, 8), changed("labels.shape", [2**40])),
}


@pytest.mark.parametrize("what", TERABYTES)
def test_c5_a_declared_terabyte_is_refused_before_any_memory_is_taken(what: str, site: Site) -> None:
    site.client.send([smashed(site.run)])  # what is taken once has been taken
    opening, frame = site.valid()
    TERABYTES[what](frame)
    frame.data = frame.data[:100]
    with site.unharmed(), grows_by_less_than(10 * MIB):
        for _ in range(20):
            with refused(Code.INVALID_ARGUMENT):
                site.send([opening, frame])


def test_c5_weights_of_a_declared_terabyte_are_too(tmp_path: Path) -> None:
    run = small_run(method="dsl")
    with site_of(run, tmp_path) as site:
        frame = part_of(site.client, averaged(run))[0]
        frame.weights.tensors[0].spec.shape[:] = [2**20, 2**20]
        with site.unharmed(), grows_by_less_than(10 * MIB), refused(Code.INVALID_ARGUMENT, "shape"):
            sync(site.client, [frame])


# ---------------------------------------------------------------- C6, C7: messages that are, or become, long


def test_c6_a_message_above_the_limit_is_refused(site: Site) -> None:
    opening, frame = site.valid()
    frame.data = bytes(3 * MIB)
    with site.unharmed(), refused(Code.RESOURCE_EXHAUSTED):
        site.send([opening, frame])
    with site.unharmed(), refused(Code.RESOURCE_EXHAUSTED):
        site.evaluate(longer(3 * MIB))


def test_c7_a_message_that_grpc_has_compressed_and_swells_above_the_limit_is_refused(site: Site) -> None:
    opening, _ = site.valid()
    bomb = [opening.SerializeToString(), site.kind(data=bytes(100 * MIB)).SerializeToString()]
    with site.unharmed(), refused(Code.RESOURCE_EXHAUSTED):
        site.client.raw(site.rpc, bomb, compression=grpc.Compression.Gzip)


def zipped_zeros(mebibytes: int) -> bytes:
    """What gzip makes of so many; they are never there at once."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    block = deflate.compress(bytes(MIB)) + deflate.flush(
        zlib.Z_FULL_FLUSH
    )  # stands for itself: may be repeated
    crc = 0
    for _ in range(mebibytes):
        crc = zlib.crc32(bytes(MIB), crc)
    end = deflate.flush() + struct.pack("<II", crc, mebibytes * MIB)
    return b"\x1f\x8b\x08\0\0\0\0\0\0\xff" + mebibytes * block + end


def test_c7_a_gibibyte_in_a_mebibyte_takes_no_memory_even_from_who_is_no_member(site: Site) -> None:
    assert zlib.decompress(zipped_zeros(3), zlib.MAX_WBITS | 16) == bytes(3 * MIB)
    bomb = zipped_zeros(1024)
    assert MIB / 2 < len(bomb) < 2 * MIB, "it is no longer than a message may be"
    with site.unharmed(), grows_by_less_than(24 * MIB):
        status = http2.status_of(site.server.port, site.rpc.path, [(True, bomb)], {"grpc-encoding": "gzip"})
        assert status is Code.RESOURCE_EXHAUSTED


def zstd_frames(run: Run) -> dict[str, bytes]:
    """Payloads that are bombs, none longer than an honest one may be."""
    (slot,) = parse("int8+zstd").layout(SHAPE)
    opened = slot.opened
    honest = bytearray(zstd.compress(bytes(64 * MIB)))
    lying = bytearray(honest)
    assert honest[4] >> 6 == 2, "its size is 4 bytes from the sixth on"
    lying[6 - 1 : 10 - 1] = struct.pack("<I", opened)
    unsaid = zstd.compress(bytes(64 * MIB), options={zstd.CompressionParameter.content_size_flag: 0})
    frames = {"honest": bytes(honest), "lying": bytes(lying), "silent": bytes(unsaid)}
    assert max(map(len, frames.values())) <= slot.shape[0]
    return frames


def test_c7_a_bomb_in_our_own_compression_is_refused(tmp_path: Path) -> None:
    run = small_run(method="csl", codec=("activations=int8+zstd",), epochs=MANY)
    with encoded_site(run, tmp_path) as site:
        for frame in zstd_frames(run).values():
            payload = [pb.TensorSpec(dtype=pb.DTYPE_UINT8, shape=[len(frame)])]
            with grows_by_less_than(10 * MIB):
                site.refuses_payload(payload, frame, "int8+zstd: ")


# ---------------------------------------------------------------- C8: labels

LABELS: dict[str, tuple[Change, str]] = {
    "minus one": (with_label(255), "label 255 in batch"),
    "the number of classes": (with_label(4), "label 4 in batch"),
    "floats": (changed("labels.dtype", pb.DTYPE_FLOAT32), "labels: dtype DTYPE_FLOAT32"),
    "signed": (changed("labels.dtype", pb.DTYPE_INT64), "labels: dtype DTYPE_INT64"),
    "too wide": (changed("labels.dtype", pb.DTYPE_UINT16), "labels: dtype DTYPE_UINT16"),
    "of no type": (changed("labels.dtype", 0), "labels: dtype DTYPE_UNSPECIFIED"),
    "one too few": (changed("labels.shape", [7]), "labels: shape [7]; the run needs [8]"),
    "one too many": (changed("labels.shape", [9]), "labels: shape [9]; the run needs [8]"),
    "in a square": (changed("labels.shape", [8, 1]), "labels: shape [8, 1]"),
    "none": (changed("labels.shape", []), "labels: shape []; the run needs [8]"),
}


@pytest.mark.parametrize("what", LABELS)
def test_c8_labels_that_cannot_be_are_refused(what: str, site: Site) -> None:
    site.refuses(*LABELS[what])


# ---------------------------------------------------------------- C9: values


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [0, 100, math.prod(SHAPE) - 1])
def test_c9_one_activation_that_is_no_number_is_refused(value: float, place: int, site: Site) -> None:
    site.refuses(with_value(value, place), "activations of batch", "NaN or infinite")


def test_c9_infinities_that_cancel_in_a_sum_are_refused_too(site: Site) -> None:
    site.refuses(all_of(with_value(math.inf), with_value(-math.inf, 101)), "NaN or infinite")


def test_c9_denormal_activations_are_numbers_like_others(tmp_path: Path) -> None:
    with site_of(small_run(method="csl", epochs=MANY), tmp_path) as site:
        opening, frame = site.valid()
        frame.data = math.prod(SHAPE) * struct.pack("<f", 1e-45) + frame.data[Z_BYTES:]
        site.send([opening, frame])
        site.client.sequence += 1
        assert all(tensor.isfinite().all() for tensor in weights(site.server).values())


POISON = {
    "fp16": (b"\x00\x7e", "NaN or infinite"),
    "bf16": (b"\xc0\x7f", "NaN or infinite"),
    "int8": (b"\x00\x00\xc0\x7f", "int8: a scale of nan"),
    "int4": (b"\x00\x00\x80\x7f", "int4: a scale of"),
}


@pytest.mark.parametrize("name", POISON)
def test_c9_what_is_no_number_is_refused_however_it_is_encoded(name: str, tmp_path: Path) -> None:
    """The first bytes of a payload are its first value, or the scale of its first channel."""
    poison, says = POISON[name]
    with encoded_site(small_run(method="csl", codec=(f"activations={name}",), epochs=MANY), tmp_path) as site:
        _, frame = site.packed()
        site.refuses_payload(frame.batch.payload, poison + frame.data[len(poison) : -8], says)


def part_of(client: Ordinary, state: dict[str, Tensor], **head: Any) -> list[pb.SyncWeightsRequest]:
    asked = {"purpose": pb.SYNC_PURPOSE_AVERAGE, "samples": 1} | head
    frame = codec.pack_weights(pb.SyncWeightsRequest, pb.Weights(session=client.session, **asked), state)
    return [pb.SyncWeightsRequest(weights=p.head.weights, data=b"".join(p.chunks)) for p in frame]


def sync(client: Ordinary, messages: Sequence[pb.SyncWeightsRequest]) -> list[pb.SyncWeightsResponse]:
    return list(client.stub.SyncWeights(iter(messages), timeout=DEADLINE_S))


def test_c2_c3_c9_weights_of_another_network_or_no_numbers_are_not_averaged(tmp_path: Path) -> None:
    run = small_run(method="dsl", sync="average", clients=2, epochs=MANY)
    name = "bottom.0.0.weight"
    state = averaged(run)
    wrong = {
        f"{name}: shape": state | {name: torch.zeros(1)},
        f"{name}: dtype": state | {name: state[name].long()},
        f"{name}: NaN or infinite": state | {name: state[name] * math.nan},
        "bottom.0.1.bias: NaN or infinite": state | {"bottom.0.1.bias": torch.full((16,), -math.inf)},
        f"'{name}' differs": {key: value for key, value in state.items() if key != name},
        "'bottom.more' differs": state | {"bottom.more": torch.zeros(1)},
    }
    with site_of(run, tmp_path) as site, member(site.server, "other") as other:
        for says, theirs in wrong.items():
            with site.unharmed(), refused(Code.INVALID_ARGUMENT, says):
                sync(site.client, part_of(site.client, theirs))
        given = in_thread(sync, other, part_of(other, state))
        answers = sync(site.client, part_of(site.client, state))
        given.result(timeout=DEADLINE_S)
        other.leave()
    assert [tensor.name for tensor in answers[0].weights.tensors] == list(state)
    ours = b"".join(tensor.contiguous().numpy().tobytes() for tensor in state.values())
    assert b"".join(answer.data for answer in answers) == ours, "nothing of them is in the average"


@pytest.mark.parametrize("seconds", [math.nan, math.inf, -1.0])
def test_c9_measured_seconds_that_are_none_are_refused(seconds: float, site: Site) -> None:
    """They would stand in summary.json, as what is no JSON."""
    measured = pb.Measurements(seconds={"forward": 1.0, "wait": seconds})
    with site.unharmed(), refused(Code.INVALID_ARGUMENT, "measured seconds"):
        request = pb.LeaveRequest(session=site.client.session, measurements=measured)
        site.client.stub.Leave(request, timeout=DEADLINE_S)


# ---------------------------------------------------------------- C11: bytes that were changed on the way


@pytest.mark.parametrize("damage", ["a bit of the activations", "a label", "no digest"])
@pytest.mark.parametrize("method", ["dsl", "csl"])
def test_c11_a_batch_of_other_bytes_than_were_sent_is_data_loss_and_may_be_sent_again(
    method: str, damage: str, tmp_path: Path
) -> None:
    run = small_run(method=method, checkpoint_every=60.0)
    with serving(run, tmp_path) as server, member(server) as client:

        def send(*messages: Any) -> None:
            if method == "csl":
                list(client.stub.Train(iter(messages), timeout=DEADLINE_S))
            else:
                client.stub.StreamActivations(iter(messages), timeout=DEADLINE_S)

        kind = pb.TrainRequest if method == "csl" else pb.StreamActivationsRequest
        opening, frame = client.segment(kind, [smashed(run)])
        frame.batch.digest = zlib.crc32(frame.data)
        damaged = kind()
        damaged.CopyFrom(frame)
        if damage == "no digest":
            damaged.batch.ClearField("digest")
        else:
            data = bytearray(frame.data)
            data[0 if damage == "a bit of the activations" else -1] ^= 1
            damaged.data = bytes(data)
        with refused(grpc.StatusCode.DATA_LOSS, "batch 1", "other bytes"):
            send(opening, damaged)
        assert server.record.samples_trained == 0
        assert server.rounds.members()[0].received.sequence == 0
        send(opening, frame)
        wait_for(lambda: server.record.samples_trained == run.batch_size)


# ---------------------------------------------------------------- C12: names

STRANGE_NAMES = {
    "none": "",
    "65 letters": "a" * 65,
    "a million letters": "a" * 1_000_000,
    "a blank": "a b",
    "a path": "../x",
    "a line's end": "ann\n",
    "not ASCII": "é",
    "a colour": "a\x1b[31m",
    "a slash": "a/b",
    "a zero": "a\x00",
    "a line that turns": "a\u202eb",
}


@pytest.mark.parametrize("name", STRANGE_NAMES.values(), ids=STRANGE_NAMES)
def test_c12_a_client_must_have_a_decent_name(name: str, dsl: Site) -> None:
    request = pb.JoinRequest(oldest_version=1, newest_version=1, name=name)
    with dsl.unharmed():
        with refused(Code.INVALID_ARGUMENT, "client name", "use 1 to 64 letters, digits") as caught:
            next(dsl.client.stub.Join(request, timeout=DEADLINE_S))
        assert len(caught.value.details()) < 500
        assert caught.value.details().isprintable(), "a stranger must not write on our log"


NOT_UTF8 = b"a\xff\xfe"


def test_c12_text_that_is_not_utf8_is_refused_wherever_it_stands(site: Site) -> None:
    def said(number: int) -> bytes:
        return bytes([number << 3 | 2, len(NOT_UTF8)]) + NOT_UTF8

    def nested(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    calls = {
        rpc.JOIN: b"\x08\x01\x10\x01" + said(3),
        rpc.LEAVE: said(3),
        site.rpc: nested(1, said(1)),
        rpc.EVALUATE: nested(1, said(1)),
        rpc.SYNC_WEIGHTS: nested(2, said(1)),
    }
    for which, raw in calls.items():
        with site.unharmed(), refused(Code.INVALID_ARGUMENT):
            site.client.raw(which, [raw])


SESSIONS = ("", "0" * 32, "../x", "a\n\x1b[2J", "s" * 1_000_000)


@pytest.mark.parametrize("session", SESSIONS, ids=["none", "made up", "path", "control", "long"])
def test_c12_c15_calls_that_name_no_member_are_refused(session: str, site: Site) -> None:
    """Among them a batch before its sender has joined."""
    mine, client = site.client.session, site.client
    with site.unharmed():
        client.session = session
        try:
            messages = site.valid()
            for call in (
                lambda: site.send(messages),
                site.evaluate,
                lambda: sync(client, part_of(client, {}, purpose=pb.SYNC_PURPOSE_TAKE_TURN)),
                client.leave,
            ):
                with refused(Code.FAILED_PRECONDITION, "join first") as caught:
                    call()
                assert len(caught.value.details()) < 500
                assert caught.value.details().isprintable()
        finally:
            client.session = mine


def audit(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "server" / "audit.jsonl").read_text().splitlines()]


FORGED = 'ann"}\n{"event": "joined", "name": "eve"}\r\x1b[2J\x7f\u2028' + "x" * 10_000


def test_c12_a_name_cannot_forge_a_line_of_the_audit_log(tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        with refused(Code.INVALID_ARGUMENT):
            Ordinary(server, FORGED)
        raw = (tmp_path / "server" / "audit.jsonl").read_bytes()
        (line,) = audit(tmp_path)
        with member(server) as client:
            client.send([smashed(server.run)])
    assert raw.count(b"\n") == 1
    assert raw.endswith(b"\n")
    assert all(32 <= byte < 127 for byte in raw[:-1])
    assert (line["event"], line["name"]) == ("refused", FORGED[:64])
    assert len(raw) < 2000


def test_c12_nor_can_what_a_client_says_of_its_failure(tmp_path: Path) -> None:
    run = small_run(clients=2, quorum=1)
    with serving(run, tmp_path) as server, member(server, "ann") as ann, member(server, "bob") as bob:
        ann.stub.Leave(pb.LeaveRequest(session=ann.session, failure=FORGED), timeout=DEADLINE_S)
        raw = (tmp_path / "server" / "audit.jsonl").read_bytes()
        line = audit(tmp_path)[-1]
        assert raw.count(b"\n") == 3
        assert all(32 <= byte < 127 for byte in raw.replace(b"\n", b""))
        assert (line["event"], line["name"]) == ("lost", "ann")
        assert line["reason"].isprintable()
        assert len(line["reason"]) < 1000
        bob.send([smashed(run)])
        bob.leave()
        assert server.wait(timeout=SOON_S)


# ---------------------------------------------------------------- C13, C14: calls that are none of ours


def test_c13_a_little_metadata_is_taken_and_too_much_is_not(site: Site) -> None:
    for size, code in (
        (4000, Code.FAILED_PRECONDITION),
        (20_000, Code.RESOURCE_EXHAUSTED),
        (3 * METADATA_BYTES, Code.RESOURCE_EXHAUSTED),
    ):
        with site.unharmed(), refused(code):
            site.client.raw(rpc.LEAVE, [b""], metadata=(("x-much", "a" * size),))


def test_c14_an_rpc_that_does_not_exist_is_unimplemented(site: Site) -> None:
    with site.unharmed():
        for name in ("Divide", "leave", "Leave/", "../Leave", ""):
            with refused(Code.UNIMPLEMENTED):
                site.client.raw(dataclasses.replace(rpc.LEAVE, name=name), [b""])


@pytest.mark.parametrize("messages", [0, 2])
def test_c14_more_or_less_than_one_message_where_one_is_due_is_unimplemented(
    messages: int, site: Site
) -> None:
    leave = dataclasses.replace(rpc.LEAVE, requests_stream=True)
    goodbye = pb.LeaveRequest(session="nobody's").SerializeToString()
    with site.unharmed(), refused(Code.UNIMPLEMENTED if not messages else Code.FAILED_PRECONDITION):
        site.client.raw(leave, [goodbye] * messages)


@pytest.mark.parametrize("name", ["snappy", "br", "gzip, deflate", "x"])
def test_c14_a_compression_that_nobody_knows_is_refused(name: str, site: Site) -> None:
    """By gRPC itself, to which a name that it does not know is none; then it minds the compressed flag."""
    opening, frame = site.valid()
    messages = [opening.SerializeToString(), frame.SerializeToString()]
    with site.unharmed():
        flagged = [(True, message) for message in messages]
        status = http2.status_of(site.server.port, site.rpc.path, flagged, {"grpc-encoding": name})
        assert status in (Code.UNIMPLEMENTED, Code.INTERNAL)


@pytest.mark.parametrize("name", ["gzip", "deflate"])
def test_c14_what_is_not_compressed_though_it_says_so_is_refused(name: str, site: Site) -> None:
    opening, _ = site.valid()
    with site.unharmed():
        flagged = [(True, opening.SerializeToString())]
        status = http2.status_of(site.server.port, site.rpc.path, flagged, {"grpc-encoding": name})
        assert status in (Code.UNIMPLEMENTED, Code.INTERNAL)


# ---------------------------------------------------------------- C15, C16: the right call at the wrong time


def test_c15_who_has_left_can_send_no_more(tmp_path: Path) -> None:
    for method in KINDS:
        run = small_run(method=method, clients=2)
        with site_of(run, tmp_path / method) as site, member(site.server, "gone") as gone:
            gone.leave()
            with site.unharmed():
                with refused(Code.FAILED_PRECONDITION, "join first"):
                    gone.send([smashed(run)])
                with refused(Code.FAILED_PRECONDITION, "join first"):
                    gone.leave()


@pytest.mark.parametrize("method", KINDS)
def test_f4_a_batch_after_the_last_epoch_has_no_place_in_the_run(method: str, tmp_path: Path) -> None:
    run = small_run(method=method, epochs=2)
    with serving(run, tmp_path) as server, member(server) as client:
        for _ in range(2):
            client.send([smashed(run), smashed(run, 3)])
        wait_for(lambda: server.record.samples_trained == 2 * 11)
        before = weights(server)
        with refused(Code.OUT_OF_RANGE, "batch 5 came after the last one of its last epoch"):
            client.send([smashed(run)])
        assert same(weights(server), before)
        client.leave()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 2 * 11


def test_c16_a_dsl_client_is_refused_by_a_csl_server(standing: dict[str, Site]) -> None:
    site = standing["csl"]
    with site.unharmed(), refused(Code.FAILED_PRECONDITION, "csl answers batches", "Train"):
        site.client.stream([smashed(site.run)])


def test_c16_a_csl_client_is_refused_by_a_dsl_server(dsl: Site) -> None:
    with dsl.unharmed(), refused(Code.FAILED_PRECONDITION, "dsl answers nothing", "StreamActivations"):
        dsl.client.train([smashed(dsl.run)])


# ---------------------------------------------------------------- C17: what is no client at all

HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"
SPOKEN = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", HELLO, HELLO[:-4], b"\x16\x03\x01\x02\x00\x01", b"")


def thrown(port: int, content: bytes) -> None:
    """Sends it, and reads until the server closes the connection."""
    with (
        socket.create_connection(("127.0.0.1", port), SOON_S) as connection,
        contextlib.suppress(ConnectionError),
    ):
        connection.sendall(content)
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(4096):
            pass


@pytest.mark.parametrize("secure", [True, False], ids=["tls", "plain"])
def test_c17_two_thousand_connections_of_garbage_leave_the_server_well(secure: bool, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    garbage = [
        bytes(torch.randint(0, 256, (n % 300 + 1,), generator=g, dtype=torch.uint8).tolist())
        for n in range(2000)
    ]
    certs = make(tmp_path / "certs", "ann") if secure else None
    own = Credentials.read(certs, "server") if certs else None
    with serving(small_run(), tmp_path, own) as server:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda content: thrown(server.port, content), [*garbage, *SPOKEN]))
        if secure:
            plain = grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_http_proxy", 0)])
            with plain, refused(Code.UNAVAILABLE):
                call: Any = plain.unary_unary(rpc.LEAVE.path)
                call(b"", timeout=SOON_S)
        else:
            context = ssl._create_unverified_context()
            with pytest.raises(ssl.SSLError), socket.create_connection(("127.0.0.1", server.port)) as bare:
                context.wrap_socket(bare)
        assert server.rounds.members() == []
        theirs = Credentials.read(certs / "clients" / "ann", "client") if certs else None
        connection, client = connect(server, "ann", theirs)
        data = Batches(server.run, 0, 16)
        train(server.run, connection, client, data, data)
        assert server.wait(timeout=SOON_S)
        assert server.record.samples_trained == server.run.epochs * 16
        connection.close()
