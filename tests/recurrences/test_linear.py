"""Linear attention against its sum over pairs; feature maps; normalisers."""

from __future__ import annotations

import math

import pytest
import torch

import chronotope as ct
from chronotope import features

H, D = 3, 8
MAPS = {
    "identity": features.Identity,
    "elu": features.Elu,
    "relu": features.Relu,
    "exp": features.Exp,
    "softmax": features.Softmax,
    "softmax of both": lambda: features.Softmax(both=True),
    "taylor": features.Taylor,
    "random": lambda: features.Random(D, 40),
    "learned": lambda: features.Learned(H, D),
    "cosine": lambda: features.Cosine(50),
    "lrpe": lambda: features.Lrpe(H, D),
}
POSITIVE = [name for name in MAPS if name not in ("identity", "lrpe", "relu", "cosine")]


def qkv(n: int = 20, m: int = 30, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(0)
    return [torch.randn(2, H, size, D, generator=rng, dtype=dtype).requires_grad_() for size in (n, m, m)]


@pytest.mark.parametrize("causal", [False, True], ids=["whole", "causal"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("name", MAPS)
def test_linear_attention_is_the_sum_over_pairs(name: str, normalize: bool, causal: bool) -> None:
    phi = MAPS[name]().double()
    q, k, v = qkv(20, 20 if causal else 30)
    weights = phi(q) @ phi(k).transpose(2, 3)
    assert phi(q).shape[-1] == phi.size(D)
    if causal:
        weights = weights.tril()
    if normalize:
        total = weights.sum(-1, keepdim=True)
        weights = torch.where(total == 0, 0.0, weights / torch.where(total == 0, 1.0, total))
    expected = weights @ v
    found = ct.linear_attention(q, k, v, features=phi, normalize=normalize, causal=causal)
    torch.testing.assert_close(found, expected)
    wanted = [q, k, v, *phi.parameters()]
    for x, y in zip(
        torch.autograd.grad(found.square().sum(), wanted),
        torch.autograd.grad(expected.square().sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", POSITIVE)
def test_positive_features_have_positive_normalizers(name: str) -> None:
    phi = MAPS[name]()
    q, k, _ = qkv(200, 200, torch.float32)
    found = ct.normalizers(q, k, features=phi)
    assert found.negative.tolist() == found.zero.tolist() == [0.0] * H and bool((found.smallest > 0).all())


def test_normalizers_that_are_not() -> None:
    q, k, _ = qkv(200, 200, torch.float32)
    signed = ct.normalizers(q, k)
    assert 0.3 < float(signed.negative.mean()) < 0.7
    sparse = ct.normalizers(q - 1.5, k - 1.5, features=features.Relu())
    assert float(sparse.zero.mean()) > 0.01 and float(sparse.negative.sum()) == 0
    assert "% negative" in str(signed) and str(signed).count("\n") == H - 1
    whole = ct.normalizers(q, k, causal=False)
    total = torch.einsum("bhnd,bhd->hbn", q, k.sum(2)).flatten(1)
    torch.testing.assert_close(whole.negative, (total < 0).float().mean(1))


def test_keys_left_out_may_be_anything() -> None:
    q, k, v = (x.detach() for x in qkv())
    keep = torch.rand(2, 30) < 0.7
    broken = [torch.where(keep[:, None, :, None], x, math.nan) for x in (k, v)]
    phi = features.Softmax()
    weights = (q @ phi(k).transpose(2, 3)).masked_fill(~keep[:, None, None], 0.0)
    expected = weights @ v / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(ct.linear_attention(q, phi(broken[0]), broken[1], keep=keep), expected)


def test_taylor_is_the_series_of_exp() -> None:
    q, k, _ = qkv()
    s = q @ k.transpose(2, 3) / math.sqrt(D)
    phi = features.Taylor()
    torch.testing.assert_close(phi(q) @ phi(k).transpose(2, 3), 1 + s + s**2 / 2)


def test_random_features_are_exp_on_average() -> None:
    q, k, _ = (0.4 * x.detach() for x in qkv(8, 8))
    exact = (q @ k.transpose(2, 3) / math.sqrt(D)).exp()

    def error(count: int) -> float:
        found = [features.Random(D, count, seed).double() for seed in range(8)]
        return float(torch.stack([(phi(q) @ phi(k).transpose(2, 3) - exact).abs().mean() for phi in found]).mean())

    assert error(1024) < 0.35 * error(64)
    many = torch.stack([(p := features.Random(D, 256, seed).double())(q) @ p(k).transpose(2, 3) for seed in range(200)])
    assert float((many.mean(0) / exact - 1).abs().mean()) < 0.03


@pytest.mark.parametrize("name", ["cosine", "lrpe"])
def test_places_go_on_where_a_piece_ends(name: str) -> None:
    phi = MAPS[name]().double()
    x = qkv()[1]
    pieces = torch.cat([phi(x[:, :, :11]), phi(x[:, :, 11:], 11)], 2)
    torch.testing.assert_close(pieces, phi(x))
    torch.testing.assert_close(phi(x, torch.arange(30)), phi(x))


def test_refusals() -> None:
    q, k, v = qkv()
    with pytest.raises(ct.ChronotopeError, match=r"expected \[B, H, N, D\]"):
        ct.linear_attention(q, k[:, :2], v)
    with pytest.raises(ct.ChronotopeError, match="give a larger length"):
        features.Cosine(10)(k)
    with pytest.raises(ct.ChronotopeError, match="made for heads of 4"):
        features.Random(4, 8)(k)
