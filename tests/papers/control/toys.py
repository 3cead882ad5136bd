"""A small denoiser that is told by words which coloured shapes to draw, for tests of controls that need a trained one.

A scene is one or two objects on 8 x 8 pixels, -1 .. 1 in three colours, on 0; two lie side by side or one above the
other. Its prompt, of `LENGTH` words: "<s> a red square on the left and blue cross right", articles and places now and
then left out, 1 in 10 empty. The model is that of a flow, v(x_t, t, words) of x_t = t x + (1 - t) noise; each pixel is
a token. Forms:

    "cross": blocks.N.self_attention over pixels, blocks.N.cross_attention from pixels to words
    "joint": blocks.N.attention over words and pixels, words first: grid=toys.JOINT

    model = toys.trained("joint")             # once for each machine and version of its code: 90 s of one core
    told = toys.told(model, toys.prompt("a red square on the left"))
    images = flow_sample(told, noise, steps=20)                       # of models.diffusion
    images = ddim_sample(toys.as_ddpm(told, alphas), noise, alphas)   # the same model on another ladder of noise
    toys.labels(images), toys.drawn(images)   # what is seen in them

Of objects that are named, 0.76 ("joint") and 0.84 ("cross") come `right`, and 0.84 and 0.91 with `guided` by weight 2;
the colour of the first is there in 0.91 and 0.95, and in 0.98 and 0.99.

Instead of words, `model(x, t, context)` takes what `model.text(words)` gives, several prompts one after the other too.
"""

import hashlib
import inspect
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.models.diffusion import flow_loss
from chronotope.nn import Modulation, TimeEmbedding

SIDE, LENGTH = 8, 16
PIXELS = ct.Grid(h=SIDE, w=SIDE)
JOINT = ct.Grid(LENGTH, h=SIDE, w=SIDE)
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("square", "cross", "ring")
PLACES = ("left", "right", "top", "bottom")
STOPS = ("a", "the", "on", "and")
WORDS = ("<pad>", "<s>", *STOPS, *COLOURS, *SHAPES, *PLACES)
COLOUR = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
SHAPE = torch.tensor(
    [[[1.0, 1, 1], [1, 1, 1], [1, 1, 1]], [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[1, 1, 1], [1, 0, 1], [1, 1, 1]]]
)


def prompt(*texts):
    """Words [B, LENGTH] of prompts; "" is the empty one."""
    rows = [[1, *(WORDS.index(word) for word in text.split())] for text in texts]
    return torch.tensor([row + [0] * (LENGTH - len(row)) for row in rows])


@dataclass
class Scenes:
    """images [B, 3, 8, 8], masks [B, 2, 8, 8] of the objects, words [B, LENGTH].

    spots [B, 2, LENGTH]: which words speak of an object's colour or shape. colour, shape, place [B, 2]: numbers of
    words; count [B]: of objects.
    """

    images: torch.Tensor
    masks: torch.Tensor
    words: torch.Tensor
    spots: torch.Tensor
    colour: torch.Tensor
    shape: torch.Tensor
    place: torch.Tensor
    count: torch.Tensor


def scenes(count, rng, objects=None, places=None):
    """Random scenes, colours different.

    objects: in each; None: one in a quarter of them, else two. places: whether they are named; None: half of them.
    """

    def draw(high, *more):
        return torch.randint(high, (count, *more), generator=rng)

    def maybe(chance, *more):
        return torch.rand(count, *more, generator=rng) < chance

    colour = torch.rand(count, len(COLOURS), generator=rng).argsort(1)[:, :2]
    shape, upright, swapped = draw(len(SHAPES), 2), draw(2), draw(2)
    order = torch.stack((swapped, 1 - swapped), 1)
    place = 2 * upright[:, None] + order
    near, free = 4 * order + draw(2, 2), 4 * draw(2, 2) + draw(2, 2)
    row, column = (torch.where(upright[:, None] == which, near, free) for which in (1, 0))
    masks = torch.zeros(count, 2, SIDE, SIDE)
    index = torch.arange(count)[:, None]
    for i in range(3):
        for j in range(3):
            masks[index, torch.arange(2), row + i, column + j] = SHAPE[shape, i, j]
    two = ~maybe(0.25) if objects is None else torch.full((count,), objects == 2)
    masks[:, 1] *= two[:, None, None]
    images = torch.einsum("bohw,boc->bchw", masks, COLOUR[colour])

    name = {word: at for at, word in enumerate(WORDS)}
    spoken, kept, about = [torch.full((count, 1), name["<s>"])], [torch.ones(count, 1, dtype=torch.bool)], [0]
    where = maybe(0.5, 2) if places is None else torch.full((count, 2), places)
    for i in range(2):
        there = two if i else torch.ones(count, dtype=torch.bool)
        article = torch.where(maybe(0.5), name["a"], name["the"])
        on = maybe(0.5) & where[:, i]
        said = [
            (torch.full((count,), name["and"]), there if i else ~there, 0),
            (article, there & maybe(0.7), 0),
            (colour[:, i] + name["red"], there, i + 1),
            (shape[:, i] + name["square"], there, i + 1),
            (torch.full((count,), name["on"]), there & on, 0),
            (torch.full((count,), name["the"]), there & on, 0),
            (place[:, i] + name["left"], there & where[:, i], 0),
        ]
        for word, keep, what in said:
            spoken.append(word[:, None])
            kept.append(keep[:, None])
            about.append(what)
    told = torch.cat(kept, 1)
    first = (~told).to(torch.uint8).argsort(dim=1, stable=True)
    words = torch.where(told, torch.cat(spoken, 1), 0).gather(1, first)
    about = torch.where(told, torch.tensor(about), 0).gather(1, first)
    words, about = (F.pad(x, (0, LENGTH - x.shape[1])) for x in (words, about))
    spots = torch.stack((about == 1, about == 2), 1)
    return Scenes(images, masks, words, spots, colour, shape, place, two + 1)


def labels(images):
    """The nearest colour of each pixel [B, 8, 8]: -1 is the ground, else its place among `COLOURS`."""
    palette = torch.cat((torch.zeros(1, 3), COLOUR))
    return torch.cdist(images.movedim(1, -1).flatten(1, 2), palette).argmin(-1).unflatten(1, (SIDE, SIDE)) - 1


def drawn(images):
    """How well each colour's pixels are one object of each shape [B, colours, shapes]: the best IoU over its places."""
    seen = torch.stack([labels(images) == i for i in range(len(COLOURS))], 1).float()
    common = F.conv2d(seen.flatten(0, 1)[:, None], SHAPE[:, None]).flatten(2).amax(2).unflatten(0, seen.shape[:2])
    either = seen.sum((2, 3))[..., None] + SHAPE.sum((1, 2)) - common
    return common / either


def right(images, scene, least=0.5):
    """Whether each object that the words name [B, 2] is drawn in its colour, wherever, as `drawn` has it. None: True.

    At 0.5 the outline is right; a hole in the middle, or a corner more or less, says too little of the shape's name.
    """
    found = drawn(images)[torch.arange(len(images))[:, None], scene.colour, scene.shape] >= least
    return found | (torch.arange(2) >= scene.count[:, None])


def heads_of(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


class SelfAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.qkv, self.leave = heads, nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x):
        q, k, v = (heads_of(y, self.heads) for y in self.qkv(x).chunk(3, -1))
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads, self.q, self.kv, self.leave = (
            heads,
            nn.Linear(dim, dim),
            nn.Linear(dim, 2 * dim),
            nn.Linear(dim, dim),
        )

    def forward(self, x, context):
        q = heads_of(self.q(x), self.heads)
        k, v = (heads_of(y, self.heads) for y in self.kv(context).chunk(2, -1))
        return self.leave(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class JointAttention(nn.Module):
    """Words and pixels see each other, each with matrices of their own."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.ModuleList(nn.Linear(dim, 3 * dim) for _ in range(2))
        self.leave = nn.ModuleList(nn.Linear(dim, dim) for _ in range(2))

    def forward(self, text, x):
        both = torch.cat([qkv(y) for qkv, y in zip(self.qkv, (text, x), strict=True)], 1)
        q, k, v = (heads_of(y, self.heads) for y in both.chunk(3, -1))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.leave[0](out[:, : text.shape[1]]), self.leave[1](out[:, text.shape[1] :])


def mlp(dim):
    return nn.Sequential(nn.Linear(dim, 3 * dim), nn.GELU(), nn.Linear(3 * dim, dim))


class Near(nn.Module):
    """Of each pixel what its neighbours are, channel by channel: a training this short finds no shapes without."""

    def __init__(self, dim):
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)

    def forward(self, x):
        return x + self.conv(x.transpose(1, 2).unflatten(2, (SIDE, SIDE))).flatten(2).transpose(1, 2)


class Text(nn.Module):
    """Words as vectors that know of each other: one layer."""

    def __init__(self, dim, heads):
        super().__init__()
        self.table, self.places = nn.Embedding(len(WORDS), dim), nn.Parameter(torch.randn(LENGTH, dim))
        self.attention, self.mlp = SelfAttention(dim, heads), mlp(dim)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, words):
        x = self.table(words) + self.places[: words.shape[1]]
        x = x + self.attention(self.norms[0](x))
        return self.norms[2](x + self.mlp(self.norms[1](x)))


class CrossBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.self_attention, self.cross_attention = SelfAttention(dim, heads), CrossAttention(dim, heads)
        self.near, self.mlp, self.steer = Near(dim), mlp(dim), nn.ModuleList(Modulation(dim) for _ in range(3))

    def forward(self, text, x, condition):
        x = self.steer[0](x, condition, self.self_attention)
        x = self.steer[1](x, condition, lambda y: self.cross_attention(y, text))
        return text, self.steer[2](x, condition, lambda y: self.mlp(self.near(y)))


class JointBlock(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.norm = JointAttention(dim, heads), nn.LayerNorm(dim, elementwise_affine=False)
        self.mlps = nn.ModuleList([mlp(dim), nn.Sequential(Near(dim), mlp(dim))])
        self.steer = nn.Linear(dim, 12 * dim)
        nn.init.zeros_(self.steer.weight)
        nn.init.zeros_(self.steer.bias)

    def forward(self, text, x, condition):
        s = self.steer(F.silu(condition))[:, None].chunk(12, -1)
        normed = [self.norm(y) * (1 + s[6 * i]) + s[6 * i + 1] for i, y in enumerate((text, x))]
        both = [y + s[6 * i + 2] * z for i, (y, z) in enumerate(zip((text, x), self.attention(*normed), strict=True))]
        return tuple(
            y + s[6 * i + 5] * self.mlps[i](self.norm(y) * (1 + s[6 * i + 3]) + s[6 * i + 4])
            for i, y in enumerate(both)
        )


class Toy(nn.Module):
    """v(x [B, 3, 8, 8], t [B], words [B, L] or context [B, L, C])."""

    def __init__(self, form, dim=64, layers=2, heads=4):
        super().__init__()
        self.text, self.time = Text(dim, heads), TimeEmbedding(dim, waves=64, scale=1000)
        self.enter, self.places = nn.Conv2d(3, dim, 3, padding=1), nn.Parameter(torch.randn(SIDE * SIDE, dim) / 2)
        block = {"cross": CrossBlock, "joint": JointBlock}[form]
        self.blocks = nn.ModuleList(block(dim, heads) for _ in range(layers))
        self.last, self.leave = Modulation(dim, gate=False), nn.Linear(dim, 3)

    def forward(self, x, t, words):
        text = words if words.is_floating_point() else self.text(words)
        condition, y = self.time(t), self.enter(x).flatten(2).transpose(1, 2) + self.places
        for block in self.blocks:
            text, y = block(text, y, condition)
        return self.last(y, condition, self.leave).transpose(1, 2).unflatten(2, (SIDE, SIDE))


def told(model, words):
    """The model as samplers take it, (x, t) -> v, of one prompt for all or of one for each."""
    return lambda x, t: model(x, t, words.expand(len(x), *words.shape[1:]))


def as_ddpm(velocity, alphas):
    """(x, step) -> noise on a ladder of DDPM: its x are those of the flow, times sqrt(a) + sqrt(1 - a)."""

    def noise(x, step):
        a = alphas.to(x.dtype)[step.long()].view(-1, *[1] * (x.ndim - 1))
        size = a.sqrt() + (1 - a).sqrt()
        time = a.sqrt() / size
        return x / size - time * velocity(x / size, time.flatten())

    return noise


@cache
def trained(form, seed=0, steps=1800, batch=24, rate=5e-3):
    """A model of this form, the same for all who ask, who must not change it; kept for other processes in a file."""
    made_by = [
        inspect.getsource(part) for part in (scenes, SelfAttention, CrossAttention, JointAttention, mlp, Near, Text)
    ]
    made_by += [inspect.getsource(part) for part in (CrossBlock, JointBlock, Toy, learn)]
    key = repr((made_by, WORDS, COLOUR, SHAPE, form, seed, steps, batch, rate, torch.__version__))
    kept = (
        Path(tempfile.gettempdir()) / "chronotope-toys" / f"{form}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.pt"
    )
    torch.manual_seed(seed)
    model = Toy(form)
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        learn(model, seed, steps, batch, rate)
        kept.parent.mkdir(exist_ok=True)
        own = kept.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), own)
        own.replace(kept)
    return model.eval().requires_grad_(False)


def learn(model, seed, steps, batch, rate):
    """Trains it on fresh scenes, on one thread, so that the result is the same on machines of all sizes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        scene = scenes(batch, rng)
        silent = torch.rand(batch, 1, generator=rng) < 0.1
        words = torch.where(silent, prompt(""), scene.words)
        opt.zero_grad()
        flow_loss(told(model, words), scene.images, generator=rng).backward()
        opt.step()
        course.step()
    torch.set_num_threads(threads)
