"""Attention of transformers' models: their attention interface, and the interface that makes masks for it.

Each implementation that a model may have, `sdpa` or `eager`, gets a twin that asks the handlers first. The twin takes
the masks of its original, so none is lost, and a layer that nobody wants anything of runs as before. Flash and flex
attention hide keys by means that have no mask: such a model runs with another's twin as long as it is patched.
"""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from chronotope.adapt.asked import Asked
from chronotope.adapt.masks import read_mask
from chronotope.adapt.solve import explicit
from chronotope.adapt.tap import answer, crossed, idle
from chronotope.errors import ChronotopeError

TWIN = "chronotope_"
TWINNED = ("sdpa", "eager")
FUSED = ("flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")
"""In place of these a model gets the twin of `sdpa`, or of `eager` where it has no `sdpa`."""
CHOOSING = ("indices", "block_indices")
"""What layers give that choose their keys themselves: they make a mask of it for implementations they know by name."""

_USERS: dict[int, tuple[Any, str, int]] = {}
"""Configurations that have a twin: each with its own implementation, and how many models with handlers read it."""


class Switch:
    """Twins in place of the implementations of a model, until `undo`; a name that is set meanwhile is respected."""

    def __init__(self, model: nn.Module):
        self.model = weakref.ref(model)  # which keeps this
        self.configs: list[Any] = []
        self.refresh()

    def refresh(self) -> None:
        """Once more, for implementations that were set since."""
        if "transformers" not in sys.modules:
            return
        model = self.model()
        if model is None:
            return
        for config in _configs(model):
            name = config._attn_implementation_internal
            if name not in TWINNED + FUSED:
                continue
            twin = name if name in TWINNED else "sdpa" if _has_sdpa(model, config) else "eager"
            _register(twin)
            _, _, users = _USERS.get(id(config), (config, name, 0))
            ours = any(config is one for one in self.configs)
            _USERS[id(config)] = config, name, users + (not ours)
            self.configs += [] if ours else [config]
            config._attn_implementation_internal = TWIN + twin

    def undo(self) -> None:
        for config in self.configs:
            _, name, users = _USERS.pop(id(config))
            if users > 1:
                _USERS[id(config)] = config, name, users - 1
            elif str(config._attn_implementation_internal).startswith(TWIN):
                config._attn_implementation_internal = name
        self.configs = []


def _configs(model: nn.Module) -> list[Any]:
    """The configurations that layers read which ask the interface, and nothing else does."""
    found: dict[int, tuple[Any, bool]] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_attn_implementation_internal") and _asks(module):
            found[id(config)] = config, found.get(id(config), (config, True))[1] and not _chooses(module)
    return [config for config, usable in found.values() if usable]


def _has_sdpa(model: nn.Module, config: Any) -> bool:
    users = (module for module in model.modules() if getattr(module, "config", None) is config)
    return all(getattr(module, "_supports_sdpa", True) for module in users)


def other_way(layer: nn.Module) -> str:
    """Why the interface does not see this layer of transformers; "": it does, or knows nothing of it."""
    name = getattr(getattr(layer, "config", None), "_attn_implementation_internal", None)
    if not name or not _asks(layer) or name.startswith(TWIN) or name in TWINNED + FUSED:
        return ""
    return f"its implementation is {name!r}; load the model with attn_implementation='sdpa' or 'eager'"


def _asks(layer: nn.Module) -> bool:
    """Whether a layer asks the interface for its attention function."""
    return "get_interface" in _code(layer).co_names


def _chooses(layer: nn.Module) -> bool:
    return any(name in CHOOSING for one in _code(layer).co_consts if isinstance(one, tuple) for name in one)


def _code(layer: nn.Module) -> Any:
    return getattr(inspect.unwrap(type(layer).forward), "__code__", Switch.undo.__code__)


def _register(name: str) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if TWIN + name not in ALL_MASK_ATTENTION_FUNCTIONS:
        AttentionInterface.register(TWIN + name, _twin(name))
        AttentionMaskInterface.register(TWIN + name, _placed(ALL_MASK_ATTENTION_FUNCTIONS[name]))


def _placed(make: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """The original's mask, which also says where the queries begin among the keys."""

    def mask(*args: Any, q_offset: Any = 0, kv_offset: Any = 0, **kwargs: Any) -> Tensor | None:
        start = int(q_offset) - int(kv_offset)  # the offset of a cache of fixed size is a tensor that moves
        found = make(*args, q_offset=q_offset, kv_offset=kv_offset, **kwargs)
        if found is None:
            return None
        found = found.contiguous()  # what is contiguous stays the same object later
        found.start = start  # type: ignore[attr-defined]
        return found

    return mask


def _twin(name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Attention as a layer of transformers calls it, q [B, H, Nq, D] -> out [B, Nq, H, D]."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        original = _original(module, name)
        if idle():
            return original(module, query, key, value, attention_mask, **kwargs)
        asked = _asked(module, name, query, key, value, attention_mask, kwargs)
        kept: list[Tensor | None] = []

        def own(final: Asked) -> Tensor:
            pairs = ((final.q, asked.q, query), (final.k, asked.k, key), (final.v, asked.v, value))
            q, k, v = (given if new is old else new for new, old, given in pairs)
            changed = final.mask is not asked.mask
            more = kwargs | {"position_bias": None} if changed and "position_bias" in kwargs else kwargs
            more = more if final.scale is asked.scale else more | {"scaling": final.scale}
            if k.shape[1] != key.shape[1]:  # the layer would spread its groups once more
                return explicit(final)
            out, weights = original(module, q, k, v, final.mask if changed else attention_mask, **more)
            kept.append(weights)
            return out.transpose(1, 2)

        out = answer(asked, own)
        if not kept and kwargs.get("output_attentions"):
            raise ChronotopeError(
                f"{type(module).__name__} is asked for its attention weights, which a patched layer does not hold; "
                "call it without output_attentions, or remove the handle."
            )
        return out.transpose(1, 2).contiguous(), kept[0] if kept else None

    return attend


def _asked(
    module: nn.Module, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> Asked:
    nq, nk = q.shape[2], k.shape[2]
    causal = kwargs.get("is_causal")
    causal = bool(getattr(module, "is_causal", True) if causal is None else causal)
    other = crossed(nk) or (nq != nk and not causal)
    ruled = causal and name == "sdpa" and mask is None and nq > 1
    if ruled and nk > nq:  # an empty cache of fixed size, filled up to here
        k, v, nk = k[:, :, :nq], v[:, :, :nq], nq
    start = getattr(mask, "start", 0 if other else nk - nq)
    bias = kwargs.get("position_bias")
    if bias is not None:
        mask = bias[..., :nk] if mask is None else bias + read_mask(mask, bias.dtype).own
    sinks = kwargs.get("s_aux", kwargs.get("sinks"))
    return Asked(
        q, k, v, mask, ruled, scale=kwargs.get("scaling"), softcap=kwargs.get("softcap"), sinks=sinks,
        dropout=float(kwargs.get("dropout", 0.0)), start=start, crossed=other,
    )  # fmt: skip


def _original(layer: nn.Module, name: str) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The function that this layer would call: its file may have its own of either name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    file = getattr(inspect.unwrap(type(layer).forward), "__globals__", {})
    if name != "eager":
        return file.get("ALL_ATTENTION_FUNCTIONS", ALL_ATTENTION_FUNCTIONS)[name]
    own = [known for known in _code(layer).co_names if known.endswith("eager_attention_forward")]
    if len(own) != 1 or own[0] not in file:
        raise ChronotopeError(f"{type(layer).__name__}: which function is its own attention cannot be told.")
    return file[own[0]]
