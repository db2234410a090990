"""`dsl doctor`: every reason why a client cannot reach its server, made to be and told; on real sockets."""

import contextlib
import dataclasses
import io
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from grpc_health.v1 import health, health_pb2_grpc
from rich.console import Console

from common.errors import ConfigError, StaleError
from common.parts import state_of
from common.tls import Credentials
from common.wire import rpc
from common.wire import split_learning_pb2 as pb
from dsl_lab import certs
from dsl_lab.checks import CHECKS, Finding, Patient, advice, examine
from dsl_lab.doctor import Doctor, doctor
from dsl_lab.launch import program
from dsl_server import gate
from dsl_server.server import Server
from tests.certificates import DAY, copy, make, remade
from tests.federation import Batches, connect, federation, serving, small_run, train
from tests.ordinary import channel_to, refused

Code = grpc.StatusCode
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is only read: an authority, its server and two clients."""
    return make(tmp_path_factory.mktemp("doctor") / "certs", "ann", "bob")


@pytest.fixture(scope="module")
def open_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Without certificates; nobody joins it."""
    with serving(small_run(), tmp_path_factory.mktemp("open")) as server:
        yield server


@pytest.fixture(scope="module")
def safe_server(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    own = Credentials.read(made, "server")
    with serving(small_run(), tmp_path_factory.mktemp("safe"), own) as server:
        yield server


def found(server: str, client: Path | None = None, insecure: bool = False) -> dict[str, Finding]:
    """Every finding, in the order of the checks."""
    findings = list(examine(Patient(server, client, insecure)))
    assert tuple(finding.check for finding in findings) == CHECKS
    return {finding.check: finding for finding in findings}


def only_failed(findings: dict[str, Finding]) -> tuple[str, str]:
    """The one check that failed, and all that is said of it; those after it were not made."""
    ((check, finding),) = [item for item in findings.items() if item[1].state == "failed"]
    after = CHECKS[CHECKS.index(check) + 1 :]
    assert all(findings[name].state == "skipped" for name in after)
    return check, f"{finding.found} -> {finding.remedy}"


def at(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


# ---------------------------------------------------------------- all is well


def test_over_tls_all_is_well(safe_server: Server, made: Path) -> None:
    findings = found(at(safe_server), made / "clients" / "ann")
    assert {finding.state for finding in findings.values()} == {"ok"}
    assert findings["certificate"].found.startswith("ann, valid until 20")
    assert findings["name"].found == "127.0.0.1 is an address"
    assert findings["TLS"].found.startswith("TLSv1.3; ")
    assert findings["version"].found == "protocol 1, release 0.1.0"
    apart = re.search(r"([0-9.]+) s (behind|ahead of) the server's", findings["clock"].found)
    assert apart is not None
    assert float(apart[1]) < 5, "it is the same clock"
    assert "(4.1 kB each)" in findings["bandwidth"].remedy, "16 x 8 x 8 floats"


def test_without_certificates_on_loopback_all_is_well_and_unencrypted(open_server: Server) -> None:
    findings = found(at(open_server))
    states = {check: finding.state for check, finding in findings.items()}
    assert {check for check, state in states.items() if state == "skipped"} == {"certificate", "TLS"}
    assert "nothing is encrypted" in findings["TLS"].found
    assert "failed" not in states.values()


def test_a_name_has_all_its_addresses(open_server: Server) -> None:
    findings = found(f"localhost:{open_server.port}")
    assert "127.0.0.1" in findings["name"].found
    assert findings["version"].state == "ok"


# ---------------------------------------------------------------- name and port


@pytest.mark.parametrize("host", ["no-such-host.invalid", "a" * 70], ids=["unknown", "no name"])
def test_a_name_that_has_no_address(host: str) -> None:
    check, said = only_failed(found(f"{host}:50051", insecure=True))
    assert check == "name"
    assert f"{host} has no address" in said
    assert "/etc/hosts" in said


def test_a_port_where_nobody_listens() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    check, said = only_failed(found(f"127.0.0.1:{port}"))
    assert check == "port"
    assert "refuses: nothing listens there" in said
    assert "is dsl-server running" in said


def test_a_port_that_does_not_answer() -> None:
    """A listener's queue that is full drops what comes, as a firewall does."""
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):
            waiting = held.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        check, said = only_failed(found(f"127.0.0.1:{listener.getsockname()[1]}"))
    assert check == "port"
    assert "does not answer within 3 s" in said
    assert "a firewall drops it" in said


def test_an_address_to_which_there_is_no_way() -> None:
    check, said = only_failed(found("255.255.255.255:50051", insecure=True))
    assert check == "port"
    assert "cannot be reached" in said
    assert "routes, VPN and address" in said


@pytest.mark.parametrize("server", ["gpu-host", "gpu-host:", ":50051", "gpu-host:http", "gpu-host:70000"])
def test_a_server_without_host_or_port_is_no_server(server: str) -> None:
    with pytest.raises(ConfigError, match="say host:port"):
        found(server)


# ---------------------------------------------------------------- TLS and certificates


def test_a_client_with_certificates_and_a_server_without(open_server: Server, made: Path) -> None:
    check, said = only_failed(found(at(open_server), made / "clients" / "ann"))
    assert check == "TLS"
    assert "does not speak TLS" in said
    assert "start it with --certs, too" in said


def test_a_server_with_certificates_and_a_client_without(safe_server: Server) -> None:
    check, said = only_failed(found(at(safe_server)))
    assert check == "TLS"
    assert "takes clients with a certificate: say --certs FOLDER" in said


def test_an_authority_of_another_run(safe_server: Server, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "ann")
    check, said = only_failed(found(at(safe_server), other / "clients" / "ann"))
    assert check == "TLS"
    assert "cannot be trusted" in said
    assert "it is not of the authority in" in said


def test_a_client_that_the_server_does_not_accept(made: Path, tmp_path: Path) -> None:
    """It trusts the server, which trusts another authority."""
    other = make(tmp_path / "other")
    own = Credentials.read(made, "server")
    own = dataclasses.replace(own, authority=(other / "authority.pem").read_bytes())
    with serving(small_run(), tmp_path, own) as server:
        check, said = only_failed(found(at(server), made / "clients" / "ann"))
    assert check == "TLS"
    assert "does not accept" in said
    assert "it trusts another authority, or by its clock the certificate is not valid" in said


def wrong_with_its_own(findings: dict[str, Finding]) -> str:
    """Where the client's own certificate is of no use, name and port are looked at all the same."""
    states = [finding.state for finding in findings.values()]
    assert states == ["failed", "ok", "ok", *["skipped"] * 6]
    return f"{findings['certificate'].found} -> {findings['certificate'].remedy}"


def test_a_certificate_that_is_not_the_folder_s_authority_s(
    safe_server: Server, made: Path, tmp_path: Path
) -> None:
    other, folder = make(tmp_path / "other", "ann"), copy(made / "clients" / "ann", tmp_path / "ann")
    for name in ("client.pem", "client.key"):
        (folder / name).write_bytes((other / "clients" / "ann" / name).read_bytes())
    assert "is not signed by" in wrong_with_its_own(found(at(safe_server), folder))


def test_a_key_that_is_another_s(safe_server: Server, made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs") / "clients"
    (folder / "ann" / "client.key").write_bytes((folder / "bob" / "client.key").read_bytes())
    assert "client.key is not the key of" in wrong_with_its_own(found(at(safe_server), folder / "ann"))


def test_a_certificate_of_one_s_own_that_has_expired(safe_server: Server, made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs")
    remade(folder / "clients" / "ann", "client", folder, begins=-2 * DAY, ends=-DAY)
    said = wrong_with_its_own(found(at(safe_server), folder / "clients" / "ann"))
    assert "has expired: it was valid until" in said
    assert "this machine's clock says" in said


def test_a_certificate_that_ends_soon_is_told_of(safe_server: Server, made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs")
    remade(folder / "clients" / "ann", "client", folder, ends=3.5 * DAY)
    finding = found(at(safe_server), folder / "clients" / "ann")["certificate"]
    assert finding.state == "ok"
    assert "(3 days)" in finding.found
    assert "it ends soon" in finding.remedy


def test_a_server_s_certificate_that_has_expired(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs")
    own = Credentials.read(folder, "server")
    remade(folder, "server", folder, begins=-2 * DAY, ends=-DAY)
    own = dataclasses.replace(own, certificate=(folder / "server.pem").read_bytes())
    with serving(small_run(), tmp_path, own) as server:
        check, said = only_failed(found(at(server), folder / "clients" / "ann"))
    assert check == "TLS"
    assert "certificate has expired" in said
    assert "this machine's clock says" in said


def test_a_server_that_is_called_otherwise(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs")
    remade(folder, "server", folder, names=[x509.DNSName("gpu-host")])
    with serving(small_run(), tmp_path, Credentials.read(folder, "server")) as server:
        check, said = only_failed(found(at(server), folder / "clients" / "ann"))
    assert check == "TLS"
    assert "its certificate must name 127.0.0.1: dsl certs init --host" in said


def test_a_client_that_is_revoked(made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs")
    with serving(small_run(), tmp_path, Credentials.read(folder, "server")) as server:
        certs.run(certs.Revoke(folder, "ann"))
        check, said = only_failed(found(at(server), folder / "clients" / "ann"))
        assert {finding.state for finding in found(at(server), folder / "clients" / "bob").values()} == {"ok"}
    assert check == "version"
    assert "UNAUTHENTICATED" in said
    assert "the certificate of ann" in said
    assert "is revoked" in said


def test_strangers_are_told_no_more(safe_server: Server, made: Path, tmp_path: Path) -> None:
    folder = copy(made, tmp_path / "certs")
    nobody = remade(folder / "clients" / "bob", "client", folder, names=[x509.DNSName("probe")])
    findings = found(at(safe_server), nobody)
    failed = {check: finding.found for check, finding in findings.items() if finding.state == "failed"}
    assert list(failed) == ["certificate", "version"]
    assert "names no client" in failed["certificate"]
    assert "this certificate names no client" in failed["version"]
    with channel_to(safe_server, Credentials.read(nobody, "client")) as channel:
        ping: Any = channel.unary_unary(rpc.PING.path)
        with refused(Code.UNAUTHENTICATED, "this certificate names no client"):
            ping(b"", timeout=10)


def test_another_machine_without_certificates_needs_to_be_meant() -> None:
    """As dsl-client, which refuses it, too."""
    with socket.create_server(("0.0.0.0", 0)) as listener:
        address = f"{own_address()}:{listener.getsockname()[1]}"
        findings = found(address)
    assert findings["TLS"].state == "failed"
    assert "without --certs nothing is encrypted" in findings["TLS"].found


def own_address() -> str:
    """One of this machine's that is not loopback; where it has none, the test is of no use."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("this machine has loopback alone")
        return str(probe.getsockname()[0])


# ---------------------------------------------------------------- servers that are none, or others


@pytest.mark.parametrize("with_certificates", [True, False])
def test_a_server_that_takes_connections_and_says_nothing(with_certificates: bool, made: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        check, said = only_failed(found(address, made / "clients" / "ann" if with_certificates else None))
    if with_certificates:
        assert check == "TLS"
        assert "says nothing for 5 s" in said
    else:
        assert check == "health"
        assert "no answer by gRPC" in said


@contextlib.contextmanager
def other_server(**answers: Any) -> Iterator[str]:
    """One that has health, and of our calls these."""
    server = grpc.server(ThreadPoolExecutor(4))
    health_pb2_grpc.add_HealthServicer_to_server(health.HealthServicer(), server)
    handlers = {
        name: grpc.unary_unary_rpc_method_handler(
            answer,
            request_deserializer=pb.PingRequest.FromString,
            response_serializer=pb.PingResponse.SerializeToString,
        )
        for name, answer in answers.items()
    }
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(rpc.SERVICE, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_server_that_is_older_is_named_as_such() -> None:
    with other_server() as address:
        findings = found(address)
    assert findings["version"].state == "skipped"
    assert "does not know the call Ping: it is of an older release" in findings["version"].found
    assert "install the same release on both; here it is 0.1.0" in findings["version"].remedy


def pong(request: pb.PingRequest, oldest: int = 1, ahead_s: int = 0, release: str = "0.1.0") -> Any:
    now = time.time_ns() + ahead_s * 10**9
    return pb.PingResponse(
        oldest_version=oldest,
        newest_version=9,
        release=release,
        received_ns=now,
        answered_ns=now,
        data=bytes(request.answer_bytes),
    )


def test_a_server_that_speaks_another_protocol() -> None:
    with other_server(Ping=lambda request, _: pong(request, oldest=2, release="9.0")) as address:
        findings = found(address)
    assert findings["version"].state == "failed"
    assert findings["version"].found == (
        "the server (release 9.0) speaks protocol version 2 to 9, this machine 1"
    )
    assert findings["version"].remedy == "install the same release on both"


@pytest.mark.parametrize(("ahead_s", "state"), [(30, "ok"), (7200, "failed"), (-7200, "failed")])
def test_clocks_that_differ(ahead_s: int, state: str) -> None:
    with other_server(Ping=lambda request, _: pong(request, ahead_s=ahead_s)) as address:
        finding = found(address)["clock"]
    assert finding.state == state
    apart = re.search(r"this machine's is ([0-9.,]+) s (behind|ahead of) the server's", finding.found)
    assert apart is not None
    assert apart[2] == ("behind" if ahead_s > 0 else "ahead of")
    assert float(apart[1].replace(",", "")) == pytest.approx(abs(ahead_s), abs=10)
    assert "NTP" in finding.remedy


def test_a_server_that_drains_is_not_ready(tmp_path: Path) -> None:
    run = small_run(checkpoint_every=60.0)
    with serving(run, tmp_path) as server:
        server.drain(StaleError("the server is draining: it will be back"), grace=1)
        check, said = only_failed(found(at(server)))
    assert check == "health"
    assert "is there and not ready" in said


# ---------------------------------------------------------------- what it does to a run


def test_a_ping_asks_for_no_more_than_a_piece(open_server: Server) -> None:
    with channel_to(open_server) as channel:
        ping: Any = channel.unary_unary(
            rpc.PING.path, pb.PingRequest.SerializeToString, pb.PingResponse.FromString
        )
        answer = ping(pb.PingRequest(answer_bytes=1 << 20), timeout=10)
        assert len(answer.data) == 1 << 20
        with refused(Code.INVALID_ARGUMENT, "answer_bytes 1048577: at most 1048576"):
            ping(pb.PingRequest(answer_bytes=(1 << 20) + 1), timeout=10)
    assert open_server.rounds.members() == []


def test_whoever_pings_without_end_must_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As who is refused without end: three are answered at once here, the fourth not within half a minute."""
    for name, value in (("PROMPT", 3), ("WITHIN_S", 1000.0), ("HELD_S", 30.0)):
        monkeypatch.setattr(gate, name, value)
    with serving(small_run(), tmp_path) as server, channel_to(server) as channel:
        ping: Any = channel.unary_unary(rpc.PING.path)
        for _ in range(3):
            ping(b"", timeout=10)
        with refused(Code.DEADLINE_EXCEEDED):
            ping(b"", timeout=0.5)


def test_a_run_is_the_same_bit_for_bit_while_it_is_looked_at(tmp_path: Path) -> None:
    run = small_run(fixed_order=True, epochs=4)
    data = [Batches(run, 0, 48)]
    alone = federation(run, tmp_path / "alone", data)[1][0]
    over, seen = threading.Event(), list[dict[str, Finding]]()
    with serving(run, tmp_path / "watched") as server, ThreadPoolExecutor(1) as pool:

        def look() -> None:
            while not over.is_set() or not seen:
                seen.append(found(at(server)))

        looking = pool.submit(look)
        connection, client = connect(server)
        part = train(run, connection, client, data[0], Batches(run, seed=99, samples=20))
        over.set()
        looking.result(30)
        assert server.wait(timeout=10)
        assert server.finish()["samples_trained"] == 4 * 48
        connection.close()
    assert all(finding.state != "failed" for findings in seen for finding in findings.values())
    expected = state_of(alone)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(part).items())


# ---------------------------------------------------------------- how it is shown


def test_the_advice_fits_the_method() -> None:
    slow, fast = 1e5, 1e9
    assert advice(fast, slow, 0, True) == "", "nothing travels: the client has the whole network"
    assert "fp32 2, fp16 3, int8 6, int4 12, int2 24; " in advice(slow, fast, 65536, True)
    assert "--link auto" in advice(slow, fast, 65536, True)
    assert "--codec is of no need" in advice(fast, slow, 65536, True), "nothing comes down"
    assert "dsl-server --codec gradients=fp8, or a later cut" in advice(fast, slow, 65536, False)
    assert "dsl-server --codec activations=int4, or a later cut" in advice(slow, fast, 65536, False)
    assert "activations=int8 gradients=fp8" in advice(2e7, 2e7, 65536, False)
    assert "activations=fp16 gradients=bf16" in advice(4e7, 4e7, 65536, False)


def test_the_command_ends_with_1_where_something_is_wrong(open_server: Server, made: Path) -> None:
    command = [program("dsl"), "doctor", "--server", at(open_server)]
    well = subprocess.run(command, capture_output=True, text=True, timeout=50, check=False)
    assert well.returncode == 0, well.stderr
    assert well.stdout.splitlines()[-1] == f"{at(open_server)}: all is well"
    assert "\x1b" not in well.stdout
    checks = [line.split()[0] for line in well.stdout.splitlines() if not line.startswith((" ", "127"))]
    assert set(checks) == {"ok", "skipped"}
    assert len(checks) == len(CHECKS)
    ill = subprocess.run(
        [*command, "--certs", made / "clients" / "ann"],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert ill.returncode == 1
    assert ill.stdout.splitlines()[-1] == f"{at(open_server)}: TLS is what is wrong"


def test_on_a_terminal_marks_do_without_colour() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    assert not doctor(Doctor("no-such-host.invalid:50051", insecure=True), console)
    assert isinstance(console.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert "✗ failed" in shown
    assert "– skipped" in shown
    assert "→ is it spelled as on the server's machine?" in shown
    assert all(len(line.rstrip()) <= 80 for line in shown.splitlines())


def test_what_a_server_says_cannot_move_the_cursor() -> None:
    shown = io.StringIO()
    with other_server(Ping=lambda request, _: pong(request, release="\x1b[2J\n[red]9")) as address:
        assert doctor(Doctor(address), Console(file=shown, force_terminal=True, color_system=None, width=200))
    assert "release ?[2J?[red]9" in shown.getvalue()


def test_certs_and_insecure_exclude_each_other(made: Path) -> None:
    with pytest.raises(ConfigError, match="--certs and --insecure exclude each other"):
        doctor(Doctor("127.0.0.1:1", made / "clients" / "ann", insecure=True), Console(file=io.StringIO()))
