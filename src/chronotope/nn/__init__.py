"""Layers on a grid: attention, blocks, stacks, patches."""

from chronotope.nn.attention import Attention, AttentionState
from chronotope.nn.block import Block, Cross, Stack
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.mixer import Mixer, State, States
from chronotope.nn.patches import PatchEmbed, Unpatch

__all__ = [
    "Attention",
    "AttentionState",
    "Block",
    "Cross",
    "FeedForward",
    "Mixer",
    "PatchEmbed",
    "Stack",
    "State",
    "States",
    "Unpatch",
]
