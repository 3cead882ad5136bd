"""DreamRenderer (system 141): three masks, regions made as if alone, what leaks without copies, what copies cost."""

import itertools

import pytest
import torch
from _joint import Small, flux, flux_ids, places
from torch import nn

import chronotope as ct
from chronotope.adapt import Control, control
from chronotope.papers.control import layouts
from chronotope.papers.control.dream_renderer import (
    MODES,
    Bridged,
    DreamRenderer,
    append_tokens,
    binding_pattern,
    bridged,
    drop_tokens,
)
from chronotope.papers.control.roles import Layout, by_roles, seen_by

H, W = 4, 5
FIRST, SECOND = torch.zeros(2, H, W, dtype=torch.bool)
FIRST[0:3, 0:3], SECOND[1:4, 2:5] = True, True  # they share two places
OVERLAP = torch.stack((FIRST, SECOND)).flatten(1)
APART = layouts.boxes(torch.tensor([[0.0, 0, 0.4, 1], [0.6, 0, 1, 0.75]]), (H, W)).flatten(1)
TEXTS = (3, 2, 4)


def by_entry(regions, copies, mode, whole):
    """The mask, entry by entry, from what the method says of each kind of token."""
    kinds = [("text", i) for i, size in enumerate(TEXTS) for _ in range(size)]
    kinds += [("image", p) for p in range(H * W)]
    kinds += [("copy", i) for i in range(3) for p in range(H * W) if copies[i, p]]

    def sees(query, key):
        (a, i), (b, j) = query, key
        if a in ("text", "copy"):
            if b == "image":
                return a == "text" and i == 0 and not whole
            return i == j
        mine = [r for r in (1, 2) if regions[r - 1, i]]
        if b == "copy":
            return False
        if b == "text":
            if not mine:
                return j == 0
            return j in mine or (j == 0 and mode == "soft")
        if not mine or mode in ("soft", "hard_text_only"):
            return True
        return any(regions[r - 1, j] for r in mine)

    return torch.tensor([[sees(q, k) for k in kinds] for q in kinds])


@pytest.mark.parametrize(("mode", "whole"), list(itertools.product(MODES, (False, True))))
def test_the_masks_entry_by_entry(mode, whole):
    layout = bridged(Layout(TEXTS, OVERLAP), whole=whole)
    found, expected = binding_pattern(layout, mode).mask, by_entry(OVERLAP, layout.copies, mode, whole)
    assert torch.equal(found, expected) and found.any(1).all()
    n, text = len(found), sum(TEXTS)
    turned = torch.cat((torch.arange(text, n), torch.arange(text)))
    assert torch.equal(binding_pattern(layout, mode, image_first=True).mask, expected[turned][:, turned])
    with pytest.raises(ct.ChronotopeError, match="'firm'; expected one of soft, hard, hard_text_only"):
        binding_pattern(layout, "firm")


def run(model, layout, x, ids, texts, **keywords):
    """What is made at each place [h w, 3]."""
    bridge = Bridged(model, layout, ids="same")
    with control(bridge, DreamRenderer(layout, **keywords)):
        return bridge(hidden_states=x, img_ids=ids, encoder_hidden_states=torch.cat(texts, 1))[0]


@pytest.mark.parametrize(("double", "single"), [(1, 0), (2, 0), (1, 2), (2, 4)])
@pytest.mark.parametrize("whole", [False, True])
def test_hard_everywhere_each_region_is_made_as_if_alone(double, single, whole):
    torch.manual_seed(0)
    model, regions = Small(double, single), torch.eye(4).bool()[torch.randint(4, (H * W,))].T[:3]
    layout = bridged(Layout((3, 2, 4, 1), regions), whole=whole)
    x, ids, texts = torch.randn(1, H * W, 3), places(H, W), [torch.randn(1, n, 32) for n in layout.texts]
    together = run(model, layout, x, ids, texts, vital=range(6))
    for i, region in enumerate(regions):
        here = int(region.sum())
        alone = bridged(Layout((0, layout.texts[i + 1]), torch.ones(1, here, dtype=torch.bool)))
        own = run(model, alone, x[:, region], ids[region], [texts[0][:, :0], texts[i + 1]], vital=range(6))
        assert (together[region] - own).abs().max() < 1e-5
    soft = run(model, layout, x, ids, texts, vital=())
    assert (together - soft).abs().max() > 1e-2


class Uncopied(Control):
    """Hard binding where texts look at the image itself, for want of copies."""

    def __init__(self, layout):
        def sees(q, k):
            if q.kind == "image":
                return not q.of.isdisjoint(k.of) if q.of else k.kind == "image" or 0 in k.of
            return k.kind == "image" or q == k

        self.pattern = by_roles(layout.roles(), sees)

    def asks(self, at, asked):
        return seen_by(asked, self.pattern)


def test_without_copies_regions_are_not_apart():
    torch.manual_seed(0)
    model, layout = Small(2, 4), Layout((3, 2, 4), APART)
    x, ids, texts = torch.randn(1, H * W, 3), places(H, W), [torch.randn(1, n, 32) for n in layout.texts]

    def uncopied(layout, x, ids, texts):
        with control(model, Uncopied(layout)):
            return model(x, ids, encoder_hidden_states=torch.cat(texts, 1))[0]

    region = APART[0]
    alone = Layout((0, 2), torch.ones(1, int(region.sum()), dtype=torch.bool))
    parts = x[:, region], ids[region], [texts[0][:, :0], texts[1]]
    error = (uncopied(layout, x, ids, texts)[region] - uncopied(alone, *parts)).abs().max()
    assert error > 1e-2
    with_copies = run(model, bridged(layout), x, ids, texts, vital=range(6))[region]
    assert (with_copies - run(model, bridged(alone), *parts, vital=range(6))).abs().max() < 1e-5


def leak(model, **keywords):
    """The largest derivative of what is made in region 1 by text 2."""
    layout = bridged(Layout((3, 2, 4), APART))
    texts = [torch.randn(1, n, 32, requires_grad=True) for n in layout.texts]
    out = run(model, layout, torch.randn(1, H * W, 3), places(H, W), texts, **keywords)[APART[0]]
    rows = [torch.autograd.grad(y, texts[2], retain_graph=True, allow_unused=True)[0] for y in out.flatten()]
    return max(0.0 if row is None else float(row.abs().max()) for row in rows)


def test_soft_binding_leaks_over_two_layers_and_hard_binding_never():
    torch.manual_seed(0)
    assert leak(Small(1, 0), vital=()) == 0
    assert leak(Small(1, 1), vital=()) > 1e-5
    assert leak(Small(1, 1), vital=range(2)) == 0
    assert leak(Small(1, 1), vital=range(2), hard_steps=0) > 1e-5  # its text alone, but all places


def test_modes_by_layer_and_step():
    layout = bridged(Layout((3, 2, 4), APART))
    control = DreamRenderer(layout)
    assert [control.mode(layer, 0) for layer in (0, 18, 19, 37, 38, 56)] == ["soft"] * 2 + ["hard"] * 2 + ["soft"] * 2
    assert [control.mode(19, step) for step in (0, 19, 20)] == ["hard", "hard", "hard_text_only"]
    assert DreamRenderer(layout, vital=(3,), hard_steps=1).mode(3, 1) == "hard_text_only"


class Noted(Control):
    """Which masks the layers got."""

    def __init__(self):
        self.seen = []

    def asks(self, at, asked):
        self.seen.append((at.index, at.step, asked.where))
        return asked


def test_the_schedule_on_a_model():
    torch.manual_seed(0)
    layout = bridged(Layout((3, 2, 4), APART))
    bridge, noted = Bridged(Small(1, 2), layout), Noted()
    with control(bridge, DreamRenderer(layout, vital=(1,), hard_steps=1), noted):
        for time in (1.0, 0.5):
            x, text = torch.randn(1, H * W, 3), torch.randn(1, 9, 32)
            bridge(x, places(H, W), torch.tensor([time]), encoder_hidden_states=text)
    modes = [next(m for m in MODES if where == binding_pattern(layout, m)) for _, _, where in noted.seen]
    assert [(layer, step) for layer, step, _ in noted.seen] == [(i, step) for step in (0, 1) for i in range(3)]
    assert modes == ["soft", "hard", "soft", "soft", "hard_text_only", "soft"]


@pytest.mark.parametrize("whole", [False, True])
def test_what_copies_cost(whole):
    layout = bridged(Layout(TEXTS, OVERLAP), whole=whole)
    extra = int(OVERLAP.sum()) + whole * H * W
    tokens = sum(TEXTS) + H * W
    assert len(layout.copied) == extra and binding_pattern(layout, "soft").mask.shape == (tokens + extra,) * 2
    x = torch.randn(1, H * W, 3)
    longer = append_tokens(x, layout.copied)
    assert longer.shape[1] == H * W + extra and torch.equal(drop_tokens(longer, extra), x)
    assert torch.equal(longer[:, H * W + whole * H * W :], torch.cat([x[:, region] for region in OVERLAP], 1))


def test_copies_of_boxes_beside_masks_of_regions():
    """A region may have any outline; what is copied for its text is the box around it, from its own corner."""
    outline = torch.tensor([[0, 1, 0, 0], [1, 1, 1, 0], [0, 1, 0, 0]]).bool().flatten()[None]
    box = layouts.boxes(torch.tensor([[0.0, 0, 0.75, 1]]), (3, 4)).flatten(1)
    layout = bridged(Layout((2, 2), outline), box)
    assert len(layout.copied) == 9
    ids = torch.cat((torch.zeros(12, 1), places(3, 4)), 1) + torch.tensor([0.0, 5, 7])
    corner = Bridged(nn.Identity(), layout).positions(ids)
    assert torch.equal(corner[:12], ids) and torch.equal(corner[12:, 1:], places(3, 3))
    assert torch.equal(Bridged(nn.Identity(), layout, ids="same").positions(ids)[12:], ids[box[0]])


@pytest.mark.parametrize("positions", ["corner", "same"])
def test_a_flux_transformer_of_diffusers(positions):
    pytest.importorskip("diffusers")
    torch.manual_seed(0)
    layout, model = bridged(Layout((3, 2, 2), APART)), flux(1, 2)
    x, text = torch.randn(1, H * W, 4), torch.randn(1, 7, 16)
    same = {"pooled_projections": torch.randn(1, 8), "timestep": torch.ones(1)}
    bridge = Bridged(model, layout, positions)

    def made(bridge, layout, x, ids, text):
        given = same | {"txt_ids": torch.zeros(text.shape[1], 3), "return_dict": False}
        with torch.no_grad(), control(bridge, DreamRenderer(layout, vital=range(3))):
            return bridge(hidden_states=x, img_ids=ids, encoder_hidden_states=text, **given)[0]

    ids, region = flux_ids(H, W), APART[0]
    found = made(bridge, layout, x, ids, text)
    assert found.shape == x.shape
    alone = bridged(Layout((0, 2), torch.ones(1, int(region.sum()), dtype=torch.bool)))
    own = made(Bridged(model, alone, positions), alone, x[:, region], ids[region], text[:, 3:5])
    assert (found[:, region] - own).abs().max() < 1e-5 * own.abs().max()
    with torch.no_grad():
        free = bridge(
            hidden_states=x, img_ids=ids, encoder_hidden_states=text, txt_ids=torch.zeros(7, 3), **same
        ).sample
    assert free.shape == x.shape and (free - found).abs().max() > 1e-2


def test_a_layout_without_copies_is_refused():
    layout = Layout((2, 2), torch.ones(1, 4, dtype=torch.bool))
    with pytest.raises(ct.ChronotopeError, match="copies nothing"):
        Bridged(nn.Identity(), layout)
    with pytest.raises(ct.ChronotopeError, match=r"\[1, 5, 3\]; the layout has 4 places"):
        Bridged(nn.Identity(), bridged(layout))(torch.zeros(1, 5, 3))
