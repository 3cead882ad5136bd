"""Models of plain PyTorch, patched: against their own attention with the mask of the pattern."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, composite
from plain import DENSE, GRID, WHERE, C, N, Own, near, nothing_is_left, shown_by  # noqa: F401
from torch import Tensor, nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.adapt import Capture, attach, control
from chronotope.errors import ChronotopeError
from strategies import build, expressions, grids


@dataclass(frozen=True)
class Sdpa:
    """A call of scaled_dot_product_attention."""

    grid: ct.Grid
    text: str
    lead: tuple[int, ...]
    heads: int
    key_heads: int
    bare: bool
    kind: str
    seed: int


@composite
def sdpas(draw: DrawFn) -> Sdpa:
    grid = draw(grids(most=24))
    bare = draw(st.integers(0, 2)) == 0
    heads = 1 if bare else draw(st.sampled_from([1, 2, 4]))
    return Sdpa(
        grid,
        draw(expressions(grid, grid, depth=1)),
        tuple(draw(st.lists(st.integers(1, 3), min_size=0 if bare else 1, max_size=1 if bare else 3))),
        heads,
        draw(st.sampled_from([n for n in (1, 2, 4) if heads % n == 0])),
        bare,
        draw(st.sampled_from(["none", "causal", "bool", "float"])),
        draw(st.integers(0, 2**32 - 1)),
    )


class Call(nn.Module):
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return F.scaled_dot_product_attention(*args, **kwargs)


@settings(max_examples=80, deadline=None)
@given(sdpas())
def test_any_call_of_torchs_function(one: Sdpa) -> None:
    """Of any rank, with grouped heads, masks that broadcast in any dimension, causality and a scale."""
    rng, n = np.random.default_rng(one.seed), one.grid.size
    generator = torch.Generator().manual_seed(one.seed)

    def numbers(heads: int, broadcast: bool = False) -> Tensor:
        lead = tuple(1 if broadcast and rng.random() < 0.2 else size for size in one.lead)
        return torch.randn(*lead, *(() if one.bare else (heads,)), n, 4, generator=generator, dtype=torch.float64)

    q, k, v = numbers(one.heads), numbers(one.key_heads, True), numbers(one.key_heads, True)
    options: dict[str, Any] = {"enable_gqa": True} if one.heads != one.key_heads else {}
    if rng.random() < 0.5:
        options["scale"] = float(rng.uniform(0.1, 2))
    shown = shown_by(build(one.text), one.grid)
    hidden = torch.zeros(n, n, dtype=torch.float64).masked_fill(~shown, -torch.inf)
    if one.kind == "causal":
        options["is_causal"] = True
        hidden = hidden.masked_fill(~torch.ones_like(shown).tril(), -torch.inf)
    elif one.kind != "none":
        whole = (*q.shape[:-1], n)
        shape = [size if rng.random() < 0.6 else 1 for size in whole][int(rng.integers(0, len(whole) - 1)) :]
        given = torch.randn(shape, generator=generator, dtype=torch.float64)
        options["attn_mask"] = given > -0.5 if one.kind == "bool" else given
        hidden = hidden.masked_fill(~(given > -0.5), -torch.inf) if one.kind == "bool" else hidden + given
    more = {name: value for name, value in options.items() if name not in ("is_causal", "attn_mask")}
    expected = DENSE(q, k, v, hidden, **more)
    expected = expected.masked_fill((hidden == -torch.inf).all(-1, keepdim=True), 0.0)
    model = Call()
    with attach(model, build(one.text), grid=one.grid) as handle:
        out = model(q, k, v, **options)
    assert [bool(layer.done) for layer in handle.layers] == [True]
    assert out.shape == expected.shape and out.dtype == expected.dtype
    near(out, expected, 1e-11)
    assert torch.equal(model(q, k, v, **options), DENSE(q, k, v, **options))


def test_one_query_under_torchs_causality_sees_the_first_key() -> None:
    """Another sequence, so it is left alone; a control that only looks changes nothing."""
    q, k = torch.randn(1, 2, 1, 4), torch.randn(1, 2, 5, 4)
    expected = DENSE(q, k, k, is_causal=True)
    with control(model := Call(), Capture()):
        near(model(q, k, k, is_causal=True), expected)


# nn.MultiheadAttention


@dataclass(frozen=True)
class Multi:
    """A call of nn.MultiheadAttention."""

    batch_first: bool
    batch: int
    heads: int
    weights: bool
    average: bool
    values: int
    padding: str
    mask: str
    bias: bool
    training: bool
    seed: int


MULTIS = st.builds(
    Multi, st.booleans(), st.integers(0, 3), st.sampled_from([1, 2, 4]), st.booleans(), st.booleans(),
    st.sampled_from([0, 5]), st.sampled_from(["", "bool", "float"]),
    st.sampled_from(["", "bool", "float", "bool3", "float3"]), st.booleans(), st.booleans(), st.integers(0, 99),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(MULTIS)
def test_multi_head_attention(one: Multi) -> None:
    torch.manual_seed(one.seed)
    more = {"vdim": one.values} if one.values else {}
    layer = nn.MultiheadAttention(C, one.heads, batch_first=one.batch_first, bias=one.bias, **more).train(one.training)
    batch = () if one.batch == 0 else (one.batch, N) if one.batch_first else (N, one.batch)
    x = torch.randn(*(batch or (N,)), C)
    values = torch.randn(*(batch or (N,)), one.values) if one.values else x
    count = max(1, one.batch)
    rows = (count * one.heads, N, N) if one.mask.endswith("3") else (N, N)
    hides = torch.rand(rows) < 0.3
    mask = {"": None, "b": hides, "f": torch.randn(rows)}[one.mask[:1]]
    padded = torch.rand(count, N) < 0.2
    padded[:, 0] = False
    padding = {"": None, "bool": padded, "float": torch.randn(count, N)}[one.padding]
    padding = padding[0] if padding is not None and not one.batch else padding
    options = {"need_weights": one.weights, "average_attn_weights": one.average}
    # Torch warns of masks of two kinds.
    kinds = {x.dtype for x in (mask, padding) if x is not None}
    assume(len(kinds) < 2)
    # A query that sees nothing is NaN there: keep the first key in sight of all.
    shown = shown_by(WHERE | ct.sinks(1))
    if mask is not None and mask.dtype == torch.bool:
        mask[..., 0] = False
    hidden = torch.zeros(N, N).masked_fill(~shown, -torch.inf)
    joined = (
        hidden
        if mask is None
        else hidden + (torch.zeros(rows).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask)
    )
    soft = padding
    if padding is not None and padding.dtype == torch.bool:
        soft = torch.zeros(padding.shape).masked_fill(padding, -torch.inf)
    expected, seen = layer(x, x, values, key_padding_mask=soft, attn_mask=joined, **options)
    grad = nullcontext() if one.seed % 2 else torch.no_grad()
    with attach(layer, WHERE | ct.sinks(1), grid=GRID) as handle, grad:
        out, weights = layer(x, x, values, key_padding_mask=padding, attn_mask=mask, **options)
    assert handle.layers[0].done
    near(out, expected)
    assert (weights is None) == (seen is None)
    if seen is not None:
        near(weights, seen)


@pytest.mark.parametrize(
    ("options", "keys"),
    [
        ({"kdim": 6, "vdim": 5}, N),
        ({"add_bias_kv": True}, N + 1),
        ({"add_zero_attn": True, "add_bias_kv": True}, N + 2),
    ],
)
@pytest.mark.parametrize("hides", [False, True])
def test_keys_of_another_kind_are_left_alone_and_listed(options: dict[str, Any], keys: int, hides: bool) -> None:
    """A pattern says nothing of them; a control sees them."""
    layer = nn.MultiheadAttention(C, 2, batch_first=True, **options)
    x = torch.randn(1, N, C)
    given = (x, torch.randn(1, N, 6), torch.randn(1, N, 5)) if "kdim" in options else (x, x, x)
    padding = torch.arange(N)[None] > 8
    masks = {"attn_mask": torch.ones(N, N, dtype=torch.bool).triu(1), "key_padding_mask": padding} if hides else {}
    before, weights = layer(*given, average_attn_weights=False, **masks)
    told = f"12 queries look at {keys} keys of another sequence"
    with attach(layer, WHERE, grid=GRID), pytest.raises(ChronotopeError, match=told):
        layer(*given, **masks)
    with control(layer, capture := Capture()):
        near(layer(*given, **masks)[0], before)
    near(capture.kept["", 0][0], weights)
    assert torch.equal(layer(*given, **masks)[0], before)


def test_queries_and_keys_with_places_added_are_one_sequence() -> None:
    layer, x, places = nn.MultiheadAttention(C, 2, batch_first=True), torch.randn(1, N, C), torch.randn(1, N, C)
    placed = x + places
    hidden = ~shown_by(WHERE)
    expected = layer(placed, placed, x, attn_mask=hidden)[0]
    with attach(layer, WHERE, grid=GRID):
        near(layer(placed, placed, x)[0], expected)


def test_dropped_weights_are_refused() -> None:
    layer, x = nn.MultiheadAttention(C, 2, dropout=0.1, batch_first=True), torch.randn(1, N, C)
    with attach(layer, WHERE, grid=GRID):
        with pytest.raises(ChronotopeError, match=r"drops attention weights \(p=0.1\).*model.eval"):
            layer(x, x, x)
        layer.eval()(x, x, x)
    model = Own(dropout=0.2)
    with attach(model, WHERE, grid=GRID), pytest.raises(ChronotopeError, match=r"p=0\.2"):
        model(x)


# torch's own transformers


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("hides", ["", "padding", "causal", "mask"])
def test_an_encoder_by_every_path(grad: bool, training: bool, norm_first: bool, hides: str) -> None:
    """In eval without gradients torch has kernels of its own, which show no call of attention."""
    layer = nn.TransformerEncoderLayer(C, 2, 32, 0.0, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(training)
    x = torch.randn(2, N, C)
    hidden, options = ~shown_by(WHERE), {}
    causal = torch.ones(N, N, dtype=torch.bool).triu(1)
    if hides == "padding":
        padded = torch.zeros(2, N, dtype=torch.bool)
        padded[1, -1] = True
        options["src_key_padding_mask"] = padded
    elif hides == "causal":
        options |= {"mask": causal, "is_causal": True}
        hidden = hidden | causal
    elif hides == "mask":
        options["mask"] = causal.T
        hidden = hidden | causal.T
    padded = options.get("src_key_padding_mask")
    with torch.set_grad_enabled(grad):
        before = model(x, **options)
        expected = model(x, mask=hidden, src_key_padding_mask=padded)
        with attach(model, WHERE, grid=GRID) as handle:
            near(model(x, **options), expected, 4e-6)
        assert [layer.name for layer in handle.layers if layer.done] == ["layers.0.self_attn", "layers.1.self_attn"]
        with attach(model, ct.full(), grid=GRID):
            near(model(x, **options), before, 4e-6)
        assert torch.equal(model(x, **options), before)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_of_nested_tensors() -> None:
    layer = nn.TransformerEncoderLayer(C, 2, 32, 0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2).eval()
    x, padded = torch.randn(2, N, C), torch.zeros(2, N, dtype=torch.bool)
    padded[1, -3:] = True
    with torch.no_grad():
        before = model(x, src_key_padding_mask=padded)
        with attach(model, ct.full(), grid=GRID):
            near(model(x, src_key_padding_mask=padded)[~padded], before[~padded], 4e-6)


@pytest.mark.parametrize("keys", [N, N + 3])
def test_a_decoders_look_at_its_memory_is_left_and_listed(keys: int) -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(C, 2, 32, 0.0, batch_first=True), 2)
    x, memory = torch.randn(1, N, C), torch.randn(1, keys, C)
    expected = model(x, memory, tgt_mask=~shown_by(WHERE))
    with attach(model, WHERE, grid=GRID) as handle:
        near(model(x, memory), expected)
    assert [bool(layer.done) for layer in handle.layers] == [True, False] * 2
    assert f"{N} queries look at {keys} keys of another sequence" in handle.layers[1].why


def test_a_context_of_the_same_length_is_left() -> None:
    class Over(nn.Module):
        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            y = x if context is None else context
            return F.scaled_dot_product_attention(x[:, None], y[:, None], y[:, None])[:, 0]

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own, self.over = Over(), Over()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.over(self.own(x, context=x), y)

    model, (x, y) = Two(), torch.randn(2, 1, N, C)
    with attach(model, WHERE, grid=GRID) as handle:
        model(x, y)
    assert [bool(layer.done) for layer in handle.layers] == [True, False]


# Chronotope's own layers


def test_our_own_layers_join_their_pattern() -> None:
    """Also those with a bias, of every kind, and with routes."""
    x = torch.randn(2, N, C)
    for bias in (None, ct.RelativeBias(2, h=1, w=2), ct.Alibi(2)):
        layer = ct.nn.Attention(C, 2, where=ct.along("w"), bias=bias, position=ct.Rope(axes=("h", "w")))
        if isinstance(bias, ct.RelativeBias):
            nn.init.normal_(bias.table)
        model = ct.nn.Block([layer])
        plain = model(x, GRID)
        with attach(model, ct.window(w=3)) as handle:
            found = model(x, GRID)
        assert handle.layers[0].done == "window(w=3) on Grid(h=3, w=4)"
        layer.where = ct.along("w") & ct.window(w=3)
        near(found, model(x, GRID))
        layer.where = ct.along("w")
        assert torch.equal(model(x, GRID), plain)
        with attach(model, ct.full()):
            near(model(x, GRID), plain)


def test_our_own_layers_look_at_other_grids_as_before() -> None:
    layer, x, y = ct.nn.Attention(C, 2), torch.randn(1, N, C), torch.randn(1, 6, C)
    other = ct.Grid(h=2, w=3)
    before = layer(x, GRID, (y, other))
    with attach(layer, WHERE), pytest.raises(ChronotopeError, match="12 queries look at 6 keys of another sequence"):
        layer(x, GRID, (y, other))
    near(layer(x, GRID, (y, other)), before)


@pytest.mark.parametrize("shape", [(N,), (1, N), (2, 1, 1), (1, 2, N, 1)])
def test_biases_that_broadcast(shape: tuple[int, ...]) -> None:
    class Biased(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.randn(shape))

        def forward(self, x: Tensor) -> Tensor:
            return ct.attention(x, x, x, grid=GRID, where=ct.along("w"), bias=self.bias)

    model, x = Biased(), torch.randn(1, 2, N, 4)
    expected = ct.attention(x, x, x, grid=GRID, where=ct.along("w") & WHERE, bias=model.bias)
    with attach(model, WHERE) as handle:
        near(model(x), expected)
    assert handle.layers[0].done
