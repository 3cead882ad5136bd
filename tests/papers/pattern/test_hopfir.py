"""HopFIR: hop sets partition the joints, both attentions against loops, relabelling, and lifting stick figures."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import chronotope as ct
from chronotope.papers.pattern.hopfir import (
    ENDS,
    LIMBS,
    SKELETON,
    GroupAttention,
    HopAttention,
    HopFIR,
    hop,
    hops,
    limbs,
)


def distances(edges, joints):
    """Floyd and Warshall."""
    out = torch.full((joints, joints), math.inf)
    out.fill_diagonal_(0)
    for a, b in edges:
        out[a, b] = out[b, a] = 1
    for middle in range(joints):
        out = torch.minimum(out, out[:, middle, None] + out[None, middle])
    return out


@pytest.mark.parametrize(
    "edges", [SKELETON, ((0, 1), (1, 2), (2, 3), (3, 0), (3, 4))], ids=["skeleton", "ring and tail"]
)
def test_hop_sets_partition_all_pairs(edges):
    joints = max(max(edge) for edge in edges) + 1
    expected = distances(edges, joints)
    far = int(expected.max())
    sets = hops(edges, joints, far)
    assert torch.equal((sets > 0).sum(0), torch.ones(joints, joints, dtype=torch.int64))
    assert torch.equal((sets > 0).float().argmax(0).float(), expected)
    rows = sets.sum(-1)
    torch.testing.assert_close(rows, (rows > 0).float())
    assert torch.equal(ct.plan(hop(edges, 2), ct.Grid(v=joints)).mask(), expected == 2)


def layer(seed=0, distance=7, heads=2, edges=SKELETON):
    torch.manual_seed(seed)
    sets = hops(edges, 16, distance).double()
    return HopAttention(8, heads, sets / sets.sum(-1, keepdim=True).clamp(min=1e-9)).double()


def by_gathering(attend, x, edges, distance):
    """Joint by joint and distance by distance: mean of the set, mixed; then softmax over the distances that exist."""
    far, heads = distances(edges, x.shape[1]), attend.heads
    out, weights = torch.empty_like(x), torch.zeros(x.shape[0], heads, x.shape[1], distance + 1, dtype=x.dtype)
    for i in range(x.shape[1]):
        exists = [k for k in range(distance + 1) if (far[i] == k).any()]
        groups = torch.stack([x[:, far[i] == k].mean(1) @ attend.mix[k] for k in exists], 1)
        k, v = (y.unflatten(-1, (heads, -1)) for y in attend.kv(groups).chunk(2, -1))
        q = attend.q(x[:, i]).unflatten(-1, (heads, -1))
        share = (torch.einsum("bhd,bkhd->bhk", q, k) / math.sqrt(q.shape[-1])).softmax(-1)
        weights[:, :, i, exists] = share
        out[:, i] = attend.out(torch.einsum("bhk,bkhd->bhd", share, v).flatten(1))
    return out, weights


@pytest.mark.parametrize("distance", [0, 2, 7])
def test_hop_attention_equals_a_gather_loop(distance):
    attend = layer(distance=distance)
    x = torch.randn(3, 16, 8, dtype=torch.float64, requires_grad=True)
    out, weights = by_gathering(attend, x, SKELETON, distance)
    torch.testing.assert_close(attend(x), out, atol=1e-10, rtol=0)
    torch.testing.assert_close(attend.weights(x), weights, atol=1e-10, rtol=0)
    parameters = [x, *attend.parameters()]
    target = torch.randn_like(x)
    mine = torch.autograd.grad((attend(x) * target).sum(), parameters)
    for a, b in zip(mine, torch.autograd.grad((out * target).sum(), parameters), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)


def test_group_attention_is_dense_attention_under_the_limb_mask():
    torch.manual_seed(0)
    attend = GroupAttention(8, 2, 16, LIMBS, ENDS).double()
    x = torch.randn(3, 16, 8, dtype=torch.float64)
    limb = torch.tensor([next(n for n, group in enumerate(LIMBS) if joint in group) for joint in range(16)])
    q, k, v = (y.unflatten(-1, (2, 4)).transpose(1, 2) for y in (attend.q(x), *attend.kv(x).chunk(2, -1)))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=limb[:, None] == limb)
    expected = attend.out(out.transpose(1, 2).flatten(2))
    got = attend(x)
    torch.testing.assert_close(got[:, ENDS], expected[:, ENDS], atol=1e-10, rtol=0)
    others = [joint for joint in range(16) if joint not in ENDS]
    assert got[:, others].abs().max() == 0
    assert torch.equal(ct.plan(limbs(LIMBS, 16), ct.Grid(v=16)).mask(), limb[:, None] == limb)


def test_relabelling_the_joints_permutes_the_output():
    torch.manual_seed(1)
    order = torch.randperm(16)
    name = order.argsort().tolist()
    renamed = [(name[a], name[b]) for a, b in SKELETON], [[name[j] for j in g] for g in LIMBS], [name[j] for j in ENDS]
    model, other = HopFIR(SKELETON, LIMBS, ENDS, dim=16).double(), HopFIR(*renamed, dim=16).double()
    own = dict(other.named_buffers())
    other.load_state_dict(model.state_dict() | own)
    x = torch.randn(4, 16, 2, dtype=torch.float64)
    torch.testing.assert_close(other(x[:, order]), model(x)[:, order], atol=1e-10, rtol=0)
    assert not torch.allclose(model(x[:, order]), model(x)[:, order])


def test_frames_are_independent():
    torch.manual_seed(0)
    model = HopFIR(SKELETON, LIMBS, ENDS, dim=16).double()
    x = torch.randn(2, 5, 16, 2, dtype=torch.float64)
    together = model(x)
    assert together.shape == (2, 5, 16, 3)
    for t in range(5):
        torch.testing.assert_close(model(x[:, t]), together[:, t], atol=1e-12, rtol=0)


def test_errors_say_what_to_do():
    with pytest.raises(ct.ChronotopeError, match="joint 3 is not one of 0 to 3, or is in two groups"):
        limbs([[0, 3], [3]], 4)
    with pytest.raises(ct.ChronotopeError, match="17 joints given, the skeleton has 16"):
        HopFIR(SKELETON, LIMBS, ENDS, dim=8)(torch.zeros(1, 17, 2))
    with pytest.raises(ct.ChronotopeError, match="7 channels do not split into 2 heads"):
        GroupAttention(7, 2, 16, LIMBS, ENDS)


class GraphLayer(nn.Module):
    """The 1-hop graph convolution: X W_0 + A_1 X W_1."""

    def __init__(self, dim, adjacency):
        super().__init__()
        self.register_buffer("adjacency", adjacency)
        self.itself, self.near = nn.Linear(dim, dim), nn.Linear(dim, dim, bias=False)

    def forward(self, x):
        return F.gelu(self.itself(x) + self.near(self.adjacency @ x))


def graph_network(like, dim, depth):
    """HopFIR's frame with a graph convolution in place of each attention, and as many parameters as `like`."""
    network = HopFIR(SKELETON, LIMBS, ENDS, dim=dim, depth=depth)
    near = hops(SKELETON, 16, 1)[1]
    for layer in network.layers:
        if not isinstance(layer[1], nn.Sequential):
            layer[1] = GraphLayer(dim, near)
    size, target = (sum(p.numel() for p in model.parameters()) for model in (network, like))
    return network, size / target


def figures(count, seed):
    """Stick figures with fixed bone lengths, joints that bend within limits, arms that swing against the legs.

    Returns camera places [count, 16, 2] and places from the pelvis [count, 16, 3], in metres. The camera is at an
    unknown distance, so that depth needs the size of the whole figure.
    """
    g = torch.Generator().manual_seed(seed)
    length = torch.tensor([0.13, 0.45, 0.45, 0.13, 0.45, 0.45, 0.25, 0.25, 0.2, 0.17, 0.28, 0.25, 0.17, 0.28, 0.25])
    rest = {1: (1, 0, 0), 4: (-1, 0, 0), 10: (-1, 0, 0), 13: (1, 0, 0), 7: (0, 1, 0), 8: (0, 1, 0), 9: (0, 1, 0)}
    phase = 2 * math.pi * torch.rand(count, generator=g)
    swing = {
        2: phase,
        3: phase,
        5: phase + math.pi,
        6: phase + math.pi,
        11: phase,
        12: phase,
        14: phase + math.pi,
        15: phase + math.pi,
    }
    place = torch.zeros(count, 16, 3)
    for (parent, joint), bone in zip(SKELETON, length, strict=True):
        if joint in rest:
            way = torch.tensor(rest[joint], dtype=torch.float32).expand(count, 3)
        else:
            angle = 0.7 * torch.sin(swing[joint]) + (0.4 if joint in (12, 15) else -0.3 if joint in (3, 6) else 0)
            way = torch.stack([torch.zeros(count), -torch.cos(angle), torch.sin(angle)], 1)
        way = F.normalize(way + 0.25 * torch.randn(count, 3, generator=g), dim=1)
        place[:, joint] = place[:, parent] + bone * way
    turn = 2 * math.pi * torch.rand(count, generator=g)
    sin, cos = torch.sin(turn)[:, None], torch.cos(turn)[:, None]
    x, y, z = place.unbind(-1)
    place = torch.stack([cos * x + sin * z, y, cos * z - sin * x], -1)
    distance = 3 + 3 * torch.rand(count, 1, generator=g)
    return 4 * place[..., :2] / (place[..., 2:] + distance[..., None]), place


@pytest.mark.slow
def test_lifts_figures_better_than_a_graph_network_of_its_size():
    torch.manual_seed(0)
    width, depth = 32, 2
    model = HopFIR(SKELETON, LIMBS, ENDS, dim=width, depth=depth)
    baseline, size = graph_network(model, 48, depth)
    assert 0.95 < size < 1.2
    flat, solid = figures(20_000, seed=0)
    test_flat, test_solid = figures(2_000, seed=1)
    errors = {}
    for name, network in (("HopFIR", model), ("graph", baseline)):
        generator = torch.Generator().manual_seed(0)
        steps = 600
        optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            chosen = torch.randint(len(flat), (96,), generator=generator)
            loss = (network(flat[chosen]) - solid[chosen]).norm(dim=-1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            errors[name] = 1000 * (network(test_flat) - test_solid).norm(dim=-1).mean().item()
    print(f"MPJPE in mm: {errors}, sizes: {size:.3f}")
    assert errors["HopFIR"] < 0.95 * errors["graph"]
