"""The law of rounding: against float64, a kernel errs at most twice as much as dense attention by torch in its dtype.

    error(kernel) <= 2 * error(torch) + luck        for out, lse and every gradient; root mean square and largest

Torch's attention is `scaled_dot_product_attention`; with a bias or a softcap, the formula in torch's operators, in the
dtype. Where few numbers meet, rounding is luck: torch may be exact by chance. So it runs several times with keys and
features in other orders, which is the same function, and its largest error counts. That does not help where one number
decides: the dq of a query that sees one key is scale * P (dP - D) k, which is 0, as dP and D are the same number. Each
has a rounding of its own, and so dq is off by half a step of dP, or by chance by nothing. So `luck` is the largest
error of some runs of the formula in float64 where each number that any implementation holds is off by a random
rounding (`formula`): results, and out for D, by up to half a step of the dtype; all on the way by up to half a step of
float32; and a sum of n terms by its n running sums. The largest of few runs is luck itself: a kernel whose roundings
were random would err more than 16 runs once in 17 times. So where few numbers meet and it errs more, 1,000 runs decide.

Over many problems together (`Pool`), and for the root mean square of many numbers (`large`), luck evens out: there a
kernel errs at most twice as much as torch, and no more.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

import chronotope as ct
from chronotope.grid import Coords
from strategies import Case, random_tile

NAMES = ("out", "lse", "dq", "dk", "dv", "dbias")
ORDERS = 4  # runs of torch's attention
SAMPLES = 16  # runs with random roundings
DECISIVE, AT_ONCE = 1000, 50  # and so many where a kernel errs more than those
HALF_STEP = torch.finfo(torch.float32).eps / 2

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """One call with its numbers, all of one dtype and on one device. `bias`: a tensor, or a module of one parameter."""

    plan: ct.Plan
    q: Float[Tensor, "b h nq d"]
    k: Float[Tensor, "b hk nk d"]
    v: Float[Tensor, "b hk nk dv"]
    dout: Float[Tensor, "b h nq dv"]
    bias: Tensor | ct.Bias | None = None
    softcap: float | None = None

    @classmethod
    def random(
        cls, plan: ct.Plan, sizes: tuple[int, int, int, int], dtype: torch.dtype, seed: int = 0, size: float = 1.0
    ) -> Problem:
        """Normal numbers, q times `size` (4: peaked); `sizes` = (B, Hk, D, Dv)."""
        rng = torch.Generator().manual_seed(seed)
        batch, key_heads, d, dv = sizes
        heads, queries, keys = plan.heads, plan.grid.size, plan.key_grid.size
        shapes = ((heads, queries, d), (key_heads, keys, d), (key_heads, keys, dv), (heads, queries, dv))
        q, k, v, dout = (torch.randn(batch, *shape, generator=rng).to(dtype) for shape in shapes)
        return cls(plan, q * size, k, v, dout)

    def biased(self, bias: Tensor | ct.Bias | None, softcap: float | None = None) -> Problem:
        """The same with a bias and a softcap."""
        return replace(self, bias=None if bias is None else copy.deepcopy(bias).to(self.q), softcap=softcap)

    def to(self, device: str) -> Problem:
        """The same on another device."""
        q, k, v, dout = (x.to(device) for x in (self.q, self.k, self.v, self.dout))
        return Problem(self.plan, q, k, v, dout).biased(self.bias, self.softcap)

    @property
    def scale(self) -> float:
        return float(self.q.shape[3] ** -0.5)

    @property
    def group(self) -> int:
        """Query heads of one key head."""
        return self.q.shape[1] // self.k.shape[1]

    @cached_property
    def mask(self) -> Bool[Tensor, "h nq nk"]:
        mask = self.plan.mask().to(self.q.device)
        return mask.expand(self.q.shape[1], *mask.shape[-2:])

    @cached_property
    def blind(self) -> Bool[Tensor, "h nq 1"]:
        """Queries that see no key."""
        return ~self.mask.any(2)[..., None]

    @cached_property
    def unseen(self) -> Bool[Tensor, "hk nk 1"]:
        """Keys that no query of their heads sees."""
        return ~self.mask.any(1).unflatten(0, (-1, self.group)).any(1)[..., None]

    @property
    def spoiled(self) -> Problem:
        """NaN in the keys that nobody sees, and in the queries that see nothing."""
        q = self.q.masked_fill(self.blind, torch.nan)
        k, v = (x.masked_fill(self.unseen, torch.nan) for x in (self.k, self.v))
        return replace(self, q=q, k=k, v=v)

    @property
    def theta(self) -> list[Tensor]:
        """What the bias learns: the tensor, or the parameter."""
        if isinstance(self.bias, ct.Bias):
            return [x.detach() for x in self.bias.parameters()]
        return [] if self.bias is None else [self.bias]

    def score(self, theta: Tensor) -> Float[Tensor, "b h nq nk"]:
        """The bias with this parameter: that of each pair is one of its numbers times something, or 0."""
        shape = (*self.q.shape[:3], self.k.shape[2])
        if not isinstance(self.bias, ct.Bias):
            return theta.expand(shape)
        ((name, _),) = self.bias.named_parameters()
        q, k = (torch.arange(n, device=theta.device) for n in shape[2:])
        places = Coords.of(self.plan.grid, q[:, None]), Coords.of(self.plan.key_grid, k[None, :])
        return torch.func.functional_call(self.bias, {name: theta}, places).expand(shape)

    def logits(self, q: Tensor, k: Tensor, scores: list[Tensor]) -> Float[Tensor, "b h nq nk"]:
        """softcap(scale * q k^T) + scores, every query head with keys of its own."""
        out = self.scale * (q @ k.mT)
        if self.softcap is not None:
            out = self.softcap * torch.tanh(out / self.softcap)
        return out + scores[0] if scores else out


def random_problem(case: Case, dtype: torch.dtype) -> Problem:
    """A problem on the grids and the pattern of a case: tiles, grouped heads, sizes at random, some of them peaked."""
    rng = case.rng
    heads = case.where.heads or case.heads
    key_heads = int(rng.choice([n for n in range(1, heads + 1) if heads % n == 0]))
    d = int(rng.integers(1, 41))
    dv = d if rng.random() < 0.5 else int(rng.integers(1, 41))
    tile = random_tile(rng, case.grid) if rng.random() < 0.7 else None
    plan = ct.plan(case.where, case.grid, case.key_grid, heads=heads, tile=tile)
    size = 4.0 if rng.random() < 0.3 else 1.0
    return Problem.random(plan, (int(rng.integers(1, 3)), key_heads, d, dv), dtype, case.seed, size)


Run = Callable[[Problem], Results]
"""A kernel: the results of a problem by NAMES, dbias where there is a bias."""


def named(*results: Tensor) -> Results:
    """Results by name, without their history."""
    return {name: x.detach() for name, x in zip(NAMES, results, strict=False)}


def attention(backend: str) -> Run:
    """`ct.attention` by this backend."""

    def run(p: Problem) -> Results:
        leaves = [x.detach().clone().requires_grad_() for x in (p.q, p.k, p.v, *p.theta)]
        bias = leaves[3] if leaves[3:] else None
        if isinstance(p.bias, ct.Bias):
            ((name, _),) = p.bias.named_parameters()
            leaves[3] = nn.Parameter(leaves[3])
            bias = copy.deepcopy(p.bias)
            setattr(bias, name, leaves[3])
        grids = {"grid": p.plan.grid, "key_grid": p.plan.key_grid, "where": p.plan}
        out, lse = ct.attention(*leaves[:3], **grids, bias=bias, softcap=p.softcap, return_lse=True, backend=backend)
        return named(out, lse, *torch.autograd.grad(out, leaves, p.dout))

    return run


def dense(p: Problem, order: int) -> Results:
    """Attention by torch, every query against every key, keys and features in the `order`-th random order, put back.

    Queries that see nothing see all here, with dout 0: they add 0 to every sum. Where D and Dv differ, zeros fill the
    shorter: torch's fused kernels want them equal, and its unfused one holds all but the results in float32.
    """
    rng = torch.Generator().manual_seed(order)
    keys, d, dv = (torch.randperm(n, generator=rng).to(p.q.device) for n in (*p.k.shape[2:], p.v.shape[3]))
    inputs = (p.q[..., d], p.k[:, :, keys][..., d], p.v[:, :, keys][..., dv], *p.theta)
    q, k, v, *theta = leaves = [x.detach().clone().requires_grad_() for x in inputs]
    mask, dout = (p.mask | p.blind)[None, ..., keys], p.dout.masked_fill(p.blind, 0)[..., dv]
    y, z = (x.repeat_interleave(p.group, 1) for x in (k, v))
    if p.theta or p.softcap is not None:
        logits = p.logits(q, y, [p.score(x)[..., keys] for x in theta])
        out = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1) @ z
    else:
        wide = [F.pad(x, (0, max(len(d), len(dv)) - x.shape[3])) for x in (q, y, z)]
        out = F.scaled_dot_product_attention(*wide, attn_mask=mask, scale=p.scale)[..., : len(dv)]
    dq, dk, dv_, *dtheta = torch.autograd.grad(out, leaves, dout)
    # Torch gives no lse. A kernel's is float32, whatever the dtype.
    logits = p.logits(q.float(), y.float(), [p.score(x.float())[..., keys] for x in theta])
    lse = torch.logsumexp(logits.masked_fill(~mask, -torch.inf), -1).masked_fill(p.blind[..., 0], -torch.inf)
    back, back_d, back_dv = keys.argsort(), d.argsort(), dv.argsort()
    out, dq = out[..., back_dv].masked_fill(p.blind, 0), dq[..., back_d].masked_fill(p.blind, 0)
    return named(out, lse, dq, dk[:, :, back][..., back_d], dv_[:, :, back][..., back_dv], *dtheta)


class Rounding:
    """Random roundings of numbers and of sums: so many samples of each, or with 0 none at all."""

    def __init__(self, p: Problem, samples: int, seed: int = 0):
        info, self.samples = torch.finfo(p.q.dtype), samples
        self.half_step, self.smallest = info.eps / 2, info.smallest_normal
        self.rng = torch.Generator(p.q.device).manual_seed(seed)

    def _off(self, x: Tensor, size: Tensor) -> Tensor:
        """x off by up to `size`, all errors alike. Samples are a dimension before the other four."""
        if not self.samples:
            return x
        shape = x.shape if x.ndim > 4 else (self.samples, *x.shape)
        return x + size * (2 * torch.rand(shape, generator=self.rng, device=x.device) - 1)

    def stored(self, x: Tensor) -> Tensor:
        """A number in the dtype. Below its smallest normal number all steps are the same."""
        return self._off(x, self.half_step * x.abs().clamp(min=self.smallest))

    def held(self, x: Tensor) -> Tensor:
        """A number in float32."""
        return self._off(x, HALF_STEP * x.abs())

    def summed(self, total: Tensor, squares: Tensor, count: Tensor | int) -> Tensor:
        """A sum of `count` terms in float32; `squares` is the sum of their squares.

        With the terms in random order, the squares of its running sums are (count + 1) (squares / 6 + total^2 / 3).
        """
        return self._off(total, HALF_STEP * ((count + 1) * (squares / 6 + total.square() / 3)).sqrt())

    def product(self, x: Tensor, y: Tensor, count: Tensor | int) -> Tensor:
        """x @ y, of whose terms so many are not 0."""
        return self.summed(x @ y, x.square() @ y.square() if self.samples else x.new_zeros(()), count)


@torch.no_grad()
def formula(p: Problem, samples: int = 0, seed: int = 0) -> Results:
    """The exact results in float64, or samples of them with roundings, on a dimension before the others."""
    r = Rounding(p, samples, seed)
    q, dout = p.q.double(), p.dout.double()
    k, v = (x.double().repeat_interleave(p.group, 1) for x in (p.k, p.v))
    keys, queries = p.mask.sum(-1, keepdim=True), p.mask.sum(-2)[..., None]
    logits, slope = r.held(p.scale * r.product(q, k.mT, q.shape[3])), None
    if p.softcap is not None:
        bend = r.held(torch.tanh(logits / p.softcap))
        logits, slope = r.held(p.softcap * bend), r.held(1 - bend.square())
    for theta in p.theta:
        logits = r.held(logits + r.held(p.score(theta.double())))
    top = logits.masked_fill(~p.mask, -torch.inf).amax(-1, keepdim=True).masked_fill(p.blind, 0)
    weights = r.held(torch.exp(logits - top)).masked_fill(~p.mask, 0)
    total = r.product(weights, torch.ones_like(k[..., :1]), keys).masked_fill(p.blind, 1)
    out = r.stored(r.product(weights, v, keys) / total)
    lse = r.held(top + torch.log(total))
    # The gradients, by the formulas of `kernels.tiled`: from lse, and from out as it was stored.
    weights = r.held(torch.exp(logits - lse)).masked_fill(~p.mask, 0)
    shift = r.summed((dout * out).sum(-1, keepdim=True), (dout * out).square().sum(-1, keepdim=True), v.shape[3])
    ds = r.held(weights * (r.product(dout, v.mT, v.shape[3]) - shift))
    bent = ds if slope is None else r.held(ds * slope)
    dq = p.scale * r.product(bent, k, keys)
    dk, dv = p.scale * r.product(bent.mT, q, queries), r.product(weights.mT, dout, queries)
    dk, dv = (x.unflatten(-3, (-1, p.group)).sum(-3) for x in (dk, dv))
    gradients = [r.stored(x) for x in (dq, dk, dv, *(learned(p, r, ds, theta) for theta in p.theta))]
    return named(out, lse.masked_fill(p.blind, -torch.inf)[..., 0], *gradients)


def learned(p: Problem, r: Rounding, ds: Tensor, theta: Tensor) -> Tensor:
    """The gradient of the bias: sums over the pairs that a number of it belongs to."""
    with torch.enable_grad():
        theta = theta.double().requires_grad_()
        score = p.score(theta)
    times = p.score(torch.ones_like(theta)).detach()

    def pull(x: Tensor) -> Tensor:
        """The sums of times * x."""
        given = x.reshape(-1, *score.shape)
        (out,) = torch.autograd.grad(score, theta, given, retain_graph=True, is_grads_batched=True)
        return out if x.ndim > 4 else out[0]

    pairs = pull((p.mask & (times != 0)).expand(score.shape) / torch.where(times == 0, 1.0, times))
    return r.summed(pull(ds), pull(times * ds.square()), pairs)


@dataclass(frozen=True)
class Errors:
    """Root mean square and largest error of each result."""

    mean: dict[str, float]
    most: dict[str, float]

    @classmethod
    def of(cls, found: Results, exact: Results) -> Errors:
        """An infinity where it should be is no error."""
        gaps = {name: torch.where(found[name] == y, 0.0, found[name] - y) for name, y in exact.items()}
        means = {name: float(gap.square().mean().sqrt()) for name, gap in gaps.items()}
        return cls(means, {name: float(gap.abs().max()) for name, gap in gaps.items()})

    @classmethod
    def largest(cls, many: list[Errors]) -> Errors:
        """The largest of each."""
        means = {name: max(errors.mean[name] for errors in many) for name in many[0].mean}
        return cls(means, {name: max(errors.most[name] for errors in many) for name in means})


@dataclass(frozen=True)
class Bounds:
    """A problem with its exact results, the errors of torch, and those of random rounding."""

    problem: Problem
    exact: Results
    torch: list[Errors]
    luck: list[Errors]

    @classmethod
    def of(cls, p: Problem, samples: int = SAMPLES) -> Bounds:
        """`samples` of random rounding; where many numbers meet, one will do."""
        exact = formula(p)
        return cls(p, exact, [Errors.of(dense(p, order), exact) for order in range(ORDERS)], random(p, exact, samples))

    def check(self, run: Run, large: bool = False) -> Errors:
        """The errors of a kernel; AssertionError where it breaks the law.

        `large`: so many numbers that no root mean square is luck, but that of a bias. Also: NaN in what nobody sees
        changes nothing, and queries that see nothing and keys that nobody sees have out and gradients 0.
        """
        p, found = self.problem, run(self.problem)
        assert found.keys() == self.exact.keys()
        for name, x in found.items():
            assert (x.dtype, x.shape) == (torch.float32 if name == "lse" else p.q.dtype, self.exact[name].shape), name
        errors = Errors.of(found, self.exact)
        over = self.over(errors, self.luck, large)
        if over and not large:
            more = [random(p, self.exact, AT_ONCE, seed) for seed in range(1, DECISIVE // AT_ONCE + 1)]
            over = self.over(errors, [luck for some in more for luck in some], large)
        assert not over, "; ".join(over)
        for name, nobody in (("out", p.blind), ("dq", p.blind), ("dk", p.unseen), ("dv", p.unseen)):
            assert (found[name].masked_select(nobody) == 0).all(), f"{name} where nothing is seen"
        if p.blind.any() or p.unseen.any():
            for name, x in run(p.spoiled).items():
                assert torch.equal(x, found[name]), f"{name} changes with NaN in what nobody sees"
        return errors

    def over(self, errors: Errors, luck: list[Errors], large: bool) -> list[str]:
        """Where a kernel errs more than the law allows, by these runs of random rounding."""
        out, theirs, most = [], Errors.largest(self.torch), Errors.largest(luck)
        for kind in ("mean", "most"):
            for name, error in getattr(errors, kind).items():
                other, chance = getattr(theirs, kind)[name], getattr(most, kind)[name]
                band = 0.0 if large and kind == "mean" and name != "dbias" else chance
                if not error <= 2 * other + band:
                    out.append(f"{name}, {kind}: {error:.3g}; torch {other:.3g}, luck {chance:.3g}")
        return out


def random(p: Problem, exact: Results, samples: int, seed: int = 0) -> list[Errors]:
    """The errors of runs with random roundings."""
    rounded = formula(p, samples, seed)
    return [Errors.of({name: x[i] for name, x in rounded.items()}, exact) for i in range(samples)]


def check(run: Run, p: Problem) -> Errors:
    """The law for one kernel and one problem."""
    return Bounds.of(p).check(run)


@dataclass
class Pool:
    """Squares of the errors of a kernel and of torch over many problems, in units of those of random rounding."""

    squares: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))

    def add(self, bounds: Bounds, errors: Errors) -> None:
        """The errors that `check` found."""
        for name, error in errors.mean.items():
            unit = np.mean([luck.mean[name] ** 2 for luck in bounds.luck])
            if unit > 0:
                self.squares[name][0] += error**2 / unit
                self.squares[name][1] += np.mean([theirs.mean[name] ** 2 for theirs in bounds.torch]) / unit

    @property
    def ratios(self) -> dict[str, float]:
        """Error by torch's error, of each result."""
        return {name: float(np.sqrt(ours / theirs)) for name, (ours, theirs) in self.squares.items()}

    def check(self) -> None:
        """AssertionError where all errors together are more than twice torch's."""
        assert self.squares
        assert all(ratio <= 2 for ratio in self.ratios.values()), self.ratios
