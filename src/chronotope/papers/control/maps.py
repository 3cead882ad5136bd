"""Attention weights as maps over pixels: read, smoothed, made into masks, and measured inside and outside of regions.

Weights are those of a cross-attention, [B, H, N, T]: N pixels, row-major, that look at T tokens of a text. Frames are
members of the batch, or an axis before h and w.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from chronotope.adapt.control import At, Control
from chronotope.errors import ChronotopeError


def sides(pixels: int, aspect: float | int = 1) -> tuple[int, int]:
    """(h, w) of so many pixels, with h = `aspect` times w."""
    h = round(math.sqrt(pixels * aspect))
    if h < 1 or pixels % h or round(pixels // h * aspect) != h:
        raise ChronotopeError(f"{pixels} pixels are no picture of h = {aspect} w.")
    return h, pixels // h


def pixel_maps(
    weights: Iterable[Float[Tensor, "b _ _ t"]], size: tuple[int, int], aspect: float | int | None = None
) -> Float[Tensor, "b h w t"]:
    """Mean over heads and layers; layers of other resolutions are brought to `size` first, bilinearly.

    aspect: h / w of the layers; default: that of `size`.
    """
    found = []
    for one in weights:
        maps = one.mean(1)
        h, w = sides(maps.shape[1], size[0] / size[1] if aspect is None else aspect)
        found.append(resized(maps.transpose(1, 2).unflatten(2, (h, w)), size).movedim(1, -1))
    if not found:
        raise ChronotopeError("no weights were kept: was a layer chosen that looks at text, and the model called?")
    return torch.stack(found).mean(0)


def resized(maps: Float[Tensor, "*s h w"], size: tuple[int, int]) -> Float[Tensor, "*s H W"]:
    """Bilinearly, averaged where it becomes smaller."""
    if maps.shape[-2:] == size:
        return maps
    flat = maps.reshape(-1, 1, *maps.shape[-2:])
    return F.interpolate(flat, size=size, mode="bilinear", antialias=True).reshape(*maps.shape[:-2], *size)


def normalised(maps: Float[Tensor, "*s h w"]) -> Float[Tensor, "*s h w"]:
    """From 0 to 1 in each picture; a picture that is the same everywhere becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low).clamp(min=torch.finfo(maps.dtype).tiny)


def mask_of(maps: Float[Tensor, "*s h w"], threshold: float | int, dilate: int = 0) -> Bool[Tensor, "*s h w"]:
    """Where a map, from 0 to 1 in each picture, is above a threshold; grown by `dilate` pixels on all sides."""
    mask = normalised(maps) > threshold
    if dilate == 0:
        return mask
    flat = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    return (F.max_pool2d(flat, 2 * dilate + 1, stride=1, padding=dilate) > 0).reshape(mask.shape)


def smoothed(maps: Float[Tensor, "*s"], variance: float, size: int = 3, dims: Sequence[int] = (-2, -1)) -> Tensor:
    """Under a Gaussian of `size` places along each of some dimensions; edges are mirrored."""
    reach = size // 2
    places = torch.arange(size, device=maps.device, dtype=maps.dtype) - reach
    kernel = (-places.square() / (2 * variance)).exp()
    kernel = kernel / kernel.sum()
    for dim in dims:
        last = maps.movedim(dim, -1)
        rows = last.reshape(-1, 1, last.shape[-1])
        # A single place has no neighbours to mirror.
        padded = F.pad(rows, (reach, reach), mode="reflect" if rows.shape[-1] > reach else "replicate")
        maps = F.conv1d(padded, kernel[None, None]).reshape(last.shape).movedim(-1, dim)
    return maps


def top_mean(maps: Float[Tensor, "*s h w"], region: Bool[Tensor, "*s h w"], share: float | int) -> Float[Tensor, "*s"]:
    """Mean of the largest values in a region: `share` of its pixels, one at least; 0 where it has none."""
    size = region.flatten(-2).sum(-1)
    count = (size * share).long().clamp(min=1).minimum(size)
    values = maps.masked_fill(~region, -torch.inf).flatten(-2).sort(dim=-1, descending=True).values
    taken = torch.arange(values.shape[-1], device=maps.device) < count[..., None]
    return values.masked_fill(~taken, 0.0).sum(-1) / count.clamp(min=1)


def propagated(
    among: Float[Tensor, "*s n n"], words: Float[Tensor, "*s n t"], powers: int = 4
) -> Float[Tensor, "*s n t"]:
    """(A + A^2 + .. + A^powers) C / powers: maps C of words, spread by the attention A of pixels to each other."""
    total = among @ words
    for _ in range(powers - 1):
        total = among @ (words + total)
    return total / powers


def otsu(values: Float[Tensor, "*s h w"], bins: int = 256) -> Float[Tensor, "*s"]:
    """The threshold that parts the values of each picture in two classes whose means lie furthest apart (Otsu 1979).

    Of thresholds between `bins` equal parts of the range from the lowest value to the highest; what lies above is one
    class. A picture that is the same everywhere has its value as threshold.
    """
    flat = values.flatten(-2)
    low, high = flat.amin(-1, keepdim=True), flat.amax(-1, keepdim=True)
    width = (high - low) / bins
    index = ((flat - low) / width.clamp(min=torch.finfo(flat.dtype).tiny)).long().clamp(max=bins - 1)
    count = torch.zeros(*flat.shape[:-1], bins, dtype=torch.float64, device=flat.device)
    count = count.scatter_add(-1, index, torch.ones_like(flat, dtype=torch.float64)) / flat.shape[-1]
    below, mass = count.cumsum(-1), (count * torch.arange(bins, device=flat.device)).cumsum(-1)
    # w0 w1 (mu0 - mu1)^2 of the two classes.
    apart = (mass[..., -1:] * below - mass).square() / (below * (1 - below)).clamp(min=1e-12)
    return (low + (apart.argmax(-1, keepdim=True) + 1) * width)[..., 0]


class MeanMap(Control):
    """Collects weights over layers and calls of cross-attention: `mean(size)` [B, h, w], of some tokens, all steps.

    Holds a sum for each resolution. Choose layers that look at text by `layers=`; other layers are passed over, but
    pay for their weights.
    """

    def __init__(self, tokens: Sequence[int]):
        self.tokens = list(tokens)
        self.sums: dict[int, Tensor] = {}
        self.counts: dict[int, int] = {}

    def weights(self, at: At, weights: Float[Tensor, "b h nq nk"]) -> Float[Tensor, "b h nq nk"]:
        if at.crossed:
            seen = weights.detach()[..., self.tokens].mean((1, 3))
            pixels = seen.shape[1]
            self.sums[pixels] = self.sums.get(pixels, 0) + seen
            self.counts[pixels] = self.counts.get(pixels, 0) + 1
        return weights

    def mean(self, size: tuple[int, int]) -> Float[Tensor, "b h w"]:
        """Over everything that was seen, every call of a layer counting the same."""
        if not self.sums:
            raise ChronotopeError("no weights were seen: was a layer chosen that looks at text, and the model called?")
        parts = [
            resized(total.unflatten(1, sides(pixels, size[0] / size[1])), size) for pixels, total in self.sums.items()
        ]
        return torch.stack(parts).sum(0) / sum(self.counts.values())

    def clear(self) -> None:
        """Forgets what was seen."""
        self.sums, self.counts = {}, {}
