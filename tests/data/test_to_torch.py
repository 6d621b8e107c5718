"""Sets as tensors: on a CPU the NumPy array itself, on a GPU made by a kernel.

The code for GPUs runs here on CPU and meta tensors, with the C++ core in place of the kernel;
tests/kernels compares the kernel with the core.
"""

import sys
from types import SimpleNamespace
from typing import Any

import fastmem.kernels
import numpy as np
import pytest
import torch
from torch import Tensor

from fastmem import (
    CanarySequences,
    PrefixedSequences,
    Sequences,
    UniformSequences,
    WeightedSequences,
    _core,
    repeated,
    zipf,
)

BASE = UniformSequences(90, 6, 50, seed=3, start=2**64 - 100)
CANARIES = WeightedSequences(5, 6, zipf(32), seed=4)
SETS = [
    BASE,
    CANARIES,
    CanarySequences(BASE, CANARIES, times=4),
    repeated(BASE, 0.2, 3),
    PrefixedSequences(CanarySequences(repeated(BASE, 0.5, 2), CANARIES, times=2), 3),
]
DTYPES = [torch.uint16, torch.uint32, torch.int32, torch.int64]


class Kernel:
    """fastmem.kernels.sequences without a GPU: the core fills CPU tensors, and counts calls."""

    def __init__(self) -> None:
        self.devices: list[str] = []

    def fill(
        self,
        out: Tensor,
        seed: int,
        vocab: int,
        begin: int | None = None,
        indices: Tensor | None = None,
        cumulative: Tensor | None = None,
    ) -> None:
        assert (begin is None) != (indices is None)
        for tensor in (indices, cumulative):
            assert tensor is None or tensor.device == out.device
        self.devices.append(out.device.type)
        if out.device.type == "meta" or len(out) == 0:
            return
        rule: dict[str, Any] = {"seed": seed, "vocab": vocab, "threads": 1}
        if cumulative is not None:
            assert (cumulative.dtype, tuple(cumulative.shape)) == (torch.uint32, (vocab,))
            rule["cumulative"] = cumulative.numpy()
        if indices is None:
            _core.fill_range(out.numpy(), begin=begin, **rule)
        else:
            assert indices.dtype == torch.int64
            _core.fill_indices(out.numpy(), indices.numpy().view(np.uint64), **rule)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel()
    module = SimpleNamespace(fill=made.fill)
    monkeypatch.setitem(sys.modules, "fastmem.kernels.sequences", module)
    monkeypatch.setattr(fastmem.kernels, "sequences", module, raising=False)
    return made


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", SETS, ids=lambda s: s.kind)
def test_tensors_are_the_arrays(sequences: Sequences, dtype: torch.dtype) -> None:
    """Fails if a tensor has other tokens, another shape or another dtype than requested."""
    whole = sequences[:]
    for indices in (slice(None), slice(9, 2, -3), [4, 0, 4], slice(0, 0), [], -1):
        made = sequences.to_torch("cpu", indices, dtype)
        assert made.dtype == dtype
        np.testing.assert_array_equal(made.numpy(), whole[indices])
    assert sequences.to_torch().dtype == torch.int64


def test_a_tensor_on_the_cpu_is_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the tokens are copied."""
    array = np.zeros((3, 4), np.int64)
    monkeypatch.setattr(UniformSequences, "tokens", lambda *_: array)
    assert BASE.to_torch().data_ptr() == array.ctypes.data


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sequences", SETS, ids=lambda s: s.kind)
def test_the_gpu_makes_the_same_tokens(
    kernel: Kernel, sequences: Sequences, dtype: torch.dtype
) -> None:
    """Fails if a set combines its parts differently on a GPU and on a CPU."""
    whole = sequences[:]
    for indices in (slice(None), slice(0, 1), slice(3, 5), slice(4, 1, -2), [4, 0, 4], []):
        rows = sequences._rows(indices)  # type: ignore[arg-type]
        made = sequences._on_gpu(rows, dtype, torch.device("cpu"))
        assert made.dtype == dtype
        np.testing.assert_array_equal(made.numpy(), whole[indices])
    assert kernel.devices


@pytest.mark.parametrize("sequences", SETS, ids=lambda s: s.kind)
def test_no_token_is_made_on_the_host_for_a_gpu(
    monkeypatch: pytest.MonkeyPatch, kernel: Kernel, sequences: Sequences
) -> None:
    """Fails if a batch for a GPU goes through host memory, for which meta stands here."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("tokens were made on the host")

    monkeypatch.setattr(_core, "fill_range", refuse)
    monkeypatch.setattr(_core, "fill_indices", refuse)
    for indices in (slice(None), [4, 0, 3]):
        rows = sequences._rows(indices)  # type: ignore[arg-type]
        made = sequences._on_gpu(rows, torch.int64, torch.device("meta"))
        assert made.device.type == "meta"
        assert made.shape == (len(rows), 6)
    assert set(kernel.devices) == {"meta"}


def test_weights_are_copied_to_a_device_once(kernel: Kernel) -> None:
    """Fails if every batch copies the weights again."""
    device = torch.device("cpu")
    weights = CANARIES.weights
    CANARIES._on_gpu(range(2), torch.int64, device)
    assert weights.on(device) is weights.on(device)
    assert weights.on(device).numpy().tolist() == weights.cumulative.tolist()


def test_cuda_makes_tokens_on_the_gpu(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> None:
    """Fails if to_torch makes tokens for a GPU on the host and copies them."""
    taken = []

    def on_gpu(self: Sequences, rows: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        taken.append((rows, dtype, device))
        return torch.zeros(len(rows), self.length, dtype=dtype)

    monkeypatch.setattr(UniformSequences, "_on_gpu", on_gpu)
    monkeypatch.setattr(
        "fastmem.data.sequences.checked_device", lambda device, meta: torch.device(device)
    )
    assert BASE.to_torch("cuda:1", slice(2, 5)).shape == (3, 6)
    assert BASE.to_torch("cuda:1", 7, torch.int32).shape == (6,)
    cuda = torch.device("cuda:1")
    assert taken == [(range(2, 5), torch.int64, cuda), (range(7, 8), torch.int32, cuda)]
    with pytest.raises(ValueError, match="uint16 holds a vocab of at most 65536"):
        UniformSequences(2, 4, 65537).to_torch("cuda:1", dtype=torch.uint16)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: BASE.to_torch("gpu"), ValueError, "device gpu is unavailable"),
        (lambda: BASE.to_torch("cuda:99"), ValueError, "device cuda:99 is unavailable"),
        (lambda: BASE.to_torch(3.5), ValueError, "device 3.5 is unavailable"),
        (lambda: BASE.to_torch(dtype=torch.float32), ValueError, "got torch.float32; an embedding"),
        (lambda: BASE.to_torch(dtype="int64"), ValueError, "got int64; an embedding"),
        (
            lambda: UniformSequences(2, 4, 65537).to_torch(dtype=torch.uint16),
            ValueError,
            "65536, got 65537; use uint32",
        ),
        (lambda: BASE.to_torch(indices=[1.0]), ValueError, "of float64; use"),
        (lambda: BASE.to_torch(indices=90), IndexError, "index 90 is outside this set of 90"),
        (lambda: BASE.to_torch(indices=[-1]), IndexError, "indices -1 to -1 are outside"),
    ],
)
def test_bad_calls_name_what_is_wrong(call: Any, error: type[Exception], message: str) -> None:
    """Fails if a mistake passes, or its message lacks the value or the fix."""
    with pytest.raises(error, match=message):
        call()
