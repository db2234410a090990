"""gRPC channel and server options. gRPC ignores unknown names in silence: tests prove their effect.

A dead peer closes its sockets and is noticed at once. A frozen one, or a cut cable, is noticed by
pings: sent after KEEPALIVE of silence, unanswered for PING_TIMEOUT. With keepalive_timeout alone it
took a minute; `http2.ping_timeout_ms` is what makes it seconds (docs/architecture.md).
"""

KEEPALIVE_MS = 4000
PING_TIMEOUT_MS = 4000
HANDSHAKE_MS = 10_000  # for a connection that has said nothing yet, or half of what TLS needs
METADATA_BYTES = 8192
SLACK_BYTES = 1 << 16  # heads, in a message of one piece
READ_AHEAD_BYTES = 256 << 20  # that gRPC may hold of all clients together, before they are asked for
_OF_A_CLIENT = range(1 << 16, 8 << 20)  # of that, at least and at most

Options = list[tuple[str, int]]


def _both(message_bytes: int) -> Options:
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_send_message_length", message_bytes),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", PING_TIMEOUT_MS),
        ("grpc.http2.ping_timeout_ms", PING_TIMEOUT_MS),
    ]


def client_options(message_bytes: int) -> Options:
    return [
        *_both(message_bytes),
        ("grpc.http2.max_pings_without_data", 0),  # a server has no such limit
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1000),
        ("grpc.enable_http_proxy", 0),  # a proxy in the environment breaks even 127.0.0.1
        ("grpc.enable_retries", 0),  # a batch is never sent twice behind our back
    ]


def read_ahead(clients: int) -> Options:
    """How far gRPC reads ahead of what is asked for, of each stream. Left alone it takes what the link seems
    to hold, up to some ten megabytes: of a few clients that is well, of hundreds it is gigabytes, and each
    batch waits behind all those before it."""
    share = READ_AHEAD_BYTES // clients
    if share >= _OF_A_CLIENT.stop:
        return []
    return [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", max(share, _OF_A_CLIENT.start))]


def server_options(message_bytes: int, streams: int, clients: int = 1) -> Options:
    """streams: calls that a connection may have open; its client keeps back those above. clients: that send
    at the same time."""
    return [
        *_both(message_bytes),
        *read_ahead(clients),
        ("grpc.max_concurrent_streams", streams),
        ("grpc.so_reuseport", 0),  # a second server on the port must fail, not share it
        ("grpc.http2.min_ping_interval_without_data_ms", KEEPALIVE_MS // 2),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
    ]
