"""The predictor: where it starts, what it may know, streaming, swapping patterns, saving."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import chronotope as ct
from chronotope import Grid
from chronotope.errors import ChronotopeError
from chronotope.models.predictor import Predictor

GRID = Grid(t=5, h=2, w=3)
PATTERNS = [
    ct.full(),
    ct.window(t=3, h=3, w=3),
    ct.along("t"),
    ct.along("h", "w"),
    ct.blocks(t=2, h=2, w=2),
    ct.blocks(h=2, w=2, shift={"h": 1, "w": 1}),
    ct.sinks(4) | ct.window(t=3),
    ct.per_head([ct.along("t"), ct.full()]),
]


def model(where=None, trained=True, **options):
    torch.manual_seed(0)
    out = Predictor(GRID, patch=2, dim=16, heads=2, layers=3, where=where, **options).double()
    if trained:
        torch.nn.init.normal_(out.head.project.weight)
    return out


def clips(batch=2, frames=5, channels=1, seed=0):
    return torch.rand(batch, frames, channels, 4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_untrained_model_repeats_the_last_frame():
    x = clips()
    untrained = model(trained=False)
    assert torch.equal(untrained(x), x)
    torch.testing.assert_close(untrained.loss(x), (x[:, 1:] - x[:, :-1]).square().mean())


def test_loss_holds_each_prediction_against_the_frame_after():
    x, predictor = clips(), model()
    torch.testing.assert_close(predictor.loss(x), (predictor(x)[:, :4] - x[:, 1:]).square().mean())


@pytest.mark.parametrize("where", PATTERNS)
def test_nothing_of_the_future_reaches_a_prediction(where):
    predictor = model(where)
    x = clips()
    other = torch.cat((x[:, :3], clips(seed=1)[:, 3:]), 1)
    a, b = predictor(x), predictor(other)
    assert torch.equal(a[:, :3], b[:, :3]) and not torch.equal(a[:, 3:], b[:, 3:])


@settings(max_examples=25, deadline=None)
@given(
    where=st.lists(st.sampled_from(range(len(PATTERNS))), min_size=1, max_size=4),
    channels=st.integers(1, 2),
    frames=st.integers(1, 5),
)
def test_streaming_equals_forward(where, channels, frames):
    predictor = model([PATTERNS[i] for i in where], channels=channels)
    x = clips(frames=frames, channels=channels)
    with torch.no_grad():
        streamed = torch.stack(list(predictor.stream(x.unbind(1))), 1)
        torch.testing.assert_close(streamed, predictor(x), rtol=1e-9, atol=1e-9)


def test_the_state_of_a_window_stays_small():
    predictor = model(ct.window(t=(2, 0)))
    state = predictor.init_state(1)
    sizes = []
    for frame in clips(1).unbind(1):
        _, state = predictor.step(frame, state)
        sizes.append(state.nbytes)
    assert sizes[1] == sizes[-1] == 3 * 2 * 2 * 6 * 16 * 8 and sizes[0] == sizes[-1] // 2


def test_swapping_takes_turns_over_layers_and_is_undone():
    predictor = model(ct.full())
    x = clips()
    dense = predictor(x)
    before = predictor.swap([ct.along("t"), ct.along("h", "w")])
    assert before == [ct.full()] * 3
    assert predictor.where == [ct.along("t"), ct.along("h", "w"), ct.along("t")]
    assert [layer.where for layer in predictor.attentions()] == [p & ct.causal("t") for p in predictor.where]
    assert not torch.allclose(predictor(x), dense)
    predictor.swap(before)
    assert torch.equal(predictor(x), dense)
    with pytest.raises(RuntimeError, match="boom"), predictor.swapped(ct.window(t=1, h=1, w=1)) as inside:
        assert inside is predictor and not torch.allclose(inside(x), dense)
        raise RuntimeError("boom")
    assert torch.equal(predictor(x), dense)


def test_a_refused_swap_changes_nothing():
    predictor = model(ct.along("t"))
    for where, words in [
        (ct.window(x=3), "'x'"),
        ([], "list of one or more"),
        (["full"], "list of one or more"),
        (ct.per_head([ct.full()] * 3), "3 heads, the model has 2"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            predictor.swap(where)
    assert predictor.where == [ct.along("t")] * 3


def test_saving_and_loading(tmp_path):
    predictor = model([ct.window(t=3, h=3), ct.along("h", "w")], mlp="gelu", mlp_ratio=2.0)
    predictor.save_pretrained(tmp_path / "model")
    again = Predictor.from_pretrained(tmp_path / "model")
    assert again.where == predictor.where and again.grid == GRID
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == ["config.json", "model.safetensors"]
    x = clips()
    torch.testing.assert_close(again.double()(x), predictor(x))
    assert json.loads((tmp_path / "model" / "config.json").read_text())["where"][0] == "window(t=3, h=3)"
    with pytest.raises(ChronotopeError, match=r"config\.json"):
        Predictor.from_pretrained(tmp_path)
    predictor.swap(ct.predicate(lambda q, k: q.t == k.t))
    with pytest.raises(ChronotopeError, match="pattern"):
        predictor.save_pretrained(tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_other_sizes_run():
    predictor = model(ct.window(t=3, h=3))
    x = torch.rand(1, 7, 1, 8, 4, dtype=torch.float64)
    assert predictor(x).shape == x.shape


def test_qk_gives_what_meets():
    predictor = model(ct.along("t"))
    x, grid = predictor.embed(clips())
    q, k = predictor.attentions()[0].qk(x, grid)
    assert q.shape == k.shape == (2, 2, 30, 8)


def test_training_beats_repeating_the_last_frame():
    torch.manual_seed(0)
    start = torch.rand(16, 1, 1, 4, 6)
    x = torch.cat([start.roll(shift, -1) for shift in range(5)], 1)
    predictor = Predictor(GRID, patch=2, dim=32, heads=2, layers=2, where=ct.window(t=3))
    floor = predictor.loss(x).item()
    optimizer = torch.optim.AdamW(predictor.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = predictor.loss(x)
        loss.backward()
        optimizer.step()
    assert predictor.loss(x).item() < 0.5 * floor


def test_what_is_refused():
    for call, words in [
        (lambda: Predictor(Grid(h=2, w=2)), "axes t, h, w"),
        (lambda: Predictor(Grid(t=2, h=2, w=2, prefix=1)), "without prefix"),
        (lambda: Predictor(GRID, layers=0), "1 or more"),
        (lambda: Predictor(GRID, dim=30, heads=4), "multiple of heads"),
        (lambda: Predictor(GRID, dim=16, heads=4), "head of size 4"),
        (lambda: model().loss(clips(frames=1)), "2 frames or more"),
        (lambda: model()(clips()[..., :5]), "w=5"),
        (lambda: list(model().stream([clips()[:, 0, :, :, :4]])), "gives Grid"),
    ]:
        with pytest.raises(ChronotopeError, match=words):
            call()
