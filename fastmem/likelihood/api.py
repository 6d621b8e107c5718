"""Bits per token from hidden states, computed without all logits in memory.

N rows, D width, V vocabulary, E models.
"""

from torch import Tensor

from fastmem.kernels.reference import TokenStats
from fastmem.likelihood import local
from fastmem.likelihood.checks import check_targets, checked, is_spread


def token_bits(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (V, D) or (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (V,) or (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    check: bool = False,
) -> Tensor:  # (..., N)
    """Code length of each target in bits: -log2 softmax(hidden @ weight.T)[target].

    Computes one tile of logits at a time, and computes it again in the backward pass:

        logits = hidden.float() @ weight.float().T + bias
        logits = softcap * tanh(logits / softcap)
        F.cross_entropy(logits / temperature, targets, reduction="none") / math.log(2)

    Args:
        hidden: hidden states, float64, float32, bfloat16 or float16.
        weight: output matrix, one for all rows, or one for each entry of hidden's leading axes
            (E models side by side: hidden (E, N, D), weight (E, V, D)).
        targets: token ids of any integer type, (..., N) or (N,) shared by all leading entries.
        bias: added to the logits.
        softcap: squashes the logits to (-softcap, softcap). A number, as temperature.
        temperature: divides the logits. To learn it, divide hidden and bias by a tensor instead.
        ignore_index: a target of this value costs 0 bits and has no gradient. bits.mean() counts
            it; `linear_cross_entropy` has F.cross_entropy's mean, in nats, which is
            bits.sum() / (targets != ignore_index).sum() in bits.
        check: raise if a target is outside [0, V): waits for a GPU, breaks the torch.compile graph.

    Returns:
        Bits, at least 0, in float32 (float64 for float64 inputs), differentiable once in hidden,
        weight and bias. Products are summed in float32: bits are right to 1e-4 while logits stay
        below 150, and to 4e-4 at logits of 700, like those of F.cross_entropy. A target outside
        [0, V) gives NaN and is never read, because an error would stall a GPU. A hidden state that
        is not finite gives NaN too. On a CPU the gradient of hidden is NaN in a row of NaN bits
        that the loss uses; such a row adds nothing to the gradients of weight and bias, except in
        float64. Autocast casts hidden and weight as in F.linear. On a CPU results are
        bitwise reproducible for the same torch.get_num_threads().

    Across ranks:
        hidden and weight may be DTensors on one mesh; targets and bias too, or every rank has the
        whole of them. Where hidden is Shard along rows, weight is gathered once. Where hidden is
        Replicate and weight is Shard(0), each rank keeps its tokens, and the ranks add up three
        times N numbers, and N * D in the backward pass. Bits lie as hidden's rows, gradients as
        their tensors. A plain hidden beside a DTensor weight is this rank's own rows: so are the
        bits, and the gradient of weight is the sum over all ranks. FSDP averages those of its
        modules: make the loss inside of the module, or call set_gradient_divide_factor(1).

    Raises:
        ValueError: shapes, dtypes, devices or meshes do not fit; the message has both and the fix.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> token_bits(hidden, weight, torch.tensor([0, 5, 7]))
        tensor([3., 3., 3.])

    Source: H(x given θ̂) of arXiv 2505.24832, section 2, by the length of an arithmetic code.
    """
    arguments = (hidden, weight, targets, bias, softcap, temperature, ignore_index)
    if is_spread(hidden, weight):
        from fastmem.likelihood import distributed

        return distributed.token_bits(checked(*arguments, spread=True), check)
    problem = checked(*arguments)
    if check:
        check_targets(targets, weight.shape[-2], ignore_index)
    return local.token_bits(problem)


def token_stats(
    hidden: Tensor,  # (..., N, D)
    weight: Tensor,  # (V, D) or (..., V, D)
    targets: Tensor,  # (..., N)
    bias: Tensor | None = None,  # (V,) or (..., V)
    softcap: float | None = None,
    temperature: float = 1.0,
    ignore_index: int = -100,
    *,
    entropy: bool = False,
    second_moment: bool = False,
    greedy: bool = False,
    lse: bool = False,
    variance: bool = False,
    check: bool = False,
) -> TokenStats:  # each (..., N)
    """token_bits and, on request, statistics of each row's softmax, in the same pass.

    Computes one tile of logits at a time, with the logits of token_bits:

        p = softmax(logits / temperature)
        entropy_bits = -(p * p.log2()).sum(-1)
        variance = (p * (p.log2() + entropy_bits) ** 2).sum(-1)
        second_moment = (p * p.log2() ** 2).sum(-1)
        is_greedy = logits.argmax(-1) == targets
        lse_bits = torch.logsumexp(logits / temperature, -1) / math.log(2)

    Args:
        entropy, second_moment, greedy, lse, variance: the statistics to compute; each other one is
            None. All other arguments are as in token_bits, DTensors too.

    Returns:
        Bits and statistics without gradients: use token_bits for a loss. An ignored target or one
        outside [0, V) has is_greedy False, and leaves all other statistics as they are. A row that
        is not finite has NaN and False. The variance is summed about the mean: it keeps its digits
        where all logits are nearly equal and where one token is nearly sure, and is 0 where they
        are equal.

    Raises:
        ValueError: as token_bits.

    Example:
        >>> import torch
        >>> hidden, weight = torch.zeros(3, 4), torch.zeros(8, 4)
        >>> stats = token_stats(hidden, weight, torch.tensor([0, 5, 7]), entropy=True, greedy=True)
        >>> stats.bits, stats.entropy_bits, stats.is_greedy
        (tensor([3., 3., 3.]), tensor([3., 3., 3.]), tensor([ True, False, False]))

    Source: bits as in token_bits; the moments of Min-K%++, arXiv 2404.02936, equation 3.
    """
    arguments = (hidden, weight, targets, bias, softcap, temperature, ignore_index)
    wanted = [entropy, second_moment, greedy, lse, variance]
    if is_spread(hidden, weight):
        from fastmem.likelihood import distributed

        return distributed.token_stats(checked(*arguments, spread=True), wanted, check)
    problem = checked(*arguments)
    if check:
        check_targets(targets, weight.shape[-2], ignore_index)
    return local.token_stats(problem, wanted)
