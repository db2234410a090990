"""Several runs side by side: a table, figures, a report."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, overload

from rich.console import Console

from common.errors import ConfigError
from common.run import Run
from dsl.federation import Sources, new_folder, train
from dsl.naming import Function
from dsl.results import Results, html_of
from dsl_lab import figures, report, table
from dsl_lab.series import grouped

_WIDTH = 800  # pixels of a figure in a notebook


@dataclass(frozen=True)
class Figure:
    """A picture that a notebook shows. words: what is to be seen, for who does not see it."""

    png: bytes
    words: str

    def save(self, path: str | Path) -> Path:
        """Raises OSError."""
        Path(path).write_bytes(self.png)
        return Path(path)

    def _repr_mimebundle_(self, **_: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        return {"image/png": self.png, "text/plain": self.words}, {"image/png": {"width": _WIDTH}}


class Comparison(Sequence[Results]):
    """Finished runs, in order. Runs that differ only in their seeds are one row, one line, with a spread."""

    def __init__(self, results: Sequence[Results]) -> None:
        self._results = tuple(results)

    @overload
    def __getitem__(self, index: int) -> Results: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Results]: ...
    def __getitem__(self, index: int | slice) -> Results | Sequence[Results]:
        return self._results[index]

    def __len__(self) -> int:
        return len(self._results)

    def __iter__(self) -> Iterator[Results]:
        return iter(self._results)

    def figure(self, name: str = "accuracy-by-traffic") -> Figure:
        """accuracy, traffic, memory, time or accuracy-by-traffic. Raises ConfigError for another."""
        drawings = {drawing.name: drawing for drawing in figures.DRAWINGS}
        if name not in drawings:
            raise ConfigError(f"figure {name!r}: choose from {', '.join(drawings)}")
        return Figure(*figures.render(drawings[name], grouped(self._finished), "png"))

    def markdown(self) -> str:
        """The table, with what its columns mean."""
        return table.markdown(self._finished)

    def csv(self) -> str:
        """A line for each run, its numbers as they were counted: bytes, seconds, fractions."""
        return table.comma_separated(self._finished)

    def report(self, path: str | Path = "report.html") -> list[Path]:
        """Writes what `dsl report` does: the page, and beside it the tables and the figures. Raises
        ConfigError where a file cannot be written."""
        return report.publish(self._finished, Path(path))

    def _repr_html_(self) -> str:
        return html_of(grouped(self._finished))

    def __str__(self) -> str:
        file = StringIO()
        table.show(self._finished, Console(file=file, width=160, force_jupyter=False))
        return file.getvalue()

    def __repr__(self) -> str:
        return "\n".join(map(repr, self._results))

    @property
    def _finished(self) -> list[Any]:
        return [results.finished for results in self._results]


def compare(
    runs: Sequence[Run | Results],
    *,
    model: Function | None = None,
    loss: Function | None = None,
    metric: Function | None = None,
    data: Sources | None = None,
    out: str | Path | None = None,
    processes: bool = False,
    device: str = "auto",
    threads: int = 1,
    progress: bool = True,
) -> Comparison:
    """Trains each run, one after another, as `train` does; what has finished already is taken as it is.

    out: the folder that has them all, by default runs/<time>-compare. Raises what `train` does.
    """
    if not runs:
        raise ConfigError("compare: name at least one run")
    folder = Path(out) if out is not None else None
    results = []
    for number, run in enumerate(runs, 1):
        if isinstance(run, Run):
            folder = folder or new_folder("compare")
            run = train(
                run,
                model=model,
                loss=loss,
                metric=metric,
                data=data,
                out=folder / f"{number:02}-{run.method}",
                processes=processes,
                device=device,
                threads=threads,
                progress=progress,
            )
        results.append(run)
    return Comparison(results)
