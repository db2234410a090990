"""Made-up views of a run, and a page that shows them."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from dsl_server.dashboard.serve import Dashboard
from dsl_server.watch import ClientView, View

UP = {"activations": 4_000_000, "labels": 2_000, "gradients": 0, "evaluation": 500_000, "weights": 0}
DOWN = {"activations": 0, "gradients": 0, "evaluation": 0, "weights": 0}


def line(epoch: int, **test: Any) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    return {
        "epoch": epoch,
        "seconds": 2.5 * epoch,
        "samples_trained": 100 * epoch,
        "train": {"loss": 2.0 / epoch, "client_loss": 3.0 / epoch},
        "test": {"accuracy": 0.125 * epoch, "loss": 1.0 / epoch, "client_only_accuracy": None, **test},
        "wire": {"up": 4_502_100 * epoch, "down": 90 * epoch},
    }


def client(index: int, **settings: Any) -> ClientView:
    usual: dict[str, Any] = {
        "name": f"ward-{index}",
        "state": "training",
        "epoch": 0,
        "done": 0.125,
        "samples": 50,
        "rate": 20.0,
        "queue": 1,
        "up": 2_000_000,
        "down": 40,
        "loss": 1.5,
        "lag_s": 0.2,
    }
    return ClientView(client=index, **{**usual, **settings})


def view(**settings: Any) -> View:
    lines: tuple[Mapping[str, Any], ...] = settings.get("lines", ())
    usual: dict[str, Any] = {
        "name": "wards",
        "method": "dsl",
        "model": "resnet8",
        "place": "1",
        "clients_expected": 2,
        "epoch": len(lines),
        "epochs": 4,
        "done": 0.125,
        "seconds": 3.0,
        "left_s": 21.0,
        "samples": 100,
        "rate": 40.0,
        "loss": 1.75,
        "test": lines[-1]["test"] if lines else dict.fromkeys(("accuracy", "loss", "client_only_accuracy")),
        "wire": {"up": {**UP, "control": 100, "framing": 0}, "down": {**DOWN, "control": 90, "framing": 0}},
        "socket": {"up": 4_600_000, "down": 400},
        "finished": False,
        "reason": None,
        "clients": (client(0), client(1)),
        "lines": lines,
        "phases": {"forward": 1.0, "backward": 1.0, "decode": 0.1, "idle": 0.9},
    }
    return View(**{**usual, **settings})


@contextlib.contextmanager
def shown(look: Callable[[], View], port: int = 0) -> Iterator[Dashboard]:
    """A real page on loopback, gone at the end."""
    page = Dashboard(port, "127.0.0.1")
    page.start(look)
    try:
        yield page
    finally:
        page.stop()
