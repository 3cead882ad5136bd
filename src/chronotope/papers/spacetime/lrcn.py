r"""LRCN: a convolutional network sees each frame, an LSTM carries what it saw through time.

$$
i, f, o = \sigma(W [x_t, h_{t-1}] + b), \quad g = \tanh(W_g [x_t, h_{t-1}] + b_g), \quad
c_t = f c_{t-1} + i g, \quad h_t = o \tanh(c_t)
$$

x_t = phi(frame t). Three readings of h: a clip's class, from the mean over time of W_c h_t (`LRCN`, `read="mean"`), or
from the last step; an answer at every step (`read="sequence"`); and a caption, where a picture is given at every step
and the word before comes back in (`Captioner`):

$$ h^1_t = \mathrm{LSTM}_1(E w_{t-1}), \qquad h^2_t = \mathrm{LSTM}_2([h^1_t, \phi]), \qquad
p(w_t) = \mathrm{softmax}(W_w h^2_t) $$

the factored form of two layers, in which the second alone sees the picture. It is the recurrent baseline of space and
time: no attention, causal, and its state does not grow.

Sizes: clips [B, T, C, H, W] -> [B, classes] or [B, T, classes]; state h, c [layers, B, hidden].

    >>> model = LRCN(6, channels=1, hidden=32)
    >>> model(torch.rand(2, 5, 1, 16, 16)).shape
    torch.Size([2, 6])
    >>> logits, state = model.step(torch.rand(2, 1, 16, 16), None)

Left out: the trunk of CaffeNet (`frames=` takes any module from pictures to features; here three convolutions), optical
flow as a second network, the video captions from predicted labels, beam search. Unconfirmed: dropout of 0.9 behind the
LSTM; here none.

Paper: Jeff Donahue, Lisa Anne Hendricks, Marcus Rohrbach, Subhashini Venugopalan, Sergio Guadarrama, Kate Saenko,
Trevor Darrell, "Long-term Recurrent Convolutional Networks for Visual Recognition and Description", 2014,
arXiv 1411.4389.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from chronotope.errors import ChronotopeError
from chronotope.papers.registry import paper

Carried = tuple[Float[Tensor, "layers b hidden"], Float[Tensor, "layers b hidden"]]
Read = Literal["mean", "last", "sequence"]


def frame_encoder(channels: int, dim: int) -> nn.Sequential:
    """phi: three convolutions, two of which halve the picture, means over 4 x 4 parts of it, and a matrix."""
    sizes = (channels, dim // 4, dim // 2, dim)
    layers: list[nn.Module] = []
    for index, (inside, outside) in enumerate(pairwise(sizes)):
        layers += [nn.Conv2d(inside, outside, 3, stride=1 if index == 0 else 2, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * dim, dim))


@paper(
    system=201,
    name="LRCN",
    family="spacetime",
    claim="frames by a convolutional network, time by an LSTM: causal, with a state that does not grow",
    evidence=["tests/papers/spacetime/test_lrcn.py"],
)
class LRCN(nn.Module):
    """Logits of clips [B, T, C, H, W].

    Args:
        classes: how many.
        channels: of a frame.
        dim, hidden, layers: channels of phi(frame), of h, and layers of the LSTM.
        read: "mean" of the logits over time, those of the "last" frame, or all, as a "sequence".
        frames: phi, from pictures [n, C, H, W] to [n, dim]; default `frame_encoder(channels, dim)`.
    """

    def __init__(
        self,
        classes: int,
        channels: int = 3,
        dim: int = 64,
        hidden: int = 256,
        layers: int = 1,
        read: Read = "mean",
        frames: nn.Module | None = None,
    ):
        super().__init__()
        self.read = read
        self.frames = frame_encoder(channels, dim) if frames is None else frames
        self.time = nn.LSTM(dim, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, classes)

    def forward(
        self, clips: Float[Tensor, "b t c height width"], real: Bool[Tensor, "b t"] | None = None
    ) -> Float[Tensor, "b *t classes"]:
        """Logits; `real` is false for padding, which stands at the end of a clip and does not count."""
        if real is not None and bool((real[:, 1:] & ~real[:, :-1]).any() | ~real[:, 0].all()):
            raise ChronotopeError("LRCN: real=False before a frame that is real; pad clips at their end.")
        logits = self.head(self.time(self.frames(clips.flatten(0, 1)).unflatten(0, clips.shape[:2]))[0])
        if self.read == "sequence":
            return logits
        real = torch.ones(clips.shape[:2], dtype=torch.bool, device=clips.device) if real is None else real
        if self.read == "last":
            return logits[torch.arange(len(clips)), real.sum(1) - 1]
        weight = real.to(logits.dtype) / real.sum(1, keepdim=True)
        return (logits * weight[:, :, None]).sum(1)

    def step(
        self, frame: Float[Tensor, "b c height width"], state: Carried | None
    ) -> tuple[Float[Tensor, "b classes"], Carried]:
        """The logits of the next frame, and the state after it; None before the first."""
        out, state = self.time(self.frames(frame)[:, None], state)
        return self.head(out[:, 0]), state


class Captioner(nn.Module):
    """Words of a picture, one after the other, by two LSTMs of which the second sees the picture.

    Args:
        words: size of the vocabulary; word 0 starts a caption and ends it.
        channels, dim, hidden: as for `LRCN`; `dim` is also that of a word.
    """

    def __init__(self, words: int, channels: int = 3, dim: int = 64, hidden: int = 128):
        super().__init__()
        self.picture, self.word = frame_encoder(channels, dim), nn.Embedding(words, dim)
        self.first = nn.LSTM(dim, hidden, batch_first=True)
        self.second = nn.LSTM(hidden + dim, hidden, batch_first=True)
        self.head = nn.Linear(hidden, words)

    def forward(
        self, pictures: Float[Tensor, "b c height width"], words: Int64[Tensor, "b n"]
    ) -> Float[Tensor, "b n words"]:
        """Logits of the word after each of `words`, the first of which is 0."""
        return self._next(self.picture(pictures), words, (None, None))[0]

    @torch.no_grad()
    def caption(self, pictures: Float[Tensor, "b c height width"], longest: int = 16) -> Int64[Tensor, "b n"]:
        """The likeliest word at each step, until all captions ended; 0 from its end on."""
        seen = self.picture(pictures)
        states: tuple[Carried | None, Carried | None] = (None, None)
        word = torch.zeros(len(seen), 1, dtype=torch.int64, device=seen.device)
        words: list[Tensor] = []
        over = torch.zeros_like(word, dtype=torch.bool)
        while len(words) < longest and not over.all():
            logits, states = self._next(seen, word, states)
            word = logits.argmax(2).masked_fill(over, 0)
            over = over | (word == 0)
            words.append(word)
        return torch.cat(words, 1)

    def _next(
        self, seen: Tensor, words: Tensor, states: tuple[Carried | None, Carried | None]
    ) -> tuple[Tensor, tuple[Carried, Carried]]:
        first, one = self.first(self.word(words), states[0])
        second, two = self.second(torch.cat((first, seen[:, None].expand(-1, words.shape[1], -1)), 2), states[1])
        return self.head(second), (one, two)
