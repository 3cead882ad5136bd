"""A state that is the weights of a small network, learned from what comes."""

from chronotope.memories.learners import Learner, Matrix, Mlp, Residual
from chronotope.memories.losses import L2, Dot, Huber, Loss, Lp, Switch
from chronotope.memories.memorize import memorize, recall
from chronotope.memories.optimizers import Descent, Momentum, Normalized, Optimizer
from chronotope.memories.packed import memorize_packed
from chronotope.memories.retentions import Decay, Keep, Lq, Retention, Softmax
from chronotope.memories.state import Gates, Memory, MemoryState, begin

__all__ = [
    "L2",
    "Decay",
    "Descent",
    "Dot",
    "Gates",
    "Huber",
    "Keep",
    "Learner",
    "Loss",
    "Lp",
    "Lq",
    "Matrix",
    "Memory",
    "MemoryState",
    "Mlp",
    "Momentum",
    "Normalized",
    "Optimizer",
    "Residual",
    "Retention",
    "Softmax",
    "Switch",
    "begin",
    "memorize",
    "memorize_packed",
    "recall",
]
