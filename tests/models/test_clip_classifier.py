"""The clip classifier: which tokens its compositions let meet, the class token, and what is kept in its file."""

import pytest
import torch

from chronotope.errors import ChronotopeError
from chronotope.models import ClipClassifier

CLIP = (2, 4, 1, 6, 10)  # patch 2: a grid of 4 x 3 x 5
COMPOSITIONS = {
    "joint": {"order": "thw"},
    "divided": {"order": "t hw"},
    "axial": {"order": "t h w"},
    "factorised": {"order": ["hw", "hw", "t", "t"], "layers": 4},
    "interleaved": {"order": ["hw", "t"], "layers": 4},
    "spatial window, causal time": {"order": "hw t", "near": 3, "past": True},
}


def model(seed=0, **options):
    torch.manual_seed(seed)
    return ClipClassifier(3, patch=2, dim=24, heads=2, **options).double()


def clips(seed=0):
    return torch.rand(CLIP, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def met(net):
    """[from, to]: whose output tokens change when a patch does, by the gradient of each output token."""
    x, grid = net.embed(clips()[:1])
    x = x.detach().requires_grad_()
    y = net.stack(x, grid)
    rows = [
        torch.autograd.grad(y[0, i].square().sum(), x, retain_graph=True)[0][0].ne(0).any(-1) for i in range(grid.size)
    ]
    return torch.stack(rows), grid


@pytest.mark.parametrize("name", COMPOSITIONS)
def test_which_tokens_meet(name):
    seen, grid = met(model(**{"layers": 1, **COMPOSITIONS[name]}))
    t, h, w = grid.coords().T
    if name == "spatial window, causal time":
        near = ((h[:, None] - h).abs() <= 1) & ((w[:, None] - w).abs() <= 1) & (t <= t[:, None])
        assert torch.equal(seen, near)
    else:
        assert bool(seen.all())
    if name == "divided":
        same = (h[:, None] == h) & (w[:, None] == w)
        only, _ = met(model(layers=1, order="t"))
        assert torch.equal(only, same)


@pytest.mark.parametrize("name", [name for name in COMPOSITIONS if name != "spatial window, causal time"])
def test_a_class_token_reads_every_patch_and_its_gradients_reach_every_weight(name):
    net = model(**COMPOSITIONS[name], token=True)
    x = clips().requires_grad_()
    net(x).square().sum().backward()
    assert bool(x.grad.ne(0).all())
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in net.parameters())
    features = net.features(clips())
    with torch.no_grad():
        net.token.add_(torch.linspace(-1, 1, 24))
    assert not torch.allclose(net.features(clips()), features)


def test_one_who_sees_the_past_only_is_not_told_what_comes():
    net = model(order="hw t", past=True)
    x, later = clips(), clips()
    later[:, 3] += 1
    grid = net.embed(x)[1]
    first, second = (net.stack(*net.embed(c)).unflatten(1, grid.shape) for c in (x, later))
    torch.testing.assert_close(first[:, :3], second[:, :3])
    assert not torch.allclose(first[:, 3], second[:, 3])


@pytest.mark.parametrize("options", [{"token": True}, {**COMPOSITIONS["interleaved"], "near": 3, "dropout": 0.1}])
def test_what_is_saved_comes_back(options, tmp_path):
    net = ClipClassifier(3, patch=2, dim=24, heads=2, **options).eval()
    net.save_pretrained(tmp_path)
    again = ClipClassifier.from_pretrained(tmp_path).eval()
    x = clips().float()
    assert torch.equal(again(x), net(x)) and again.config == net.config


def test_settings_of_files_written_before_the_class_token_still_load():
    old = {
        "classes": 3,
        "patch": 2,
        "channels": 1,
        "dim": 24,
        "heads": 2,
        "layers": 2,
        "order": "t hw",
        "ordered": True,
    }
    net = ClipClassifier(**old)
    assert "token" not in net.state_dict() and {name.split(".")[0] for name in net.state_dict()} == {
        "embed",
        "stack",
        "head",
    }


def test_what_is_refused():
    with pytest.raises(ChronotopeError, match="sees nothing"):
        model(token=True, past=True)
    for options in ({"order": []}, {"order": ["hw", ""]}, {"order": ["tx"]}):
        with pytest.raises(ChronotopeError, match="groups of the axes"):
            model(**options)
