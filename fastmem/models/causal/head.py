"""The head of a causal language model: what it receives, and what the model does with its output.

B sequences, T tokens, D width, V vocabulary.
"""

import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmem.models.causal.gelu import fused_gelu

GRID = [sign * 2.0**k for k in range(-6, 11) for sign in (1, -1)] + [0.0]
"""Outputs that the probe gives to the model in place of its head's. Their number, 35, shares no
divisor with vocabularies that are powers of two, so that each token gets many of them."""


class _Reached(Exception):
    """Ends a forward pass at the head. An Exception, so that hooks that must always run do run."""


@dataclass(frozen=True)
class Head:
    """Logits after the head: softcap * tanh((hidden @ weight.T + bias) / softcap) / temperature."""

    module: nn.Module
    vocab: int
    softcap: float | None
    temperature: float

    @property
    def weight(self) -> Tensor:  # (V, D)
        """The output matrix, without the rows of a padded vocabulary that the model cuts off."""
        return matrix(self.module)[: self.vocab]

    @property
    def bias(self) -> Tensor | None:  # (V,)
        """The bias of the logits."""
        bias: Tensor | None = getattr(self.module, "bias", None)
        return None if bias is None else bias[: self.vocab]


def run(model: nn.Module, inputs: Tensor, keep: Tensor | None = None) -> Tensor:
    """The logits (B, T, V) as the model returns them for tokens (B, T), or only those at the places
    `keep`, computed without a cache of keys and values."""
    signature = inspect.signature(model.forward)
    open_ended = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    ours: dict[str, Any] = {"use_cache": False, "return_dict": True}
    if not (open_ended and hasattr(model, "config")):
        ours = {name: value for name, value in ours.items() if name in signature.parameters}
    if keep is not None:
        ours["logits_to_keep"] = keep.to(inputs.device)
    # A module that is not of transformers may have any name for its tokens.
    named = "input_ids" in signature.parameters
    try:
        output = model(input_ids=inputs, **ours) if named else model(inputs, **ours)
    except IndexError as error:  # of its table of positions, which its configuration overstates
        raise ValueError(
            f"{type(model).__name__} fails for {inputs.shape[1]} tokens ({error}): give a smaller "
            "context"
        ) from error
    logits = getattr(output, "logits", output)
    if isinstance(logits, (tuple, list)):
        logits = logits[0]
    kept = inputs.shape[1] if keep is None else len(keep)
    if not isinstance(logits, Tensor) or logits.ndim != 3 or logits.shape[1] < kept:
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{type(model).__name__} returns {shape} for tokens {tuple(inputs.shape)}, not logits "
            "of shape (sequences, tokens, vocabulary): load it with AutoModelForCausalLM"
        )
    return logits


def keeps_some(model: nn.Module) -> bool:
    """True if `run` can leave out logits."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def hidden_states(model: nn.Module, head: nn.Module, inputs: Tensor) -> Tensor:  # → (B, T, D)
    """What the head receives, without the head and all that follows it.

    Raises:
        ValueError: the head is not called, or receives something else.
    """
    taken: list[Tensor] = []

    def reached(module: nn.Module, args: Any, kwargs: Any) -> None:
        taken.append(args[0] if args else next(iter(kwargs.values())))
        raise _Reached

    handle = head.register_forward_pre_hook(reached, with_kwargs=True)
    try:
        with fused_gelu(model):
            run(model, inputs)
    except _Reached:
        return _rows(taken[0], inputs)
    finally:
        handle.remove()
    raise ValueError("its head is not called as a module")


def _rows(hidden: Tensor, inputs: Tensor) -> Tensor:  # → (B, T, D)
    B, T = inputs.shape
    if hidden.shape[:-1] == (B * T,):
        hidden = hidden.view(B, T, -1)
    # Virtual tokens of a PEFT prompt come first.
    if hidden.ndim != 3 or len(hidden) != B or hidden.shape[1] < T:
        raise ValueError(f"its head receives {tuple(hidden.shape)} for tokens {(B, T)}")
    return hidden[:, -T:]


@contextmanager
def hooked(
    head: nn.Module, replace: Callable[[Tensor, Tensor], Tensor] | None = None
) -> Iterator[list[Tensor]]:
    """Collects the inputs of the head; `replace` makes its output of its input and its output."""
    taken: list[Tensor] = []
    inside = False

    def after(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        nonlocal inside
        if inside:  # replace may call the head
            return output
        taken.append(args[0] if args else next(iter(kwargs.values())))
        inside = True
        try:
            return output if replace is None else replace(taken[-1], output)
        finally:
            inside = False

    handle = head.register_forward_hook(after, with_kwargs=True)
    try:
        yield taken
    finally:
        handle.remove()


def why_not_a_matrix(head: nn.Module) -> str | None:
    """One line if the head is not a plain matrix in memory, else None."""
    weight, bias = getattr(head, "weight", None), getattr(head, "bias", None)
    if not isinstance(weight, Tensor) or weight.ndim != 2:
        return f"its head, {type(head).__name__}, has no matrix `weight`"
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is None:
            continue
        if tensor.is_meta:
            return f"the {name} of its head is offloaded"
        if type(tensor) not in (Tensor, nn.Parameter):
            return f"the {name} of its head is a {type(tensor).__name__}"
        if tensor.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
            return f"the {name} of its head is quantized to {tensor.dtype}"
    return None


def probed(model: nn.Module, head: nn.Module, inputs: Tensor) -> tuple[Head | None, str]:
    """What the model does with the output of its head, or None and one line why that is unknown.

    The head's output is replaced by numbers of a grid in float32, and softcap and temperature are
    read from the logits that the model returns.
    """
    if reason := why_not_a_matrix(head):
        return None, reason
    given: list[Tensor] = []

    def grid(hidden: Tensor, output: Tensor) -> Tensor:
        compute = torch.promote_types(output.dtype, torch.float32)
        values = torch.tensor(GRID, dtype=compute, device=output.device)
        places = torch.arange(output.numel(), device=output.device) % len(GRID)
        given.append(values[places].view(output.shape))
        return given[-1]

    with hooked(head, grid) as taken:
        logits = run(model, inputs)
    if len(taken) != 1:
        return None, f"its head is called {len(taken)} times as a module in one pass"
    vocab, rows = logits.shape[-1], len(matrix(head))
    if vocab > rows:
        return None, f"it returns {vocab} logits, and its head {rows}"
    # A prompt of PEFT adds rows; a head may receive all sequences as one.
    z = given[0].reshape(-1, rows)[:, :vocab].double()
    f = logits.reshape(-1, vocab).double()
    if len(z) != len(f):
        return None, f"it returns logits for {len(f)} tokens, and its head for {len(z)}"
    found = _fitted(z.flatten()[: 64 * len(GRID)], f.flatten()[: 64 * len(GRID)])
    if found is not None:
        softcap, temperature = found
        capped = z if softcap is None else softcap * torch.tanh(z / softcap)
        expected = capped / temperature
        if ((f - expected).abs() <= 1e-5 * (1 + expected.abs())).all():
            return Head(head, vocab, softcap, temperature), ""
    return None, "it changes the output of its head by more than a scale and a softcap"


def _fitted(z: Tensor, f: Tensor) -> tuple[float | None, float] | None:
    """Softcap c and temperature t of f = c tanh(z / c) / t, from samples; None if none fits."""
    sample = dict(zip(z.tolist(), f.tolist(), strict=True))
    pairs = [(x, sample[x], sample[2 * x]) for x in sample if x > 0 and 2 * x in sample]
    if not pairs or any(not (0 < y < math.inf and 0 < twice < math.inf) for _, y, twice in pairs):
        return None
    # tanh(a) / tanh(2 a) = (1 + tanh(a)²) / 2, and a = x / c.
    squares = [(2 * y / twice - 1, x, y) for x, y, twice in pairs]
    if max(abs(square) for square, _, _ in squares) < 1e-6:
        return None, _short(pairs[-1][0] / pairs[-1][1])
    square, x, y = min(squares, key=lambda each: abs(each[0] - 0.4))
    if not 0 < square < 1:
        return None
    tanh = math.sqrt(square)
    softcap = _short(x / math.atanh(tanh))
    return softcap, _short(softcap * math.tanh(x / softcap) / y)


def _short(value: float) -> float:
    """The value to six digits where that is its float32: 30.0 and not 30.000001."""
    short = float(f"{value:.6g}")
    return short if math.isclose(short, value, rel_tol=1e-6) else value


def head_in_float32(head: nn.Module, hidden: Tensor) -> Tensor:  # (..., D) → (..., V)
    """The output of the head, computed in float32 from its weights and inputs as they are.

    Called in a hook of the head, which therefore has at least one.
    """
    hidden = hidden.float()
    plain = type(head) is nn.Linear and "forward" not in vars(head)
    if plain and len(head._forward_hooks) + len(head._forward_pre_hooks) == 1:
        # Parts of the vocabulary: a copy of the whole matrix may not fit beside the model.
        weight, size = matrix(head), max(1, (1 << 24) // hidden.shape[-1])
        logits = torch.cat(
            [F.linear(hidden, part.float()) for part in torch.split(weight, size)], -1
        )
        bias = getattr(head, "bias", None)
        return logits if bias is None else logits + bias.float()
    state = {name: p.float() for name, p in head.named_parameters()}
    output: Tensor = torch.func.functional_call(head, state, (hidden,))
    return output


def matrix(head: nn.Module) -> Tensor:  # (V, D)
    """The weight of a module, such as a head or an embedding."""
    weight = head.weight
    assert isinstance(weight, Tensor)
    return weight
