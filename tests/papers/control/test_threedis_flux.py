"""3DIS-FLUX (system 140): the table of its rules, no empty rows, what leaks through how many blocks, two boxes."""

import contextlib
import itertools

import pytest
import torch
import toys
from _joint import Small, flux, places
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import control
from chronotope.models.diffusion import flow_loss, flow_sample
from chronotope.papers.control import layouts
from chronotope.papers.control.roles import Layout
from chronotope.papers.control.threedis_flux import Rules, ThreeDIS, layout_pattern

H, W = 4, 5
FIRST, SECOND = torch.zeros(2, H, W, dtype=torch.bool)
FIRST[0:3, 0:3], SECOND[1:4, 2:5] = True, True  # they share two places
REGIONS = torch.stack((FIRST, SECOND)).flatten(1)
TEXTS = (3, 2, 4)
APART = layouts.boxes(torch.tensor([[0.0, 0, 0.4, 1], [0.6, 0, 1, 0.75]]), (H, W)).flatten(1)
ALL = [Rules(*which) for which in itertools.product((False, True), repeat=4)]


def by_entry(rules):
    """The table, entry by entry: what a rule closes for an instance, and what some instance opens again."""
    text, n = [0] * 3 + [1] * 2 + [2] * 4, sum(TEXTS) + H * W
    out = torch.ones(n, n, dtype=torch.bool)
    for row in range(n):
        for key in range(n):
            row_text, key_text = row < len(text), key < len(text)
            within = [i for i in (1, 2) if (text[row] == i if row_text else REGIONS[i - 1, row - len(text)])]
            of_key = [i for i in (1, 2) if (text[key] == i if key_text else REGIONS[i - 1, key - len(text)])]
            rule = {
                (True, True): rules.t2t,
                (True, False): rules.t2i,
                (False, True): rules.i2t,
                (False, False): rules.i2i,
            }[row_text, key_text]
            if not within or not rule:
                continue
            opened = any(i in of_key for i in within)
            if not row_text and key_text and text[key] == 0:
                opened = not rules.i2i
            out[row, key] = opened
    return out


@pytest.mark.parametrize("rules", ALL, ids=lambda r: "".join("01"[x] for x in (r.i2i, r.i2t, r.t2i, r.t2t)))
def test_the_table_entry_by_entry(rules):
    layout = Layout(TEXTS, REGIONS)
    found, expected = layout_pattern(layout, rules).mask, by_entry(rules)
    assert torch.equal(found, expected)
    turned = torch.cat((torch.arange(9, 29), torch.arange(9)))
    assert torch.equal(layout_pattern(layout, rules, image_first=True).mask, expected[turned][:, turned])


@pytest.mark.parametrize("rules", ALL[::3], ids=repr)
def test_no_row_is_empty(rules):
    rng = torch.Generator().manual_seed(0)
    for _ in range(100):
        regions = torch.rand(3, H * W, generator=rng) < torch.rand(1, generator=rng)
        regions[0] = F.one_hot(torch.randint(H * W, (), generator=rng), H * W).bool()  # one place
        pattern = layout_pattern(Layout((2, 1, 1, 1), regions), rules)
        assert pattern.mask.any(1).all()
    q = torch.randn(1, 1, 5 + H * W, 4)
    assert ct.attention(q, q, q, grid=ct.Grid(n=5 + H * W), where=pattern).isfinite().all()


@pytest.mark.parametrize("rules", ALL[-1:] + ALL[7:8], ids=["all", "not i2i"])
def test_sparse_equals_dense(rules):
    grid, sizes = ct.Grid(n=3 * 20 + 24 * 24), (24, 24)
    corners = torch.tensor([[0.05, 0.1, 0.5, 0.9], [0.4, 0.3, 1.0, 0.8]])
    pattern = layout_pattern(Layout((20, 20, 20), layouts.boxes(corners, sizes).flatten(1)), rules)
    q, k, v = torch.randn(3, 1, 2, grid.size, 16, generator=torch.Generator().manual_seed(0))
    dense = F.scaled_dot_product_attention(q, k, v, attn_mask=pattern.mask)
    assert (ct.attention(q, k, v, grid=grid, where=pattern) - dense).abs().max() < 1e-5


def leak(model, layout, i2i):
    """The largest derivative of what is made in region 1 by text 2, and by text 1."""
    texts = [torch.randn(1, n, 32, requires_grad=True) for n in layout.texts]
    with control(model, ThreeDIS(layout, i2i=i2i)):
        out = model(torch.randn(1, H * W, 3), places(H, W), encoder_hidden_states=torch.cat(texts, 1))
    seen = out[:, layout.regions[0]]
    jacobian = [torch.autograd.grad(x, texts, retain_graph=True, allow_unused=True) for x in seen.flatten()]
    return [max(float(row[i].abs().max()) for row in jacobian) for i in (2, 1)]


def test_what_leaks_through_how_many_blocks():
    torch.manual_seed(0)
    layout = Layout((3, 2, 2), APART)
    one, two = Small(1, 0), Small(1, 1)
    other, own = leak(one, layout, i2i=1)
    assert other == 0 and own > 1e-4
    assert leak(one, layout, i2i=0)[0] == 0  # its text is hidden, and places have not yet met it
    assert leak(two, layout, i2i=1)[0] == 0
    other, own = leak(two, layout, i2i=0)
    assert other > 1e-5 and own > other


def test_each_rule_ends_at_its_step_of_a_sampling():
    torch.manual_seed(0)
    layout, model, text = Layout((3, 2, 2), APART), Small(1, 1), torch.randn(1, 7, 32)
    x, ends, times = torch.randn(1, H * W, 3), (2, 4, 3, 1), (1.0, 0.7, 0.4, 0.2, 0.1)

    def run(time):
        return model(x, places(H, W), torch.tensor([time]), text)

    with control(model, ThreeDIS(layout, *ends)):
        found = [run(time) for time in 2 * times]  # a second sampling begins again
    for step, time in enumerate(times):
        pattern = layout_pattern(layout, Rules(*(step < end for end in ends)))
        with ct.adapt.attach(model, where=pattern, grid=ct.Grid(n=27)):
            expected = run(time)
        assert torch.equal(found[step], expected) and torch.equal(found[step + len(times)], expected), step


def test_another_layout_than_the_model_has_is_refused():
    model = Small(1, 0)
    with (
        control(model, ThreeDIS(Layout((3, 2, 2), APART))),
        pytest.raises(ct.ChronotopeError, match=r"attentions.0: 28 queries look at 28 keys; this layout has 27 tokens"),
    ):
        model(torch.randn(1, H * W, 3), places(H, W), encoder_hidden_states=torch.randn(1, 8, 32))


@pytest.mark.parametrize("kind", ["flux", "sd3"])
def test_transformers_of_diffusers(kind):
    """In Flux texts come before the image, in SD 3 after it; region 1 is made without text 2 while i2i lasts."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    layout, text = Layout((3, 2, 2), APART), torch.randn(1, 7, 16)
    inputs = {"pooled_projections": torch.randn(1, 8), "timestep": torch.ones(1)}
    if kind == "flux":
        model = flux()
        inputs |= {"img_ids": F.pad(places(H, W), (1, 0)), "txt_ids": torch.zeros(7, 3)}
        inputs |= {"hidden_states": torch.randn(1, H * W, 4)}
    else:
        model = diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
            num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=8,
        ).eval()  # fmt: skip
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        inputs |= {"hidden_states": torch.randn(1, 4, H, W)}

    def run(text):
        out = model(**inputs, encoder_hidden_states=text).sample
        return (out if kind == "flux" else out.flatten(2).transpose(1, 2))[:, APART[0]]

    other = torch.cat((text[:, :5], torch.randn(1, 2, 16)), 1)
    with torch.no_grad():
        assert not torch.equal(run(text), run(other))
        with control(model, ThreeDIS(layout, i2i=1)):
            assert torch.equal(run(text), run(other))
        with control(model, ThreeDIS(layout, i2i=0)):
            assert not torch.equal(run(text), run(other))


class Painter(toys.Toy):
    """Told where something is, by a fourth channel, and by three texts which colours there are: of all, and of each."""

    def __init__(self) -> None:
        super().__init__("joint", dim=32, layers=2)
        self.enter = torch.nn.Conv2d(4, 32, 1)

    def told(self, depth, words):
        text = self.text(words.flatten(0, 1)).unflatten(0, words.shape[:2]).flatten(1, 2)
        return lambda x, t: self(torch.cat((x, depth), 1), t, text)


def scenes(count, rng, two=None):
    """Images of one or two boxes in two halves, masks [B, 2, 8, 8], words [B, 3 texts, 3], colours [B, 2]."""

    def draw(high, *more):
        return (torch.rand(count, *more, generator=rng) * high).long()

    colour = torch.rand(count, 4, generator=rng).argsort(1)[:, :2]
    upright, order, sides = draw(2), draw(2), 2 + draw(3, 2, 2)
    masks, cells = torch.zeros(count, 2, 8, 8, dtype=torch.bool), torch.arange(8)
    for i in range(2):
        across, along = sides[:, i].T
        half, free = 4 * ((order + i) % 2) + draw(5 - across), draw(9 - along)
        near = (cells >= half[:, None]) & (cells < (half + across)[:, None])
        far = (cells >= free[:, None]) & (cells < (free + along)[:, None])
        masks[:, i] = torch.where(
            upright[:, None, None] == 1, near[:, :, None] & far[:, None], far[:, :, None] & near[:, None]
        )
    both = torch.rand(count, generator=rng) < 0.5 if two is None else torch.full((count,), two)
    masks[:, 1] &= both[:, None, None]
    images = torch.einsum("bohw,boc->bchw", masks.float(), toys.COLOUR[colour])
    named, start = colour + toys.WORDS.index("red"), torch.ones(count, dtype=torch.long)
    named[:, 1] *= both
    whole = named * (torch.rand(count, 1, generator=rng) < 0.5) if two is None else named
    parts = [torch.stack((start, named[:, i], 0 * start), 1) for i in range(2)]
    return images, masks, torch.stack((torch.cat((start[:, None], whole), 1), *parts), 1), colour


def learn(seed, steps=1800, rate=4e-3):
    torch.manual_seed(seed)
    model, rng = Painter(), torch.Generator().manual_seed(seed)
    opt = torch.optim.AdamW(model.parameters(), rate)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        images, masks, words, _ = scenes(48, rng)
        opt.zero_grad()
        flow_loss(model.told(masks.any(1, keepdim=True).float(), words), images, generator=rng).backward()
        opt.step()
        course.step()
    return model.requires_grad_(False)


def own_colours(model, masked, layouts=20, each=10):
    """The share of images whose boxes both have, in most of their places, the colour of their own text."""
    right, rng = [], torch.Generator().manual_seed(1000)
    for _ in range(layouts):
        _, masks, _, _ = scenes(1, rng, two=True)
        _, _, words, colour = scenes(each, rng, two=True)
        noise = torch.randn(each, 3, 8, 8, generator=rng)
        told = model.told(masks.any(1, keepdim=True).float().expand(each, -1, -1, -1), words)
        rule = ThreeDIS(Layout((3, 3, 3), masks[0].flatten(1)))
        with control(model, rule, layers="blocks.*") if masked else contextlib.nullcontext():
            seen = toys.labels(flow_sample(told, noise, steps=20))
        inside = (seen[:, None] == colour[..., None, None]) & masks
        right.append((2 * inside.sum((2, 3)) > masks.sum((2, 3))).all(1))
    return float(torch.cat(right).float().mean())


@pytest.mark.slow
def test_two_boxes_get_their_own_colours(one_thread):
    """Taught without a mask, on layouts at random: nothing but the mask says whose text is whose."""
    model = learn(seed=0)
    assert own_colours(model, masked=True) > 0.9
    assert own_colours(model, masked=False) < 0.6
