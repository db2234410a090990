"""How much does a server bear: 1 to 1000 clients' streams, and which of gRPC's two servers is it to be?

fronts: for each number of streams three servers are up at once, each with that many members: the real one,
and the lean two of lean.py. streams: real servers are up at once, one for each number of streams. variants:
real servers with other parts, and with --concatenate. What is up is loaded one after the other, round and
round, by senders that compute nothing: what is compared was measured within the same minutes. Rows go to
results.jsonl; tables and plot are made of that file, also without measuring (--show).

    python benchmarks/scale/main.py [--streams 1 8 64 256 1000] [--seconds 2] [--rounds 3] [--show]
"""

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import date
from importlib.metadata import version
from pathlib import Path

from benchmarks.scale import measure, report
from benchmarks.scale.measure import Row
from benchmarks.scale.report import FRONTS
from benchmarks.scale.serve import REAL
from common.limits import allow_files

HERE = Path(__file__).parent
PARTS = ("fronts", "streams", "variants")
OTHER_FILES = 200
SMALL, LARGE = 1, 128  # samples of 64 KiB
FEW = 64  # streams up to which large batches are sent: all three servers have room for them at once
RESNET = {"model": "resnet8", "split": "1", "cut": ""}
VARIANTS: Sequence[Row] = (
    {"front": REAL, "arm": "small step"},
    {"front": REAL, "arm": "small step, concatenated", "settings": {"concatenate": 64}},
    {"front": REAL, "arm": "ResNet-8", "settings": RESNET},
    {"front": REAL, "arm": "ResNet-8, concatenated", "settings": {**RESNET, "concatenate": 64}},
)
VARIANT_STREAMS = 64
MOST = 256  # streams up to which their numbers are compared: beyond, a round takes a minute
MORE_ROUNDS = 3  # times as many, for numbers of streams differ by less than the minutes do


def measured(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    for streams in options.streams if "fronts" in options.parts else ():
        sizes = [SMALL, LARGE] if streams <= FEW else [SMALL]
        yield from compared([{"front": front} for front in FRONTS], streams, sizes, options, folder)
    if "streams" in options.parts:
        yield from across(options, folder)
    if "variants" in options.parts:
        yield from compared(VARIANTS, VARIANT_STREAMS, [SMALL], options, folder)


def compared(
    arms: Sequence[Row],
    streams: int,
    sizes: Sequence[int],
    options: argparse.Namespace,
    folder: Path,
) -> Iterator[Row]:
    """Rows of these arms, interleaved."""
    with measure.running(arms, streams, folder) as (servers, loads):
        yield from measure.join_all(servers, loads, streams)
        for size in sizes:
            for _ in range(options.rounds):
                for index, server in enumerate(servers):
                    yield measure.interval(server, index, loads, streams, size, options.seconds)


def across(options: argparse.Namespace, folder: Path) -> Iterator[Row]:
    """Rows of the real server with each number of streams, interleaved."""
    with ExitStack() as up:
        each = [
            (streams, *up.enter_context(measure.running([{"front": REAL}], streams, folder)))
            for streams in options.streams
            if streams <= MOST
        ]
        for streams, servers, loads in each:
            list(measure.join_all(servers, loads, streams))
        for _ in range(MORE_ROUNDS * options.rounds):
            for streams, (server,), loads in each:
                row = measure.interval(server, 0, loads, streams, SMALL, options.seconds, least=0)
                yield {**row, "kind": "across"}


def machine() -> Row:
    model = next(
        (
            line.partition(": ")[2]
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return {
        "kind": "machine",
        "date": str(date.today()),
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "grpcio")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 8, 64, 256, 1000])
    parser.add_argument("--seconds", type=float, default=2.0, help="of an interval, at least")
    parser.add_argument("--rounds", type=int, default=3, help="intervals of each kind")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what is compared")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--show", action="store_true", help="measure nothing: tables and plot of the results")
    options = parser.parse_args()
    if not options.show:
        allow_files(len(FRONTS) * sum(options.streams) + OTHER_FILES)  # each stream is a socket at either end
        with tempfile.TemporaryDirectory() as folder, options.results.open("w") as file:
            print(json.dumps(machine() | {"seconds": options.seconds, "rounds": options.rounds}), file=file)
            for row in measured(options, Path(folder)):
                print(json.dumps(row), file=file, flush=True)
                print(report.line(row), flush=True)
    results = report.read(options.results)
    if options.results == HERE / "results.jsonl":
        report.write(results)
    else:
        print(report.load_table(results))


if __name__ == "__main__":
    main()
