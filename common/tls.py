"""Who is who: certificates and keys as files, a client's identity, and why a handshake fails.

Knows no gRPC: what it gives are bytes and names. `dsl certs` makes the files (dsl_lab/certs.py).
"""

import contextlib
import datetime
import ipaddress
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID

from common.errors import ConfigError, IdentityError

IDENTITY = "dsl://client/"  # and the client's name: a URI among its certificate's alternative names
REVOKED = "revoked.txt"
WAIT_S = 2.0  # for each step of a preflight
End = Literal["server", "client"]
# What to do when a server's certificate is not valid, by OpenSSL's number of the reason (X509_V_ERR_...).
_OTHER_AUTHORITY = "; it is not of the authority in {folder}/authority.pem"
_OTHER_HOST = "; its certificate must name {host}: dsl certs init --host"
_REMEDIES = {
    **dict.fromkeys((9, 10), "; {clock}"),  # not yet valid, expired
    **dict.fromkeys((7, 18, 19, 20, 21), _OTHER_AUTHORITY),
    **dict.fromkeys((62, 64), _OTHER_HOST),
}
AuthContext = Mapping[str, Any]  # what gRPC knows of a connection's other end


@dataclass(frozen=True)
class Credentials:
    """One end's, in PEM: what the other end must be signed by, and what it shows itself."""

    folder: Path
    end: End
    authority: bytes
    certificate: bytes
    key: bytes = field(repr=False)
    name: str | None = None  # of a client

    @staticmethod
    def read(folder: Path, end: End) -> "Credentials":
        """Raises ConfigError where the files cannot be used, IdentityError where they are out of date."""
        if not (folder / f"{end}.pem").exists():
            made = (
                "dsl certs init" if end == "server" else "dsl certs client, which makes the client's folder"
            )
            raise ConfigError(f"--certs {folder} has no {end}.pem: it is made by {made}")
        paths = [folder / "authority.pem", folder / f"{end}.pem", folder / f"{end}.key"]
        authority, own, key = certificate(paths[0]), certificate(paths[1]), private_key(paths[2])
        if key.public_key() != own.public_key():
            raise ConfigError(f"{paths[2]} is not the key of {paths[1]}")
        try:
            own.verify_directly_issued_by(authority)
        except (ValueError, TypeError, InvalidSignature):
            raise ConfigError(f"{paths[1]} is not signed by {paths[0]}") from None
        if not _is_for(own, end):
            raise ConfigError(f"{paths[1]} is not a certificate for a {end}")
        for cert, path in ((authority, paths[0]), (own, paths[1])):
            check_dates(cert, path)
        pems = {
            part: _bytes(path) for part, path in zip(("authority", "certificate", "key"), paths, strict=True)
        }
        return Credentials(folder, end, **pems, name=identity_of(own))


class Guard:
    """Tells clients apart by their certificates. Raises IdentityError for those it does not know."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        revoked(folder)  # raises ConfigError now rather than at the first client

    def admit(self, connection: AuthContext) -> str:
        """The client's name. The list of those revoked is read anew."""
        name, serial = self._known(connection)
        try:
            out = serial in revoked(self._folder)
        except ConfigError as error:
            raise IdentityError(f"the server cannot read its {REVOKED}, so nobody may join") from error
        if out:
            raise IdentityError(f"the certificate of {name} (serial {serial:x}) is revoked")
        return name

    def name(self, connection: AuthContext) -> str:
        """The client's name."""
        return self._known(connection)[0]

    def _known(self, connection: AuthContext) -> tuple[str, int]:
        for pem in connection.get("x509_pem_cert", ()):
            with contextlib.suppress(ValueError):  # one that cannot be read names nobody
                cert = x509.load_pem_x509_certificate(pem)
                if name := identity_of(cert):
                    return name, cert.serial_number
        raise IdentityError(f"this certificate names no client ({IDENTITY}NAME); make one: dsl certs client")


def identity_of(cert: x509.Certificate) -> str | None:
    """The client that a certificate names, if it names just one."""
    try:
        names = cert.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return None
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    ours = [uri.removeprefix(IDENTITY) for uri in uris if uri.startswith(IDENTITY)]
    return ours[0] if len(ours) == 1 else None


def revoked(folder: Path) -> frozenset[int]:
    """Serial numbers. Raises ConfigError: a list that cannot be read is not an empty one."""
    path = folder / REVOKED
    try:
        lines = _bytes(path).decode().splitlines()
        return frozenset(int(line.split()[0], 16) for line in lines if line.strip())
    except ValueError:
        raise ConfigError(f"{path} has a line that does not begin with a serial number") from None


def certificate(path: Path) -> x509.Certificate:
    """Raises ConfigError."""
    try:
        return x509.load_pem_x509_certificate(_bytes(path))
    except ValueError:
        raise ConfigError(f"{path} is not a certificate (PEM)") from None


def private_key(path: Path) -> PrivateKeyTypes:
    """Raises ConfigError, also for one that others than its owner may read."""
    content = _bytes(path)
    mode = path.stat().st_mode & 0o777
    if mode & 0o077:
        raise ConfigError(f"{path} can be read by others (mode {mode:04o}): chmod 600 {path}")
    try:
        return serialization.load_pem_private_key(content, password=None)
    except (ValueError, TypeError):
        raise ConfigError(f"{path} is not a private key (PEM, without a password)") from None


def check_dates(cert: x509.Certificate, path: Path) -> None:
    """Raises IdentityError unless the certificate is valid now, by this machine's clock."""
    moment, begin, end = now(), cert.not_valid_before_utc, cert.not_valid_after_utc
    if moment > end:
        raise IdentityError(f"{path} has expired: it was valid until {_time(end)}; {_clock()}")
    if moment < begin:
        raise IdentityError(f"{path} is not valid yet: it will be from {_time(begin)}; {_clock()}")


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def check_exposure(flag: str, address: str, certs: Path | None, insecure: bool) -> None:
    """Raises ConfigError unless the connection is encrypted, stays on this machine, or is to be neither."""
    if certs and insecure:
        raise ConfigError("--certs and --insecure exclude each other: leave one out")
    if certs or insecure or is_loopback(address):
        return
    raise ConfigError(
        f"{flag} {address}: without --certs nothing is encrypted and no one's identity is known; make "
        "certificates by dsl certs, or say --insecure inside a private network"
    )


def is_loopback(address: str) -> bool:
    """Of host:port. No name but localhost is looked up."""
    host = _host(address)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


@dataclass(frozen=True)
class Handshake:
    """version: of TLS, such as TLSv1.3. expires: the server's certificate, by what it says itself."""

    version: str
    expires: datetime.datetime


def preflight(target: str, credentials: Credentials | None) -> None:
    """Raises IdentityError where a server is there and one end will not have the other: gRPC says only that
    it is UNAVAILABLE, as of a server that is not there yet, or slow. Of these nothing is said here.
    """
    with contextlib.suppress(OSError, ValueError, OverflowError):
        meet(target, credentials)


def meet(target: str, credentials: Credentials | None, wait: float = WAIT_S) -> Handshake | None:
    """What the handshake with a server came to; None where neither end wants one. wait: seconds, a step.

    Raises IdentityError where one end will not have the other, and the OSError that is no one's judgement:
    nobody is there, or says anything in time.
    """
    if credentials is None:
        with _connection(target, wait) as connection:
            if _speaks_tls(connection):
                raise IdentityError(
                    f"the server at {target} takes clients with a certificate: say --certs FOLDER"
                )
            return None
    for _ in range(2):  # who closes once may have been killed just then, and will not be there again
        with _connection(target, wait) as connection:
            if handshake := _shake_hands(connection, target, credentials):
                return handshake
    raise IdentityError(
        f"the server at {target} does not accept {credentials.folder / f'{credentials.end}.pem'}: it trusts "
        f"another authority, or by its clock the certificate is not valid; {_clock()}"
    )


def _connection(target: str, wait: float) -> socket.socket:
    return socket.create_connection((_host(target), int(target.rpartition(":")[2])), wait)


def _shake_hands(connection: socket.socket, target: str, credentials: Credentials) -> Handshake | None:
    """As gRPC will; None where the server closes after it. Raises IdentityError, or an OSError that is no
    one's judgement."""
    folder, end = credentials.folder, credentials.end
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(folder / "authority.pem")
    context.load_cert_chain(folder / f"{end}.pem", folder / f"{end}.key")
    context.set_alpn_protocols(["h2"])
    try:
        with context.wrap_socket(connection, server_hostname=_host(target)) as secure:
            if not _is_answered(secure):
                return None
            theirs = secure.getpeercert(binary_form=True)
            assert theirs, "it was verified"
            expires = x509.load_der_x509_certificate(theirs).not_valid_after_utc
            return Handshake(secure.version() or "TLS", expires)
    except ssl.SSLCertVerificationError as error:
        remedy = _REMEDIES.get(error.verify_code, "").format(
            folder=folder, host=_host(target), clock=_clock()
        )
        reason = error.verify_message.rstrip(".")
        raise IdentityError(f"the server at {target} cannot be trusted: {reason}{remedy}") from None
    except ssl.SSLEOFError:
        raise
    except ssl.SSLError as error:
        raise IdentityError(
            f"the server at {target} does not speak TLS ({error.reason}): start it with --certs, too"
        ) from None


def _is_answered(secure: ssl.SSLSocket) -> bool:
    """Whether the server goes on. In TLS 1.3 it judges after the handshake is over at this end; gRPC's speaks
    first if it is content, and closes without a word if not.
    """
    try:
        return bool(secure.recv(1))
    except TimeoutError:
        return True  # who knows
    except (ssl.SSLError, ConnectionError):
        return False


def _speaks_tls(connection: socket.socket) -> bool:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # nothing is sent to it
    try:
        context.wrap_socket(connection).close()
    except OSError:
        return False
    return True


def _is_for(cert: x509.Certificate, end: End) -> bool:
    purpose = ExtendedKeyUsageOID.SERVER_AUTH if end == "server" else ExtendedKeyUsageOID.CLIENT_AUTH
    try:
        return purpose in cert.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True


def _host(address: str) -> str:
    host = address.rpartition(":")[0] or address  # whoever needs the port says that it is missing
    return host.removeprefix("[").removesuffix("]")


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error


def _time(when: datetime.datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"


def _clock() -> str:
    return f"this machine's clock says {_time(now())}"
