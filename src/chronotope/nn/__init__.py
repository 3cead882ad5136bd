"""Layers on a grid: attention, recurrences, blocks, stacks, patches."""

from chronotope.nn.attention import Attention, AttentionState
from chronotope.nn.block import Block, Cross, Stack
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Mixer, State, States
from chronotope.nn.patches import PatchEmbed, Unpatch
from chronotope.nn.recurrence import Decay, Recurrence, RecurrenceState

__all__ = [
    "Attention",
    "AttentionState",
    "Block",
    "ConvState",
    "Cross",
    "Decay",
    "FeedForward",
    "Mixer",
    "PatchEmbed",
    "Recurrence",
    "RecurrenceState",
    "ShortConv",
    "Stack",
    "State",
    "States",
    "Unpatch",
]
