"""What it gains that a ResNet's tensors lie in memory with their channels last; and what torch.compile would.

Each side's step of DSL and CSL on one core, with its layers in two forms, one after the other in each
repetition: as they are built (channels last), row by row (torch's own way), or compiled. What is sent lies
row by row, so all steps include what it takes to lay it out anew; compiling is not in them.

    python benchmarks/layout/main.py [--model resnet110] [--splits s m d] [--repetitions 7]
    python benchmarks/layout/main.py --forms "channels last" "compiled by block"
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date

import torch
from torch import Tensor, nn

from common.methods import build_method
from common.methods.base import Received, Sent, Smashed, run_step
from common.methods.hosting import Hosting
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import Run

SIZE = 128


def row_by_row(layers: nn.Module) -> None:
    layers.to(memory_format=torch.contiguous_format)


def as_built(_: nn.Module) -> None:
    """Channels last."""


def compiled_by_block(layers: nn.Module) -> None:
    """Blocks of one shape share their kernels, so that it takes seconds whatever the depth."""
    for layer in layers.children():
        layer.compile()


def compiled_whole(layers: nn.Module) -> None:
    """It takes some seconds for each block."""
    layers.compile()


FORMS: dict[str, Callable[[nn.Module], None]] = {
    "row by row": row_by_row,
    "channels last": as_built,
    "compiled by block": compiled_by_block,
    "compiled whole": compiled_whole,
}


def steps(run: Run, form: str) -> Callable[[Tensor, Tensor], tuple[float, float]]:
    """A function that makes one step of both sides; the seconds of the client's and the server's."""
    method, net, cpu = build_method(run), build(run), torch.device("cpu")
    for layers in (net.bottom, net.top, net.head):
        FORMS[form](layers)
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
    parser.add_argument("--forms", nargs=2, default=["row by row", "channels last"], choices=FORMS)
    parser.add_argument("--repetitions", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{date.today()}, {platform.machine()}, one core, torch {torch.__version__}; {options.model}, ")
    print(f"head gap, batches of {SIZE}; median ms of {options.repetitions} interleaved repetitions\n")
    names = [
        "method",
        "split",
        *(f"{side}, {form}" for side in ("client", "server") for form in options.forms),
    ]
    names += ["client gains", "server gains"]
    print(f"| {' | '.join(names)} |\n|{'---|' * len(names)}")
    x, y = torch.rand(SIZE, 3, 32, 32), torch.arange(SIZE) % 10
    for name in ("dsl", "csl"):
        for split in options.splits:
            run = Run(method=name, model=options.model, split=split, head="gap")
            made = [steps(run, form) for form in options.forms]
            for one in made:
                one(x, y)  # which makes kernels, where it compiles
            rows = [[one(x, y) for one in made] for _ in range(options.repetitions)]
            (c0, c1), (s0, s1) = (
                [1000 * statistics.median(row[form][side] for row in rows) for form in (0, 1)]
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
