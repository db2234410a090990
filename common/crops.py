"""Crops and flips: of images at the client, of activations at a server that learns from them again."""

import torch
import torch.nn.functional as F
from torch import Generator, Tensor


def crop_and_flip(images: Tensor, margin: int, generator: Generator) -> Tensor:
    """A random crop out of a zero margin, and a flip left to right for half: each sample its own.

    images: (B, C, H, W), of any dtype, on any device; the result is like it. generator: on the
    CPU, whatever the images are on, so that a run draws the same numbers on every machine.
    """
    count, channels, height, width = images.shape
    crops = torch.randint(2 * margin + 1, (2, count, 1), generator=generator)
    flips = torch.randint(2, (count, 1), generator=generator).bool()
    rows = (crops[0] + torch.arange(height)).to(images.device)  # (B, H)
    columns = crops[1] + torch.arange(width)
    columns = torch.where(flips, columns.flip(1), columns).to(images.device)  # (B, W)
    padded = F.pad(images, (margin,) * 4)
    rows = rows[:, None, :, None].expand(-1, channels, -1, padded.shape[3])
    columns = columns[:, None, None, :].expand(-1, channels, height, -1)
    return padded.gather(2, rows).gather(3, columns)


def augmented(z: Tensor, generator: Generator) -> Tensor:
    """Nearly the activations z (B, C, H, W) of augmented images: a convolution of a moved image is the moved
    convolution. The margin is a sixteenth of the width, half of the images' own, since a border of zeros is
    stranger to the layers above than to the first one. Of other shapes: z itself.
    """
    if z.dim() != 4:
        return z
    return crop_and_flip(z, max(1, z.shape[3] // 16), generator)
