"""Where a network can be cut, and what each cut costs: `dsl cuts`, as values."""

from collections.abc import Iterator, Sequence
from typing import overload

from dsl.html import html_table
from dsl.naming import Function, name_of
from dsl_lab import cuts as lab
from dsl_lab.costs import Costs


class Cuts(Sequence[Costs]):
    """Every cut, from the input on: `layer`; `shapes` and `sent_bytes` of what a sample sends; of `client`
    and `server` the `parameters`, and of a sample `macs` and `activation_bytes`."""

    def __init__(self, options: lab.Cuts) -> None:
        self._options = options
        self._rows, best = lab.listed(options)
        self.best: Costs | None = best
        """The one for the link and the memory; without them that which sends least; None where none fits."""

    @overload
    def __getitem__(self, index: int) -> Costs: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Costs]: ...
    def __getitem__(self, index: int | slice) -> Costs | Sequence[Costs]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[Costs]:
        return iter(self._rows)

    def __str__(self) -> str:
        return "\n".join("  ".join(row).rstrip() for row in _aligned([*self._table()]))

    __repr__ = __str__

    def _repr_html_(self) -> str:
        heads, *rows = self._table()
        return html_table(heads, rows)

    def _table(self) -> Iterator[list[str]]:
        table = lab.tabulated(self._options, self._rows, self.best)
        yield [" ".join(str(column.header).split()) for column in table.columns]
        yield from (
            list(map(str, row)) for row in zip(*(column.cells for column in table.columns), strict=True)
        )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[list[str]]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]


def cuts(
    model: Function,
    input: Sequence[int] = (3, 32, 32),
    *,
    classes: int = 10,
    batch_size: int = 128,
    link: str = "",
    memory: str = "",
    speed: float = 10.0,
) -> Cuts:
    """Where the network can be cut.

    model: as a run's, or the function that builds it. input: the shape of one. batch_size: for what must be
    held. link: the clients', such as 10Mbit. memory: what a client may hold, such as 512MB. speed: billions
    of multiply-adds a second that a client makes. Raises ConfigError.
    """
    shape = "x".join(map(str, input))
    return Cuts(lab.Cuts(name_of("model", model), shape, classes, batch_size, link, memory, speed))
