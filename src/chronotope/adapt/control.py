"""Interventions on the attention of a model: queries, keys, scores, weights and outputs, seen and changed."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from chronotope.adapt.asked import Asked
from chronotope.adapt.attach import Grids, Handle, Layers, Lies, attention_names, selection
from chronotope.adapt.inputs import noise_level
from chronotope.adapt.tap import Handler
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid

Steps = Collection[int] | Callable[[int], bool]


@dataclass(frozen=True, eq=False)
class At:
    """Where and when a control acts.

    layer, index: the name of the layer, and its number among the attention layers. step: how many noise levels came
    before in this sampling; where the model has no noise level, how many calls of the model. time: the noise level.
    grid: where the tokens lie, with those that have no place as its prefix; None: unknown. text: the rows and columns
    of these, in the order of the model. crossed: keys are those of another sequence. memo: kept between the layers of
    one call of the model.
    """

    layer: str
    index: int
    step: int
    time: float | None
    grid: Grid | None
    text: slice
    crossed: bool
    memo: dict[Any, Any] = field(repr=False)


class Control:
    """An intervention. Override what it needs; what is left as it is costs nothing.

    Layers where `scores` or `weights` is overridden hold them, [B, H, Nq, Nk]; the others do not.
    """

    def asks(self, at: At, asked: Asked) -> Asked:
        """Changes queries, keys, values, mask or scale: `asked.but(k=...)`."""
        return asked

    def scores(self, at: At, scores: Float[Tensor, "b h nq nk"]) -> Float[Tensor, "b h nq nk"]:
        """Changes what goes into the softmax: scaled, capped, -inf where a query may not look."""
        return scores

    def weights(self, at: At, weights: Float[Tensor, "b h nq nk"]) -> Float[Tensor, "b h nq nk"]:
        """Changes what comes out of it."""
        return weights

    def out(self, at: At, asked: Asked, out: Float[Tensor, "b h nq dv"]) -> Float[Tensor, "b h nq dv"]:
        """Changes what the heads bring."""
        return out


def control(
    model: nn.Module,
    *controls: Control,
    layers: Layers | None = None,
    heads: Collection[int] | None = None,
    steps: Steps | None = None,
    grid: Grids | None = None,
) -> Handle:
    """Attaches controls to a model, one after the other, until the handle is removed.

    Args:
        model: as for `attach`, with which it composes: scores that a pattern hides are -inf.
        layers: names of attention layers, with `*`, or a function of a name; default: all. Others pay nothing.
        heads: those that are changed; default: all.
        steps: numbers of steps at which they act, such as `range(5)`, or a function of one; default: always.
        grid: as for `attach`.

    Example:
        >>> class Uniform(Control):
        ...     def weights(self, at, weights):
        ...         return torch.full_like(weights, 1 / weights.shape[-1])
        >>> layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        >>> x = torch.randn(1, 5, 16)
        >>> with control(layer, Uniform()):
        ...     out, weights = layer(x, x, x)
        >>> bool((weights == 0.2).all())
        True
    """
    for one in controls:
        if not isinstance(one, Control):
            raise ChronotopeError(f"{one!r} is not a control: derive it from ct.adapt.Control.")
    return Handle(model, Controls(model, controls, layers, heads, steps, grid))


class Controls(Handler):
    """Several controls with one choice of layers, heads and steps."""

    late = True

    def __init__(
        self,
        model: nn.Module,
        controls: tuple[Control, ...],
        layers: Layers | None,
        heads: Collection[int] | None,
        steps: Steps | None,
        grid: Grids | None,
    ):
        self.controls, self.heads, self.grid = controls, None if heads is None else sorted(heads), grid
        self.names = attention_names(model)
        self.chosen = selection(layers, self.names)
        self.due = steps if callable(steps) or steps is None else set(steps).__contains__
        self.lies = Lies(grid)
        self.clock = Clock()
        self.memo: dict[Any, Any] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.memo = {}
        self.clock.tick(model, args, kwargs)
        self.lies.begin(model, args, kwargs)

    def end(self, done: bool) -> None:
        self.lies.end()

    def wants(self, layer: str) -> bool:
        return self.chosen(layer) and (self.due is None or self.due(self.clock.step))

    def edit(self, layer: str, asked: Asked) -> Asked:
        at = self._at(layer, asked)
        for one in self.controls:
            if _overrides(one, "asks"):
                asked = self._headed_call(asked, one.asks(at, asked))
            if _overrides(one, "scores"):
                asked = asked.but(scores=(*asked.scores, self._headed(partial(one.scores, at))))
            if _overrides(one, "weights"):
                asked = asked.but(probs=(*asked.probs, self._headed(partial(one.weights, at))))
        return asked

    def seen(self, layer: str, asked: Asked, out: Tensor) -> Tensor:
        at = self._at(layer, asked)
        for one in self.controls:
            if _overrides(one, "out"):
                out = self._headed(partial(one.out, at, asked))(out)
        return out

    def _at(self, layer: str, asked: Asked) -> At:
        laid = self.lies.lay(layer, asked)
        grid, tail = (None, 0) if isinstance(laid, str) else laid
        nk = asked.k.shape[2]
        text = slice(nk - tail, nk) if tail else slice(0, 0 if grid is None else grid.prefix)
        index = self.names.index(layer) if layer in self.names else -1
        return At(layer, index, self.clock.step, self.clock.time, grid, text, asked.crossed, self.memo)

    def _headed(self, edit: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        if self.heads is None:
            return edit
        return lambda x: self._mixed(x, edit(x.clone()))  # what it is given it may change in place

    def _headed_call(self, old: Asked, new: Asked) -> Asked:
        if self.heads is None or new is old:
            return new
        others = [one.name for one in fields(Asked) if one.name not in "qkv"]
        also = [name for name in others if getattr(new, name) is not getattr(old, name)]
        if also:
            raise ChronotopeError(f"a control of some heads changes {', '.join(also)} of all heads; control all heads.")
        group = old.q.shape[1] // old.k.shape[1]
        k, v = (x.repeat_interleave(group, 1) for x in (old.k, old.v))
        newer = [x.repeat_interleave(old.q.shape[1] // x.shape[1], 1) for x in (new.k, new.v)]
        if newer[0].shape != k.shape:
            raise ChronotopeError("a control of some heads must not change how many keys there are; control all heads.")
        return new.but(q=self._mixed(old.q, new.q), k=self._mixed(k, newer[0]), v=self._mixed(v, newer[1]))

    def _mixed(self, old: Tensor, new: Tensor) -> Tensor:
        count = old.shape[1]
        if not all(-count <= head < count for head in self.heads or ()):
            raise ChronotopeError(f"heads={self.heads}: this layer has {count}.")
        ours = torch.zeros(count, dtype=torch.bool, device=old.device)
        ours[self.heads] = True
        return torch.where(ours[:, None, None], new, old)


class Clock:
    """The step of a sampling: it moves when the noise level falls, and begins again when it rises.

    Calls at one level, as guidance makes them, are one step. A model without a noise level counts its calls. After a
    single call of another kind, the first level of a sampling may count as the next step; its second one tells.
    """

    def __init__(self) -> None:
        self.step, self.time, self.calls = 0, None, 0
        self.falls: bool | None = None
        self.start = 0.0

    time: float | None

    def tick(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = noise_level(model, args, kwargs)
        self.calls += 1
        if time is None:
            self.step = self.calls - 1
        elif self.time is None:
            self.step, self.start = 0, time
        elif time != self.time:
            falls = time < self.time
            turns = self.falls is not None and falls != self.falls
            if turns and self.step == 1 and time != self.start:  # it began with the level before
                self.start, self.falls = self.time, falls
            elif turns:
                self.step, self.start, self.falls = 0, time, None
            else:
                self.step, self.falls = self.step + 1, falls
        self.time = time


def _overrides(one: Control, name: str) -> bool:
    return getattr(getattr(one, name), "__func__", None) is not getattr(Control, name)


class Capture(Control):
    """Keeps attention weights: `kept[layer, step]` lists them call by call.

    reduce: applied before they are kept, such as `lambda w: w.mean(1)`. grad: whether they keep their graph, for losses
    on them.
    """

    def __init__(self, reduce: Callable[[Tensor], Tensor] | None = None, grad: bool = False):
        self.reduce, self.grad = reduce, grad
        self.kept: dict[tuple[str, int], list[Tensor]] = {}

    def weights(self, at: At, weights: Float[Tensor, "b h nq nk"]) -> Float[Tensor, "b h nq nk"]:
        kept = weights if self.grad else weights.detach()
        kept = kept if self.reduce is None else self.reduce(kept)
        # A copy: controls that follow may change the weights in place.
        self.kept.setdefault((at.layer, at.step), []).append(kept.clone())
        return weights

    def clear(self) -> None:
        """Forgets what was kept."""
        self.kept = {}
