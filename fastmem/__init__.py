"""fastmem: how much a language model memorizes, in bits."""

from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastmem.base.ranks import joined as joined
    from fastmem.base.stats import Interval as Interval
    from fastmem.data.array import from_array as from_array
    from fastmem.data.corpus import prepare_text as prepare_text
    from fastmem.data.files.tokenfile import TokenFile as TokenFile
    from fastmem.data.files.verify import verify as verify
    from fastmem.data.files.writer import write as write
    from fastmem.data.order import permutation as permutation
    from fastmem.data.repetition import (
        CanarySequences as CanarySequences,
        RepeatedSequences as RepeatedSequences,
        repeated as repeated,
    )
    from fastmem.data.sequences import Sequences as Sequences, from_description as from_description
    from fastmem.data.stream import SequenceStream as SequenceStream
    from fastmem.data.structure import (
        PrefixedSequences as PrefixedSequences,
        WeightedSequences as WeightedSequences,
    )
    from fastmem.data.text import TextCorpus as TextCorpus, TextSequences as TextSequences
    from fastmem.data.uniform import UniformSequences as UniformSequences
    from fastmem.data.weights import Weights as Weights, zipf as zipf
    from fastmem.kernels.reference import TokenStats as TokenStats
    from fastmem.likelihood.api import token_bits as token_bits, token_stats as token_stats
    from fastmem.likelihood.loss import (
        LinearCrossEntropyLoss as LinearCrossEntropyLoss,
        linear_cross_entropy as linear_cross_entropy,
    )
    from fastmem.memorization.bits import Memorized as Memorized, memorized_bits as memorized_bits
    from fastmem.memorization.blind_baselines import (
        blind_baselines as blind_baselines,
        blind_warning as blind_warning,
    )
    from fastmem.memorization.capacity import (
        bits_per_parameter as bits_per_parameter,
        capacity_bits as capacity_bits,
        why_not_saturated as why_not_saturated,
    )
    from fastmem.memorization.extraction import (
        edit_distance as edit_distance,
        extraction_probability as extraction_probability,
        extraction_rates as extraction_rates,
        greedy_from as greedy_from,
        longest_match as longest_match,
        samples_needed as samples_needed,
        suffix_bits as suffix_bits,
    )
    from fastmem.memorization.membership import membership_scores as membership_scores
    from fastmem.memorization.membership_law import (
        MembershipLaw as MembershipLaw,
        expected_membership as expected_membership,
        membership_law as membership_law,
    )
    from fastmem.memorization.roc import Roc as Roc, roc as roc, roc_points as roc_points
    from fastmem.memorization.scaling_law import (
        Law as Law,
        law_of_rows as law_of_rows,
        scaling_law as scaling_law,
    )
    from fastmem.memorization.shadow_models import lira as lira, rmia as rmia
    from fastmem.memorization.unintended import (
        Unintended as Unintended,
        total_unintended as total_unintended,
        unintended_bits as unintended_bits,
    )
    from fastmem.models.causal.lm import CausalLM as CausalLM
    from fastmem.models.extraction.run import extract as extract
    from fastmem.models.flops import flops_per_token as flops_per_token, matmul_rate as matmul_rate
    from fastmem.models.gpt import GPT as GPT, GPTConfig as GPTConfig
    from fastmem.models.quantize import quantized as quantized, surviving_bits as surviving_bits
    from fastmem.models.score import sequence_bits as sequence_bits
    from fastmem.models.scoring.scores import score as score
    from fastmem.models.sharded import Sharding as Sharding, sharded_gpt as sharded_gpt
    from fastmem.sweeps.config import SweepConfig as SweepConfig
    from fastmem.sweeps.driver import sweep as sweep
    from fastmem.sweeps.store import load as load, load_rows as load_rows
    from fastmem.training.config import TrainConfig as TrainConfig
    from fastmem.training.run_state import Diverged as Diverged, TrainResult as TrainResult
    from fastmem.training.trainer import train as train, train_many as train_many

try:
    __version__ = version("fastmem-lm")
    if find_spec("fastmem._core") is None:
        raise ModuleNotFoundError
except ModuleNotFoundError:
    raise ImportError(
        f"{__path__[0]} is the source of fastmem, not an installed package: run `pip install -e .` "
        "in the folder above, or start Python in another folder to import the installed package"
    ) from None

_NAMES = {
    "base.ranks": ("joined",),
    "base.stats": ("Interval",),
    "data.array": ("from_array",),
    "data.corpus": ("prepare_text",),
    "data.files.tokenfile": ("TokenFile",),
    "data.files.verify": ("verify",),
    "data.files.writer": ("write",),
    "data.order": ("permutation",),
    "data.repetition": ("CanarySequences", "RepeatedSequences", "repeated"),
    "data.sequences": ("Sequences", "from_description"),
    "data.stream": ("SequenceStream",),
    "data.structure": ("PrefixedSequences", "WeightedSequences"),
    "data.text": ("TextCorpus", "TextSequences"),
    "data.uniform": ("UniformSequences",),
    "data.weights": ("Weights", "zipf"),
    "kernels.reference": ("TokenStats",),
    "likelihood.api": ("token_bits", "token_stats"),
    "likelihood.loss": ("LinearCrossEntropyLoss", "linear_cross_entropy"),
    "memorization.bits": ("Memorized", "memorized_bits"),
    "memorization.blind_baselines": ("blind_baselines", "blind_warning"),
    "memorization.capacity": ("bits_per_parameter", "capacity_bits", "why_not_saturated"),
    "memorization.extraction": (
        "edit_distance",
        "extraction_probability",
        "extraction_rates",
        "greedy_from",
        "longest_match",
        "samples_needed",
        "suffix_bits",
    ),
    "memorization.membership": ("membership_scores",),
    "memorization.membership_law": ("MembershipLaw", "expected_membership", "membership_law"),
    "memorization.roc": ("Roc", "roc", "roc_points"),
    "memorization.scaling_law": ("Law", "law_of_rows", "scaling_law"),
    "memorization.shadow_models": ("lira", "rmia"),
    "memorization.unintended": ("Unintended", "total_unintended", "unintended_bits"),
    "models.causal.lm": ("CausalLM",),
    "models.extraction.run": ("extract",),
    "models.scoring.scores": ("score",),
    "models.sharded": ("Sharding", "sharded_gpt"),
    "models.flops": ("flops_per_token", "matmul_rate"),
    "models.gpt": ("GPT", "GPTConfig"),
    "models.quantize": ("quantized", "surviving_bits"),
    "models.score": ("sequence_bits",),
    "sweeps.config": ("SweepConfig",),
    "sweeps.driver": ("sweep",),
    "sweeps.store": ("load", "load_rows"),
    "training.config": ("TrainConfig",),
    "training.run_state": ("Diverged", "TrainResult"),
    "training.trainer": ("train", "train_many"),
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used, so that `import fastmem` is immediate."""
    if name not in _MODULES:
        raise AttributeError(f"module 'fastmem' has no attribute {name!r}")
    value = getattr(import_module(f"fastmem.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
