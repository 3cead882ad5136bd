"""Every kernel equals the reference: forward, lse, every gradient, over random calls."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings

import oracle
from attend import close, on_cpu, random_call
from chronotope.kernels import BACKENDS
from strategies import Case, cases

CASES = 500


@pytest.mark.parametrize("backend", [name for name in on_cpu() if name != "reference"])
def test_kernels_equal_the_reference(backend: str, count_cases: Callable[[str, int], None]) -> None:
    """In float64, or in float32 where a kernel takes no more; `test_precision` has more to say about rounding."""
    done = 0
    dtype = torch.float64 if torch.float64 in BACKENDS[backend].dtypes else torch.float32

    @settings(max_examples=CASES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=36, depth=2))
    def law(case: Case) -> None:
        nonlocal done
        call = random_call(case, dtype)
        torch.manual_seed(case.seed)
        out, lse = call.run(backend="reference")
        dout, dlse = torch.randn_like(out), torch.randn_like(lse)
        for given_gradients in ((dout, dlse), (dout, None), (None, dlse)):
            expected = call.gradients(*given_gradients, backend="reference")
            found = call.gradients(*given_gradients, backend=backend)
            for x, y in zip(found, expected, strict=True):
                close(x, y)
        done += 1

    law()
    count_cases(f"attention by {backend} against the reference, with every gradient", done)


def test_the_reference_is_the_formula(count_cases: Callable[[str, int], None]) -> None:
    """softmax(softcap(scale * q k^T) + bias) v over the visible keys, one query at a time, with the oracle's mask."""
    done = 0

    @settings(max_examples=CASES // 5, deadline=None, suppress_health_check=list(HealthCheck))
    @given(cases(most=12, depth=1))
    def law(case: Case) -> None:
        nonlocal done
        call = random_call(case, automatic=True)
        out, lse = call.run(backend="reference")
        q, k, v = (x.detach().numpy() for x in (call.q, call.k, call.v))
        mask = np.broadcast_to(oracle.mask(case.text, case.grid, case.key_grid), (q.shape[1], q.shape[2], k.shape[2]))
        scale, softcap = call.kwargs.get("scale", q.shape[3] ** -0.5), call.kwargs.get("softcap")
        bias = scores(case, call.kwargs["bias"], (q.shape[0], *mask.shape))
        group = q.shape[1] // k.shape[1]
        for b, h, i in np.ndindex(q.shape[:3]):
            logits = scale * k[b, h // group] @ q[b, h, i]
            logits = softcap * np.tanh(logits / softcap) if softcap else logits
            seen = mask[h, i]
            weights = np.exp((logits + bias[b, h, i])[seen])
            if not seen.any():
                assert (out[b, h, i] == 0).all()
                assert lse[b, h, i] == -torch.inf
                continue
            np.testing.assert_allclose(lse[b, h, i].item(), np.log(weights.sum()), rtol=1e-12, atol=1e-12)
            expected = weights @ v[b, h // group][seen] / weights.sum()
            np.testing.assert_allclose(out[b, h, i].detach().numpy(), expected, rtol=1e-12, atol=1e-12)
        done += 1

    law()
    count_cases("the reference against its formula", done)


def scores(case: Case, bias: object, shape: tuple[int, ...]) -> np.ndarray:
    """The bias, written out from its definition."""
    import chronotope as ct

    out = np.zeros(shape)
    if isinstance(bias, torch.Tensor):
        return np.broadcast_to(bias.detach().numpy(), shape)
    if bias is None:
        return out
    own, sizes = case.grid.sizes, case.key_grid.sizes
    for i, query in enumerate(oracle.tokens(case.grid)):
        for j, key in enumerate(oracle.tokens(case.key_grid)):
            if query.at is None or key.at is None:
                continue
            gap = {a: key.at[a] - oracle.centre(query.at[a], own[a], sizes[a]) for a in own if a in sizes}
            if isinstance(bias, ct.RelativeBias):
                entry = 0
                for axis, reach in bias.extent.items():
                    entry = entry * (2 * reach + 1) + min(max(gap[axis], -reach), reach) + reach
                out[:, :, i, j] = bias.table[:, entry].detach().numpy()
            elif isinstance(bias, ct.Alibi):
                out[:, :, i, j] = -bias.slopes.detach().numpy() * sum(abs(gap[a]) for a in bias.axes or gap)
    return out
