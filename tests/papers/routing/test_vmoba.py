"""VMoBA: the selection against loops, the output against dense softmax, kept mass, and budgets that follow a head."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.routing.vmoba import PARTITIONS, density, vmoba
from chronotope.planning import Layout
from chronotope.routing.route import Joint, Threshold, TopK

SMALL = ({"t": 2}, {"h": 3, "w": 2}, {"t": 2, "h": 2, "w": 3})
GRID = ct.Grid(t=5, h=6, w=7)  # which these blocks do not divide
EACH = {"t": 1, "h": 1, "w": 1}


def tensors(grid=GRID, batch=2, heads=2, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, heads, grid.size, size, generator=generator).requires_grad_() for _ in range(3))


def blocks_of(grid, block):
    """The block of each token, by coordinates."""
    number = torch.zeros(grid.size, dtype=torch.int64)
    for axis, x in zip(grid.axes, grid.coords().T, strict=True):
        number = number * grid.size + x // block.get(axis, grid.sizes[axis])
    return torch.unique(number, return_inverse=True)[1]


def by_loop(q, k, grid, block, tau):
    """The pairs of one head, in falling order of their gates, own ones first, until they hold tau of the total."""
    block_of = blocks_of(grid, block)
    means = torch.stack([k[block_of == j].mean(0) for j in range(int(block_of.max()) + 1)])
    gate = (q @ means.T).detach().double()
    gate = (gate - gate.min()) / (gate.max() - gate.min())
    kept = block_of[:, None] == torch.arange(len(means))
    held, total = gate[kept].sum(), gate.sum()
    for place in gate.flatten().argsort(descending=True).tolist():
        if held >= tau * total:
            break
        if not kept.view(-1)[place]:
            kept.view(-1)[place] = True
            held = held + gate.flatten()[place]
    return kept[:, block_of]


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_pairs_of_a_head_are_added_in_falling_order_until_they_hold_tau(layer):
    q, k, _ = tensors()
    for tau in (0.4, 0.6):
        where = vmoba(layer, partitions=SMALL, selection=Joint(Threshold(tau)))
        found = where.select(q, k, GRID)
        for batch in range(2):
            for head in range(2):
                expected = by_loop(q[batch, head], k[batch, head], GRID, SMALL[layer], tau)
                assert torch.equal(found[batch, head], expected)
        assert not torch.equal(found[0, 0], found[1, 0])


def test_layers_take_turns_and_the_first_steps_are_dense():
    assert [vmoba(layer) for layer in (3, 4, 5)] == [vmoba(layer) for layer in (0, 1, 2)]
    assert len({vmoba(layer) for layer in range(6)}) == 3
    assert vmoba(2, step=11) == ct.full()
    assert vmoba(2, step=12) == vmoba(2)
    assert [set(blocks) for blocks in PARTITIONS] == [{"t"}, {"h", "w"}, {"t", "h", "w"}]
    with pytest.raises(ct.ChronotopeError, match="blocks of one layer"):
        vmoba(partitions=())
    with pytest.raises(ct.ChronotopeError, match="'w'"):
        vmoba(1).select(*[torch.randn(1, 1, 8, 4)] * 2, ct.Grid(t=2, h=4))


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(
    "selection",
    [Joint(Threshold(1.0)), Threshold(1.0), Joint(Threshold(1.0), "block"), Joint(Threshold(1.0), "all"), TopK(99)],
    ids=repr,
)
def test_everything_kept_is_dense_attention(layer, selection):
    q, k, v = tensors()
    where = vmoba(layer, partitions=SMALL, selection=selection)
    out = ct.attention(q, k, v, grid=GRID, where=where)
    expected = sdpa(q, k, v)
    assert (out - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.parametrize("block", [*SMALL, *PARTITIONS], ids=repr)
def test_a_block_lies_together_and_the_way_back_is_exact(block):
    grid = ct.Grid(t=4, h=6, w=8)
    layout = Layout(grid, tuple(min(block.get(axis, n), n) for axis, n in grid.sizes.items()))
    x = torch.randn(grid.size, 3)
    back = torch.empty_like(x)
    back[layout.order] = x[layout.order]
    assert torch.equal(back, x)
    assert torch.equal(layout.order.sort().values, torch.arange(grid.size))
    assert (blocks_of(grid, block)[layout.order].diff() != 0).sum() == len(layout.sizes) - 1


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_own_and_routed_parts_merge_into_one_softmax_with_its_gradients(layer):
    q, k, v = tensors()
    where = vmoba(layer, partitions=SMALL, selection=Joint(Threshold(0.5)))
    mask = where.select(q, k, GRID)
    own = ct.blocks(**SMALL[layer])
    block_of = blocks_of(GRID, SMALL[layer])
    first = torch.stack([(block_of == j).nonzero()[0, 0] for j in range(int(block_of.max()) + 1)])
    other = mask[..., first] & (block_of[:, None] != torch.arange(len(first)))
    routed = ct.route.chosen(other, queries=EACH, **SMALL[layer])
    assert other.any()

    parts = [ct.attention(q, k, v, grid=GRID, where=part, return_lse=True) for part in (own, routed)]
    merged = ct.merge(parts)[0]
    whole = ct.attention(q, k, v, grid=GRID, where=where)
    expected = sdpa(q, k, v, attn_mask=mask)  # whose gradients know nothing of the selection
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad(expected, (q, k, v), upstream)
    for out in (merged, whole):
        assert (out - expected).abs().max() < 1e-5
        for ours, theirs in zip(torch.autograd.grad(out, (q, k, v), upstream), gradients, strict=True):
            assert (ours - theirs).abs().max() < 1e-4


def smooth(grid, heads=4, size=32, gain=2.0):
    """q = k: waves along random directions, so that tokens answer what is near: [1, heads, N, size]."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(heads, 3, size // 2, generator=generator) / torch.tensor([3.0, 4.0, 4.0])[:, None]
    angle = grid.coords().float() @ waves
    return gain * torch.cat([angle.cos(), angle.sin()], -1)[None]


VIDEO = ct.Grid(t=8, h=16, w=16)
LARGE = ({"t": 1}, {"h": 4, "w": 4}, {"t": 2, "h": 4, "w": 4})


def kept(layer, *taus):
    """(mass, density) of softmax attention that the layer keeps at each tau."""
    x = smooth(VIDEO)
    every = ct.attention(x, x, x, grid=VIDEO, return_lse=True)[1]
    out = []
    for tau in taus:
        where = vmoba(layer, partitions=LARGE, selection=Joint(Threshold(tau)))
        lse = ct.attention(x, x, x, grid=VIDEO, where=where, return_lse=True)[1]
        out.append([(lse - every).exp().mean(), density(where, x, x, VIDEO).mean()])
    return torch.tensor(out)


def test_boxes_keep_the_mass_of_smooth_queries_and_frames_keep_less():
    (boxes,), (frames,) = kept(2, 0.25), kept(0, 0.25)
    print(f"(mass, density) at tau = 0.25: boxes {boxes.tolist()}, frames {frames.tolist()}")
    assert boxes[0] >= 0.9
    assert boxes[1] <= 0.2
    assert frames[0] < boxes[0]
    assert frames[1] >= boxes[1]


def test_kept_mass_and_density_grow_with_tau():
    assert (kept(2, 0.1, 0.25, 0.4, 0.7, 0.9).diff(dim=0) > 0).all()


def test_a_peaked_head_gets_fewer_blocks_than_a_flat_one_under_the_threshold_and_as_many_under_top_k():
    """Head 0: every query matches the keys of one block of 32; head 1: queries and keys are noise."""
    grid = ct.Grid(t=4, h=8, w=8)
    block_of = blocks_of(grid, {"t": 2, "h": 2, "w": 2})
    assert block_of.max() == 31
    generator = torch.Generator().manual_seed(0)
    codes = torch.linalg.qr(torch.randn(32, 32, generator=generator))[0]
    target = torch.randint(32, (grid.size,), generator=generator)
    q = torch.stack([codes[target], torch.randn(grid.size, 32, generator=generator)])[None]
    k = torch.stack([codes[block_of], torch.randn(grid.size, 32, generator=generator)])[None]
    blocks = ({"t": 2, "h": 2, "w": 2},)
    for selection in (Joint(Threshold(0.25)), Threshold(0.25)):
        peaked, flat = density(vmoba(partitions=blocks, selection=selection), q, k, grid)[0]
        assert peaked < 0.6 * flat
    for selection in (Joint(TopK(4 / 32)), TopK(4)):
        peaked, flat = density(vmoba(partitions=blocks, selection=selection), q, k, grid)[0]
        assert peaked == flat == 4 / 32


def test_density_is_the_share_of_pairs_and_one_in_the_dense_steps():
    q, k, _ = tensors()
    where = vmoba(2, partitions=SMALL)
    assert torch.allclose(density(where, q, k, GRID), where.select(q, k, GRID).float().mean((2, 3)))
    assert torch.equal(density(vmoba(step=0), q, k, GRID), torch.ones(2, 2))


def test_scopes_that_compete_are_refused_beside_a_causal_pattern():
    q, k, v = tensors()
    with pytest.raises(ct.ChronotopeError, match="compete with each other"):
        ct.attention(q, k, v, grid=GRID, where=vmoba(partitions=SMALL) & ct.causal("t"))
    alone = vmoba(partitions=SMALL, selection=Threshold(0.25)) & ct.causal("t")
    assert ct.attention(q, k, v, grid=GRID, where=alone).isfinite().all()
