"""A gRPC call written frame by frame, for what no gRPC client would send."""

import re
import socket
import struct
from collections.abc import Iterator, Mapping, Sequence

import grpc

DATA, HEADERS, RST_STREAM, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW = 4  # the setting
FRAME_BYTES = 1 << 14
CODES = {code.value[0]: code for code in grpc.StatusCode}


def status_of(
    port: int, path: str, messages: Sequence[tuple[bool, bytes]], headers: Mapping[str, str]
) -> grpc.StatusCode:
    """The status of a call with these messages, each of which says whether it is compressed."""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        return _Call(connection).status(path, messages, headers)


class _Call:
    def __init__(self, connection: socket.socket) -> None:
        self._connection, self._incoming = connection, connection.makefile("rb")
        self._room = {0: 65535, 1: 65535}  # bytes that may be sent: over the connection, in the stream
        self._answer, self._over = b"", False

    def status(
        self, path: str, messages: Sequence[tuple[bool, bytes]], headers: Mapping[str, str]
    ) -> grpc.StatusCode:
        self._connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self._send(SETTINGS, 0, 0)
        ordinary = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost"}
        all_headers = {**ordinary, "content-type": "application/grpc", "te": "trailers", **headers}
        self._send(HEADERS, END_HEADERS, 1, b"".join(map(_literal, *zip(*all_headers.items(), strict=True))))
        body = b"".join(struct.pack(">BI", flag, len(message)) + message for flag, message in messages)
        for frame in self._fitting(body):
            self._send(DATA, 0, 1, frame)
        if not self._over:
            self._send(DATA, END_STREAM, 1)
        while not self._over:
            self._receive()
        found = re.search(rb"grpc-status[\x01\x02]([0-9]{1,2})", self._answer)
        assert found, self._answer
        return CODES[int(found[1])]

    def _fitting(self, body: bytes) -> Iterator[bytes]:
        """Frames of it, each when there is room; no more when the call is over."""
        while body and not self._over:
            size = min(FRAME_BYTES, len(body), *self._room.values())
            if size < 1:
                self._receive()
                continue
            yield body[:size]
            body = body[size:]
            self._room = {stream: room - size for stream, room in self._room.items()}

    def _send(self, kind: int, flags: int, stream: int, content: bytes = b"") -> None:
        self._connection.sendall(struct.pack(">I", len(content))[1:] + bytes([kind, flags]))
        self._connection.sendall(struct.pack(">I", stream) + content)

    def _receive(self) -> None:
        head = self._incoming.read(9)
        if len(head) < 9:
            self._over = True
            return
        size, kind, flags = int.from_bytes(head[:3], "big"), head[3], head[4]
        stream, content = int.from_bytes(head[5:], "big"), self._incoming.read(size)
        if kind == WINDOW_UPDATE:
            self._room[stream] += int.from_bytes(content, "big")
        elif kind == SETTINGS and not flags & ACK:
            for number, value in struct.iter_unpack(">HI", content):
                if number == INITIAL_WINDOW:
                    self._room[1] += value - 65535
            self._send(SETTINGS, ACK, 0)
        elif kind == PING and not flags & ACK:
            self._send(PING, ACK, 0, content)
        elif kind == HEADERS:
            self._answer += content
        self._over = (
            self._over or kind in (RST_STREAM, GOAWAY) or (kind == HEADERS and bool(flags & END_STREAM))
        )


def _literal(name: str, value: str) -> bytes:
    """A header in HPACK, as it is and not to be remembered."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
