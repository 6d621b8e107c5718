"""LayerNorm and the products around it, forward and backward, without intermediate matrices.

Computes, for E models at once,

    y   = (x - mean) * rstd * scale + shift      LayerNorm of a row
    out = y                                      with 2 weights: scale, shift
    out = y @ up.T + up_bias                     with 4, two more: such as q, k, v
    out = x + gelu(y @ up.T + up_bias) @ down.T + down_bias,  x = x0 + mixed @ proj.T + proj_bias
                                                 with 8: what follows attention, tanh's GELU

A program of the forward pass has some rows, and walks the U hidden columns with sums of (rows, D)
in registers. The backward pass computes LayerNorm, the first product and GELU again. A program of
`rows_kernel` has rows, walks the columns and makes dx, to which it adds another gradient of x, and
the gradient of mixed; one of `weights_kernel` has columns of a model, walks a part of the rows and
makes the gradients of their weights. Both write sums of their part in float32, which `sum_kernel`
adds up in order: the same input gives the same bits.

A number that is not finite stays in its row of out, dx and dmixed, and reaches the weights'
gradients. kernels/block.py launches the kernels.

E models, N rows each, D width, U hidden columns: 4 D, 3 D or, of LayerNorm alone, 0.
"""

import triton
import triton.language as tl


@triton.jit
def matrix(ptr, rows, columns, stride, ROWS, COLUMNS):
    """Returns (rows, columns), 0 outside of (ROWS, COLUMNS)."""
    mask = (rows < ROWS)[:, None] & (columns < COLUMNS)[None, :]
    return tl.load(ptr + rows[:, None] * stride + columns[None, :], mask=mask, other=0.0)


@triton.jit
def vector(ptr, columns, COLUMNS):
    return tl.load(ptr + columns, mask=columns < COLUMNS, other=0.0).to(tl.float32)


@triton.jit
def normalized(x, d, D: tl.constexpr):
    """Returns (x - mean) * rstd and rstd of rows that are 0 from D on."""
    x = x.to(tl.float32)
    centred = tl.where((d < D)[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + 1e-5)
    return centred * rstd[:, None], rstd


@triton.jit
def scaled(xhat, scale_ptr, shift_ptr, d, D: tl.constexpr):
    return xhat * vector(scale_ptr, d, D)[None, :] + vector(shift_ptr, d, D)[None, :]


@triton.jit
def gate(u):
    """Returns s of gelu(u) = u * s = u / (1 + 2**t): (1 + tanh(sqrt(2 / pi) (u + c u**3))) / 2."""
    return 1.0 / (1.0 + tl.exp2(u * (-2.302208198 - 0.1029432397 * u * u)))


@triton.jit
def slope(u, s):
    return s + u * s * (1.0 - s) * (1.5957691216 + 0.2140644488 * u * u)


@triton.jit
def forward_kernel(
    x_ptr,  # (E, N, D)
    mixed_ptr,  # (E, N, D)
    proj_ptr,  # (E, D, D), models stride_p apart
    proj_bias_ptr,  # (E, D), stride_e apart, as of all vectors
    scale_ptr,
    shift_ptr,
    up_ptr,  # (E, U, D), stride_m apart
    up_bias_ptr,
    down_ptr,  # (E, D, U), stride_m apart
    down_bias_ptr,
    middle_ptr,  # (E, N, D) out: x0 + mixed @ proj.T + proj_bias
    out_ptr,  # (E, N, D) or (E, N, U)
    N,
    stride_e,
    stride_p,
    stride_m,
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,  # D rounded up to a power of two
    HAS_DOWN: tl.constexpr,
    KIND: tl.constexpr,  # of the products
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n, d, weights = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH), e * stride_e
    left = tl.minimum(N - first, BLOCK_N).to(tl.int32)
    own = (e * N + first) * D
    places = own + n[:, None] * D + d[None, :]
    stored = (n < left)[:, None] & (d < D)[None, :]
    if HAS_DOWN:
        acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        for start in tl.range(0, D, BLOCK_U):
            k = start + tl.arange(0, BLOCK_U)
            proj = matrix(proj_ptr + e * stride_p, d, k, D, D, D).to(KIND)
            mixed = matrix(mixed_ptr + own, n, k, D, left, D)
            acc = tl.dot(mixed, tl.trans(proj), acc, input_precision=PRECISION)
        acc += vector(proj_bias_ptr + weights, d, D)[None, :]
        acc += matrix(x_ptr + own, n, d, D, left, D).to(tl.float32)
        x = acc.to(middle_ptr.dtype.element_ty)
        tl.store(middle_ptr + places, x, mask=stored)
    else:
        x = matrix(x_ptr + own, n, d, D, left, D)
    xhat, _ = normalized(x, d, D)
    y = scaled(xhat, scale_ptr + weights, shift_ptr + weights, d, D).to(KIND)
    if U == 0:
        tl.store(out_ptr + places, y, mask=stored)
    else:
        acc = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        for start in tl.range(0, U, BLOCK_U):
            h = start + tl.arange(0, BLOCK_U)
            up = matrix(up_ptr + e * stride_m, h, d, D, U, D).to(KIND)
            u = tl.dot(y, tl.trans(up), input_precision=PRECISION)
            u += vector(up_bias_ptr + weights, h, U)[None, :]
            if HAS_DOWN:
                down = matrix(down_ptr + e * stride_m, d, h, U, D, U).to(KIND)
                u = (u * gate(u)).to(KIND)
                acc = tl.dot(u, tl.trans(down), acc, input_precision=PRECISION)
            else:
                outs = out_ptr + (e * N + first) * U + n[:, None] * U + h[None, :]
                mask = (n < left)[:, None] & (h < U)[None, :]
                tl.store(outs, u.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_DOWN:
        # Read again: registers that would be held during the walk are the products'.
        tl.debug_barrier()
        x = matrix(middle_ptr + own, n, d, D, left, D).to(tl.float32)
        acc += x + vector(down_bias_ptr + weights, d, D)[None, :]
        tl.store(out_ptr + places, acc.to(out_ptr.dtype.element_ty), mask=stored)


@triton.jit
def rows_kernel(
    x_ptr,  # (E, N, D), of LayerNorm
    dout_ptr,  # (E, N, D) or (E, N, U)
    residual_ptr,  # (E, N, D), another gradient of x, or None
    proj_ptr,
    scale_ptr,
    shift_ptr,
    up_ptr,
    up_bias_ptr,
    down_ptr,
    dx_ptr,  # (E, N, D)
    dmixed_ptr,  # (E, N, D)
    y_ptr,  # (E, N, D), for weights_kernel
    parts_ptr,  # (E, programs, 2 D or 3 D): of scale, shift and down_bias
    N,
    stride_e,
    stride_p,
    stride_m,
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    e = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK_N
    n, d, weights = tl.arange(0, BLOCK_N), tl.arange(0, WIDTH), e * stride_e
    left = tl.minimum(N - first, BLOCK_N).to(tl.int32)
    own = (e * N + first) * D
    places = own + n[:, None] * D + d[None, :]
    stored = (n < left)[:, None] & (d < D)[None, :]
    if U == 0:
        dy = matrix(dout_ptr + own, n, d, D, left, D).to(tl.float32)
    else:
        xhat, _ = normalized(matrix(x_ptr + own, n, d, D, left, D), d, D)
        y = scaled(xhat, scale_ptr + weights, shift_ptr + weights, d, D).to(KIND)
        tl.store(y_ptr + places, y, mask=stored)
        if HAS_DOWN:
            dout = matrix(dout_ptr + own, n, d, D, left, D).to(KIND)
        dy = tl.zeros((BLOCK_N, WIDTH), tl.float32)
        for start in tl.range(0, U, BLOCK_U):
            h = start + tl.arange(0, BLOCK_U)
            up = matrix(up_ptr + e * stride_m, h, d, D, U, D).to(KIND)
            if HAS_DOWN:
                u = tl.dot(y, tl.trans(up), input_precision=PRECISION)
                u += vector(up_bias_ptr + weights, h, U)[None, :]
                down = matrix(down_ptr + e * stride_m, d, h, U, D, U).to(KIND)
                du = tl.dot(dout, down, input_precision=PRECISION) * slope(u, gate(u))
            else:
                du = matrix(dout_ptr + (e * N + first) * U, n, h, U, left, U)
            dy = tl.dot(du.to(KIND), up, dy, input_precision=PRECISION)
    # Read again, as in forward_kernel.
    xhat, rstd = normalized(matrix(x_ptr + own, n, d, D, left, D), d, D)
    parts_ptr += (e * tl.num_programs(0) + tl.program_id(0)) * (D * (2 + HAS_DOWN)) + d
    tl.store(parts_ptr, tl.sum(dy * xhat, 0), mask=d < D)
    tl.store(parts_ptr + D, tl.sum(dy, 0), mask=d < D)
    dy *= vector(scale_ptr + weights, d, D)[None, :]
    mean, along = tl.sum(dy, 1) / D, tl.sum(dy * xhat, 1) / D
    dx = rstd[:, None] * (dy - mean[:, None] - xhat * along[:, None])
    if HAS_RESIDUAL:
        residual = matrix(residual_ptr + own, n, d, D, left, D).to(tl.float32)
        dx += residual
    dx = dx.to(dx_ptr.dtype.element_ty)
    tl.store(dx_ptr + places, dx, mask=stored)
    if HAS_DOWN:
        tl.store(parts_ptr + 2 * D, tl.sum(residual, 0), mask=d < D)
        dx = dx.to(KIND)
        for start in tl.range(0, D, BLOCK_U):
            k = start + tl.arange(0, BLOCK_U)
            proj = matrix(proj_ptr + e * stride_p, d, k, D, D, D).to(KIND)
            dmixed = tl.dot(dx, proj, input_precision=PRECISION).to(KIND)
            outs = dmixed_ptr + own + n[:, None] * D + k[None, :]
            tl.store(outs, dmixed, mask=(n < left)[:, None] & (k < D)[None, :])


@triton.jit
def weights_kernel(
    y_ptr,  # (E, N, D)
    dout_ptr,  # (E, N, D) or (E, N, U)
    up_ptr,
    up_bias_ptr,
    down_ptr,
    parts_ptr,  # (E, S, P): of up, up_bias and down
    N,
    stride_e,
    stride_m,
    rows,  # of a part, a multiple of BLOCK_N
    D: tl.constexpr,
    U: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_DOWN: tl.constexpr,
    KIND: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_U: tl.constexpr,
):
    part, e = tl.program_id(1), tl.program_id(2).to(tl.int64)
    h, d = tl.program_id(0) * BLOCK_U + tl.arange(0, BLOCK_U), tl.arange(0, WIDTH)
    weights = e * stride_e
    if HAS_DOWN:
        up = matrix(up_ptr + e * stride_m, h, d, D, U, D).to(KIND)
        down = matrix(down_ptr + e * stride_m, d, h, U, D, U).to(KIND)
        bias = vector(up_bias_ptr + weights, h, U)
    dup = tl.zeros((BLOCK_U, WIDTH), tl.float32)
    ddown = tl.zeros((BLOCK_U, WIDTH), tl.float32)
    dbias = tl.zeros((BLOCK_U,), tl.float32)
    y_ptr += e * N * D
    dout_ptr += e * N * (D if HAS_DOWN else U)
    for start in tl.range(part * rows, tl.minimum(part * rows + rows, N), BLOCK_N):
        first = tl.cast(start, tl.int64)
        n, left = tl.arange(0, BLOCK_N), N - start
        y = matrix(y_ptr + first * D, n, d, D, left, D)
        # Columns of U along the rows: the products that add up have them in registers.
        if HAS_DOWN:
            dout = matrix(dout_ptr + first * D, n, d, D, left, D).to(KIND)
            u = tl.dot(up, tl.trans(y), input_precision=PRECISION) + bias[:, None]
            s = gate(u)
            ddown = tl.dot((u * s).to(KIND), dout, ddown, input_precision=PRECISION)
            du = tl.dot(tl.trans(down), tl.trans(dout), input_precision=PRECISION) * slope(u, s)
        else:
            du = tl.trans(matrix(dout_ptr + first * U, n, h, U, left, U))
        dup = tl.dot(du.to(KIND), y, dup, input_precision=PRECISION)
        dbias += tl.sum(du.to(tl.float32), 1)
    parts_ptr += (e * tl.num_programs(1) + part) * (U * (D + 1 + HAS_DOWN * D))
    mask = (h < U)[:, None] & (d < D)[None, :]
    tl.store(parts_ptr + h[:, None] * D + d[None, :], dup, mask=mask)
    tl.store(parts_ptr + U * D + h, dbias, mask=h < U)
    if HAS_DOWN:
        parts_ptr += U * D + U
        tl.store(parts_ptr + d[None, :] * U + h[:, None], ddown, mask=mask)


@triton.jit
def chosen(i, a, b, c):
    return tl.where(i == 0, a, tl.where(i == 1, b, c))


@triton.jit
def sum_kernel(
    parts_ptr,  # (E, S, P) of up to three kernels, one after the other
    out_ptr,  # (E, columns), models stride apart
    stride,
    columns,
    S0,
    P0,
    at0,  # the first of the P columns of out
    S1,
    P1,
    at1,
    S2,
    P2,
    at2,
    split,  # columns of the first kernel's from here on lie at the end of out
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the parts, SIZE at a time, in order."""
    i, e = tl.program_id(2), tl.program_id(1).to(tl.int64)
    E = tl.num_programs(1).to(tl.int64)
    parts_ptr += chosen(i, 0, E * S0 * P0, E * S0 * P0 + E * S1 * P1)
    S, P, at = chosen(i, S0, S1, S2), chosen(i, P0, P1, P2), chosen(i, at0, at1, at2)
    p = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((SIZE, BLOCK), tl.float32)
    for start in tl.range(0, tl.where(tl.program_id(0) * BLOCK < P, S, 0), SIZE):
        first = (e * S + start) * P
        total += matrix(parts_ptr + first, tl.arange(0, SIZE), p, P, S - start, P)
    out = tl.sum(total, 0).to(out_ptr.dtype.element_ty)
    place = tl.where((i == 0) & (p >= split), columns - P + p, at + p)
    tl.store(out_ptr + e * stride + place, out, mask=p < P)
