"""fastmem: how much a language model memorizes, in bits."""

from importlib.metadata import version

from fastmem.capacity import bits_per_parameter, capacity_bits, why_not_saturated
from fastmem.data import UniformSequences, permutation
from fastmem.kernels.reference import TokenStats
from fastmem.likelihood import token_bits, token_stats
from fastmem.memorization import Memorized, memorized_bits
from fastmem.model import GPT, GPTConfig
from fastmem.score import sequence_bits
from fastmem.stats import Interval
from fastmem.sweep import SweepConfig, load_rows, sweep
from fastmem.train import Diverged, TrainConfig, TrainResult, train

__version__ = version("fastmem-lm")

__all__ = [
    "GPT",
    "Diverged",
    "GPTConfig",
    "Interval",
    "Memorized",
    "SweepConfig",
    "TokenStats",
    "TrainConfig",
    "TrainResult",
    "UniformSequences",
    "bits_per_parameter",
    "capacity_bits",
    "load_rows",
    "memorized_bits",
    "permutation",
    "sequence_bits",
    "sweep",
    "token_bits",
    "token_stats",
    "train",
    "why_not_saturated",
]
