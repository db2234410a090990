"""Evaluations, heads that the server makes, and methods that send no batch, or not every one.

A real server on loopback; the client is made of the generated classes, so that what ours never sends
can be sent.
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
import torch.nn.functional as F

from common.errors import ClosedError, WireError
from common.meter import Clock, Traffic
from common.methods import METHODS, build_method
from common.methods.base import Answer, Received, ServerPart, Smashed
from common.nets.cut import build
from common.parts import averaged_state, client_part, server_part, state_of
from common.run import Run
from common.wire import rpc
from common.wire import split_learning_pb2 as pb
from dsl_client.connection import Connection
from dsl_server.server import Server
from tests.federation import CPU, Batches, federation, serving, small_run, spec_of
from tests.ordinary import DEADLINE_S, Ordinary, batch_message, member, refused, smashed
from tests.test_exchange import OUTPUT, output, tensor_of, unlabelled
from tests.test_hangs import SOON_S, Pretender, told
from tests.test_service import evaluate, evaluation, same, sync, weights
from tests.threads import in_thread, wait_for

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
FINE = pb.Score(samples=8, metric=4, loss=1.5)


def closing(**said: Any) -> pb.EvaluateRequest:
    return pb.EvaluateRequest(client_score=pb.ClientScore(**said))


def frames(client: Ordinary, *samples: int, epoch: int = 0) -> list[pb.EvaluateRequest]:
    """The opening of an evaluation, and batches of so many samples as the run's method has them."""
    opening, *labelled = evaluation(client, [smashed(client.run, n) for n in samples], epoch=epoch)
    if client.run.method != "ushape":
        return [opening, *labelled]
    bare = (unlabelled(pb.EvaluateRequest, i + 1, smashed(client.run, n)) for i, n in enumerate(samples))
    return [opening, *bare]


def answers(client: Ordinary, messages: Sequence[pb.EvaluateRequest]) -> list[pb.EvaluateResponse]:
    return list(client.stub.Evaluate(iter(messages), timeout=DEADLINE_S))


def whole(method: str, client: Ordinary, *said: pb.EvaluateRequest, epoch: int = 0) -> list[Any]:
    """An evaluation of eight images, as this method has it, with this to close it."""
    return [*frames(client, *(() if method == "fedavg" else (8,)), epoch=epoch), *said]


@pytest.fixture(params=["ushape", "fedavg"])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Server]:
    """Of a method whose clients score themselves."""
    with serving(small_run(method=request.param, epochs=3), tmp_path) as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Ordinary]:
    with member(server) as client:
        yield client


def lines(folder: Path) -> list[dict[str, Any]]:
    file = folder / "server/metrics.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


# ---------------------------------------------------------------- clients that score themselves


def test_each_test_batch_of_a_u_shaped_network_has_its_output_and_the_score_is_last(tmp_path: Path) -> None:
    with serving(small_run(method="ushape"), tmp_path) as server, member(server) as client:
        before = weights(server)
        said = closing(score=pb.Score(samples=11, metric=4, loss=1.5), train_loss=2.5)
        first, second, last = answers(client, [*frames(client, 8, 3), said])
        assert same(weights(server), before), "nothing is learned from a test, statistics included"
        middle = server.part.top.eval()
        for index, (answer, samples) in enumerate(((first, 8), (second, 3))):
            assert answer.output.sequence == index + 1
            with torch.no_grad():
                ours = middle(smashed(client.run, samples).z)
            assert torch.equal(tensor_of(answer.output.output, answer.data), ours)
    assert last.score == said.client_score.score
    (line,) = lines(tmp_path)
    assert line["test"] == {"accuracy": 4 / 11, "loss": 1.5, "client_only_accuracy": None}
    assert line["train"]["client_loss"] == 2.5
    assert line["train"]["loss"] is None, "the server knows none"


NONSENSE: dict[str, Any] = {
    "nothing": {},
    "a score of nothing": {"score": pb.Score()},
    "no score, but a loss": {"train_loss": 1.0},
    "more right than there are": {"score": pb.Score(samples=8, metric=9)},
    "far more right": {"score": pb.Score(samples=8, metric=2**64 - 1)},
    "a head with more right": {"score": FINE, "head_metric": 9},
    "a loss that is no number": {"score": pb.Score(samples=8, loss=math.nan)},
    "an infinite loss": {"score": pb.Score(samples=8, loss=-math.inf)},
    "a training loss that is no number": {"score": FINE, "train_loss": math.nan},
    "an infinite training loss": {"score": FINE, "train_loss": math.inf},
}


@pytest.mark.parametrize("what", NONSENSE)
def test_a_score_that_cannot_be_is_refused_and_the_right_one_counts(
    what: str, client: Ordinary, tmp_path: Path
) -> None:
    method = client.run.method
    with refused(Code.INVALID_ARGUMENT):
        answers(client, whole(method, client, closing(**NONSENSE[what])))
    assert lines(tmp_path) == []
    assert answers(client, whole(method, client, closing(score=FINE)))[-1].score == FINE
    assert [line["test"]["accuracy"] for line in lines(tmp_path)] == [0.5]


def test_an_evaluation_without_the_score_that_the_client_has_to_send_is_refused(client: Ordinary) -> None:
    with refused(Code.INVALID_ARGUMENT):
        answers(client, whole(client.run.method, client))
    answers(client, whole(client.run.method, client, closing(score=FINE)))


@pytest.mark.parametrize("samples", [7, 9, 10**6])
def test_a_score_of_other_images_than_were_sent_is_refused(samples: int, tmp_path: Path) -> None:
    with serving(small_run(method="ushape"), tmp_path) as server, member(server) as client:
        said = closing(score=pb.Score(samples=samples, metric=1))
        with refused(Code.INVALID_ARGUMENT, f"a score of {samples} images: 8 were sent"):
            answers(client, [*frames(client, 8), said])


def test_batches_to_a_server_that_has_no_layers_are_refused(tmp_path: Path) -> None:
    with serving(small_run(method="fedavg"), tmp_path) as server, member(server) as client:
        with refused(Code.INVALID_ARGUMENT, "fedavg has the whole network at the client: send its score"):
            answers(client, [*frames(client, 8), closing(score=FINE)])
        assert answers(client, whole("fedavg", client, closing(score=FINE)))[-1].score == FINE


def test_labels_of_test_batches_stay_with_the_client_too(tmp_path: Path) -> None:
    with serving(small_run(method="ushape"), tmp_path) as server, member(server) as client:
        opening, _ = frames(client, 8)
        labelled = batch_message(pb.EvaluateRequest, 1, smashed(server.run))
        with refused(Code.INVALID_ARGUMENT, "has labels"):
            answers(client, [opening, labelled, closing(score=FINE)])
        answers(client, whole("ushape", client, closing(score=FINE)))


def test_who_evaluates_an_epoch_twice_is_answered_and_counts_once(client: Ordinary, tmp_path: Path) -> None:
    method = client.run.method
    for correct in (4, 6):
        said = closing(score=pb.Score(samples=8, metric=correct))
        assert answers(client, whole(method, client, said))[-1].score.metric == correct
    answers(client, whole(method, client, closing(score=FINE), epoch=1))
    assert [(line["epoch"], line["test"]["accuracy"]) for line in lines(tmp_path)] == [(1, 0.5), (2, 0.5)]


def test_a_client_whose_network_the_server_scores_cannot_claim_a_score(tmp_path: Path) -> None:
    with serving(small_run(method="dsl"), tmp_path) as server, member(server) as client:
        test = smashed(server.run)
        with torch.no_grad():
            logits = server.part.top.eval()(test.z)
        server.part.top.train()
        claim = closing(score=pb.Score(samples=10**6, metric=10**6))
        score = evaluate(client, [*evaluation(client, [test]), claim])
        with refused(Code.INVALID_ARGUMENT, "no images"):
            evaluate(client, [*evaluation(client, []), claim])
    assert (score.samples, score.metric) == (8, int((logits.argmax(1) == test.y).sum()))
    assert score.loss == pytest.approx(F.cross_entropy(logits, test.y).item(), rel=1e-5)
    assert lines(tmp_path)[0]["test"]["accuracy"] == score.metric / 8


def test_an_evaluation_that_its_client_cancels_holds_nobody_up(tmp_path: Path) -> None:
    run = small_run(method="ushape", clients=2)
    with serving(run, tmp_path) as server, member(server) as client, member(server) as other:
        for _ in range(3):
            call = client.stub.Evaluate(iter(frames(client, 8, 8)), timeout=DEADLINE_S)
            assert next(call).HasField("output")
            call.cancel()
        for each in (client, other):
            answers(each, whole("ushape", each, closing(score=FINE)))
    assert len(lines(tmp_path)) == 1


# ---------------------------------------------------------------- frames of several pieces, both ways


def test_outputs_and_gradients_above_a_piece_go_both_ways_and_are_counted(tmp_path: Path) -> None:
    run = small_run(method="ushape", image=(3, 80, 80), batch_size=32, epochs=1)
    z, u = 16 * 80 * 80 * 4, 64 * 20 * 20 * 4  # bytes of a sample
    assert 20 * u > 1.9 * 2**20, "the outputs of the twenty test images take two pieces"
    server, _, summary = federation(run, tmp_path, [Batches(run, seed=0, samples=32)])
    up, down = summary["wire"]["up"], summary["wire"]["down"]
    assert (up["activations"], up["gradients"], up["labels"], up["evaluation"]) == (32 * z, 32 * u, 0, 20 * z)
    assert (down["activations"], down["gradients"], down["evaluation"]) == (32 * u, 32 * z, 20 * u)
    for direction in (up, down):
        tensors = sum(n for kind, n in direction.items() if kind not in ("framing", "control"))
        assert 0 < direction["framing"] < 1e-3 * tensors
    assert sum(up.values()) <= server.traffic.total("up")
    assert summary["test"]["accuracy"] is not None


# ---------------------------------------------------------------- the server talks nonsense


class Examiner(Pretender):
    """Answers an evaluation with these messages once the first batch has come."""

    def __init__(self, run: Run, answers: Sequence[Any]) -> None:
        super().__init__(run, answers)
        self._server.stop(grace=None).wait()
        handlers = {
            "Join": grpc.unary_stream_rpc_method_handler(self._join),
            "Evaluate": grpc.stream_stream_rpc_method_handler(self._train),
            "Leave": grpc.unary_unary_rpc_method_handler(lambda *_: b""),
        }
        from concurrent.futures import ThreadPoolExecutor

        self._server = grpc.server(ThreadPoolExecutor(4))
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(rpc.SERVICE, handlers),))
        self.port = self._server.add_insecure_port("127.0.0.1:0")
        self._server.start()


def scored(sequence: int = 1, **changes: Any) -> pb.EvaluateResponse:
    answer = output(sequence, **changes)
    return pb.EvaluateResponse(output=answer.output, data=answer.data)


SCORE = pb.EvaluateResponse(score=FINE)
WRONG: dict[str, tuple[Sequence[Any], str]] = {
    "a score": ([SCORE], "expected the beginning of a frame (output), got score"),
    "another batch's output": ([scored(2)], "the output of batch 2 came; that of batch 1 was due"),
    "an output of another shape": ([scored(shape=(8, 64, 4, 1))], "output: shape"),
    "an output of no numbers": ([scored(fill=math.nan)], "the output of batch 1: NaN or infinite"),
    "no score": ([scored(), scored(2)], "is not a score"),
    "more than a score": ([scored(), SCORE, SCORE], "went on after the score"),
    "nothing": ([], "the server closed the stream before it answered"),
    "nothing more": ([scored()], "the server closed the stream"),
    "malformed": ([b"\xff\xff"], "a message"),
}


@pytest.mark.parametrize("what", WRONG)
def test_an_answer_to_an_evaluation_that_cannot_be_ends_the_client(what: str) -> None:
    replies, says = WRONG[what]
    run = small_run(method="ushape")
    pretender = Examiner(run, replies)
    connection = Connection(f"127.0.0.1:{pretender.port}", Traffic(), Clock())
    try:
        connection.join("ann", patience=SOON_S)
        examination = connection.evaluation(0, 0, spec_of(run), 2)

        def examined() -> None:
            assert examination.output(smashed(run)).shape == (8, *OUTPUT)
            examination.finish(None)

        error = told(in_thread(examined))
        assert isinstance(error, ClosedError if "closed the stream" in says else WireError)
        assert says in str(error)
    finally:
        connection.close()
        pretender.stop()


# ---------------------------------------------------------------- heads that the server makes

TAKE = {"purpose": pb.SYNC_PURPOSE_TAKE_HEAD}


def test_a_head_is_taken_once_there_are_samples_to_fit_it_to(tmp_path: Path) -> None:
    run = small_run(method="fsl-sage", method_arg=("align_epochs=2",))
    with serving(run, tmp_path) as server, member(server) as client:
        with refused(Code.INVALID_ARGUMENT):
            sync(client, {}, **TAKE)
        client.stream([smashed(run)])
        before = weights(server)
        (answer,) = sync(client, {}, **TAKE)
        assert same(weights(server), before), "the top keeps still"
        names = [tensor.name for tensor in answer.weights.tensors]
        part = client_part(run, build_method(run), build(run), CPU)
        assert names == [name for name in state_of(part, momentum=False) if name.startswith("head.")]
        assert answer.data != b"".join(state_of(part)[name].numpy().tobytes() for name in names)
        client.stream([smashed(run)])


def test_a_head_is_not_taken_for_another_part(tmp_path: Path) -> None:
    run = small_run(method="fsl-sage")
    part = client_part(run, build_method(run), build(run), CPU)
    with serving(run, tmp_path) as server, member(server) as client:
        client.stream([smashed(run)])
        with refused(Code.INVALID_ARGUMENT):
            sync(client, averaged_state(part, build_method(run)), **TAKE)
        with refused(Code.INVALID_ARGUMENT, "differs"):
            sync(client, state_of(part, momentum=False), **TAKE)  # its head does not go up
        sync(client, {}, **TAKE)


@pytest.mark.parametrize("method", ["dsl", "csl", "cse-fsl"])
def test_a_method_whose_heads_stay_at_the_clients_gives_none(method: str, tmp_path: Path) -> None:
    with serving(small_run(method=method), tmp_path) as server, member(server) as client:
        client.send([smashed(server.run)])
        with refused(Code.INVALID_ARGUMENT):
            sync(client, {}, **TAKE)
        client.send([smashed(server.run)])


# ---------------------------------------------------------------- methods that send no batches


def test_batches_to_fedavg_are_refused_and_the_run_goes_on(tmp_path: Path) -> None:
    run = small_run(method="fedavg", epochs=1)
    part = client_part(run, build_method(run), build(run), CPU)
    state = state_of(part, momentum=False)
    with serving(run, tmp_path) as server, member(server) as client:
        with refused(Code.FAILED_PRECONDITION, "fedavg sends no batches"):
            client.stream([smashed(run)])
        with refused(Code.FAILED_PRECONDITION, "fedavg"):
            client.train([smashed(run)])
        (answer,) = sync(client, state, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=40)
        assert [tensor.name for tensor in answer.weights.tensors] == list(state)
        answers(client, whole("fedavg", client, closing(score=FINE)))
        client.leave()
        assert server.wait(timeout=SOON_S)
        assert server.finish()["samples_trained"] == 40
    (line,) = lines(tmp_path)
    assert line["samples_trained"] == 40
    assert line["train"] == {"loss": None, "client_loss": None}


def test_a_part_that_is_refused_is_not_counted_as_trained(tmp_path: Path) -> None:
    run = small_run(method="fedavg")
    state = state_of(client_part(run, build_method(run), build(run), CPU), momentum=False)
    with serving(run, tmp_path) as server, member(server) as client:
        for wrong in ({"epoch": 1, "samples": 8}, {"samples": 0}):
            with refused(Code.INVALID_ARGUMENT):
                sync(client, state, purpose=pb.SYNC_PURPOSE_AVERAGE, **wrong)
        assert server.record.samples_trained == 0


@pytest.mark.parametrize("fixed_order", [False, True])
def test_the_server_of_ampere_trains_when_all_has_come(fixed_order: bool, tmp_path: Path) -> None:
    run = small_run(
        method="ampere", clients=2, fixed_order=fixed_order, epochs=1, method_arg=("server_epochs=2",)
    )
    data = [Batches(run, seed=client, samples=n) for client, n in enumerate((24, 9))]
    server, _, summary = federation(run, tmp_path, data)
    fresh = server_part(server.run, build_method(run), build(run), CPU)
    assert not same(weights(server), state_of(fresh)), "the server's part has learned"
    assert summary["samples_trained"] == 33
    assert lines(tmp_path)[-1]["train"]["loss"] is not None


# ---------------------------------------------------------------- answers to one batch in q


def test_of_a_segment_every_third_batch_is_answered(tmp_path: Path) -> None:
    run = small_run(method="dsl", method_arg=("lambda_=0.5", "q=3"))
    with serving(run, tmp_path) as server, member(server) as client:
        for _ in range(2):
            first = client.sequence + 1
            replies = client.train([smashed(run)] * 5)
            assert [answer.gradient.sequence for answer in replies] == [first, first + 3]
            assert all(list(a.gradient.gradient.shape) == [8, 16, 8, 8] for a in replies)
        wait_for(lambda: server.record.samples_trained == 80)
        with refused(Code.FAILED_PRECONDITION, "send them by Train"):
            client.stream([smashed(run)])


@pytest.mark.parametrize("failing", [2, 3, 5, 6])
def test_a_batch_without_an_answer_whose_step_fails_ends_its_call_with_the_reason(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of six batches the first and the fourth are answered; the sixth is the last."""
    ordinary, steps = METHODS["dsl"](lambda_=0.5, q=3), iter(range(1, 100))

    def step(part: ServerPart, group: Sequence[Received]) -> Answer:
        if next(steps) == failing:
            raise RuntimeError("out of luck")
        return ordinary.server_step(part, group)

    monkeypatch.setitem(METHODS, "dsl", lambda: dataclasses.replace(ordinary, server_step=step))
    with serving(small_run(method="dsl"), tmp_path) as server, member(server) as client:
        with refused(Code.FAILED_PRECONDITION, f"batch {failing} of client 0", "out of luck"):
            client.train([smashed(server.run)] * 6)
        with pytest.raises(Exception, match="out of luck"):
            server.wait(timeout=SOON_S)


def test_smashed_data_of_a_wrong_batch_among_those_without_an_answer_is_refused(tmp_path: Path) -> None:
    run = small_run(method="dsl", method_arg=("lambda_=0.5", "q=3"))
    with serving(run, tmp_path) as server, member(server) as client:
        bad = Smashed(torch.full((8, 16, 8, 8), math.nan), torch.zeros(8, dtype=torch.int64))
        with refused(Code.INVALID_ARGUMENT, "activations of batch 2: NaN"):
            client.train([smashed(run), bad, smashed(run)])
        client.sequence = 1
        client.train([smashed(run)])
