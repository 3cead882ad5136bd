"""Counting what a call allocates and computes, exactly and without a clock."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from chronotope.kernels.operator import attend


class Meter(TorchDispatchMode):
    """The most bytes held at one time by tensors made inside, and the number of scores of fused attention."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = self.scores = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.chronotope.attend.default:  # to be looked into, not at
            with self:
                return attend(*args)
        out = func(*args, **(kwargs or {}))
        if "scaled_dot_product" in func.name():
            self.scores += args[0].shape[:-1].numel() * args[1].shape[-2]
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        return out

    def free(self, key, size):
        self.known.discard(key)
        self.now -= size
