"""Handwritten digits that move, turn, scale and hide each other: clips made at run time, no download.

x(t) = over(digit_D, ... over(digit_1, 0)),  over(d, x) = (1 - hull_d) * x + shade_d * ink_d,  ink_d <= hull_d

The digits are the 1797 scans of 8 x 8 pixels that scikit-learn carries. Digit d stands in front of digit d - 1: its
hull (the ink and a margin around it) hides what is behind.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.errors import ChronotopeError

# Clips drawn at once: bounds the memory of the sampling grids, which are larger than the clips themselves.
CHUNK = 64
# Random numbers for one digit of one clip, in the order in which _Motion reads them.
DRAWS = 11


def moving_digits(
    clips: int, frames: int, size: int, *, digits: int = 2, seed: int = 0
) -> Float[Tensor, "{clips} {frames} 1 {size} {size}"]:
    """Clips of moving digits, float32 in [0, 1].

    clips, frames: how many, and how long each is. size: height and width in pixels, at least 8. digits: how many in
    each clip, the later ones in front. seed: the same seed gives the same clips; torch's own generator is not touched.

        moving_digits(512, 8, 64).shape  # [512, 8, 1, 64, 64]

    Each digit moves on a straight line that borders reflect, at a constant turn per frame, its size swinging by a
    fifth. Left out: clips of different seeds share the scans, so a digit seen in training can return in another clip.

    Raises ChronotopeError: a number is too small, or scikit-learn is missing.
    """
    _check(clips, frames, size, digits)
    draws = torch.rand(clips, digits, DRAWS, generator=torch.Generator().manual_seed(seed))
    ink = _textures(size)
    out = torch.empty(clips, frames, 1, size, size)
    for start in range(0, clips, CHUNK):
        part = slice(start, start + CHUNK)
        out[part] = _draw(draws[part], ink, frames, size)
    return out


def _check(clips: int, frames: int, size: int, digits: int) -> None:
    least = {"clips": (clips, 1), "frames": (frames, 1), "size": (size, 8), "digits": (digits, 1)}
    for name, (value, low) in least.items():
        if value < low:
            raise ChronotopeError(f"moving_digits: {name}={value}, expected at least {low}: give a larger {name}")


def _draw(
    draws: Float[Tensor, "clips digits draws"], ink: Float[Tensor, "scans side side"], frames: int, size: int
) -> Float[Tensor, "clips {frames} 1 {size} {size}"]:
    """One chunk of clips, painted from the digit at the back to the one in front."""
    canvas = torch.zeros(draws.shape[0] * frames, 1, size, size)
    for one in draws.unbind(1):
        scan = ink[(one[:, 0] * len(ink)).long()]
        places = F.affine_grid(_motion(one, frames).flatten(0, 1), list(canvas.shape), align_corners=False)
        layers = torch.stack((scan, _hull(scan)), 1).repeat_interleave(frames, 0)
        body, hull = F.grid_sample(layers, places, align_corners=False).split(1, 1)
        shade = (0.5 + 0.5 * one[:, 10]).repeat_interleave(frames).view(-1, 1, 1, 1)
        canvas = canvas * (1 - hull) + shade * body
    return canvas.clamp_(0, 1).unflatten(0, (-1, frames))


def _motion(draws: Float[Tensor, "clips draws"], frames: int) -> Float[Tensor, "clips {frames} 2 3"]:
    """Affine maps from the canvas to the digit, both in [-1, 1]: theta = R(-angle) / radius * [I | -place]."""
    t = torch.arange(frames)
    _, x, y, heading, speed, angle, turn, radius, swing, phase, _ = (column[:, None] for column in draws.unbind(1))
    mean = 0.3 + 0.2 * radius
    radius = mean * torch.exp(0.2 * torch.sin((0.1 + 0.3 * swing) * t + 2 * math.pi * phase))
    # Steps are parts of the mean way: parts of the present one would add up to jumps in a long clip.
    step = (0.04 + 0.10 * speed) / (2 * (1 - mean))
    x = _bounce(x, step * torch.cos(2 * math.pi * heading), t, 1 - radius)
    y = _bounce(y, step * torch.sin(2 * math.pi * heading), t, 1 - radius)
    angle = 0.6 * (angle - 0.5) + 0.4 * (turn - 0.5) * t
    cos, sin = torch.cos(angle) / radius, torch.sin(angle) / radius
    rows = torch.stack((cos, sin, -(cos * x + sin * y), -sin, cos, sin * x - cos * y), -1)
    return rows.unflatten(-1, (2, 3))


def _bounce(
    start: Float[Tensor, "clips 1"],
    step: Float[Tensor, "clips 1"],
    t: Tensor,
    reach: Float[Tensor, "clips frames"],
) -> Float[Tensor, "clips frames"]:
    """Where a point is after t steps between walls at -reach and reach; start and step are parts of the way between.

    A triangle wave: no loop over frames, and a digit that grows is pushed away from the wall.
    """
    way = (start + t * step) % 2
    return reach * (1 - 2 * (way - 1).abs())


def _hull(ink: Float[Tensor, "n side side"]) -> Float[Tensor, "n side side"]:
    """The ink widened by a 16th of its side: at least the ink everywhere, so that a sum of layers stays in [0, 1]."""
    wide = 2 * max(1, ink.shape[-1] // 16) + 1
    spread = F.max_pool2d(ink[:, None], wide, stride=1, padding=wide // 2)[:, 0]
    return (1.5 * spread).clamp(0, 1)


def _textures(size: int) -> Float[Tensor, "scans side side"]:
    """The scans in [0, 1], enlarged to about the pixels they will cover: larger ones would be sampled with gaps."""
    side = max(8, size // 2)
    # Many scans touch their border: one empty pixel around them lets the enlarged stroke end softly.
    smooth = F.interpolate(
        F.pad(_scans(), (1, 1, 1, 1))[:, None], size=(side, side), mode="bicubic", align_corners=False
    )
    return smooth[:, 0].clamp(0, 1)


def _scans() -> Float[Tensor, "scans 8 8"]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ChronotopeError(
            "moving_digits takes its digits from scikit-learn, which is not installed: pip install chronotope[train]"
        ) from error
    return torch.from_numpy(load_digits().images).float() / 16
