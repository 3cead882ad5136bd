r"""OmniTokenizer: pictures and clips become latents of one model, each frame by itself, then each place over its past.

$$
x \leftarrow x + \mathrm{DW}_{3 \times 3 \times 3}(x), \quad
x \leftarrow x + A(\mathrm{LN}(x)), \quad
x \leftarrow x + \mathrm{GEGLU}(\mathrm{LN}(x)), \qquad
A: \mathrm{softmax}_r(8\, (\hat q_p \odot a) \cdot (\hat k_r \odot b) + B_{r - p})\, v_r
$$

$\hat q = q / |q|$; a, b: learned scales. The first frame is cut into 1 x 8 x 8 patches, the others into 4 x 8 x 8; each
goes through LN, a matrix, LN. So a picture is a clip of one frame, and 1 + 4 k frames are 1 + k slices. Encoder: blocks
of letters over the places of a slice, "t" all of them, "w" windows of 8 x 8 with a table B and plain scaled products;
then blocks over the slices of a place up to its own (B: ALiBi). The decoder is the mirror: time, then space. The
convolution DW, before "t" and time blocks, sees the two slices before its own. Latents: unit codes, or a Gaussian.

With heads of 64 channels, `qk_norm` of `Attention` is that cosine attention: sqrt(64) = 8. For other heads its scale
starts at 8 / sqrt(D).

Sizes: clips [B, 1 + 4 k, 3, H, W] or pictures [B, 3, H, W] -> latents [B, 1 + k, D, h, w]. Pairs: of "t" T (hw)^2,
of "w" T hw 64, of time hw T (T + 1) / 2, where T = 1 + k.

    >>> model = SpaceTimeTokenizer(dim=32, heads=2, enc="tw", dec="t", time_blocks=1, codes=64)
    >>> out = model.encode(torch.rand(1, 9, 3, 32, 48))
    >>> out.latents.shape, out.indices.shape
    (torch.Size([1, 3, 8, 4, 6]), torch.Size([1, 3, 4, 6]))
    >>> model.decode(out.latents).shape
    torch.Size([1, 9, 3, 32, 48])

Departures of the released code (FoundationVision/OmniTokenizer, commit 701b619) from this page: where torch has a fused
attention, which it has since 2.0, the relative and ALiBi biases are computed and not added; the convolution before time
blocks reads tokens in the order h w t as if it were t h w, so that it mixes places and sees the future; keys and values
of cosine attention come from tokens before LN; codes are means of unit vectors, not unit vectors; rotary code comes
before the scales a, b, not after. With keys and values after LN, and no position code, its blocks "ttww" on 3 slices,
its time blocks without convolution on 3 and with it on 1, give what those here give with its weights; the largest
difference is 3e-6 of 4.9.

Not shown: the published FID and FVD, which take ImageNet, UCF-101 and adversarial training.

Left out: LPIPS and the adversarial losses with feature matching; training by stages (pictures; pictures and clips in
turn, of several sizes; KL). `encode(...).loss` is the commitment loss, or 1e-6 KL; the L1 loss is the user's.
`position="relative"` is that of the first stage, "rope" that of the later ones.

Moving shapes, 9 frames of 32 x 32, 600 steps, errors over those of the mean frame: taught on clips, clips 0.19 and
pictures 0.18; on clips and pictures in turn, 0.23 and 0.15. Both use 99% of 256 codes or more, with restarts.

Paper: Junke Wang, Yi Jiang, Zehuan Yuan, Binyue Peng, Zuxuan Wu, Yu-Gang Jiang, "OmniTokenizer: A Joint Image-Video
Tokenizer for Visual Generation", 2024, arXiv 2406.09399. B of "t": Liu et al. 2021, "Swin Transformer V2", 2111.09883.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.func import functional_call

from chronotope.bias import Alibi, Bias, Relative, RelativeBias
from chronotope.carried import Carried
from chronotope.errors import ChronotopeError
from chronotope.grid import Coords, Grid
from chronotope.nn.attention import Attention
from chronotope.nn.block import Block, Stack
from chronotope.nn.chain import Chain
from chronotope.nn.grid_convolution import GridConv
from chronotope.nn.mixer import Mixer, States
from chronotope.nn.patches import PatchEmbed, Unpatch
from chronotope.papers.registry import paper
from chronotope.papers.spacetime.omni_quantisers import Codebook, Gaussian, Latents, Plain
from chronotope.patterns import along, blocks, causal
from chronotope.position import Rope
from chronotope.saving import Saved


class ContinuousBias(Bias):
    """score[h] = MLP_h(s(key - query)) over the offsets on some axes, s(x) = sign(x) log(1 + |x|): for any size."""

    def __init__(self, heads: int, axes: tuple[str, ...] = ("h", "w"), hidden: int = 512):
        super().__init__()
        self.heads, self.axes = heads, axes
        inner = (nn.Linear(len(axes), hidden), nn.LeakyReLU(0.1), nn.Linear(hidden, hidden), nn.LeakyReLU(0.1))
        self.net = nn.Sequential(*inner, nn.Linear(hidden, heads))

    def check(self, axes: tuple[str, ...]) -> None:
        missing = [axis for axis in self.axes if axis not in axes]
        if missing:
            raise ChronotopeError(f"ContinuousBias is over {missing}, but the grid has the axes {list(axes)}.")

    def score(self, q: Coords, k: Coords) -> Float[Tensor, "heads ..."]:
        (table,) = self.relative(dict(self.named_parameters()), q.grid, k.grid)
        index = table.index(q, k)
        return table.table.index_select(1, index.flatten()).view(self.heads, *index.shape)

    def relative(self, state: Mapping[str, Tensor], grid: Grid, key_grid: Grid) -> list[Relative]:
        own = {name.removeprefix("net."): x for name, x in state.items() if name.startswith("net.")}
        reach, like = {axis: key_grid.sizes[axis] - 1 for axis in self.axes}, own["0.weight"]
        far = [torch.arange(-n, n + 1, dtype=like.dtype, device=like.device) for n in reach.values()]
        offsets = torch.stack(torch.meshgrid(*far, indexing="ij"), -1).flatten(0, -2)
        return [Relative(reach, functional_call(self.net, own, (offsets.sign() * offsets.abs().log1p(),)).T)]


def cosine_attention(dim: int, heads: int, **options: Any) -> Attention:
    """Attention by 8 cos(q, k), with learned scales; options as of `Attention`."""
    layer = Attention(dim, heads, qk_norm=True, **options)
    assert layer.q_norm is not None
    nn.init.constant_(layer.q_norm.weight, 8 / layer.head_dim**0.5)
    return layer


def _peg(dim: int, causal_t: bool) -> GridConv:
    return GridConv(dim, {"t": 3, "h": 3, "w": 3}, causal="t" if causal_t else (), residual=True)


def spatial_blocks(
    letters: str, dim: int, heads: int, window: int = 8, position: str = "rope", causal_t: bool = True
) -> list[Mixer]:
    """Blocks within frames of Grid(t, h, w): "t", all places of a frame behind a convolution; "w", windows."""
    if not set(letters) <= set("tw"):
        raise ChronotopeError(f"blocks {letters!r}: expected the letters t (all of a frame) and w (windows).")
    if position not in ("rope", "relative", "none"):
        raise ChronotopeError(f"position={position!r}: expected rope, relative or none.")
    made: list[Mixer] = []
    for letter in letters:
        if letter == "w":
            where = along("h", "w") & blocks(h=window, w=window)
            table = RelativeBias(heads, h=window - 1, w=window - 1)
            nn.init.trunc_normal_(table.table, std=0.02)
            made.append(Block([Attention(dim, heads, where=where, bias=table)], mlp="geglu"))
            continue
        rope = Rope(("h", "w")) if position == "rope" else None
        bias = ContinuousBias(heads, hidden=dim) if position == "relative" else None
        made.append(_peg(dim, causal_t))
        seen = cosine_attention(dim, heads, where=along("h", "w"), position=rope, bias=bias)
        made.append(Block([seen], mlp="geglu"))
    return made


def temporal_blocks(count: int, dim: int, heads: int, causal_t: bool = True) -> list[Mixer]:
    """Blocks over the slices of each place of Grid(t, h, w), behind a convolution."""
    made: list[Mixer] = []
    for _ in range(count):
        where = along("t") & causal("t") if causal_t else along("t")
        made += [
            _peg(dim, causal_t),
            Block([cosine_attention(dim, heads, where=where, bias=Alibi(heads, "t"))], mlp="geglu"),
        ]
    return made


@dataclass(frozen=True)
class StreamState(Carried):
    """What the encoder or the decoder keeps of the slices before, and how many they were."""

    inner: States
    slices: int


@paper(
    system=159,
    name="OmniTokenizer",
    family="spacetime",
    claim="pictures and clips to latents with one model: windows in frames, causal in time, group by group",
    evidence=["tests/papers/spacetime/test_omni_tokenizer.py"],
)
class SpaceTimeTokenizer(Saved):
    """Latents of clips [B, 1 + k pt, C, H, W] or pictures [B, C, H, W], and the way back.

    Args:
        patch: (pt, ph, pw); channels: of a frame.
        dim, heads: of all blocks.
        enc, dec: a letter for each block over space, "t" or "w"; time_blocks: over time, in each of the two.
        window: side of the windows, in tokens.
        position: of "t": "rope", "relative" or "none".
        causal_t: whether no slice sees later ones.
        first_frame_patch: whether the first frame is a slice by itself; else clips are [B, k pt, C, H, W].
        quantiser: "vq", codes of `latent` channels; "kl", a Gaussian; "none", neither.
        codes: how many.
    """

    def __init__(
        self,
        patch: Sequence[int] = (4, 8, 8),
        channels: int = 3,
        dim: int = 512,
        heads: int = 8,
        enc: str = "ttww",
        dec: str = "tttt",
        time_blocks: int = 4,
        window: int = 8,
        position: str = "rope",
        causal_t: bool = True,
        first_frame_patch: bool = True,
        quantiser: str = "vq",
        codes: int = 8192,
        latent: int = 8,
    ):
        super().__init__()
        if quantiser not in ("vq", "kl", "none"):
            raise ChronotopeError(f"quantiser={quantiser!r}: expected vq, kl or none.")
        pt, ph, pw = patch
        self.size, self.first_frame_patch = (pt, ph, pw), first_frame_patch
        self.embed, self.leave = PatchEmbed(dim, self.size, channels, norm=True), Unpatch(dim, self.size, channels)
        if first_frame_patch:
            self.embed_first = PatchEmbed(dim, (1, ph, pw), channels, norm=True)
            self.leave_first = Unpatch(dim, (1, ph, pw), channels)
        space = {"window": window, "position": position, "causal_t": causal_t}
        over = [Stack(temporal_blocks(time_blocks, dim, heads, causal_t), dim) for _ in range(2)]
        self.encoder = Chain([Stack(spatial_blocks(enc, dim, heads, **space), dim), over[0]])  # type: ignore[arg-type]
        self.decoder = Chain([over[1], Stack(spatial_blocks(dec, dim, heads, **space), dim)])  # type: ignore[arg-type]
        self.enter = nn.Linear(dim, latent * (2 if quantiser == "kl" else 1))
        self.back = nn.Linear(latent, dim)
        self.quantiser: nn.Module = Plain() if quantiser == "none" else Gaussian()
        if quantiser == "vq":
            self.quantiser = Codebook(codes, latent)

    def forward(self, x: Float[Tensor, "b *rest"]) -> tuple[Float[Tensor, "b *rest"], Latents]:
        """The reconstruction, of the shape of x, and what it is made from."""
        coded = self.encode(x)
        return self.decode(coded.latents).view(x.shape), coded

    def encode(self, x: Float[Tensor, "b *rest"]) -> Latents:
        """latents [B, 1 + k, D, h, w], indices [B, 1 + k, h, w] or None, and the loss to add."""
        x = x[:, None] if x.ndim == 4 else x
        parts, first = [], int(self.first_frame_patch)
        if first:
            parts.append(self.embed_first(x[:, :1]))
        if x.shape[1] > first:
            parts.append(self.embed(x[:, first:]))
        if not parts:
            raise ChronotopeError(f"clips of shape {list(x.shape)}: no frames.")
        grid = parts[-1][1].replace(t=sum(each.sizes["t"] for _, each in parts))
        return self._coded(self.encoder(torch.cat([tokens for tokens, _ in parts], 1), grid), grid)

    def decode(self, latents: Float[Tensor, "b t d h w"]) -> Float[Tensor, "b frames c height width"]:
        """Clips of latents."""
        x, grid = self._entered(latents)
        x = self.decoder(x, grid)
        first = grid.size // grid.sizes["t"] if self.first_frame_patch else 0
        parts = [self.leave_first(x[:, :first], grid.replace(t=1))] if first else []
        if x.shape[1] > first:
            parts.append(self.leave(x[:, first:], grid.replace(t=(x.shape[1] - first) * grid.sizes["t"] // grid.size)))
        return torch.cat(parts, 1)

    def lookup(self, indices: Int64[Tensor, "b t h w"]) -> Float[Tensor, "b t d h w"]:
        """Latents of indices of codes."""
        if not isinstance(self.quantiser, Codebook):
            raise ChronotopeError("lookup: this model has no codes; it takes quantiser='vq'.")
        return self.quantiser.codes[indices].movedim(4, 2)

    def init_state(self, batch: int, grid: Grid, part: Literal["encoder", "decoder"] = "encoder") -> StreamState:
        """Before the first slice; grid: of one slice. Raises ChronotopeError where time is not causal."""
        coder = self.encoder if part == "encoder" else self.decoder
        return StreamState(coder.init_state(batch, grid), 0)

    def encode_step(
        self, frames: Float[Tensor, "b frames c height width"], state: StreamState
    ) -> tuple[Latents, StreamState]:
        """The next slice: the first frame, or the next pt ones."""
        tokens, grid = (self.embed_first if self._alone(state) else self.embed)(frames)
        x, inner = self.encoder.step(tokens, state.inner)
        return self._coded(x, grid), StreamState(inner, state.slices + 1)

    def decode_step(
        self, latents: Float[Tensor, "b 1 d h w"], state: StreamState
    ) -> tuple[Float[Tensor, "b frames c height width"], StreamState]:
        """The frames of the next slice."""
        x, grid = self._entered(latents)
        x, inner = self.decoder.step(x, state.inner)
        frames = (self.leave_first if self._alone(state) else self.leave)(x, grid)
        return frames, StreamState(inner, state.slices + 1)

    def _alone(self, state: StreamState) -> bool:
        return self.first_frame_patch and state.slices == 0

    def _coded(self, x: Float[Tensor, "b n dim"], grid: Grid) -> Latents:
        latents, indices, loss = self.quantiser(self.enter(x))
        latents = latents.unflatten(1, grid.shape).movedim(4, 2)
        return Latents(latents, None if indices is None else indices.unflatten(1, grid.shape), loss)

    def _entered(self, latents: Float[Tensor, "b t d h w"]) -> tuple[Float[Tensor, "b n dim"], Grid]:
        t, h, w = (latents.shape[axis] for axis in (1, 3, 4))
        return self.back(latents.movedim(2, 4).flatten(1, 3)), Grid(t=t, h=h, w=w)
