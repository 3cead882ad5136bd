"""The place where the attention of a model is seen and answered: hooks that know the layer, a mode that sees the call.

A hook on every module that is not plain torch says which layer runs; a torch function mode, on while such a module
runs, sees its calls of `scaled_dot_product_attention`. So a layer that is run again for its gradient (checkpointing)
is met like the first time, and a model without handlers has no hook.
"""

from __future__ import annotations

import inspect
import math
import sys
import threading
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import CheckpointFunction, checkpoint

from chronotope.adapt.asked import Asked, Own
from chronotope.adapt.masks import read_mask
from chronotope.adapt.multi_head import multi_head
from chronotope.adapt.solve import solve, weights
from chronotope.attention import attention
from chronotope.errors import ChronotopeError
from chronotope.patterns import full
from chronotope.planning import Plan

OTHERS = {"encoder_hidden_states", "key_value_states", "encoder_output", "encoder_outputs", "context", "memory"}
"""What modules call another sequence that they look at."""


class Handler:
    """Somebody who has a say in the attention of a model. Each method may be left as it is.

    Those that are `late` come after the others, which say on which grid the tokens lie.
    """

    late = False

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The model is called."""

    def end(self, done: bool) -> None:
        """The call is over; not done: it ended in an error."""

    def wants(self, layer: str) -> bool:
        """Whether anything is to be done at this layer."""
        return True

    def edit(self, layer: str, asked: Asked) -> Asked:
        """What the layer shall ask for."""
        return asked

    def seen(self, layer: str, asked: Asked, out: Tensor) -> Tensor:
        """What it shall get, [B, H, Nq, Dv]."""
        return out


class _Frame:
    """A module that runs: its tap, its name, and what it was given."""

    def __init__(self, tap: Tap, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]):
        self.tap, self.name, self.module, self.args, self.kwargs = tap, name, module, args, kwargs

    def crossed(self, keys: int) -> bool:
        """Whether it was given another sequence of so many tokens to look at."""
        given = dict(zip(parameters(type(self.module)), self.args, strict=False)) | self.kwargs
        if isinstance(self.module, nn.MultiheadAttention):
            return given.get("query") is not given.get("key")
        own = [x for name, x in given.items() if name not in OTHERS]
        others = [x for name, x in given.items() if name in OTHERS and isinstance(x, Tensor)]
        return any(x.ndim == 3 and x.shape[1] == keys and all(x is not y for y in own) for x in others)


_PARAMETERS: dict[Any, tuple[str, ...]] = {}


def parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, by its class."""
    if kind not in _PARAMETERS:
        _PARAMETERS[kind] = tuple(inspect.signature(kind.forward).parameters)[1:]
    return _PARAMETERS[kind]


class _Running(threading.local):
    """What runs in this thread."""

    def __init__(self) -> None:
        self.frames: list[_Frame] = []
        self.mode: _Watch | None = None
        self.busy = False


_RUNNING = _Running()
_TAPS: weakref.WeakKeyDictionary[nn.Module, Tap] = weakref.WeakKeyDictionary()


class Tap:
    """The interception of one model, there as long as it has handlers."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)
        self.handlers: list[Handler] = []
        self.undo: list[Callable[[], None]] = []

    @staticmethod
    def on(model: nn.Module) -> Tap:
        """That of the model, made if it has none."""
        return _TAPS.setdefault(model, Tap(model))

    def add(self, handler: Handler) -> None:
        if not self.handlers:
            self._install()
        self.handlers.append(handler)

    def drop(self, handler: Handler) -> None:
        """Takes a handler away; with the last one go the hooks."""
        if handler not in self.handlers:
            return
        self.handlers.remove(handler)
        if not self.handlers:
            while self.undo:
                self.undo.pop()()
            _forget(self)
            _compile_anew(self.model())

    def _install(self) -> None:
        from chronotope.adapt.interface import Switch

        model = self.model()
        assert model is not None
        for name, module in model.named_modules():
            if name == "" or watched(module):
                into, out_of = _Hook(self._enter(name, module)), _Hook(self._leave(name, module))
                enter = module.register_forward_pre_hook(into, prepend=True, with_kwargs=True)
                leave = module.register_forward_hook(out_of, always_call=True)
                self.undo += [enter.remove, leave.remove]
        self.switch = Switch(model)
        self.undo.append(self.switch.undo)
        _compile_anew(model)

    # A copy of a module has the hooks of its original: there they do nothing.

    def _enter(self, name: str, module: nn.Module) -> Callable[..., None]:
        tap, watched = weakref.ref(self), weakref.ref(module)

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            own = tap()
            if own is None or watched() is not module:
                return
            _push(_Frame(own, name, module, args, kwargs))
            if name == "":
                own.switch.refresh()
                for handler in own.handlers:
                    handler.begin(module, args, kwargs)

        return hook

    def _leave(self, name: str, module: nn.Module) -> Callable[..., None]:
        tap, watched = weakref.ref(self), weakref.ref(module)

        def hook(module: nn.Module, args: tuple[Any, ...], out: Any) -> None:
            own = tap()
            if own is None or watched() is not module:
                return
            if _pop(own, module) and name == "":
                for handler in own.handlers:
                    handler.end(out is not None)

        return hook


def _compile_anew(model: nn.Module | None) -> None:
    """What torch.compile made does not ask whether there are hooks, unless they are around it."""
    if "torch._dynamo" in sys.modules and type(model).__name__ != "OptimizedModule":
        sys.modules["torch._dynamo"].reset()


class _Hook:
    """A hook that a model may be pickled with: what is read again is the model without handlers."""

    def __init__(self, run: Callable[..., None]):
        self.run = run

    def __call__(self, *given: Any) -> None:
        self.run(*given)

    def __reduce__(self) -> Any:
        return _Hook, (_nothing,)


def _nothing(*given: Any) -> None:
    """A hook without a tap."""


def watched(module: nn.Module) -> bool:
    """Whether a module may call attention itself: it is not one of torch's own layers, but for multi-head attention."""
    return isinstance(module, nn.MultiheadAttention) or not type(module).__module__.startswith("torch.nn.modules")


def _push(frame: _Frame) -> None:
    if not _RUNNING.frames:
        _RUNNING.mode = _Watch()
        _RUNNING.mode.__enter__()
    _RUNNING.frames.append(frame)


def _pop(tap: Tap, module: nn.Module) -> bool:
    """Leaves the module; False: it was not entered, as a hook that ran before raised."""
    if not _RUNNING.frames or _RUNNING.frames[-1].tap is not tap or _RUNNING.frames[-1].module is not module:
        return False
    _RUNNING.frames.pop()
    _rest()
    return True


def _forget(tap: Tap) -> None:
    """Leaves what was not left: torch runs no hook after KeyboardInterrupt."""
    _RUNNING.frames = [frame for frame in _RUNNING.frames if frame.tap is not tap]
    _rest()


def _rest() -> None:
    if not _RUNNING.frames and _RUNNING.mode is not None:
        _RUNNING.mode.__exit__(None, None, None)
        _RUNNING.mode = None


def answer(asked: Asked, own: Own, keep: list[Tensor] | None = None) -> Tensor:
    """What the layer that runs gets, after all handlers of all models that it is part of; `keep` takes the weights."""
    concerned = _concerned()
    if not concerned:
        return own(asked)
    was, _RUNNING.busy = _RUNNING.busy, True
    try:
        first = asked
        for handler, layer in concerned:
            asked = handler.edit(layer, asked)
        if asked is not first and _again_unseen():
            raise ChronotopeError(
                f"{concerned[0][1]}: it checkpoints a function of its own, which would run again for its gradient "
                "where nobody watches; checkpoint a module, or set checkpointing off."
            )
        out = solve(asked, own)
        if keep is not None:
            keep.append(weights(asked))
        for handler, layer in reversed(concerned):
            out = handler.seen(layer, asked, out)
        return out
    finally:
        _RUNNING.busy = was


def _again_unseen() -> bool:
    """Whether this call is in a function within the module that runs, which torch will run again by itself."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not nn.Module._call_impl.__code__:
        if frame.f_code is CheckpointFunction.forward.__code__:
            return True
        if frame.f_code is inspect.unwrap(checkpoint).__code__:
            return torch.is_grad_enabled()
        frame = frame.f_back
    return False


def _concerned() -> list[tuple[Handler, str]]:
    names = {id(frame.tap): (frame.tap, frame.name) for frame in _RUNNING.frames}
    found = [(handler, name) for tap, name in names.values() for handler in tap.handlers if handler.wants(name)]
    return sorted(found, key=lambda one: one[0].late)


def idle() -> bool:
    """Whether no model with handlers runs here, or one of its calls is being answered."""
    return _RUNNING.busy or not _RUNNING.frames


def _decodes() -> bool:
    """Whether fewer queries than keys are the last tokens of a sequence, as transformers' older layers have it."""
    return bool(_RUNNING.frames) and type(_RUNNING.frames[-1].module).__module__.startswith("transformers.")


def crossed(keys: int) -> bool:
    """Whether the module that runs was given another sequence of so many tokens."""
    return bool(_RUNNING.frames) and _RUNNING.frames[-1].crossed(keys)


class _Watch(TorchFunctionMode):
    """Sees the calls of torch's attention functions."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and not idle() and _concerned():
            return _sdpa(*args, **kwargs)
        if func is F.multi_head_attention_forward and not idle() and _concerned():
            return multi_head(func, args, kwargs, _sdpa)
        if func is attention and not idle() and _concerned():
            return _ours(*args, **kwargs)
        return func(*args, **kwargs)


def _ours(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor | tuple[Tensor, Tensor]:
    """`ct.attention` itself. What names a kernel, asks for lse or looks at another grid is left as it is."""
    where, grid, bias = given["where"], given["grid"], given["bias"]
    pattern = where.where if isinstance(where, Plan) else where
    other = given["key_grid"] is not None and given["key_grid"] != grid
    if given["return_lse"] or given["backend"] != "auto":
        return attention(q, k, v, **given)

    def own(final: Asked) -> Tensor:
        more: dict[str, Any] = {"scale": final.scale, "softcap": final.softcap}
        if final.mask is not None and final.mask is not asked.mask:
            more["bias"] = read_mask(final.mask, final.q.dtype).own
        return attention(final.q, final.k, final.v, **(given | more))

    mask, rule = (bias[(None,) * (4 - bias.ndim)], None) if isinstance(bias, Tensor) else (None, bias)
    pattern = full() if pattern is None else pattern
    asked = Asked(
        q, k, v, mask, scale=given["scale"], softcap=given["softcap"], crossed=other, bias=rule,
        first=pattern, where=pattern, grid=grid, key_grid=given["key_grid"] if other else None,
    )  # fmt: skip
    return answer(asked, own)


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    keep: list[Tensor] | None = None,
) -> Tensor:
    """torch's scaled_dot_product_attention [.., H, N, D]; without heads, [B, N, D], each is the one head of its own."""

    def own(asked: Asked) -> Tensor:
        return F.scaled_dot_product_attention(
            asked.q, asked.k, asked.v, asked.mask, asked.dropout, asked.causal, scale=asked.scale, enable_gqa=enable_gqa
        )

    headed = max(query.ndim, key.ndim, value.ndim) > 3
    lead = torch.broadcast_shapes(*(x.shape[: -3 if headed else -2] for x in (query, key, value)))
    q, k, v = (_four(x, lead, headed).expand(math.prod(lead), -1, -1, -1) for x in (query, key, value))
    mask = None if attn_mask is None else _four(attn_mask, lead, headed)
    later = max(0, k.shape[2] - q.shape[2]) if _decodes() else 0
    other = (q.shape[2] != k.shape[2] and not later) or crossed(k.shape[2])
    start = 0 if other or is_causal else later
    asked = Asked(q, k, v, mask, is_causal, scale, dropout=dropout_p, start=start, crossed=other)
    out = answer(asked, own, keep)
    return out.reshape(*lead, *out.shape[1 if headed else 2 :])


def _four(x: Tensor, lead: torch.Size, headed: bool) -> Tensor:
    """[B or 1, H, N, D] of any number of leading dimensions, which broadcast to `lead`."""
    if x.ndim == 4 and headed and len(lead) == 1:
        return x  # the object itself, of which something may be known
    x = x if headed else x[(None,) * (2 - x.ndim)].unsqueeze(-3)
    x = x[(None,) * (3 - x.ndim)]
    if math.prod(x.shape[:-3]) == 1:
        return x.reshape(1, *x.shape[-3:])
    return x.expand(*lead, *x.shape[-3:]).flatten(0, -4)
