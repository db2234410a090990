"""`dsl health`: whether a server takes clients, asked as a container's health check or a pod's probe asks it.

By gRPC's own health service, over TLS with a client's certificate where the server has one. Knows no torch.
"""

from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from common import tls
from common.errors import ClosedError, SplitLearningError
from common.wire.options import METADATA_BYTES, client_options

_STATUS = health_pb2.HealthCheckResponse


def health(server: str, certs: Path | None, patience: float, alive: bool) -> str:
    """What there is to say of a server that is well. `alive`: it is, if it answers anything.

    Raises ConfigError or IdentityError for certificates that cannot be used, ClosedError for a server that is
    not there within `patience` seconds, or not well.
    """
    credentials = tls.Credentials.read(certs, "client") if certs else None
    status = _ask(server, credentials, patience)
    if status == _STATUS.SERVING or alive:
        return f"the server at {server} answers: {_STATUS.ServingStatus.Name(status)}"
    raise ClosedError(
        f"the server at {server} takes no clients now: it begins, drains, or cannot write its checkpoints"
    )


def _ask(server: str, credentials: tls.Credentials | None, patience: float) -> int:
    """The status that it says it has."""
    with _channel(server, credentials) as channel:
        ask = health_pb2_grpc.HealthStub(channel).Check
        try:
            answer = ask(health_pb2.HealthCheckRequest(), timeout=patience, wait_for_ready=True)
        except grpc.RpcError as error:
            if not isinstance(error, grpc.Call):
                raise
            raise _told(server, credentials, patience, error.code()) from None
    return int(answer.status)


def _channel(server: str, credentials: tls.Credentials | None) -> grpc.Channel:
    options = client_options(METADATA_BYTES)
    if credentials is None:
        return grpc.insecure_channel(server, options)
    own = grpc.ssl_channel_credentials(credentials.authority, credentials.key, credentials.certificate)
    return grpc.secure_channel(server, own, options)


def _told(
    server: str, credentials: tls.Credentials | None, patience: float, code: grpc.StatusCode
) -> SplitLearningError:
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        try:
            tls.preflight(server, credentials)  # gRPC does not say why there is no connection
        except SplitLearningError as error:
            return error
        return ClosedError(f"no server answers at {server} within {patience:g} s")
    return ClosedError(f"what answers at {server} is no dsl-server that is well: {code.name}")
