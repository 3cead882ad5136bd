"""STTN (system 56): attention over sensors and steps, both ends of the gate, sensors reordered, edges that change.

The released code is TensorFlow 1 (models/modules.py at commit 986e707 of xumingxingsjtu/STTN), which does not run on
the versions of Python here: it was read, not run. The Chebyshev basis is held against cos(k arccos x) instead.
"""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import chronotope as ct
from chronotope.papers.spacetime.sttn import STTN, Encoder, GraphConvolution, Places, SpatialTransformer, chebyshev

STEPS, NODES = 4, 7


def tokens(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def network(nodes=NODES, seed=0):
    """Weights of a directed graph; the last node stands alone."""
    weights = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(seed))
    weights = torch.where(weights > 0.5, weights, 0.0).fill_diagonal_(0)
    weights[-1] = weights[:, -1] = 0
    return weights


def small(seed=0, weights=None, **options):
    torch.manual_seed(seed)
    weights = network() if weights is None else weights
    return STTN(weights.tolist(), STEPS, 3, **{"dim": 8, "heads": 2, "blocks": 2, "hidden": 16, **options})


def test_sizes_and_gradients():
    model = small(channels=2, mean=50.0, std=10.0)
    out = model(50 + 10 * tokens(3, STEPS, NODES, 2))
    assert out.shape == (3, 3, NODES)
    model.loss(tokens(3, STEPS, NODES, 2), tokens(3, 3, NODES)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("axis", ["v", "t"])
def test_attention_is_dense_along_one_axis_alone(axis):
    grid, torch_axis = ct.Grid(t=STEPS, v=NODES), {"t": 1, "v": 2}[axis]
    torch.manual_seed(0)
    layer = Encoder(8, 2, 16, ct.along(axis)).attention
    q, k, v = layer.project(tokens(2, grid.size, 8), grid)
    got = ct.attention(q, k, v, grid=grid, where=layer.where)
    masked = sdpa(q, k, v, attn_mask=ct.plan(ct.along(axis), grid).mask())
    rows = [x.unflatten(2, grid.shape).movedim(1 + torch_axis, 3) for x in (q, k, v)]
    per_step = sdpa(*rows).movedim(3, 1 + torch_axis).flatten(2, 3)
    assert (got - masked).abs().max() <= 1e-5
    assert (got - per_step).abs().max() <= 1e-5


def test_the_ends_of_the_gate_are_attention_alone_and_convolution_alone():
    grid, x = ct.Grid(t=STEPS, v=NODES), tokens(2, STEPS * NODES, 8)
    block = small().blocks[0]
    assert isinstance(block, SpatialTransformer)
    placed = block.places(x, grid)
    ends = {1e6: block.dynamic(placed, grid), -1e6: block.static(placed, grid)}
    for bias, alone in ends.items():
        with torch.no_grad():
            block.gates[0].bias.fill_(bias)
        assert torch.equal(block(x, grid), x + alone)
        half = SpatialTransformer(
            block.places, block.dynamic if bias > 0 else None, None if bias > 0 else block.static, 8
        )
        assert torch.equal(half(x, grid), x + alone)
    assert (ends[1e6] - ends[-1e6]).abs().max() > 0.1


def test_sensors_in_another_order_give_forecasts_in_that_order():
    weights, order = network(), torch.randperm(NODES, generator=torch.Generator().manual_seed(3))
    model, other = small(), small(weights=weights[order][:, order])
    state = model.state_dict()
    assert torch.equal(state["blocks.0.places.tables.v"], weights)
    for name in state:
        # The embedding of a sensor is its row; the columns are channels, which keep their matrix.
        state[name] = state[name][order] if name.endswith("tables.v") else state[name]
    other.load_state_dict(state)
    x = tokens(2, STEPS, NODES, 1)
    assert (other(x[:, :, order]) - model(x)[:, :, order]).abs().max() <= 1e-5
    assert (other(x) - model(x)).abs().max() > 1e-3


def test_the_basis_is_chebyshev_polynomials_of_the_scaled_laplacian():
    weights = network()
    weights = (weights + weights.T).double()
    degree = weights.sum(1)
    root = torch.where(degree > 0, degree, torch.inf).rsqrt().diag()
    laplacian = root @ (degree.diag() - weights) @ root
    values, vectors = torch.linalg.eigh(laplacian)
    scaled = (2 * values / values.max() - 1).clamp(-1, 1)
    for k, got in enumerate(chebyshev(weights.float(), 5)):
        expected = vectors @ torch.cos(k * torch.arccos(scaled)).diag() @ vectors.T
        assert (got - expected).abs().max() <= 1e-5


def test_the_convolution_reaches_order_minus_one_hops():
    chain = torch.diag(torch.ones(NODES - 1), 1)
    chain = chain + chain.T
    for order in (1, 2, 3):
        torch.manual_seed(0)
        layer, grid = GraphConvolution(3, chebyshev(chain, order)), ct.Grid(t=1, v=NODES)
        change = torch.autograd.functional.jacobian(lambda x: layer(x, grid), tokens(1, NODES, 3))[0].sum(2)  # noqa: B023
        reached = change.abs().amax((1, 3)) > 1e-6
        hops = (torch.arange(NODES)[:, None] - torch.arange(NODES)).abs()
        assert torch.equal(reached, hops < order)


def test_tables_are_channels_joined_to_each_token():
    grid, x = ct.Grid(t=STEPS, v=NODES), tokens(2, STEPS * NODES, 8)
    torch.manual_seed(0)
    places = Places(8, v=network(), t=torch.eye(STEPS))
    t, v = grid.coords().T
    joined = torch.cat((x, *(table[at].expand(2, -1, -1) for table, at in ((network(), v), (torch.eye(STEPS), t)))), 2)
    matrix = torch.cat((places.enter.weight, places.spread["v"].weight, places.spread["t"].weight), 1)
    assert (places(x, grid) - joined @ matrix.T - places.enter.bias).abs().max() <= 1e-5


def changes(model, x, at):
    """How much the forecasts of each sensor change with the reading at a step and sensor."""
    other = x.clone()
    other[:, at[0], at[1]] += 5
    return (model(other) - model(x)).abs().amax((0, 1))


def test_what_is_told_of_the_graph_and_what_is_not():
    x, other = tokens(2, STEPS, NODES, 1), network(seed=9)
    for space, told in {"gated": True, "graph": True, "attention": False, "none": False}.items():
        same = torch.equal(small(space=space)(x), small(space=space, weights=other)(x))
        assert same is not told
    alone = changes(small(space="none"), x, (STEPS - 1, 2)) > 0
    assert alone.tolist() == [v == 2 for v in range(NODES)]


def test_without_time_the_last_step_is_all_that_is_known():
    x = tokens(2, STEPS, NODES, 1)
    for step in range(STEPS):
        assert (changes(small(time=False), x, (step, 2)).max() > 0) == (step == STEPS - 1)
        assert changes(small(), x, (step, 2)).max() > 0


def test_causal_steps_do_not_look_ahead():
    x, model, grid = tokens(2, STEPS, NODES, 1), small(causal=True), ct.Grid(t=STEPS, v=NODES)
    block, h = model.blocks[1], tokens(2, grid.size, 8)
    later = h.clone()
    later[:, 2 * NODES :] += 1
    assert torch.equal(block(later, grid)[:, : 2 * NODES], block(h, grid)[:, : 2 * NODES])
    assert not torch.equal(small()(x), model(x))


def test_neighbours_alone_are_seen_where_asked():
    weights = torch.zeros(NODES, NODES)
    weights[0, 1] = weights[1, 2] = weights[2, 3] = 1  # 0 hears 1, which hears 2, which hears 3
    model = small(weights=weights, neighbours="graph", space="attention", blocks=2)
    reached = changes(model, tokens(2, STEPS, NODES, 1), (0, 2)) > 0
    assert reached.tolist() == [True, True, True, False, False, False, False]  # two blocks, two hops


@pytest.mark.parametrize("space", ["gated", "attention", "graph"])
def test_missing_readings_are_seen_by_nobody(space):
    model, x = small(space=space), tokens(2, STEPS, NODES, 1)
    real = torch.rand(2, STEPS, NODES, generator=torch.Generator().manual_seed(5)) > 0.3
    spoilt = torch.where(real[..., None], x, torch.nan)
    assert torch.equal(model(spoilt, real), model(x, real))
    assert (model(x, torch.ones_like(real)) - model(x)).abs().max() <= 1e-5
    # Of a sensor that never spoke the others know nothing, not even that it is there.
    gone = torch.ones_like(real)
    gone[:, :, 3] = False
    told = small(space="attention")
    before = told(x, gone)
    with torch.no_grad():
        told.blocks[0].places.tables["v"][3] += 1
    others = [v for v in range(NODES) if v != 3]
    assert torch.equal(told(x, gone)[:, :, others], before[:, :, others])


def test_windows_are_run_again_and_wrong_sizes_refused(tmp_path):
    model, x = small(mean=1.0), tokens(2, STEPS, NODES, 1)
    for layer in model.blocks:
        with pytest.raises(ct.ChronotopeError, match="cannot be stepped"):
            layer.init_state(1, ct.Grid(t=1, v=NODES))
    with pytest.raises(ct.ChronotopeError, match=rf"expected \[B, {STEPS}, {NODES}, C\]"):
        model(x[:, :2])
    with pytest.raises(ct.ChronotopeError, match=r"expected \[V\]\[V\]"):
        STTN([[0.0, 1.0]])
    model.save_pretrained(tmp_path)
    assert torch.equal(STTN.from_pretrained(tmp_path)(x), model(x))


NOISE, RATE, SHARE = 0.2, 5e-3, 0.85


def system(steps, nodes=16, degree=3):
    """x_i' = 0.4 x_i + 2 tanh(sum_j w_ij s_j sigmoid(3 x_m(j)) x_j / sqrt(3)) + noise, m(j): a neighbour of the sender.

    s_j: a sign of each sender. Every node hears three others. Returns the states [steps, nodes], and w. Who knows all
    of this errs by 0.156, 0.209, 0.252 at steps 1 to 3. Of 16 systems that were tried with two blocks, this one lets
    attention gain most; in those without signs, or where all nodes are alike on a ring, the convolution does as well.
    """
    rng = torch.Generator().manual_seed(0)
    weights = torch.zeros(nodes, nodes)
    for i in range(nodes):
        others = torch.tensor([j for j in range(nodes) if j != i])
        weights[i, others[torch.randperm(nodes - 1, generator=rng)[:degree]]] = 1.0
    pick = [int(torch.randint(degree, (1,), generator=rng)) for _ in range(nodes)]
    neighbour = torch.stack([row.nonzero()[at, 0] for row, at in zip(weights, pick, strict=True)])
    sign = torch.where(torch.rand(nodes, generator=rng) < 0.5, -1.0, 1.0)
    rng, out = torch.Generator().manual_seed(1), []
    x = torch.randn(nodes, generator=rng)
    for _ in range(steps + 100):
        strength = weights * sign * torch.sigmoid(3 * x[neighbour]) / degree**0.5
        x = 0.4 * x + 2 * torch.tanh(strength @ x) + NOISE * torch.randn(nodes, generator=rng)
        out.append(x)
    return torch.stack(out[100:]), weights


def forecast_errors(space, data, weights, steps=900, batch=16, rate=RATE):
    """MAE at steps 1, 2, 3 after a training of one side of the gate, of both, or of time alone.

    One block, as in the released code. With two (1,500 steps) 0.89, 0.91, 0.87 of the convolution's errors are left:
    what the first block's MLP multiplied, the convolution of the second can carry.
    """
    train, test = data[:13000], data[13000:]
    torch.manual_seed(0)
    sizes = {"dim": 32, "heads": 4, "blocks": 1, "hidden": 64, "space": space}
    model = STTN(weights.tolist(), 12, 3, mean=float(train.mean()), std=float(train.std()), **sizes)
    opt = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.0)
    course = torch.optim.lr_scheduler.OneCycleLR(opt, rate, total_steps=steps)
    rng = torch.Generator().manual_seed(1)
    for _ in range(steps):
        window = train[torch.randint(len(train) - 15, (batch,), generator=rng)[:, None] + torch.arange(15)]
        opt.zero_grad()
        model.loss(window[:, :12, :, None], window[:, 12:]).backward()
        opt.step()
        course.step()
    windows = test.unfold(0, 15, 1).transpose(1, 2)
    with torch.no_grad():
        return (model(windows[:, :12, :, None]) - windows[:, 12:]).abs().mean((0, 2))


@pytest.mark.slow
def test_edges_that_change_are_what_attention_over_sensors_is_for(one_thread):
    data, weights = system(14000)
    found = {space: forecast_errors(space, data, weights) for space in ("none", "graph", "gated")}
    print(*(f"{space} {[round(x, 3) for x in mae.tolist()]}" for space, mae in found.items()), sep="\n")
    assert (found["gated"] <= SHARE * found["graph"]).all()
    assert (found["graph"] <= SHARE * found["none"]).all()
