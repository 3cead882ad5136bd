"""ColorMNet: a video is coloured from one coloured frame, by what a memory of frames and the last of them say.

A grey frame x gives features, and from these keys q, selections e in (0, 1) and shrinkages s >= 1 at every place. With
`FeatureMemory` (long range) and attention to the last stored frame within |dy|, |dx| <= 7 (short range),

    read = memory(q, e) + W_o conv5x5(sum_j softmax_j(q_i . k_j / sqrt(C) + (W_r q_i)[place_j - place_i]) v_j)
    hidden, ab = decoder(features, read, hidden),  ab in (-1, 1) by tanh

and every 5 frames what has been coloured is stored: k, s, and the value v of features and colours. The bias depends on
the query, and is still no table over pairs: within a 15 x 15 window every key differs in (y mod 15, x mod 15), so the
225 numbers of a query, in that order, times the one-hot vector of the key's residue, are 225 more channels of q and k.

Sizes: grey [B, 1, H, W] -> ab [B, 2, H, W], features on a map h x w. State: at most `cap` elements and 10 frames of the
memory, the last stored frame, and the hidden map.

    >>> encoder = nn.Sequential(nn.Conv2d(1, 32, 4, 4), nn.ReLU())
    >>> model = ColorMNet(encoder, features=32, key_dim=16, value_dim=32, hidden_dim=8)
    >>> grey, ab = torch.rand(1, 1, 32, 48), torch.zeros(1, 2, 32, 48)
    >>> state = model.begin(grey, ab)
    >>> ab, state = model.step(grey, state)
    >>> ab.shape
    torch.Size([1, 2, 32, 48])

Left out: the encoder (ResNet-50 guided by a frozen DINOv2) is given as a module, and decoder and value encoder are
small ones without skip connections or pretrained weights, so the paper's scores are not shown; dropout; exemplars other
than the first frame. Not a `Mixer`: what is stored of a frame are its colours, which come out of the decoder. The
released code colours a and b as two objects with the same weights, here they are two channels; when its long-term store
is full it drops all elements used as little as the last that must go, here just as many as must.

Paper: Yang, Dong, Tang and Pan 2024, "ColorMNet: A Memory-based Deep Spatial-Temporal Feature Propagation Network for
Video Colorization", arXiv 2404.06251.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.attention import attention
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.papers.memory.colormnet_memory import FeatureMemory, MemoryState
from chronotope.papers.registry import paper
from chronotope.patterns import window


@lru_cache(maxsize=16)
def _residues(h: int, w: int, radius: int) -> tuple[Int[Tensor, "n c"], Int[Tensor, "n"]]:
    """For each place, which offset lies at each residue, and which residue is its own."""
    size = 2 * radius + 1
    down, right = (torch.arange(n) for n in (h, w))
    # Residues that no place of a small map has are left out.
    dy, dx = ((torch.arange(min(size, len(x))) - x[:, None] + radius) % size for x in (down, right))
    offset = dy[:, None, :, None] * size + dx[None, :, None, :]
    own = (down % size)[:, None] * min(size, w) + right % size
    return offset.flatten(2).flatten(0, 1), own.flatten()


def local_attention(
    q: Float[Tensor, "b heads h w d"],
    k: Float[Tensor, "b heads h w d"],
    v: Float[Tensor, "b heads h w dv"],
    rel_bias: Float[Tensor, "b heads h w offsets"] | None = None,
    radius: int = 7,
) -> Float[Tensor, "b heads h w dv"]:
    """Attention of each place to the places of another frame at most `radius` away on each axis.

    `rel_bias`: added to the logits of each query, one number for each offset (dy, dx), row-major from -radius.
    """
    h, w, d = q.shape[2:]
    parts = [x.flatten(2, 3) for x in (q / math.sqrt(d), k, v)]
    if rel_bias is not None:
        if rel_bias.shape[-1] != (2 * radius + 1) ** 2:
            raise ChronotopeError(
                f"rel_bias has {rel_bias.shape[-1]} offsets, radius={radius} {(2 * radius + 1) ** 2}."
            )
        offset, own = (x.to(q.device) for x in _residues(h, w, radius))
        bias = rel_bias.flatten(2, 3)
        parts[0] = torch.cat((parts[0], bias.gather(3, offset.expand(*bias.shape[:3], -1))), 3)
        hot = F.one_hot(own, offset.shape[1]).to(k.dtype)
        parts[1] = torch.cat((parts[1], hot.expand(*parts[1].shape[:3], -1)), 3)
    near = window(h=2 * radius + 1, w=2 * radius + 1)
    return attention(*parts, grid=Grid(h=h, w=w), where=near, scale=1.0).unflatten(2, (h, w))  # type: ignore[misc,union-attr]


class LocalFrameAttention(nn.Module):
    """Local attention to the values of another frame, then a depthwise 5 x 5 convolution and a projection.

    Args:
        key_dim, value_dim: channels of keys and values; multiples of `heads`.
        radius: the largest displacement.
        heads: number of heads.
    """

    def __init__(self, key_dim: int = 64, value_dim: int = 512, radius: int = 7, heads: int = 1):
        super().__init__()
        self.radius, self.heads = radius, heads
        self.bias = nn.Conv2d(key_dim, heads * (2 * radius + 1) ** 2, 1, groups=heads)
        self.mix = nn.Conv2d(value_dim, value_dim, 5, padding=2, groups=value_dim, bias=False)
        self.out = nn.Linear(value_dim, value_dim)

    def forward(
        self, q: Float[Tensor, "b c h w"], k_prev: Float[Tensor, "b c h w"], v_prev: Float[Tensor, "b v h w"]
    ) -> Float[Tensor, "b v h w"]:
        """What the places of a frame find around them in the other one."""
        maps = (q, k_prev, v_prev, self.bias(q))
        q, k, v, bias = (x.unflatten(1, (self.heads, -1)).movedim(2, -1) for x in maps)
        found = local_attention(q, k, v, bias, self.radius).movedim(-1, 2).flatten(1, 2)
        return self.out(self.mix(found).movedim(1, -1)).movedim(-1, 1)  # type: ignore[no-any-return]


class GatedUpdate(nn.Module):
    """h = f h (1 - u) + u tanh(n), with forget gate f, update gate u and new value n from x and h."""

    def __init__(self, channels: int, hidden: int):
        super().__init__()
        self.gates = nn.Conv2d(channels + hidden, 3 * hidden, 3, padding=1)

    def forward(self, x: Float[Tensor, "b c h w"], hidden: Float[Tensor, "b d h w"]) -> Float[Tensor, "b d h w"]:
        """The hidden map after this frame."""
        forget, update, new = self.gates(torch.cat((x, hidden), 1)).chunk(3, 1)
        return forget.sigmoid() * hidden * (1 - update.sigmoid()) + update.sigmoid() * new.tanh()


@dataclass(frozen=True)
class ColorState(Carried):
    """The memory, keys and values of the last stored frame, the hidden map, and frames since the last was stored."""

    memory: MemoryState
    key: Float[Tensor, "b c h w"]
    value: Float[Tensor, "b v h w"]
    hidden: Float[Tensor, "b d h w"]
    since: int


@paper(
    system=19,
    name="ColorMNet",
    family="memory",
    claim="colours a video from one frame, by a bounded memory of frames and the neighbourhood in the last stored one",
    evidence=["tests/papers/memory/test_colormnet.py"],
)
class ColorMNet(nn.Module):
    """Colours a video frame by frame; `memory` may be set to another one, such as `FeatureMemory(top_k=None)` to train.

    Args:
        encoder: grey [B, 1, H, W] -> features [B, features, h, w].
        features: channels of the features.
        key_dim, value_dim, hidden_dim: channels of keys, values, and the hidden map.
        radius: reach of the attention to the last stored frame.
        memory: sizes and policy of the memory.
    """

    def __init__(
        self,
        encoder: nn.Module,
        features: int,
        key_dim: int = 64,
        value_dim: int = 512,
        hidden_dim: int = 64,
        radius: int = 7,
        memory: FeatureMemory | None = None,
    ):
        super().__init__()
        self.encoder, self.memory = encoder, memory or FeatureMemory()
        self.key_dim, self.value_dim, self.hidden_dim = key_dim, value_dim, hidden_dim
        self.to_key, self.to_select, self.to_shrink = (
            nn.Conv2d(features, n, 3, padding=1) for n in (key_dim, key_dim, 1)
        )
        self.to_value = _convolutions(features + 2, value_dim, value_dim)
        self.local = LocalFrameAttention(key_dim, value_dim, radius)
        self.fuse = _convolutions(features + value_dim + hidden_dim, value_dim, value_dim)
        self.after_frame, self.after_write = GatedUpdate(value_dim, hidden_dim), GatedUpdate(value_dim, hidden_dim)
        self.to_ab = _convolutions(value_dim + 1, value_dim, 2)

    def begin(self, grey: Float[Tensor, "b 1 H W"], ab: Float[Tensor, "b 2 H W"]) -> ColorState:
        """The state after the frame whose colours are given."""
        found = self.encoder(grey)
        hidden = found.new_zeros(len(found), self.hidden_dim, *found.shape[2:])
        tokens = found.shape[2:].numel()
        memory = self.memory.init_state(len(found), tokens, self.key_dim, self.value_dim, found)
        return self._stored(found, self.to_key(found), ab, ColorState(memory, hidden, hidden, hidden, 0))

    def step(self, grey: Float[Tensor, "b 1 H W"], state: ColorState) -> tuple[Float[Tensor, "b 2 H W"], ColorState]:
        """The colours of the next frame, and the state after it."""
        found = self.encoder(grey)
        key = self.to_key(found)
        read, memory = self.memory.read(state.memory, _tokens(key), _tokens(self.to_select(found).sigmoid()))
        read = read.mT.unflatten(2, found.shape[2:]) + self.local(key, state.key, state.value)
        fused = self.fuse(torch.cat((found, read, state.hidden), 1))
        whole = F.interpolate(fused, grey.shape[2:], mode="bilinear", align_corners=False)
        ab = self.to_ab(torch.cat((whole, grey), 1)).tanh()
        state = replace(state, memory=memory, since=state.since + 1)
        if state.since >= self.memory.every:
            return ab, self._stored(found, key, ab, state)
        return ab, replace(state, hidden=self.after_frame(fused, state.hidden))

    def forward(self, grey: Float[Tensor, "b t 1 H W"], ab: Float[Tensor, "b 2 H W"]) -> Float[Tensor, "b t 2 H W"]:
        """The colours of all frames, those of the first being given."""
        state, out = self.begin(grey[:, 0], ab), [ab]
        for frame in grey.unbind(1)[1:]:
            colours, state = self.step(frame, state)
            out.append(colours)
        return torch.stack(out, 1)

    def _stored(self, found: Tensor, key: Tensor, ab: Tensor, state: ColorState) -> ColorState:
        small = F.interpolate(ab, found.shape[2:], mode="area")
        value = self.to_value(torch.cat((found, small), 1))
        shrink = self.to_shrink(found).square() + 1
        parts = (_tokens(key), _tokens(shrink)[..., 0], _tokens(value), _tokens(self.to_select(found).sigmoid()))
        return ColorState(self.memory.write(state.memory, *parts), key, value, self.after_write(value, state.hidden), 0)


def _tokens(x: Float[Tensor, "b c h w"]) -> Float[Tensor, "b n c"]:
    return x.flatten(2).mT


def _convolutions(channels: int, middle: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, middle, 3, padding=1), nn.ReLU(), nn.Conv2d(middle, out, 3, padding=1))
