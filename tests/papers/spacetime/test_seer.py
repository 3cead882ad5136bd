"""Seer (system 82): the window mask against dense attention, the base at first, frame by frame, the decomposer."""

import pytest
import torch
from _squares import draw
from torch.nn import functional as F

import chronotope as ct
from chronotope.models.diffusion import flow_loss, flow_sample
from chronotope.nn import PatchEmbed, Sinusoidal, TimeEmbedding, Unpatch
from chronotope.papers.spacetime.seer import (
    SeerLayer,
    TextDecomposer,
    WindowAttention,
    frame_block,
    published_window,
    repetition_loss,
    window_causal,
)


def lively(module, seed=0):
    """The same module with nothing at 0."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    return module.double().eval()


def mask_of(grid, window, order):
    """Same window, and not after, from the coordinates alone."""
    t, h, w = grid.coords().T
    size = max(grid.shape) if window is None else window
    same = (h[:, None] // size == h // size) & (w[:, None] // size == w // size)
    place = torch.arange(grid.size) if order == "token" else t
    return same & (place <= place[:, None])


@pytest.mark.parametrize("order", ["token", "frame"])
@pytest.mark.parametrize(("shape", "window"), [((3, 2, 2), None), ((4, 8, 8), 4), ((3, 6, 5), 4), ((2, 4, 4), 2)])
def test_it_is_dense_attention_under_the_mask_rotated_in_token_order(shape, window, order):
    grid = ct.Grid(**dict(zip("thw", shape, strict=True)))
    layer = lively(WindowAttention(80, 2, window, order))
    x, mask = torch.randn(2, grid.size, 80, dtype=torch.float64), mask_of(grid, window, order)
    assert torch.equal(ct.plan(layer.where(grid), grid).mask(), mask)
    q, k, v = (part.unflatten(2, (2, 40)).transpose(1, 2) for part in F.linear(x, layer.inner.qkv.weight).chunk(3, -1))
    angle = torch.arange(grid.size).double()[:, None] * 10000.0 ** (-torch.arange(16).double() / 16)

    def turned(x):
        a, b, rest = x.split((16, 16, 8), -1)
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin(), rest), -1)

    weights = (turned(q) @ turned(k).transpose(2, 3) / 40**0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    expected = layer.inner.out((weights @ v).transpose(1, 2).flatten(2))
    assert (layer(x, grid) - expected).abs().max() < 1e-5


def test_three_frames_of_four_tokens():
    grid, x = ct.Grid(t=3, h=2, w=2), torch.randn(1, 12, 32, dtype=torch.float64)
    for order in ("token", "frame"):
        layer = lively(WindowAttention(32, 2, None, order))
        other = torch.cat((x[:, :8], torch.randn(1, 4, 32, dtype=torch.float64)), 1)
        assert torch.equal(layer(x, grid)[:, :8], layer(other, grid)[:, :8])
        slopes = torch.autograd.functional.jacobian(lambda x, f=layer: f(x, grid).sum(-1)[0], x)[:, 0].abs().amax(-1)
        assert (slopes[11, :4] > 0).all()  # the last token sees all of frame 0
        own = torch.ones(4, 4, dtype=torch.bool)
        for frame in range(3):
            within = slopes[4 * frame : 4 * frame + 4, 4 * frame : 4 * frame + 4] > 0
            assert torch.equal(within, own.tril() if order == "token" else own)
        assert torch.equal(slopes[0] > 0, torch.arange(12) < (1 if order == "token" else 4))


def test_windows_as_published():
    sizes = {height: published_window(ct.Grid(t=2, h=height, w=height)) for height in (2, 4, 8, 16, 31, 32, 64)}
    assert sizes[2] == sizes[4] == window_causal(None)
    assert sizes[8] == sizes[16] == sizes[31] == window_causal(4)
    assert sizes[32] == sizes[64] == window_causal(8)
    with pytest.raises(ct.ChronotopeError, match="order='row'"):
        window_causal(4, "row")
    with pytest.raises(ct.ChronotopeError, match="window='large'"):
        WindowAttention(16, 2, "large")
    with pytest.raises(ct.ChronotopeError, match="order='frame'"):
        WindowAttention(16, 2, "published", "frame")


def problem(frames=4, dim=32):
    grid = ct.Grid(t=frames, h=4, w=6)
    text = torch.randn(2, frames * 5, dim, dtype=torch.float64), ct.Grid(t=frames, n=5)
    return grid, torch.randn(2, grid.size, dim, dtype=torch.float64), text


def test_at_first_the_output_is_that_of_the_base():
    grid, x, text = problem()
    base = lively(frame_block(32, 2))
    layer = SeerLayer(32, 2, 4, base=base).double()
    for given in (0, 1, 4):
        assert torch.equal(layer(x, grid, text, given=given), base(x, grid, text))
    assert torch.equal(SeerLayer(32, 2).double()(x, grid), x)
    layer(x, grid, text).square().sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    assert layer.leave.weight.grad.abs().max() > 0


def test_the_text_of_a_frame_is_for_that_frame():
    grid, x, text = problem()
    base = lively(frame_block(32, 2))
    one, parts = grid.replace(t=1), []
    for t, frame in enumerate(x.split(24, 1)):
        parts.append(base(frame, one, (text[0].split(5, 1)[t], ct.Grid(n=5))))
    assert (torch.cat(parts, 1) - base(x, grid, text)).abs().max() < 1e-12
    whole = text[0][:, :5], ct.Grid(n=5)
    alike = text[0][:, :5].repeat(1, 4, 1), text[1]
    assert (base(x, grid, whole) - base(x, grid, alike)).abs().max() < 1e-12


@pytest.mark.parametrize("order", ["token", "frame"])
@pytest.mark.parametrize("given", [0, 2])
def test_frame_by_frame_equals_the_whole(order, given):
    grid, x, text = problem()
    layer = lively(SeerLayer(32, 2, 4, order, base=frame_block(32, 2)))
    whole, one = layer(x, grid, text, given=given), grid.replace(t=1)
    state, outs = layer.init_state(2, one, given), []
    for t, frame in enumerate(x.split(24, 1)):
        y, state = layer.step(frame, state, (text[0].split(5, 1)[t], ct.Grid(t=1, n=5)))
        outs.append(y)
    assert (torch.cat(outs, 1) - whole).abs().max() < 1e-5
    assert state.past.k.shape[2] == grid.size


def test_given_frames_pass_by_the_feed_forward():
    grid, x, text = problem()
    layer = lively(SeerLayer(32, 2, 4, base=frame_block(32, 2)))
    before = layer(x, grid, text, given=1)
    lively(layer.mlp, seed=1)
    after = layer(x, grid, text, given=1)
    assert torch.equal(after[:, :24], before[:, :24])
    assert (after[:, 24:] - before[:, 24:]).abs().amax(2).min() > 0


def test_instructions_look_back_only_and_at_all_of_the_sentence():
    model = lively(TextDecomposer(16, 2, frames=4, words=6, layers=2))
    text = torch.randn(1, 5, 16, dtype=torch.float64)
    found, grid = model(text)
    assert grid == ct.Grid(t=4, n=5)
    slopes = torch.autograd.functional.jacobian(lambda text: model(text)[0].sum(-1)[0], text)
    assert (slopes[:, 0].abs().amax(-1) > 0).all()
    changed = lively(TextDecomposer(16, 2, frames=4, words=6, layers=2))
    changed.place.data[2] += 1
    gap = (changed(text)[0] - found).abs().amax((0, 2)).unflatten(0, (4, 5)).amax(1)
    assert torch.equal(gap > 0, torch.tensor([False, False, True, True]))
    with pytest.raises(ct.ChronotopeError, match="a sentence of 7 words"):
        model(torch.randn(1, 7, 16, dtype=torch.float64))
    repetition_loss(model, text).backward()


def sentences(count, generator, words=6, vocabulary=20, dim=32):
    """Of a fixed random vocabulary: word plus place, each token normed, as an encoder's last layer leaves them."""
    table, place = (
        torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) for n, seed in ((vocabulary, 7), (words, 8))
    )
    said = torch.randint(vocabulary, (count, words), generator=generator)
    return F.layer_norm(table[said] + place, (dim,))


def taught_to_repeat(steps):
    """The mean squared distance of instructions to sentences that were not seen in training."""
    torch.manual_seed(0)
    model, generator = TextDecomposer(32, 4, frames=4, words=6, layers=1), torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        repetition_loss(model, sentences(16, generator)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        return float(repetition_loss(model, sentences(64, generator)))


@pytest.mark.slow
def test_the_decomposer_learns_to_repeat():
    """A mean squared distance of 2.4e-5 after 3000 steps, on sentences that it has not seen (2026-11-21)."""
    gap = taught_to_repeat(3000)
    print(gap)
    assert gap <= 1e-4


MOVES = torch.tensor([[0, 1], [-1, 0], [0, -1], [1, 0]])


def told(count, generator, side=8, square=3):
    """Clips of 8 frames in which a square moves 3 places one way, then 4 at a right angle; and these two words."""
    first = torch.randint(4, (count,), generator=generator)
    second = (first + 2 * torch.randint(2, (count,), generator=generator) + 1) % 4
    steps = torch.cat((MOVES[first][:, None].expand(-1, 3, -1), MOVES[second][:, None].expand(-1, 4, -1)), 1)
    path = torch.cat((torch.zeros(count, 1, 2, dtype=torch.int64), steps.cumsum(1)), 1)
    low = -path.amin(1)
    room = side - square - path.amax(1) - low  # how much further the start may be
    start = low + (torch.rand(count, 2, generator=generator) * (room + 1)).long()
    return draw(start[:, None] + path, side, square), torch.stack((first, second), 1)


class Predictor(torch.nn.Module):
    """Velocities of clips whose first frame is given, told what to do: by an instruction for each frame, or one."""

    def __init__(self, each, dim=64):
        super().__init__()
        self.words, self.order = torch.nn.Embedding(4, dim), torch.nn.Parameter(torch.randn(2, dim))
        self.text = TextDecomposer(dim, 2, frames=8 if each else 1, words=2, layers=1)
        torch.nn.init.normal_(self.text.place)
        self.embed, self.leave = PatchEmbed(dim, 2), Unpatch(dim, 2)
        self.place, self.time = Sinusoidal(dim, ("h", "w")), TimeEmbedding(dim, scale=1000)
        self.layers = torch.nn.ModuleList(SeerLayer(dim, 2, base=frame_block(dim, 2)) for _ in range(2))
        self.norm = torch.nn.LayerNorm(dim)
        self.requires_grad_(True)  # there is no image model to start from

    def forward(self, clips, t, said):
        text, places = self.text(self.words(said) + self.order)
        text = text, places if places.sizes["t"] > 1 else ct.Grid(n=2)
        x, grid = self.embed(clips)
        x = self.place(x, grid) + self.time(t)[:, None]
        for layer in self.layers:
            x = layer(x, grid, text, given=1)
        return self.leave(self.norm(x), grid)


def error_of_second_half(each, steps, count=64):
    """The mean squared error of the last 4 frames of predictions, and that of the last frame of the first half."""
    torch.manual_seed(0)
    model, generator = Predictor(each), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    mask = (torch.arange(8) > 0).view(1, 8, 1, 1, 1)
    for _ in range(steps):
        clips, said = told(16, generator)
        optimizer.zero_grad()
        flow_loss(lambda x, t, said=said: model(x, t, said), clips, mask=mask, generator=generator).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    clips, said = told(count, generator)
    noise = torch.randn(clips.shape, generator=generator)
    made = flow_sample(lambda x, t: model(x, t, said), noise, 20, known=clips, mask=mask)
    return float((made - clips)[:, 4:].square().mean()), float((clips[:, 3:4] - clips)[:, 4:].square().mean())


@pytest.mark.slow
def test_an_instruction_for_each_frame_lowers_the_error_of_the_second_half():
    """A square is told to go one way, then another: 0.163, with one instruction for all frames 0.193, and 0.84 where it
    stays, after 700 steps each (2026-11-21). Half was asked for.
    """
    (each, still), (one, _) = error_of_second_half(True, 700), error_of_second_half(False, 700)
    print(each, one, still)
    assert each < one < still, (each, one, still)
