"""Parts of Ouroboros-Diffusion that follow a subject through frames: its tokens as keys of others, its mean features.

`SubjectAttention` lets every frame of a segment see, besides itself, the subject's tokens of the others:

    K_f = [K_f, K_g[M_g] for the other frames g of its segment], and so V

`Recurrence` draws the features of noisy frames to those that clean ones had:

    bank <- momentum bank + (1 - momentum) mean of f_head,      z <- z - scale d/dz mean |f_tail - bank|^2

where f [B, T, D] is the mean of a layer's output over the subject's tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from chronotope.adapt.asked import Asked
from chronotope.adapt.attach import Layers
from chronotope.adapt.control import At, Control, control
from chronotope.adapt.masks import read_mask
from chronotope.errors import ChronotopeError
from chronotope.papers.control.maps import sides


class SubjectAttention(Control):
    """For layers in which frames attend to themselves, rows [B T]: keys are N own ones and those of the subject.

    Args:
        masks: [B, T, h, w], True on the subject; layers of fewer tokens have it where any of theirs has.
        segment: frames that follow each other and share; the last segment may be shorter.
    """

    def __init__(self, masks: Bool[Tensor, "b t h w"], segment: int):
        if segment < 1:
            raise ChronotopeError(f"segment={segment}: expected 1 frame or more.")
        self.masks, self.segment = masks, segment

    def asks(self, at: At, asked: Asked) -> Asked:
        """As many keys more as the fullest segment has; others hide what is left over."""
        shown = self._shown(at, asked)
        if not bool(shown.any()):
            return asked
        # Those that are shown come first, in order.
        chosen = shown.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)[..., : int(shown.sum(-1).max())]
        seen = shown.gather(-1, chosen).flatten(0, 1)[:, None, None]
        start = torch.arange(shown.shape[1], device=shown.device) // self.segment * self.segment
        per_frame, frames = asked.k.shape[2], shown.shape[1]
        index = (chosen + start[:, None] * per_frame).clamp(max=frames * per_frame - 1)
        k, v = (torch.cat((x, _gathered(x, index)), 2) for x in (asked.k, asked.v))
        own = asked.k.new_zeros(1) if asked.mask is None else read_mask(asked.mask, asked.q.dtype).own
        own = own.expand(len(seen), own.shape[1] if own.ndim == 4 else 1, asked.q.shape[2], per_frame)
        more = torch.zeros_like(seen, dtype=own.dtype).masked_fill(~seen, -torch.inf)
        return asked.but(k=k, v=v, mask=torch.cat((own, more.expand(*own.shape[:3], -1)), -1))

    def _shown(self, at: At, asked: Asked) -> Bool[Tensor, "b t seg_n"]:
        """For each frame, which of the tokens of its segment are the subject's, but for its own."""
        b, t, h, w = self.masks.shape
        rows, n = asked.k.shape[0], asked.k.shape[2]
        if at.crossed or rows != b * t or asked.q.shape[2] != n:
            raise ChronotopeError(
                f"{at.layer}: {rows} rows of {asked.q.shape[2]} queries and {n} keys; expected {b} x {t} frames that "
                "attend to themselves: name such layers by layers=."
            )
        small = F.adaptive_max_pool2d(self.masks.flatten(0, 1).float(), sides(n, h / w)).view(b, t, n) > 0
        gone = -t % self.segment
        tokens = F.pad(small, (0, 0, 0, gone)).unflatten(1, (-1, self.segment)).flatten(2)
        each = tokens.repeat_interleave(self.segment, 1)[:, :t].unflatten(2, (self.segment, n))
        place = torch.arange(t, device=small.device) % self.segment
        others = place[:, None] != torch.arange(self.segment, device=small.device)
        return (each & others[..., None]).flatten(2)


def _gathered(x: Float[Tensor, "bt h n d"], index: Tensor) -> Float[Tensor, "bt h m d"]:
    """Tokens of all frames of a video, chosen for each of its frames: index [B, T, M] into T N."""
    b, t, m = index.shape
    video = x.unflatten(0, (b, t)).permute(0, 2, 1, 3, 4).flatten(2, 3)  # [B, H, T N, D]
    flat = index.flatten(1)[:, None, :, None].expand(-1, video.shape[1], -1, video.shape[3])
    return video.gather(2, flat).unflatten(2, (t, m)).transpose(1, 2).flatten(0, 1)


def subject_features(
    tokens: Float[Tensor, "b t n d"], mask: Bool[Tensor, "b t n"]
) -> tuple[Float[Tensor, "b t d"], Bool[Tensor, "b t"]]:
    """The mean over the subject's tokens, and in which frames there are any."""
    count = mask.sum(-1)
    return (tokens * mask[..., None]).sum(2) / count.clamp(min=1)[..., None], count > 0


class LayerFeatures(Control):
    """What the heads of layers bring, with its graph: `LayerFeatures(model, layers)(x, t)` [B, T, N, D]."""

    def __init__(self, model: nn.Module, layers: Layers):
        self.model, self.layers = model, layers
        self.kept: list[Tensor] = []

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h nq dv"]) -> Float[Tensor, "b h nq dv"]:
        """Keeps it."""
        self.kept.append(out.transpose(1, 2).flatten(2))
        return out

    def __call__(self, x: Float[Tensor, "b t c h w"], time: Float[Tensor, "b t"]) -> Float[Tensor, "b t n d"]:
        """Of all the layers, whose tokens have to be as many, side by side."""
        self.kept = []
        with control(self.model, self, layers=self.layers):
            self.model(x, time)
        return torch.cat(self.kept, -1).unflatten(0, x.shape[:2])


class Recurrence:
    """Guidance of the queue: `recurrence(latents, times)` is the latents after one step down the gradient.

    Args:
        features: (latents [B, T, C, h, w], times [B, T]) -> tokens [B, T, N, D], such as `LayerFeatures`.
        mask: [B, T, N], the subject's tokens; set anew when the queue has moved.
        scale, momentum: of the step, and of the bank.
        clean, noisy: how many frames at the head feed the bank, and how many at the tail follow it.
    """

    def __init__(
        self,
        features: Callable[[Tensor, Tensor], Tensor],
        mask: Bool[Tensor, "b t n"],
        scale: float | int,
        momentum: float | int = 0.9,
        clean: int = 1,
        noisy: int = 4,
    ):
        self.features, self.mask, self.scale, self.momentum = features, mask, scale, momentum
        self.clean, self.noisy = clean, noisy
        self.bank: Tensor | None = None

    def __call__(self, x: Float[Tensor, "b t c h w"], time: Float[Tensor, "b t"]) -> Float[Tensor, "b t c h w"]:
        """Moves the frames at the tail, and those that their features depend on."""
        with torch.enable_grad():
            moved = x.detach().requires_grad_()
            found, real = subject_features(self.features(moved, time), self.mask)
            self._remember(found.detach(), real)
            (slope,) = torch.autograd.grad(self.loss(found, real), moved)
        return x - self.scale * slope

    def loss(self, found: Float[Tensor, "b t d"], real: Bool[Tensor, "b t"]) -> Float[Tensor, ""]:
        """Mean square of what parts the tail from the bank, over frames in which the subject is."""
        assert self.bank is not None
        apart = (found - self.bank[:, None]).square().mean(-1)[:, -self.noisy :]
        there = real[:, -self.noisy :]
        return (apart * there).sum() / there.sum().clamp(min=1)

    def _remember(self, found: Float[Tensor, "b t d"], real: Bool[Tensor, "b t"]) -> None:
        head, there = found[:, : self.clean], real[:, : self.clean]
        fresh = (head * there[..., None]).sum(1) / there.sum(1).clamp(min=1)[:, None]
        if self.bank is None:
            self.bank = fresh
        else:
            mixed = self.momentum * self.bank + (1 - self.momentum) * fresh
            self.bank = torch.where(there.any(1)[:, None], mixed, self.bank)
