r"""RefAM: what an expression refers to, read from the attention of a text-to-image transformer to its words.

$$
heat(p) = \mathrm{mean}_{l, h}\ \mathrm{mean}_{w \in K_l} A_{lh}(p, w), \qquad
K_l = K \setminus \{w : \mathrm{mean}_p A_l(p, w) \ge s,\ \mathrm{std}_p A_l(p, w) \le r\, \mathrm{mean}_p A_l(p, w)\}
$$

A: weights with which pixels (or patches of a clip) look at words, in one pass over the picture with some noise. K: the
words of the expression without function words, which collect attention that has nowhere to go. Magnets: more function
words and names of colours, put after the expression; they split the attention of the background among them, and their
columns are dropped. What is taken out of K in a layer are sinks: words that all pixels look at alike. The highest point
of the heat, or a few, are the prompt of a segmenter, in a clip on its key frames.

Sizes: maps [B, L, H, N, T] -> heat [B, t, h, w] or [B, h, w]. `WordMaps` holds N x T of each layer that it is on.

    >>> words, keep = append_magnets(["the", "red", "square"], magnets=("a", "of", "green"))
    >>> words, keep.tolist()
    (['the', 'red', 'square', 'a', 'of', 'green'], [False, True, True, False, False, False])
    >>> heat = grounding_map(torch.rand(3, 2, 64, 6).softmax(-1), keep, (8, 8))
    >>> heat.shape, top_points(heat, 2).shape
    (torch.Size([8, 8]), torch.Size([2, 2]))

Maps of a model: `with ct.adapt.control(model, words, layers=...): model(...)` with `words = WordMaps()`, then
`words.kept()`.

Left out: the segmenter, and prompts of more than one expression. Unconfirmed, since no code is at hand: the noise, the
layers, s and r, and the list of magnets; those here are ours. A sink that is a word of content may be kept without its
flat part ("redirect"), which goes to the words that are dropped: how the paper moves it is unconfirmed.

Not shown: benchmarks, and pointing in joint attention as the paper has it. Of 400 pictures of two shapes, a small model
of cross-attention points at the right one in 0.97, 0.98, 0.99 (at noise 0.5, 0.3, 0.1), with function words kept in
0.92, 0.87, 0.89, with magnets in 0.97, 1, 1; one of joint attention in less than half.

Paper: Anna Kukleva, Enis Simsar, Alessio Tonioni, Muhammad Ferjad Naeem, Federico Tombari, Jan Eric Lenssen, Bernt
Schiele, "RefAM: Attention Magnets for Zero-Shot Referral Segmentation", 2025, arXiv 2509.22650.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from chronotope.adapt import At, Control
from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper

STOPS = frozenset((
    "a", "an", "the", "of", "in", "on", "at", "to", "by", "for", "from", "with", "and", "or", "is", "are", "was",
    "were", "be", "that", "this", "these", "those", "it", "its", "as",
))  # fmt: skip
MAGNETS = ("the", "a", "of", "on", "in", "and", "with", "red", "green", "blue", "white", "black")

Sinks = Literal["suppress", "redirect", "leave"]


class WordMaps(Control):
    """Keeps how pixels look at words, in layers of cross-attention and of joint attention; others are passed over.

    Joint attention tells words from pixels by the grid: one with a prefix, or one that a known class of model brings.
    """

    def __init__(self) -> None:
        self.found: list[Float[Tensor, "b h n t"]] = []

    def weights(self, at: At, weights: Float[Tensor, "b h nq nk"]) -> Float[Tensor, "b h nq nk"]:
        if at.crossed:
            self.found.append(weights.detach())
        elif at.text.stop > at.text.start:
            pixels = slice(at.text.stop, None) if at.text.start == 0 else slice(0, at.text.start)
            self.found.append(weights[:, :, pixels, at.text].detach())
        return weights

    def kept(self) -> Float[Tensor, "b l h n t"]:
        """Of all layers, in the order in which they ran, since it was made."""
        if not self.found:
            raise ChronotopeError(
                "no layer that looks at words was run: choose others, or give the grid, with a prefix."
            )
        return torch.stack(self.found, 1)


def append_magnets(tokens: Sequence[str], magnets: Sequence[str] = MAGNETS) -> tuple[list[str], Bool[Tensor, "t"]]:
    """The tokens and the magnets after them, and which to keep: no function word, no <special> one, no magnet."""
    keep = [token.lower() not in STOPS and not token.startswith("<") for token in tokens]
    return [*tokens, *magnets], torch.tensor([*keep, *(False for _ in magnets)], dtype=torch.bool)


def sink_words(
    maps: Float[Tensor, "*b l h n t"], share: float | int = 0.4, spread: float | int = 0.3
) -> Bool[Tensor, "*b l t"]:
    """Words that take `share` of the attention of a layer or more, and vary over pixels by `spread` of it at most."""
    of_layer = maps.mean(-3)
    mean = of_layer.mean(-2)
    return (mean >= share) & (of_layer.std(-2, correction=0) <= spread * mean)


def renormalised(maps: Float[Tensor, "*s n t"], keep: Bool[Tensor, "t"]) -> Float[Tensor, "*s n t"]:
    """What pixels would give to these words if there were no others; 0 to the others."""
    kept = maps * keep
    return kept / kept.sum(-1, keepdim=True).clamp(min=torch.finfo(maps.dtype).tiny)


def redirected(
    maps: Float[Tensor, "*b l h n t"], sinks: Bool[Tensor, "*b l t"], to: Bool[Tensor, "t"]
) -> Float[Tensor, "*b l h n t"]:
    """What every pixel gives to a sink, given in equal parts to the words `to`, who are none themselves; rows keep
    their sums."""
    if not bool(to.any()):
        raise ChronotopeError("there is no word to take what goes to sinks: append magnets.")
    flat = maps.amin(-2, keepdim=True) * (sinks & ~to)[..., None, None, :]
    return maps - flat + to * flat.sum(-1, keepdim=True) / to.sum()


@paper(
    system=124,
    name="RefAM",
    family="control",
    claim="points at what words refer to by attention to them, function words and sinks dropped, magnets added",
    evidence=["tests/papers/control/test_refam.py"],
    missing="in joint attention, which the paper has, a small model points right in less than half; in cross-attention "
    "in 0.97",
)
@torch.no_grad()
def grounding_map(
    maps: Float[Tensor, "*b l h n t"],
    keep: Bool[Tensor, "t"],
    size: tuple[int, ...],
    sinks: Sinks = "suppress",
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "*b ..."]:
    """The heat of a picture, size (h, w), or clip, (t, h, w).

    Args:
        maps: weights of pixels to words, as `WordMaps` keeps them.
        keep: the words that count.
        size: of the grid of pixels.
        sinks: words that all pixels look at are left out of the mean of their layer ("suppress"), or lose what all
            pixels give them ("redirect"), or stay ("leave").
        layers: numbers of those that count, among those in `maps`; default: all.
    """
    if math.prod(size) != maps.shape[-2] or keep.shape[0] != maps.shape[-1] or not bool(keep.any()):
        raise ChronotopeError(
            f"maps of {maps.shape[-2]} pixels and {maps.shape[-1]} words with size={size} and keep {keep.tolist()}; "
            "expected as many pixels as the size has, and a word to keep."
        )
    if layers is not None:
        maps = maps[..., list(layers), :, :, :]
    found = sink_words(maps)
    used = keep.expand_as(found)
    if sinks == "suppress":
        used = used & ~found
        if not bool(used.flatten(-2).any(-1).all()):
            raise ChronotopeError('every word to keep is a sink in every layer: ask for sinks="redirect".')
    if sinks == "redirect":
        maps = redirected(maps, found, ~keep)
    of_layer = maps.mean(-3) * used[..., None, :]
    return (of_layer.sum((-3, -1)) / used.sum((-2, -1))[..., None]).unflatten(-1, size)


def top_points(heat: Float[Tensor, "..."], count: int = 1, apart: int = 1) -> Int64[Tensor, "count axes"]:
    """The highest points, highest first, none within `apart` pixels of another on every axis."""
    left, found = heat.clone(), []
    for _ in range(count):
        point = torch.stack(torch.unravel_index(left.argmax(), heat.shape))
        if left[tuple(point)] == -torch.inf:
            raise ChronotopeError(f"{count} points that are {apart} apart have no room on {list(heat.shape)}.")
        found.append(point)
        left[tuple(slice(max(0, x - apart), x + apart + 1) for x in point.tolist())] = -torch.inf
    return torch.stack(found)


def key_frames(heat: Float[Tensor, "t h w"], count: int = 1) -> Int64[Tensor, "count"]:
    """The frames whose highest points are highest, in order of time."""
    return heat.flatten(1).amax(1).topk(count).indices.sort().values
