"""Certificates for tests: what `dsl certs` makes, and what it would never make."""

import datetime
import shutil
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID

from common import tls
from common.tls import Credentials, End
from dsl_lab import certs

DAY = datetime.timedelta(days=1)
SERVER, CLIENT = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH


def make(folder: Path, *clients: str) -> Path:
    """An authority, its server, and these clients."""
    certs.run(certs.Init(folder))
    for name in clients:
        certs.run(certs.Client(folder, name))
    return folder


def copy(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def remade(
    folder: Path,
    end: End,
    authority: Path,
    begins: datetime.timedelta = -DAY,
    ends: datetime.timedelta = DAY,
    purpose: x509.ObjectIdentifier | None = None,
    names: Sequence[x509.GeneralName] | None = None,
    serial: int | None = None,
) -> Path:
    """The folder, its certificate signed again by this authority, from and until so long after now."""
    path = folder / f"{end}.pem"
    old = tls.certificate(path)
    signer = tls.private_key(authority / "authority.key")
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    issuer, now = tls.certificate(authority / "authority.pem"), datetime.datetime.now(datetime.UTC)
    own = old.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    purpose = purpose or (SERVER if end == "server" else CLIENT)
    cert = (
        x509.CertificateBuilder(issuer.subject, old.subject, old.public_key(), serial or old.serial_number)
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(own if names is None else x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage([purpose]), critical=False)
        .sign(signer, hashes.SHA256())
    )
    path.write_bytes(cert.public_bytes(serialization.Encoding.PEM))
    return folder


def unread(folder: Path, end: End) -> Credentials:
    """The folder's files as they are, not judged."""
    files = (folder / name for name in ("authority.pem", f"{end}.pem", f"{end}.key"))
    return Credentials(folder, end, *(file.read_bytes() for file in files))
