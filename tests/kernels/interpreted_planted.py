"""Kernels with planted errors, interpreted: the checks catch each of them."""

import functools
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from cases.likelihood_cases import example
from cases.triton_interpreted import LIMIT, exact_bits, gradients, planted, quick, worst
from fastmem.kernels import (
    attention,
    block,
    chunks,
    likelihood,
    likelihood_ahead,
    likelihood_backward,
    reduced,
    reference,
)
from fastmem.kernels.tiles import GradientTile, Tile
from torch import Tensor


def forward_error(module: ModuleType) -> float:
    """Over rising logits, an odd number of rows, a ragged width and a ragged, split vocabulary."""
    weight = torch.linspace(-20, 20, 301)[:, None].repeat(1, 40)
    hidden, targets = torch.rand(37, 40) / 40, torch.randint(301, (37,))
    exact = exact_bits(hidden, weight, targets)
    errors = [
        worst(module.forward(hidden, weight, targets, splits=splits).bits[0], exact)
        for splits in (1, 2)
    ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


def wide_error(module: ModuleType) -> float:
    """Over sums in pieces, the last of them ragged."""
    hidden, weight, targets = example(3, 2100, 40, torch.bfloat16)
    bits = module.forward(hidden / 64, weight, targets, tile=quick(Tile(16, 64, 64, 4, 1))).bits[0]
    return worst(bits, exact_bits(hidden / 64, weight, targets))


def backward_error(module: ModuleType) -> float:
    hidden, weight, targets = example(37, 16, 101)
    upstream = torch.linspace(-2, 1, 37)
    state = likelihood.forward(hidden, weight, targets).state
    exact = gradients(torch.float64, upstream, [hidden, weight, None], targets)
    ours = module.backward(upstream, hidden, weight, targets, state)
    errors = [
        worst(got[0], right)
        for got, right in zip(ours[:2], exact[:2], strict=True)
        if right is not None
    ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


def ahead_error(module: ModuleType) -> float:
    """Of bits and dhidden, over rows that are repaired, a ragged width and a ragged vocabulary."""
    errors = []
    for dtype, size in ((torch.float32, 1.0), (torch.float32, 200.0), (torch.float16, 1.0)):
        hidden, weight, targets = example(37, 40, 101, dtype)
        hidden *= size / 40
        upstream, bias = torch.linspace(-2, 1, 37) / size, torch.linspace(-1, 1, 101)
        found = module.forward(
            hidden, weight, targets, bias, tile=GradientTile(16, 32, 64, 64, 4, 1)
        )
        grads = sys.modules[f"{module.__package__}.likelihood_backward"].backward(
            upstream, hidden, weight, targets, found.state, made=found.made, want_weight=False
        )
        ours = grads.hidden[0]
        exact = gradients(torch.float64, upstream, [hidden, weight, bias], targets)[0]
        assert exact is not None
        limit = 1 if dtype == torch.float32 else 100  # of float16's rounding
        errors += [worst(found.bits[0], exact_bits(hidden, weight, targets, bias=bias))]
        errors += [worst(ours, exact) / limit]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


def chunks_error(module: ModuleType) -> float:
    """In norms of 1, of chunks of 16 rows, with logits far apart and tiles of several bases, by
    descriptors, several tiles a program."""
    hidden, weight, targets = example(50, 32, 70, torch.bfloat16)
    hidden[::2] *= 30
    inputs: list[Tensor | None] = [hidden, weight, None]
    upstream = torch.linspace(-2, 1, 50)
    exact = gradients(torch.float64, upstream, inputs, targets)
    plain = (None, None, 1.0, -100, (True, True, False))
    with pytest.MonkeyPatch.context() as patch:
        sums = sys.modules[module.Sums.__module__]
        patch.setattr(sums, "streamed_tile", lambda *_: Tile(16, 32, 16, 4, 2))
        patch.setattr(sums, "rows_of_a_chunk", lambda *_: 16)
        patch.setattr(sums, "multiprocessors", lambda _: 2)
        if module.__name__.endswith("reduced"):
            bits, found = module.reduced(upstream, hidden, weight, targets, *plain)
            if not worst(bits, exact_bits(hidden, weight, targets)) < 1e-3:
                return math.inf
        else:
            state = likelihood.forward(hidden, weight, targets).state[:, 0]
            found = module.empty_gradients(hidden, weight, None, plain[-1])
            arguments = (None, None, None, *plain[2:-1], found)
            module.backward(upstream, hidden, weight, targets, state, *arguments)
    errors = [
        float((x.double() - right).norm() / right.norm())
        for x, right in zip(found[:2], exact[:2], strict=True)
        if right is not None
    ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


def attention_error(module: ModuleType) -> float:
    """Of output and gradient, over three panels, heads that programs divide unevenly, and scores
    that rise, in norms of 1."""
    torch.manual_seed(0)
    qkv, dout = torch.randn(1, 140, 3, 9, 2), torch.randn(1, 140, 9, 2)
    qkv[:, :, 1] *= torch.linspace(0, 9, 140)[:, None, None]
    leaf = qkv.double().requires_grad_()
    exact = reference.attention(leaf)
    (gradient,) = torch.autograd.grad(exact, leaf, dout.double())
    out, lse = module.forward(qkv)
    found = out, module.backward(dout, qkv, out, lse)
    errors = [
        float((x - right).norm() / right.norm())
        for x, right in zip(found, (exact.detach(), gradient), strict=True)
    ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


def mlp_error(module: ModuleType) -> float:
    """Of outputs and gradients of two models, of each set of weights, over three parts of ragged
    rows and a ragged width, in norms of 1."""
    torch.manual_seed(0)
    D, U, x = 12, 40, 2 * torch.randn(2, 150, 12) + 1
    mixed, residual = torch.randn(2, 150, D), torch.randn(2, 150, D)
    shapes = [(D, D), (D,), (D,), (D,), (U, D), (U,), (D, U), (D,)]
    sizes = [torch.Size(shape).numel() for shape in shapes]
    pieces = torch.randn(2, sum(sizes)).split(sizes, 1)
    weights = [p.view(2, *shape) for p, shape in zip(pieces, shapes, strict=True)]
    errors = []
    for first, last in ((2, 4), (2, 6), (0, 8)):
        whole = last == 8
        leaves = [t.double().requires_grad_() for t in (x, mixed, *weights)]
        rows, values, proj, proj_bias, scale, shift, up, up_bias, down, down_bias = leaves
        middle = rows + values @ proj.mT + proj_bias[:, None] if whole else rows
        y = torch.nn.functional.layer_norm(middle, (D,)) * scale[:, None] + shift[:, None]
        u = y @ up.mT + up_bias[:, None]
        hidden = torch.nn.functional.gelu(u, approximate="tanh")
        exact = {4: y, 6: u, 8: middle + hidden @ down.mT + down_bias[:, None]}[last]
        dout = torch.randn(exact.shape)
        used = [rows, *[values] * whole, *leaves[2:][first:last]]
        dx, *rest = torch.autograd.grad(exact, used, dout.double(), allow_unused=True)
        given = mixed if whole else None, weights[first:last], False
        out, found_middle = module.forward(x, *given)
        read = found_middle if whole else x
        # Without residual where there is no U, as models call it.
        other = residual if last == 6 else None
        found_dx, dmixed, flat = module.backward(dout, other, read, *given)
        parts = flat.split(sizes[first:last], 1)
        found = [out, found_dx, *[dmixed] * whole, *parts]
        right = [exact.detach(), dx if other is None else dx + other, *rest]
        errors += [
            float((a.flatten() - b.flatten()).norm() / b.norm())
            for a, b in zip(found, right, strict=True)
        ]
    return max(errors) if not any(map(math.isnan, errors)) else math.inf


RESCALE = "total, first, spread = lowered(total, first, spread, peak - new, MOMENTS)\n    "
PLANTED = {
    "rescale dropped": ("likelihood.py", RESCALE + "here =", "here ="),
    "rescale of parts dropped": ("combine.py", RESCALE + "    part_total", "part_total"),
    "rows swapped": ("combine.py", "bits_ptr + rows", "bits_ptr + (rows ^ 1)"),
    "mask off by one": ("likelihood.py", "columns + whole < end", "columns + whole <= end"),
    "a neighbour's target": (
        "logits.py",
        "n[:, None] == m[None, :]",
        "n[:, None] == m[None, :] + 1",
    ),
    "pieces that lose the first": ("logits.py", "total = acc + own", "total = own"),
    "a long sum that loses the first": ("logits.py", "acc += logits_tile(", "acc = logits_tile("),
    "a part left out": (
        "combine.py",
        "in range(S):\n        part =",
        "in range(S - 1):\n        part =",
    ),
    "target off by one": ("likelihood_backward.py", "columns == target,", "columns == target + 1,"),
    "mask of the walk off by one": (
        "likelihood_backward.py",
        "tl.arange(0, BLOCK_WALK) < WALK",
        "tl.arange(0, BLOCK_WALK) <= WALK",
    ),
    "a key after its query": ("attention.py", "i[:, None] >= (other", "i[:, None] + 1 >= (other"),
    "the last key left out": ("attention.py", "keys[:, None] <= i[None", "keys[:, None] < i[None"),
    "rescale of the output dropped": ("attention.py", "acc * shrink[:, None]", "acc"),
    "all heads in one score": (
        "attention.py",
        "qh = tl.where(own, q, 0.0).to(q.dtype)\n        peak",
        "qh = q\n        peak",
    ),
    "a head's keys in another's dq": (
        "attention.py",
        "dq += tl.where(own, tl.dot(tl.trans(ds), k, input_precision=PRECISION), 0.0)",
        "dq += tl.dot(tl.trans(ds), k, input_precision=PRECISION)",
    ),
    "delta left out": ("attention.py", " - delta[None, :]", ""),
    "a panel of queries left out": (
        "attention.py",
        "else own_panel\n    end",
        "else own_panel + 1\n    end",
    ),
    "a panel of keys left out": (
        "attention.py",
        "end = own_panel + 1 if OWNS_QUERIES",
        "end = own_panel if OWNS_QUERIES",
    ),
    "gradients in bits": ("attention.py", "factor = scale / LOG2_E", "factor = scale"),
    "a head outside": ("attention.py", "cdiv(H, tile.heads)", "H // tile.heads"),
    "a target of a chunk off by one": (
        "chunks.py",
        "own = columns[None, :] == column",
        "own = columns[None, :] == 1 + column",
    ),
    "columns past the end": (
        "reduced.py",
        "inside = tl.arange(0, BLOCK_V) < V - tile_v",
        "inside = tl.arange(0, BLOCK_V) < stride - tile_v",
    ),
    "a program's first tile alone": (
        "reduced.py",
        "tl.num_programs(0), flatten",
        "tiles, flatten",
    ),
    "a descriptor's first columns alone": (
        "logits.py",
        "a.load([index_a, d0])",
        "a.load([index_a, 0])",
    ),
    "a descriptor of other rows": (
        "chunks.py",
        "descriptor(h, tile.rows, tile.depth)",
        "descriptor(self.hidden, tile.rows, tile.depth)",
    ),
    "a chunk's rows of another": (
        "chunks.py",
        "g, h = self.matrix[: end - begin], self.hidden[begin:end]",
        "g, h = self.matrix[: end - begin], self.hidden[: end - begin]",
    ),
    "the last V % 64 rows of weight left out": (
        "chunks.py",
        "            add_product(sums, g[:, self.whole :], self.last)",
        "            pass",
    ),
    "bases not looked at": (
        "reduced.py",
        "tl.max((own != base).to(tl.int32), 0) > 0",
        "tl.max((own != base).to(tl.int32), 0) > 1",
    ),
    "a tile's base left out": ("reduced.py", "tl.exp2(tl.load(bases_ptr + at) - base)", "1.0"),
    "a target's power left": (
        "reduced.py",
        "entry = -missing * tl.load(total_ptr + safe)",
        "entry = missing * 0.0",
    ),
    "a tile left out": (
        "reduced.py",
        "    total = tl.zeros((BLOCK_N,), tl.float32)\n    for t in range(tiles):",
        "    total = tl.zeros((BLOCK_N,), tl.float32)\n    for t in range(tiles - 1):",
    ),
    "a sum of LayerNorm left out": ("mlp.py", " - mean[:, None] - xhat", " - xhat"),
    "columns outside in the variance": (
        "mlp.py",
        "tl.where((d < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)",
        "x - (tl.sum(x, 1) / D)[:, None]",
    ),
    "the residual's gradient left out": ("mlp.py", "dx += residual", "dx += 0"),
    "the residual before attention left out": (
        "mlp.py",
        "acc += matrix(x_ptr + own, n, d, D, left, D)",
        "acc += 0 * matrix(x_ptr + own, n, d, D, left, D)",
    ),
    "the product before LayerNorm left out": (
        "mlp.py",
        "acc = tl.dot(mixed, tl.trans(proj), acc, input_precision=PRECISION)",
        "acc += 0",
    ),
    "the gradient of mixed transposed": (
        "mlp.py",
        "tl.dot(dx, proj, input",
        "tl.dot(dx, tl.trans(matrix(proj_ptr + e * stride_p, k, d, D, D, D)), input",
    ),
    "gradients in the place of their neighbours": ("mlp.py", "columns - P + p", "at + p"),
    "the parts of another kernel": ("mlp.py", "+ E * S1 * P1", ""),
    "the slope without its second term": ("mlp.py", "return s + u * s * (1.0 - s)", "return s + 0"),
    "the bias left out": ("mlp.py", " + bias[:, None]", ""),
    "a part of the rows left out": ("mlp.py", "S - start, P)", "S - start - 1, P)"),
    "the rows of another part": ("mlp.py", "tl.range(part * rows,", "tl.range(0 * rows,"),
    "another model's weights": ("mlp.py", "weights = e * stride_e\n", "weights = 0 * stride_e\n"),
    "gradients without the scale": (
        "mlp.py",
        "dy *= vector(scale_ptr + weights, d, D)",
        "dy *= 1 + 0 * vector(scale_ptr + weights, d, D)",
    ),
    "the target's power in the sum": (
        "likelihood_ahead.py",
        "!= (own - v)[:",
        "!= (own - v + 1)[:",
    ),
    "powers past the end": ("likelihood_ahead.py", "(index < V - v)", "(index <= V - v)"),
    "rescale of the gradient dropped": (
        "likelihood_ahead.py",
        "acc *= shrink[:, None]",
        "acc *= 1",
    ),
    "rescale of the total dropped": ("likelihood_ahead.py", "rest *= shrink[:, None]", "rest *= 1"),
    "rows that are not repaired": (
        "likelihood_ahead.py",
        "state_ptr + layer + safe) > ABOVE",
        "state_ptr + layer + safe) < 0",
    ),
    "the target's weight left out": ("rows.py", "made - missing[:, None]", "made - 0"),
    "another row's target": ("rows.py", "tl.where(counts, target, 0)", "0 * target"),
    "upstream left out": ("likelihood_backward.py", "* (scale / STEP)", "* 0 + (scale / STEP)"),
}


@functools.cache
def right_error(error: Callable[[ModuleType], float], module: ModuleType) -> float:
    """Returns the error of a module without a planted error, computed once for all tests."""
    return error(module)


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(name: str, tmp_path: Path) -> None:
    """Fails if a check passes a kernel with an error."""
    file, right, wrong = PLANTED[name]
    kernels = planted(file, right, wrong, tmp_path)
    if file == "attention.py":
        assert right_error(attention_error, attention) <= LIMIT
        assert attention_error(kernels.attention) > 10 * LIMIT
    elif file in ("chunks.py", "reduced.py") or name.startswith("a descriptor"):
        way = file[:-3] if file != "logits.py" else "reduced"
        assert right_error(chunks_error, {"chunks": chunks, "reduced": reduced}[way]) <= 0.02
        assert chunks_error(getattr(kernels, way)) > 0.1
    elif file in ("likelihood_ahead.py", "rows.py"):
        assert right_error(ahead_error, likelihood_ahead) <= LIMIT
        assert ahead_error(kernels.likelihood_ahead) > 10 * LIMIT
    elif file == "mlp.py":
        assert right_error(mlp_error, block) <= LIMIT
        assert mlp_error(kernels.block) > 10 * LIMIT
    elif file == "likelihood_backward.py":
        assert right_error(backward_error, likelihood_backward) <= LIMIT
        assert backward_error(kernels.likelihood_backward) > 10 * LIMIT
    else:
        error = wide_error if name.startswith("a long sum") else forward_error
        assert right_error(error, likelihood) <= LIMIT
        assert error(kernels.likelihood) > 10 * LIMIT
