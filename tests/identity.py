"""What tests of identity share: a client's certificate, what a refused client says, the audit log."""

import json
import time
from pathlib import Path
from typing import Any

import pytest

from common.errors import IdentityError
from common.meter import Clock, Traffic
from common.tls import Credentials
from dsl_client.connection import Connection
from dsl_server.server import Server
from tests.ordinary import member, smashed

SOON_S = 5.0


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
