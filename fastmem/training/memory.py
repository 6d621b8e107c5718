"""The memory of one rank of a sharded model, from steps on tensors without numbers.

B batch, S tokens a sequence, N sequences, D width, V vocabulary.
"""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any, Literal
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmem.base.ranks import imagined
from fastmem.kernels.tiles import chunked, default_workspace
from fastmem.likelihood.operators import BACKWARD, BITS
from fastmem.models.gpt import GPTConfig
from fastmem.models.score import score_batch
from fastmem.models.sharded import ShardedEngine, Sharding, locals_of, sharded_on_meta
from fastmem.training.config import TrainConfig
from fastmem.training.sharded_optimizer import ShardedAdamW

Kind = Literal["weights", "gradients", "optimizer", "gathered", "activations", "workspace"]
_OF_COPY: dict[Any, Kind] = {"weights": "gathered", "gradients": "gradients"}
"""What a cast of a tensor is."""


@dataclass(frozen=True)
class Peak:
    """The bytes of a rank's tensors when they are most."""

    weights: int = 0
    """This rank's part of the weights."""
    gradients: int = 0
    """Reduced gradients, this rank's part."""
    optimizer: int = 0
    """Moments, and float32 copies of weights where they are rounded stochastically."""
    gathered: int = 0
    """Whole weights and gradients of the blocks at work, and the buffers of their collectives."""
    activations: int = 0
    workspace: int = 0
    """Tensors of the likelihood."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def state(self) -> int:
        return self.weights + self.gradients + self.optimizer


def planned_peak(
    shape: GPTConfig,
    config: TrainConfig,
    sharding: Sharding,
    ranks: int,
    count: int,
    length: int,
    device: str = "cuda",
) -> Peak:
    """The peak memory of a rank that trains a sharded model, without that memory and that device.

    Takes two steps and a score with the code of training, on FakeTensors and with collectives that
    move nothing, and counts the bytes of the tensors that live. What kernels allocate inside is not
    seen, except the workspace of the likelihood on a GPU, which is computed. On a GPU blocks are
    compiled and keep less for the backward pass than here.

    Args:
        shape, config, sharding: as of `sharded_gpt` and `train`.
        ranks: how many share the model; they must divide the batch.
        count, length: N and S of the data set.
        device: cpu or cuda, of the ranks.

    Raises:
        ValueError: ranks and accumulate do not divide the batch, or this process has joined ranks.

    Example:
        >>> shape = GPTConfig(2, 32, 4, vocab=128, length=16)
        >>> peak = planned_peak(shape, TrainConfig(), Sharding(), 2, count=400, length=16)
        >>> peak.weights == shape.parameter_count * 4 / 2, peak.total > 2 * peak.state
        (True, True)
    """
    batch, parts = config.step_batch(count), ranks * sharding.accumulate
    if batch % parts:
        raise ValueError(
            f"batch {batch} is not divisible by {ranks} ranks x accumulate {sharding.accumulate}: "
            f"try batch {max(parts, batch // parts * parts)}"
        )
    own = min(sharding.accumulate, 2)  # the second part has the gradients of the first beside it
    config, sharding = config.for_shape(shape), replace(sharding, accumulate=own)
    live = _Live(device)
    with ExitStack() as stack:
        stack.enter_context(imagined(ranks))
        model = sharded_on_meta(shape, config.precision, sharding)
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        stack.enter_context(live.counted())
        if stores_attention_weights(shape, config.precision, device):
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        model.to_empty(device="cpu")
        live.mark("weights", [part for _, _, part in locals_of(model)])
        tokens = torch.empty(1, batch // parts * own, length, dtype=torch.int64)
        optimizer, engine = _Update(model, config, None), ShardedEngine(model)
        for step in range(2):
            engine.compute(tokens)
            optimizer.step([0.0])
            if step == 0:  # which made the moments
                live.mark("optimizer", optimizer.tensors())
                live.start_again()
        with torch.no_grad():
            rows = min(-(-count // ranks), score_batch(device, length))
            model.token_bits(torch.empty(rows, length, dtype=torch.int64))
    return live.peak


def stores_attention_weights(shape: GPTConfig, precision: str, device: str) -> bool:
    """True if PyTorch computes attention as product, softmax and product, with weights in memory.

    On a GPU PyTorch does so for float32 and heads whose width is not a multiple of 4: read in
    its source (ATen/native/transformers/cuda/sdp_utils.cpp), not measured.
    """
    return device == "cuda" and precision == "fp32" and shape.width // shape.heads % 4 != 0


class _Update(ShardedAdamW):
    """An update of tensors without numbers, from which no noise can follow."""

    def _noise(self, name: str, rows: int, columns: int) -> Callable[[slice, torch.device], Tensor]:
        return lambda part, device: torch.empty(
            part.stop - part.start, columns, dtype=torch.int64, device=device
        )

    def tensors(self) -> list[Tensor]:
        moments = [x for each in self._adamw.state.values() for x in each.values()]
        return [*moments, *self._master] if self._rounds else moments


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that live, by kind, and keeps the greatest sum."""

    def __init__(self, device: str) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._known: dict[int, tuple[weakref.ref[Any], int, Kind]] = {}
        self._now: dict[Kind, int] = {field.name: 0 for field in fields(Peak)}  # type: ignore[misc]
        self._most, self.peak = 0, Peak()

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Counts; FSDP frees and fills a gathered weight by the size of its storage, which no
        operator shows."""
        resize = torch.UntypedStorage.resize_

        def resized(storage: torch.UntypedStorage, size: int) -> Any:
            done = resize(storage, size)
            self._count(storage, "gathered")
            return done

        with mock.patch.object(torch.UntypedStorage, "resize_", resized), self:
            yield

    def mark(self, kind: Kind, tensors: list[Tensor]) -> None:
        """Says what tensors are."""
        for tensor in tensors:
            self._count(tensor.untyped_storage(), kind, again=True)

    def start_again(self) -> None:
        """Forgets the peak."""
        self._most = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        from torch.distributed.tensor import DTensor  # takes half a second, and not all plan

        if DTensor in types:
            return NotImplemented
        if func is BITS and self._device == "cuda":  # a GPU makes gradients in the backward pass
            args = (*args[:-1], [False] * 3)
        kind: Kind = "activations"
        out = func(*args, **(kwargs or {}))
        if func is BACKWARD and self._device == "cuda":
            self._note({"workspace": workspace_bytes(args[5], args[6])})
        if func is BACKWARD and self._device == "cpu":
            out = _in_place(args, out)
        if func in (BITS, BACKWARD):
            kind = "workspace"
        elif func is torch.ops.aten._to_copy.default:
            kind = _OF_COPY.get(self._kind(args[0]), kind)
        elif func is torch.ops.aten.copy_.default and args[0].dtype == torch.float32:
            if self._kind(args[1]) == "gathered":  # one rank copies what others reduce
                self.mark("gradients", [args[0]])
        elif func.namespace in ("fsdp", "c10d"):
            kind = "gathered"
            for tensor in _tensors((args, kwargs)):
                if self._kind(tensor) in ("activations", None):
                    self.mark(kind, [tensor])
            if "reduce_scatter" in func.name():
                self.mark("gradients", _tensors(args[0]))
        for tensor in _tensors(out):
            self._count(tensor.untyped_storage(), kind)
        return out

    def _kind(self, tensor: Tensor) -> Kind | None:
        known = self._known.get(tensor.untyped_storage()._cdata)
        return known[2] if known else None

    def _count(self, storage: torch.UntypedStorage, kind: Kind, again: bool = False) -> None:
        key, size = storage._cdata, storage.nbytes()
        known = self._known.get(key)
        if known is not None:
            reference, before, was = known
            self._now[was] -= before
            kind = kind if again else was
        else:
            reference = weakref.ref(storage, lambda _: self._forget(key))
        self._known[key] = reference, size, kind
        self._now[kind] += size
        self._note({})

    def _forget(self, key: int) -> None:
        _, size, kind = self._known.pop(key)
        self._now[kind] -= size

    def _note(self, more: dict[Kind, int]) -> None:
        total = sum(self._now.values()) + sum(more.values())
        if total > self._most:
            self._most = total
            self.peak = Peak(**{k: v + more.get(k, 0) for k, v in self._now.items()})


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def _in_place(args: tuple[Any, ...], out: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The gradients made ahead where a CPU scales them in place (`backends.scaled_ahead`)."""
    same = zip(args[2:5], out, strict=True)
    return tuple(a if a.shape == x.shape and a.dtype == x.dtype else x for a, x in same)


def workspace_bytes(hidden: Tensor, weight: Tensor) -> int:  # (N, D), (V, D)
    """What the likelihood's backward pass on a GPU allocates beside its results.

    A chunk of logits, in 16 bits beside dweight in float32, together at most the default workspace
    (kernels/chunks.py). Narrow rows sum a gradient in parts: at most N · D float32.
    """
    (N, D), V, size = hidden.shape[-2:], len(weight), hidden.itemsize
    if not chunked(D, size):
        return 4 * N * D
    fixed, row = 4 * V * D * (size == 2), size * V + (4 + size) * D + V // 16
    return min(default_workspace(N, row, fixed), fixed + N * row)
