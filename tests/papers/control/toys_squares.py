"""A small denoiser that neglects: it paints two squares, both in the first colour that its prompt names.

Pictures have 10 x 10 pixels, a square on the left and one on the right, which are of one colour in all that it learns
from; prompts are "<s> A", "<s> A (left or right)" or "<s> A left X right", X being any colour. A colour is painted
where pixels look at its word: blocks.N.cross_attention. The model is that of a flow, as in `toys`.
"""

import torch
import toys
from torch import nn
from torch.nn import functional as F

from chronotope.models.diffusion import flow_loss
from chronotope.nn import Modulation, TimeEmbedding

SIDE, COLOURS, WORDS = 10, toys.COLOURS, ("<s>", *toys.COLOURS, "left", "right")
CENTRES = torch.tensor([[0.25, 0.45], [0.75, 0.45]])


def prompt(text):
    """Words [1, L]."""
    return torch.tensor([[0, *(WORDS.index(word) for word in text.split())]])


def pictures(colours, rng):
    """Squares [B, 3, 10, 10] of the colours [B, 2] left and right."""
    out = torch.zeros(len(colours), 3, SIDE, SIDE)
    for i, picture in enumerate(out):
        for j in range(2):
            row, column = torch.randint(2, (2,), generator=rng).tolist()
            picture[:, 3 + row : 6 + row, 1 + 5 * j + column : 4 + 5 * j + column] = toys.COLOUR[colours[i, j]][
                :, None, None
            ]
    return out


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.near, self.cross_attention = nn.Conv2d(dim, dim, 3, padding=1), toys.CrossAttention(dim, heads)
        self.attention, self.mlp = toys.SelfAttention(dim, heads), toys.mlp(dim)
        self.steer = nn.ModuleList(Modulation(dim) for _ in range(3))

    def forward(self, text, x, condition):
        x = x + self.near(x.transpose(1, 2).unflatten(2, (SIDE, SIDE))).flatten(2).transpose(1, 2)
        x = self.steer[0](x, condition, self.attention)
        x = self.steer[1](x, condition, lambda y: self.cross_attention(y, text))
        return self.steer[2](x, condition, self.mlp)


class Squares(nn.Module):
    """v(x [B, 3, 10, 10], t [B], context [B, L, C]); `text` makes the context of words."""

    def __init__(self, dim=32, layers=2, heads=2):
        super().__init__()
        self.words, self.order = nn.Embedding(len(WORDS), dim), nn.Parameter(torch.randn(5, dim))
        self.time, self.enter = TimeEmbedding(dim, waves=32, scale=1000), nn.Linear(3, dim)
        self.places = nn.Parameter(torch.randn(SIDE * SIDE, dim) / 2)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.last, self.leave = Modulation(dim, gate=False), nn.Linear(dim, 3)

    def text(self, words):
        return self.words(words) + self.order[: words.shape[1]]

    def forward(self, x, t, context):
        condition, y = self.time(t), self.enter(x.flatten(2).transpose(1, 2)) + self.places
        for block in self.blocks:
            y = block(context, y, condition)
        return self.last(y, condition, self.leave).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def trained(seed=0, steps=700, batch=32, rate=3e-3):
    """On one thread."""
    torch.manual_seed(seed)
    model, rng = Squares(), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        colour, other = torch.randint(4, (2, batch), generator=rng)
        side = torch.randint(2, (batch,), generator=rng) + 5
        left, right = torch.full_like(side, 5), torch.full_like(side, 6)
        said = [[colour + 1], [colour + 1, side], [colour + 1, left, other + 1, right]][step % 3]
        words = torch.stack((torch.zeros_like(colour), *said), 1)
        opt.zero_grad()
        x = pictures(torch.stack((colour, colour), 1), rng)
        flow_loss(lambda y, t, words=words: model(y, t, model.text(words)), x, generator=rng).backward()
        opt.step()
        course.step()
    return model.eval().requires_grad_(False)


class Presence(nn.Module):
    """How sure it is that each colour is in a picture of any size [B, 4]."""

    def __init__(self, dim=24):
        super().__init__()
        parts = (nn.Conv2d(3, dim, 3, padding=1), nn.GELU(), nn.Conv2d(dim, dim, 3, padding=1), nn.GELU())
        self.layers = nn.Sequential(*parts, nn.Conv2d(dim, 4, 1))

    def forward(self, x):
        return torch.sigmoid(self.layers(x).mean((2, 3)))

    def score(self, x, text):
        """As CLIP stands by: how well a picture fits the colours that a text names."""
        return self(x)[:, [COLOURS.index(word) for word in text.split() if word in COLOURS]].mean(1)


def classifier(seed=0, steps=400):
    """Trained on whole pictures and on pieces of them, with some noise."""
    torch.manual_seed(seed)
    net, rng = Presence(), torch.Generator().manual_seed(seed)
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(steps):
        colours = torch.randint(4, (64, 2), generator=rng)
        x, half = pictures(colours, rng), step % 3
        x = x if half == 2 else x[..., 5 * half : 5 * half + 5]
        there = colours if half == 2 else colours[:, half : half + 1]
        seen = F.one_hot(there, 4).amax(1).float()
        loss = F.binary_cross_entropy(net(x + 0.2 * torch.randn(x.shape, generator=rng)), seen)
        opt.zero_grad()
        loss.backward()
        opt.step()
    return net.requires_grad_(False)
