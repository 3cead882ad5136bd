"""MoH (system 95): the sum over heads, gates, skipped heads, the balance loss, and two kinds of tokens.

The authors' layer for images (commit 2cefd57 of SkyworkAI/MoH, MoH-DiT) with our weights, 2 x 50 tokens, 8 heads with 2
shared and 4 routed, 4 and 4, none and 3, and 24 with 16 and 3, 2026-11-21: largest difference of outputs of up to 17:
5.5e-6 in float32, 8.9e-16 in float64; of balance losses 0 and 2.8e-8 (theirs counts in float32). The heads that their
layer for language takes by the norms of queries are the same.
"""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.papers.score.moh import MoH, balances

GRID = ct.Grid(n=20)
ROPE = ct.Rope("n")


def numbers(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layers(shared=2, keep=4, router="linear", dim=64, heads=8, **options):
    """A layer of attention, and the mixture of its heads."""
    torch.manual_seed(0)
    dense = ct.nn.Attention(dim, heads, **options)
    return dense, MoH(copy.deepcopy(dense), shared, keep, router)


def test_with_routers_at_zero_and_all_heads_it_is_attention():
    for shared, options in [(2, {}), (0, {"where": ct.causal(), "position": ROPE}), (3, {"kv_heads": 2})]:
        dense, moh = layers(shared, 8 - shared, **options)
        for router in (moh.to_routed, moh.to_shared, moh.to_parts):
            if router is not None:
                nn.init.zeros_(router.weight)
        x = numbers(2, 20, 64)
        weight = moh.route(x).weight
        assert (weight - 1).abs().max() < 1e-6
        for gather in (False, True):
            moh.gather = gather
            assert (moh(x, GRID) - dense(x, GRID)).abs().max() < 1e-6
    dense, moh = layers(4, 4, "qnorm")
    assert torch.equal(moh(numbers(2, 20, 64), GRID), dense(numbers(2, 20, 64), GRID))


def heads_of(layer, x):
    """H_i of each head, [B, H, N, D], by the formula."""
    q, k = layer.qk(x, GRID)
    v = F.linear(x, layer.qkv.weight[-layer.kv_heads * layer.head_dim :]).unflatten(2, (layer.kv_heads, -1))
    v = v.transpose(1, 2).repeat_interleave(layer.heads // layer.kv_heads, 1)
    k = k.repeat_interleave(layer.heads // layer.kv_heads, 1)
    return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("router", ["linear", "qnorm"])
def test_the_projection_of_all_heads_is_the_sum_over_heads(router):
    dense, moh = layers(router=router)
    x = numbers(2, 20, 64)
    gates = moh.route(x).weight
    parts = heads_of(dense, x) * gates.transpose(1, 2)[..., None]
    total = sum(parts[:, i] @ dense.out.weight[:, i * 8 : i * 8 + 8].T for i in range(8))
    assert (moh(x, GRID) - total).abs().max() < 1e-6
    assert (dense.out(parts.transpose(1, 2).flatten(2)) - total).abs().max() < 1e-6


def test_gates_are_the_formula():
    _, moh = layers(shared=3, keep=2)
    x = 3 * numbers(2, 20, 64)
    gates = moh.route(x)
    for b, n in [(0, 0), (1, 7), (1, 19)]:
        s = moh.to_routed(x[b, n]).softmax(0)
        a = 2 * moh.to_parts(x[b, n]).softmax(0)
        best = s.topk(2)
        routed = torch.zeros(5)
        routed[best.indices] = 2 * best.values / best.values.sum() * a[1]
        expected = torch.cat((3 * moh.to_shared(x[b, n]).softmax(0) * a[0], routed))
        torch.testing.assert_close(gates.weight[b, n], expected)
    s, f = moh.to_routed(x).softmax(2).mean((0, 1)), gates.active[..., 3:].float().mean((0, 1))
    torch.testing.assert_close(gates.balance, 25 * (s * f).mean())
    # Norms of queries: the largest win, and count 1.
    _, moh = layers(shared=4, keep=2, router="qnorm", position=ROPE)
    gates = moh.route(x)
    norms = moh.attention.qk(x, GRID)[0].norm(dim=3).transpose(1, 2)[..., 4:]  # a rotation keeps them
    taken = torch.zeros_like(norms).scatter_(2, norms.topk(2).indices, 1)
    assert torch.equal(gates.weight, torch.cat((torch.ones_like(taken), taken), 2))


PATTERNS = [
    ("none", {}),
    ("causal", {"where": ct.causal(), "position": ROPE}),
    ("strict, some see nothing", {"where": ct.causal(strict=True), "kv_heads": 2}),
    ("heads differ", {"where": ct.per_head([ct.window(n=3), ct.causal()] * 4), "qk_norm": True, "softcap": 5.0}),
    ("bias", {"bias": ct.RelativeBias(8, n=4), "where": ct.window(n=7)}),
]


@pytest.mark.parametrize("options", [pytest.param(options, id=name) for name, options in PATTERNS])
@pytest.mark.parametrize("router", ["linear", "qnorm"])
def test_gathered_heads_equal_masked_ones(options, router):
    _, moh = layers(router=router, **options)
    if moh.attention.bias is not None:
        nn.init.normal_(moh.attention.bias.table)
    x = (2 * numbers(3, 20, 64)).requires_grad_()
    results = []
    for gather in (False, True):
        moh.gather = gather
        out = moh(x, GRID)
        results.append((out, *torch.autograd.grad(out.square().mean(), (x, *moh.parameters()), allow_unused=True)))
    for masked, gathered in zip(*results, strict=True):
        assert (masked is None) is (gathered is None)
        assert masked is None or (masked - gathered).abs().max() < 1e-5


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 6), st.integers(1, 6), st.sampled_from(["linear", "qnorm"]), st.integers(0, 99))
def test_every_token_takes_shared_and_k_heads(shared, keep, router, seed):
    keep = min(keep, 8 - shared)
    _, moh = layers(shared, keep, router)
    x, grid = 3 * numbers(2, 9, 64, seed=seed), ct.Grid(prefix=1, h=2, w=4)
    mixed, gates = moh.mix(x, grid), moh.route(x)
    assert bool((mixed.active.sum(-1) == shared + keep).all())
    assert bool(mixed.active[..., :shared].all())
    assert torch.equal(gates.weight != 0, mixed.active)
    moh.gather = True
    assert (moh(x, grid) - mixed.out).abs().max() < 1e-5


def test_prefix_tokens_keep_their_code_when_gathered():
    _, moh = layers(position=ct.Rope(("h", "w")), where=ct.window(h=3, w=3))
    x, grid = numbers(2, 14, 64), ct.Grid(prefix=2, h=3, w=4)
    masked = moh(x, grid)
    moh.gather = True
    assert (moh(x, grid) - masked).abs().max() < 1e-5


def test_heads_that_no_token_takes_are_not_touched():
    _, moh = layers(shared=2, keep=2)
    moh.to_routed.weight.data[2:] = 0
    moh.to_routed.weight.data[:2] = 1.0
    x = numbers(2, 20, 64).abs()  # routed heads 0 and 1 always win
    assert moh.route(x).active.flatten(0, 1).any(0).tolist() == [True] * 4 + [False] * 4
    for gather in (False, True):
        moh.gather = gather
        moh.zero_grad()
        moh(x, GRID).square().sum().backward()
        rows = moh.attention.qkv.weight.grad.view(3, 8, 8, 64).abs().sum((0, 2, 3))
        assert torch.equal(rows > 0, torch.arange(8) < 4)
        assert torch.equal(moh.out.weight.grad.view(64, 8, 8).abs().sum((0, 2)) > 0, torch.arange(8) < 4)
        assert all(router.weight.grad.abs().max() > 0 for router in (moh.to_routed, moh.to_shared, moh.to_parts))
    with torch.no_grad():
        gathered = moh(x, GRID)
        moh.attention.qkv.weight.view(3, 8, 8, 64)[:, 4:] = torch.nan
        assert torch.equal(moh(x, GRID), gathered)


def test_zero_and_one_pass_gradients_to_the_queries_of_heads_taken():
    _, moh = layers(4, 2, "qnorm")
    x = numbers(1, 1, 64)  # one key: the heads themselves do not depend on queries
    moh(x, ct.Grid(n=1)).square().sum().backward()
    grad = moh.attention.qkv.weight.grad[:64].view(8, 8, 64).abs().sum((1, 2))
    taken = moh.route(x).active[0, 0]
    assert bool((grad[:4] == 0).all()) and bool((grad[4:][taken[4:]] > 0).all())


@pytest.mark.parametrize("router", ["linear", "qnorm"])
def test_steps_equal_the_whole(router):
    _, moh = layers(router=router, where=ct.causal("t"), position=ct.Rope(("t", "h")), kv_heads=4)
    x = numbers(2, 5 * 3, 64)
    state, parts = moh.init_state(2, ct.Grid(t=1, h=3)), []
    for piece in x.split(3, 1):
        y, state = moh.step(piece, state)
        parts.append(y)
    assert (torch.cat(parts, 1) - moh(x, ct.Grid(t=5, h=3))).abs().max() < 1e-5
    assert state.k.shape == (2, 4, 15, 8)


def test_operations_of_attention_are_the_active_share():
    n, dim = 60, 64
    x, grid = numbers(1, n, dim), ct.Grid(n=n)
    found = {}
    for shared, keep in [(1, 1), (2, 2), (2, 4), (4, 4)]:
        _, moh = layers(shared, keep, backend="reference")  # which the counter can see
        moh.gather = True
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            moh(x, grid)
        counts = counter.get_flop_counts()["Global"]
        operators = {str(op): n for op, n in counts.items()}
        found[shared + keep] = operators["aten.bmm"]
        routers = 2 * n * dim * (8 - shared + shared + 2)
        # A token's queries and output are projected for its heads alone; keys and values are whole here.
        assert operators["aten.mm"] + operators.get("aten.addmm", 0) == (
            2 * n * dim * (2 * dim + 2 * 8 * (shared + keep)) + routers
        )
    for active, count in found.items():
        assert count == 4 * n * n * 8 * active
        assert count / found[8] == active / 8
    print(found)


def test_balance_is_k_at_uniform_routing_and_grows_with_collapse():
    _, moh = layers(shared=2, keep=2)
    # Six tokens, each surest of another pair of the six routed heads.
    x = torch.zeros(1, 6, 64)
    x[0, :, :6] = torch.eye(6) + torch.eye(6).roll(1, 1)
    moh.to_routed.weight.data.zero_()
    for sure in (1e-4, 0.1, 1.0, 5.0):
        moh.to_routed.weight.data[:, :6] = sure * torch.eye(6)
        assert moh.route(x).balance.item() == pytest.approx(2.0, abs=1e-5)
    # Where loads and scores are uneven in the same way, it is more: sum P f E >= K by Chebyshev's inequality.
    last = 2.0
    for lean in (0.5, 1.0, 2.0, 4.0):
        moh.to_routed.weight.data.zero_()
        moh.to_routed.weight.data[0, :6] = torch.full((6,), lean)
        moh.to_routed.weight.data[1, :6] = torch.full((6,), lean / 2)
        balance = moh.route(x).balance.item()
        assert balance > last
        last = balance
    assert last > 5.5  # of at most E = 6
    # But few that are sure can weigh more than many that are not: less than K.
    _, moh = layers(shared=6, keep=1)
    moh.to_routed.weight.data.zero_()
    moh.to_routed.weight.data[0, 0], moh.to_routed.weight.data[1, 1] = torch.tensor(0.04), torch.tensor(9.0)
    x = torch.zeros(1, 10, 64)
    x[0, :9, 0], x[0, 9, 1] = torch.ones(9), torch.tensor(1.0)
    assert moh.route(x).balance.item() == pytest.approx(0.93, abs=0.01)


def test_balance_opens_a_collapsed_router():
    _, moh = layers(shared=0, keep=1, dim=64)
    rng = torch.Generator().manual_seed(0)
    always = F.normalize(torch.randn(64, generator=rng), dim=0)
    moh.to_routed.weight.data[0] += 3 * always

    def load():
        x = torch.randn(16, 32, 64, generator=rng) + 4 * always
        gates = moh.route(x)
        return gates.active.flatten(0, 1).float().mean(0).max().item(), gates.balance

    most, before = load()
    assert most == 1.0
    optimizer = torch.optim.Adam(moh.to_routed.parameters(), lr=1e-2)
    for _ in range(200):
        loss = load()[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    most, after = load()
    print(f"largest load {most:.3f}, uniform {1 / 8}; balance {before.item():.2f} to {after.item():.2f}")
    assert most < 2 / 8


def test_balances_of_a_model_are_those_of_its_layers():
    torch.manual_seed(0)
    blocks = [ct.nn.Block([MoH(ct.nn.Attention(32, 4), 1, 2)]) for _ in range(2)]
    model, x = ct.nn.Stack(blocks), numbers(2, 20, 32)
    with balances(model) as found:
        model(x, grid=GRID)
        blocks[0].mixers[0](x=x, grid=GRID)
    assert len(found) == 3
    first = blocks[0].mixers[0]
    assert torch.equal(found[0], first.route(blocks[0].norms[0](x)).balance)
    assert torch.equal(found[2], first.route(x).balance)
    sum(found).backward()
    assert all(block.mixers[0].to_routed.weight.grad.abs().max() > 0 for block in blocks)
    model(x, GRID)
    assert len(found) == 3


def test_context_and_what_is_refused():
    dense, moh = layers(4, 4, "qnorm")
    x, other = numbers(2, 20, 64), (numbers(2, 7, 64, seed=1), ct.Grid(n=7))
    assert torch.equal(moh(x, GRID, other), dense(x, GRID, other))
    moh.gather = True
    with pytest.raises(ct.ChronotopeError, match="takes no context"):
        moh(x, GRID, other)
    moh.attention.where = ct.route.top_blocks(keep=0.5, n=4)
    with pytest.raises(ct.ChronotopeError, match="blocks of queries"):
        moh(x, GRID)
    moh.gather = False
    assert moh(x, GRID).shape == x.shape
    for shared, keep, router in [(-1, 2, "linear"), (2, 0, "linear"), (5, 4, "linear"), (7, 1, "qnorm")]:
        with pytest.raises(ct.ChronotopeError, match="expected shared from 0"):
            layers(shared, keep, router)
    with pytest.raises(ct.ChronotopeError, match="linear, qnorm"):
        layers(router="random")


FIELDS, SYMBOLS, VALUE = 6, 4, 8
WANTED = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 1, 1]])
"""Of which fields a token of each kind wants the mean."""


def sequences(count, rng, n=32):
    """Tokens of two kinds with six fields of four symbols and a value; what they want, [B, N, VALUE].

    For each field that its kind wants, a token wants the mean value of the tokens with its own symbol in that field,
    seen through a matrix of the field: a head for each field, and other heads for the other kind.
    """
    codes = torch.randn(FIELDS, VALUE, VALUE, generator=torch.Generator().manual_seed(5)) / VALUE**0.5
    kind = torch.randint(0, 2, (count, n), generator=rng)
    fields = torch.randint(0, SYMBOLS, (count, n, FIELDS), generator=rng)
    value = torch.randn(count, n, VALUE, generator=rng)
    alike = (fields[:, :, None] == fields[:, None]).float()
    means = torch.einsum("bijf,bjv->bifv", alike / alike.sum(2, keepdim=True), value)
    parts = torch.einsum("bifv,fvw->bifw", means, codes)
    x = torch.cat((F.one_hot(kind, 2), F.one_hot(fields, SYMBOLS).flatten(2)), 2).float()
    return torch.cat((x, value), 2), 2 * (parts * WANTED[kind][..., None]).sum(2)


class RandomHeads(nn.Module):
    """In place of a MoH: the shared heads and K others by lot, each counting 1."""

    def __init__(self, moh):
        super().__init__()
        self.moh = moh

    def forward(self, x, grid):
        moh = self.moh
        lot = torch.rand(*x.shape[:2], moh.heads)
        lot[..., : moh.shared] = torch.full(lot[..., : moh.shared].shape, 2.0)
        taken = torch.zeros_like(lot).scatter_(2, lot.topk(moh.shared + moh.keep).indices, 1)
        heads = moh.attention(x, grid).unflatten(2, (moh.heads, -1))
        return moh.out((heads * taken[..., None]).flatten(2))


def trained(kind, steps=1000, seed=0):
    """The mean square error on new sequences of a model with one layer of d = 64 and 8 heads."""
    torch.manual_seed(seed)
    mixer = ct.nn.Attention(64, 8)
    mixer = mixer if kind == "attention" else MoH(mixer, shared=2, keep=4)
    mixer = RandomHeads(mixer) if kind == "random" else mixer
    enter, leave = nn.Linear(2 + FIELDS * SYMBOLS + VALUE, 64), nn.Linear(64, VALUE)
    model, rng = nn.ModuleList((enter, mixer, leave)), torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    grid = ct.Grid(n=32)
    for _ in range(steps):
        x, wanted = sequences(64, rng)
        with balances(model) as found:
            loss = F.mse_loss(leave(mixer(enter(x), grid)), wanted)
        optimizer.zero_grad()
        (loss + 0.01 * sum(found)).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        x, wanted = sequences(512, torch.Generator().manual_seed(9))
        return F.mse_loss(leave(mixer(enter(x), grid)), wanted).item()


@pytest.mark.slow
def test_two_kinds_of_tokens_take_their_heads():
    loss = {kind: trained(kind) for kind in ("attention", "moh", "random")}
    print(loss)
    assert loss["moh"] <= 1.02 * loss["attention"]
    assert loss["moh"] < 0.5 * loss["random"]
