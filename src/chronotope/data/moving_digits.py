r"""Moving digits: clips of handwritten digits that bounce in a square, made from any file of digits.

$$
p_{t+1} = p_t + 0.1\, s_t\, (\cos\theta, \sin\theta), \qquad
x_t = \max_d \mathrm{ink}_d(\cdot - \lfloor p_t^d (n - m) \rfloor)
$$

p starts anywhere in [0, 1]^2, \theta in any direction. What leaves [0, 1] is put back on the border, and its sign s
turns. n x n: the frame; m x m: a digit. Where digits overlap the larger value counts.

Source: Srivastava, Mansimov, Salakhutdinov 2015, "Unsupervised Learning of Video Representations using LSTMs", arXiv
1502.04681: two digits of 28 x 28 in 64 x 64, 20 frames.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from chronotope.data.files import unpacked
from chronotope.errors import ChronotopeError

PACE = 0.1  # of the free way, in each frame
IMAGES = 2051  # the first number of an idx file of images


def read_digits(path: Path) -> UInt8[Tensor, "n h w"]:
    """The images of an idx file as MNIST has them, packed or not, or of the only `*images*` file in a folder."""
    files = sorted(path.glob("*images*")) if path.is_dir() else [path] * path.is_file()
    if len(files) != 1:
        raise ChronotopeError(f"{path}: {len(files)} files of images; give an idx file, or a folder with one *images*.")
    data = bytearray(unpacked(files[0]))
    size = [int.from_bytes(data[i : i + 4], "big") for i in (0, 4, 8, 12)]
    if size[0] != IMAGES or len(data) != 16 + math.prod(size[1:]):
        raise ChronotopeError(f"{files[0]}: not an idx file of images, of 16 bytes and n x h x w values.")
    return torch.frombuffer(data, dtype=torch.uint8, offset=16).view(size[1:])


def smaller(digits: UInt8[Tensor, "n h w"], by: int) -> Float[Tensor, "n h2 w2"]:
    """In 0..1; every `by` x `by` pixels are one, their mean."""
    if by < 1 or digits.shape[1] % by or digits.shape[2] % by:
        raise ChronotopeError(f"digits of {list(digits.shape[1:])} pixels are not multiples of {by}.")
    return F.avg_pool2d(digits[:, None].float() / 255, by)[:, 0]


def bouncing(
    digits: Float[Tensor, "n m m"], clips: int, frames: int, canvas: int, rng: torch.Generator, each: int = 2
) -> Float[Tensor, "{clips} {frames} 1 {canvas} {canvas}"]:
    """Clips of `each` digits drawn from these, on frames of `canvas` x `canvas` pixels, by numbers from `rng` alone."""
    m = digits.shape[1]
    if m > canvas:
        raise ChronotopeError(f"digits of {m} pixels in frames of {canvas}: give a larger canvas.")
    which = torch.randint(len(digits), (clips, each), generator=rng)
    start = torch.rand(clips, each, 2, generator=rng, dtype=torch.float64)
    angle = 2 * math.pi * torch.rand(clips, each, generator=rng, dtype=torch.float64)
    corner = (places(start, angle, frames) * (canvas - m)).long()
    # Pixel r, c of the frame is pixel r - y, c - x of the digit, where it has one.
    inside = torch.arange(canvas) - corner[..., None]
    seen = (inside >= 0) & (inside < m)
    rows, columns = inside.clamp(0, m - 1).unbind(3)
    ink = digits[which[:, None, :, None, None], rows[..., :, None], columns[..., None, :]]
    shown = seen[:, :, :, 0, :, None] & seen[:, :, :, 1, None, :]
    return torch.where(shown, ink, 0.0).amax(2)[:, :, None]


def places(start: Float[Tensor, "b d 2"], angle: Float[Tensor, "b d"], frames: int) -> Float[Tensor, "b {frames} d 2"]:
    """Where each digit is in each frame, in [0, 1]^2. The first frame is a step from the start, as in the original."""
    way = PACE * torch.stack((angle.sin(), angle.cos()), -1)
    place, out = start, []
    for _ in range(frames):
        place = place + way
        out_of = (place <= 0) | (place >= 1)
        place, way = place.clamp(0, 1), torch.where(out_of, -way, way)
        out.append(place)
    return torch.stack(out, 1)


def parts_of(digits: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """The first digits, those after them, and so on. Raises ChronotopeError where there are too few."""
    if len(digits) < sum(sizes) or min(sizes) < 1:
        raise ChronotopeError(f"{len(digits)} digits for parts of {', '.join(map(str, sizes))}: give other sizes.")
    return digits[: sum(sizes)].split(list(sizes))
