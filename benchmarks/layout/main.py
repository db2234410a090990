"""What it gains that a ResNet's tensors lie in memory with their channels last.

Each side's step of DSL and CSL on one core, with its weights as they are built (channels last) and row by
row (torch's own way), one after the other in each repetition. What is sent lies row by row, so both steps
include what it takes to lay it out anew.

    python benchmarks/layout/main.py [--model resnet110] [--splits s m d] [--repetitions 7]
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor

from common.methods import build_method
from common.methods.base import Received, Sent, Smashed, run_step
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import Run

SIZE = 128
LAYOUTS = {"row by row": torch.contiguous_format, "channels last": torch.channels_last}


def steps(run: Run, layout: torch.memory_format) -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """A function that makes one step of both sides; the seconds of the client's and the server's."""
    method, net, cpu = build_method(run), build(run), torch.device("cpu")
    for layers in (net.bottom, net.top, net.head):
        layers.to(memory_format=layout)
    client, server = (
        client_part(run, method, net, cpu),
        Hosting(run, method, server_part(run, method, net, cpu)),
    )
    sent: list[Smashed] = []
    answer: list[Tensor | None] = [None]

    def wire(batch: Sent) -> Tensor | None:
        assert isinstance(batch, Smashed), "a batch"
        sent.append(Smashed(batch.z.contiguous(), batch.y))
        return answer[0]

    def both(x: Tensor, y: Tensor) -> tuple[float, float]:
        sent.clear()
        start = time.perf_counter()
        run_step(method.client_step(client, x, y), wire)
        middle = time.perf_counter()
        batch = Received(sent[0].z, sent[0].y, client=0, progress=0.0, wanted=not method.one_way)
        gradients = server.step([batch]).gradients
        end = time.perf_counter()
        answer[0] = gradients[0].contiguous() if gradients and gradients[0] is not None else None
        return middle - start, end - middle

    if not method.one_way:
        answer[0] = torch.zeros(SIZE, *net.cut_shape)
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet110")
    parser.add_argument("--splits", nargs="+", default=["s", "m", "d"])
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, {platform.machine()}, one core, torch {torch.__version__}; {options.model}, ")
    print(f"head gap, batches of {SIZE}; median ms of {options.repetitions} interleaved repetitions\n")
    names = ["method", "split", *(f"{side}, {name}" for side in ("client", "server") for name in LAYOUTS)]
    names += ["client gains", "server gains"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    x, y = torch.rand(SIZE, 3, 32, 32), torch.arange(SIZE) % 10
    for name in ("dsl", "csl"):
        for split in options.splits:
            run = Run(method=name, model=options.model, split=split, head="gap")
            made = [steps(run, layout) for layout in LAYOUTS.values()]
            rows = [[one(x, y) for one in made] for _ in range(options.repetitions + 1)][1:]
            (c0, c1), (s0, s1) = (
                [1000 * statistics.median(row[layout][side] for row in rows) for layout in (0, 1)]
                for side in (0, 1)
            )
            cells = [
                name,
                split,
                *(f"{ms:.0f}" for ms in (c0, c1, s0, s1)),
                f"{c0 / c1:.2f}",
                f"{s0 / s1:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
