"""The server's end of the wire: bytes in, jobs to the inbox, answers out. No mathematics here."""

import math
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import Any, NoReturn

import grpc

from common.errors import (
    ClosedError,
    DigestError,
    ForbiddenError,
    FullError,
    IdentityError,
    PlanError,
    RefusedError,
    SequenceError,
    SplitLearningError,
    StaleError,
    TakenError,
    WireError,
)
from common.meter import Traffic
from common.methods.base import Method, Tail
from common.methods.hosting import Hosting
from common.objective import ACCURACY
from common.parts import Spec, State, head_state
from common.run import Run
from common.tls import Guard
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.pieces import Piece
from common.wire.rpc import EXPECTED, RPCS, VERSION, Rpc, judged, reader, writer
from dsl_server import ping
from dsl_server.audit import Audit, Event
from dsl_server.inbox import Errand, Inbox, Job
from dsl_server.intake import Intake, Pieces
from dsl_server.ledger import Newcomer
from dsl_server.places import Everywhere, Places
from dsl_server.record import Evaluation, Record
from dsl_server.rounds import Member, Rounds
from dsl_server.saver import Keeper
from dsl_server.tally import Tally

Context = grpc.ServicerContext
_TRAINED = ClosedError("this batch was trained on")
_SITTING_OUT = (pb.SYNC_PURPOSE_TAKE_AVERAGE, pb.SYNC_PURPOSE_AWAIT_AVERAGE)
# What each error of ours is called on the wire; the first that fits counts.
STATUS: tuple[tuple[type[SplitLearningError], grpc.StatusCode], ...] = (
    (SequenceError, grpc.StatusCode.ABORTED),
    (DigestError, grpc.StatusCode.DATA_LOSS),
    (PlanError, grpc.StatusCode.OUT_OF_RANGE),
    (WireError, grpc.StatusCode.INVALID_ARGUMENT),
    (StaleError, grpc.StatusCode.UNAVAILABLE),
    (FullError, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (TakenError, grpc.StatusCode.ALREADY_EXISTS),
    (IdentityError, grpc.StatusCode.UNAUTHENTICATED),
    (ForbiddenError, grpc.StatusCode.PERMISSION_DENIED),
    (SplitLearningError, grpc.StatusCode.FAILED_PRECONDITION),
)


class Service:
    """One method for each RPC, named as the protocol names it. Without a guard names are taken as given."""

    def __init__(
        self,
        run: Run,
        method: Method,
        spec: BatchSpec,
        part_specs: dict[str, Spec],
        inbox: Inbox,
        rounds: Rounds,
        record: Record,
        audit: Audit,
        guard: Guard | None,
        saver: Keeper,
        intake: Intake,
        network: str,
        places: Places | Everywhere,
    ) -> None:
        self._run, self._method, self._spec, self._part_specs = run, method, spec, part_specs
        self._inbox, self._rounds, self._record = inbox, rounds, record
        self._audit, self._guard, self._saver, self._intake = audit, guard, saver, intake
        self._network, self._places = network, places
        self._leases: list[threading.Timer] = []
        self._contexts: dict[str, Context] = {}  # session to the call of its open segment

    def Join(self, request: pb.JoinRequest, context: Context) -> Iterator[pb.JoinResponse]:
        """The welcome; then, in a run that lasts, what is durable, for as long as the caller is a member.

        Raises RefusedError and others of errors.py, which go to the caller as a status (STATUS).
        """
        peer = context.peer()
        try:
            newcomer, address = self._newcomer(request, context)
            if address:
                yield pb.JoinResponse(moved=pb.Moved(address=address))
                return
            member = self._admitted(newcomer)
        except SplitLearningError as error:
            self._audit("refused", peer, request.name, error)
            raise
        again: Event = "took over" if request.takeover else "came back"
        self._audit("joined" if member.account.sessions == 1 else again, peer, member.name)
        self._record.joined()
        self._inbox.join(member.client)
        if not context.add_callback(lambda: self._left_alone(member, peer)):
            self._left_alone(member, peer)  # it has gone already
        if not self._rounds.is_saved(member):
            # What it is told of its place must hold when the server starts anew. Only then: a checkpoint may
            # have to wait until a client that comes back has sent some more.
            self._saver.commit()
        welcome = pb.Welcome(
            version=VERSION,
            run=self._run.to_json(),
            client=member.client,
            session=member.session,
            run_id=self._rounds.ledger.run_id,
            received=member.account.received.sequence,
            network=self._network,
        )
        yield pb.JoinResponse(welcome=welcome)
        durable = 0
        while (floor := self._rounds.next_durable(member, durable)) is not None:
            durable = floor
            yield pb.JoinResponse(durable=pb.Durable(sequence=durable))

    def _newcomer(self, request: pb.JoinRequest, context: Context) -> tuple[Newcomer, str]:
        """Who asks, and the address where its place is, if that is not here. Raises why it may not be a
        member. Who it is comes first: strangers are told no more."""
        name = self._guard.admit(context.auth_context()) if self._guard else request.name
        if not request.oldest_version <= VERSION <= request.newest_version:
            raise RefusedError(
                f"the server speaks protocol version {VERSION}, the client "
                f"{request.oldest_version} to {request.newest_version}; install the same release on both"
            )
        if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", request.name):
            raise WireError(f"client name {request.name[:64]!r}: use 1 to 64 letters, digits, '.', '_', '-'")
        if not re.fullmatch(r"([0-9a-f]{32})?", request.identity):
            raise WireError("a client's identity is 32 hexadecimal digits")
        if missing := codec.unknown(self._spec.travel, request.codecs):
            raise RefusedError(
                f"the run needs codecs that this client does not know: {', '.join(missing)}; install the "
                "server's release there"
            )
        if request.name != name:
            raise ForbiddenError(
                f"this certificate is that of {name!r}, not of {request.name!r}: leave --name out"
            )
        place, address = self._places.find(name, request.identity)
        newcomer = Newcomer(
            name,
            request.identity if self._run.lasts else "",
            request.run_id,
            request.session,
            request.durable,
            request.takeover,
            single=self._guard is not None,
            place=place,
        )
        return newcomer, address

    def _admitted(self, newcomer: Newcomer) -> Member:
        """Raises why it may not be a member."""
        if former := self._contexts.get(newcomer.session):
            former.cancel()  # what is left of its last calls
        return self._rounds.join(newcomer, idle=self._method.goes_back)

    def _left_alone(self, member: Member, peer: str) -> None:
        """Its connection has gone: it may come back, for a while, if the run lets it."""
        if not self._rounds.away(member):
            if not member.account.identity:
                self._lost(member, peer)
            return
        self._audit("away", peer, member.name)
        self._lease(member, peer)

    def expect_back(self) -> None:
        """After a restart: who had a place may come back, for a while."""
        for account in self._rounds.members():
            if not account.gone:
                self._lease(Member(account, account.session), "")

    def _lease(self, member: Member, peer: str) -> None:
        def lapse() -> None:
            if not member.account.present and member.account.session == member.session:
                self._lost(member, peer, f"did not come back within {self._run.lease:g} s")

        lease = threading.Timer(min(self._run.lease, threading.TIMEOUT_MAX), lapse)
        lease.daemon = True
        self._leases = [*filter(threading.Timer.is_alive, self._leases), lease]
        lease.start()

    def close(self) -> None:
        """Once the run is over: nobody is expected back any more."""
        for lease in self._leases:
            lease.cancel()

    def StreamActivations(self, requests: Pieces, context: Context) -> pb.StreamActivationsResponse:
        """A segment of batches, one way; the receipt, once all of it is learned from.

        Raises WireError, SequenceError, DigestError or PlanError for what is not as announced, StaleError for
        a session that is over, ClosedError when the run ends.
        """
        if not self._method.one_way:
            raise RefusedError(f"{self._method.name} answers batches; send them by Train")
        last = deque(self._segment(requests, context), maxlen=1)
        if not last:  # nothing of this segment was sent
            return pb.StreamActivationsResponse()
        ((job, fresh),) = last  # a lane keeps the order: once it is trained on, so are those before it
        if fresh:
            job.answer.result()  # raises why it cannot be
        else:  # it came before, and may lie in its lane yet
            self._rounds.wait_until_applied(job.client, job.sequence)
        return pb.StreamActivationsResponse(applied=job.sequence)

    def Train(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.TrainResponse]]:
        """A segment of batches; dL/dz, of a batch's own shape, for each that is to be answered. Raises as
        StreamActivations does."""
        if self._method.one_way:
            raise RefusedError(f"{self._method.name} answers nothing; send by StreamActivations")
        job = None
        for job, fresh in self._segment(requests, context):
            if self._method.tail is Tail.LAST:
                yield from self._through_tail(job, requests, context.peer(), fresh)
            if job.wanted:
                trained = job.answer.result()
                yield from codec.pack_gradient(
                    pb.TrainResponse, job.sequence, trained.gradient, self._spec, job.client, trained.loss
                )
        if job is not None:
            job.answer.result()  # also of the last one that was not to be answered: a receipt says it counts

    def SyncWeights(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.SyncWeightsResponse]]:
        """A client's part, for an average or for the next in turn; what it is to go on with. Raises WireError
        for tensors that are not the part's, StaleError, ClosedError."""
        specs = self._part_specs
        first = _first(requests)
        member = self._member(first.head.weights.session, context)  # before anything is made of what follows
        head, part = codec.unpack_weights(first, requests, specs)
        answer: State = {}
        if head.purpose == pb.SYNC_PURPOSE_AVERAGE and self._run.sync == "average" and part:
            answer = self._rounds.average(member, head.epoch, part, head.samples)
        elif head.purpose in _SITTING_OUT and self._run.sync == "average" and not part:
            self._record.began(member.client, head.epoch, 1, 1)  # and ended
            average = self._rounds.await_average(member, head.epoch)
            answer = average if head.purpose == pb.SYNC_PURPOSE_TAKE_AVERAGE else {}
        elif head.purpose == pb.SYNC_PURPOSE_TAKE_TURN and self._run.sync == "relay":
            answer = self._rounds.take_turn(member, head.epoch)
        elif head.purpose == pb.SYNC_PURPOSE_END_TURN and self._run.sync == "relay" and part:
            self._rounds.end_turn(member, head.epoch, part)
        elif (
            head.purpose == pb.SYNC_PURPOSE_TAKE_HEAD
            and self._method.new_head
            and not part
            and member.account.received.sequence
        ):
            made = self._errand(
                member, "make a head", Hosting.new_head, client=member.client, epoch=head.epoch
            )
            answer = head_state(made.result())
        else:
            raise WireError(
                f"purpose {head.purpose} with {len(part)} tensors: the run's sync is {self._run.sync}"
            )
        self._saver.commit()
        back = pb.Weights(epoch=head.epoch, purpose=head.purpose)
        yield from codec.pack_weights(pb.SyncWeightsResponse, back, answer)

    def Evaluate(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.EvaluateResponse]]:
        """Test batches (B, ...); the joined network's score of them, and outputs before it where the caller
        has the last layers. Raises WireError, StaleError, ClosedError."""
        opening = opening_of(requests, "evaluation")
        member = self._member(opening.session, context)
        if opening.epoch >= self._run.epochs:
            raise WireError(
                f"an evaluation of epoch {opening.epoch}: the run has 0 to {self._run.epochs - 1}"
            )
        self._rounds.wait_until_received(member, opening.after_sequence)
        samples, scores, closing = 0, list[Future[Any]](), pb.ClientScore()
        for first in requests:
            if first.head.WhichOneof("head") == "client_score":
                closing = first.head.client_score
                break
            if self._method.tail is Tail.ALL:
                raise WireError(f"{self._method.name} has the whole network at the client: send its score")
            batch = codec.unpack_batch(first, requests, self._spec)
            samples += len(batch.z)
            if self._method.tail is Tail.LAST:
                output = self._errand(member, "score a batch", Hosting.output, z=batch.z).result()
                yield from codec.pack_output(
                    pb.EvaluateResponse, batch.sequence, output, self._spec, member.client
                )
            else:
                scores.append(self._errand(member, "score a batch", Hosting.score, z=batch.z, y=batch.y))
        score = _score(samples, scores) if self._method.tail is Tail.NONE else closing.score
        if self._method.tail is Tail.LAST and score.samples != samples:
            raise WireError(f"a score of {score.samples} images: {samples} were sent")
        evaluation = _evaluation(score, closing, counts=self._run.metric == ACCURACY)
        try:
            self._record.evaluated(member.client, opening.epoch, evaluation)
        except OSError as error:
            reason = ClosedError(f"the server cannot write its metrics: {error.strerror}")
            self._rounds.close(reason)
            raise reason from error
        self._saver.commit()
        yield Piece(pb.EvaluateResponse(score=score))

    def Describe(self, request: pb.DescribeRequest, context: Context) -> pb.DescribeResponse:
        """The names of the caller's classes. Raises RefusedError where the run's are others, WireError for
        more of them than it has."""
        member = self._member(request.session, context)
        if len(request.class_names) > self._run.class_count:
            raise WireError(
                f"names of {len(request.class_names)} classes: the run has {self._run.class_count}"
            )
        self._rounds.agree(member, request.class_names)
        return pb.DescribeResponse()

    def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
        """The end of a membership, with what the client measured or why it failed. Raises RefusedError before
        its segment is finished, WireError, StaleError."""
        member = self._member(request.session, context)
        if request.failure:
            self._lost(member, context.peer(), f"failed: {request.failure[:500]!r}")
            return pb.LeaveResponse()
        if self._rounds.is_receiving(member) and self._method.tail is Tail.LAST:
            raise RefusedError(f"{member} has not finished its segment: the trainer may wait for a gradient")
        if not all(0 <= seconds < math.inf for seconds in request.measurements.seconds.values()):
            raise WireError(f"{member}: measured seconds that are none")
        if member.account.identity:  # it comes back no more: what came of it must not be forgotten
            self._rounds.wait_until_applied(member.client, member.account.received.sequence)
        self._record.left(member.client, request.measurements)
        self._audit("left", context.peer(), member.name)
        self._rounds.leave(member)
        self._saver.commit()
        self._inbox.leave(member.client)
        if context.is_active():
            self._rounds.heard(member)
        return pb.LeaveResponse()

    def Ping(self, request: pb.PingRequest, context: Context) -> pb.PingResponse:
        """Versions, this clock (ns) and as many bytes as asked, for dsl doctor. Raises WireError for too
        many, and as Join does for strangers."""
        received = time.time_ns()
        if self._guard:  # strangers are told no more
            self._guard.admit(context.auth_context())
        return ping.answer(request, received, self._method, self._spec)

    def _through_tail(
        self, job: Job, requests: Pieces, peer: str, fresh: bool
    ) -> Iterator[Piece[pb.TrainResponse]]:
        """Gives the client the batch's output, and the trainer the gradient that comes for it.

        Meanwhile the trainer waits; with a round timeout a client that takes longer is lost. fresh: else the
        trainer has had the gradient, and the client has not had what came of it.
        """
        tail, timeout = job.through_tail, self._run.round_timeout
        job.answer.add_done_callback(lambda answer: tail.fail(answer.exception() or _TRAINED))
        late = threading.Timer(min(timeout, threading.TIMEOUT_MAX), self._give_up_on, [job.client, peer])
        late.daemon = True
        try:
            output = tail.output.result()
            if timeout:
                late.start()
            yield from codec.pack_output(pb.TrainResponse, job.sequence, output, self._spec, job.client)
            first = next(requests, None)
            if first is None:
                raise WireError(f"the stream ended before the gradient of batch {job.sequence}")
            gradient, _ = codec.unpack_gradient(
                first, requests, job.sequence, tuple(output.shape), self._spec
            )
            if gradient is None:
                raise WireError(f"batch {job.sequence} has an output without a gradient")
            if fresh:
                tail.give(gradient)
        finally:
            late.cancel()
            tail.fail(ClosedError(f"client {job.client} gave no gradient for batch {job.sequence}"))
            if fresh:
                job.answer.exception()  # until the trainer knows: only then may its client come back

    def _give_up_on(self, client: int, peer: str) -> None:
        late = f"kept the others waiting for more than {self._run.round_timeout:g} s: raise --round-timeout"
        account = self._rounds.account(client)
        self._lost(Member(account, account.session), peer, late)

    def _member(self, session: str, context: Context) -> Member:
        """Whose session it is. Raises ForbiddenError where another makes the call."""
        member = self._rounds.member(session)
        if self._guard and (name := self._guard.name(context.auth_context())) != member.name:
            error = ForbiddenError(f"this session is not one of {name!r}")
            self._audit("refused", context.peer(), name, error)
            raise error
        return member

    def _lost(self, member: Member, peer: str, *how: str) -> None:
        if reason := self._rounds.lost(member.account, *how):
            self._audit("lost", peer, member.name, reason)

    def _segment(self, requests: Pieces, context: Context) -> Iterator[tuple[Job, bool]]:
        """As the intake's `jobs`: those that one call brings."""
        segment = opening_of(requests, "segment")
        member = self._member(segment.session, context)
        self._intake.check(member, segment)
        self._rounds.begin_segment(member, segment.first_sequence)
        self._contexts[member.session] = context
        try:
            place = segment.place
            self._record.began(member.client, segment.epoch, place, place + segment.batches)
            yield from self._intake.jobs(member, segment, requests)
        finally:
            self._contexts.pop(member.session, None)
            self._rounds.end_segment(member)

    def _errand(self, member: Member, what: str, do: Callable[..., Any], **given: Any) -> Future[Any]:
        """What a method of the hosting gives for this, in the member's turn."""
        errand = Errand(member.client, what, partial(do, **given))
        self._inbox.put(errand)
        return errand.answer


def add_to(
    server: grpc.Server,
    service: object,
    traffic: Traffic,
    rpcs: Sequence[Rpc] = RPCS,
    tally: Tally | None = None,
) -> None:
    """Registers the service's methods, those of these RPCs, metered: over all, and for each client."""
    handlers = {}
    for rpc in rpcs:
        kind = ("stream" if rpc.requests_stream else "unary") + (
            "_stream" if rpc.responses_stream else "_unary"
        )
        make = getattr(grpc, f"{kind}_rpc_method_handler")
        method = getattr(service, rpc.name)
        method = tally.around(rpc, method) if tally else method
        behaviour = _answered(method, rpc.requests_stream, rpc.responses_stream)
        handlers[rpc.name] = make(
            behaviour,
            request_deserializer=traffic.reading(rpc, "up", reader(rpc.request, rpc.requests_in_pieces)),
            response_serializer=traffic.writing(rpc, "down", writer(rpc.response, rpc.responses_in_pieces)),
        )
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(rpcs[0].service, handlers),))


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
        context.set_trailing_metadata(((EXPECTED, str(error.expected)),))
    context.abort(code, str(error))


def _first(requests: Pieces) -> Piece[Any]:
    piece = next(requests, None)
    if piece is None:
        raise WireError("the stream ended before its first message")
    return piece


def opening_of(requests: Pieces, field: str) -> Any:
    piece = _first(requests)
    if piece.head.WhichOneof("head") != field or piece.size:
        raise WireError(f"the stream must open with its {field}, alone")
    return getattr(piece.head, field)


def _score(samples: int, scores: Sequence[Future[Any]]) -> pb.Score:
    """Of batches that the server scored: each its metric and its loss, both summed."""
    sums = [score.result() for score in scores]
    metric, loss = sum(value for value, _ in sums), sum(loss for _, loss in sums)
    return pb.Score(samples=samples, metric=metric, loss=loss / max(1, samples))


def _evaluation(score: pb.Score, closing: pb.ClientScore, counts: bool) -> Evaluation:
    """counts: the metric is one of what was right. Raises WireError where the numbers cannot be."""
    if not score.samples:
        raise WireError("an evaluation of no images")
    sums = (score.metric, closing.head_metric)
    finite = all(map(math.isfinite, (*sums, closing.train_loss, score.loss)))
    if not finite or (counts and not 0 <= min(sums) <= max(sums) <= score.samples):
        raise WireError(
            f"metrics of {score.metric:g} and {closing.head_metric:g} over {score.samples} samples, loss "
            f"{score.loss}, training loss {closing.train_loss}"
        )
    return Evaluation(
        score.samples,
        score.metric,
        score.loss,
        closing.head_metric if closing.HasField("head_metric") else None,
        closing.train_loss if closing.HasField("train_loss") else None,
    )
