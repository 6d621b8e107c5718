"""The reduced loss of a linear output layer, computed without all logits in memory.

N rows, D width, V vocabulary.
"""

import torch
from torch import Tensor, nn

from fastmem.likelihood import reduced
from fastmem.likelihood.checks import checked, is_spread

REDUCTIONS = ("none", "mean", "sum")


def linear_cross_entropy(
    input: Tensor,  # (N, D), (..., N, D) or (D,)
    linear_weight: Tensor,  # (V, D)
    target: Tensor,  # (N,), (..., N) or ()
    *,
    linear_bias: Tensor | None = None,  # (V,)
    weight: Tensor | None = None,  # (V,)
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: object = None,
    softcap: float | None = None,
    temperature: float = 1.0,
    token_weight: Tensor | None = None,  # as target
) -> Tensor:
    """Cross entropy of a linear layer's logits in nats, as F.linear_cross_entropy of PyTorch 2.13.

    Computes one tile of logits at a time. The forward pass also makes the gradients, with three
    matrix products for both passes: on a CPU of a mean or a sum without weights, on a GPU of a mean
    or a sum above a width of 256 in bfloat16 and of 128 in float32, without a softcap, whose
    gradients are in use at once (`FASTMEM_WORKSPACE` bytes beside them, by default 1 GiB, or the
    weight's gradient in float32 and at most 1 GiB of rows):

        logits = F.linear(input.float(), linear_weight.float(), linear_bias)
        logits = softcap * tanh(logits / softcap) / temperature
        nats = F.cross_entropy(logits, target, reduction="none", ignore_index=ignore_index)
        factor = token_weight * weight[target], 0 where target is ignored; 1 without both weights
        none: factor * nats        sum: (factor * nats).sum()        mean: sum / factor.sum()

    Args:
        input: hidden states, float64, float32, bfloat16 or float16.
        linear_weight: output matrix.
        target: token ids of any integer type.
        linear_bias: added to the logits.
        weight: a factor for each class.
        reduction: "none", "mean" or "sum".
        ignore_index: the target that costs nothing and has no gradient; None: -100.
        label_smoothing: only 0, since smoothing needs all logits of a row.
        options: only None, since fastmem chooses its own chunks.
        softcap, temperature: as in `token_bits`.
        token_weight: a factor for each row, of any sign, differentiable. A factor of NaN makes the
            loss and the hidden gradient of its row NaN, and every reduced loss.

    Returns:
        A number, or nats like target for "none", in float32 (float64 for float64 inputs). The mean
        of no rows is NaN, as in PyTorch. DTensors are as in `token_bits`: a mean is that of the
        rows of all ranks, and the number is the same on all; of plain rows it is the rank's own.

    Raises:
        ValueError: arguments that do not fit, as in `token_bits`; targets that are probabilities;
            label smoothing; chunking options; a weight for each of several positions (K > 0).

    Example:
        >>> input, matrix = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> linear_cross_entropy(input, matrix, torch.tensor([0, 5, -100]))  # ln 8
        tensor(2.0794)

    Source: torch.nn.functional.linear_cross_entropy of PyTorch 2.13.
    """
    index = -100 if ignore_index is None else ignore_index
    _check(input, linear_weight, target, weight, token_weight, reduction)
    if label_smoothing != 0:
        raise ValueError(
            f"label_smoothing must be 0, not {label_smoothing}: smoothing needs all logits of a "
            "row; use torch.nn.functional.cross_entropy"
        )
    if options is not None:
        raise ValueError(f"options must be None, not {options!r}: fastmem chooses its own chunks")
    hidden, targets = (input[None], target[None]) if input.ndim == 1 else (input, target)
    arguments = (hidden, linear_weight, targets, linear_bias, softcap, temperature, index)
    if is_spread(hidden, linear_weight):
        from fastmem.likelihood import distributed

        problem = checked(*arguments, spread=True)
        nats = distributed.cross_entropy(problem, weight, token_weight, reduction)
    else:
        nats = reduced.cross_entropy(checked(*arguments), weight, token_weight, reduction)
    return nats.view(target.shape) if reduction == "none" else nats


def _check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    weight: Tensor | None,
    token_weight: Tensor | None,
    reduction: str,
) -> None:
    """ValueError for what `token_bits` cannot check."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, not {reduction!r}")
    named = {"input": input, "linear_weight": linear_weight, "target": target}
    named |= {"weight": weight} if weight is not None else {}
    named |= {"token_weight": token_weight} if token_weight is not None else {}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a torch.Tensor, not {type(tensor).__name__}")
    if target.is_floating_point():
        raise ValueError(
            f"target must be token ids, not probabilities of {target.dtype}: use "
            "torch.nn.functional.cross_entropy"
        )
    if linear_weight.ndim != 2:
        raise ValueError(
            f"linear_weight must be (V, D), not {tuple(linear_weight.shape)}: call token_bits for "
            "several models or positions"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(
            f"target {tuple(target.shape)} with input {tuple(input.shape)}: expected "
            f"{tuple(input.shape[:-1])}"
        )
    factors = (
        ("weight", weight, linear_weight.shape[:1]),
        ("token_weight", token_weight, target.shape),
    )
    for name, factor, shape in factors:
        if factor is None:
            continue
        if factor.shape != shape or not factor.is_floating_point():
            raise ValueError(
                f"{name} is {factor.dtype} of shape {tuple(factor.shape)}: expected floats of "
                f"shape {tuple(shape)}"
            )
        if factor.device != input.device:
            raise ValueError(
                f"{name} is on {factor.device}, input on {input.device}: move {name} with .to()"
            )


class LinearCrossEntropyLoss(nn.Module):
    """`linear_cross_entropy` with its own linear layer, as torch.nn.LinearCrossEntropyLoss.

    Args:
        in_features: D.
        num_classes: V.
        bias: the layer has a bias.
        device, dtype: of the layer.
        weight, reduction, ignore_index, label_smoothing, options, softcap, temperature: as in
            `linear_cross_entropy`.

    Raises:
        ValueError: as `linear_cross_entropy`, when the loss is called.

    Example:
        >>> loss = LinearCrossEntropyLoss(4, 8, reduction="sum")
        >>> loss(torch.zeros(3, 4), torch.tensor([0, 5, 7]))  # 3 ln 8
        tensor(6.2383, grad_fn=<MulBackward0>)
    """

    weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        softcap: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(in_features, num_classes, bias, device, dtype)
        self.register_buffer("weight", weight)
        self.settings = {
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            "options": options,
            "softcap": softcap,
            "temperature": temperature,
        }

    def forward(self, input: Tensor, target: Tensor, token_weight: Tensor | None = None) -> Tensor:
        """The loss of hidden states (N, D) and targets (N,)."""
        return linear_cross_entropy(
            input,
            self.linear.weight,
            target,
            linear_bias=self.linear.bias,
            weight=self.weight,
            token_weight=token_weight,
            **self.settings,  # type: ignore[arg-type]
        )
