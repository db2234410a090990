"""What each codec costs and loses, on the activations of a trained client and on their gradients.

ResNet-20 cut at m. A DSL client and its server train a little on real CIFAR-10 images, in this process;
then one batch's activations (128, 16, 32, 32), as they would be sent, and the server's gradient of them are
encoded and decoded by every codec in turn, round after round, on one thread.

    python benchmarks/codecs/main.py IMAGES.npz [--epochs 2] [--rounds 31]

IMAGES.npz holds train_images (N, 32, 32, 3) uint8, train_labels, test_images, test_labels, classes.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from common.codecs import CODECS, Codec, Encoded, parse
from common.methods.base import ClientPart, Received, Sent, ServerPart, Smashed, run_step
from common.methods.dsl import dsl
from common.nets.cut import build
from common.optim import learning_rate, progress_of, set_learning_rate
from common.parts import client_part, server_part
from common.run import Run
from dsl_client import data
from dsl_client.batches import Batches

COMPRESSED = ("fp32", "fp16", "bf16", "int8", "int4", "int3", "int2", "topk")
NAMES = [*CODECS, *(f"{name}+zstd" for name in COMPRESSED)]
CPU = torch.device("cpu")
R = TypeVar("R")


def trained(run: Run, batches: Batches) -> tuple[ClientPart, ServerPart]:
    """Both ends, after `run.epochs` epochs of DSL on one client's batches."""
    method, net = dsl(), build(run)
    client, server = client_part(run, method, net, CPU), server_part(run, method, net, CPU)
    for epoch in range(run.epochs):
        for index, (x, y) in enumerate(batches.epoch(epoch)):
            progress = progress_of(run, epoch, index, len(batches))

            def wire(sent: Sent, progress: float = progress) -> None:
                assert isinstance(sent, Smashed)
                method.server_step(server, [Received(sent.z, sent.y, 0, progress, wanted=False)])

            for part in (client, server):
                set_learning_rate(part.optimizer, learning_rate(run, progress))
            run_step(method.client_step(client, x, y), wire)
    return client, server


def at_the_cut(client: ClientPart, server: ServerPart, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """z and dL/dz (B, C, H, W) of one batch, in training mode."""
    z = client.bottom(x).detach().requires_grad_()
    loss = F.cross_entropy(server.top(z), y)
    (gradient,) = torch.autograd.grad(loss, z)
    return z.detach(), gradient


def error(codec: Codec, x: Tensor) -> tuple[float, float]:
    """Of one encoding for training: |y - x| / |x|, and bytes an element."""
    encoded = codec.encode(x, torch.Generator().manual_seed(0), True)
    sent = sum(tensor.numel() * tensor.dtype.itemsize for tensor in encoded.tensors)
    return float((codec.decode(encoded) - x).norm() / x.norm()), sent / x.numel()


def timed(work: Callable[[], R]) -> tuple[R, float]:
    # This thread's own seconds: the machine is shared, and what others take is not the codec's.
    start = time.thread_time()
    result = work()
    return result, time.thread_time() - start


def speeds(codecs: dict[str, Codec], x: Tensor, rounds: int) -> dict[str, tuple[float, float]]:
    """GB of float32 a second, encoding and decoding: medians over rounds, in each of which all take turns."""
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in codecs}
    for turn in range(rounds + 1):
        for name, codec in codecs.items():

            def encode(codec: Codec = codec) -> Encoded:
                return codec.encode(x, generator, True)

            encoded, encoding = timed(encode)

            def decode(codec: Codec = codec, encoded: Encoded = encoded) -> Tensor:
                return codec.decode(encoded)

            _, decoding = timed(decode)
            if turn:  # the first warms up
                seconds[name].append((encoding, decoding))
    size = x.numel() * 4 / 1e9
    medians = {
        name: [statistics.median(side) for side in zip(*of, strict=True)] for name, of in seconds.items()
    }
    return {name: (size / encoding, size / decoding) for name, (encoding, decoding) in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("images", type=Path, help="an npz file")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = f"npz:{options.images.resolve()}"
    run = Run(model="resnet20", split="m", method="dsl", epochs=options.epochs, augment=False, data=source)
    train, _ = data.load(run.data, run.image_shape, run.class_count)
    batches = Batches(train, None, run.batch_size, seed=run.seed, device=CPU)
    client, server = trained(run, batches)
    z, gradient = at_the_cut(client, server, *next(batches.epoch(options.epochs)))

    codecs = {codec.name: codec for codec in map(parse, NAMES)}
    fast = speeds(codecs, z, options.rounds)
    print(
        f"{date.today()}, {platform.machine()}, CPU, one thread, Python {platform.python_version()}, ", end=""
    )
    print(
        f"torch {torch.__version__}, backports.zstd {version('backports.zstd')}; {len(train)} images, ",
        end="",
    )
    print(f"{options.epochs} epochs; z {list(z.shape)}, {float((z == 0).float().mean()):.0%} zeros, ", end="")
    print(f"dL/dz of norm {float(gradient.norm()):.1e}; medians of {options.rounds} interleaved rounds\n")
    print("| codec | bytes an element | error of z | error of dL/dz | encode, GB/s | decode, GB/s | both |")
    print("|---|---|---|---|---|---|---|")
    for name, codec in codecs.items():
        (lost, size), (lost_gradient, _), (encode, decode) = (
            error(codec, z),
            error(codec, gradient),
            fast[name],
        )
        both = 1 / (1 / encode + 1 / decode)
        print(f"| {name} | {size:.3f} | {lost:.2g} | {lost_gradient:.2g} | ", end="")
        print(f"{encode:.2f} | {decode:.2f} | {both:.2f} |")


if __name__ == "__main__":
    main()
