"""A hospital's own program, with a client in it: python client.py NUMBER [host:port]

It reads its images as it always did, here a share of the sample that comes with the package, and trains on
them beside the server. With certificates: dsl.Client(..., certs="ward-7"), made by dsl certs client.
"""

import io
import lzma
import sys
from importlib import resources

import numpy as np
import torch
from network import build
from torch.utils.data import Dataset, Subset

import dsl


class Records(Dataset):
    """What this hospital has: pairs of an image (C, H, W) uint8 and a label."""

    def __init__(self, split: str) -> None:
        packed = resources.files("dsl_client.sample") / "fashion-mnist.npz.xz"
        with np.load(io.BytesIO(lzma.decompress(packed.read_bytes()))) as arrays:
            self.images = torch.from_numpy(arrays[f"{split}_images"])[:, None]  # (N, 1, H, W) uint8
            self.labels = arrays[f"{split}_labels"]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.images[index], int(self.labels[index])


def main(number: int, server: str) -> None:
    train, test = Records("train"), Records("test")
    mine = Subset(train, range(number * 500, (number + 1) * 500))
    with dsl.Client(
        server,
        name=f"ward-{number}",
        data=(mine, Subset(test, range(200))),
        allow=build,  # the code that the server's run may use here, and no other
        patience=60,  # seconds to wait for a server that is not there yet
    ) as client:
        run = client.join()
        print(f"client {client.index} of {run.clients}: {run.method}, {run.epochs} epochs", flush=True)
        folder = client.train(on_scored=lambda score: print(f"  accuracy {score.accuracy:.3f}", flush=True))
    print(f"the bottom's weights are in {folder / 'checkpoint'}")


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), *sys.argv[2:] or ["127.0.0.1:50051"])
    except dsl.SplitLearningError as reason:  # one line: what was wrong, and the remedy
        sys.exit(f"{type(reason).__name__}: {reason}")
    except KeyboardInterrupt:
        sys.exit("stopped")
