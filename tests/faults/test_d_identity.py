"""Who may speak with whom, and what is told to nobody: real servers on loopback, certificates of every sort.

gRPC tells a client only that the server is UNAVAILABLE, whatever TLS did not like; so what a client
says is what the preflight found, and what a server does is seen by what did not happen there.
"""

import ast
import datetime
import ipaddress
import itertools
import json
import os
import re
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from cryptography import x509
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import tls
from common.errors import ConfigError, ForbiddenError, IdentityError
from common.meter import Clock, Traffic
from common.parts import state_of
from common.tls import Credentials
from common.wire import codec
from common.wire import split_learning_pb2 as pb
from common.wire.split_learning_pb2_grpc import SplitLearningServiceStub
from dsl_client.connection import Connection
from dsl_lab import certs
from dsl_server.server import Server
from tests.certificates import CLIENT, DAY, SERVER, copy, make, remade, unread
from tests.federation import Batches, federation, serving, small_run
from tests.identity import audit, joining, of, works
from tests.ordinary import DEADLINE_S, Ordinary, batch_message, member, refused, smashed
from tests.programs import LOADED_S, Start, ends, programs, refuses, serve
from tests.programs import refused as says_no

pytestmark = pytest.mark.timeout(60)

Code = grpc.StatusCode
NO_PROXY = [("grpc.enable_http_proxy", 0)]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is only read: an authority, and clients of it."""
    return make(tmp_path_factory.mktemp("identity") / "certs", "ann", "bob", "client-0", "client-1")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another authority, with a client of the same name."""
    return make(tmp_path_factory.mktemp("identity") / "other", "ann")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copy(made, tmp_path / "certs")


@pytest.fixture
def server(folder: Path, tmp_path: Path) -> Iterator[Server]:
    """Of two places, and a list of revoked certificates that the test may change."""
    with serving(small_run(clients=2), tmp_path, Credentials.read(folder, "server")) as server:
        yield server


def shown(own: Credentials) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(own.authority, own.key, own.certificate)


def ann(folder: Path) -> Path:
    return folder / "clients" / "ann"


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with programs(tmp_path) as start:
        yield start


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
    return shown(unread(theirs, "client"))


@pytest.mark.parametrize("what", STRANGERS)
def test_d1_the_server_has_no_dealings_with(
    what: str, server: Server, folder: Path, other: Path, tmp_path: Path
) -> None:
    good = copy(folder, tmp_path / "good")
    credentials = stranger(what, folder, other)
    with grpc.secure_channel(f"127.0.0.1:{server.port}", credentials, NO_PROXY) as channel:
        join: Any = channel.unary_stream("/dsl.v1.SplitLearningService/Join")
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


def test_d1_c17_a_client_without_certificates_says_that_the_server_wants_them(server: Server) -> None:
    assert joining(server.port, None) == (
        f"the server at 127.0.0.1:{server.port} takes clients with a certificate: say --certs FOLDER"
    )


def test_d1_an_own_certificate_of_another_purpose_is_refused(folder: Path) -> None:
    remade(ann(folder), "client", folder, purpose=SERVER)
    with pytest.raises(ConfigError, match=r"client\.pem is not a certificate for a client"):
        Credentials.read(ann(folder), "client")


@pytest.mark.parametrize(
    ("begins", "ends", "says"),
    [
        (-2 * DAY, -DAY, "has expired: it was valid until"),
        (DAY, 2 * DAY, "is not valid yet: it will be from"),
    ],
)
def test_d1_d8_an_own_certificate_out_of_date_is_refused_with_the_clock_s_time(
    begins: datetime.timedelta, ends: datetime.timedelta, says: str, folder: Path
) -> None:
    remade(ann(folder), "client", folder, begins, ends)
    with pytest.raises(IdentityError) as caught:
        Credentials.read(ann(folder), "client")
    today = datetime.datetime.now(datetime.UTC)
    assert f"{ann(folder) / 'client.pem'} {says} " in str(caught.value)
    assert f"this machine's clock says {today:%Y-%m-%d}" in str(caught.value)
    assert caught.value.exit_code == 77


@pytest.mark.timeout(120)
def test_d1_d2_d3_d4_a_client_that_is_refused_says_why_in_a_line_and_soon(
    start: Start, made: Path, tmp_path: Path
) -> None:
    folder, other = copy(made, tmp_path / "certs"), make(tmp_path / "other", "ann")
    server, address = serve(start, "--certs", folder)
    ann_s, bob_s = folder / "clients" / "ann", folder / "clients" / "bob"

    assert "takes clients with a certificate: say --certs FOLDER" in says_no(start, "--server", address)
    theirs = ("--server", address, "--certs", other / "clients" / "ann")
    assert "cannot be trusted: " in says_no(start, *theirs)
    named = ("--server", address, "--certs", ann_s, "--name", "bob")
    assert "this certificate is that of 'ann', not of 'bob'" in says_no(start, *named, within=LOADED_S)
    certs.run(certs.Revoke(folder, "ann"))
    taken_back = ("--server", address, "--certs", ann_s)
    assert "the certificate of ann " in says_no(start, *taken_back, within=LOADED_S)
    remade(bob_s, "client", folder, -2 * DAY, -DAY)
    said = says_no(start, "--server", address, "--certs", bob_s)
    assert "client.pem has expired: it was valid until " in said
    assert "this machine's clock says " in said

    assert server.poll() is None
    server.send_signal(signal.SIGTERM)
    code, _ = ends(server, 20)
    assert code == 143
    lines = (tmp_path / "dsl-server-0" / "audit.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["refused", "refused"]


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


def test_d2_c17_a_server_without_tls_is_not_trusted(made: Path, tmp_path: Path) -> None:
    with serving(small_run(), tmp_path) as server:
        words = joining(server.port, of(made, "ann"))
        assert f"the server at 127.0.0.1:{server.port} does not speak TLS" in words
        assert "start it with --certs, too" in words
        with member(server) as client:
            client.send([smashed(server.run)])


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


@pytest.mark.parametrize(
    "uris", [[], ["dsl://client/ann", "dsl://client/bob"], ["https://x"], ["dsl://server/ann"]]
)
def test_d3_only_a_certificate_that_names_one_client_is_a_client_s(uris: list[str], folder: Path) -> None:
    names = [x509.UniformResourceIdentifier(uri) for uri in uris]
    remade(ann(folder), "client", folder, names=names or [x509.DNSName("ann")])
    assert Credentials.read(ann(folder), "client").name is None


# ---------------------------------------------------------------- D4: known, and not who it claims to be


def test_d4_ann_s_certificate_does_not_make_a_bob(server: Server, folder: Path) -> None:
    with refused(Code.PERMISSION_DENIED, "this certificate is that of 'ann', not of 'bob': leave --name out"):
        Ordinary(server, "bob", of(folder, "ann"))
    connection = Connection(f"127.0.0.1:{server.port}", Traffic(), Clock(), of(folder, "ann"))
    with pytest.raises(ForbiddenError) as caught:
        connection.join("bob", patience=10)
    assert caught.value.exit_code == 77
    connection.close()
    assert server.rounds.members() == []


# ---------------------------------------------------------------- D8: clocks that differ


def test_d8_certificates_begin_before_they_were_made(made: Path) -> None:
    ann = tls.certificate(made / "clients" / "ann" / "client.pem")
    assert ann.not_valid_before_utc < datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=30)


def made_at(offset: datetime.timedelta, to: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Certificates of thirty days, made where the clock differs so much from this machine's."""
    moment = tls.now() + offset
    with monkeypatch.context() as there:
        there.setattr(tls, "now", lambda: moment)
        certs.run(certs.Init(to, days=30))
        certs.run(certs.Client(to, "ann"))
    return to


@pytest.mark.parametrize("minutes", [-10, 10])
def test_d8_ten_minutes_between_two_clocks_do_no_harm(
    minutes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_at(datetime.timedelta(minutes=minutes), tmp_path / "certs", monkeypatch)
    with serving(small_run(), tmp_path, Credentials.read(folder, "server")) as server:
        works(server, folder)


@pytest.mark.parametrize(
    ("days", "own", "others"),
    [(60, "is not valid yet: it will be", "not yet valid"), (-60, "has expired: it was", "has expired")],
)
def test_d8_sixty_days_between_two_clocks_are_told_with_this_machine_s_time(
    days: int, own: str, others: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made_at(days * DAY, tmp_path / "certs", monkeypatch)
    clock = f"this machine's clock says {tls.now():%Y-%m-%d}"
    for where, end in ((folder, "server"), (ann(folder), "client")):
        with pytest.raises(IdentityError) as caught:
            Credentials.read(where, end)  # type: ignore[arg-type]
        assert own in str(caught.value)
        assert clock in str(caught.value)
    words = untrusted(tmp_path, unread(folder, "server"), unread(ann(folder), "client"))
    assert f"certificate {others}" in words or f"certificate is {others}" in words
    assert clock in words


# ---------------------------------------------------------------- D9: nothing is done for who was refused


CALLS = ("StreamActivations", "Evaluate", "SyncWeights", "Describe", "Leave")


@pytest.mark.parametrize("what", CALLS)
def test_d9_d7_a_session_is_of_no_use_to_another_client(
    what: str, server: Server, folder: Path, tmp_path: Path
) -> None:
    with member(server, "ann", of(folder, "ann")) as ann, member(server, "bob", of(folder, "bob")) as bob:
        before = {name: tensor.clone() for name, tensor in state_of(server.part).items()}
        requests: dict[str, list[Any]] = {
            "StreamActivations": ann.segment(pb.StreamActivationsRequest, [smashed(server.run)]),
            "Evaluate": [pb.EvaluateRequest(evaluation=pb.Evaluation(session=ann.session))],
            "SyncWeights": [pb.SyncWeightsRequest(weights=pb.Weights(session=ann.session))],
            "Describe": [pb.DescribeRequest(session=ann.session, class_names=["bobs"])],
            "Leave": [pb.LeaveRequest(session=ann.session, failure="bob says so")],
        }
        call, messages = getattr(bob.stub, what), requests[what]
        with refused(Code.PERMISSION_DENIED, "this session is not one of 'bob'"):
            if what in ("Describe", "Leave"):
                call(messages[0], timeout=DEADLINE_S)
            elif what == "StreamActivations":
                call(iter(messages), timeout=DEADLINE_S)
            else:
                list(call(iter(messages), timeout=DEADLINE_S))
        assert all(torch.equal(tensor, state_of(server.part)[name]) for name, tensor in before.items())
        assert server.rounds.members()[0].received.sequence == 0
        ann.send([smashed(server.run)])  # and ann has not lost it
        bob.send([smashed(server.run)])
        assert audit(tmp_path)[-1]["event"] == "refused"
        assert audit(tmp_path)[-1]["name"] == "bob"


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the server has made tensors of: the names of what did it."""
    seen = list[str]()

    def watched(name: str, unpack: Callable[..., Any]) -> Callable[..., Any]:
        def called(*given: Any) -> Any:
            seen.append(name)
            return unpack(*given)

        return called

    for name in ("unpack_batch", "unpack_weights", "unpack_gradient"):
        monkeypatch.setattr(codec, name, watched(name, getattr(codec, name)))
    return seen


def test_d9_what_follows_a_refused_opening_is_not_processed(
    server: Server, folder: Path, tmp_path: Path, decoded: list[str]
) -> None:
    with member(server, "ann", of(folder, "ann")) as ann, member(server, "bob", of(folder, "bob")) as bob:
        before = {name: tensor.clone() for name, tensor in state_of(server.part).items()}
        own = bob.segment(pb.StreamActivationsRequest, [smashed(server.run)] * 100)
        stolen = ann.opening(pb.StreamActivationsRequest, [smashed(server.run)] * 100)
        with refused(Code.PERMISSION_DENIED, "this session is not one of 'bob'"):
            # A server that refused the first and read on would find an opening and batches that are right.
            bob.stub.StreamActivations(iter([stolen, *own]), timeout=DEADLINE_S)
        assert decoded == []
        assert [member.received.sequence for member in server.rounds.members()] == [0, 0]
        assert server.record.samples_trained == 0
        assert all(torch.equal(tensor, state_of(server.part)[name]) for name, tensor in before.items())
        assert [line["event"] for line in audit(tmp_path)] == ["joined", "joined", "refused"]
        bob.send([smashed(server.run)])
        assert decoded == ["unpack_batch"]


# ---------------------------------------------------------------- D10: what is written nowhere


def test_d10_keys_are_not_in_what_is_printed(made: Path) -> None:
    assert "PRIVATE" not in repr(Credentials.read(made, "server"))


def secrets_of(folder: Path) -> list[str]:
    """Every line of every key in it: what is found elsewhere of one is a key's body."""
    lines = [line for path in folder.rglob("*.key") for line in path.read_text().splitlines()]
    return [line for line in lines if len(line) > 20]


def test_d10_no_key_and_no_session_is_written_anywhere(made: Path, tmp_path: Path) -> None:
    run = small_run(clients=2, epochs=1)
    server, _, _ = federation(run, tmp_path, [Batches(run, seed, 16) for seed in range(2)], made)
    sessions = [member.session for member in server.rounds.members()]
    secrets = [*secrets_of(made), "PRIVATE KEY", *sessions]
    assert len(secrets) > 12
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert written
    for path in written:
        content = path.read_bytes()
        assert not any(secret.encode() in content for secret in secrets), path


@pytest.mark.timeout(120)
def test_d10_nothing_that_the_programs_say_or_leave_has_a_key_or_a_session(
    start: Start, made: Path, tmp_path: Path
) -> None:
    process, address = serve(start, "--certs", made, "--clients", 2)
    words = {"client": start("dsl-client", "--server", address, "--certs", ann(made)), "server": process}
    refusal = start("dsl-client", "--server", address, "--certs", ann(made), "--name", "bob")
    commands = [command_of(running) for running in (*words.values(), refusal)]
    assert all(str(made).encode() in command for command in commands)
    with grpc.secure_channel(address, shown(of(made, "bob")), NO_PROXY) as channel:
        stub: Any = SplitLearningServiceStub(channel)  # type: ignore[no-untyped-call]
        known: Any = pb.Codec.values()
        request = pb.JoinRequest(oldest_version=1, newest_version=1, name="bob", codecs=known)
        membership = stub.Join(request)
        session = next(membership).welcome.session
        said = [ends(refusal, 60)]  # while there is a run, for it ends when both have left
        stub.Leave(pb.LeaveRequest(session=session), timeout=DEADLINE_S)
        said += [ends(running, 60) for running in words.values()]
    assert [code for code, _ in said] == [77, 0, 0], said
    secrets = [*secrets_of(made), "PRIVATE KEY", session, "Traceback"]
    assert len(secrets) > 6
    left = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"audit.jsonl", "metrics.jsonl", "run.json", "summary.json", "part.safetensors"} <= {
        path.name for path in left
    }
    texts = [*commands, *(text.encode() for _, text in said), *(path.read_bytes() for path in left)]
    for text in texts:
        assert not any(secret.encode() in text for secret in secrets), text[:2000]
    tokens = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")  # as any session is
    assert tokens.fullmatch(session.encode())
    for text in (text for text in texts if b"\0" not in text):
        assert not tokens.search(text.replace(run_id_of(tmp_path), b"")), text[:2000]


def command_of(process: subprocess.Popen[str]) -> bytes:
    """How it was started. At the moment when a process begins the kernel has nothing of that yet."""
    deadline = time.monotonic() + DEADLINE_S
    while not (command := Path(f"/proc/{process.pid}/cmdline").read_bytes()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return command


def run_id_of(folder: Path) -> bytes:
    """Names the run, opens nothing."""
    (facts,) = folder.glob("dsl-server-*/checkpoint/facts.json")
    return str(json.loads(facts.read_text())["run_id"]).encode()


# ---------------------------------------------------------------- D11: what is open to others


def test_d11_keys_and_folders_are_made_the_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        folder = make(tmp_path / "certs", "ann")
    finally:
        os.umask(before)
    for path in [folder, *folder.rglob("*")]:
        mode = stat.S_IMODE(path.stat().st_mode)
        expected = 0o700 if path.is_dir() else 0o600 if path.suffix == ".key" else 0o644
        assert mode == expected, path


@pytest.mark.parametrize("key", ["authority.key", "server.key", "clients/ann/client.key"])
@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o620])
def test_d11_a_key_that_others_may_read_is_refused_with_the_remedy(key: str, mode: int, folder: Path) -> None:
    path = folder / key
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"can be read by others .* chmod 600 {path}"):
        tls.private_key(path)


@pytest.mark.parametrize(
    ("address", "stays"),
    [
        ("127.0.0.1:1", True),
        ("127.8.9.1:1", True),
        ("[::1]:1", True),
        ("localhost:1", True),
        ("127.0.0.1", True),
        ("0.0.0.0:1", False),
        ("[::]:1", False),
        ("192.168.0.1:1", False),
        ("gpu-host:1", False),
        ("localhost.example.org:1", False),
        ("127.0.0.1.example.org:1", False),
        (":1", False),
        ("", False),
    ],
)
def test_d11_only_loopback_goes_without_certificates(address: str, stays: bool) -> None:
    assert tls.is_loopback(address) is stays
    for certs_, insecure in ((Path("x"), False), (None, True)):
        tls.check_exposure("--listen", address, certs_, insecure)
    if stays:
        tls.check_exposure("--listen", address, None, False)
    else:
        with pytest.raises(ConfigError, match=r"--listen .*--certs.*--insecure"):
            tls.check_exposure("--listen", address, None, False)


def test_d11_other_machines_are_served_with_certificates_or_by_name(start: Start) -> None:
    said = refuses(start("dsl-server", "--listen", "0.0.0.0:0"))
    assert said.startswith("dsl-server: error: --listen 0.0.0.0:0: without --certs nothing is encrypted")
    assert "--insecure" in said
    server, address = serve(start, "--listen", "0.0.0.0:0", "--insecure")
    client = start("dsl-client", "--server", address)
    for process in (client, server):
        code, words = ends(process, 60)
        assert code == 0, words


def test_d11_a_client_goes_to_other_machines_with_certificates_or_by_name(start: Start) -> None:
    said = refuses(start("dsl-client", "--server", "gpu-host:50051"))
    assert said.startswith("dsl-client: error: --server gpu-host:50051: without --certs nothing is encrypted")
    assert "--insecure" in said
    nowhere = ("--server", "gpu-host.invalid:1", "--insecure", "--patience", 1)
    code, said = ends(start("dsl-client", *nowhere), 30)
    assert code == 69, said


@pytest.mark.parametrize("name", ["dsl-server", "dsl-client"])
def test_d11_a_key_that_others_may_read_is_refused(
    name: str, start: Start, made: Path, tmp_path: Path
) -> None:
    folder = copy(made, tmp_path / "certs")
    own, key = (folder, "server.key") if name == "dsl-server" else (folder / "clients" / "ann", "client.key")
    (own / key).chmod(0o644)
    said = refuses(start(name, "--certs", own))
    assert f"{own / key} can be read by others (mode 0644): chmod 600 {own / key}" in said


# ---------------------------------------------------------------- D13: a body from who is no member


def bodies(session: str) -> dict[str, tuple[Any, type[Any]]]:
    """How each call that takes a body opens, by its name, and the class of what follows."""
    return {
        "StreamActivations": (
            pb.StreamActivationsRequest(segment=pb.Segment(session=session, batches=1, samples=8)),
            pb.StreamActivationsRequest,
        ),
        "Evaluate": (pb.EvaluateRequest(evaluation=pb.Evaluation(session=session)), pb.EvaluateRequest),
        "SyncWeights": (
            pb.SyncWeightsRequest(
                weights=pb.Weights(session=session, purpose=pb.SYNC_PURPOSE_AVERAGE, samples=8)
            ),
            pb.SyncWeightsRequest,
        ),
    }


@pytest.mark.parametrize("session", ["", "0" * 32])
@pytest.mark.parametrize("call", bodies(""))
def test_d13_of_a_body_from_no_member_not_a_byte_is_decoded(
    call: str, session: str, server: Server, folder: Path, decoded: list[str]
) -> None:
    opening, kind = bodies(session)[call]
    with member(server, "ann", of(folder, "ann")) as ann:
        frame = batch_message(kind, 1, smashed(server.run)) if call != "SyncWeights" else kind(data=bytes(99))
        with refused(Code.FAILED_PRECONDITION, "join first"):
            response = getattr(ann.stub, call)(iter([opening, frame]), timeout=DEADLINE_S)
            list(response if call != "StreamActivations" else [response])
        assert decoded == []
        ann.send([smashed(server.run)])


def resident(pid: int) -> int:
    """The most memory that the process has had so far, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found
    return 1024 * int(found[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this kernel has no /proc")
def test_d13_a_body_from_no_member_does_not_grow_the_server(start: Start, made: Path) -> None:
    process, address = serve(start, "--certs", made)
    piece = bytes(1 << 20)
    with grpc.secure_channel(address, shown(of(made, "ann")), NO_PROXY) as channel:
        stub: Any = SplitLearningServiceStub(channel)  # type: ignore[no-untyped-call]
        health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=DEADLINE_S)
        before = resident(process.pid)
        for call, (opening, kind) in 10 * list(bodies("0" * 32).items()):
            messages = itertools.chain([opening], (kind(data=piece) for _ in range(50)))
            with refused(Code.FAILED_PRECONDITION, "join first"):
                response = getattr(stub, call)(messages, timeout=DEADLINE_S)
                list(response if call != "StreamActivations" else [response])
        grown = resident(process.pid) - before
    assert grown < 64 << 20, f"{grown >> 20} MiB for 30 bodies of 50 MiB each"
    assert process.poll() is None


# ---------------------------------------------------------------- D14: nothing is unpickled


PACKAGES = ("common", "dsl_server", "dsl_client", "dsl_lab", "tools", "benchmarks")
PICKLING = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve")
LOADERS = ("torch.load", "torch.save", "torch.jit", "torch.package", "torch.hub", "pandas.read_pickle")
CODE = ("eval", "exec", "compile", "__import__")


def source_files() -> list[Path]:
    found = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert len(found) > 50
    return [path for path in found if not path.name.endswith(("_pb2.py", "_pb2_grpc.py"))]


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The dotted name that an expression stands for, imports resolved; empty where it stands for none."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value, names)):
        return f"{owner}.{node.attr}"
    return ""


def dangers(source: str) -> set[str]:
    """What in it could make objects, or code, of bytes."""
    tree, names = ast.parse(source), dict[str, str]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            whole = [(alias.asname, alias.name, alias.name.partition(".")[0]) for alias in node.names]
            names |= {given or root: name if given else root for given, name, root in whole}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    nodes = list(ast.walk(tree))
    used = {dotted(node, names) for node in nodes if isinstance(node, ast.Name | ast.Attribute)}
    found = {name for name in used | set(names.values()) if name.startswith(LOADERS) or name in CODE}
    found |= {name for name in names.values() if name.partition(".")[0] in PICKLING}
    calls = [node for node in nodes if isinstance(node, ast.Call) and not refuses_pickles(node)]
    return found | {"numpy.load" for call in calls if dotted(call.func, names) == "numpy.load"}


def refuses_pickles(call: ast.Call) -> bool:
    said = {given.arg: given.value for given in call.keywords}.get("allow_pickle")
    return isinstance(said, ast.Constant) and said.value is False


@pytest.mark.parametrize("path", source_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_d14_nothing_is_unpickled_and_no_text_becomes_code(path: Path) -> None:
    assert dangers(path.read_text()) == set()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import joblib.externals",
        "from dill import loads",
        "import shelve as shelf",
        "def later():\n    import marshal",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load\nload(path)",
        "from torch import load as read\nread(path)",
        "import torch\nread = torch.load",
        "import torch\ntorch.jit.load(path)",
        "import numpy as np\nnp.load(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=trusted)",
        "from numpy import load\nload(path)",
        "import numpy as np\nnp.load(path, **options)",
        "eval(text)",
        "exec(text)",
        "run = eval",
        "__import__(name)",
    ],
)
def test_d14_the_scan_finds_what_it_is_to_find(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "import re\nre.compile(text)",
        "module.eval()",
        "from safetensors.torch import load_file\nload_file(path)",
        "import json\njson.load(file)",
    ],
)
def test_d14_the_scan_finds_nothing_else(source: str) -> None:
    assert dangers(source) == set()
