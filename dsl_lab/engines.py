"""Where the clients of a sweep run, as its flags say: here, or as tasks of a Ray cluster.

Knows Ray by name alone: `on_ray.py`, which imports it, is imported when it is asked for.
"""

import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Literal

from common.errors import ConfigError
from dsl_lab.launch import LOCAL, Engine

EXTRA = "pip install 'decoupled-split-learning[ray]'"


@dataclass(frozen=True)
class Where:
    """The server is always a process of this machine; its clients are, too, or are tasks of a Ray cluster."""

    engine: Literal["local", "ray"] = "local"
    """local: each client is a process of this machine. ray: a task of a Ray cluster (docs/simulation.md)."""
    ray_address: str | None = None
    """With ray: the cluster's host:port. Default: as $RAY_ADDRESS says, else a cluster of this machine alone
    that begins and ends with the sweep."""
    client_cpus: float = 1.0
    """With ray: the cores that the cluster keeps for a client, also in parts, such as 0.5."""
    client_gpus: float = 0.0
    """With ray: the GPUs, likewise. A client that has none computes on the CPU."""
    insecure: bool = False
    """With ray: train also with clients on other machines, though nothing on the way is encrypted."""


@contextmanager
def opened(where: Where) -> Iterator[Engine]:
    """The engine, as long as this is open. Raises ConfigError where there is none like that."""
    _check(where)
    if where.engine == "local":
        yield LOCAL
        return
    address = _address(where)
    _prepare(alone=address is None)
    try:
        from dsl_lab import on_ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(f"--engine ray needs Ray: {EXTRA}") from None
    with on_ray.cluster(address, where) as engine:
        yield engine


def _check(where: Where) -> None:
    for field in fields(where):
        if where.engine == "local" and getattr(where, field.name) != field.default:
            raise ConfigError(
                f"--{field.name.replace('_', '-')} is for clients on Ray: say --engine ray, or leave it out"
            )
    if not 0 < where.client_cpus < math.inf:
        raise ConfigError(f"--client-cpus {where.client_cpus:g} must be above 0")
    if not 0 <= where.client_gpus < math.inf:
        raise ConfigError(f"--client-gpus {where.client_gpus:g} must be 0 or above")
    for flag, value in (("--client-cpus", where.client_cpus), ("--client-gpus", where.client_gpus)):
        if value > 1 and value != int(value):
            raise ConfigError(f"{flag} {value:g}: Ray gives parts of one, or whole ones")


def _address(where: Where) -> str | None:
    """The cluster's; None where there is none, and one is to begin. Raises ConfigError."""
    address = where.ray_address or os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        raise ConfigError(
            f"--ray-address {address}: the server runs here, so this has to be a machine of the cluster, and "
            "the address host:port"
        )
    return None if address in ("", "local") else address


def _prepare(alone: bool) -> None:
    """What Ray reads when it is imported. A cluster that begins here keeps to loopback, and to who knows its
    secret. What the user has set stays."""
    settings = {"RAY_USAGE_STATS_ENABLED": "0"}
    if alone:
        settings |= {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # on Linux, too: its nodes are at 127.0.0.1
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
        }
    for name, value in settings.items():
        os.environ.setdefault(name, value)
