"""DARE (system 63): the released code, tied tables, gradients by their paths, the search, and a world of clicks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import chronotope as ct
from chronotope.papers.score.dare import DARE, Tables, decoupled_attention


def users(batch=6, n=17, ids=9, times=5, seed=0):
    """Targets, behaviours, times ago, a mask with at least one behaviour of each user, and clicks."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(n) < torch.randint(1, n + 1, (batch, 1), generator=rng)
    made = [torch.randint(0, most, shape, generator=rng) for most, shape in ((ids, (batch,)), (ids, (batch, n)))]
    time = torch.randint(1, times, (batch, n), generator=rng)
    return *made, time, mask, torch.randint(0, 2, (batch,), generator=rng).double()


def model(attn_dim=4, repr_dim=6, seed=0, **options):
    torch.manual_seed(seed)
    return DARE(Tables(9, attn_dim, 5, 2), Tables(9, repr_dim, 5, 3), hidden=(12, 8), **options).double()


def wave(table, shift):
    with torch.no_grad():
        table.weight.copy_(torch.sin(1.7 * torch.arange(table.weight.numel()) + shift).view_as(table.weight))


def test_the_released_code_gives_the_same():
    """thuml/DARE at c72e087, DIN of model_name DARE, soft search of 3, without item ids, ran on these ids."""
    attend, represent = Tables(5, 4, 7, 2), Tables(5, 4, 7, 2)
    for i, table in enumerate((attend.ids, represent.ids, attend.times, represent.times)):
        wave(table, i)
    history = torch.tensor([[0, 1, 2, 3, 4, 1], [4, 3, 4, 0, 2, 2]])
    time = torch.arange(6, 0, -1).expand(2, 6).contiguous()
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    pooled, scores = DARE(attend, represent, keep=3).read(torch.tensor([1, 4]), history, time, mask)
    expected = [
        [0.6614578, -0.3767806, -0.5643657, 0.5222121, -0.7323611, -0.4678113],
        [0.1707582, -0.9778583, 0.0812248, 0.9569280, -0.5083736, -0.2013080],
    ]
    assert (pooled - torch.tensor(expected)).abs().max() <= 1e-6
    expected = [
        [0.8375770, 0.6130942, 1.1969861, -0.1617657, 0.7049506, 0.1068506],
        [1.1884164, 0.7003709, 1.5661671, -1.1497881, -torch.inf, -torch.inf],
    ]
    torch.testing.assert_close(scores, torch.tensor(expected), rtol=0, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), keep=st.sampled_from([1, 2, 5, 24]), d=st.integers(1, 5), seed=st.integers(0, 999))
def test_pooling_is_softmax_over_the_best_of_the_real_ones(n, keep, d, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=rng).double() for shape in ((3, d), (3, n, d), (3, n, 4)))
    mask = torch.rand(3, n, generator=rng) < 0.7
    found, scores = decoupled_attention(q, k, v, mask=mask, keep=keep)
    for i in range(3):
        s = k[i] @ q[i]
        assert torch.equal(scores[i] == -torch.inf, ~mask[i])
        torch.testing.assert_close(scores[i][mask[i]], s[mask[i]])
        real = mask[i].nonzero()[:, 0]
        kept = real[s[real].argsort(descending=True)[:keep]]
        torch.testing.assert_close(found[i], s[kept].softmax(0) @ v[i, kept])


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 20), d=st.integers(1, 5), masked=st.booleans(), seed=st.integers(0, 999))
def test_keeping_as_many_as_there_are_is_the_softmax_over_all(n, d, masked, seed):
    rng = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(*shape, generator=rng).requires_grad_() for shape in ((3, d), (3, n, d), (3, n, 4)))
    mask = torch.rand(3, n, generator=rng) < 0.7 if masked else torch.ones(3, n, dtype=torch.bool)
    s = (k @ q[:, :, None])[..., 0].masked_fill(~mask, -1e9)
    plain = (s.softmax(1)[:, None] @ v)[:, 0] * mask.any(1, keepdim=True)
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
    for keep in (n, n + 3, None):
        found, _ = decoupled_attention(q, k, v, mask=mask if masked else None, keep=keep)
        assert (found - plain).abs().max() <= 1e-6
        for a, b in zip(torch.autograd.grad(found.square().sum(), (q, k, v)), expected, strict=True):
            assert (a - b).abs().max() <= 1e-5


def test_padding_has_no_part_in_anything():
    q, k, v = torch.randn(2, 3), torch.randn(2, 8, 3), torch.randn(2, 8, 4)
    mask = torch.arange(8) < torch.tensor([[5], [0]])
    clean = [decoupled_attention(q, k, v, mask=mask, keep=keep)[0] for keep in (2, 6, None)]
    k[~mask], v[~mask] = torch.nan, torch.inf
    for keep, expected in zip((2, 6, None), clean, strict=True):
        found, scores = decoupled_attention(q, k, v, mask=mask, keep=keep)
        assert torch.equal(found, expected) and (found[1] == 0).all()
        assert (scores[~mask] == -torch.inf).all()


def test_a_history_grows_and_only_what_is_kept_counts():
    dare, (target, history, time, _, _) = model(keep=4), users()
    scores = dare.read(target, history, time)[1]
    worst = scores.argsort(1)[:, :5]
    rest = torch.ones_like(history, dtype=torch.bool).scatter_(1, worst, False)
    fewer = [x[rest].view(6, -1) for x in (history, time)]
    with torch.no_grad():
        # What came before keeps its score, and without those that were not kept all is as it was.
        torch.testing.assert_close(dare.read(target, *fewer)[1], scores[rest].view(6, -1))
        torch.testing.assert_close(dare(target, *fewer), dare(target, history, time))


def test_one_table_for_both_is_the_shared_model():
    target, history, time, mask, label = users()
    tied = model(6, 6, keep=5)
    tied.attend.times = nn.Embedding(5, 3).double()
    tied = DARE(tied.represent, tied.represent, keep=5, hidden=(12, 8)).double()
    free = DARE(Tables(9, 6, 5, 3), Tables(9, 6, 5, 3), keep=5, hidden=(12, 8)).double()
    free.load_state_dict(tied.state_dict())
    assert torch.equal(free(target, history, time, mask), tied(target, history, time, mask))
    assert free.attend.ids.weight is not free.represent.ids.weight
    for dare in (tied, free):
        dare.loss(target, history, label, time, mask).backward()
    for part in ("ids", "times"):
        apart = [getattr(table, part).weight.grad for table in (free.attend, free.represent)]
        torch.testing.assert_close(getattr(tied.represent, part).weight.grad, sum(apart), rtol=1e-12, atol=1e-15)
    # Written out: one table, dot products scaled by the size of ids and times, softmax over the best five.
    with torch.no_grad():
        ids, times = tied.represent.ids.weight, tied.represent.times.weight
        s = (ids[history] @ ids[target][:, :, None])[..., 0] / 6**0.5 + times[time] @ times[0] / 3**0.5
        s = s.masked_fill(~mask, -torch.inf)
        s = s.masked_fill(s < s.sort(1, descending=True).values[:, 4:5], -torch.inf)
        e, values = torch.cat((ids[target], times[:1].expand(6, -1)), 1), torch.cat((ids[history], times[time]), 2)
        h = (s.softmax(1)[:, None] @ values)[:, 0]
        expected = tied.predict(torch.cat((e, h, e * h), 1))[:, 0]
        torch.testing.assert_close(tied(target, history, time, mask), expected)


def test_where_all_values_are_equal_attention_learns_nothing():
    target, history, time, mask, label = users()
    dare = model(keep=5)
    with torch.no_grad():
        dare.represent.ids.weight[1:] = dare.represent.ids.weight[1].clone()
        dare.represent.times.weight[1:] = dare.represent.times.weight[1].clone()
    dare.loss(target.clamp(min=1), history.clamp(min=1), label, time, mask).backward()
    assert max(table.weight.grad.abs().max() for table in (dare.attend.ids, dare.attend.times)) <= 1e-16
    assert dare.represent.ids.weight.grad.abs().max() > 1e-3
    dare = model(keep=5)
    dare.loss(target, history, label, time, mask).backward()
    assert dare.attend.ids.weight.grad.abs().max() > 1e-4


@pytest.mark.parametrize("keep", [3, None])
def test_the_gradients_of_the_paths_add_up_and_tables_keep_them_apart(keep):
    target, history, time, mask, label = users()
    tied, free = DARE(table := Tables(9, 4, 5, 2).double(), table, keep=keep).double(), model(keep=keep)
    for dare in (tied, free):
        dare.loss(target, history, label, time, mask).backward()
        paths = dare.paths(target, history, label, time, mask)
        torch.testing.assert_close(paths.attention + paths.representation, dare.attend.ids.weight.grad)
        assert paths.attention.abs().max() > 0
    assert (paths.representation == 0).all()  # of the decoupled one
    assert paths.ratio == 0
    paths = tied.paths(target, history, label, time, mask)
    cosine = paths.cosine[paths.cosine.isfinite()]
    assert paths.ratio > 0 and len(cosine) > 3 and cosine.abs().max() <= 1 + 1e-12


def test_a_hard_search_keeps_the_latest_of_the_same_id():
    target, history = torch.tensor([2, 7]), torch.tensor([[2, 1, 2, 2, 4, 2], [1, 2, 3, 4, 5, 6]])
    mask = torch.tensor([[True] * 5 + [False], [True] * 6])
    dare = DARE(Tables(9, 4), Tables(9, 6), keep=2, search="hard")
    pooled, _ = dare.read(target, history, mask=mask)
    torch.testing.assert_close(pooled[0], dare.represent.ids.weight[2])
    assert (pooled[1] == 0).all()
    values = torch.randn(2, 6, 3)
    found, _ = decoupled_attention(
        torch.zeros(2, 4), torch.zeros(2, 6, 4), values, mask=mask, keep=2, among=dare._among(target, history)
    )
    torch.testing.assert_close(found[0], values[0, 2:4].mean(0))


def test_half_the_channels_of_attention_are_half_the_work_of_the_search():
    work = []
    for size in (16, 8):
        q, k, v = torch.randn(2, size), torch.randn(2, 200, size), torch.randn(2, 200, 16)
        with FlopCounterMode(display=False) as counter:
            decoupled_attention(q, k, v, keep=1)
        work.append(counter.get_total_flops())
        assert 2 * 2 * 200 * size <= work[-1] <= 2 * 2 * (200 * size + size + 16)
    assert 0.49 <= work[1] / work[0] <= 0.51


def test_refusals():
    with pytest.raises(ct.ChronotopeError, match="times with channels or neither"):
        Tables(9, 4, times=5)
    with pytest.raises(ct.ChronotopeError, match="soft, hard"):
        DARE(Tables(9, 4), Tables(9, 4), search="some")
    with pytest.raises(ct.ChronotopeError, match="expected times of behaviours"):
        model()(*users()[:2])
    with pytest.raises(ct.ChronotopeError, match="tables have none"):
        DARE(Tables(9, 4), Tables(9, 4))(*users()[:3])


ITEMS, CLUSTERS, LENGTH = 400, 40, 40


class World:
    """Items are of a cluster and have a value of two numbers, which the cluster says nothing of.

    Three behaviours at least are of the target's cluster; it is clicked where the mean of the values of those that are
    agrees with the target's own value.
    """

    def __init__(self, seed):
        rng = torch.Generator().manual_seed(seed)
        self.cluster = torch.randperm(ITEMS, generator=rng) % CLUSTERS
        self.value = torch.randn(ITEMS, 2, generator=rng)
        self.members = torch.stack([(self.cluster == c).nonzero()[:, 0] for c in range(CLUSTERS)])

    def users(self, count, rng):
        """Targets, histories, which behaviours are relevant, clicks."""
        target = torch.randint(0, ITEMS, (count,), generator=rng)
        history = torch.randint(0, ITEMS, (count, LENGTH), generator=rng)
        some = torch.randint(0, ITEMS // CLUSTERS, (count, 3), generator=rng)
        history[:, :3] = self.members[self.cluster[target]].gather(1, some)
        relevant = (self.cluster[history] == self.cluster[target][:, None]).float()
        mean = (relevant[..., None] * self.value[history]).sum(1) / relevant.sum(1, keepdim=True)
        return target, history, relevant, ((mean * self.value[target]).sum(1) > 0).float()


class Projected(Tables):
    """Embeddings of another table, projected."""

    def __init__(self, table):
        super().__init__(1, table.size)
        self.inner, self.project = table, nn.Linear(table.size, table.size, bias=False)

    def forward(self, ids, time=None):
        return self.project(self.inner(ids, time))


def make(kind, dim):
    values = Tables(ITEMS, dim)
    if kind == "shared":
        return DARE(values, values, keep=None, hidden=(64, 32))
    if kind == "projected":
        return DARE(Projected(values), values, query=Projected(values), keep=None, hidden=(64, 32))
    return DARE(Tables(ITEMS, dim), values, keep=None, hidden=(64, 32))


def auc(logits, click):
    rank = torch.empty_like(logits).scatter_(0, logits.argsort(), torch.arange(1.0, len(logits) + 1))
    ones = click.sum()
    return ((rank[click > 0].sum() - ones * (ones + 1) / 2) / (ones * (len(click) - ones))).item()


def trained(kind, dim, seed, steps=2500):
    """The area under the curve, the share of relevant ones among the three highest scores, and the model."""
    torch.manual_seed(seed)
    world, rng, dare = World(100 + seed), torch.Generator().manual_seed(seed), make(kind, dim)
    optimizer = torch.optim.Adam(dare.parameters(), 1e-2)
    for _ in range(steps):
        target, history, _, click = world.users(256, rng)
        loss = dare.loss(target, history, click)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target, history, relevant, click = world.users(20000, torch.Generator().manual_seed(999))
    with torch.no_grad():
        area = auc(dare(target, history), click)
        top = dare.read(target, history)[1].topk(3, 1).indices
    return area, relevant.gather(1, top).mean().item(), dare


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_two_tables_find_and_predict_more_than_one_of_twice_the_width(seed):
    # 16 numbers an item in both.
    area, precision, _ = trained("decoupled", 8, seed)
    wide, blind, _ = trained("shared", 16, seed)
    print(f"seed {seed}: decoupled {area:.3f} {precision:.2f}; shared {wide:.3f} {blind:.2f}")
    assert area >= wide + 0.04
    assert precision >= 1.4 * blind


@pytest.mark.slow
def test_neither_one_narrow_table_nor_projections_of_it_reach_two():
    area, precision, _ = trained("decoupled", 8, 0)
    for kind in ("shared", "projected"):
        less, blind, _ = trained(kind, 8, 0)
        print(f"{kind}: {less:.3f} {blind:.2f}")
        assert less < area - 0.02 and blind < precision


def test_the_area_under_the_curve():
    assert auc(torch.tensor([0.1, 0.9, 0.4, 0.3]), torch.tensor([0.0, 1.0, 0.0, 1.0])) == 0.75
