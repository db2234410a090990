"""`dsl methods`: every method, its settings, what travels each way, and where it comes from."""

import re
import sys
from typing import Any, get_args

from rich.console import Console
from rich.table import Table

from common.methods import METHODS, arguments
from common.methods.base import Gather, Method, Tail


def show(console: Console) -> None:
    """Prints the table. What it says of a method is read from the method, not written down again."""
    table = Table("method", "settings", "goes up", "comes down", show_lines=True)
    table.add_column("source", no_wrap=True)
    for name, make in METHODS.items():
        settings = [_setting(key, *about) for key, about in arguments(make).items()]
        method = make()
        table.add_row(
            name,
            "\n".join(settings) or "–",
            goes_up(method),
            comes_down(method),
            source(make).removeprefix("https://"),
        )
    console.print(table)
    how = "Settings: dsl-server --method NAME --method-arg KEY=VALUE ..., or a file's [method] table."
    console.print(how, markup=False)


def goes_up(method: Method) -> str:
    """In words: what a client sends."""
    what = "activations and labels" if method.tail is Tail.NONE else "activations"
    tail = "; a gradient for each output" if method.tail is Tail.LAST else ""
    weights = "weights" if method.sync in ("average", "relay") else ""
    return ", ".join(filter(None, [_batches(method, what) + tail, weights]))


def comes_down(method: Method) -> str:
    """In words: what the server sends back."""
    outputs = "an output a batch" if method.tail is Tail.LAST else ""
    gradients = {0: "", 1: "a gradient a batch"}.get(
        method.answer_every, f"a gradient for one batch in {method.answer_every}"
    )
    gradients += ", or a skip" if method.may_skip else ""
    weights = "averaged weights" if method.sync == "average" else ""
    heads = f"a head every {method.head_every} epochs" if method.new_head else ""
    together = "; in rounds of one batch a client" if method.gather is Gather.ALL else ""
    return (", ".join(filter(None, [outputs, gradients, weights, heads])) or "nothing") + together


def _batches(method: Method, what: str) -> str:
    if method.afterwards:
        return f"{what} of every image, once, at the end"
    if method.send_every == 0:
        return ""
    return f"{what} of " + ("every batch" if method.send_every == 1 else f"one batch in {method.send_every}")


def source(make: Any) -> str:
    """The first link of the method's file."""
    link = re.search(r"https://\S+", sys.modules[make.__module__].__doc__ or "")
    assert link, f"{make.__module__} names no source"
    return link[0].rstrip(".,);")


def _setting(name: str, kind: Any, default: Any) -> str:
    choices = get_args(kind)
    return f"{name}={default}" + (f" ({'|'.join(choices)})" if choices else "")
