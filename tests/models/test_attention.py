"""Which attention a shape gets, and what it is off the GPU."""

import pytest
import torch
from fastmem.kernels import reference

from fastmem.models import attention


@pytest.mark.parametrize(
    ("dtype", "T", "W", "fused"),
    [
        (torch.bfloat16, 1, 1, True),
        (torch.bfloat16, 64, 64, True),
        (torch.bfloat16, 64, 65, False),
        (torch.bfloat16, 65, 17, False),
        (torch.bfloat16, 256, 16, True),
        (torch.bfloat16, 257, 2, False),
        (torch.float32, 256, 16, True),
        (torch.float32, 64, 17, False),
        (torch.float16, 64, 2, False),
        (torch.float64, 64, 2, False),
    ],
)
def test_the_shapes_of_the_kernels(
    dtype: torch.dtype, T: int, W: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if a shape goes to kernels that were not measured there, or none goes to them."""
    qkv = torch.empty(2, T, 3, 4, W, dtype=dtype, device="meta")
    assert not attention.is_fused(qkv)
    monkeypatch.setattr(attention, "DEVICES", ["meta"])
    assert attention.is_fused(qkv) == fused


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_definition(dtype: torch.dtype) -> None:
    """Fails if a token reads a later token, or another head or sequence."""
    qkv = torch.randn(2, 7, 3, 3, 5, dtype=dtype)
    right = reference.attention(qkv.double())
    limit = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    for function in (attention.attention, reference.attention):
        found = function(qkv)
        assert (found.dtype, found.shape) == (dtype, right.shape)
        torch.testing.assert_close(found.double(), right, rtol=0, atol=limit)
