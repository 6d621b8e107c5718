"""The loss for torchtitan against its own."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard

pytest.importorskip("torchtitan")

from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss

from fastmem.integrations.torchtitan import TokenBitsLoss


def case() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    labels = torch.randint(301, (2, 8))
    labels[0, :3] = labels[1, 7] = -100
    return nn.Linear(16, 301, bias=False), torch.randn(2, 8, 16), labels


@pytest.mark.parametrize("valid", [None, 12])
def test_losses_and_gradients(valid: int | None) -> None:
    """Fails if loss or gradients differ from CrossEntropyLoss, whole or in chunks."""
    head, hidden, labels = case()
    count = None if valid is None else torch.tensor(float(valid))
    found = []
    for config in (CrossEntropyLoss.Config(), ChunkedLossWrapper.Config(num_chunks=4), None):
        config = config or TokenBitsLoss.Config()
        loss_of, given = config.build(), hidden.clone().requires_grad_()
        assert (
            isinstance(loss_of, ChunkedLossWrapper) or config.__class__ is CrossEntropyLoss.Config
        )
        head.zero_grad()
        if isinstance(loss_of, ChunkedLossWrapper):
            loss_of.set_lm_head(head)
        loss, metrics = loss_of(
            given if isinstance(loss_of, ChunkedLossWrapper) else head(given), labels, count
        )
        loss.backward()
        assert metrics == {}
        found.append((loss.detach(), given.grad, head.weight.grad))
    for theirs in found[:2]:
        torch.testing.assert_close(found[2], theirs, rtol=1e-5, atol=1e-5)
    assert "forward" not in vars(head)


def test_validation_needs_no_gradient() -> None:
    """Fails if the loss of a pass without gradients differs."""
    head, hidden, labels = case()
    loss_of = TokenBitsLoss.Config().build()
    loss_of.set_lm_head(head)
    with torch.no_grad():
        loss, _ = loss_of(hidden, labels, torch.tensor(12.0))
        expected, _ = CrossEntropyLoss.Config().build()(head(hidden), labels, torch.tensor(12.0))
    torch.testing.assert_close(loss, expected)


def test_without_a_head() -> None:
    """Fails if the loss runs before the trainer has given it the head."""
    _, hidden, labels = case()
    with pytest.raises(ValueError, match="call set_lm_head"):
        TokenBitsLoss.Config().build()(hidden, labels)


def test_fsdp(tmp_path: Path) -> None:
    """Fails if the loss does not gather a head that FSDP shards, if its gradient is not sharded, or
    if the C++ core keeps FSDP from freeing the head."""
    head, hidden, labels = case()
    expected = TokenBitsLoss.Config().build()
    expected.set_lm_head(head)
    expected(hidden, labels)[0].backward()
    gradient = head.weight.grad.clone()
    head.zero_grad()
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        fully_shard(head, mesh=mesh)
        ours = TokenBitsLoss.Config().build()
        ours.set_lm_head(head)
        ours(hidden, labels)[0].backward()
        torch.testing.assert_close(head.weight.grad.full_tensor(), gradient)
        sharded, _, _ = case()
        shard = [torch.distributed.tensor.Shard(0)]
        sharded.weight = nn.Parameter(
            torch.distributed.tensor.distribute_tensor(sharded.weight, mesh, shard)
        )
        ours.set_lm_head(sharded)
        with pytest.raises(ValueError, match="the head's weight is a DTensor"):
            ours(hidden, labels)
    finally:
        torch.distributed.destroy_process_group()
