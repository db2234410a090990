"""Tables for notebooks."""

from collections.abc import Sequence
from html import escape
from itertools import groupby


def html_table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], over: Sequence[str] = (), caption: str = ""
) -> str:
    """over: of each column, what stands above its head; neighbours with the same one share it."""
    above = "".join(
        f'<th colspan="{len(list(some))}" style="text-align:center">{escape(name)}</th>'
        for name, some in groupby(over)
    )
    under = "".join(f"<th>{escape(head)}</th>" for head in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    said = f"<caption>{escape(caption)}</caption>" if caption else ""
    lines = "".join(f"<tr>{line}</tr>" for line in (above, under) if line)
    return f"<table>{said}<thead>{lines}</thead><tbody>{body}</tbody></table>"
