r"""EgoPoseFormer: joints in space, guessed from whole views and refined where cameras would see them.

The first stage takes the mean features of V views to J joints $\hat p$. In the second, joint j is a query, made of
$(j / J, \hat p_j)$ and refined by layers of deformable stereo attention, attention among joints and a feed-forward,

$$
y_v = \big[W_o \sum_k \mathrm{softmax}(W_a q)_{hk}\, W_v F_v(\pi_v(\hat p) + (W_\delta q)_{hk})_h\big]
      \cdot 1[\pi_v(\hat p) \text{ in the image}], \qquad
q = \mathrm{LN}(q + W [y_1 .. y_V]),
$$

K = 16 places of each head around the anchor, the projection of the guess into the view; offsets are in tokens, at first
on rays: head h at angle $2 \pi h / H$, its k-th place k + 1 tokens away. Every layer says
$p = \hat p + \mathrm{MLP}(\mathrm{LN}\, q)$ and is taught like the guess, by 0.1 times the mean distance of joints. No
gradient reaches $\hat p$ through the second stage.

Sizes: q [B, J, C], features [B, V, C, h, w], anchors [B, V, J, 2] -> [B, J, C]. J V H K places are read for any h, w.

    >>> attend = StereoAttention(32, heads=4, views=2)
    >>> features, anchors = torch.randn(1, 2, 32, 16, 16), torch.rand(1, 2, 16, 2)
    >>> attend(torch.randn(1, 16, 32), features, anchors, torch.ones(1, 2, 16, dtype=torch.bool)).shape
    torch.Size([1, 16, 32])

Cameras are functions of joints: `fisheye`, or others (joints -> anchors, valid). views=1 is the monocular case.

Left out: ResNet-18 with its neck and its training on heatmaps, for which any module of images stands; UnrealEgo,
SceneEgo. Streaming: frame by frame; nothing is carried over.

Shown on two synthetic pinhole views of 16 coloured joints, a part of one of which is covered (600 steps of 16): mean
distance 0.372 of the guess, 0.212 after the second stage, 0.253 with one view.

Checked beside the released code (ChenhongyiYang/egoposeformer, commit e4fb005; its layer, with the plain form of its
sampling operator, in float64 on our weights, 5 draws; and its camera): outputs of up to 1.1 differ by 1.3e-15 at most,
anchors of the camera not at all.
Its rays are as long by their longer axis, ours by their length, which is the same for 4 heads.

Paper: Chenhongyi Yang, Anastasia Tkach, Shreyas Hampali, Linguang Zhang, Elliot J. Crowley, Cem Keskin,
"EgoPoseFormer: A Simple Baseline for Stereo Egocentric 3D Human Pose Estimation", 2024, arXiv 2403.18080.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.nn import Attention, FeedForward, SampledAttention
from chronotope.papers.registry import paper

Camera = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Joints [B, J, 3] -> anchors [B, V, J, 2], across and down from 0 to 1, and which of them are in the image."""


def fisheye(
    coefficients: Sequence[float], origins: Float[Tensor, "v 3"], centre: tuple[float, float] = (0.5, 0.5)
) -> Camera:
    """Cameras that look along -z: distance from the centre is a polynomial of the angle above the plane of the image.

    coefficients: lowest order first, for lengths in images; origins: what each view adds to joints.
    """

    def project(joints: Tensor) -> tuple[Tensor, Tensor]:
        x, y, z = (joints[:, None] + origins.to(joints)[:, None]).unbind(-1)
        away = (x.square() + y.square()).sqrt().clamp(min=1e-12)
        angle = torch.atan(-z / away)
        far = sum(a * angle**i for i, a in enumerate(coefficients))
        return seen(torch.stack((x / away * far + centre[0], y / away * far + centre[1]), -1))

    return project


def seen(anchors: Float[Tensor, "b v j 2"]) -> tuple[Float[Tensor, "b v j 2"], Bool[Tensor, "b v j"]]:
    """Anchors moved to the border if they are outside, and which are inside."""
    return anchors.clamp(0, 1), ((anchors > 0) & (anchors < 1)).all(-1)


class StereoAttention(nn.Module):
    """Each joint reads every view around its anchor; what the views say is joined by one matrix."""

    def __init__(self, dim: int, heads: int = 4, views: int = 2, points: int = 16):
        super().__init__()
        self.views = views
        self.read = SampledAttention(dim, heads, points)
        self.offsets = nn.Linear(dim, heads * points * 2)
        self.fuse = nn.Linear(views * dim, dim)
        nn.init.zeros_(self.offsets.weight)
        angle = 2 * torch.pi / heads * torch.arange(heads)
        rays = torch.stack((angle.sin(), angle.cos()), -1)[:, None] * torch.arange(1, points + 1)[:, None]
        with torch.no_grad():
            self.offsets.bias.copy_(rays.flatten())

    def forward(
        self,
        q: Float[Tensor, "b j c"],
        features: Float[Tensor, "b v c h w"],
        anchors: Float[Tensor, "b v j 2"],
        valid: Bool[Tensor, "b v j"],
    ) -> Float[Tensor, "b j c"]:
        """What the joints read; a view in which a joint is not valid gives zeros."""
        batch, views, _, h, w = features.shape
        if views != self.views:
            raise ChronotopeError(f"StereoAttention: {views} views; expected {self.views}.")
        grid, points = Grid(h=h, w=w), self.read.points
        # A token lies at its centre: half a token from the border.
        at = anchors.detach().flip(-1) * anchors.new_tensor((h, w)) - 0.5
        offsets = self.offsets(q).unflatten(2, (self.read.heads, points, 2))
        places = (at[:, :, :, None, None] + offsets[:, None]).flatten(0, 1)
        queries = q[:, None].expand(-1, views, -1, -1).flatten(0, 1)
        said = self.read(queries, features.flatten(3).flatten(0, 1).transpose(1, 2), grid, places)
        said = said.unflatten(0, (batch, views)).masked_fill(~valid[..., None], 0.0)
        return self.fuse(said.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class RefinementLayer(nn.Module):
    """Stereo attention, attention among joints, feed-forward; each added, then normed."""

    def __init__(self, dim: int, heads: int = 4, views: int = 2, points: int = 16, mlp_ratio: float | int = 4):
        super().__init__()
        self.look = StereoAttention(dim, heads, views, points)
        self.among = Attention(dim, heads, biases=True)
        self.mlp = FeedForward(dim, "gelu", mlp_ratio, biases=True)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self,
        q: Float[Tensor, "b j c"],
        features: Float[Tensor, "b v c h w"],
        anchors: Float[Tensor, "b v j 2"],
        valid: Bool[Tensor, "b v j"],
    ) -> Float[Tensor, "b j c"]:
        """The queries, refined."""
        q = self.norms[0](q + self.look(q, features, anchors, valid))
        q = self.norms[1](q + self.among(q, Grid(v=q.shape[1])))
        return self.norms[2](q + self.mlp(q))  # type: ignore[no-any-return]


@paper(
    system=178,
    name="EgoPoseFormer",
    family="model",
    claim="joints guessed from pooled views, then refined by reading each view around the projected guess",
    evidence=["tests/papers/model/test_egoposeformer.py"],
)
class EgoPoseFormer(nn.Module):
    """Joints of a pose from V views.

    Args:
        encoder: images [B, 3, H, W] -> features [B, dim, h, w].
        camera: where joints are in the views.
        dim, joints, views, heads, points, layers: C, J, V, H, K, and layers of the second stage.
        hidden: width of the two hidden layers of the first stage.
    """

    def __init__(
        self,
        encoder: nn.Module,
        camera: Camera,
        dim: int = 128,
        joints: int = 16,
        views: int = 2,
        heads: int = 4,
        points: int = 16,
        layers: int = 3,
        hidden: int = 1024,
    ):
        super().__init__()
        self.encoder, self.camera, self.joints = encoder, camera, joints
        self.guess = nn.Sequential(
            nn.Linear(views * dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, 3 * joints),
        )  # fmt: skip
        self.ask = nn.Sequential(
            nn.Linear(4, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim)
        )  # fmt: skip
        self.layers = nn.ModuleList(RefinementLayer(dim, heads, views, points) for _ in range(layers))
        self.say = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, 3)) for _ in range(layers)
        )

    def forward(self, images: Float[Tensor, "b v 3 height width"]) -> Float[Tensor, "stages b j 3"]:
        """The guess, then what each layer makes of it."""
        features = self.encoder(images.flatten(0, 1)).unflatten(0, images.shape[:2])
        guess = self.guess(features.mean((3, 4)).flatten(1)).unflatten(1, (self.joints, 3))
        start = guess.detach()
        anchors, valid = self.camera(start)
        index = torch.arange(1, self.joints + 1, device=start.device).to(start) / self.joints
        q = self.ask(torch.cat((index[None, :, None].expand(len(start), -1, -1), start), 2))
        stages = [guess]
        for layer, say in zip(self.layers, self.say, strict=True):
            q = layer(q, features, anchors, valid)
            stages.append(start + say(q))
        return torch.stack(stages)

    def loss(self, images: Float[Tensor, "b v 3 height width"], pose: Float[Tensor, "b j 3"]) -> Float[Tensor, ""]:
        """0.1 times the mean distance of joints, summed over the guess and the layers."""
        return 0.1 * distance(self(images), pose).sum()


def distance(found: Float[Tensor, "*s b j 3"], pose: Float[Tensor, "b j 3"]) -> Float[Tensor, "*s"]:
    """Mean distance of joints (MPJPE)."""
    return (found - pose).norm(dim=-1).mean((-2, -1))
