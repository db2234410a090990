"""Who may speak with whom: real servers on loopback, and certificates of every sort.

gRPC tells a client only that the server is UNAVAILABLE, whatever TLS did not like; so what a client
says is what the preflight found, and what a server does is seen by what did not happen there.
"""

import contextlib
import datetime
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from common import tls
from common.errors import ClosedError, TakenError
from common.meter import Clock, Traffic
from common.methods import settled
from common.parts import state_of
from common.rundir import RunFolder
from common.tls import Credentials
from common.wire import split_learning_pb2 as pb
from dsl_client.connection import Connection
from dsl_server.server import Server
from tests.certificates import copy, make, remade
from tests.federation import CPU, Batches, federation, serving, small_run
from tests.identity import SOON_S, audit, of, works
from tests.ordinary import DEADLINE_S, Ordinary, channel_to, member, refused, smashed
from tests.threads import in_thread, wait_for, waits

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode


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


def test_a_server_that_is_killed_just_after_a_handshake_is_not_blamed(made: Path) -> None:
    """It closes as one does that will not have the certificate, but is not there to do so again."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(made / "server.pem", made / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def die() -> None:
            connection, _ = listener.accept()
            with context.wrap_socket(connection, server_side=True):
                listener.close()

        target = f"127.0.0.1:{listener.getsockname()[1]}"
        died = in_thread(die)
        with pytest.raises(ConnectionRefusedError):
            tls.meet(target, of(made, "ann"))
        died.result(SOON_S)


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


# ---------------------------------------------------------------- D6, D7: known, and another


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


# ---------------------------------------------------------------- C17, E2: what is no client at all
