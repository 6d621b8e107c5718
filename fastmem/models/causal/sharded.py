"""Models of transformers whose layers are spread over the ranks of `fastmem.joined`."""

import logging
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmem.base.arguments import user_path
from fastmem.base.ranks import active, current

ADAPTER = "adapter_config.json"
"""The file that makes a folder an adapter of PEFT."""


def sharding_arguments(name: str, config: Any, trust_remote_code: bool) -> dict[str, Any]:
    """Arguments of from_pretrained, by which each rank reads its part of each weight.

    Computes the same model by `fully_shard`: a rank gathers one layer after another, and holds the
    embeddings and the head whole. No rank reads the whole model.

    Raises:
        ValueError: quantized weights, or a version of transformers or a model
            without layers that can be spread.

    Source: transformers' `DistributedConfig(fsdp_size=...)`.
    """
    from transformers import AutoModelForCausalLM

    job = current()
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{name} has quantized weights, which cannot be spread over ranks: leave shard out"
        )
    try:
        from transformers.distributed.configuration_utils import DistributedConfig

        if not {"fsdp_size", "fsdp_plan"} <= {field.name for field in fields(DistributedConfig)}:
            raise ImportError
    except ImportError:
        raise ValueError(
            "this version of transformers cannot spread a model over ranks: pip install -U "
            "transformers, or leave shard out"
        ) from None
    if job.device.type == "cpu" and torch.accelerator.is_available():
        raise ValueError(
            "transformers spreads a model over the GPUs of this machine, not over its CPU: hide "
            "them by CUDA_VISIBLE_DEVICES= in the environment, or leave --device cpu out"
        )
    if job.size == 1:
        return {}
    # It warns of rules in the plan of a model that has no such modules.
    logging.getLogger("transformers.distributed.mixin").setLevel(logging.ERROR)
    with torch.device("meta"):
        make: Any = AutoModelForCausalLM.from_config
        model = make(config, trust_remote_code=trust_remote_code)
    plan = {f"{layers_of(name, model)}.*": "free_full_weight"}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head.weight is not embedding.weight:  # else the root holds both, as one
        name = next(name for name, module in model.named_modules() if module is head)
        plan[name] = "keep_full_weight"  # it is read after its forward pass too
    return {"distributed_config": DistributedConfig(fsdp_size=job.size, fsdp_plan=plan)}


def layers_of(name: str, model: nn.Module) -> str:
    """The name of the list of layers: the list of modules that has the most parameters."""
    lists: dict[str, int] = {
        path: sum(p.numel() for p in module.parameters())
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
    }
    if not lists:
        raise ValueError(f"{name} has no list of layers to spread over ranks: leave shard out")
    return max((size, path) for path, size in lists.items())[1]


def check_shardable(model: Any, **options: Any) -> None:
    """ValueError in a single process, and for a model or options that cannot be spread."""
    if active() is None:
        raise ValueError(
            "shard spreads a model over ranks, and this is a single process: start it by "
            "torchrun --nproc-per-node N -m fastmem score, or leave shard out"
        )
    for option, value in options.items():
        if value is not None:
            raise ValueError(f"{option} {value!r} with shard: give one of the two")
    fix = "save it as a folder by save_pretrained(FOLDER), or leave shard out"
    if isinstance(model, nn.Module):
        raise ValueError(f"a model in memory cannot be spread over ranks: {fix}")
    path = user_path(model)
    if path.suffix == ".gguf" or (path.is_dir() and not [*path.glob("*config.json")]):
        raise ValueError(
            f"{path} is a GGUF file, which each rank would read whole: load it with transformers; "
            f"{fix}"
        )
    if (path / ADAPTER).exists():
        raise ValueError(
            f"{path} is an adapter, which cannot be spread over ranks: merge it into its base by "
            f"merge_and_unload(); {fix}"
        )


class Passes:
    """Gives all ranks of a sharded model the same number of forward passes.

    The ranks gather the weights of each layer together. A rank announces each of its passes, and a
    rank that has none left makes empty passes until no rank announces one.
    """

    def __init__(self, model: nn.Module, empty: Callable[[], object]) -> None:
        self._empty, self._waits = empty, False
        model.register_forward_pre_hook(self._announce, prepend=True)

    def _announce(self, module: nn.Module, args: Any) -> None:
        if not self._waits:
            self._some_passes(1)

    def wait(self) -> None:
        """Makes empty passes until all ranks wait."""
        self._waits = True
        while self._some_passes(0):
            self._empty()
        self._waits = False

    def _some_passes(self, own: int) -> bool:
        job = active()
        return job is not None and bool(job.sum(np.array([float(own)]))[0])
