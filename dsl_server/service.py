"""The server's end of the wire: bytes in, jobs to the inbox, answers out. No mathematics here."""

import math
import re
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import grpc
import torch
from torch import Tensor

from common.codecs import Encoded, Parcel
from common.codecs.floats import fp32
from common.errors import (
    ClosedError,
    DigestError,
    ForbiddenError,
    FullError,
    IdentityError,
    RefusedError,
    SequenceError,
    SplitLearningError,
    StaleError,
    TakenError,
    WireError,
)
from common.meter import Clock, Traffic
from common.methods.base import Method, Tail, is_waypoint
from common.methods.hosting import Hosting
from common.optim import progress_of
from common.parts import Spec, State, head_state
from common.run import Run
from common.tls import Guard
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.codec import Arrived, BatchSpec
from common.wire.pieces import Digest, Piece
from common.wire.rpc import EXPECTED, RPCS, SERVICE, VERSION, judged, reader, writer
from dsl_server.audit import Audit, Event
from dsl_server.inbox import EpochEnd, Errand, Inbox, Job, Trained
from dsl_server.ledger import Mark, Newcomer
from dsl_server.record import Evaluation, Record
from dsl_server.rounds import Member, Rounds
from dsl_server.saver import Saver, Unsaved

Context = grpc.ServicerContext
Pieces = Iterator[Piece[Any]]

_TRAINED = ClosedError("this batch was trained on")
# What each error of ours is called on the wire; the first that fits counts.
STATUS: tuple[tuple[type[SplitLearningError], grpc.StatusCode], ...] = (
    (SequenceError, grpc.StatusCode.ABORTED),
    (DigestError, grpc.StatusCode.DATA_LOSS),
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
        clock: Clock,
        audit: Audit,
        guard: Guard | None,
        saver: Saver | Unsaved,
        network: str = "",
    ) -> None:
        self._run, self._method, self._spec, self._part_specs = run, method, spec, part_specs
        self._inbox, self._rounds, self._record, self._clock = inbox, rounds, record, clock
        self._audit, self._guard, self._saver, self._network = audit, guard, saver, network
        self._last: dict[int, Job] = {}  # client to what it sent last, where it may have to be told once more
        self._contexts: dict[str, Context] = {}  # session to the call of its open segment
        self._kept_bytes = Counter[int]()  # by client: received since a checkpoint was last asked for

    def state(self) -> tuple[State, dict[str, Any]]:
        """What a checkpoint holds of it: what each client was answered last, which it may not have got."""
        tensors: State = {}
        facts: dict[str, Any] = {}
        for client, job in self._last.items():
            trained = job.answer.result() if _is_well(job.answer) else None
            if trained is None:
                continue
            facts[str(client)] = {"sequence": job.sequence, "loss": trained.loss, "wanted": job.wanted}
            if trained.gradient is not None:
                tensors[f"{client}.gradient"] = trained.gradient
            if _is_well(job.through_tail.output):
                tensors[f"{client}.output"] = job.through_tail.output.result()
        return tensors, facts

    def restore(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        for client, known in facts.items():
            nothing = torch.empty(0)
            batch = Arrived(nothing, nothing, known["sequence"], Parcel(fp32(), Encoded((0,), [nothing])))
            job = Job(int(client), batch, 0.0, known["wanted"])
            job.answer.set_result(Trained(tensors.get(f"{client}.gradient"), known["loss"]))
            if (output := tensors.get(f"{client}.output")) is not None:
                job.through_tail.output.set_result(output)
            self._last[int(client)] = job

    def Join(self, request: pb.JoinRequest, context: Context) -> Iterator[pb.JoinResponse]:
        peer = context.peer()
        try:
            member = self._admitted(request, context)
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

    def _admitted(self, request: pb.JoinRequest, context: Context) -> Member:
        """Raises why it may not be a member. Who it is comes first: strangers are told no more."""
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
        newcomer = Newcomer(
            name,
            request.identity if self._run.lasts else "",
            request.run_id,
            request.session,
            request.durable,
            request.takeover,
            single=self._guard is not None,
        )
        if former := self._contexts.get(request.session):
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
        lease.start()

    def StreamActivations(self, requests: Pieces, context: Context) -> pb.StreamActivationsResponse:
        if not self._method.one_way:
            raise RefusedError(f"{self._method.name} answers batches; send them by Train")
        latest = deque(self._batches(requests, context), maxlen=1)
        job, fresh = latest.pop() if latest else (None, True)
        if job and not fresh:  # it came before, and lies in its lane yet
            self._rounds.wait_until_applied(job.client, job.sequence)
            return pb.StreamActivationsResponse(applied=job.sequence)
        return pb.StreamActivationsResponse(applied=_settled(job))

    def Train(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.TrainResponse]]:
        if self._method.one_way:
            raise RefusedError(f"{self._method.name} answers nothing; send by StreamActivations")
        job = None
        for job, fresh in self._batches(requests, context):
            if self._method.tail is Tail.LAST:
                yield from self._through_tail(job, requests, context.peer(), fresh)
            if job.wanted:
                trained = job.answer.result()
                yield from codec.pack_gradient(
                    pb.TrainResponse, job.sequence, trained.gradient, self._spec, job.client, trained.loss
                )
        _settled(job)

    def SyncWeights(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.SyncWeightsResponse]]:
        specs = self._part_specs
        first = _first(requests)
        member = self._member(first.head.weights.session, context)  # before anything is made of what follows
        head, part = codec.unpack_weights(first, requests, specs)
        answer: State = {}
        if head.purpose == pb.SYNC_PURPOSE_AVERAGE and self._run.sync == "average" and part:
            answer, news = self._rounds.average(member, head.epoch, part, head.samples)
            if self._method.tail is Tail.ALL and news:  # the server sees no batch of these
                self._record.trained(head.samples, None, {})
            self._saver.commit()
        elif head.purpose == pb.SYNC_PURPOSE_TAKE_TURN and self._run.sync == "relay":
            answer = self._rounds.take_turn(member, head.epoch)
            self._saver.commit()
        elif head.purpose == pb.SYNC_PURPOSE_END_TURN and self._run.sync == "relay" and part:
            self._rounds.end_turn(member, head.epoch, part)
            self._saver.commit()
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
            self._saver.commit()
        else:
            raise WireError(
                f"purpose {head.purpose} with {len(part)} tensors: the run's sync is {self._run.sync}"
            )
        back = pb.Weights(epoch=head.epoch, purpose=head.purpose)
        yield from codec.pack_weights(pb.SyncWeightsResponse, back, answer)

    def Evaluate(self, requests: Pieces, context: Context) -> Iterator[Piece[pb.EvaluateResponse]]:
        opening = _opening(requests, "evaluation")
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
        evaluation = _evaluation(score, closing)
        try:
            self._record.evaluated(member.client, opening.epoch, evaluation)
        except OSError as error:
            reason = ClosedError(f"the server cannot write its metrics: {error.strerror}")
            self._rounds.close(reason)
            raise reason from error
        self._saver.commit()
        yield Piece(pb.EvaluateResponse(score=score))

    def Leave(self, request: pb.LeaveRequest, context: Context) -> pb.LeaveResponse:
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
        self._record.left(request.measurements)
        self._audit("left", context.peer(), member.name)
        self._rounds.leave(member)
        self._saver.commit()
        self._inbox.leave(member.client)
        if context.is_active():
            self._rounds.heard(member)
        return pb.LeaveResponse()

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
        account = self._rounds.members()[client]
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

    def _batches(self, requests: Pieces, context: Context) -> Iterator[tuple[Job, bool]]:
        """The jobs of one segment, each checked, and whether each is fresh: else it has come before, and so
        this is the job that it was. Raises WireError unless the segment holds what it declared."""
        segment = _opening(requests, "segment")
        member = self._member(segment.session, context)
        if not 0 <= segment.epoch < self._run.epochs or not 1 <= segment.batches <= segment.samples:
            raise WireError(
                f"{member}: a segment of epoch {segment.epoch} with {segment.batches} batches and "
                f"{segment.samples} samples; the run has epochs 0 to {self._run.epochs - 1}"
            )
        first = segment.first_epoch
        if first > segment.epoch if self._run.budget else first != self._method.first_epoch:
            raise WireError(
                f"{member}: a segment of epoch {segment.epoch} says that sending began in {first}; the run "
                f"has it begin in {self._method.first_epoch}"
            )
        if segment.place and not member.account.identity:
            raise WireError(f"{member}: a segment from batch {segment.place} on; all of it is due")
        if not (self._method.send_every or self._method.afterwards):
            raise RefusedError(f"{self._method.name} sends no batches")
        self._rounds.begin_segment(member, segment.first_sequence)
        self._contexts[member.session] = context
        try:
            self._record.began(segment.epoch)
            yield from self._jobs(member, segment, requests)
        finally:
            self._contexts.pop(member.session, None)
            self._rounds.end_segment(member)

    def _jobs(self, member: Member, segment: pb.Segment, requests: Pieces) -> Iterator[tuple[Job, bool]]:
        place, samples = segment.place, 0
        end = segment.place + segment.batches
        for first in requests:
            skipped = first.head.WhichOneof("head") == "skipped"
            batch, digest = None, 0
            if skipped:
                sequence, size = codec.unpack_skipped(first, self._spec)
            else:
                batch, digest = self._unpack(first, requests)
                sequence, size = batch.sequence, len(batch.z)
            place, samples, last = place + 1, samples + size, place + 1 == end
            over = samples != segment.samples if last else samples > segment.samples
            if over or place > end:
                raise _miscounted(member, segment, place - segment.place, samples)
            mark = self._rounds.receive(member, sequence, size, digest, last)
            if batch is not None:
                job, fresh = self._job(member, batch, mark, segment, place - 1)
                if fresh:
                    self._lay(job, last)
                yield job, fresh  # its call may end here
            elif mark is not None:
                self._laid(member.client, mark, last)
        if place < end:
            raise _miscounted(member, segment, place - segment.place, samples)

    def _job(
        self, member: Member, batch: Arrived, mark: Mark | None, segment: pb.Segment, place: int
    ) -> tuple[Job, bool]:
        """Of the batch at this place of its epoch, and whether it is fresh."""
        last = self._last.get(member.client)
        if mark is None and last is not None and last.sequence == batch.sequence:
            return last, False
        batches = segment.place + segment.batches
        progress = progress_of(self._run, segment.epoch, place, batches, segment.first_epoch)
        job = Job(
            member.client,
            batch,
            progress,
            self._method.answered(place),
            mark or Mark(),
            waypoint=is_waypoint(place, batches),
        )
        return job, mark is not None

    def _lay(self, job: Job, last: bool) -> None:
        """Into its client's lane, whatever becomes of its call meanwhile: it counts as received.

        last: of its epoch.
        """
        if self._run.lasts:
            if self._method.goes_back:
                self._last[job.client] = job
            self._kept_bytes[job.client] += job.batch.parcel.size
            if self._kept_bytes[job.client] > self._run.spool_bytes / (2 * self._run.checkpoints):
                self._kept_bytes.clear()  # its client's spool must not fill before the next checkpoint
                self._saver.request()
        if self._method.tail is Tail.LAST:  # it counts only when its gradient has come
            job.answer.add_done_callback(partial(self._through, job, last))
            self._inbox.put(job)
        else:
            self._inbox.put(job)
            self._laid(job.client, job.mark, last)

    def _laid(self, client: int, mark: Mark, last: bool) -> None:
        if last:
            self._inbox.put(EpochEnd(client, mark))
        self._rounds.laid(client, mark)

    def _through(self, job: Job, last: bool, answer: Future[Trained]) -> None:
        """By the trainer: a batch has been through its client's last layers, or could not."""
        with suppress(ClosedError):  # of the run: there is nothing to wait for any more
            if answer.exception() is None:
                self._laid(job.client, job.mark, last)
            else:
                self._rounds.give_back(job.client)

    def _errand(self, member: Member, what: str, do: Callable[..., Any], **given: Any) -> Future[Any]:
        """What a method of the hosting gives for this, in the member's turn."""
        errand = Errand(member.client, what, partial(do, **given))
        self._inbox.put(errand)
        return errand.answer

    def _unpack(self, first: Piece[Any], rest: Pieces) -> tuple[Arrived, int]:
        """A batch and its digest, 0 where the run has none."""
        # The time that the pieces take to come is the network's, not the decoder's.
        waiting, due = Clock(), first.head.batch.digest if self._run.lasts else None
        with self._clock("decode"):
            pieces = waiting.iterator("network", rest)
            digest = Digest(first, pieces) if self._run.lasts else None
            batch = codec.unpack_batch(first, digest or pieces, self._spec)
            if digest is not None and digest.value != due:
                raise DigestError(f"batch {batch.sequence} came with other bytes than it was sent with")
        self._clock.add("decode", -waiting.seconds("network")["network"])
        return batch, digest.value if digest else 0


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
        context.set_trailing_metadata(((EXPECTED, str(error.expected)),))
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


def _is_well(future: Future[Any]) -> bool:
    return future.done() and future.exception() is None


def _settled(job: Job | None) -> int:
    """Waits until the last batch that a segment sent has been trained on; its number, 0 if none was sent."""
    if job is None:
        return 0
    job.answer.result()  # the lane keeps the order: those before it were trained on before
    return job.sequence


def _score(samples: int, scores: Sequence[Future[Any]]) -> pb.Score:
    """Of batches that the server scored: each its count of those right, and its loss summed."""
    counts = [score.result() for score in scores]
    correct, loss = sum(right for right, _ in counts), sum(loss for _, loss in counts)
    return pb.Score(samples=samples, correct=correct, loss=loss / max(1, samples))


def _evaluation(score: pb.Score, closing: pb.ClientScore) -> Evaluation:
    """Raises WireError where the numbers cannot be."""
    if not score.samples:
        raise WireError("an evaluation of no images")
    finite = math.isfinite(closing.train_loss) and math.isfinite(score.loss)
    if max(closing.head_correct, score.correct) > score.samples or not finite:
        raise WireError(
            f"{max(closing.head_correct, score.correct)} of {score.samples} images right, loss "
            f"{score.loss}, training loss {closing.train_loss}"
        )
    return Evaluation(
        score.samples,
        score.correct,
        score.loss,
        closing.head_correct if closing.HasField("head_correct") else None,
        closing.train_loss if closing.HasField("train_loss") else None,
    )


def _miscounted(member: Member, segment: pb.Segment, batches: int, samples: int) -> WireError:
    return WireError(
        f"{member}: epoch {segment.epoch} was to have {segment.batches} batches of {segment.samples} "
        f"samples; {batches} batches of {samples} came"
    )
