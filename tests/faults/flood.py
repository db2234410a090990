"""A client without manners: python -m tests.faults.flood PORT tries to join as fast as it can.

It prints the status of each answer. A process of its own, so that what it computes is not the tests' time.
"""

import sys
import threading
from typing import Any

import grpc

from common.wire import rpc
from common.wire import split_learning_pb2 as pb

THREADS = 8


def main(port: int) -> None:
    request = pb.JoinRequest(oldest_version=1, newest_version=1, name="flood").SerializeToString()
    channel = grpc.insecure_channel(f"127.0.0.1:{port}", [("grpc.enable_http_proxy", 0)])
    join: Any = channel.unary_stream(rpc.JOIN.path)

    def flood() -> None:
        while True:
            try:
                next(join(request))
            except grpc.RpcError as error:
                sys.stdout.write(f"{error.code().name}\n")
                sys.stdout.flush()

    threads = [threading.Thread(target=flood) for _ in range(THREADS)]
    for thread in threads:
        thread.start()


if __name__ == "__main__":
    main(int(sys.argv[1]))
