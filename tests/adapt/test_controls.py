"""Controls: what they see, in which order, where, when, and what it costs where they are not."""

from __future__ import annotations

import gc
import importlib
import inspect
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from plain import GRID, WHERE, C, Edit, N, Out, Own, Stack, masked, near, nothing_is_left, shown_by  # noqa: F401
from torch import Tensor, nn

import chronotope as ct
from chronotope.adapt import Asked, At, Capture, Control, attach, control, solve
from chronotope.errors import ChronotopeError


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever makes N x N weights is caught."""

    def caught(asked: Asked) -> Tensor:
        raise AssertionError("weights were made")

    monkeypatch.setattr(solve, "_weights", caught)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(["asks", "scores", "weights", "out"]), st.integers(-3, 3)), max_size=6),
    st.integers(0, 3),
)
def test_controls_act_one_after_the_other(edits: list[tuple[str, int]], cut: int) -> None:
    """x -> 2 x + c in turn, whether they came with one handle or with several: first to last in each place."""
    model, x = Own(), torch.randn(2, N, C, dtype=torch.float64)
    model.double()

    def on(place: str, c: int) -> Edit:
        if place == "asks":
            return Edit(asks=lambda at, asked: asked.but(v=2 * asked.v + c))
        return Edit(**{place: lambda at, value: 2 * value + c})

    own = [on(*edit) for edit in edits]
    with control(model, *own[:cut]), control(model, *own[cut:]):
        found = model(x)
    q, k, v = model.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)

    def through(place: str, value: Tensor) -> Tensor:
        for name, c in edits:
            value = 2 * value + c if name == place else value
        return value

    weights = through("weights", through("scores", q @ k.mT / 8**0.5).softmax(-1))
    out = weights @ through("asks", v)
    # Handles are left in the order in which they were met, so the last is nearest to the layer.
    for part in (edits[cut:], edits[:cut]):
        for name, c in part:
            out = 2 * out + c if name == "out" else out
    near(found, model.out(out.transpose(1, 2).flatten(2)), 1e-10)


def test_nobody_else_pays(no_weights: None) -> None:
    """Layers that are not named, steps that are not due, and controls that look at no weights hold none."""
    model, x = Stack(3), torch.randn(1, N, C)
    plain = model(x)
    with control(model, Edit(), layers="blocks.1"), pytest.raises(AssertionError, match="weights were made"):
        model(x)
    with control(model, Edit(), layers=lambda name: False), control(model, Capture(), steps=range(5, 7)):
        assert torch.equal(model(x), plain)
    with control(model, Out(0.0)):
        near(model(x), plain)
    near(model(x), plain)


def test_only_the_layers_that_are_named() -> None:
    model, x = Stack(3), torch.randn(1, N, C)
    capture = Capture()
    with control(model, capture, layers=["*.0", "blocks.2"]):
        model(x)
        model(x)
    assert {key: len(kept) for key, kept in capture.kept.items()} == {
        ("blocks.0", 0): 1, ("blocks.2", 0): 1, ("blocks.0", 1): 1, ("blocks.2", 1): 1,
    }  # fmt: skip
    capture.clear()
    assert not capture.kept
    with pytest.raises(ChronotopeError, match="names no attention layer"):
        control(model, capture, layers="blocks.3")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("heads", [[0], [1], [-1], [0, 1], [], range(1)])
def test_only_the_heads_that_are_named(heads: Any) -> None:
    """Also where what is given is changed in place."""
    model, x = Own(), torch.randn(2, N, C)
    touched = torch.zeros(2, dtype=torch.bool)
    touched[list(heads)] = True

    def zero(at: At, value: Tensor) -> Tensor:
        value[..., 0] = 0
        return value

    q, k, v = model.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
    scores = q @ k.mT / 8**0.5
    for place in ("scores", "weights", "out", "asks"):
        changed, value, out = scores.clone(), v, None
        if place == "scores":
            changed[:, touched, :, 0] = 0
        weights = changed.softmax(-1)
        if place == "weights":
            weights = weights.clone()
            weights[:, touched, :, 0] = 0
        if place == "asks":
            value = torch.where(touched[:, None, None], -v, v)
        out = weights @ value
        if place == "out":
            out = out.clone()
            out[:, touched, :, 0] = 0
        edit = {place: (lambda at, asked: asked.but(v=-asked.v)) if place == "asks" else zero}
        with torch.no_grad(), control(model, Edit(**edit), heads=heads):
            near(model(x), model.out(out.transpose(1, 2).flatten(2)))


def test_heads_of_grouped_keys() -> None:
    """A query head whose keys others share gets keys of its own."""
    layer, x = ct.nn.Attention(C, 4, kv_heads=2), torch.randn(1, N, C)
    capture = Capture()
    with control(layer, Edit(asks=lambda at, asked: asked.but(k=asked.k * 0)), heads=[1]), control(layer, capture):
        layer(x, GRID)
    ((weights,),) = capture.kept.values()
    near(weights[:, 1], torch.full((1, N, N), 1 / N))
    q, k, _ = layer.project(x, GRID)
    near(weights[:, 0], (q[:, 0] @ k[:, 0].mT / 2).softmax(-1))


def test_what_heads_cannot_have_apart_is_refused() -> None:
    model, x = Own(), torch.randn(1, N, C)
    for change in ({"scale": 0.5}, {"mask": torch.zeros(1, 1, N, N)}):
        halved = Edit(asks=lambda at, asked, change=change: asked.but(**change))
        with control(model, halved, heads=[0]), pytest.raises(ChronotopeError, match="of all heads; control all heads"):
            model(x)
    fewer = Edit(asks=lambda at, asked: asked.but(k=asked.k[:, :, :3], v=asked.v[:, :, :3]))
    with control(model, fewer, heads=[0]), pytest.raises(ChronotopeError, match="how many keys there are"):
        model(x)
    with control(model, Edit(), heads=[2]), pytest.raises(ChronotopeError, match="this layer has 2"):
        model(x)


@pytest.mark.parametrize("kind", ["own", "ours", "multi"])
def test_what_a_layer_asks_for_may_be_changed(kind: str) -> None:
    """Scale, mask, queries, keys and values: with weights in memory or without, the same."""
    layer = {"own": Own(), "ours": ct.nn.Attention(C, 2), "multi": nn.MultiheadAttention(C, 2, batch_first=True)}[kind]
    x = torch.randn(1, N, C)

    def run() -> Tensor:
        out = {"own": lambda: layer(x), "ours": lambda: layer(x, GRID), "multi": lambda: layer(x, x, x)[0]}[kind]()
        return out.detach()

    class Ask(Control):
        def __init__(self, **changes: Any):
            self.changes = changes

        def asks(self, at: At, asked: Asked) -> Asked:
            return asked.but(**{name: change(asked) for name, change in self.changes.items()})

    plain = run()
    for ask in (
        Ask(scale=lambda asked: 0.9),
        Ask(mask=lambda asked: shown_by(WHERE)[None, None]),
        Ask(mask=lambda asked: torch.linspace(-2, 2, N)[None, None, None]),
        Ask(q=lambda asked: asked.q.flip(2)),
        Ask(k=lambda asked: asked.k + 1, v=lambda asked: asked.v.flip(1)),
    ):
        with control(layer, ask):
            found = run()
        with control(layer, ask, Capture()):
            near(run(), found)
        assert float((found - plain).abs().max()) > 1e-3
    with control(layer, Ask(mask=lambda asked: shown_by(WHERE)[None, None])):
        found = run()
    with attach(layer, WHERE, grid=GRID):
        near(run(), found)


def test_a_mask_beside_a_bias_of_coordinates() -> None:
    layer, x = ct.nn.Attention(C, 2, where=ct.along("w"), bias=ct.Alibi(2)), torch.randn(1, N, C)

    class Hide(Control):
        def asks(self, at: At, asked: Asked) -> Asked:
            return asked.but(mask=shown_by(WHERE | ct.window(w=1))[None, None])

    with control(layer, Hide()):
        found = layer(x, GRID)
    layer.where = ct.along("w") & (WHERE | ct.window(w=1))
    near(found, layer(x, GRID))


@pytest.mark.parametrize("first", [True, False])
def test_what_a_pattern_hides_is_minus_infinity(first: bool) -> None:
    """And the grid is that of the pattern, whichever handle came first."""
    model, x = Stack(), torch.randn(1, N, C)
    hidden: list[Tensor] = []
    look = Edit(scores=lambda at, scores: hidden.append(scores == -torch.inf) or scores)
    with masked(shown_by(WHERE)):
        expected = model(x)
    handles = [attach(model, WHERE, grid=GRID)] if first else []
    handles.append(control(model, look))
    handles += [] if first else [attach(model, WHERE, grid=GRID)]
    near(model(x), expected)
    assert all(torch.equal(one, ~shown_by(WHERE).expand_as(one)) for one in hidden) and len(hidden) == 2
    assert {at.grid for at in look.met} == {GRID}
    for handle in handles:
        handle.remove()
    assert not any(module._forward_hooks for module in model.modules())


def test_a_route_decides_before_scores_are_edited() -> None:
    layer, x = ct.nn.Attention(C, 2), torch.randn(2, N, C)
    where = ct.route.top_blocks(keep=1, h=1, w=2)
    q, k, _ = layer.project(x, GRID)
    hidden: list[Tensor] = []
    with attach(layer, where), control(layer, Edit(scores=lambda at, s: hidden.append(s == -torch.inf) or s)):
        found = layer(x, GRID)
    assert torch.equal(~hidden[0], where.select(q, k, GRID))
    layer.where = where
    near(found, layer(x, GRID))


def test_rows_of_weights_sum_to_one_and_blind_rows_to_zero() -> None:
    model, x, capture = Own(), torch.randn(1, N, C), Capture()
    with attach(model, ct.sinks(1) & ct.causal(strict=True), grid=GRID), control(model, capture):
        out = model(x)
    (weights,) = capture.kept["", 0]
    assert torch.equal(weights.sum(-1).round(decimals=5), torch.tensor([0.0] + [1.0] * (N - 1)).expand(1, 2, N))
    near(out[:, 0], model.out.bias.expand(1, C))


def test_tokens_without_a_place() -> None:
    """Rows and columns of text are those of the model, before the grid or after it."""
    grid = ct.Grid(prefix=2, h=2, w=5)
    model, x, look = Own(), torch.randn(1, N, C), Edit()
    with control(model, look, grid=grid):
        model(x)
    (at,) = look.met
    assert (at.grid, at.text, at.layer, at.index, at.crossed) == (grid, slice(0, 2), "", 0, False)


def test_text_after_the_grid(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a pattern beside it or without, scores and weights are in the order of the model."""
    module, places = importlib.import_module("chronotope.adapt.attach"), ct.Grid(h=2, w=5)
    monkeypatch.setattr(module, "lie_of", lambda *given: module.Lie(places, "after"))
    model, x = Own(), torch.randn(1, N, C)
    met: list[tuple[At, Tensor]] = []
    look = Edit(weights=lambda at, weights: met.append((at, weights)) or weights)
    where = ct.window(h=1, w=3)
    shown = shown_by(where, ct.Grid(prefix=2, h=2, w=5)).roll((-2, -2), (0, 1))
    with control(model, look):
        plain = model(x)
    near(plain, model(x))
    with control(model, look), attach(model, where):
        found = model(x)
    with masked(shown):
        near(found, model(x))
    with attach(model, where):
        near(model(x), found)
    for at, weights in met:
        assert at.text == slice(10, 12) and at.grid == ct.Grid(prefix=2, h=2, w=5)
        assert at.text.indices(N) == (10, 12, 1) and weights.shape == (1, 2, N, N)
    assert torch.equal(met[1][1][0, 0] > 0, shown)


# What they bring


def test_gradients_flow_through_what_is_captured() -> None:
    """A loss on weights reaches the inputs, as in torch."""
    layer, x = nn.MultiheadAttention(C, 2, batch_first=True), torch.randn(1, N, C)
    target = torch.rand(1, N, N)
    grads = []
    for captured in (True, False):
        given = x.clone().requires_grad_()
        capture = Capture(reduce=lambda weights: weights.mean(1), grad=True)
        with control(layer, capture):
            _, weights = layer(given, given, given)
        weights = capture.kept["", 0][0] if captured else weights
        ((weights - target) ** 2).sum().backward()
        grads.append(given.grad)
    near(*grads)
    with control(layer, capture := Capture()):
        layer(given, given, given)
    assert not capture.kept["", 0][0].requires_grad


def test_what_is_captured_does_not_change_after() -> None:
    model, x, capture = Own(), torch.randn(1, N, C), Capture()

    def zero(at: At, weights: Tensor) -> Tensor:
        return weights.zero_()

    with torch.no_grad(), control(model, capture, Edit(weights=zero), (after := Capture())):
        near(model(x), model.out.bias.expand(1, N, C))
    near(capture.kept["", 0][0].sum(-1), torch.ones(1, 2, N))
    assert not after.kept["", 0][0].any()


def test_cross_attention_is_seen_with_its_own_keys() -> None:
    """Of torch, where memory is longer, and of our own, where it lies on another grid."""
    decoder = nn.TransformerDecoderLayer(C, 2, 32, 0.0, batch_first=True)
    x, memory = torch.randn(1, N, C), torch.randn(1, 5, C)
    look = Edit()
    with control(decoder, look, capture := Capture()):
        found = decoder(x, memory)
    near(found, decoder(x, memory))
    assert [at.crossed for at in look.met] == [False, True] and look.met[1].grid is None
    assert capture.kept["multihead_attn", 0][0].shape == (1, 2, N, 5)
    layer, other = ct.nn.Attention(C, 2, where=ct.window(h=1), bias=ct.RelativeBias(2, h=1)), ct.Grid(h=3, w=2)
    nn.init.normal_(layer.bias.table)
    context = (torch.randn(1, 6, C), other)
    with control(layer, capture := Capture()):
        found = layer(x, GRID, context)
    near(found, layer(x, GRID, context))
    (weights,) = capture.kept["", 0]
    assert torch.equal(weights[0, 0] > 0, ct.plan(ct.window(h=1), GRID, other).mask())


def test_layers_of_one_call_share_a_memo() -> None:
    model, x = Stack(2), torch.randn(1, N, C)
    seen: list[list[str]] = []

    def note(at: At, asked: Asked) -> Asked:
        at.memo.setdefault("names", []).append(at.layer)
        seen.append(list(at.memo["names"]))
        return asked

    with control(model, Edit(asks=note)):
        model(x)
        model(x)
    assert seen == [["blocks.0"], ["blocks.0", "blocks.1"]] * 2


def test_a_control_may_be_made_without_a_class() -> None:
    model, x, one = Own(), torch.randn(1, N, C), Control()
    one.weights = lambda at, weights: torch.zeros_like(weights)  # type: ignore[method-assign]
    with control(model, one):
        near(model(x), model.out.bias.expand(1, N, C))


def test_what_is_no_control_is_refused() -> None:
    with pytest.raises(ChronotopeError, match=r"is not a control: derive it from ct.adapt.Control"):
        inspect.unwrap(control)(Own(), lambda at, weights: weights)


def test_nothing_is_kept_of_a_model() -> None:
    model, capture = Stack(), Capture(reduce=lambda weights: weights.mean())
    handle = control(model, capture)
    model(torch.randn(1, N, C))
    handle.remove()
    gone = weakref.ref(model)
    del model, handle
    gc.collect()
    assert gone() is None
