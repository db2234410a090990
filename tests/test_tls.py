"""Who may speak with whom: real servers on loopback, and certificates of every sort.

gRPC tells a client only that the server is UNAVAILABLE, whatever TLS did not like; so what a client
says is what the preflight found, and what a server does is seen by what did not happen there.
"""

import contextlib
import datetime
import ipaddress
import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common import tls
from common.errors import ClosedError, ForbiddenError, IdentityError, TakenError
from common.meter import Clock, Traffic
from common.methods import settled
from common.parts import state_of
from common.rundir import RunFolder
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from dsl_client.connection import Connection
from dsl_lab import certs
from dsl_server.server import Server
from tests.certificates import CLIENT, DAY, SERVER, copy, make, remade, unread
from tests.federation import CPU, Batches, federation, serving, small_run
from tests.ordinary import DEADLINE_S, Ordinary, channel_to, member, refused, smashed
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
SOON_S = 5.0


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is only read: an authority, and clients of it."""
    return make(tmp_path_factory.mktemp("tls") / "certs", "ann", "bob", "client-0", "client-1")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another authority, with a client of the same name."""
    return make(tmp_path_factory.mktemp("tls") / "other", "ann")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copy(made, tmp_path / "certs")


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Server]:
    """Of two places, and a list of revoked certificates that the test may change."""
    with serving(small_run(clients=2), tmp_path, Credentials.read(folder, "server")) as server:
        yield server


def of(folder: Path, name: str) -> Credentials:
    return Credentials.read(folder / "clients" / name, "client")


def audit(folder: Path) -> list[dict[str, Any]]:
    """The lines of the server that a test serves within this folder."""
    path = folder / "server" / "audit.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def works(server: Server, folder: Path, name: str = "ann") -> None:
    """A client of this name can join and train."""
    with member(server, name, of(folder, name)) as client:
        client.send([smashed(server.run)])


def joining(port: int, credentials: Credentials | None, host: str = "127.0.0.1") -> str:
    """What a client says that is refused; it must do so soon, though it has patience."""
    connection, before = Connection(f"{host}:{port}", Traffic(), Clock(), credentials), time.monotonic()
    try:
        with pytest.raises(IdentityError) as caught:
            connection.join("ann", patience=30)
    finally:
        connection.close()
    assert time.monotonic() - before < SOON_S
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 77
    return str(caught.value)


# ---------------------------------------------------------------- a run


def test_a_run_with_certificates_ends_with_the_same_weights_bit_for_bit(made: Path, tmp_path: Path) -> None:
    run = small_run(clients=2, fixed_order=True, sync="average")
    data = [Batches(run, seed, 24) for seed in range(2)]
    plain = federation(run, tmp_path / "plain", data)
    secure = federation(run, tmp_path / "secure", data, made)
    for ours, theirs in zip([plain[0].part, *plain[1]], [secure[0].part, *secure[1]], strict=True):
        expected = state_of(theirs)
        assert state_of(ours).keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(ours).items())
    assert plain[2]["wire"]["up"]["activations"] == secure[2]["wire"]["up"]["activations"]
    assert [line["event"] for line in audit(tmp_path / "secure")] == ["joined", "joined", "left", "left"]


def test_health_and_reflection_need_no_more_than_a_valid_certificate(server: Server, folder: Path) -> None:
    nobody = remade(folder / "clients" / "bob", "client", folder, names=[x509.DNSName("probe")])
    with channel_to(server, Credentials.read(nobody, "client")) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(), timeout=DEADLINE_S
        )
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        (names,) = stub.ServerReflectionInfo(iter([request]), timeout=DEADLINE_S)
        assert "dsl.v1.SplitLearningService" in str(names)


# ---------------------------------------------------------------- D1: the server does not accept the client


STRANGERS = ("no certificate", "untrusted authority", "expired", "not yet valid", "wrong purpose")


def stranger(what: str, folder: Path, other: Path) -> grpc.ChannelCredentials:
    theirs = folder / "clients" / "ann"
    if what == "no certificate":
        return grpc.ssl_channel_credentials((theirs / "authority.pem").read_bytes())
    if what == "untrusted authority":
        remade(theirs, "client", other)
    elif what == "expired":
        remade(theirs, "client", folder, -2 * DAY, -DAY)
    elif what == "not yet valid":
        remade(theirs, "client", folder, DAY, 2 * DAY)
    else:
        remade(theirs, "client", folder, purpose=SERVER)
    shown = unread(theirs, "client")
    return grpc.ssl_channel_credentials(shown.authority, shown.key, shown.certificate)


@pytest.mark.parametrize("what", STRANGERS)
def test_d1_the_server_has_no_dealings_with(
    what: str, server: Server, folder: Path, other: Path, tmp_path: Path
) -> None:
    good = copy(folder, tmp_path / "good")
    credentials = stranger(what, folder, other)
    with grpc.secure_channel(
        f"127.0.0.1:{server.port}", credentials, [("grpc.enable_http_proxy", 0)]
    ) as channel:
        join = channel.unary_stream("/dsl.v1.SplitLearningService/Join")
        with refused(Code.UNAVAILABLE):
            next(join(pb.JoinRequest(oldest_version=1, newest_version=1, name="ann").SerializeToString()))
    assert server.rounds.members() == []
    assert audit(tmp_path) == [], "gRPC tells nobody of a handshake that failed"
    works(server, good)


@pytest.mark.parametrize("what", STRANGERS[1:])
def test_d1_a_client_that_is_not_accepted_says_so(
    what: str, server: Server, folder: Path, other: Path
) -> None:
    stranger(what, folder, other)
    words = joining(server.port, unread(folder / "clients" / "ann", "client"))
    assert f"the server at 127.0.0.1:{server.port} does not accept {folder}/clients/ann/client.pem" in words
    assert "this machine's clock says" in words


def test_c17_d1_a_client_without_certificates_says_that_the_server_wants_them(server: Server) -> None:
    assert joining(server.port, None) == (
        f"the server at 127.0.0.1:{server.port} takes clients with a certificate: say --certs FOLDER"
    )


# ---------------------------------------------------------------- D2: the client does not trust the server


def untrusted(tmp_path: Path, credentials: Credentials, client: Credentials, host: str = "127.0.0.1") -> str:
    with serving(small_run(), tmp_path, credentials) as server:
        words = joining(server.port, client, host)
        assert server.rounds.members() == []
    assert f"the server at {host}:{server.port} cannot be trusted: " in words
    return words


def test_d2_a_server_of_another_authority(made: Path, other: Path, tmp_path: Path) -> None:
    words = untrusted(tmp_path, Credentials.read(other, "server"), of(made, "ann"))
    assert f"it is not of the authority in {made}/clients/ann/authority.pem" in words


def test_d2_a_server_of_another_name(folder: Path, tmp_path: Path) -> None:
    remade(folder, "server", folder, names=[x509.DNSName("gpu-host")])
    words = untrusted(tmp_path, Credentials.read(folder, "server"), of(folder, "ann"))
    assert "certificate is not valid for '127.0.0.1'" in words
    assert "its certificate must name 127.0.0.1: dsl certs init --host" in words


@pytest.mark.parametrize(
    ("begins", "ends", "says"),
    [(-2 * DAY, -DAY, "certificate has expired"), (DAY, 2 * DAY, "certificate is not yet valid")],
)
def test_d2_d8_a_server_whose_certificate_is_out_of_date(
    begins: datetime.timedelta, ends: datetime.timedelta, says: str, folder: Path, tmp_path: Path
) -> None:
    remade(folder, "server", folder, begins, ends)
    words = untrusted(tmp_path, unread(folder, "server"), of(folder, "ann"))
    assert f"{says}; this machine's clock says {tls.now():%Y-%m-%d}" in words


def test_d2_a_client_that_plays_the_server(folder: Path, tmp_path: Path) -> None:
    hosts = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    remade(folder, "server", folder, purpose=CLIENT, names=hosts)
    words = untrusted(tmp_path, unread(folder, "server"), of(folder, "ann"))
    assert "purpose" in words


def test_c17_d2_a_server_without_tls_is_not_trusted(made: Path, tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        words = joining(server.port, of(made, "ann"))
        assert f"the server at 127.0.0.1:{server.port} does not speak TLS" in words
        assert "start it with --certs, too" in words
        with member(server) as client:
            client.send([smashed(server.run)])


# ---------------------------------------------------------------- a server that is not there is waited for


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_a_server_that_is_not_there_is_waited_for_and_no_longer(made: Path) -> None:
    connection = Connection(f"127.0.0.1:{free_port()}", Traffic(), Clock(), of(made, "ann"))
    with pytest.raises(ClosedError, match=r"no server at .* within 1\.5 s") as caught:
        connection.join("ann", patience=1.5)
    assert caught.value.exit_code == 69
    connection.close()


@pytest.mark.parametrize("how", ["silent", "closes at once"])
def test_who_takes_connections_for_a_server_that_is_not_there_is_not_blamed(how: str, made: Path) -> None:
    """As a tunnel or a container's port does."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        connection = Connection(f"127.0.0.1:{listener.getsockname()[1]}", Traffic(), Clock(), of(made, "ann"))
        held = in_thread(accept, listener, how == "silent")
        with pytest.raises(ClosedError, match=r"no server at .* within 2 s"):
            connection.join("ann", patience=2)
        connection.close()
        listener.shutdown(socket.SHUT_RDWR)
        assert isinstance(held.exception(SOON_S), OSError)


def accept(listener: socket.socket, hold: bool) -> None:
    with contextlib.ExitStack() as held:
        while True:
            connection, _ = listener.accept()  # until the listener is shut down
            if hold:
                held.enter_context(connection)
            else:
                connection.close()


def test_a_server_that_comes_later_is_found(made: Path, tmp_path: Path) -> None:
    port, run = free_port(), settled(small_run())
    connection = Connection(f"127.0.0.1:{port}", Traffic(), Clock(), of(made, "ann"))
    joined = in_thread(connection.join, "ann", 30)
    assert waits(joined, 2.5)
    server = Server(
        run,
        f"127.0.0.1:{port}",
        CPU,
        RunFolder(tmp_path / "server", run, "server"),
        credentials=Credentials.read(made, "server"),
    )
    server.start()
    try:
        assert joined.result(10).client == 0
    finally:
        connection.close()
        server.stop(ClosedError("the test is over"))


# ---------------------------------------------------------------- D3: a valid certificate of nobody


def test_d3_who_is_revoked_may_not_join_and_the_others_may(server: Server, folder: Path) -> None:
    with member(server, "bob", of(folder, "bob")) as bob:
        certs.run(certs.Revoke(folder, "ann"))
        words = joining(server.port, of(folder, "ann"))
        serial = tls.certificate(folder / "clients" / "ann" / "client.pem").serial_number
        assert words == f"the certificate of ann (serial {serial:x}) is revoked"
        with refused(Code.UNAUTHENTICATED, "is revoked"):
            Ordinary(server, "ann", of(folder, "ann"))
        certs.run(certs.Revoke(folder, "bob"))
        bob.send([smashed(server.run)])  # a revocation counts from the next Join on


def test_d3_a_new_certificate_of_one_who_was_revoked_is_good(server: Server, folder: Path) -> None:
    certs.run(certs.Revoke(folder, "ann"))
    old = of(folder, "ann")
    (folder / "clients" / "ann").rename(folder / "clients" / "ann-old")
    certs.run(certs.Client(folder, "ann"))
    with refused(Code.UNAUTHENTICATED, "is revoked"):
        Ordinary(server, "ann", old)
    works(server, folder)


def test_d3_a_certificate_that_names_no_client_may_not_join(server: Server, folder: Path) -> None:
    nobody = remade(folder / "clients" / "bob", "client", folder, names=[x509.DNSName("bob")])
    with refused(Code.UNAUTHENTICATED, "names no client (dsl://client/NAME)"):
        Ordinary(server, "bob", Credentials.read(nobody, "client"))
    works(server, folder)


def test_d3_where_the_list_of_those_revoked_is_broken_nobody_may_join(server: Server, folder: Path) -> None:
    list_ = folder / tls.REVOKED
    whole = list_.read_bytes()
    list_.write_text("ann\n")
    assert "the server cannot read its revoked.txt, so nobody may join" in joining(
        server.port, of(folder, "ann")
    )
    list_.unlink()
    assert "the server cannot read its revoked.txt, so nobody may join" in joining(
        server.port, of(folder, "ann")
    )
    list_.write_bytes(whole)
    works(server, folder)


# ---------------------------------------------------------------- D4, D6, D7: known, and another


def test_d4_ann_s_certificate_does_not_make_a_bob(server: Server, folder: Path) -> None:
    with refused(Code.PERMISSION_DENIED, "this certificate is that of 'ann', not of 'bob': leave --name out"):
        Ordinary(server, "bob", of(folder, "ann"))
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), of(folder, "ann"))
    with pytest.raises(ForbiddenError) as caught:
        connection.join("bob", patience=10)
    assert caught.value.exit_code == 77
    connection.close()
    assert server.rounds.members() == []


def test_d6_one_identity_has_one_place(server: Server, folder: Path) -> None:
    with member(server, "ann", of(folder, "ann")) as ann:
        with refused(Code.ALREADY_EXISTS, "'ann' has a place in the run"):
            Ordinary(server, "ann", of(folder, "ann"))
        connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), of(folder, "ann"))
        with pytest.raises(TakenError) as caught:
            connection.join("ann", patience=10)
        assert caught.value.exit_code == 77
        connection.close()
        ann.send([smashed(server.run)])
        works(server, folder, "bob")


CALLS = ("StreamActivations", "Evaluate", "SyncWeights", "Leave")


@pytest.mark.parametrize("what", CALLS)
def test_d7_d9_a_session_is_of_no_use_to_another_client(
    what: str, server: Server, folder: Path, tmp_path: Path
) -> None:
    with member(server, "ann", of(folder, "ann")) as ann, member(server, "bob", of(folder, "bob")) as bob:
        before = {name: tensor.clone() for name, tensor in state_of(server.part).items()}
        requests: dict[str, list[Any]] = {
            "StreamActivations": ann.segment(pb.StreamActivationsRequest, [smashed(server.run)]),
            "Evaluate": [pb.EvaluateRequest(evaluation=pb.Evaluation(session=ann.session))],
            "SyncWeights": [pb.SyncWeightsRequest(weights=pb.Weights(session=ann.session))],
            "Leave": [pb.LeaveRequest(session=ann.session, failure="bob says so")],
        }
        call, messages = getattr(bob.stub, what), requests[what]
        with refused(Code.PERMISSION_DENIED, "this session is not one of 'bob'"):
            if what == "Leave":
                call(messages[0], timeout=DEADLINE_S)
            elif what == "StreamActivations":
                call(iter(messages), timeout=DEADLINE_S)
            else:
                list(call(iter(messages), timeout=DEADLINE_S))
        assert all(torch.equal(tensor, state_of(server.part)[name]) for name, tensor in before.items())
        assert server.rounds.members()[0].received == 0
        ann.send([smashed(server.run)])  # and ann has not lost it
        bob.send([smashed(server.run)])
        assert audit(tmp_path)[-1]["event"] == "refused"
        assert audit(tmp_path)[-1]["name"] == "bob"


def test_d7_a_gradient_is_not_to_be_had_by_another_s_session(folder: Path, tmp_path: Path) -> None:
    own = Credentials.read(folder, "server")
    with (
        serving(small_run(method="csl", clients=2), tmp_path, own) as server,
        member(server, "ann", of(folder, "ann")) as ann,
        member(server, "bob", of(folder, "bob")) as bob,
    ):
        with refused(Code.PERMISSION_DENIED):
            list(
                bob.stub.Train(iter(ann.segment(pb.TrainRequest, [smashed(server.run)])), timeout=DEADLINE_S)
            )
        ann.send([smashed(server.run)])


# ---------------------------------------------------------------- the audit log, and what is in none


def test_the_audit_log_says_who_came_was_refused_left_and_was_lost(folder: Path, tmp_path: Path) -> None:
    run = small_run(clients=2, quorum=1)
    with serving(run, tmp_path, Credentials.read(folder, "server")) as server:
        with refused(Code.PERMISSION_DENIED):
            Ordinary(server, "bob", of(folder, "ann"))
        with member(server, "ann", of(folder, "ann")) as ann, member(server, "bob", of(folder, "bob")) as bob:
            with refused(Code.ALREADY_EXISTS):
                Ordinary(server, "bob", of(folder, "bob"))
            ann.leave()
            list(ann.membership)
            bob.close()
            wait_for(lambda: len(audit(tmp_path)) == 6)
    lines = audit(tmp_path)
    assert [(line["event"], line["name"]) for line in lines] == [
        ("refused", "bob"),
        ("joined", "ann"),
        ("joined", "bob"),
        ("refused", "bob"),
        ("left", "ann"),
        ("lost", "bob"),
    ]
    assert "this certificate is that of 'ann'" in lines[0]["reason"]
    assert "has a place in the run" in lines[3]["reason"]
    assert "went away before the end of the run" in lines[5]["reason"]
    for line in lines:
        assert list(line) == ["time", "event", "peer", "name", "reason"]
        assert line["peer"].startswith("ipv4:127.0.0.1:")
        datetime.datetime.strptime(line["time"], "%Y-%m-%dT%H:%M:%S%z")


def test_a_run_whose_audit_log_cannot_be_written_is_over(folder: Path, tmp_path: Path) -> None:
    with serving(small_run(), tmp_path, Credentials.read(folder, "server")) as server:
        (tmp_path / "server" / "audit.jsonl").mkdir()
        with refused(Code.FAILED_PRECONDITION, "the server cannot write its audit log"):
            client = Ordinary(server, "ann", of(folder, "ann"))
            list(client.membership)
        with pytest.raises(ClosedError, match="audit log"):
            server.wait(1)


def test_d10_no_key_and_no_session_is_written_anywhere(made: Path, tmp_path: Path) -> None:
    run = small_run(clients=2, epochs=1)
    server, _, _ = federation(run, tmp_path, [Batches(run, seed, 16) for seed in range(2)], made)
    keys = [path.read_text() for path in made.rglob("*.key")]
    secrets = [line for key in keys for line in key.splitlines() if len(line) > 40]
    secrets += ["PRIVATE KEY", *(member.session for member in server.rounds.members())]
    assert len(secrets) > 5
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for path in written:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), path
