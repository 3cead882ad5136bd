"""RefAM (system 124): columns that are dropped, planted sinks, magnets, and pointing in a trained model."""

import pytest
import torch
import toys
from torch import nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.control.refam import (
    WordMaps,
    append_magnets,
    grounding_map,
    key_frames,
    redirected,
    renormalised,
    sink_words,
    top_points,
)


def logits(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("extra", [1, 5, 50])
def test_columns_that_are_dropped_change_nothing_but_the_normaliser(extra):
    content, more = 3 * logits(2, 3, 4, 36, 4), 3 * logits(2, 3, 4, 36, extra, seed=1)
    keep = torch.tensor([True] * 4 + [False] * extra)
    alone = content.softmax(-1)
    among = torch.cat((content, more), -1).softmax(-1)
    assert (among[..., :4] - alone).abs().max() > 0.1
    again = renormalised(among, keep)
    assert (again[..., :4] - alone).abs().max() <= 1e-6
    assert (again[..., 4:] == 0).all()
    for word in range(4):
        one = torch.arange(4 + extra) == word
        found = grounding_map(again, one, (6, 6), sinks="leave")
        assert (found - grounding_map(alone, one[:4], (6, 6), sinks="leave")).abs().max() <= 1e-6


SIDE, WORDS = 16, 8
OBJECT, SINK = 2, 5


def pictures(count, planted, seed=0):
    """Maps [B, 2, 2, N, T], word 2 being looked at from a box and word 5 from everywhere, and the boxes [B, h, w]."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.randint(SIDE - 6, (count, 2, 1, 1), generator=rng)
    rows, columns = torch.arange(SIDE)[:, None], torch.arange(SIDE)
    inside = (
        (rows >= corner[:, 0]) & (rows < corner[:, 0] + 6) & (columns >= corner[:, 1]) & (columns < corner[:, 1] + 6)
    )
    scores = torch.randn(count, 2, 2, SIDE * SIDE, WORDS, generator=rng)
    scores = scores + 0.5 * torch.randn(count, 1, 1, 1, WORDS, generator=rng)
    scores[..., OBJECT] += 4 * inside.flatten(1)[:, None, None]
    if not planted:
        return scores.softmax(-1), inside
    others = scores.index_fill(-1, torch.tensor([SINK]), -torch.inf).softmax(-1)
    flat = 0.6 + 0.05 * torch.randn(count, 2, 2, SIDE * SIDE, generator=rng).clamp(-3, 3)
    maps = others * (1 - flat)[..., None]
    maps[..., SINK] = flat
    return maps, inside


def iou(heat, inside):
    """Of what is above half of the highest point."""
    found = heat > heat.flatten(1).amax(1)[:, None, None] / 2
    return (found & inside).sum((1, 2)) / (found | inside).sum((1, 2))


def test_a_planted_sink_is_found_and_nothing_else_in_a_thousand_draws():
    right = torch.arange(WORDS) == SINK
    keep = right | (torch.arange(WORDS) == OBJECT)
    before, after, redirect = [], [], []
    for part in range(10):
        assert not sink_words(pictures(100, planted=False, seed=part)[0]).any()
        maps, inside = pictures(100, planted=True, seed=100 + part)
        assert torch.equal(sink_words(maps), right.expand(100, 2, WORDS))
        before.append(iou(grounding_map(maps, keep, (SIDE, SIDE), sinks="leave"), inside))
        after.append(iou(grounding_map(maps, keep, (SIDE, SIDE)), inside))
        redirect.append(iou(grounding_map(maps, keep, (SIDE, SIDE), sinks="redirect"), inside))
    before, after, redirect = (torch.cat(x) for x in (before, after, redirect))
    print(f"IoU {before.mean():.3f}, without the sink {after.mean():.3f}, its flat part moved {redirect.mean():.3f}")
    assert before.max() <= 0.3
    assert after.mean() >= 0.6 and (after > before).all()
    assert redirect.mean() > before.mean()


def test_what_goes_to_a_sink_is_moved_and_not_lost():
    maps, _ = pictures(3, planted=True)
    magnets = torch.arange(WORDS) >= 6
    moved = redirected(maps, sink_words(maps), magnets)
    assert (moved.sum(-1) - 1).abs().max() <= 1e-5
    assert moved[..., SINK].amin() >= 0 and moved[..., SINK].mean() < 0.3
    assert torch.equal(moved[..., :5], maps[..., :5])
    assert (moved[..., 6] - maps[..., 6] - (moved[..., 7] - maps[..., 7])).abs().max() <= 1e-6
    with pytest.raises(ct.ChronotopeError, match="append magnets"):
        redirected(maps, sink_words(maps), magnets & False)
    with pytest.raises(ct.ChronotopeError, match="every word to keep is a sink"):
        grounding_map(maps, torch.arange(WORDS) == SINK, (SIDE, SIDE))
    with pytest.raises(ct.ChronotopeError, match="as many pixels as the size has"):
        grounding_map(maps, magnets, (SIDE, 4))


class Look(nn.Module):
    """Pixels that look at words as they are."""

    def forward(self, x, context):
        return sdpa(x[:, None], context[:, None], context[:, None], scale=1.0)[:, 0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Look()

    def forward(self, x, context):
        return self.attention(x, context)


def background_heat(magnets, seed):
    """Heat outside of the object's box, and its highest point, where each of 8 parts of the ground has a direction."""
    directions = torch.eye(12)
    part = torch.randint(8, (SIDE, SIDE), generator=torch.Generator().manual_seed(seed))
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[4:9, 6:12] = True
    pixels = torch.where(inside[..., None], directions[8], directions[part]).flatten(0, 1)
    pixels = pixels + 0.3 * logits(SIDE * SIDE, 12, seed=seed) / 12**0.5
    words, keep = append_magnets(["<s>", "the", "square"], magnets=["of"] * magnets)
    keys = torch.stack([directions[10], directions[9], directions[8], *directions[:magnets]]) * 3
    maps = WordMaps()
    model = Model()
    with ct.adapt.control(model, maps):
        model(pixels[None], keys[None])
    assert len(words) == maps.kept().shape[-1]
    heat = grounding_map(maps.kept()[0], keep, (SIDE, SIDE))
    assert inside[tuple(top_points(heat)[0].tolist())]
    return heat[~inside].mean()


def test_magnets_that_match_the_background_empty_it():
    for seed in range(20):
        heats = torch.stack([background_heat(m, seed) for m in (0, 2, 4, 8)])
        factor = heats[0] / heats
        assert (factor.diff() > 0.2).all()
    print("background heat falls by", [round(x, 2) for x in factor.tolist()])


def test_words_that_are_kept():
    words, keep = append_magnets(["<s>", "The", "red", "square", "on", "the", "left"])
    assert [word for word, kept in zip(words, keep.tolist(), strict=True) if kept] == ["red", "square", "left"]
    assert words[7:9] == ["the", "a"] and len(words) == len(keep) == 19


@pytest.mark.parametrize("form", ["joint", "cross"])
def test_maps_are_the_weights_of_pixels_to_words_and_the_model_is_as_it_was(form):
    torch.manual_seed(0)
    model = toys.Toy(form).eval()
    for block in model.blocks:  # what is zero at first would make all layers alike
        nn.init.normal_(block.steer.weight if form == "joint" else block.steer[0].modulation.weight, std=0.1)
    x, t, words = logits(2, 3, 8, 8), torch.tensor([0.3, 0.7]), toys.prompt("a red square", "the blue ring on the left")
    maps, every = WordMaps(), ct.adapt.Capture()
    with ct.adapt.control(model, maps, every, layers="blocks.*", grid=toys.JOINT if form == "joint" else None):
        out = model(x, t, words)
    assert (out - model(x, t, words)).abs().max() <= 1e-5
    looks = [w[0] for (name, _), w in every.kept.items() if "self_attention" not in name]
    expected = torch.stack(looks, 1)
    expected = expected[:, :, :, toys.LENGTH :, : toys.LENGTH] if form == "joint" else expected
    assert torch.equal(maps.kept(), expected)
    heat = grounding_map(maps.kept(), words[1] > 1, (8, 8), layers=[1])
    assert heat.shape == (2, 8, 8) and not heat.requires_grad
    if form == "joint":
        blind = WordMaps()
        with ct.adapt.control(model, blind, layers="blocks.*"):
            model(x, t, words)
        with pytest.raises(ct.ChronotopeError, match="no layer that looks at words"):
            blind.kept()


def test_clips_have_heat_in_time_and_key_frames():
    maps = torch.full((2, 1, 5 * 4 * 6, 3), 0.1)
    moving = torch.zeros(5, 4, 6)
    for t, height in enumerate((0.3, 0.2, 0.7, 0.5, 0.6)):
        moving[t, 1, t] = height
    maps[..., 2] += moving.flatten()
    heat = grounding_map(maps, torch.tensor([False, False, True]), (5, 4, 6))
    assert heat.shape == (5, 4, 6)
    assert key_frames(heat, 3).tolist() == [2, 3, 4]
    assert top_points(heat).tolist() == [[2, 1, 2]]
    assert [top_points(heat[t])[0].tolist() for t in range(5)] == [[1, t] for t in range(5)]


def test_points_are_apart():
    heat = torch.tensor([[9.0, 8.0, 0.0, 5.0], [7.0, 6.0, 1.0, 4.0]])
    assert top_points(heat, 2).tolist() == [[0, 0], [0, 3]]
    assert top_points(heat, 2, apart=0).tolist() == [[0, 0], [0, 1]]
    with pytest.raises(ct.ChronotopeError, match="no room"):
        top_points(heat, 3)


def pointing(maps, keep, masks):
    """How often the highest point of the heat lies in the object's box."""
    hits = 0
    for of_picture, words, mask in zip(maps, keep, masks, strict=True):
        point, box = top_points(grounding_map(of_picture, words, (8, 8)))[0], mask.nonzero()
        hits += bool(((point >= box.amin(0)) & (point <= box.amax(0))).all())
    return hits / len(maps)


def seen_at(model, images, time, words, grid=None):
    maps = WordMaps()
    noise = logits(*images.shape, seed=3)
    with torch.no_grad(), ct.adapt.control(model, maps, layers="blocks.*", grid=grid):
        model(time * images + (1 - time) * noise, torch.full((len(images),), time), words)
    return maps.kept()


@pytest.mark.slow
def test_a_trained_model_points_at_what_is_said(one_thread):
    model = toys.trained("cross")
    scene = toys.scenes(400, torch.Generator().manual_seed(1), objects=2)
    about = zip(scene.colour[:, 0].tolist(), scene.shape[:, 0].tolist(), scene.place[:, 0].tolist(), strict=True)
    texts = [f"the {toys.COLOURS[c]} {toys.SHAPES[s]} on the {toys.PLACES[p]}" for c, s, p in about]
    words = toys.prompt(*texts)
    names = [["<pad>" if word == 0 else toys.WORDS[word] for word in row] for row in words.tolist()]
    content = torch.stack([append_magnets(row, magnets=())[1] for row in names])
    for time in (0.5, 0.7, 0.9):
        maps = seen_at(model, scene.images, time, words)
        filtered, unfiltered = pointing(maps, content, scene.masks[:, 0]), pointing(maps, words > 1, scene.masks[:, 0])
        both = seen_at(model, scene.images, time, scene.words)  # the prompt speaks of two objects, one is meant
        meant = pointing(both, scene.spots[:, 0], scene.masks[:, 0])
        more = seen_at(model, scene.images, time, toys.prompt(*(f"{text} a and the on a and" for text in texts)))
        magnets = pointing(more, content, scene.masks[:, 0])
        print(f"{time}: {filtered}, with function words {unfiltered}, with magnets {magnets}, one of two {meant}")
        assert filtered >= 0.9 and filtered > unfiltered
        assert meant >= 0.9


@pytest.mark.slow
def test_joint_attention_points_less_well(one_thread):
    scene = toys.scenes(400, torch.Generator().manual_seed(1), objects=2)
    maps = seen_at(toys.trained("joint"), scene.images, 0.7, scene.words, toys.JOINT)
    found = pointing(maps, scene.spots[:, 0], scene.masks[:, 0])
    print(f"joint attention, 0.7: {found}")
    assert 9 / 64 < found < 0.5  # more than by chance; what the page says of it
