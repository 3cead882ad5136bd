"""Layers on a grid: attention, recurrences, state spaces, memories, blocks, stacks, patches."""

from chronotope.nn.attention import Attention, AttentionState
from chronotope.nn.block import Block, Cross, Stack
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.memory import DeepMemory, DeepMemoryState, MemoryGates
from chronotope.nn.mixer import Mixer, State, States
from chronotope.nn.patches import PatchEmbed, Unpatch
from chronotope.nn.recurrence import Decay, Recurrence, RecurrenceState
from chronotope.nn.spaces import S4D, S5, Mamba, Mamba2, SpaceState

__all__ = [
    "S4D",
    "S5",
    "Attention",
    "AttentionState",
    "Block",
    "ConvState",
    "Cross",
    "Decay",
    "DeepMemory",
    "DeepMemoryState",
    "FeedForward",
    "Mamba",
    "Mamba2",
    "MemoryGates",
    "Mixer",
    "PatchEmbed",
    "Recurrence",
    "RecurrenceState",
    "ShortConv",
    "SpaceState",
    "Stack",
    "State",
    "States",
    "Unpatch",
]
