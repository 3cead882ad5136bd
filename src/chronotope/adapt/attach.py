"""Patterns in place of the attention of somebody else's model."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import torch
from torch import nn

from chronotope.adapt.asked import Asked
from chronotope.adapt.inputs import TIMES, noise_level
from chronotope.adapt.interface import other_way
from chronotope.adapt.places import read_place
from chronotope.adapt.places_transformers import read_grid
from chronotope.adapt.solve import both
from chronotope.adapt.tap import Handler, Tap, watched
from chronotope.errors import ChronotopeError
from chronotope.grid import Grid
from chronotope.patterns import Pattern

Where = Pattern | Mapping[str, Pattern] | Callable[[str], Pattern | None]
Grids = Grid | Callable[..., Grid]
CALL = "scaled_dot_product_attention"
Layers = str | Iterable[str] | Callable[[str], bool]

REMEMBERED = 4096
"""Calls of layers whose grids are known; more are forgotten."""
UNSEEN = "no call of scaled_dot_product_attention was seen in it: it was not run, or computes attention by itself"


@dataclass(frozen=True)
class Layer:
    """An attention layer: what was done to it, or why nothing was."""

    name: str
    done: str = ""
    why: str = ""

    def __repr__(self) -> str:
        return f"{self.name}: {self.done or 'as it was: ' + self.why}"


class Handle:
    """What was attached to a model, until `remove()` or the end of `with`."""

    def __init__(self, model: nn.Module, handler: Patterns | Handler):
        self._tap, self._handler = Tap.on(model), handler
        self._tap.add(handler)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """Every attention layer, as the last call of the model found it."""
        return tuple(self._handler.layers()) if isinstance(self._handler, Patterns) else ()

    def remove(self) -> None:
        """Restores the model. May be called again."""
        self._tap.drop(self._handler)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return "\n".join(map(repr, self.layers)) or object.__repr__(self)


def attach(model: nn.Module, where: Where, grid: Grids | None = None, layers: Layers | None = None) -> Handle:
    """Computes the attention of a model by a pattern or route, until the handle is removed.

    Args:
        model: of transformers, of diffusers, or any that calls `scaled_dot_product_attention` or has
            `nn.MultiheadAttention`.
        where: who may look at whom, joined with the model's own mask by `&`; or one for each layer, by name (a dict, or
            a function that returns None for a layer that stays as it is). `per_head` gives each head its own.
        grid: where the tokens are: a grid, or a function of the inputs of the model that returns one. Default: read
            from the inputs where the class is known, else a sequence `Grid(n=...)`.
        layers: names, with `*` for any part of one, or a function of a name; default: all.

    Returns:
        A handle: `.layers` says of each layer what was done, or why nothing was.

    Raises:
        ChronotopeError: no layer of these names, or no pattern; in the forward pass: the grid fits no call, a pattern
            does not fit the grid, or a layer drops attention weights.

    Example:
        >>> layer = torch.nn.TransformerEncoderLayer(32, 4, dropout=0.0, batch_first=True)
        >>> x = torch.randn(1, 6 * 6, 32)
        >>> with attach(layer, where=window(h=3, w=3), grid=Grid(h=6, w=6)) as handle:
        ...     y = layer(x)
        >>> handle.layers
        (self_attn: window(h=3, w=3) on Grid(h=6, w=6),)
    """
    return Handle(model, Patterns(model, where, grid, layers))


class Patterns(Handler):
    """Sets `where` and the grid of each call. `of` says which pattern a layer has."""

    def __init__(
        self, model: nn.Module, where: Where, grid: Grids | None, layers: Layers | None, borders: Sequence[float] = ()
    ):
        self.where = checked(where, model)
        self.names = attention_names(model)
        self.model = weakref.ref(model)  # which keeps this
        self.chosen = selection(layers, self.names)
        self.lies = Lies(grid, borders)
        self.found: dict[str, Layer] = {}

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.found = {}
        self.lies.begin(model, args, kwargs)

    def end(self, done: bool) -> None:
        self.lies.end()
        if done and self.lies.now.missed and not self.lies.now.met:
            told = "\n  ".join(map(repr, self.layers()))
            raise ChronotopeError(
                f"the pattern reached no layer of this model:\n  {told}\nGive the grid of its tokens."
            )

    def wants(self, layer: str) -> bool:
        return self.chosen(layer)

    def edit(self, layer: str, asked: Asked) -> Asked:
        where = self.of(layer)
        if where is None:
            return self._note(layer, asked, why="no pattern was named for it")
        laid = self.lies.lay(layer, asked)
        if isinstance(laid, str):
            self.lies.now.missed = True
            return self._note(layer, asked, why=laid)
        grid, tail = laid
        if asked.where is not None and self.lies.grid is not None and self.lies.now.inside:
            own = lay(layer, asked.but(grid=None), self.lies.lie)
            if not isinstance(own, str) and own != laid:
                raise ChronotopeError(f"{layer}: two patterns meet, one on {grid!r} and one on {own[0]!r}.")
        self.lies.now.met = True
        done = f"{where!r} on {grid!r}"
        if not asked.square and where.routes:
            done += "; in decoding a route chooses nothing"
        joint = where if asked.where is None else both(asked.where, where)
        return self._note(layer, asked.but(where=joint, grid=grid, tail=tail), done=done)

    def of(self, layer: str) -> Pattern | None:
        """The pattern of a layer in this call; None: it stays as it is."""
        if isinstance(self.where, Pattern):
            return self.where
        return self.where.get(layer) if isinstance(self.where, Mapping) else self.where(layer)

    def _note(self, layer: str, asked: Asked, done: str = "", why: str = "") -> Asked:
        if done or layer not in self.found:
            self.found[layer] = Layer(layer, done, why)
        return asked

    def layers(self) -> list[Layer]:
        names = list(dict.fromkeys([*self.names, *self.found]))
        return [self.found.get(name) or Layer(name, why=self._unmet(name)) for name in names]

    def _unmet(self, name: str) -> str:
        if not self.chosen(name):
            return "it is not among the layers that were named"
        model = self.model()
        return UNSEEN if model is None else other_way(model.get_submodule(name)) or UNSEEN


@dataclass(frozen=True)
class Lie:
    """Where the tokens of a call of the model lie.

    more: on which side tokens beyond the grid, its prefix, are; None: there are none. elsewhere, ahead, parts: as those
    of a `Place`.
    """

    grid: Grid
    more: str | None = None
    elsewhere: tuple[str, ...] = ()
    ahead: int = 0
    parts: Mapping[str, Grid] = field(default_factory=dict)


class Now(threading.local):
    """The call of the model that runs in this thread: whether its pattern met a layer, or missed one."""

    lie: Lie | None = None
    inside = recorded = met = missed = False
    level = 0


class Lies:
    """Where the tokens of the calls of a model lie, and between which `borders` the noise level of each call is.

    A layer that is run again for its gradient, after the call of the model, has them where it had them first: in one of
    the calls since layers were last run again.
    """

    def __init__(self, grid: Grids | None, borders: Sequence[float] = ()):
        self.grid, self.borders, self.now, self.again = grid, tuple(sorted(borders)), Now(), False
        self.seen: dict[tuple[str, int], dict[tuple[Grid, int] | str, None]] = {}
        self.levels: set[int] = set()

    @property
    def lie(self) -> Lie | None:
        """As the call of the model told; of a part that is called alone, as the user did."""
        return Lie(self.grid) if self.now.lie is None and isinstance(self.grid, Grid) else self.now.lie

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called."""
        self.now.met = self.now.missed = False
        self.now.recorded = torch.is_grad_enabled()  # else nothing is run again
        if self.again:
            self.seen, self.levels, self.again = {}, set(), False
        # Read only where it matters: on a GPU this waits for the number.
        self.now.level = self._between(noise_level(model, args, kwargs)) if self.borders else 0
        if self.now.recorded:
            self.levels.add(self.now.level)
        self.now.lie, self.now.inside = lie_of(model, self.grid, args, kwargs), True

    def _between(self, time: float | None) -> int:
        if time is None:
            raise ChronotopeError(
                f"noise levels {', '.join(map(str, self.borders))} were named, and this model is called without one: "
                f"its inputs have no {', '.join(TIMES)}."
            )
        return sum(time >= border for border in self.borders)

    def end(self) -> None:
        """The call is over."""
        self.now.inside = False

    @property
    def level(self) -> int:
        """How many borders the noise level of the call that runs has reached."""
        if not self.now.inside and len(self.levels) > 1:
            raise ChronotopeError(
                "a layer is run again for its gradient after calls of the model at noise levels whose patterns differ; "
                "call backward after each."
            )
        return self.now.level

    def lay(self, layer: str, asked: Asked) -> tuple[Grid, int] | str:
        """The grid of a call, and how many tokens at its end are the grid's prefix; or why it has none."""
        before = self.seen.get((layer, asked.k.shape[2]), {})
        if self.now.inside or not before:
            found = lay(layer, asked, self.lie)
            if self.now.inside and self.now.recorded:
                if len(self.seen) > REMEMBERED:
                    self.seen.clear()
                self.seen.setdefault((layer, asked.k.shape[2]), {})[found] = None
            return found
        self.again = True
        if len(before) > 1:
            raise ChronotopeError(
                f"{layer} is run again for its gradient after calls of the model whose tokens lay in several ways, "
                f"{' and '.join(map(repr, before))}; call backward after each."
            )
        return next(iter(before))


def lie_of(model: nn.Module, grid: Grids | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Lie | None:
    """As the user says, else as the class of the model does."""
    if grid is None:
        known = read_place(model, args, kwargs)
        if known is not None:
            return Lie(known.grid, known.text, known.elsewhere, known.ahead, known.parts)
        own = read_grid(model, args, kwargs)
        return None if own is None else Lie(own)
    own = grid(*args, **kwargs) if callable(grid) else grid
    if not isinstance(own, Grid):
        raise ChronotopeError(f"grid={grid!r} gave {own!r}; expected a ct.Grid, or a function of the inputs to one.")
    try:
        known = read_place(model, args, kwargs)
    except ChronotopeError:  # inputs that its class does not explain: the user does
        known = None
    if known is None:
        return Lie(own)
    if own.places != known.grid.size:  # of other tokens than the class tells of: of a part, where parts have their own
        return Lie(own, None if known.parts else known.text, known.elsewhere)
    return Lie(own, known.text, known.elsewhere, known.ahead, known.parts)


def lay(layer: str, asked: Asked, lie: Lie | None) -> tuple[Grid, int] | str:
    """The grid of a call, and how many tokens at its end are the grid's prefix; or why it has none."""
    nq, nk = asked.q.shape[2], asked.k.shape[2]
    if asked.crossed:
        return f"{nq} queries look at {nk} keys of another sequence"
    if asked.grid is not None:
        return asked.grid, asked.tail
    if lie is None:
        return Grid(n=nk), 0
    if any(_within(layer, part) for part in lie.elsewhere):
        return f"its {nk} tokens are not those of {lie.grid!r}"
    grid = next((own for part, own in lie.parts.items() if _within(layer, part)), lie.grid)
    if not asked.square and len(grid.axes) == 1:  # decoding: as much of the sequence as there is
        grid = grid.replace(**{grid.axes[0]: max(1, nk - grid.prefix)})
    more = nk - grid.size
    room = lie.more is not None and grid.prefix == 0 and asked.square and more >= lie.ahead
    if more < 0 or (more > 0 and not room) or (not asked.square and len(grid.axes) > 1):
        return f"{nk} tokens do not lie on {grid!r}"
    prefix = grid.prefix + more
    return Grid(prefix, **grid.sizes), max(0, prefix - lie.ahead) if lie.more == "after" else 0


def _within(layer: str, part: str) -> bool:
    """Whether a layer is a part of the model, or in it."""
    return fnmatchcase(f"{layer}.", f"{part}.*")


def attention_names(model: nn.Module) -> list[str]:
    """Modules that look like attention layers, the innermost of those that hold one another."""
    like = [name for name, module in model.named_modules() if watched(module) and calls_attention(module.__class__)]
    return [name for name in like if not any(other.startswith(f"{name}." if name else "") for other in like if other)]


@cache
def calls_attention(kind: Any) -> bool:
    """Whether a class says so by its name, or calls torch's function by itself."""
    if "attention" in kind.__name__.lower() or "attn" in kind.__name__.lower():
        return True
    codes = [getattr(value, "__code__", None) for one in kind.__mro__ for value in vars(one).values()]
    return any(CALL in code.co_names for code in codes if code is not None)


def checked(where: Any, model: nn.Module) -> Where:
    """Raises unless this is a pattern, patterns by names that the model has, or a function."""
    if isinstance(where, Mapping):
        there = dict(model.named_modules())
        missing = [repr(name) for name in where if name not in there]
        if missing:
            names = ", ".join(attention_names(model)) or "none"
            raise ChronotopeError(f"where names {', '.join(missing)}, which this model has not; it has {names}.")
    wrong = [one for one in (where.values() if isinstance(where, Mapping) else [where]) if not isinstance(one, Pattern)]
    if wrong and (isinstance(where, Mapping) or not callable(where)):
        raise ChronotopeError(f"where={wrong[0]!r}: expected a pattern or a route, such as ct.window(t=3, h=5, w=5).")
    return where


def selection(layers: Layers | None, names: list[str]) -> Callable[[str], bool]:
    """Whether a name is meant."""
    if layers is None:
        return lambda name: True
    if callable(layers):
        return layers
    wanted = [layers] if isinstance(layers, str) else list(layers)
    for text in wanted:
        if not any(fnmatchcase(name, text) for name in names):
            raise ChronotopeError(f"layers={text!r} names no attention layer; there are: {', '.join(names) or 'none'}.")
    return lambda name: any(fnmatchcase(name, text) for text in wanted)
