r"""SpecDETR: objects of a pixel or less in hyperspectral cubes; pixels are tokens that read fixed places.

Each of H heads has 4 places at one distance, even heads on the axes and odd heads on the diagonals,

$$
o_h = \Big(\Big\lfloor \frac h2 \Big\rfloor + 1\Big) \cdot
\begin{cases} (0, \pm 1), (\pm 1, 0) & h \text{ even} \\ (\pm 1, \pm 1) & h \text{ odd} \end{cases}
\qquad
y_i = W_o \Big[\sum_p \mathrm{softmax}(W_a q_i)_{hp}\; (W_v x)(i + o_{hp})_h\Big]_h
$$

with 8 heads 32 places at radii 1, 1, 2, 2, 3, 3, 4, 4; beyond the border are zeros. Layers are
$x = \mathrm{LN}(x + y)$, $x = \mathrm{LN}(x + \mathrm{MLP}(x))$. Every token scores the classes and proposes a box; the
Q best are queries of a decoder that refines boxes by what it reads in them, $c + s / 4 + o_{hp} / 4 \cdot s / 2$ for
centre c and size s. Matching is one to many: after one query for each object come those whose boxes nearly are it.

Sizes: cubes [B, bands, h, w] -> logits [stages, B, Q, classes], boxes [stages, B, Q, 4]. 4 H h w values are read.

    >>> model = SpecDETR(bands=20, classes=2, dim=32, layers=2, decoders=1, queries=10)
    >>> logits, boxes = model(torch.randn(1, 20, 16, 12))
    >>> logits.shape, boxes.shape
    (torch.Size([2, 1, 10, 2]), torch.Size([2, 1, 10, 4]))

Who reads whom is a pattern, `same_distance(heads)` beside the attention, for `ct.plan` and `ct.draw`. What is computed
is attention under that pattern with scores that know the place of a key and not what it holds; but places beyond the
border keep their weight here.

Left out: self-excitation, whose formula is unconfirmed; the global token (in the released code the mean of all pixels,
a second level of one token); the contrastive queries of the training, SPOD and real scenes. Unconfirmed: numbers of
queries and positives (900 and up to 10 in the released settings), loss weights (here the released 1, 5, 2). Those
settings learn the offsets, from rays; the fixed pattern is an option of its attention. It matches in Hungarian rounds,
here greedy ones, and teaches the Q best proposals, here all. Streaming: cubes have no time.

Shown on synthetic cubes of 32 x 32 pixels and 20 bands with 3 targets of one pixel at abundance 0.3, of 2 spectra (3
layers, 3 decoders, 800 steps of 4 cubes): AP50 0.92 and 0.86; at 0.1 false alarms a cube 0.83 of the targets are found,
by a matched filter 0.19.

Checked beside the released code (ZhaoxuLi123/SpecDETR, commit 233b3b3; its attention with the fixed pattern, by its
plain sampling operator, in float64 on our weights, grids of 5 x 16 to 12 x 12): outputs of up to 8.2 differ by 1.1e-14
at most for pixels, and not at all within boxes.

Paper: Zhaoxu Li, Wei An, Gaowei Guo, Longguang Wang, Yingqian Wang, Zaiping Lin, "SpecDETR: A Transformer-based
Hyperspectral Point Object Detection Network", 2024, arXiv 2405.10148.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import FeedForward, Sinusoidal
from chronotope.papers.model.specdetr_attention import FixedOffsetAttention
from chronotope.papers.model.specdetr_matching import focal, one_to_many, overlap
from chronotope.papers.registry import paper

Stage = tuple[Tensor, Tensor]


class Layer(nn.Module):
    """LN(x + attention), LN(x + MLP(x)): of tokens over tokens, or of queries over tokens within boxes."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float | int):
        super().__init__()
        self.look = FixedOffsetAttention(dim, heads)
        self.mlp = FeedForward(dim, "gelu", mlp_ratio, biases=True)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(
        self,
        q: Float[Tensor, "b q c"],
        place: Float[Tensor, "b q c"],
        x: Float[Tensor, "b n c"],
        grid: Grid,
        boxes: Float[Tensor, "b q 4"] | None = None,
    ) -> Float[Tensor, "b q c"]:
        """q with what it saw, its place being known to the weights. Without boxes q are the tokens x."""
        asked = q + place
        seen = self.look(x, grid, query=asked) if boxes is None else self.look.over(asked, x, grid, boxes)
        q = self.norms[0](q + seen)
        return self.norms[1](q + self.mlp(q))  # type: ignore[no-any-return]


@paper(
    system=180,
    name="SpecDETR",
    family="model",
    claim="pixels as tokens that read fixed places around them, 4 per head at one distance; boxes below a pixel",
    evidence=["tests/papers/model/test_specdetr.py"],
)
class SpecDETR(nn.Module):
    """The detector.

    Args:
        bands, classes: of cubes, of objects.
        dim, heads, mlp_ratio: of all layers.
        layers, decoders: of the encoder, of the decoder.
        queries: Q, at most as many as there are pixels.
        extent: width and height of a proposal before it is learned, in pixels.
        positives: queries of one object in training, at most.
    """

    def __init__(
        self,
        bands: int,
        classes: int,
        dim: int = 256,
        heads: int = 8,
        layers: int = 6,
        decoders: int = 6,
        queries: int = 900,
        extent: float = 1.28,
        positives: int = 10,
        mlp_ratio: float | int = 8,
    ):
        super().__init__()
        self.queries, self.extent, self.positives = queries, extent, positives
        self.enter, self.code = nn.Sequential(nn.Linear(bands, dim), nn.LayerNorm(dim)), Sinusoidal(dim, ("h", "w"))
        self.layers = nn.ModuleList(Layer(dim, heads, mlp_ratio) for _ in range(layers))
        self.propose = nn.Sequential(nn.Linear(dim, dim), nn.LayerNorm(dim))
        self.decoders = nn.ModuleList(Layer(dim, heads, mlp_ratio) for _ in range(decoders))
        self.box_code, self.ask = Sinusoidal(dim, ("x", "y", "w", "h"), base=20.0), FeedForward(dim, "gelu", 1)
        self.label = nn.ModuleList(_label(dim, classes) for _ in range(decoders + 1))
        self.box = nn.ModuleList(_box(dim) for _ in range(decoders + 1))

    def forward(
        self, cubes: Float[Tensor, "b bands h w"]
    ) -> tuple[Float[Tensor, "stages b q classes"], Float[Tensor, "stages b q 4"]]:
        """Logits and boxes (centre across and down, width, height, in shares) of the proposals and of each decoder."""
        (logits, boxes), best, decoded = self._stages(cubes)
        stages = [(_picked(logits, best), _picked(boxes, best)), *decoded]
        return torch.stack([a for a, _ in stages]), torch.stack([b for _, b in stages])

    def _stages(self, cubes: Tensor) -> tuple[Stage, Tensor, list[Stage]]:
        """What every pixel proposes, which of them are queries, and what each decoder says."""
        grid = Grid(h=cubes.shape[2], w=cubes.shape[3])
        if self.queries > grid.size:
            raise ChronotopeError(f"SpecDETR: queries={self.queries}, but {grid!r} has {grid.size} pixels; give fewer.")
        x = self.enter(cubes.flatten(2).transpose(1, 2))
        place = self.code(torch.zeros_like(x), grid)
        for layer in self.layers:
            x = layer(x, place, x, grid)
        said, size = self.propose(x), x.new_tensor(grid.shape[::-1])
        centre = (grid.coords(x.device).to(x) + 0.5).flip(1) / size
        start = torch.cat((centre, (self.extent / size).expand_as(centre)), 1)
        proposed = self.label[0](said), torch.sigmoid(self.box[0](said) + start.logit(1e-3))
        best = proposed[0].amax(2).topk(self.queries, 1).indices
        boxes, decoded = _picked(proposed[1], best), []
        q = torch.ones_like(x[:, : self.queries])
        for layer, label, box in zip(self.decoders, self.label[1:], self.box[1:], strict=True):
            before = boxes.detach()
            code = self.box_code(torch.zeros_like(q), Grid(n=self.queries), coords=before * 2 * torch.pi)
            q = layer(q, self.ask(code), x, grid, before)
            boxes = torch.sigmoid(box(q) + before.logit(1e-3))
            decoded.append((label(q), boxes))
        return proposed, best, decoded

    def loss(
        self,
        cubes: Float[Tensor, "b bands h w"],
        labels: Sequence[Int64[Tensor, "_"]],
        boxes: Sequence[Float[Tensor, "_ 4"]],
    ) -> Float[Tensor, ""]:
        """Focal loss of labels, 5 times L1 and 2 times GIoU of boxes that are matched; the sum over all stages.

        Of the proposals those of all pixels are taught, as in Deformable DETR.
        """
        total = cubes.new_zeros(())
        proposed, _, decoded = self._stages(cubes)
        for logits, found in (proposed, *decoded):
            for said, at, label, box in zip(logits, found, labels, boxes, strict=True):
                whose = self._match(said.detach(), at.detach(), label, box)
                own, target = whose >= 0, torch.zeros_like(said)
                target[own, label[whose[own]]] = 1
                parts = focal(said, target).sum()
                wanted = box[whose[own]]
                parts = parts + 5 * (at[own] - wanted).abs().sum() + 2 * (1 - overlap(at[own], wanted)[1]).sum()
                total = total + parts / max(1, int(own.sum()))
        return total / len(cubes)

    def _match(self, logits: Tensor, found: Tensor, label: Tensor, box: Tensor) -> Tensor:
        share, whole = overlap(found[:, None], box)
        p = focal(logits, torch.ones_like(logits)) - focal(logits, torch.zeros_like(logits))
        cost = 2 * p[:, label] + 5 * torch.cdist(found, box, p=1) - 2 * whole
        return one_to_many(cost, share, self.positives)

    @torch.no_grad()
    def detect(self, cubes: Float[Tensor, "b bands h w"]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Scores, labels and boxes of each cube, best first; of boxes that overlap by more than 0.01 the best."""
        logits, boxes = self(cubes)
        out = []
        for said, box in zip(logits[-1].sigmoid(), boxes[-1], strict=True):
            score, label = said.max(1)
            order = score.argsort(descending=True)
            score, label, box = score[order], label[order], box[order]
            beside = (overlap(box[:, None], box)[0] > 0.01).triu(1)
            kept = torch.ones_like(score, dtype=torch.bool)
            for i in range(len(kept)):
                if kept[i]:
                    kept &= ~beside[i]
            out.append((score[kept], label[kept], box[kept]))
        return out


def _picked(x: Tensor, index: Tensor) -> Tensor:
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))


def _label(dim: int, classes: int) -> nn.Linear:
    head = nn.Linear(dim, classes)
    nn.init.constant_(head.bias, -4.6)  # one query in a hundred is an object
    return head


def _box(dim: int) -> nn.Sequential:
    last = nn.Linear(dim, 4)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), last)
