"""The figures: finished runs drawn, each figure also told in words for readers who do not see it.

Knows colours, axes and bars, and nothing of the page that the figures stand on. Colours are safe for
colour-blind readers (Okabe-Ito for methods, Tol's muted set for kinds and phases), and the same runs
always give the same bytes.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import ConfigError
from dsl_lab.runs import Down, FinishedRun, Runs, Up, at_least_one
from dsl_lab.table import labels, mebibytes, megabytes, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 8.0  # inches
GAP = 2.7  # from one run's pair of bars to the next, where a bar to its pair is 1

METHOD_COLOURS = {"dsl": "#0072B2", "csl": "#D55E00"}
OTHER_COLOURS = ("#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
KIND_COLOURS = {
    "activations": "#44AA99",
    "labels": "#999933",
    "evaluation": "#DDCC77",
    "gradients": "#882255",
    "weights": "#AA4499",
    "framing and control": "#888888",
}
PHASE_COLOURS = {
    "forward": "#88CCEE",
    "backward": "#332288",
    "encode / decode": "#DDCC77",
    "wait / idle": "#DDDDDD",
}
MARKERS = "osD^vP"

STYLE: dict[Any, Any] = {
    "svg.hashsalt": "split learning, measured",
    "font.size": 9,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#333333",
    "ytick.color": "#333333",
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Drawing:
    name: str
    caption: str
    draw: "Callable[[Figure, Runs], str]"
    """Draws the runs; returns what the figure shows, in words."""


def write(runs: Runs, folder: Path) -> list[Path]:
    """All figures as PNG files. Raises ConfigError when there is no run or no file can be written."""
    some = at_least_one(runs)
    images = {folder / f"{drawing.name}.png": render(drawing, some, "png")[0] for drawing in DRAWINGS}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in images.items():
            path.write_bytes(image)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; name another") from error
    return list(images)


def render(drawing: Drawing, runs: Runs, form: Literal["png", "svg"]) -> tuple[bytes, str]:
    """A figure as a file's bytes, and in words."""
    import matplotlib
    from matplotlib.figure import Figure

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type")) if form == "svg" else None
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        words = drawing.draw(figure, runs)
        file = io.BytesIO()
        figure.savefig(file, format=form, dpi=200, metadata=nothing)
    return file.getvalue(), words


def _accuracy(figure: "Figure", runs: Runs) -> str:
    from matplotlib.ticker import MaxNLocator

    axes = _accuracy_axes(figure, "Test accuracy by epoch", "epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    ends = []
    for run, name, colour, marker in _looks(runs):
        joined = [(e.epoch, e.test.accuracy) for e in run.evaluations]
        alone = [
            (e.epoch, e.test.client_only_accuracy)
            for e in run.evaluations
            if e.test.client_only_accuracy is not None
        ]
        for points, line, what in ((joined, "-", name), (alone, "--", f"{name}, client alone")):
            if points:
                axes.plot(*zip(*points, strict=True), line, marker=marker, ms=4, color=colour)
                ends.append((*points[-1], f"{what}  {percent(points[-1][1])}", colour))
    figure.set_size_inches(WIDTH, max(3.8, 1 + 0.21 * len(ends)))
    _name_ends(axes, ends)
    return "Lines, test accuracy by epoch. At the end: " + _listed(end[2] for end in ends)


def _traffic(figure: "Figure", runs: Runs) -> str:
    axes = _bar_axes(figure, runs, "Traffic by direction and kind", "megabytes (10⁶ bytes)")
    counts = [_kinds(way) for run in runs for way in (run.summary.wire.up, run.summary.wire.down)]
    stacks = [[stack.get(kind, 0) / 1e6 for kind in KIND_COLOURS] for stack in counts]
    totals = [f"{megabytes(sum(stack.values()))} MB" for stack in counts]
    rows = _name_bars(axes, runs, ("up", "down"))
    _stack(axes, stacks, KIND_COLOURS, totals)
    figure.legend(loc="outside lower center", ncols=6)
    return "Bars, traffic in all messages: " + _listed(map(" ".join, zip(rows, totals, strict=True)))


def _cost(figure: "Figure", runs: Runs) -> str:
    axes = _accuracy_axes(
        figure, "Test accuracy against traffic", "megabytes moved so far, up and down (10⁶ bytes)"
    )
    axes.xaxis.set_major_formatter("{x:,.4g}")
    ends = []
    for run, name, colour, marker in _looks(runs):
        moved = [(e.wire.up + e.wire.down) / 1e6 for e in run.evaluations]
        scores = [e.test.accuracy for e in run.evaluations]
        axes.plot(moved, scores, marker=marker, ms=4, color=colour, label=name)
        ends.append(f"{name} {percent(scores[-1])} after {moved[-1]:,.2f} MB")
    axes.set_xlim(left=0)
    figure.set_size_inches(WIDTH, 3.8)
    axes.legend(loc="lower right")
    return "Lines, test accuracy of the joined network against traffic: " + _listed(ends)


def _time(figure: "Figure", runs: Runs) -> str:
    axes = _bar_axes(figure, runs, "Where the time went", "seconds")
    spent = [run.summary.seconds for run in runs]
    stacks = [astuple(side) for seconds in spent for side in (seconds.client, seconds.server)]
    rows = _name_bars(axes, runs, ("client", "server"))
    _stack(axes, stacks, PHASE_COLOURS)
    for place, seconds in enumerate(spent):
        ends = [GAP * place - 0.5, GAP * place + 1.5]
        mark = "wall clock" if place == 0 else None
        axes.plot([seconds.wall] * 2, ends, color="#222222", lw=1.5, label=mark)
    figure.legend(loc="outside lower center", ncols=5)
    return "Bars, seconds of each phase: " + _listed(
        f"{row} " + " ".join(f"{n} {s:,.1f}" for n, s in zip(PHASE_COLOURS, stack, strict=True))
        for row, stack in zip(rows, stacks, strict=True)
    )


def _memory(figure: "Figure", runs: Runs) -> str:
    axes = _bar_axes(figure, runs, "Peak memory", "mebibytes (2²⁰ bytes)")
    peaks = [peak for run in runs for peak in astuple(run.summary.peak_bytes)]
    texts = [f"{mebibytes(peak)} MiB" for peak in peaks]
    rows = _name_bars(axes, runs, ("client", "server"))
    colours = [colour for _, _, colour, _ in _looks(runs) for _ in range(2)]
    axes.barh(_places(peaks), [peak / 2**20 for peak in peaks], color=colours, height=0.82)
    _name_totals(axes, [peak / 2**20 for peak in peaks], texts)
    return "Bars, peak memory: " + _listed(map(" ".join, zip(rows, texts, strict=True)))


DRAWINGS = (
    Drawing(
        "accuracy",
        "Test accuracy after each epoch. Solid: the client's part joined with the server's. "
        "Dashed: the client alone with its auxiliary head, which conventional split learning "
        "does not have.",
        _accuracy,
    ),
    Drawing(
        "traffic",
        "All serialized messages of the run, before HTTP/2, by what they carried. A decoupled "
        "method sends no gradients down; small answers are left, and weights where parts are averaged.",
        _traffic,
    ),
    Drawing(
        "accuracy-by-traffic",
        "Test accuracy of the joined network against all that had crossed the wire by then. "
        "Further left is cheaper, higher is better.",
        _cost,
    ),
    Drawing(
        "time",
        "Seconds of each phase; the client's are the mean of all clients. A client waits for "
        "gradients or for room to send, a server idles until a batch comes. The rest, up to the "
        "wall clock, went to what is not counted here, such as reading the data.",
        _time,
    ),
    Drawing(
        "memory",
        "Most memory that each side held at once; of the clients, the one that held most. On a GPU "
        "what tensors took there, otherwise the whole process with Python and its libraries.",
        _memory,
    ),
)


def _looks(runs: Runs) -> list[tuple[FinishedRun, str, str, str]]:
    """Each run with its name, colour and marker. Runs of one method: one hue, ever lighter."""
    others = sorted({run.method for run in runs} - METHOD_COLOURS.keys())
    hues = METHOD_COLOURS | {m: OTHER_COLOURS[i % 5] for i, m in enumerate(others)}
    seen: Counter[str] = Counter()
    looks = []
    for run, name in zip(runs, labels(runs), strict=True):
        colour = _lighter(hues[run.method], 0.25 * (seen[run.method] % 4))
        looks.append((run, name, colour, MARKERS[seen[run.method] % len(MARKERS)]))
        seen[run.method] += 1
    return looks


def _lighter(colour: str, part: float) -> str:
    parts = (int(colour[at : at + 2], 16) for at in (1, 3, 5))
    return "#" + "".join(f"{round(c + (255 - c) * part):02x}" for c in parts)


def _kinds(way: Up | Down) -> dict[str, int]:
    counts: dict[str, int] = asdict(way)
    counts["framing and control"] = counts.pop("framing") + counts.pop("control")
    return counts


def _accuracy_axes(figure: "Figure", title: str, below: str) -> "Axes":
    from matplotlib.ticker import PercentFormatter

    axes = figure.add_subplot()
    axes.set(title=title, xlabel=below, ylabel="test accuracy")
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.grid()
    return axes


def _bar_axes(figure: "Figure", runs: Runs, title: str, below: str) -> "Axes":
    figure.set_size_inches(WIDTH, 1.3 + 0.75 * len(runs))
    axes = figure.add_subplot()
    axes.set(title=title, xlabel=below)
    axes.xaxis.set_major_formatter("{x:,.4g}")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x")
    return axes


def _places(bars: Sequence[object]) -> list[float]:
    """Two bars a run, each pair apart from the next."""
    return [GAP * (bar // 2) + bar % 2 for bar in range(len(bars))]


def _name_bars(axes: "Axes", runs: Runs, sides: tuple[str, str]) -> list[str]:
    """Names on the left, the first run on top; returned in full, run and side."""
    sided = [(name, side) for name in labels(runs) for side in sides]
    texts = [f"{name}   {side}" if side == sides[0] else side for name, side in sided]
    axes.set_yticks(_places(sided), texts)
    axes.invert_yaxis()
    return [" ".join(pair) for pair in sided]


def _stack(
    axes: "Axes",
    stacks: Sequence[Sequence[float]],
    colours: Mapping[str, str],
    totals: Sequence[str] = (),
) -> None:
    """A bar for each stack, one colour for each of its parts; kinds that nobody has stay out."""
    for part, (name, colour) in enumerate(colours.items()):
        widths = [stack[part] for stack in stacks]
        if any(widths):
            before = [sum(stack[:part]) for stack in stacks]
            axes.barh(_places(stacks), widths, 0.82, before, color=colour, label=name)
    if totals:
        _name_totals(axes, [sum(stack) for stack in stacks], totals)


def _name_totals(axes: "Axes", ends: Sequence[float], texts: Sequence[str]) -> None:
    under = {"facecolor": "white", "edgecolor": "none", "pad": 1}  # the grid stays off the text
    for spot, text in zip(zip(ends, _places(ends), strict=True), texts, strict=True):
        axes.annotate(text, spot, (5, 0), textcoords="offset points", va="center_baseline", bbox=under)
    axes.set_xlim(0, 1.15 * max(ends) or 1)


def _name_ends(axes: "Axes", ends: Sequence[tuple[float, float, str, str]]) -> None:
    """Each line's name at the right, level with its end or as near as the others let it be."""
    bottom, top = axes.get_ylim()
    levels = _spread([(y - bottom) / (top - bottom) for _, y, _, _ in ends], min(0.065, 1 / len(ends)))
    line = {"arrowstyle": "-", "lw": 0.7, "relpos": (0, 0.5), "shrinkA": 0, "shrinkB": 4}
    for (x, y, text, colour), level in zip(ends, levels, strict=True):
        axes.annotate(
            text,
            (x, y),
            (1.05, level),
            textcoords="axes fraction",
            va="center",
            arrowprops={**line, "color": colour},
        )


def _spread(wanted: Sequence[float], gap: float) -> list[float]:
    """Places from 0 to 1 near the wanted ones, in their order, and no two nearer than gap."""
    order = sorted(range(len(wanted)), key=lambda item: wanted[item])
    places = [0.0] * len(wanted)
    least = 0.0
    for item in order:
        places[item] = max(wanted[item], least)
        least = places[item] + gap
    most = 1.0
    for item in reversed(order):
        places[item] = min(places[item], most)
        most = places[item] - gap
    return places


def _listed(texts: Iterable[str]) -> str:
    return "; ".join(texts) + "."
