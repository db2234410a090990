"""Tables and plot of results.jsonl, and what follows from it for ten thousand clients, and for a million."""

import json
import math
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsl_server.ledger import Ledger, Newcomer

Row = Mapping[str, Any]
HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs"
REAL, THREADS, LOOP = "dsl-server", "thread a call", "event loop"
FRONTS = (REAL, THREADS, LOOP)
SMALL, LARGE = 1 << 16, 1 << 23
SHARE, IDLE, FAIR = 0.9, 1e6, 0.8  # what is asked


def read(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def line(row: Row) -> str:
    """A row, for who watches."""
    if row["kind"] == "idle":
        return f"{row['front']}, {row['streams']} members: joined in {row['join_s']:.1f} s"
    what = f"{row.get('arm', row['front'])}, {row['streams']} x {_size(row['batch_bytes'])}"
    return f"{what}: {row['bytes_s'] / 1e6:.1f} MB/s, fairness {row['fairness']:.2f}"


# ---------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Found:
    """Medians of the intervals of one kind."""

    rows: Sequence[Row]

    def __getattr__(self, name: str) -> float:
        known = [row[name] for row in self.rows if row.get(name) is not None]
        return statistics.median(known) if known else math.nan


def found(results: Sequence[Row], kind: str = "load", **wanted: object) -> Found | None:
    """None where that was not measured."""
    wanted = {"arm": None, **wanted}
    rows = [r for r in results if r["kind"] == kind and all(r.get(n) == v for n, v in wanted.items())]
    return Found(rows) if rows else None


def streams_of(results: Sequence[Row]) -> list[int]:
    return sorted({row["streams"] for row in results if row["kind"] == "load" and "arm" not in row})


def idle_bytes(results: Sequence[Row], front: str) -> float:
    """Of each member that has joined and says nothing: from the fewest to the most."""
    idle = [row for row in results if row["kind"] == "idle" and row["front"] == front and "arm" not in row]
    least, most = min(idle, key=lambda r: r["streams"]), max(idle, key=lambda r: r["streams"])
    grown = [row["idle_bytes"] - row["before_bytes"] for row in (least, most)]
    return (grown[1] - grown[0]) / max(1, most["streams"] - least["streams"])


def load_table(results: Sequence[Row]) -> str:
    lines = [
        "| batches | streams | samples/s | MB/s | p50, s | p99, s | CPU s/GB | fairness | resident, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in (SMALL, LARGE):
        for streams in streams_of(results):
            at = found(results, front=REAL, streams=streams, batch_bytes=size)
            if at is None:
                continue
            shown = (
                (at.samples_s, ",.0f"),
                (at.bytes_s / 1e6, ",.1f"),
                (at.p50_s, ".3f"),
                (at.p99_s, ".3f"),
                (at.cpu_s_gb, ".2f"),
                (at.fairness, ".2f"),
                (at.resident_bytes / 1e6, ",.0f"),
            )
            cells = [_shown(*each) for each in shown]
            lines.append(f"| {_size(size)} | {streams} | {' | '.join(cells)} |")
    return "\n".join(lines)


def across_table(results: Sequence[Row]) -> str:
    """The real server with batches of 64 KiB; and, round by round, what part that is of one stream's."""
    lines = ["| streams | MB/s | of one stream's, from least to most |", "|---:|---:|---|"]
    each = {n: at for n in streams_of(results) if (at := found(results, "across", streams=n))}
    for streams, at in each.items():
        lines.append(f"| {streams} | {at.bytes_s / 1e6:.1f} | {_ratios(at, each[min(each)])} |")
    return "\n".join(lines)


def choice_table(results: Sequence[Row]) -> str:
    heads = "".join(f" {front}: MB/s | CPU s/GB |" for front in FRONTS)
    lines = [f"| batches | streams |{heads} thread a call / event loop |", f"|---|{'---:|' * 8}"]
    for size in (SMALL, LARGE):
        for streams in streams_of(results):
            each = [found(results, front=front, streams=streams, batch_bytes=size) for front in FRONTS]
            if None in each:
                continue
            cells = [f"{at.bytes_s / 1e6:,.1f} | {_shown(at.cpu_s_gb, '.2f')}" for at in each if at]
            _, threads, loop = each
            assert threads is not None
            assert loop is not None
            lines.append(f"| {_size(size)} | {streams} | {' | '.join(cells)} | {_ratios(threads, loop)} |")
    return "\n".join(lines)


def _ratios(one: Found, other: Found) -> str:
    """Of bytes a second, interval by interval: the median, and from the least to the most."""
    pairs = zip(one.rows, other.rows, strict=True)
    ratios = [a["bytes_s"] / b["bytes_s"] for a, b in pairs if b["bytes_s"]]
    if not ratios:
        return "–"
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"


def idle_table(results: Sequence[Row]) -> str:
    lines = ["| server | members | joined in, s | resident, MB | threads |", "|---|---:|---:|---:|---:|"]
    for row in results:
        if row["kind"] == "idle" and "arm" not in row:
            cells = [f"{row['join_s']:.2f}", f"{row['idle_bytes'] / 1e6:,.0f}", str(row["threads"])]
            lines.append(f"| {row['front']} | {row['streams']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def aims_table(results: Sequence[Row]) -> str:
    """Of the real server with batches of 64 KiB."""
    small = {
        streams: at
        for streams in streams_of(results)
        if (at := found(results, front=REAL, streams=streams, batch_bytes=SMALL))
    }
    across = {n: at.bytes_s for n in streams_of(results) if (at := found(results, "across", streams=n))}
    grown = idle_bytes(results, REAL)
    aims = [("an idle member takes less than 1 MB", f"{grown / 1e3:.0f} kB", grown < IDLE)]
    if 256 in across:
        share = across[256] / max(across.values())
        aims.append(("256 streams within 10% of the best throughput", f"{share:.2f} of it", share >= SHARE))
    for streams, at in small.items():
        if streams > 1:
            aims.append((f"{streams} streams: fairness above 0.8", f"{at.fairness:.2f}", at.fairness > FAIR))
    rows = [f"| {asked} | {came} | {'met' if is_met else 'missed'} |" for asked, came, is_met in aims]
    return "\n".join(["| asked | found | |", "|---|---|---|", *rows])


def concatenate_table(results: Sequence[Row]) -> str:
    arms = list(dict.fromkeys(row["arm"] for row in results if "arm" in row))
    if not arms:
        return ""
    lines = ["| server's part | samples/s | CPU s a thousand samples |", "|---|---:|---:|"]
    for arm in arms:
        at = found(results, arm=arm, batch_bytes=SMALL)
        if at:
            lines.append(f"| {arm} | {at.samples_s:,.0f} | {1000 * at.cpu_s_batch:.2f} |")
    return "\n".join(lines)


def machine_line(results: Sequence[Row]) -> str:
    at = results[0]
    versions = f"Python {at['python']}, torch {at['torch']}, grpcio {at['grpcio']}"
    how = f"medians of {at['rounds']} interleaved intervals of {at['seconds']:g} s or more"
    return f"{at['date']}, {at['cores']} cores of {at['processor']}, {versions}; {how}."


def _shown(value: float, how: str) -> str:
    return "–" if math.isnan(value) else format(value, how)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"


# ---------------------------------------------------------------- what follows


@dataclass(frozen=True)
class Host:
    """One machine: cores, bytes of memory, bytes a second of its network card, files of a process."""

    cores: int = 16
    memory: float = 128e9
    network: float = 25e9 / 8
    files: int = 1 << 20


@dataclass(frozen=True)
class Demand:
    """What each client sends: a batch of so many bytes every so many seconds."""

    batch_bytes: int = LARGE
    every_s: float = 60.0
    inbox: int = 2
    busy: float = 0.05  # of the clients have full inboxes at the same time


@dataclass(frozen=True)
class Costs:
    """Of one server process: CPU seconds a byte and a batch on the way in, and a step's; bytes an idle
    client."""

    cpu_s_byte: float
    cpu_s_batch: float
    idle_bytes: float
    batches_s: float  # that one process took, at most
    bytes_s: float

    @classmethod
    def of(cls, results: Sequence[Row]) -> "Costs":
        """By two points: a small batch costs what is of a batch, a large one also what is of its bytes."""
        small, large = (_at_most(results, size) for size in (SMALL, LARGE))
        per_byte = max(0.0, (large.cpu_s_batch - small.cpu_s_batch) / (LARGE - SMALL))
        per_batch = max(0.0, small.cpu_s_batch - per_byte * SMALL)
        idle = idle_bytes(results, REAL)
        return cls(per_byte, per_batch, idle, small.bytes_s / SMALL, large.bytes_s)


def _at_most(results: Sequence[Row], size: int) -> Found:
    """At the largest number of streams, up to 256, at which such batches were sent."""
    for streams in reversed(streams_of(results)):
        at = found(results, front=REAL, streams=streams, batch_bytes=size)
        if streams <= 256 and at and at.cpu_s_batch > 0:
            return at
    raise SystemExit(f"batches of {size} bytes were not measured")


def needs(clients: int, costs: Costs, demand: Demand, host: Host) -> dict[str, float]:
    """How many hosts each resource asks for, as a fraction."""
    batches = clients / demand.every_s
    traffic = batches * demand.batch_bytes
    cpu = batches * costs.cpu_s_batch + traffic * costs.cpu_s_byte
    processes = max(batches / costs.batches_s, traffic / costs.bytes_s)
    held = clients * (costs.idle_bytes + demand.busy * (demand.inbox + 1) * demand.batch_bytes)
    return {
        "CPU": cpu / host.cores,
        "processes (one trainer each, a core or two)": 2 * processes / host.cores,
        "memory": held / host.memory,
        "network": traffic / host.network,
        "open files": clients / host.files,
    }


def extrapolation(
    results: Sequence[Row],
    demand: Demand = Demand(),
    host: Host = Host(),
    counts: Sequence[int] = (1000, 10_000, 1_000_000),
) -> str:
    costs = Costs.of(results)
    each = [needs(clients, costs, demand, host) for clients in counts]
    heads = " | ".join(f"{clients:,} clients" for clients in counts)
    lines = [f"| hosts for | {heads} |", f"|---|{'---:|' * len(counts)}"]
    for name in each[0]:
        lines.append(f"| {name} | {' | '.join(f'{need[name]:,.2f}' for need in each)} |")
    ledgers = (f"{clients * account_bytes() / 1e6:,.1f} MB" for clients in counts)
    lines.append(f"| (the ledger in each checkpoint) | {' | '.join(ledgers)} |")
    most = [max(need, key=lambda name: need[name]) for need in each]
    whole = [
        f"{math.ceil(need[name]):,}, by {name.partition(' (')[0]}"
        for need, name in zip(each, most, strict=True)
    ]
    lines.append(f"| **whole hosts, and what they are short of first** | {' | '.join(whole)} |")
    return "\n".join(lines)


def account_bytes() -> int:
    """What a client is in a checkpoint's ledger, once it has come back once."""
    ledger = Ledger(1)
    identity = "0" * 32
    first = ledger.join(Newcomer("client-123456", identity)).session
    ledger.join(Newcomer("client-123456", identity, session=first))
    (account,) = ledger.snapshot()["accounts"]
    return len(json.dumps(account))


def costs_table(results: Sequence[Row]) -> str:
    costs = Costs.of(results)
    rows = {
        "CPU a batch, ms": f"{1e3 * costs.cpu_s_batch:.2f}",
        "CPU a GB beside, s": f"{1e9 * costs.cpu_s_byte:.2f}",
        "an idle member, kB": f"{costs.idle_bytes / 1e3:.0f}",
        "a client in a checkpoint's ledger, bytes": f"{account_bytes():,}",
        "one process: batches/s (64 KiB)": f"{costs.batches_s:,.0f}",
        "one process: MB/s (8 MiB)": f"{costs.bytes_s / 1e6:,.0f}",
    }
    return "\n".join(
        ["| cost | measured |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


# ---------------------------------------------------------------- where it is shown


TABLES = {
    "machine": machine_line,
    "aims": aims_table,
    "load": load_table,
    "across": across_table,
    "choice": choice_table,
    "idle": idle_table,
    "concatenate": concatenate_table,
    "costs": costs_table,
    "hosts": extrapolation,
}
_PLACE = re.compile(
    r"(<!-- (\w+): made by benchmarks/scale/main.py --show -->\n)(.*?)(<!-- end -->)", re.DOTALL
)


def filled(page: str, results: Sequence[Row]) -> str:
    """The page, with each table that it has a place for."""
    return _PLACE.sub(lambda m: f"{m[1]}\n{TABLES[m[2]](results)}\n\n{m[4]}", page)


def pages() -> Iterator[Path]:
    yield HERE / "README.md"
    yield DOCS / "scale.md"


def write(results: Sequence[Row]) -> None:
    for page in pages():
        page.write_text(filled(page.read_text(), results))
        print(page)
    picture(results, HERE / "results.png")


COLOURS = {REAL: "#0072B2", THREADS: "#E69F00", LOOP: "#009E73"}


def picture(results: Sequence[Row], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    style = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False}
    shown = {
        "bytes_s": ("throughput, MB/s", 1e6),
        "p50_s": ("time in the system, s", 1.0),
        "cpu_s_gb": ("server's CPU, s/GB", 1.0),
        "fairness": ("slowest over fastest", 1.0),
    }
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(12, 6), layout="constrained")
        numbers = list(streams_of(results))
        for row, size in zip(figure.subplots(2, 4), (SMALL, LARGE), strict=True):
            for axes, (name, (words, unit)) in zip(row, shown.items(), strict=True):
                for front in FRONTS:
                    points = [
                        (streams, getattr(at, name) / unit)
                        for streams in numbers
                        if (at := found(results, front=front, streams=streams, batch_bytes=size))
                    ]
                    if points:
                        axes.plot(*zip(*points, strict=True), "o-", color=COLOURS[front], label=front)
                axes.set(xscale="log", title=words, xlabel=f"streams of {_size(size)} batches")
                axes.set_xticks(numbers, list(map(str, numbers)))
                axes.set_xticks([], minor=True)
                axes.set_xlim(numbers[0] / 1.3, numbers[-1] * 1.3)
                axes.set_ylim(bottom=0)
                axes.grid(color="#E6E6E6")
        figure.axes[0].legend()
        figure.savefig(file, dpi=110)
    print(file)
