"""Throughput of StreamActivations over loopback, as a ratio to a plain TCP socket loop.

Batches of 8 MiB (128 x 16 x 32 x 32 fp32), no compute on either side, client and server in two
processes. In each round every design moves the same bytes, one after the other, so that all meet
the same noise; the medians are over the rounds, of the ratio to TCP of the same round.

    python benchmarks/wire/main.py [--batches 60] [--rounds 7]
"""

import argparse
import multiprocessing
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from multiprocessing.connection import Connection
from typing import Any

import grpc
import torch

from common.methods.base import Smashed
from common.wire import codec, rpc
from common.wire import split_learning_pb2 as pb
from common.wire.codec import BatchSpec
from common.wire.options import SLACK_BYTES, client_options, server_options
from common.wire.pieces import PIECE_BYTES, Piece

SHAPE = (16, 32, 32)
SPEC = BatchSpec(SHAPE, 128, 10)
BATCH_BYTES = 128 * 16 * 32 * 32 * 4
WHOLE = 2 * BATCH_BYTES


def batch() -> Smashed:
    g = torch.Generator().manual_seed(0)
    return Smashed(torch.rand(128, *SHAPE, generator=g), torch.randint(0, 10, (128,), generator=g))


# Our pieces: what dsl-client and dsl-server do, but for the training.


def pieces_handler(requests: Iterator[Any], context: grpc.ServicerContext) -> pb.StreamActivationsResponse:
    pieces = map(rpc.judged, requests)
    count = 0
    for first in pieces:
        codec.unpack_batch(first, pieces, SPEC)
        count += 1
    return pb.StreamActivationsResponse(applied=count)


def pieces_client(port: int, batches: int) -> None:
    which, data = rpc.STREAM_ACTIVATIONS, batch()

    def requests() -> Iterator[Piece[Any]]:
        for sequence in range(batches):
            yield from codec.pack_batch(pb.StreamActivationsRequest, sequence, data, SPEC)

    with grpc.insecure_channel(f"127.0.0.1:{port}", client_options(2 * PIECE_BYTES + SLACK_BYTES)) as channel:
        call = channel.stream_unary(
            which.path,
            request_serializer=rpc.writer(which.request, True),
            response_deserializer=rpc.reader(which.response, False),
        )
        assert call(requests()).applied == batches


# The naive way: one ordinary message a batch, with its `bytes` field built and read by protobuf.


def naive_handler(
    requests: Iterator[pb.StreamActivationsRequest], context: grpc.ServicerContext
) -> pb.StreamActivationsResponse:
    count = 0
    for request in requests:
        torch.frombuffer(bytearray(request.data), dtype=torch.float32).view(128, *SHAPE)
        count += 1
    return pb.StreamActivationsResponse(applied=count)


def naive_client(port: int, batches: int) -> None:
    data = batch()

    def requests() -> Iterator[pb.StreamActivationsRequest]:
        for _ in range(batches):
            yield pb.StreamActivationsRequest(data=data.z.numpy().tobytes())

    with grpc.insecure_channel(f"127.0.0.1:{port}", client_options(WHOLE)) as channel:
        call = channel.stream_unary(
            "/naive/Stream",
            request_serializer=pb.StreamActivationsRequest.SerializeToString,
            response_deserializer=pb.StreamActivationsResponse.FromString,
        )
        assert call(requests()).applied == batches


# The floor: a socket.


def tcp_serve(listener: socket.socket) -> None:
    buffer = memoryview(bytearray(BATCH_BYTES))
    while True:
        connection, _ = listener.accept()
        with connection:
            filled = 0
            while n := connection.recv_into(buffer[filled:]):
                filled = (filled + n) % BATCH_BYTES
            connection.sendall(b"k")


def tcp_client(port: int, batches: int) -> None:
    data = memoryview(batch().z.numpy()).cast("B")
    with socket.create_connection(("127.0.0.1", port)) as connection:
        for _ in range(batches):
            connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b"k"


def serve(ready: Connection) -> None:
    """The server process: a gRPC server with both designs, and the socket; tells their ports."""
    torch.set_num_threads(1)
    server = grpc.server(ThreadPoolExecutor(4), options=server_options(WHOLE, streams=4))
    which = rpc.STREAM_ACTIVATIONS
    ours = grpc.stream_unary_rpc_method_handler(
        pieces_handler,
        request_deserializer=rpc.reader(which.request, True),
        response_serializer=rpc.writer(which.response, False),
    )
    naive = grpc.stream_unary_rpc_method_handler(
        naive_handler,
        request_deserializer=pb.StreamActivationsRequest.FromString,
        response_serializer=pb.StreamActivationsResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(rpc.SERVICE, {which.name: ours}),
            grpc.method_handlers_generic_handler("naive", {"Stream": naive}),
        )
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    listener = socket.create_server(("127.0.0.1", 0))
    ready.send((port, listener.getsockname()[1]))
    tcp_serve(listener)


def seconds(client: Callable[[int, int], None], port: int, batches: int) -> float:
    start = time.perf_counter()
    client(port, batches)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batches", type=int, default=60, help="8 MiB batches in a measurement")
    parser.add_argument("--rounds", type=int, default=7, help="repetitions, interleaved")
    options = parser.parse_args()
    torch.set_num_threads(1)
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=serve, args=[there], daemon=True)
    process.start()
    grpc_port, tcp_port = here.recv()
    designs = {
        "plain TCP": (tcp_client, tcp_port),
        "pieces of 1 MiB (ours)": (pieces_client, grpc_port),
        "one 8 MiB message (naive)": (naive_client, grpc_port),
    }
    times: dict[str, list[float]] = {name: [] for name in designs}
    for client, port in designs.values():
        seconds(client, port, 4)  # warm
    for _ in range(options.rounds):
        for name, (client, port) in designs.items():
            times[name].append(seconds(client, port, options.batches))
    process.terminate()

    amount = options.batches * BATCH_BYTES / 1e6
    print(
        f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, grpcio {grpc.__version__}"
    )
    print(f"median of {options.rounds} interleaved rounds of {options.batches} batches of 8 MiB\n")
    print("| design | MB/s | ratio to TCP (median, range) |\n|---|---|---|")
    for name, values in times.items():
        ratios = [tcp / own for tcp, own in zip(times["plain TCP"], values, strict=True)]
        speed = amount / statistics.median(values)
        spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        print(f"| {name} | {speed:,.0f} | {spread} |")


if __name__ == "__main__":
    main()
