"""fastmem: how much a language model memorizes, in bits."""

from importlib.metadata import version

from fastmem.capacity import bits_per_parameter, capacity_bits, why_not_saturated
from fastmem.data import UniformSequences
from fastmem.files import write
from fastmem.kernels.reference import TokenStats
from fastmem.law import Law, law_of_rows, scaling_law
from fastmem.likelihood import token_bits, token_stats
from fastmem.member import Diverged, TrainResult
from fastmem.memorization import Memorized, memorized_bits
from fastmem.model import GPT, GPTConfig
from fastmem.order import permutation
from fastmem.recipe import TrainConfig
from fastmem.repetition import CanarySequences, RepeatedSequences, repeated
from fastmem.score import sequence_bits
from fastmem.sequences import Sequences, from_description
from fastmem.speed import flops_per_token, matmul_rate
from fastmem.stats import Interval
from fastmem.store import load, load_rows
from fastmem.stream import SequenceStream
from fastmem.structure import PrefixedSequences, WeightedSequences
from fastmem.sweep import SweepConfig, sweep
from fastmem.tokenfile import TokenFile
from fastmem.train import train, train_many
from fastmem.verify import verify
from fastmem.weights import Weights, zipf

__version__ = version("fastmem-lm")

__all__ = [
    "GPT",
    "CanarySequences",
    "Diverged",
    "GPTConfig",
    "Interval",
    "Law",
    "Memorized",
    "PrefixedSequences",
    "RepeatedSequences",
    "SequenceStream",
    "Sequences",
    "SweepConfig",
    "TokenFile",
    "TokenStats",
    "TrainConfig",
    "TrainResult",
    "UniformSequences",
    "WeightedSequences",
    "Weights",
    "bits_per_parameter",
    "capacity_bits",
    "flops_per_token",
    "from_description",
    "law_of_rows",
    "load",
    "load_rows",
    "matmul_rate",
    "memorized_bits",
    "permutation",
    "repeated",
    "scaling_law",
    "sequence_bits",
    "sweep",
    "token_bits",
    "token_stats",
    "train",
    "train_many",
    "verify",
    "why_not_saturated",
    "write",
    "zipf",
]
