"""Finished runs as one self-contained web page, and its figures as PNG files.

The page loads nothing: style and figures are inside it. Each figure is drawn by a function that
also returns what it shows in words, for readers who do not see it. Colours are safe for
colour-blind readers (Okabe-Ito for methods, Tol's muted set for kinds and phases), and the same
runs always give the same bytes.
"""

import io
import re
import shlex
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ConfigError
from dsl_lab.runs import (
    HEADINGS,
    NOTES,
    Down,
    FinishedRun,
    Up,
    labels,
    mebibytes,
    megabytes,
    percent,
    shared,
    table,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Runs = Sequence[FinishedRun]


@dataclass(frozen=True)
class Drawing:
    name: str
    caption: str
    draw: "Callable[[Figure, Runs], str]"


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


def write(runs: Runs, path: Path, commands: Sequence[str] = ()) -> Path:
    """The page. Raises ConfigError when there is no run to report or the file cannot be written."""
    page = _page(_some(runs), commands)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}; name another") from error
    return path


def figures(runs: Runs, folder: Path) -> list[Path]:
    """The page's figures as PNG files. Raises as `write` does."""
    paths = [folder / f"{drawing.name}.png" for drawing in DRAWINGS]
    images = [_drawn(drawing, _some(runs), "png")[0] for drawing in DRAWINGS]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, images, strict=True):
            path.write_bytes(image)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}; name another") from error
    return paths


def _some(runs: Runs) -> Runs:
    if not runs:
        raise ConfigError("no runs to report: name at least one finished run's folder")
    return runs


# --- The page ---


def _page(runs: Runs, commands: Sequence[str]) -> str:
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{TITLE}</title>
<style>{CSS}</style>
</head>
<body>
<main>
<h1>{TITLE}</h1>
<p class="facts">{escape(shared(runs))}</p>
<p>{INTRODUCTION}</p>
<h2>Results</h2>
{_table(runs)}
<p class="note">{escape(NOTES)}</p>
<h2>Figures</h2>
{"".join(_figure(drawing, runs) for drawing in DRAWINGS)}
<h2>How it was made</h2>
{_origin(runs)}
{_commands(runs, commands)}
{_settings(runs)}
</main>
</body>
</html>
"""


def _table(runs: Runs) -> str:
    groups = [(group, len(list(heads))) for group, heads in groupby(HEADINGS, lambda h: h[0])]
    over = "".join(f'<th scope="colgroup" colspan="{n}">{escape(g)}</th>' for g, n in groups)
    under = "".join(f'<th scope="col">{escape(name)}</th>' for _, name in HEADINGS)
    return _grid("results", f"<tr>{over}</tr><tr>{under}</tr>", table(runs))


def _grid(kind: str, head: str, rows: Sequence[Sequence[str]]) -> str:
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    return (
        f'<div class="wide"><table class="{kind}">\n'
        f"<thead>{head}</thead>\n<tbody>\n{body}</tbody></table></div>"
    )


def _heads(*names: str) -> str:
    return "<tr>" + "".join(f'<th scope="col">{escape(name)}</th>' for name in names) + "</tr>"


def _figure(drawing: Drawing, runs: Runs) -> str:
    image, words = _drawn(drawing, runs, "svg")
    svg = image.decode()
    svg = svg[svg.index("<svg") :].strip()  # without the prologue, which has no place in HTML
    # Every figure counts its parts from one: an id must be one only in the whole page.
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{drawing.name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(words)}"', 1)
    return (
        f'<figure><div class="wide">{svg}</div><figcaption>{escape(drawing.caption)}</figcaption></figure>\n'
    )


def _origin(runs: Runs) -> str:
    """Where, when and with which versions. Folders by name: their paths are nobody's business."""
    rows = [
        [
            name,
            run.folder.name,
            run.about.started.replace("T", " "),
            run.about.machine,
            ", ".join(f"{package} {version}" for package, version in run.about.versions.items()),
        ]
        for name, run in zip(labels(runs), runs, strict=True)
    ]
    return _grid("text origin", _heads("run", "folder", "started", "machine", "versions"), rows)


def _commands(runs: Runs, commands: Sequence[str]) -> str:
    """Those given, or else those that the runs remember."""
    own = [shlex.join(run.about.command) for run in runs if run.about.command]
    lines = "\n".join(map(escape, commands or own))
    return f"<h3>Commands</h3>\n<pre><code>{lines}</code></pre>" if lines else ""


def _settings(runs: Runs) -> str:
    keys = dict.fromkeys(key for run in runs for key in run.about.run)
    rows = [[key, *(str(run.about.run.get(key, "–")) for run in runs)] for key in keys]
    grid = _grid("text", _heads("setting", *labels(runs)), rows)
    return f"<details><summary>All settings</summary>{grid}</details>"


# --- The figures ---


def _drawn(drawing: Drawing, runs: Runs, form: str) -> tuple[bytes, str]:
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


# --- What the figures are made of ---

WIDTH = 8.0  # inches
GAP = 2.7  # from one run's pair of bars to the next, where a bar to its pair is 1


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


TITLE = "Split learning, measured"
INTRODUCTION = """
Split learning trains one neural network on two machines. The client keeps its data and the
network's first layers; the server has the layers above. For each batch the client sends up what
its last layer computed, the <em>activations</em>, with the labels. In <strong>conventional split
learning (CSL)</strong> the server then sends back the gradient at the cut, as large as the
activations, and the client waits for it before it can learn. In <strong>decoupled split learning
(DSL)</strong> nothing has to come back: the client learns at once from a small auxiliary head of
its own, and the server learns from the activations in its own time. Below is what each run
reached, and what it cost in traffic, time and memory."""
CSS = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0;
  --back: #ffffff; --band: #f6f8fa; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9198a1; --line: #3d444d;
  --back: #0d1117; --band: #151b23; } }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
.facts { color: var(--soft); margin: .35rem 0 1.5rem; }
.note, figcaption { color: var(--soft); font-size: .875rem; line-height: 1.5; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; width: 100%; }
th, td { padding: .45rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { font-weight: 600; color: var(--soft); }
tbody th { text-align: left; font-weight: 600; }
tbody tr:nth-child(even) { background: var(--band); }
.results thead th, .results td { white-space: nowrap; }
.results td, .results thead th { text-align: right; font-variant-numeric: tabular-nums; }
.results thead th:first-child { text-align: left; }
.results thead tr:first-child th { text-align: center; border-bottom: 0; padding-bottom: 0; }
.text td, .text thead th { text-align: left; }
.origin td:nth-child(-n+3) { white-space: nowrap; }
figure { margin: 1.5rem 0 2.25rem; }
figure .wide { padding: .75rem; background: #ffffff; border: 1px solid var(--line); border-radius: 8px; }
figure svg { display: block; width: 100%; min-width: 36rem; height: auto; }
figcaption { margin-top: .5rem; }
pre { overflow-x: auto; margin: 0; padding: .9rem 1rem; background: var(--band);
  border: 1px solid var(--line); border-radius: 8px; font-size: .85rem; line-height: 1.5; }
summary { cursor: pointer; margin: 1.5rem 0 .5rem; font-weight: 600; }
"""
