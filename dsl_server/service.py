"""The server's end of the wire: bytes in, jobs to the inbox, answers out. No mathematics here."""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc

from common.errors import (
    ClosedError,
    FullError,
    RefusedError,
    SequenceError,
    SplitLearningError,
    WireError,
)
from common.meter import Clock, Traffic
from common.methods.base import Method
from common.optim import progress_of
from common.parts import Spec
from common.run import Run
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece
from common.wire.rpc import RPCS, SERVICE, VERSION, judged, reader, writer
from dsl_server.inbox import EpochEnd, Exam, Inbox, Job
from dsl_server.record import Evaluation, Record
from dsl_server.rounds import Member, Rounds

Context = grpc.ServicerContext
Pieces = Iterator[Piece[Any]]

# What each error of ours is called on the wire; the first that fits counts.
STATUS: tuple[tuple[type[SplitLearningError], grpc.StatusCode], ...] = (
    (SequenceError, grpc.StatusCode.ABORTED),
    (WireError, grpc.StatusCode.INVALID_ARGUMENT),
    (FullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (SplitLearningError, grpc.StatusCode.FAILED_PRECONDITION),
)


class Service:
    """One method for each RPC, named as the protocol names it."""

    def __init__(
        self,
        run: Run,
        method: Method,
        spec: BatchSpec,
        part_specs: dict[str, Spec],
        inbox: Inbox,
        rounds: Rounds,
        record: Record,
        clock: Clock,
    ) -> None:
        self._run, self._method, self._spec, self._part_specs = run, method, spec, part_specs
        self._inbox, self._rounds, self._record, self._clock = inbox, rounds, record, clock

    def Join(self, request: pb.JoinRequest, context: Context) -> Iterator[pb.JoinResponse]:
        if not request.oldest_version <= VERSION <= request.newest_version:
            raise RefusedError(
                f"the server speaks protocol version {VERSION}, the client "
                f"{request.oldest_version} to {request.newest_version}; install the same release on both"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request.name):
            raise WireError(f"client name {request.name[:64]!r}: use 1 to 64 letters, digits, '.', '_', '-'")
        member = self._rounds.join(request.name)
        self._record.joined()
        self._inbox.join(member.client)
        if not context.add_callback(lambda: self._rounds.lost(member)):
            self._rounds.lost(member)  # it has gone already
        welcome = pb.Welcome(
            version=VERSION, run=self._run.to_json(), client=member.client, session=member.session
        )
        yield pb.JoinResponse(welcome=welcome)
        self._rounds.wait_until_left(member)

    def StreamActivations(self, requests: Pieces, context: Context) -> pb.StreamActivationsResponse:
        if self._method.answers:
            raise RefusedError(f"{self._method.name} answers every batch; send them by Train")
        job = None
        for job in self._batches(requests):
            self._inbox.put(job)
        assert job is not None, "a segment holds at least one batch"
        job.answer.result()  # the lane keeps the order: those before it were trained on before
        return pb.StreamActivationsResponse(applied=job.sequence)

    def Train(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.TrainResponse]]:
        if not self._method.answers:
            raise RefusedError(f"{self._method.name} answers nothing; send by StreamActivations")
        for job in self._batches(requests):
            self._inbox.put(job)
            trained = job.answer.result()
            yield from codec.pack_gradient(job.sequence, trained.gradient, trained.loss)

    def SyncWeights(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.SyncWeightsResponse]]:
        specs = self._part_specs
        head, part = codec.unpack_weights(_first(requests), requests, specs)
        member = self._rounds.member(head.session)
        answer = {}
        if head.purpose == pb.SYNC_PURPOSE_AVERAGE and self._run.sync == "average" and part:
            answer = self._rounds.average(member, head.epoch, part, head.samples)
        elif head.purpose == pb.SYNC_PURPOSE_TAKE_TURN and self._run.sync == "relay":
            answer = self._rounds.take_turn(member, head.epoch)
        elif head.purpose == pb.SYNC_PURPOSE_END_TURN and self._run.sync == "relay" and part:
            self._rounds.end_turn(member, head.epoch, part)
        else:
            raise WireError(
                f"purpose {head.purpose} with {len(part)} tensors: the run's sync is {self._run.sync}"
            )
        back = pb.Weights(epoch=head.epoch, purpose=head.purpose)
        yield from codec.pack_weights(pb.SyncWeightsResponse, back, answer)

    def Evaluate(self, requests: Pieces, context: Context) -> pb.EvaluateResponse:
        opening = _opening(requests, "evaluation")
        member = self._rounds.member(opening.session)
        if opening.epoch >= self._run.epochs:
            raise WireError(
                f"an evaluation of epoch {opening.epoch}: the run has 0 to {self._run.epochs - 1}"
            )
        self._rounds.wait_until_received(member, opening.after_sequence)
        samples, answers, head_score = 0, [], None
        for first in requests:
            if first.head.WhichOneof("head") == "head_score":
                head_score = first.head.head_score
                break
            exam = Exam(member.client, self._unpack(first, requests)[1])
            samples += len(exam.smashed.y)
            answers.append(exam.answer)
            self._inbox.put(exam)
        scores = [answer.result() for answer in answers]
        if not samples:
            raise WireError("an evaluation of no images")
        if head_score and not (head_score.correct <= samples and math.isfinite(head_score.train_loss)):
            raise WireError(f"{head_score.correct} of {samples} images right, loss {head_score.train_loss}")
        correct, loss = sum(s.correct for s in scores), sum(s.loss for s in scores) / samples
        mine = (None, None) if head_score is None else (head_score.correct, head_score.train_loss)
        try:
            self._record.evaluated(member.client, opening.epoch, Evaluation(samples, correct, loss, *mine))
        except OSError as error:
            reason = ClosedError(f"the server cannot write its metrics: {error.strerror}")
            self._rounds.close(reason)
            raise reason from error
        return pb.EvaluateResponse(samples=samples, correct=correct, loss=loss)

    def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        member = self._rounds.member(request.session)
        if request.failure:
            self._rounds.lost(member, f"failed: {request.failure[:500]!r}")
            return pb.LeaveResponse()
        self._record.left(request.measurements)
        self._inbox.leave(member.client)
        self._rounds.leave(member)
        return pb.LeaveResponse()

    def _batches(self, requests: Pieces) -> Iterator[Job]:
        """The jobs of one segment, each checked; raises WireError unless it holds what it declared."""
        segment = _opening(requests, "segment")
        member = self._rounds.member(segment.session)
        if not 0 <= segment.epoch < self._run.epochs or not 1 <= segment.batches <= segment.samples:
            raise WireError(
                f"{member}: a segment of epoch {segment.epoch} with {segment.batches} batches and "
                f"{segment.samples} samples; the run has epochs 0 to {self._run.epochs - 1}"
            )
        self._rounds.begin_segment(member, segment.first_sequence)
        try:
            self._record.began(segment.epoch)
            yield from self._jobs(member, segment, requests)
        finally:
            self._rounds.end_segment(member)

    def _jobs(self, member: Member, segment: pb.Segment, requests: Pieces) -> Iterator[Job]:
        batches = samples = 0
        for first in requests:
            sequence, smashed = self._unpack(first, requests)
            self._rounds.expect(member, sequence)
            batches, samples = batches + 1, samples + len(smashed.y)
            last = batches == segment.batches
            over = samples != segment.samples if last else samples > segment.samples
            if over or batches > segment.batches:
                raise _miscounted(member, segment, batches, samples)
            progress = progress_of(self._run, segment.epoch, batches - 1, segment.batches)
            yield Job(member.client, sequence, smashed, progress)
            if last:
                self._inbox.put(EpochEnd(member.client))
            self._rounds.receive(member, sequence)  # it is in its lane: what comes now comes after it
        if batches < segment.batches:
            raise _miscounted(member, segment, batches, samples)

    def _unpack(self, first: Piece[Any], rest: Pieces) -> tuple[int, Any]:
        # The time that the pieces take to come is the network's, not the decoder's.
        waiting = Clock()
        with self._clock("decode"):
            batch = codec.unpack_batch(first, waiting.iterator("network", rest), self._spec)
        self._clock.add("decode", -waiting.seconds("network")["network"])
        return batch


def add_to(server: grpc.Server, service: Service, traffic: Traffic) -> None:
    """Registers the service's methods, metered."""
    handlers = {}
    for rpc in RPCS:
        kind = ("stream" if rpc.requests_stream else "unary") + (
            "_stream" if rpc.responses_stream else "_unary"
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        behaviour = _answered(getattr(service, rpc.name), rpc.requests_stream, rpc.responses_stream)
        handlers[rpc.name] = make(
            behaviour,
            request_deserializer=traffic.reading(rpc, "up", reader(rpc.request, rpc.requests_in_pieces)),
            response_serializer=traffic.writing(rpc, "down", writer(rpc.response, rpc.responses_in_pieces)),
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))


def _answered(
    method: Callable[..., Any], requests_stream: bool, responses_stream: bool
) -> Callable[..., Any]:
    """The method, with what was read judged first and its errors told as statuses."""

    def judge(request: Any) -> Any:
        return map(judged, request) if requests_stream else judged(request)

    def unary(request: Any, context: Context) -> Any:
        try:
            return method(judge(request), context)
        except SplitLearningError as error:
            _abort(context, error)

    def stream(request: Any, context: Context) -> Iterator[Any]:
        try:
            yield from method(judge(request), context)
        except SplitLearningError as error:
            _abort(context, error)

    return stream if responses_stream else unary


def _abort(context: Context, error: SplitLearningError) -> NoReturn:
    code = next(code for kind, code in STATUS if isinstance(error, kind))
    if isinstance(error, SequenceError):
        context.set_trailing_metadata((("dsl-expected-seq", str(error.expected)),))
    context.abort(code, str(error))


def _first(requests: Pieces) -> Piece[Any]:
    piece = next(requests, None)
    if piece is None:
        raise WireError("the stream ended before its first message")
    return piece


def _opening(requests: Pieces, field: str) -> Any:
    piece = _first(requests)
    if piece.head.WhichOneof("head") != field or piece.size:
        raise WireError(f"the stream must open with its {field}, alone")
    return getattr(piece.head, field)


def _miscounted(member: Member, segment: pb.Segment, batches: int, samples: int) -> WireError:
    return WireError(
        f"{member}: epoch {segment.epoch} was to have {segment.batches} batches of {segment.samples} "
        f"samples; {batches} batches of {samples} came"
    )
