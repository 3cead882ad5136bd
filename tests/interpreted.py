"""Triton's interpreter for the kernels of chronotope, whatever else in this process has imported Triton."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, TensorHandle
from triton.runtime.jit import JITFunction

from chronotope.kernels.triton import backward_kernels, backward_pass, device, forward_pass, learn, pairs

OURS = (device, forward_pass, backward_kernels, backward_pass, learn, pairs)
LANGUAGE = (tl, tl.core, tl.math, tl.tensor, tl.dtype, tl.core.tensor_descriptor_base)


class Interpreted(InterpretedFunction):
    """A function of ours, called by a kernel. Triton would patch its language again for every such call: slow."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.rewrite()(*args, **kwargs)


@contextmanager
def interpreted() -> Iterator[None]:
    """Kernels are interpreted and not compiled, as if TRITON_INTERPRET=1 had been set before Triton was imported."""
    before = {owner: dict(vars(owner)) for owner in LANGUAGE}
    with pytest.MonkeyPatch.context() as patch:
        _complete(patch)
        for module in (tl, *OURS):
            make = Interpreted if module in OURS else InterpretedFunction
            for name, value in list(vars(module).items()):
                if isinstance(value, JITFunction):
                    patch.setattr(module, name, make(value.fn))
        yield
    # The interpreter patches the language and does not take back all of it.
    for owner, names in before.items():
        for name in set(vars(owner)) - set(names):
            delattr(owner, name)
        for name, value in names.items():
            if vars(owner)[name] is not value:
                setattr(owner, name, value)


def _complete(patch: pytest.MonkeyPatch) -> None:
    """What Triton 3.6 interprets in another way than a GPU computes, or not at all."""
    patch_tensor, cast, dot = (
        interpreter._patch_lang_tensor,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_dot,
    )

    def with_index(tensor: Any, scope: Any) -> None:
        patch_tensor(tensor, scope)
        # Since NumPy 2.4 int() refuses arrays of one element, which scalars are here.
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def rounding(self: Any, value: Any, dtype: Any) -> Any:
        """To bfloat16 by rounding to the nearest; the interpreter cuts off."""
        if value.dtype.scalar == tl.float32 and dtype.scalar == tl.bfloat16:
            rounded = torch.from_numpy(value.data.copy()).bfloat16().view(torch.uint16)
            return TensorHandle(rounded.numpy(), dtype.scalar)
        return cast(self, value, dtype)

    def of_numbers(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        """bfloat16 numbers, which the interpreter multiplies as if their bits were whole numbers."""
        a, b = (cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
        return dot(self, a, b, *rest)

    patch.setattr(interpreter, "_patch_lang_tensor", with_index)
    patch.setattr(InterpreterBuilder, "cast_impl", rounding)
    patch.setattr(InterpreterBuilder, "create_dot", of_numbers)
