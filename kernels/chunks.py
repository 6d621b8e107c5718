"""Gradients of wide models on a GPU: a chunk of rows as a matrix, then two products.

In wide models a kernel that multiplies its own tiles of gradients (likelihood_backward.py) makes
logits once for each piece of D. Here a kernel makes them once and stores a (rows, V) matrix, and
cuBLAS multiplies that matrix:

    g       = factor * (p - [v = target])        p from the state of the forward walk
    dhidden = g @ weight,   dweight = g.mT @ hidden,   dbias = g.sum(0)

Rows of the matrix, and in 16 bits the columns that a product takes, are multiples of 64: on an
H100 a product over 50257 columns, with rows of 50304, ran at 119 TFLOP/s, over 50304 columns at
748. So the last V % 64 rows of weight are copied into 64 rows and multiplied apart. dweight is
summed in float32. dhidden and dweight in float32 follow PyTorch's setting of TF32, as PyTorch's own
do; logits and dbias do not. Without atomics, every sum has one order.

N rows, D width, V vocabulary, E models.
"""

import os
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from fastmem.kernels.launch import Layout, aligned, descriptor, key
from fastmem.kernels.logits import LOG2_E, bias_shift, place, tile_of_logits
from fastmem.kernels.rows import STEP, scaled
from fastmem.kernels.tiles import (
    Tile,
    capability,
    cdiv,
    default_workspace,
    described,
    multiprocessors,
    products,
    streamed_tile,
)
from torch import Tensor

WORKSPACE: int | str | None = os.environ.get("FASTMEM_WORKSPACE")
"""The most bytes beside inputs and gradients, from the environment variable FASTMEM_WORKSPACE;
None: `default_workspace`."""


class Gradients(NamedTuple):
    """Gradients of the sum of upstream * bits in the dtypes of the inputs; None if not wanted."""

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    def of(self, e: int) -> "Gradients":
        return Gradients(*(None if x is None else x[e] for x in self))


def empty_gradients(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, wanted: tuple[bool, bool, bool]
) -> Gradients:
    """Contiguous for any strides of the inputs, as the operators' fake implementations promise."""
    return Gradients(*(
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if want and x is not None else None
        for x, want in zip((hidden, weight, bias), wanted, strict=True)
    ))  # fmt: skip


@triton.jit
def gradient_kernel(
    hidden_tiles,  # descriptors of hidden and weight, or None
    weight_tiles,
    hidden_ptr,  # (N, D) of the chunk
    weight_ptr,  # (V, D)
    bias_ptr,  # (V,) contiguous, or None
    shift_ptr,  # () or None: subtracted from the bias
    column_ptr,  # (N,) int32: the target; -1 for a row without a gradient
    peak_ptr,  # (N,), as the next two
    total_ptr,
    factor_ptr,
    out_ptr,  # (N, stride)
    scale,
    softcap,
    stride,
    N,
    D,
    V,
    stride_hn,
    stride_hd,
    stride_wv,
    stride_wd,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EVEN_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SUM: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Stores factor * (p - [v = target]), times the slope of the softcap."""
    tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(V, BLOCK_V)
    for i in tl.range(
        tl.program_id(0), tiles, tl.num_programs(0), flatten=hidden_tiles is not None
    ):
        tile_n, tile_v = place(i, N, V, BLOCK_N, BLOCK_V)
        rows, columns, x, slope = tile_of_logits(
            hidden_tiles, weight_tiles, hidden_ptr, weight_ptr, bias_ptr, shift_ptr,
            tile_n, tile_v, softcap, N, D, V, stride_hn, stride_hd, stride_wv, stride_wd,
            BLOCK_N, BLOCK_V, BLOCK_D, EVEN_D, HAS_BIAS, HAS_SOFTCAP, SUM, PRECISION,
            STAGES,
        )  # fmt: skip
        stored = rows < N
        column = tl.load(column_ptr + rows, mask=stored, other=-1)
        factor = tl.load(factor_ptr + rows, mask=stored, other=0.0)
        over = factor / tl.load(total_ptr + rows, mask=stored, other=1.0)
        peak = tl.load(peak_ptr + rows, mask=stored, other=0.0)
        # p - 1 before rounding: p of a memorized target is almost 1.
        own = columns[None, :] == column[:, None]
        g = tl.exp2(x * scale - peak[:, None]) * over[:, None] - tl.where(own, factor[:, None], 0.0)
        g = g * slope
        g = tl.where((column >= 0)[:, None] & (columns < V)[None, :], g, 0.0)
        outs = out_ptr + rows.to(tl.int64)[:, None] * stride + columns[None, :]
        mask = stored[:, None] & (columns < stride)[None, :]
        tl.store(outs, g.to(out_ptr.dtype.element_ty), mask=mask)


def workspace(default: int) -> int:
    """WORKSPACE in bytes; ValueError if it is not a number above 0."""
    try:
        found = default if WORKSPACE is None else int(WORKSPACE)
    except ValueError:
        found = 0
    if found < 1:
        raise ValueError(f"FASTMEM_WORKSPACE must be bytes from 1 up, not {WORKSPACE!r}")
    return found


def rows_of_a_chunk(N: int, row_bytes: int, fixed_bytes: int, block: int) -> int:
    """Returns the rows of equal chunks in the workspace, a multiple of `block` where it is smaller.

    Raises:
        ValueError: the workspace is too small for one row.
    """
    default = default_workspace(N, row_bytes, fixed_bytes)
    given = workspace(default)
    most = (given - fixed_bytes) // row_bytes
    if most < 1:
        raise ValueError(
            f"a workspace of {given} bytes is too small: sums take {fixed_bytes} and one row "
            f"{row_bytes}; set FASTMEM_WORKSPACE to at least {fixed_bytes + row_bytes}, or leave "
            f"it out for {default}"
        )
    if most >= N:
        return N
    most = most // block * block or most
    return min(most, cdiv(cdiv(N, cdiv(N, most)), block) * block)


def rows_aligned(*matrices: Tensor) -> bool:
    """True if 16-byte loads can read the rows."""
    return all(aligned(*matrices)) and all(Layout(*key(x)).aligned for x in matrices)


def padded(V: int) -> int:
    return cdiv(V, 64) * 64


def product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, in the dtype of a or in float32."""
    if out.dtype == a.dtype and (out.is_cuda or out.dtype == torch.float32):
        torch.mm(a, b, out=out)
    elif not out.is_cuda:
        out.copy_(a.float() @ b.float())
    else:
        torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)


def add_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out += a @ b in float32."""
    if a.dtype == torch.float32:
        out.addmm_(a, b)
    elif out.is_cuda:
        torch.ops.aten.addmm.dtype_out(out, a, b, torch.float32, out=out)
    else:
        out.add_(a.float() @ b.float())


class Sums:
    """One model's gradients, summed over chunks of rows, each a matrix (rows, V) of gradients."""

    def __init__(
        self, hidden: Tensor, weight: Tensor, out: Gradients, softcap: float | None = None
    ) -> None:
        (N, D), V = hidden.shape, len(weight)
        want_weight, want_bias = out.weight is not None, out.bias is not None
        size, generation = hidden.itemsize, capability(hidden.device)
        even = rows_aligned(hidden, weight)
        self.tile = streamed_tile(D, size, generation, even, softcap is not None)
        self.constants = constants(self.tile, D, size, generation)
        apart = all(Layout(*key(x)).apart for x in (hidden, weight))
        self.described = even and apart and described(D, size, self.tile.depth, generation)
        self.tiles = cdiv(V, self.tile.vocab)
        self.whole = V if size == 4 else V // 64 * 64
        last = 0 if size == 4 else padded(V) - self.whole  # 64 rows, or none
        fixed = 4 * V * D * (want_weight and size == 2) + 4 * padded(V) * want_bias + 6 * last * D
        self.rows = rows_of_a_chunk(
            N, size * padded(V) + 8 * self.tiles + (size + 4) * D, fixed, self.tile.rows
        )

        def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=hidden.device)

        self.hidden, self.weight, self.out = hidden, weight, out
        self.matrix = new(self.rows, padded(V), dtype=hidden.dtype)
        self.matrix[:, self.tiles * self.tile.vocab :] = 0  # past narrow tiles
        self.dweight = None
        if out.weight is not None:
            self.dweight = (out.weight if size == 4 else new(V, D)).zero_()
        self.dbias = new(1, padded(V)).zero_() if want_bias else None
        self.last = (
            torch.nn.functional.pad(weight[self.whole :], (0, 0, 0, padded(V) - V))
            if last
            else None
        )
        self.dlast = new(last, D).zero_()

    def add(self, begin: int, end: int, factor: Tensor | None, amplitude: Tensor | None) -> None:
        """Adds the products of the matrix; its rows still lack `factor` (rows,), unless None.

        amplitude: () makes the factors fit float16; `finish` divides by it.
        """
        g, h = self.matrix[: end - begin], self.hidden[begin:end]
        if self.out.hidden is not None:
            self.multiply_weight(g, factor, self.out.hidden[begin:end])
        if factor is not None:
            if amplitude is not None:
                factor = factor * amplitude
            h = scaled(h, factor, torch.empty(h.shape, dtype=h.dtype, device=h.device))
        if self.dweight is not None:
            if self.whole > 0:
                add_product(self.dweight[: self.whole], g[:, : self.whole].mT, h)
            if self.last is not None:
                add_product(self.dlast, g[:, self.whole :].mT, h)
        if self.dbias is not None and factor is not None:
            if g.dtype == torch.float32:  # a product of matrices might take TF32
                self.dbias[0].addmv_(g.mT, factor)
            else:
                add_product(self.dbias, factor[None].to(g.dtype), g)
        elif self.dbias is not None:
            self.dbias += g.sum(0, keepdim=True, dtype=torch.float32)

    def multiply_weight(self, g: Tensor, factor: Tensor | None, out: Tensor) -> None:
        """out = factor * (g @ weight), in float32 where it has two parts, or float16's range."""
        one = self.last is None and g.dtype != torch.float16
        sums = out if one else torch.empty(out.shape, dtype=torch.float32, device=g.device)
        if self.whole > 0:
            product(sums, g[:, : self.whole], self.weight[: self.whole])
        else:
            sums.zero_()
        if self.last is not None:
            add_product(sums, g[:, self.whole :], self.last)
        if factor is not None:
            scaled(sums, factor, out)
        elif not one:
            out.copy_(sums)

    def finish(self, amplitude: Tensor | None = None) -> None:
        """Rounds the sums to the dtypes of the inputs, once."""
        V = len(self.weight)
        if self.dweight is not None:
            self.dweight[self.whole :] = self.dlast[: V - self.whole]
        dbias = None if self.dbias is None else self.dbias[0, :V]
        for out, sums in ((self.out.weight, self.dweight), (self.out.bias, dbias)):
            if out is not None and sums is not None and out is not sums:
                out.copy_(sums if amplitude is None else sums.div_(amplitude))

    def launch(
        self, kernel: Any, begin: int, end: int, vectors: tuple[Tensor, ...],
        bias: Tensor | None, shift: Tensor | None, settings: tuple[float, ...], **flags: bool,
    ) -> None:  # fmt: skip
        """Fills the matrix by one of the two kernels over tiles."""
        h, w, tile = self.hidden[begin:end], self.weight, self.tile
        bias = None if bias is None else bias.contiguous()
        programs = cdiv(len(h), tile.rows) * self.tiles
        described: tuple[Any, Any] = (None, None)
        if self.described:
            programs = min(programs, multiprocessors(h.device) or programs)
            described = (
                descriptor(h, tile.rows, tile.depth), descriptor(w, tile.vocab, tile.depth)
            )  # fmt: skip
        kernel[(programs,)](
            *described, h, w, bias, shift, *vectors, self.matrix, *settings,
            self.matrix.stride(0), len(h), h.shape[1], len(w), *h.stride(), *w.stride(),
            **self.constants, HAS_BIAS=bias is not None, **flags,
            STAGES=tile.stages, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip


def constants(tile: Tile, D: int, itemsize: int, capability: int) -> dict[str, Any]:
    of_products = products(D, itemsize, capability, tile.depth)
    return {"BLOCK_N": tile.rows, "BLOCK_V": tile.vocab, **of_products}


def columns_of(targets: Tensor, V: int, ignore_index: int) -> Tensor:
    """Returns each row's target, or -1 for a row without a gradient."""
    ids = targets.to(torch.int64)
    counts = (ids >= 0) & (ids < V) & (ids != ignore_index)
    return torch.where(counts, ids, -1).to(torch.int32)


def backward(
    grad_bits: Tensor,  # (N,)
    hidden: Tensor,  # (N, D)
    weight: Tensor,  # (V, D)
    targets: Tensor,  # (N,)
    state: Tensor,  # (2, N): peak and total
    bias: Tensor | None,  # (V,)
    shift: Tensor | None,  # ()
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    out: Gradients,
) -> None:
    """Writes the gradients of sum(grad_bits * bits) by the state of the forward walk."""
    N, V = len(hidden), len(weight)
    scale = LOG2_E.value / temperature
    column = columns_of(targets, V, ignore_index)
    # The upstream gradient of an ignored row may be NaN or infinite.
    own = torch.where(column >= 0, grad_bits, 0).float() * scale
    factor, left, amplitude = own, None, None
    if hidden.dtype == torch.float16:
        factor = torch.where(column >= 0, float(STEP.value), 0.0)
        left = own / STEP.value
        amplitude = 1 / left.abs().amax().clamp_min(1e-30)
    sums = Sums(hidden, weight, out, softcap)
    peak, total = state
    for begin in range(0, N, sums.rows):
        end = min(begin + sums.rows, N)
        vectors = tuple(x[begin:end] for x in (column, peak, total, factor))
        sums.launch(
            gradient_kernel, begin, end, vectors, bias, shift, (scale, softcap or 0.0),
            HAS_SOFTCAP=softcap is not None,
        )  # fmt: skip
        sums.add(begin, end, None if left is None else left[begin:end], amplitude)
    sums.finish(amplitude)


def backward_of_models(
    grad_bits: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    state: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    temperature: float,
    ignore_index: int,
    wanted: tuple[bool, bool, bool],
) -> Gradients:
    """Returns the gradients of (E, N, D) and (E, V, D), or of one model, one after another."""
    hidden, weight = (x if x.ndim == 3 else x[None] for x in (hidden, weight))
    (E, N, _), V = hidden.shape, weight.shape[1]
    targets, grad_bits = targets.expand(E, N), grad_bits.expand(E, N)
    shift = bias_shift(bias, softcap, E)
    bias = None if bias is None else bias.expand(E, V)
    outs = empty_gradients(hidden, weight, bias, wanted)
    with torch.cuda.device_of(hidden):
        for e in range(E):
            backward(
                grad_bits[e], hidden[e], weight[e], targets[e], state[:, e],
                None if bias is None else bias[e], None if shift is None else shift[e],
                softcap, temperature, ignore_index, outs.of(e),
            )  # fmt: skip
    return outs
