"""Layers on a grid: attention, recurrences, state spaces, memories, blocks, stacks, patches."""

from chronotope.nn.along import Along, AlongState
from chronotope.nn.attention import Attention, AttentionState
from chronotope.nn.block import Block, Cross, DropBranch, Stack
from chronotope.nn.chain import Chain
from chronotope.nn.conv_lstm import ConvLSTM, ConvLSTMState
from chronotope.nn.conv_space import ConvSpace, ConvSpaceState
from chronotope.nn.convolution import ConvState, ShortConv
from chronotope.nn.edges import EdgeAttention
from chronotope.nn.feedforward import FeedForward
from chronotope.nn.grid_convolution import GridConv, GridConvState
from chronotope.nn.memory import DeepMemory, DeepMemoryState, MemoryGates
from chronotope.nn.mixer import Mixer, State, States, Whole
from chronotope.nn.modulation import LabelEmbedding, Modulation, TimeEmbedding
from chronotope.nn.patches import PatchEmbed, Unpatch
from chronotope.nn.positions import Learned, Sinusoidal
from chronotope.nn.recurrence import Decay, Recurrence, RecurrenceState
from chronotope.nn.relative import RelativeAttention
from chronotope.nn.sampling import SampledAttention, sample
from chronotope.nn.shift import ShiftState, TemporalShift
from chronotope.nn.spaces import S4D, S5, Mamba, Mamba2, SpaceState
from chronotope.nn.streams import Exchange, JointBlock, Streams

__all__ = [
    "S4D",
    "S5",
    "Along",
    "AlongState",
    "Attention",
    "AttentionState",
    "Block",
    "Chain",
    "ConvLSTM",
    "ConvLSTMState",
    "ConvSpace",
    "ConvSpaceState",
    "ConvState",
    "Cross",
    "Decay",
    "DeepMemory",
    "DeepMemoryState",
    "DropBranch",
    "EdgeAttention",
    "Exchange",
    "FeedForward",
    "GridConv",
    "GridConvState",
    "JointBlock",
    "LabelEmbedding",
    "Learned",
    "Mamba",
    "Mamba2",
    "MemoryGates",
    "Mixer",
    "Modulation",
    "PatchEmbed",
    "Recurrence",
    "RecurrenceState",
    "RelativeAttention",
    "SampledAttention",
    "ShiftState",
    "ShortConv",
    "Sinusoidal",
    "SpaceState",
    "Stack",
    "State",
    "States",
    "Streams",
    "TemporalShift",
    "TimeEmbedding",
    "Unpatch",
    "Whole",
    "sample",
]
