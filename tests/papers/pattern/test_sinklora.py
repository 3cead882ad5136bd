"""SinkLoRA: the rule against rolling and reshaping, no leak from the future, reach of the sinks, copying, the cache."""

import pytest
import torch
from _toy import Tiny, accuracy, train
from torch.nn.functional import pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.pattern.sinklora import HeavyHitters, shifted_groups


def roll_and_reshape(q, k, v, group):
    """Shifted Sparse Attention as LongLoRA computes it: roll half of the heads, attend in groups, roll back."""
    batch, heads, n, size = q.shape
    half = heads // 2
    q, k, v = (torch.cat([x[:, :half], x[:, half:].roll(-group // 2, 2)], 1) for x in (q, k, v))
    q, k, v = (x.reshape(batch, heads, n // group, group, size) for x in (q, k, v))
    out = sdpa(q, k, v, is_causal=True).reshape(batch, heads, n, size)
    return torch.cat([out[:, :half], out[:, half:].roll(group // 2, 2)], 1)


def pad_and_reshape(q, k, v, group, sinks):
    """Groups without the wrap, the shifted heads padded by half a group in front; sinks join each group's keys."""
    outs = []
    for h in range(q.shape[1]):
        front = group // 2 if h >= q.shape[1] // 2 else 0
        n = q.shape[2]
        back = -(n + front) % group
        x, y, z = (pad(t[:, h], (0, 0, front, back)).unflatten(1, (-1, group)) for t in (q, k, v))
        place = pad(torch.arange(n), (front, back), value=-1).view(-1, group)
        inside = (place[:, None, :] <= place[:, :, None]) & (place[:, None, :] >= 0)
        extra = torch.arange(sinks)
        apart = (extra < place[:, :1])[:, None, :].expand(-1, group, -1) & ~(place[:, :, None] == extra).any(1)[:, None]
        later = apart & (extra <= place[:, :, None])
        more = [t[:, h, :sinks][:, None].expand(-1, len(place), -1, -1) for t in (k, v)]
        mask = torch.cat([inside, later], 2)
        mask[place < 0] = True
        out = sdpa(x, torch.cat([y, more[0]], 2), torch.cat([z, more[1]], 2), attn_mask=mask)
        outs.append(out.flatten(1, 2)[:, front : front + n])
    return torch.stack(outs, 1)


def test_rolling_and_reshaping_equal_the_rule():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 96, 8)
    grid = ct.Grid(n=96)
    plain = ct.attention(q, k, v, grid=grid, where=shifted_groups(96, 24, heads=4, sinks=0, wrap=True))
    assert (plain - roll_and_reshape(q, k, v, 24)).abs().max() < 1e-5
    sunk = ct.attention(q, k, v, grid=grid, where=shifted_groups(96, 24, heads=4, sinks=4))
    assert (sunk - pad_and_reshape(q, k, v, 24, 4)).abs().max() < 1e-5
    odd = ct.attention(*(x[:, :, :77] for x in (q, k, v)), grid=ct.Grid(n=77), where=shifted_groups(77, 24, heads=4))
    assert (odd - pad_and_reshape(*(x[:, :, :77] for x in (q, k, v)), 24, 4)).abs().max() < 1e-5


def leak(where, n):
    """Largest gradient of any output by the key, query or value of a later token."""
    torch.manual_seed(1)
    inputs = [torch.randn(1, 4, n, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = ct.attention(*inputs, grid=ct.Grid(n=n), where=where)
    worst = 0.0
    for i in range(n - 1):
        for grad in torch.autograd.grad(out[:, :, i].sum(), inputs, retain_graph=True):
            worst = max(worst, float(grad[:, :, i + 1 :].abs().max()))
    return worst


def test_the_wrap_leaks_the_future_and_the_groups_without_it_do_not():
    assert leak(shifted_groups(32, 8, heads=4, sinks=0, wrap=True), 32) > 1e-3
    assert leak(shifted_groups(32, 8, heads=4, sinks=3), 32) == 0


def test_sinks_reach_everybody_in_one_layer_where_groups_need_many():
    n, group = 128, 16
    with_sinks = ct.plan(shifted_groups(n, group, heads=4), ct.Grid(n=n)).mask()
    assert with_sinks[:, 3:, :4].all() and with_sinks[:, n - 1, 0].all()
    step = ct.plan(shifted_groups(n, group, heads=4, sinks=0, wrap=True), ct.Grid(n=n)).mask().any(0).float()
    reached, layers = step[:, 0], 1
    while not reached[n - 1]:
        reached, layers = ((step @ reached) > 0).float(), layers + 1
    assert n / group <= layers <= 2 * n / group


def test_pairs_grow_as_tokens_times_group():
    def pairs(n, group):
        plan = ct.plan(shifted_groups(n, group, heads=2, sinks=0), ct.Grid(n=n))
        return round(plan.density * plan.pairs * 2)

    for n, group in ((256, 16), (512, 64), (1024, 32)):
        ends = (group // 2) ** 2  # the shifted head has one group fewer and two halves
        assert pairs(n, group) == n * (group + 1) - ends
    with_sinks = ct.plan(shifted_groups(1024, 32, heads=2), ct.Grid(n=1024))
    assert with_sinks.density * with_sinks.pairs * 2 - pairs(1024, 32) < 2 * 4 * 1024


def run_cache(cache, q, k, v):
    return torch.cat([cache.step(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(q.shape[2])], 2)


def test_heavy_hitters_of_the_whole_budget_drop_nothing():
    torch.manual_seed(2)
    q, k, v = torch.randn(3, 2, 3, 24, 8)
    assert (run_cache(HeavyHitters(24, 6), q, k, v) - sdpa(q, k, v, is_causal=True)).abs().max() < 1e-5


def test_heavy_hitters_keep_the_recent_and_what_got_attention():
    torch.manual_seed(3)
    q, k = torch.randn(2, 1, 2, 24, 8)
    q[..., 0] = 4.0
    k[:, :, 5, 0] = 8.0
    place = torch.arange(24.0).view(1, 1, -1, 1).expand(1, 2, -1, 1)
    cache = HeavyHitters(8, 4)
    run_cache(cache, q, k, place)
    kept = cache.values[0, :, :, 0]
    assert kept.shape == (2, 8)
    assert (kept[:, -4:] == torch.arange(20.0, 24.0)).all() and (kept == 5).any(1).all()


def test_wrong_settings_are_refused():
    with pytest.raises(ct.ChronotopeError, match="an even group of 2 or more"):
        shifted_groups(64, 7, heads=4)
    with pytest.raises(ct.ChronotopeError, match="n to be a multiple of the group"):
        shifted_groups(70, 16, heads=4, wrap=True)
    with pytest.raises(ct.ChronotopeError, match="1 <= recent <= budget"):
        HeavyHitters(4, 5)


N, GROUP, KEYS, KINDS = 512, 128, 4, 8


def copy_task(generator, size=4):
    """Key tokens in the first 4 places, fillers, and from place 256 on questions `which is key i?`."""
    ids = torch.zeros(size, N, dtype=torch.int64)
    ids[:, :KEYS] = 1 + torch.randint(0, KINDS, (size, KEYS), generator=generator)
    which = torch.randint(0, KEYS, (size, 256), generator=generator)
    asked = torch.rand(size, 256, generator=generator) < 0.25
    ids[:, 256:] = torch.where(asked, 1 + KINDS + which, 0)
    target = torch.full((size, N), -100)
    target[:, 256:] = torch.where(asked, ids.gather(1, which) - 1, -100)
    return ids, target


def trained_then_dense(where):
    torch.manual_seed(0)
    model = Tiny(
        1 + KINDS + KEYS, N, 32, 4, 2, lambda _, q, k, v: ct.attention(q, k, v, grid=ct.Grid(n=N), where=where), KINDS
    )
    train(model, copy_task, 150, 1e-2)
    model.attend = lambda _, q, k, v: sdpa(q, k, v, is_causal=True)
    return accuracy(model, *copy_task(torch.Generator().manual_seed(99), 32))


@pytest.mark.slow
def test_training_with_sinks_copies_the_first_tokens_under_dense_attention():
    with_sinks = trained_then_dense(shifted_groups(N, GROUP, heads=4))
    without = trained_then_dense(shifted_groups(N, GROUP, heads=4, sinks=0, wrap=True))
    assert with_sinks >= 0.9
    assert with_sinks - without >= 0.1
