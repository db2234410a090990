"""`dsl certs`: what it makes, what it never overwrites, and what is refused of keys and certificates."""

import datetime
import ipaddress
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography import x509

from common import tls
from common.errors import ConfigError, IdentityError
from common.tls import Credentials
from dsl_lab import certs
from tests.certificates import CLIENT, DAY, SERVER, copy, make

pytestmark = pytest.mark.timeout(30)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What is only read here."""
    return make(tmp_path_factory.mktemp("certs") / "made", "ann", "bob")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return copy(made, tmp_path / "certs")


def purposes(cert: x509.Certificate) -> list[x509.ObjectIdentifier]:
    return list(cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value)


def names(cert: x509.Certificate) -> list[object]:
    return [name.value for name in cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value]


# ---------------------------------------------------------------- what is made


def test_the_authority_may_sign_and_nothing_more(made: Path) -> None:
    authority = tls.certificate(made / "authority.pem")
    basic = authority.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    usage = authority.extensions.get_extension_for_class(x509.KeyUsage).value
    assert usage.key_cert_sign
    assert not usage.digital_signature


def test_a_certificate_names_its_hosts_or_its_client_and_has_one_purpose(tmp_path: Path, made: Path) -> None:
    ann = tls.certificate(made / "clients" / "ann" / "client.pem")
    assert names(ann) == ["dsl://client/ann"]
    assert purposes(ann) == [CLIENT]
    assert not ann.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    certs.run(certs.Init(tmp_path / "one", host=("gpu-host", "10.1.2.3", "fd00::1"), days=30))
    server = tls.certificate(tmp_path / "one" / "server.pem")
    assert names(server) == ["gpu-host", ipaddress.ip_address("10.1.2.3"), ipaddress.ip_address("fd00::1")]
    assert purposes(server) == [SERVER]
    left = server.not_valid_after_utc - datetime.datetime.now(datetime.UTC)
    assert 29.9 * DAY < left <= 30 * DAY


def test_a_client_s_folder_is_all_that_the_client_needs(made: Path, tmp_path: Path) -> None:
    moved = copy(made / "clients" / "ann", tmp_path / "elsewhere")
    assert sorted(path.name for path in moved.iterdir()) == ["authority.pem", "client.key", "client.pem"]
    assert Credentials.read(moved, "client").name == "ann"


def test_what_was_made_is_listed_and_what_is_revoked_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    certs.run(certs.Revoke(folder, "ann"))
    capsys.readouterr()
    certs.run(certs.List(folder))
    title, *lines = capsys.readouterr().out.splitlines()
    assert title.split() == ["name", "serial", "valid", "from", "to", "revoked"]
    told = {line.split()[0]: line.split()[1:] for line in lines}
    assert set(told) == {"(server)", "ann", "bob"}
    ann = tls.certificate(folder / "clients" / "ann" / "client.pem")
    until = f"{ann.not_valid_after_utc:%Y-%m-%d}"
    assert told["ann"] == [f"{ann.serial_number:x}", f"{ann.not_valid_before_utc:%Y-%m-%d}", until, "revoked"]
    assert told["bob"][-1] == "-"
    assert tls.revoked(folder) == {ann.serial_number}


def test_who_was_revoked_can_be_given_another_certificate(folder: Path) -> None:
    old = tls.certificate(folder / "clients" / "ann" / "client.pem").serial_number
    certs.run(certs.Revoke(folder, "ann"))
    with pytest.raises(ConfigError, match="nothing is overwritten; remove it first"):
        certs.run(certs.Client(folder, "ann"))
    (folder / "clients" / "ann").rename(folder / "old")
    certs.run(certs.Client(folder, "ann"))
    assert tls.certificate(folder / "clients" / "ann" / "client.pem").serial_number != old
    assert tls.revoked(folder) == {old}


# ---------------------------------------------------------------- what is refused


def test_nothing_is_overwritten(folder: Path) -> None:
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="not empty: nothing is overwritten; choose a new folder"):
        certs.run(certs.Init(folder))
    with pytest.raises(ConfigError, match="ann has a certificate; first take it back: dsl certs revoke"):
        certs.run(certs.Client(folder, "ann"))
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "-x", ".x", "a b", "ä", "a\n", "x" * 65])
def test_a_name_that_is_no_folder_s_is_refused(name: str, made: Path) -> None:
    with pytest.raises(ConfigError, match="use 1 to 64 letters, digits"):
        certs.run(certs.Client(made, name))


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (lambda at: certs.Init(at / "new", days=0), "--days 0: choose 1 to 36500"),
        (lambda at: certs.Init(at / "new", host=()), "--host needs at least one name"),
        (lambda at: certs.Init(at / "new", host=("gpu:50051",)), "--host 'gpu:50051': say a host's name"),
        (lambda at: certs.Init(at / "revoked.txt"), "is not empty"),
        (lambda at: certs.Init(at / "revoked.txt" / "x"), "Not a directory"),
        (lambda at: certs.Client(at / "none", "eve"), "has no authority; make one: dsl certs init"),
        (lambda at: certs.List(at / "none"), "has no authority; make one: dsl certs init"),
        (lambda at: certs.Revoke(at, "eve"), "no certificate of a client 'eve'; see dsl certs list"),
        (lambda at: certs.Revoke(at, "(server)"), "no certificate of a client"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    command: Callable[[Path], certs.Command], says: str, made: Path
) -> None:
    with pytest.raises(ConfigError) as caught:
        certs.run(command(made))
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (made / "new").exists()


def test_to_revoke_twice_is_said(folder: Path) -> None:
    certs.run(certs.Revoke(folder, "ann"))
    with pytest.raises(ConfigError, match="ann is revoked already"):
        certs.run(certs.Revoke(folder, "ann"))


def test_an_authority_that_has_expired_signs_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    later = tls.now() + 366 * DAY
    monkeypatch.setattr(tls, "now", lambda: later)
    with pytest.raises(IdentityError, match=r"authority\.pem has expired"):
        certs.run(certs.Client(folder, "eve"))


def ann(folder: Path) -> Path:
    return folder / "clients" / "ann"


@pytest.mark.parametrize("file", ["authority.pem", "client.pem", "client.key"])
@pytest.mark.parametrize("content", [None, b"", b"garbage", b"-----BEGIN CERTIFICATE-----\nAAAA\n"])
def test_a_file_that_is_missing_or_broken_is_named(file: str, content: bytes | None, folder: Path) -> None:
    path = ann(folder) / file
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    missing = f"--certs {ann(folder)} has no client.pem: it is made by dsl certs client"
    named = missing if content is None and file == "client.pem" else str(path)
    with pytest.raises(ConfigError, match=named):
        Credentials.read(ann(folder), "client")


def test_files_that_do_not_belong_together_are_refused(folder: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", "ann")
    (folder / "clients" / "bob" / "client.key").rename(ann(folder) / "client.key")
    with pytest.raises(ConfigError, match=r"client\.key is not the key of .*client\.pem"):
        Credentials.read(ann(folder), "client")
    (folder / "authority.pem").rename(ann(other) / "authority.pem")
    with pytest.raises(ConfigError, match=r"client\.pem is not signed by .*authority\.pem"):
        Credentials.read(ann(other), "client")


def test_a_list_of_those_revoked_that_cannot_be_read_is_not_an_empty_one(folder: Path) -> None:
    (folder / tls.REVOKED).write_text("1f ann\n\nann\n")
    with pytest.raises(ConfigError, match="does not begin with a serial number"):
        tls.revoked(folder)
    (folder / tls.REVOKED).unlink()
    with pytest.raises(ConfigError, match=r"revoked\.txt: No such file"):
        tls.revoked(folder)


# ---------------------------------------------------------------- where a connection may go without


def test_certs_and_insecure_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="--certs and --insecure exclude each other"):
        tls.check_exposure("--server", "127.0.0.1:1", Path("x"), True)


# ---------------------------------------------------------------- as a program


Program = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def dsl(tmp_path: Path) -> Program:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command, environment = (
            [sys.executable, "-c", PROGRAM, *words],
            {**os.environ, "PYTHONPATH": str(ROOT)},
        )
        return subprocess.run(
            command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=25, check=False
        )

    return run


PROGRAM = """
import sys
from dsl_lab.__main__ import main
try:
    main()
finally:
    assert not {"torch", "grpc"} & set(sys.modules), "start-up must not wait for them"
"""


def test_the_commands_one_after_the_other(dsl: Program, tmp_path: Path) -> None:
    for words, says in (
        (["init", "c", "--host", "gpu-host", "10.0.0.1"], "certificate for gpu-host, 10.0.0.1"),
        (["client", "c", "ward-7"], "move this folder to ward-7's machine"),
        (["revoke", "c", "ward-7"], "ward-7 is revoked"),
        (["list", "c"], "revoked"),
    ):
        done = dsl("certs", *words)
        assert (done.returncode, done.stderr) == (0, ""), done.stderr
        assert says in done.stdout
    done = dsl("certs", "init", "c")
    assert done.returncode == 2
    assert done.stderr == "dsl: error: c is not empty: nothing is overwritten; choose a new folder\n"


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ([], ["init", "client", "list", "revoke", "know each other"]),
        (["init"], ["--host", "--days", "(default: 365)", "localhost 127.0.0.1 ::1"]),
        (["client"], ["moved to its machine"]),
        (["revoke"], ["join no more"]),
    ],
)
def test_each_command_explains_itself(command: list[str], says: list[str], dsl: Program) -> None:
    done = dsl("certs", *command, "--help")
    words = " ".join(done.stdout.replace("│", " ").split())
    assert done.returncode == 0
    for text in says:
        assert text in words
