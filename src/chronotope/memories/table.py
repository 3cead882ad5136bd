"""The parts that there are, as they are by default: what a memory is composed of, and what its laws are tested on."""

from __future__ import annotations

from chronotope.memories.learners import Learner, Matrix, Mlp, Residual
from chronotope.memories.losses import L2, Dot, Huber, Loss, Lp, Switch
from chronotope.memories.optimizers import Descent, Momentum, Normalized, Optimizer
from chronotope.memories.retentions import Decay, Keep, Lq, Retention, Softmax

LEARNERS: tuple[Learner, ...] = (Matrix(), *(Mlp(depth) for depth in range(1, 5)), Residual(Matrix()), Residual(Mlp()))
LOSSES: tuple[Loss, ...] = (L2(), Lp(), Huber(), Switch(), Dot())
RETENTIONS: tuple[Retention, ...] = (Keep(), Decay(), Lq(), Softmax())
OPTIMIZERS: tuple[Optimizer, ...] = (Descent(), Momentum(), Normalized(Momentum()))
