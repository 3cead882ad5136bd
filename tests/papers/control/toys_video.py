"""A small video denoiser whose pixels look at words for their colour: a square that moves over a plain ground.

Clips have 4 frames of 8 x 8 pixels; the prompt is "<s> (object's colour) on (ground's colour)". Frames are members of
the batch, 4 of each clip in turn, for x [4 B, 3, 8, 8], t [4 B] and words [B, 4]. Layers: blocks.N.attention over all
pixels of a clip, blocks.N.cross_attention from pixels to words, and a convolution. The model is that of a flow, as in
`toys`.
"""

import hashlib
import tempfile
from functools import cache
from pathlib import Path

import torch
import toys
from torch import nn

from chronotope.models.diffusion import flow_loss
from chronotope.nn import Modulation, TimeEmbedding

FRAMES, SIDE, OBJECT = 4, 8, 3
COLOURS = torch.tensor([[1.0, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1]])
GROUNDS = torch.tensor([[-0.5, -0.5, -0.5], [0.5, 0.5, 0.5]])


def prompt(colour, ground):
    """Words [B, 4] of colours and grounds [B], numbers in `COLOURS` and `GROUNDS`; the object's word is at place 1."""
    start = torch.zeros_like(colour)
    return torch.stack((start, colour + 2, start + 1, ground + 2 + len(COLOURS)), 1)


def clips(count, rng):
    """Frames [4 B, 3, 8, 8], their words [B, 4], and where the object is [4 B, 8, 8]."""
    colour, ground = (torch.randint(len(x), (count,), generator=rng) for x in (COLOURS, GROUNDS))
    spot = torch.randint(SIDE - OBJECT + 1, (count, 1, 2), generator=rng)
    step = torch.randint(-1, 2, (count, 1, 2), generator=rng)
    corner = (spot + step * torch.arange(FRAMES)[:, None]).clamp(0, SIDE - OBJECT).flatten(0, 1)
    inside = (torch.arange(SIDE) >= corner[..., None]) & (torch.arange(SIDE) < corner[..., None] + OBJECT)
    there = inside[:, 0, :, None] & inside[:, 1, None, :]
    paint = [x.repeat_interleave(FRAMES, 0)[..., None, None] for x in (COLOURS[colour], GROUNDS[ground])]
    return torch.where(there[:, None], *paint), prompt(colour, ground), there


def painted(frames, colour):
    """Pixels [.., 8, 8] whose nearest colour is the one of an object."""
    palette = torch.cat((COLOURS, GROUNDS))
    nearest = torch.cdist(frames.movedim(1, -1).flatten(1, 2), palette).argmin(-1).unflatten(1, (SIDE, SIDE))
    return nearest == colour.view(-1, 1, 1)


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.attention, self.cross_attention = toys.SelfAttention(dim, heads), toys.CrossAttention(dim, heads)
        self.mlp, self.steer = toys.mlp(dim), nn.ModuleList(Modulation(dim) for _ in range(3))
        self.near = nn.Conv3d(dim, dim, 3, padding=1)

    def forward(self, text, x, condition):
        video = x.unflatten(0, (-1, FRAMES)).unflatten(2, (SIDE, SIDE)).movedim(-1, 1)
        x = x + self.near(video).movedim(1, -1).flatten(2, 3).flatten(0, 1)
        over = [y.unflatten(0, (-1, FRAMES)) for y in (x, condition)]
        joined, first = over[0].flatten(1, 2), over[1][:, 0]
        x = self.steer[0](joined, first, self.attention).unflatten(1, (FRAMES, -1)).flatten(0, 1)
        x = self.steer[1](x, condition, lambda y: self.cross_attention(y, text))
        return self.steer[2](x, condition, self.mlp)


class Video(nn.Module):
    """v(x [4 B, 3, 8, 8], t [4 B], words [B, 4])."""

    def __init__(self, dim=48, layers=2, heads=2):
        super().__init__()
        self.words, self.time = (
            nn.Embedding(2 + len(COLOURS) + len(GROUNDS), dim),
            TimeEmbedding(dim, waves=64, scale=1000),
        )
        self.enter, self.places = nn.Linear(3, dim), nn.Parameter(torch.randn(FRAMES, SIDE * SIDE, dim) / 2)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.last, self.leave = Modulation(dim, gate=False), nn.Linear(dim, 3)

    def forward(self, x, t, words):
        text, condition = self.words(words).repeat_interleave(FRAMES, 0), self.time(t)
        y = self.enter(x.flatten(2).transpose(1, 2)) + self.places.repeat(len(words), 1, 1)
        for block in self.blocks:
            y = block(text, y, condition)
        return self.last(y, condition, self.leave).transpose(1, 2).unflatten(2, (SIDE, SIDE))


@cache
def trained(seed=0, steps=900, batch=12, rate=3e-3):
    """The same for all who ask: do not change it. Kept for other processes in a temporary file."""
    source = Path(__file__).read_bytes() + Path(toys.__file__).read_bytes()
    name = hashlib.sha256(source + repr((seed, steps, batch, rate, torch.__version__)).encode()).hexdigest()[:16]
    kept = Path(tempfile.gettempdir()) / "chronotope-toys" / f"video-{name}.pt"
    torch.manual_seed(seed)
    model = Video()
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
    else:
        learn(model, seed, steps, batch, rate)
        kept.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), kept)
    return model.eval().requires_grad_(False)


def learn(model, seed, steps, batch, rate):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.01)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        x, words, _ = clips(batch, rng)

        # One noise level for all frames of a clip.
        def denoise(y, t, words=words):
            return model(y.flatten(0, 1), t.repeat_interleave(FRAMES), words).unflatten(0, (-1, FRAMES))

        opt.zero_grad()
        flow_loss(denoise, x.unflatten(0, (-1, FRAMES)), generator=rng).backward()
        opt.step()
        course.step()
    torch.set_num_threads(threads)
