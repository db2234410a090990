"""`dsl methods`: every method, its settings, what travels each way, and where it comes from."""

import re
import sys
from typing import Any, get_args

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from common.methods import METHODS, arguments
from common.methods.base import Gather, Method, Tail


def show(console: Console) -> None:
    """Prints the list. What it says of a method is read from the method, not written down again."""
    for name, make in METHODS.items():
        method = make()
        settings = "  ".join(_setting(key, *about) for key, about in arguments(make).items())
        facts = Table.grid(padding=(0, 1))
        facts.add_column(width=6, style="dim")
        facts.add_column(overflow="fold")
        facts.add_row("up", goes_up(method))
        facts.add_row("down", comes_down(method))
        if settings:
            facts.add_row("set", Text(settings))
        facts.add_row("source", Text(source(make)))
        console.print(Text(name, style="bold"), Text(title(make)), sep="  ", soft_wrap=True)
        console.print(Padding(facts, (0, 0, 1, 4)))
    how = "Settings: dsl-server --method NAME --method-arg KEY=VALUE ..., or a file's [method] table."
    console.print(how, markup=False)


def title(make: Any) -> str:
    """What the method's file says first."""
    return (sys.modules[make.__module__].__doc__ or "").splitlines()[0]


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
    unbroken = "\u00a0"
    return f"{name}={default}" + (f"{unbroken}({'|'.join(choices)})" if choices else "")
