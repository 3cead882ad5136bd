"""Sets of heads of a model: which there are, and a control of some of them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from chronotope.adapt import Asked, At, Control, control
from chronotope.adapt.attach import Layers

Head = tuple[str, int]
"""The name of an attention layer, and which of its heads."""


def heads_of(model: nn.Module, run: Callable[[], Any], layers: Layers | None = None) -> list[Head]:
    """All heads of the attention layers that are met when `run` calls the model, in the order of the calls."""
    counts: dict[str, int] = {}

    class Count(Control):
        def asks(self, at: At, asked: Asked) -> Asked:
            counts[at.layer] = asked.q.shape[1]
            return asked

    with control(model, Count(), layers=layers):
        run()
    return [(layer, head) for layer, count in counts.items() for head in range(count)]


@contextmanager
def on_heads(model: nn.Module, one: Control, heads: Collection[Head]) -> Iterator[None]:
    """Attaches a control to these heads alone, of any layers."""
    with ExitStack() as stack:
        for layer in dict.fromkeys(layer for layer, _ in heads):
            ours = [head for name, head in heads if name == layer]
            stack.enter_context(control(model, one, layers=layer, heads=ours))
        yield
