"""`dsl certs`: a run's own authority, and the certificates by which its programs know each other.

DIR/  authority.pem  authority.key    who signs
      server.pem     server.key       dsl-server --certs DIR
      revoked.txt                     a line each: the serial number, and whose it was
      issued/SERIAL.pem               every certificate that was made, to be listed
      clients/NAME/                   dsl-client --certs: to be moved to NAME's machine
"""

import datetime
import ipaddress
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from common import tls
from common.errors import ConfigError

CLOCKS = datetime.timedelta(hours=1)  # certificates are valid so long before they are made: clocks differ
_CURVE = ec.SECP256R1()
_SAFE_NAME = r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}"  # a client's name that is a folder's too


@dataclass(frozen=True)
class Init:
    """Makes a new authority, and the server's certificate."""

    dir: tyro.conf.Positional[Path]
    """A folder that is new, or empty."""
    host: tuple[str, ...] = ("localhost", "127.0.0.1", "::1", socket.gethostname())
    """The names and addresses by which clients reach the server."""
    days: int = 365
    """For how long the authority, and all that it signs, is valid."""


@dataclass(frozen=True)
class Client:
    """Makes a client's certificate, in a folder that is to be moved to its machine."""

    dir: tyro.conf.Positional[Path]
    """The authority's folder."""
    name: tyro.conf.Positional[str]
    """Who the client is from now on: its name in the run."""


@dataclass(frozen=True)
class List:
    """Lists the certificates that were made."""

    dir: tyro.conf.Positional[Path]
    """The authority's folder."""


@dataclass(frozen=True)
class Revoke:
    """Takes back a client's certificates: a server with this folder lets it join no more."""

    dir: tyro.conf.Positional[Path]
    """The authority's folder, as the server has it."""
    name: tyro.conf.Positional[str]
    """The client's name."""


Command = (
    Annotated[Init, tyro.conf.subcommand("init")]
    | Annotated[Client, tyro.conf.subcommand("client")]
    | Annotated[List, tyro.conf.subcommand("list")]
    | Annotated[Revoke, tyro.conf.subcommand("revoke")]
)


@dataclass(frozen=True)
class Certs:
    """Makes, lists and revokes the certificates by which server and clients know each other."""

    command: tyro.conf.OmitSubcommandPrefixes[tyro.conf.OmitArgPrefixes[Command]]


def run(command: Command) -> None:
    """Does it, and says what it did. Raises ConfigError."""
    try:
        match command:
            case Init():
                _init(command)
            case Client():
                _client(command)
            case List():
                _list(command.dir)
            case Revoke():
                _revoke(command)
    except OSError as error:
        raise ConfigError(f"{error.filename or command.dir}: {error.strerror}") from error


def _init(command: Init) -> None:
    folder = command.dir
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} is not empty: nothing is overwritten; choose a new folder")
    if not 1 <= command.days <= 36500:
        raise ConfigError(f"--days {command.days}: choose 1 to 36500")
    hosts = [_host(name) for name in dict.fromkeys(command.host)]
    if not hosts:
        raise ConfigError("--host needs at least one name: that by which clients reach the server")
    folder.mkdir(parents=True, exist_ok=True)
    for path in (folder, folder / "issued", folder / "clients"):
        path.mkdir(exist_ok=True)
        path.chmod(0o700)
    key, now = ec.generate_private_key(_CURVE), tls.now()
    name = _named(f"dsl authority {secrets.token_hex(4)}")
    authority = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - CLOCKS)
        .not_valid_after(now + datetime.timedelta(days=command.days))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    _write_key(folder / "authority.key", key)
    _write(folder / "authority.pem", _pem(authority))
    _write(folder / tls.REVOKED, b"")
    _issue(folder, folder, "server", "dsl server", hosts, ExtendedKeyUsageOID.SERVER_AUTH)
    print(f"{folder}: an authority and a server's certificate for {', '.join(dict.fromkeys(command.host))}")
    print(f"next: dsl certs client {folder} NAME; dsl-server --certs {folder}")


def _client(command: Client) -> None:
    folder, name = command.dir, command.name
    if not re.fullmatch(_SAFE_NAME, name):
        raise ConfigError(f"{name!r}: use 1 to 64 letters, digits, '.', '_', '-', and no '.' or '-' first")
    _signing(folder)
    theirs = folder / "clients" / name
    if name in {owner for owner, cert in _issued(folder) if not _revoked(folder, cert)}:
        raise ConfigError(f"{name} has a certificate; first take it back: dsl certs revoke {folder} {name}")
    if theirs.exists():
        raise ConfigError(f"{theirs} exists: nothing is overwritten; remove it first")
    theirs.mkdir(mode=0o700)
    uri = x509.UniformResourceIdentifier(tls.IDENTITY + name)
    _issue(folder, theirs, "client", name, [uri], ExtendedKeyUsageOID.CLIENT_AUTH)
    _write(theirs / "authority.pem", (folder / "authority.pem").read_bytes())
    print(
        f"{theirs}: move this folder to {name}'s machine; there: dsl-client --certs FOLDER --server HOST:PORT"
    )


def _list(folder: Path) -> None:
    lines = [("name", "serial", "valid from", "to", "revoked")]
    for name, cert in _issued(folder):
        begin, end = (f"{when:%Y-%m-%d}" for when in (cert.not_valid_before_utc, cert.not_valid_after_utc))
        revoked = "revoked" if _revoked(folder, cert) else "-"
        lines.append((name or "(server)", f"{cert.serial_number:x}", begin, end, revoked))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip())


def _revoke(command: Revoke) -> None:
    folder, name = command.dir, command.name
    theirs = [cert for owner, cert in _issued(folder) if owner == name]
    if not theirs:
        raise ConfigError(f"{folder} has no certificate of a client {name!r}; see dsl certs list {folder}")
    left = [cert for cert in theirs if not _revoked(folder, cert)]
    if not left:
        raise ConfigError(f"{name} is revoked already")
    with (folder / tls.REVOKED).open("a") as file:
        file.write("".join(f"{cert.serial_number:x} {name}\n" for cert in left))
    print(
        f"{name} is revoked: a server with this folder lets it join no more; a member it stays till it ends"
    )


def _issue(
    folder: Path,
    into: Path,
    file: str,
    subject: str,
    names: list[x509.GeneralName],
    purpose: x509.ObjectIdentifier,
) -> None:
    """A new key and its certificate, signed by the folder's authority and as long valid as that is."""
    authority, signer = _signing(folder)
    key, now = ec.generate_private_key(_CURVE), tls.now()
    public = signer.public_key()
    cert = (
        x509.CertificateBuilder(
            authority.subject, _named(subject), key.public_key(), secrets.randbits(63) + 1
        )
        .not_valid_before(now - CLOCKS)
        .not_valid_after(authority.not_valid_after_utc)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
        .sign(signer, hashes.SHA256())
    )
    _write_key(into / f"{file}.key", key)
    _write(into / f"{file}.pem", _pem(cert))
    _write(folder / "issued" / f"{cert.serial_number:x}.pem", _pem(cert))


def _signing(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """The authority and its key. Raises ConfigError where it is none, or not valid any more."""
    if not (folder / "authority.key").exists():
        raise ConfigError(f"{folder} has no authority; make one: dsl certs init {folder}")
    authority = tls.certificate(folder / "authority.pem")
    tls.check_dates(authority, folder / "authority.pem")
    key = tls.private_key(folder / "authority.key")
    assert isinstance(key, ec.EllipticCurvePrivateKey), "init makes no other"
    return authority, key


def _issued(folder: Path) -> list[tuple[str | None, x509.Certificate]]:
    """Every certificate that was made, and the client whose it is, the oldest first."""
    if not (folder / "issued").is_dir():
        raise ConfigError(f"{folder} has no authority; make one: dsl certs init {folder}")
    certs = [tls.certificate(path) for path in (folder / "issued").glob("*.pem")]
    ordered = sorted(certs, key=lambda cert: (cert.not_valid_before_utc, cert.serial_number))
    return [(tls.identity_of(cert), cert) for cert in ordered]


def _revoked(folder: Path, cert: x509.Certificate) -> bool:
    return cert.serial_number in tls.revoked(folder)


def _host(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        pass
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,253}", name):
        raise ConfigError(f"--host {name!r}: say a host's name or address, without a port")
    return x509.DNSName(name)


def _named(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _usage(signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )


def _pem(cert: x509.Certificate) -> bytes:
    return cert.public_bytes(serialization.Encoding.PEM)


def _write_key(path: Path, key: ec.EllipticCurvePrivateKey) -> None:
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write(path, pem, 0o600)


def _write(path: Path, content: bytes, mode: int = 0o644) -> None:
    """Never over a file that is there: it raises FileExistsError."""
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
