"""Tokens of random sequences on a GPU, by the token rule of csrc/sequences/sequences.h.

`fill` writes the tokens of fastmem._core.fill_range and fill_indices to a device tensor: one
launch, and nothing waits for the device.

A program draws BLOCKS blocks of Philox4x32-10 that are neighbours in the output, even across
sequences, so that every program is busy at any length.

N sequences, S tokens a sequence, V vocabulary.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def draw(seed, block, attempt, index):
    """Returns (BLOCKS, 4) uint32: the words of each block of the sequences `index`, in order."""
    w0, w1, w2, w3 = tl.philox(
        seed,
        block,
        tl.zeros_like(block) + attempt,
        index.to(tl.uint32),
        (index >> 32).to(tl.uint32),
    )
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # [word // 2][word % 2] as axes 1 and 2
    return tl.reshape(pairs, (block.shape[0], 4))


@triton.jit
def products(seed, block, index, vocab, threshold):
    """Returns (BLOCKS, 4) uniform tokens below any vocab: word * vocab div 2**32, drawn again with
    the next attempt while the remainder is below threshold = 2**32 mod vocab."""
    attempt = tl.full((), 0, tl.uint32)
    words = draw(seed, block, attempt, index)
    tokens = tl.umulhi(words, tl.zeros_like(words) + vocab)
    rejected = words * vocab < threshold
    while tl.max(rejected.to(tl.int32)) > 0:
        attempt += 1
        words = draw(seed, block, attempt, index)
        tokens = tl.where(rejected, tl.umulhi(words, tl.zeros_like(words) + vocab), tokens)
        rejected = rejected & (words * vocab < threshold)
    return tokens


@triton.jit
def weighted(words, cumulative_ptr, vocab, step):
    """Returns the last i with cumulative[i] <= word, by bisection; cumulative[0] is 0."""
    found = tl.zeros(words.shape, tl.int64)
    while step > 0:
        further = found + step
        inside = further < vocab
        edge = tl.load(cumulative_ptr + further, mask=inside, other=0)
        found = tl.where(inside & (edge <= words), further, found)
        step = step // 2
    return found


UNSPECIALIZED = [
    "seed", "begin", "vocab", "threshold", "step", "blocks", "length", "total",
    "stride_n", "stride_s", "stride_i",
]  # fmt: skip
"""Arguments whose values are not worth a kernel of their own. A stride specialized to 1 would even
be slower: threads would hold neighbouring tokens that no single store can take."""


@triton.jit(do_not_specialize=UNSPECIALIZED)
def fill_kernel(
    out_ptr,  # (N, S)
    indices_ptr,  # (N,) int64, or None for begin, begin + 1, ...
    cumulative_ptr,  # (V,) uint32, or None for uniform tokens
    seed: tl.int64,  # the bits of a uint64, as begin
    begin: tl.int64,
    vocab: tl.int64,
    threshold: tl.int64,  # 2**32 mod V
    step: tl.int64,  # the greatest power of two below V, or 0
    blocks,  # of a sequence
    length: tl.int64,  # S
    total: tl.int64,  # N * blocks
    stride_n: tl.int64,
    stride_s: tl.int64,
    stride_i: tl.int64,
    HALVES: tl.constexpr,
    WHOLE: tl.constexpr,  # out is contiguous, and no sequence ends within a block
    BLOCKS: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    # Blocks past the end repeat the last block and are not stored.
    lane = tl.minimum(start + tl.arange(0, BLOCKS), total - 1) - start
    # One 64-bit division for each program; its blocks divide in 32 bits unless a sequence is huge.
    n = start // blocks
    place = (start % blocks).to(blocks.dtype) + lane.to(blocks.dtype)
    if blocks.dtype == tl.int32:
        place = place.to(tl.uint32)
        over = place // tl.cast(blocks, tl.uint32)
        block = place - over * tl.cast(blocks, tl.uint32)
    else:
        over = place // blocks
        block = (place - over * blocks).to(tl.uint32)
    n = n + over.to(tl.int64)
    index = tl.cast(begin, tl.int64) + n
    if indices_ptr is not None:
        index = tl.load(indices_ptr + n * stride_i)

    TOKENS: tl.constexpr = 8 if HALVES else 4
    if HALVES:
        mask = tl.cast(vocab - 1, tl.uint32)
        words = draw(seed, block, 0, index)
        halves = tl.join(words & mask, (words >> 16) & mask)
        tokens = tl.reshape(halves, (BLOCKS, TOKENS))
    elif cumulative_ptr is not None:
        tokens = weighted(draw(seed, block, 0, index), cumulative_ptr, vocab, step)
    else:
        tokens = products(
            seed, block, index, tl.cast(vocab, tl.uint32), tl.cast(threshold, tl.uint32)
        )
    t = tl.arange(0, TOKENS)[None, :]
    stored = (start + tl.arange(0, BLOCKS) < total)[:, None]
    if WHOLE:
        outs = out_ptr + (start + tl.arange(0, BLOCKS).to(tl.int64))[:, None] * TOKENS + t
    else:
        s = block.to(tl.int64)[:, None] * TOKENS + t
        stored = stored & (s < length)
        outs = out_ptr + n[:, None] * stride_n + s * stride_s
    tl.store(outs, tokens.to(out_ptr.dtype.element_ty), mask=stored)


def fill(
    out: Tensor,  # (N, S) uint16, uint32, int32 or int64, any strides
    seed: int,
    vocab: int,
    begin: int = 0,
    indices: Tensor | None = None,  # (N,) int64: the bits of a uint64; begin is not used
    cumulative: Tensor | None = None,  # (V,) uint32, contiguous
) -> None:
    """Writes sequences begin, ..., begin + N - 1, or the sequences `indices`, in this order.

    With cumulative, token i has probability (cumulative[i + 1] - cumulative[i]) / 2**32, and 2**32
    follows the last entry: each token takes one word and is the last i with cumulative[i] <= word.
    The entries start at 0 and never decrease.
    """
    N, S = out.shape
    if N == 0:
        return
    halves = cumulative is None and vocab <= 65536 and vocab.bit_count() == 1
    tokens = 8 if halves else 4
    blocks = -(-S // tokens)
    whole_blocks = S % tokens == 0 and out.is_contiguous()
    BLOCKS = blocks_of_a_program(halves, whole_blocks)
    with torch.cuda.device_of(out):
        fill_kernel[(-(-N * blocks // BLOCKS),)](
            out,
            indices,
            cumulative,
            signed(seed),
            signed(begin),
            vocab,
            2**32 % vocab,
            2 ** (vocab - 1).bit_length() // 2,
            blocks,
            S,
            N * blocks,
            *out.stride(),
            0 if indices is None else indices.stride(0),
            HALVES=halves,
            WHOLE=whole_blocks,
            BLOCKS=BLOCKS,
            num_warps=4,
        )


def blocks_of_a_program(halves: bool, whole: bool) -> int:
    """Returns as many as registers allow: at 512 the overhead of a program is a sixth of the time.

    All rules but halves hold more of each block, and if sequences end within a block, a thread
    holds the addresses of one token of each of many blocks.
    """
    return 1024 if halves and whole else 512 if whole else 256


def signed(x: int) -> int:
    """Returns the int64 with the bits of a uint64."""
    return x - 2**64 if x >= 2**63 else x
