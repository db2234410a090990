"""What it gains that a client's allocator keeps what is freed (`cli.keep_freed_memory`), and what it costs.

One side's steps of DSL on one core, in a process of their own, once with glibc's allocator as it is and once
as `dsl-client` sets it, in turns; ratios are of the same turn. Faults are of pages that the kernel had to
give, and its seconds those that it took, in the steps alone; the peak is the whole process's.

    python benchmarks/malloc/main.py [--model resnet110] [--splits s m d] [--repetitions 5]
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import date

import torch

from common import cli
from common.methods import build_method
from common.methods.base import Received, run_step
from common.nets.cut import build
from common.parts import client_part, server_part
from common.run import Run

SIZE = 128
CORE = "1"
SIDES = ("client", "server")


def measure(side: str, split: str, options: argparse.Namespace) -> dict[str, float]:
    """Of a step, after the first one."""
    run, cpu = Run(model=options.model, split=split, head="gap"), torch.device("cpu")
    method, net = build_method(run), build(run)
    client, server = client_part(run, method, net, cpu), server_part(run, method, net, cpu)
    x, y = torch.rand(SIZE, 3, 32, 32), torch.arange(SIZE) % 10
    z = torch.rand(SIZE, *net.cut_shape)

    def step() -> None:
        if side == "server":
            method.server_step(server, [Received(z, y, client=0, progress=0.0)])
        else:
            run_step(method.client_step(client, x, y), lambda _: None)

    step()
    before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    for _ in range(options.steps):
        step()
    seconds, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "ms": 1000 * seconds / options.steps,
        "kernel ms": 1000 * (after.ru_stime - before.ru_stime) / options.steps,
        "faults": (after.ru_minflt - before.ru_minflt) / options.steps,
        "peak MiB": after.ru_maxrss / 1024,
    }


def measured(side: str, split: str, keeps: bool, options: argparse.Namespace) -> dict[str, float]:
    command = ["taskset", "--cpu-list", CORE, sys.executable, __file__, "--side", side, "--splits", split]
    command += ["--model", options.model, "--steps", str(options.steps), *(["--keep"] if keeps else [])]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="resnet110")
    parser.add_argument("--splits", nargs="+", default=["s", "m", "d"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        if options.keep:
            cli.keep_freed_memory()
        torch.set_num_threads(1)
        print(json.dumps(measure(options.side, options.splits[0], options)))
        return
    print(f"{date.today()}, {platform.machine()}, one core, {' '.join(platform.libc_ver())}, torch ", end="")
    print(f"{torch.__version__}; {options.model}, head gap, {options.steps} batches of {SIZE}; median of ")
    print(f"{options.repetitions} repetitions in turns, as it is → as dsl-client has it:\n")
    heads = ["side", "split", "ms a step", "ratio (least to most)", "of it the kernel's", "faults a step"]
    heads += ["peak, MiB"]
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for side in SIDES:
        for split in options.splits:
            turns = [
                [measured(side, split, keeps, options) for keeps in (False, True)]
                for _ in range(options.repetitions)
            ]
            ratios = [kept["ms"] / plain["ms"] for plain, kept in turns]
            ratio = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
            ms, kernel, faults, peak = (
                " → ".join(f"{statistics.median(turn[form][of] for turn in turns):,.0f}" for form in (0, 1))
                for of in ("ms", "kernel ms", "faults", "peak MiB")
            )
            print(f"| {side} | {split} | {ms} | {ratio} | {kernel} | {faults} | {peak} |", flush=True)


if __name__ == "__main__":
    main()
