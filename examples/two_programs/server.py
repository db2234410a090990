"""The server's program, on the GPU host: python server.py [host:port]

It holds the description of the run and the top of the network; it never sees an image. On another machine
than its clients it needs certificates: dsl.Server(..., certs="certs"), made by dsl certs init.
"""

import sys

import dsl

run = dsl.Run(
    name="wards",
    method="dsl",  # one way: only activations and labels travel
    model="network:build",  # network.py, which both sides have; code never travels
    cut="pool",  # after this layer; all up to there is the clients'
    clients=2,
    partition="own",  # each trains on all that it has, and keeps it
    sync="average",  # the clients' parts are averaged after each epoch
    data="none",  # no place that all clients have: each says where its own is
    epochs=2,
    batch_size=64,
)


def main(listen: str) -> None:
    with dsl.Server(run, listen) as server:  # the port is open from here on
        print(f"waiting for {run.clients} clients at {server.address}", flush=True)
        for line in server.lines():  # until the run is over, however that comes
            sent = f"{line.wire.up / 1e6:.1f} MB up"
            print(f"epoch {line.epoch}: accuracy {line.test.accuracy:.3f}, {sent}", flush=True)
        print(server.wait())
    # Here nothing of it is left: no thread, no port. After Ctrl-C, or an error in the loop, too; the clients
    # have been told why.


if __name__ == "__main__":
    try:
        main(*sys.argv[1:] or ["127.0.0.1:50051"])
    except dsl.ClosedError as reason:  # a client was lost, and the run needs them all
        sys.exit(f"the run ended early: {reason}")
    except dsl.ConfigError as reason:  # the run, or the port, cannot be
        sys.exit(str(reason))
    except KeyboardInterrupt:
        sys.exit("stopped")
