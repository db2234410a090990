"""Clients that choose what they send, over a real wire: budgets hold, and the server judges each choice."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest

from common.codecs import CODECS
from common.codecs.travel import LADDER
from common.errors import ClosedError
from common.methods.base import Smashed
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import CODEC_NAMES
from dsl_client import trainer
from dsl_client.pace import SKIPPED, Pace, pace_of
from tests.federation import Batches, connect, federation, serving, small_run, train
from tests.ordinary import DEADLINE_S, MANY, Ordinary, batch_message, member, refused, smashed

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
KIND = pb.StreamActivationsRequest
SAMPLE = 16 * 8 * 8 * 4 + 1  # bytes of one sample of small_run as fp32, and its label


@pytest.fixture
def paces(monkeypatch: pytest.MonkeyPatch) -> list[Pace]:
    """Those of the clients that train in this test."""
    made = list[Pace]()

    def kept(*arguments: Any) -> Pace | None:
        pace = pace_of(*arguments)
        if pace:
            made.append(pace)
        return pace

    monkeypatch.setattr(trainer, "pace_of", kept)
    return made


def counts(paces: Sequence[Pace]) -> Counter[str]:
    return sum((pace.counts for pace in paces), Counter[str]())


# ---------------------------------------------------------------- runs


@pytest.mark.parametrize("fixed_order", [False, True])
@pytest.mark.parametrize("shares", [[44], [40, 24, 16]])
@pytest.mark.parametrize("epochs_bought", [0.02, 0.3, 1.4, 20.0])
def test_a_budget_holds_and_what_is_sent_is_trained_on(
    epochs_bought: float, shares: list[int], fixed_order: bool, paces: list[Pace], tmp_path: Path
) -> None:
    """Bought in int4, which takes an eighth."""
    budget = int(epochs_bought * sum(shares) * SAMPLE / 8)
    run = small_run(clients=len(shares), epochs=3, fixed_order=fixed_order, budget=f"{budget}B")
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate(shares)]
    server, _, summary = federation(run, tmp_path, data)
    up = summary["wire"]["up"]
    assert up["activations"] + up["labels"] <= budget
    assert summary["samples_trained"] == up["labels"], "a byte for each"
    done = counts(paces)
    assert done.total() == 3 * sum(map(len, data))
    assert {member.received.sequence for member in server.rounds.members()} == {
        3 * len(share) for share in data
    }
    sent = done.total() - done[SKIPPED]
    if all(n % 8 == 0 for n in shares):
        assert summary["samples_trained"] == 8 * sent
    if epochs_bought == 20.0:
        assert done[SKIPPED] == 0
    if epochs_bought == 1.4:
        assert up["activations"] > budget / 2, "it is not left unspent either"


def test_a_run_with_a_budget_repeats_bit_for_bit(paces: list[Pace], tmp_path: Path) -> None:
    run = small_run(clients=2, epochs=3, fixed_order=True, budget="60kB")
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate((44, 30))]
    ends = [federation(run, tmp_path / name, data)[2] for name in ("one", "two")]
    assert ends[0]["test"] == ends[1]["test"]
    assert ends[0]["wire"]["up"]["activations"] == ends[1]["wire"]["up"]["activations"]
    assert counts(paces[:2]) == counts(paces[2:])
    assert {*counts(paces)} - {SKIPPED} <= {*LADDER}


@pytest.mark.parametrize(
    ("settings", "batches"),
    [({}, 60), ({"send_every": 2}, 30), ({"send_last_epochs": 1}, 20), ({"method": "cse-fsl"}, 12)],
)
def test_with_an_automatic_link_every_batch_is_sent_or_skipped(
    settings: dict[str, Any], batches: int, paces: list[Pace], tmp_path: Path
) -> None:
    run = small_run(clients=2, epochs=3, link="auto", **settings)
    data = [Batches(run, seed=client, samples=80) for client in range(2)]
    server, _, summary = federation(run, tmp_path, data)
    done, received = counts(paces), sum(member.received.sequence for member in server.rounds.members())
    assert done.total() == received == batches
    assert summary["samples_trained"] == 8 * (received - done[SKIPPED])


def test_what_is_skipped_and_replayed_go_together(paces: list[Pace], tmp_path: Path) -> None:
    run = small_run(epochs=2, budget="20kB", replay="1MB", reuse=3)
    _, _, summary = federation(run, tmp_path, [Batches(run, seed=1, samples=40)])
    assert 0 < summary["samples_trained"] == 8 * (10 - counts(paces)[SKIPPED])
    assert summary["samples_replayed"] == 2 * summary["samples_trained"]


def test_what_is_scored_comes_as_batches_come(
    paces: list[Pace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exams, pack = list[tuple[str, str]](), codec.pack_batch

    def noted(kind: Any, *arguments: Any) -> Any:
        if kind is pb.EvaluateRequest:
            exams.append((arguments[-1], paces[0].choice))
        return pack(kind, *arguments)

    monkeypatch.setattr(codec, "pack_batch", noted)
    run = small_run(epochs=3, budget="60kB")
    _, _, summary = federation(run, tmp_path, [Batches(run, seed=1, samples=44)])
    assert len(exams) == 3 * 3
    assert all(sent == choice for sent, choice in exams)
    assert {sent for sent, _ in exams} <= {"int8+zstd", "int4+zstd", "int2+zstd"}
    assert 60 < summary["wire"]["up"]["evaluation"] < 3 * 20 * SAMPLE / 2


def test_a_client_that_sends_nothing_yet_learns_that_the_server_has_gone(tmp_path: Path) -> None:
    begun = list[int]()

    class Stopping(Batches):
        def epoch(self, number: int, start: int = 0) -> Iterator[Any]:
            begun.append(number)
            if number == 1:
                server.stop(ClosedError("the operator has had enough"))
            return super().epoch(number)

    run = small_run(epochs=50, send_last_epochs=1)
    with serving(run, tmp_path) as server:
        connection, client = connect(server)
        with pytest.raises(ClosedError, match="had enough"):
            train(run, connection, client, Stopping(run, 1, 16), Batches(run, 2, 8))
    assert len(begun) < 10


# ---------------------------------------------------------------- what the server refuses


@pytest.fixture(scope="module")
def choosing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ordinary]:
    """A member of a run with a budget, for what must leave no trace."""
    run = small_run(budget="1GB", clients=2, epochs=MANY)
    with serving(run, tmp_path_factory.mktemp("choosing")) as server, member(server) as client:
        yield client


def skipped(client: Ordinary, samples: int = 8, ahead: int = 1, **more: Any) -> Any:
    return KIND(skipped=pb.Skipped(sequence=client.sequence + ahead, samples=samples), **more)


def chosen(client: Ordinary, batch: Smashed, *, ahead: int = 1, **spec: Any) -> Any:
    message = batch_message(KIND, client.sequence + ahead, batch)
    message.batch.codec.CopyFrom(pb.CodecSpec(**spec))
    return message


def call(client: Ordinary, messages: Sequence[Any]) -> Any:
    return client.stub.StreamActivations(iter(messages), timeout=DEADLINE_S)


def test_a_batch_may_be_skipped_or_come_by_a_codec_of_the_ladder(choosing: Ordinary) -> None:
    batches = [smashed(choosing.run, seed=seed) for seed in range(3)]
    messages = [
        choosing.opening(KIND, batches),
        skipped(choosing),
        chosen(choosing, batches[1], ahead=2, codec=pb.CODEC_FP32),
        skipped(choosing, ahead=3),
    ]
    assert call(choosing, messages).applied == choosing.sequence + 2
    choosing.sequence += 3
    assert call(choosing, [choosing.opening(KIND, batches[:1]), skipped(choosing)]).applied == 0
    choosing.sequence += 1


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ({"codec": pb.CODEC_BF16}, "comes as bf16; it may as fp32, fp16, int8+zstd"),
        ({"codec": pb.CODEC_INT4}, "comes as int4; it may as"),
        ({"codec": pb.CODEC_FP32, "zstd": True}, "comes as fp32+zstd; it may as"),
        ({"codec": pb.CODEC_UNSPECIFIED}, "comes as codec 0; it may as"),
        ({"codec": 99}, "comes as codec 99; it may as"),
        ({"codec": -1}, "comes as codec -1; it may as"),
        ({"codec": pb.CODEC_FP16}, "fp16: 0 tensors came"),
    ],
)
def test_a_codec_that_may_not_be_chosen_is_refused(
    spec: dict[str, Any], says: str, choosing: Ordinary
) -> None:
    batch = smashed(choosing.run)
    with refused(Code.INVALID_ARGUMENT, says):
        call(choosing, [choosing.opening(KIND, [batch]), chosen(choosing, batch, **spec)])
    assert choosing.stream([batch]).applied == choosing.sequence


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"samples": 0}, Code.INVALID_ARGUMENT, "a batch of 0 samples: the run allows 1 to 8"),
        ({"samples": 9}, Code.INVALID_ARGUMENT, "a batch of 9 samples: the run allows 1 to 8"),
        ({"samples": 2**64 - 1}, Code.INVALID_ARGUMENT, "the run allows 1 to 8"),
        ({"samples": 7}, Code.INVALID_ARGUMENT, "1 batches of 7 came"),
        ({"data": b"more"}, Code.INVALID_ARGUMENT, "has data"),
        ({"ahead": 2}, Code.ABORTED, "is due"),
        ({"ahead": 0}, Code.ABORTED, "is due"),
    ],
)
def test_a_batch_that_cannot_be_skipped_so_is_refused(
    change: dict[str, Any], status: grpc.StatusCode, says: str, choosing: Ordinary
) -> None:
    batch = smashed(choosing.run)
    with refused(status, says):
        call(choosing, [choosing.opening(KIND, [batch]), skipped(choosing, **change)])
    assert choosing.stream([batch]).applied == choosing.sequence


def test_more_skipped_batches_than_were_declared_are_refused(choosing: Ordinary) -> None:
    batch = smashed(choosing.run)
    with refused(Code.INVALID_ARGUMENT, "2 batches of 16 came"):
        call(choosing, [choosing.opening(KIND, [batch]), skipped(choosing), skipped(choosing, ahead=2)])
    choosing.sequence += 1  # the first one counts
    with refused(Code.INVALID_ARGUMENT, "1 batches of 8 came"):
        call(choosing, [choosing.opening(KIND, [batch] * 2), skipped(choosing)])
    choosing.sequence += 1
    assert choosing.stream([batch]).applied == choosing.sequence


@pytest.mark.parametrize("first_epoch", [1, 2**32 - 1])
def test_sending_that_began_later_than_now_is_refused(first_epoch: int, choosing: Ordinary) -> None:
    batch = smashed(choosing.run)
    with refused(Code.INVALID_ARGUMENT, f"says that sending began in {first_epoch}; "):
        call(choosing, [choosing.opening(KIND, [batch], first_epoch=first_epoch), skipped(choosing)])
    assert choosing.stream([batch]).applied == choosing.sequence


@pytest.mark.parametrize(
    ("settings", "right", "wrong"),
    [({}, 0, 1), ({"send_last_epochs": 1}, 1, 0), ({"link": "auto"}, 0, 1)],
)
def test_where_the_run_says_when_sending_begins_a_client_may_not_say_otherwise(
    settings: dict[str, Any], right: int, wrong: int, tmp_path: Path
) -> None:
    run = small_run(**settings)
    with serving(run, tmp_path) as server, member(server) as client:
        batch = smashed(run)
        frame = batch_message(KIND, 1, batch)
        with refused(Code.INVALID_ARGUMENT, f"began in {wrong}; the run has it begin in {right}"):
            call(client, [client.opening(KIND, [batch], epoch=1, first_epoch=wrong), frame])
        assert call(client, [client.opening(KIND, [batch], epoch=1, first_epoch=right), frame]).applied == 1


def test_where_there_is_no_choice_nothing_is_skipped_or_chosen(tmp_path: Path) -> None:
    run = small_run()
    with serving(run, tmp_path) as server, member(server) as client:
        batch = smashed(run)
        with refused(Code.INVALID_ARGUMENT, "batch 1 is skipped; in this run every batch is sent"):
            call(client, [client.opening(KIND, [batch]), skipped(client)])
        with refused(Code.INVALID_ARGUMENT, "comes as fp16; it may as that of the run only"):
            call(client, [client.opening(KIND, [batch]), chosen(client, batch, codec=pb.CODEC_FP16)])
        assert client.stream([batch]).applied == 1


# ---------------------------------------------------------------- what clients know


def test_every_codec_has_its_name_on_the_wire() -> None:
    assert {*CODEC_NAMES} == {*pb.Codec.values()} - {pb.CODEC_UNSPECIFIED}
    assert {*CODEC_NAMES.values()} == {*CODECS}
    assert all(pb.Codec.Name(code) == f"CODEC_{name.upper()}" for code, name in CODEC_NAMES.items())


FLOATS = [pb.CODEC_FP32, pb.CODEC_FP16]


@pytest.mark.parametrize(
    ("settings", "knows", "missing"),
    [
        ({"codec": ("activations=int4+zstd",)}, [], "know: int4;"),
        ({"codec": ("activations=int4+zstd",)}, FLOATS, "know: int4;"),
        ({"codec": ("activations=topk:0.1+ef", "gradients=bf16")}, FLOATS, "know: bf16, topk;"),
        ({"budget": "1MB"}, FLOATS, "know: int2, int3, int4, int8;"),
        ({"link": "auto"}, [*FLOATS, pb.CODEC_INT8, pb.CODEC_INT3, pb.CODEC_INT2, 99], "know: int4;"),
    ],
)
def test_a_client_that_lacks_a_codec_of_the_run_is_refused(
    settings: dict[str, Any], knows: list[int], missing: str, tmp_path: Path
) -> None:
    method = "csl" if "gradients=bf16" in settings.get("codec", ()) else "dsl"
    with serving(small_run(method=method, **settings), tmp_path) as server:
        with refused(Code.FAILED_PRECONDITION, missing, "install the server's release"):
            Ordinary(server, codecs=knows)
        with member(server) as client:
            assert client.welcome.client == 0


def test_a_run_that_sends_tensors_as_they_are_asks_for_no_codec(tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        client = Ordinary(server, codecs=[])
        assert client.stream([smashed(client.run)]).applied == 1
        client.close()


def test_a_client_of_a_codec_alone_is_enough_for_its_run(tmp_path: Path) -> None:
    with serving(small_run(codec=("activations=fp16",)), tmp_path) as server:
        Ordinary(server, codecs=[pb.CODEC_FP16]).close()
