"""Tile sizes of the likelihood kernels: tables by width, and the choice from them.

bench/aot.py reads registers, spills and shared memory of every row from the compiled kernels.

N rows, D width, V vocabulary.
"""

import functools
from typing import Any, NamedTuple

import torch


class Tile(NamedTuple):
    """Tile sizes and launch settings of a forward kernel."""

    rows: int  # BLOCK_N
    vocab: int  # BLOCK_V
    depth: int  # BLOCK_D of one product; D if hidden is resident
    warps: int
    stages: int  # tiles of the walk in flight

    def resident(self, D: int) -> bool:
        return self.depth == D


# By width: a hidden tile of this width stays in the program. 0 is every other width: hidden is read
# in pieces of `depth` at each step of the walk. Chosen without a GPU, by registers and instructions
# (bench/aot.py); statistics, a softcap, ragged vocabularies and Blackwell use these tiles.
PREDICTED = {
    # 128 rows a program: a row of weight read from L2 serves 128 rows, which takes less time than
    # their exponentials. 4 warps hold 128 logits a thread, which spreads the overhead of a tile;
    # two programs fit an SM, and the exponentials of one hide the products of the other.
    **{D: Tile(128, 128, D, 4, 3) for D in (16, 32, 64)},
    128: Tile(128, 128, 128, 4, 2),  # a third stage would not leave room for a second program
    # Products take longer than exponentials here, and at 128 rows a program weight from L2 takes
    # longer than both: 256 rows, in 128 KiB of shared memory.
    256: Tile(256, 64, 256, 8, 2),
    512: Tile(128, 32, 512, 8, 2),  # the most that fits beside 128 rows of 1 KiB
    # The largest tile of logits, for the fewest bytes per product.
    0: Tile(256, 128, 64, 8, 3),
}
# The fastest of 7 to 14 tiles a width on an H100 at V = 2048, of 9 at D = 1600, V = 50257
# (docs/lab.md, "Tiles"). 16 was not measured.
HOPPER = {
    16: PREDICTED[16],
    32: Tile(64, 128, 32, 4, 3),
    64: Tile(64, 128, 64, 4, 3),
    128: Tile(128, 128, 128, 8, 2),
    256: Tile(64, 64, 256, 4, 2),
    512: Tile(128, 256, 64, 8, 3),  # streamed: a resident tile took 1.4 times as long
    0: Tile(128, 256, 64, 8, 4),
}
FORWARD_TILES = {
    # 8 warps spill at 512, and 256 × 128 at 0.
    100: {**PREDICTED, 512: Tile(128, 32, 512, 4, 2), 0: Tile(128, 128, 64, 8, 3)},
    90: HOPPER,
    # Operands come from registers, where a resident row of 256 does not fit. With 64 columns all
    # warps lie along the rows; along the vocabulary they would reduce through shared memory.
    80: {
        **{D: Tile(128, 64, D, 4, 3) for D in (16, 32, 64)},
        128: Tile(128, 64, 128, 4, 2),  # with a third stage, statistics spill in Triton 3.6
        0: Tile(128, 128, 32, 8, 3),  # within the 99 KiB of sm_86 and sm_89
    },
}
# The tiles whose columns forward_tile halves. No halved tile was measured, so Hopper's stay.
HALVED_TILES = {**FORWARD_TILES, 90: PREDICTED}

# Rows without 16-byte alignment are read element by element, each with its own address.
UNALIGNED_TILE = Tile(128, 64, 32, 8, 2)

# float32 by three TF32 products from Ampere on. A tile's depth is that of the compensated sum, and
# the largest that keeps gradients within twice PyTorch's error for logits up to 500, in emulation
# (bench/lab/tf32x3.py), but for one draw of 20 above D = 256 (docs/lab.md). Both passes have the
# same depth: logits summed in another order would not fit this peak and total, as p - 1 shows.
# Before Ampere products are ordinary multiply-adds (input_precision="ieee", for 1e-4 bit), whose
# unrolled code grows with the depth.
FLOAT32_TILE = Tile(64, 64, 16, 4, 2)


def tf32_tile(D: int, aligned: bool, capability: int) -> Tile:
    table = generation(capability)
    depth = 32 if aligned and 32 < D <= 128 else 16
    if D > 32 and not aligned:
        return Tile(64, 64, depth, 4, 2)
    if D <= 64:
        fast = Tile(64, 128, depth, 4, 2)
        return fast if table == 90 else Tile(128, 128 if table > 90 else 64, depth, 8, 2)
    return Tile(128, 128 if table == 90 and D > 128 else 64, depth, 8, 3)


def precision(itemsize: int, capability: int) -> str:
    """Returns the input_precision of products; Turing lacks TF32."""
    return "tf32x3" if itemsize == 4 and capability >= 80 else "ieee"


def float32_tile(D: int, aligned: bool, capability: int) -> Tile:
    tf32 = precision(4, capability) == "tf32x3"
    return tf32_tile(D, aligned, capability) if tf32 else FLOAT32_TILE


# 16-bit products of more columns than this are summed in pieces. Bits were off by up to 1.8e-4 at
# D = 8192.
WIDEST_SUM = 2048
# Both sums must fit into registers.
PIECES_TILES = {generation: Tile(128, 128, 64, 8, 4) for generation in (90, 100)}
PIECES_TILES[80] = Tile(128, 128, 32, 8, 4)


def products(D: int, itemsize: int, capability: int, depth: int) -> dict[str, Any]:
    """Returns the constants of products of this depth and of their summation, see logits_tile."""
    how = precision(itemsize, capability)
    few = how == "tf32x3" and 2 * depth >= D  # two terms have no sum whose error could return
    order = "one" if few else "compensated"
    if itemsize == 2:
        order = "pieces" if D > WIDEST_SUM else "one"
    return {"BLOCK_D": depth, "EVEN_D": D % depth == 0, "SUM": order, "PRECISION": how}


def forward_tile(
    D: int, itemsize: int, capability: int, aligned: bool, heavy: bool, V: int = 0
) -> Tile:
    """Returns the row of the table for this width.

    heavy: statistics or a softcap need more registers for each logit, so it halves the columns. A
    ragged vocabulary does too where hidden is resident, because the code for its last tile is
    separate.
    """
    if itemsize == 4:
        tile = float32_tile(D, aligned, capability)
    elif not aligned:
        tile = UNALIGNED_TILE
    elif D > WIDEST_SUM:
        tile = PIECES_TILES[generation(capability)]
    else:
        table = FORWARD_TILES[generation(capability)]
        tile = table.get(D, table[0])
        heavy = heavy or (V % tile.vocab > 0 and tile.resident(D))
        if heavy:
            table = HALVED_TILES[generation(capability)]
            tile = table.get(D, table[0])
    return tile._replace(vocab=max(32, tile.vocab // 2)) if heavy else tile


# By descriptors a third stage was within 3 % of a fourth at D = 512 and 1024, and leaves more
# shared memory to the stores.
STREAMED_TILES = {100: FORWARD_TILES[100][0], 90: HOPPER[512], 80: FORWARD_TILES[80][0]}


def streamed_tile(
    D: int, itemsize: int, capability: int, aligned: bool, softcap: bool = False
) -> Tile:
    """Returns the tile of logits that are stored (kernels/chunks.py)."""
    table = PIECES_TILES if D > WIDEST_SUM else STREAMED_TILES
    if itemsize == 4:
        # 128 columns spill with a bias, in Triton 3.6.
        tile = float32_tile(D, aligned, capability)._replace(vocab=64)
    else:
        tile = table[generation(capability)] if aligned else UNALIGNED_TILE
    return tile._replace(vocab=tile.vocab // 2) if softcap else tile


def described(D: int, itemsize: int, depth: int, capability: int) -> bool:
    """True if the copy engine reads the tiles of aligned rows, and one program makes many tiles.

    On an H100 the prototype's powers of logits took 0.54 ms so, 0.61 ms otherwise, at D = 512, and
    1.80 and 2.07 ms at D = 1024 (bench/results/lab-three-products-h100.json).
    """
    return itemsize == 2 and depth < D <= WIDEST_SUM and generation(capability) == 90


CHUNKED_ABOVE = {2: 256, 4: 128}
"""Widths above have their gradients in chunks, by the bytes of a number (docs/design.md has the
table). On an H100 likelihood_backward.py took 5.9 ms at D = 512, V = 2048 in bfloat16, a prototype
of chunks 1.7. A wider float32 gradient has several programs, and each computes the logits again."""


def chunked(D: int, itemsize: int) -> bool:
    return CHUNKED_ABOVE[itemsize] < D


def default_workspace(N: int, row_bytes: int, fixed_bytes: int) -> int:
    """Returns the most bytes of chunks and sums: a GiB, or the sums and 4096 rows if this is more,
    of which rows take at most a GiB.

    On an H100 chunks of 2,048 rows took 63.6 ms where 8,192 took 54.7 (docs/lab.md).
    """
    return max(1 << 30, fixed_bytes + min(1 << 30, min(N, 4096) * row_bytes))


class GradientTile(NamedTuple):
    """Tile sizes and launch settings of a gradient kernel."""

    own: int  # rows of the matrix whose gradient the kernel computes
    walk: int  # rows of the other matrix at a time
    depth: int  # of a product that makes logits; D if the owned rows are resident
    out: int  # columns of the gradient: each further program over D computes the logits again
    warps: int
    stages: int

    def resident(self, D: int) -> bool:
        return self.depth == self.out == D


# As FORWARD_TILES. The gradient (own × out, float32) and the logits (own × walk) are in registers,
# the owned tile and `stages` walked tiles in shared memory.
HOPPER_GRADIENT = {
    **{D: GradientTile(128, 64, D, D, 4, 3) for D in (16, 32, 64)},
    128: GradientTile(128, 64, 128, 128, 8, 3),
    # The whole width at once, so that logits are computed once: 128 registers of gradient.
    256: GradientTile(128, 64, 256, 256, 8, 2),
    0: GradientTile(128, 64, 64, 128, 8, 3),
}
AMPERE_GRADIENT = {
    **{D: GradientTile(64, 64, D, D, 4, 2) for D in (16, 32, 64)},
    128: GradientTile(64, 64, 128, 128, 8, 2),
    0: GradientTile(64, 64, 32, 128, 8, 2),
}
# Blackwell writes products to tensor memory, and they pass through registers once more.
BLACKWELL_GRADIENT = {
    **HOPPER_GRADIENT,
    **{D: GradientTile(64, 64, D, D, 8, 3) for D in (16, 32, 64)},
}
# The fastest tile that does not spill, of 3 to 9 a width on an H100 at V = 2048 (docs/lab.md,
# "Tiles"). At 256 the faster tiles spill; 16 and 0 were not measured.
HOPPER_DHIDDEN = {
    **HOPPER_GRADIENT,
    32: GradientTile(128, 32, 32, 32, 4, 4),
    64: GradientTile(64, 64, 64, 64, 4, 3),
    128: GradientTile(64, 64, 128, 128, 4, 3),
}
HOPPER_DWEIGHT = {**HOPPER_GRADIENT, 128: GradientTile(64, 128, 128, 128, 4, 2)}
# With a bias, dweight spills in the measured tile.
DBIAS_TILES = {100: BLACKWELL_GRADIENT, 90: HOPPER_GRADIENT, 80: AMPERE_GRADIENT}
DHIDDEN_TILES = {**DBIAS_TILES, 90: HOPPER_DHIDDEN}
DWEIGHT_TILES = {**DBIAS_TILES, 90: HOPPER_DWEIGHT}

# A softcap keeps a slope for each logit: fewer logits where registers are full.
HOPPER_SOFTCAP = {
    **HOPPER_GRADIENT,
    **{D: GradientTile(64, 64, D, D, 4, 3) for D in (16, 32, 64)},
    256: GradientTile(128, 32, 256, 256, 8, 3),
    0: GradientTile(64, 64, 64, 128, 8, 3),
}
BLACKWELL_SOFTCAP = {
    **BLACKWELL_GRADIENT,
    128: GradientTile(64, 64, 128, 128, 8, 3),
    256: GradientTile(128, 32, 256, 256, 8, 3),
    0: GradientTile(64, 64, 64, 128, 8, 3),
}
AMPERE_SOFTCAP = {**AMPERE_GRADIENT, 128: GradientTile(64, 32, 128, 128, 4, 2)}
SOFTCAP_TILES = {100: BLACKWELL_SOFTCAP, 90: HOPPER_SOFTCAP, 80: AMPERE_SOFTCAP}

# As in the forward pass.
UNALIGNED_GRADIENT_TILE = GradientTile(64, 64, 32, 64, 8, 2)
FLOAT32_GRADIENT_TILE = GradientTile(64, 32, 16, 128, 4, 2)


def tf32_gradient_tile(D: int, aligned: bool, capability: int) -> GradientTile:
    table = generation(capability)
    widest = 128 if aligned and table == 90 else 64
    out = 32 if D <= 32 else 64 if D <= 64 else widest
    depth = tf32_tile(D, aligned, capability).depth
    return GradientTile(64, 32, depth, out, 8 if table == 100 and D > 32 else 4, 2)


def gradient_tile(
    D: int,
    itemsize: int,
    capability: int,
    aligned: bool,
    softcap: bool,
    bias: bool,
    owns_rows: bool,
) -> GradientTile:
    """Returns the row of the table for this width.

    owns_rows: dhidden, else dweight, whose program sums dbias too.
    """
    if itemsize == 4:
        if precision(itemsize, capability) == "tf32x3":
            return tf32_gradient_tile(D, aligned, capability)
        return FLOAT32_GRADIENT_TILE
    if not aligned:
        return UNALIGNED_GRADIENT_TILE
    if softcap:
        tables = SOFTCAP_TILES
    elif owns_rows:
        tables = DHIDDEN_TILES
    else:
        tables = DBIAS_TILES if bias else DWEIGHT_TILES
    table = tables[generation(capability)]
    return table.get(D, table[0])


# Bits and dhidden in one walk (kernels/likelihood_ahead.py), by the width rounded up to a power of
# two: the gradient (own × out, float32) and the logits (own × walk) are in registers, and the owned
# rows are resident. Chosen without a GPU: on Hopper the fastest tiles of dhidden that do not spill.
AHEAD_TILES = {
    100: {
        **{D: GradientTile(64, 64, D, D, 4, 3) for D in (16, 32, 64, 128)},
        256: GradientTile(128, 64, 256, 256, 8, 2),
    },
    80: {
        **{D: GradientTile(64, 64, D, D, 4, 2) for D in (16, 32, 64)},
        128: GradientTile(128, 32, 128, 128, 8, 3),
        256: GradientTile(64, 64, 256, 256, 8, 2),
    },
}
AHEAD_TILES[90] = AHEAD_TILES[100]


def ahead_tile(
    D: int, itemsize: int, capability: int, online: bool = False, repairs: bool = False
) -> GradientTile | None:
    """Returns the row of the table for this width and aligned rows, or None if it has none.

    online: the sums are rescaled on the way, which takes registers. repairs: speed matters little.
    """
    if chunked(D, itemsize):
        return None
    wide = max(16, 1 << (D - 1).bit_length())
    if itemsize == 2:
        tile = AHEAD_TILES[generation(capability)][wide]
        if repairs or (online and generation(capability) == 100):
            # The pointers of a second stage spill.
            few = wide == 256 and generation(capability) == 80
            tile = tile._replace(walk=32, stages=1 if few else tile.stages)
        return tile
    tile = tf32_gradient_tile(D, True, capability)
    fits = precision(itemsize, capability) == "tf32x3" and tile.out >= D
    return tile if fits else None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


@functools.cache
def capability(device: torch.device) -> int:
    """Returns the compute capability, 90 for sm_90; without a GPU (Triton's interpreter) 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return major * 10 + minor


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Returns 0 without a GPU: `split_count` then splits no walk."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def generation(capability: int) -> int:
    """Returns the table of a GPU: 80 of Ampere, Ada and the Blackwell of desktops (12.x), which
    share instructions and as little as 99 KiB of shared memory; 90 of Hopper; 100 of Blackwell."""
    return 90 if 90 <= capability < 100 else 100 if 100 <= capability < 120 else 80


def split_count(
    programs: int, walked: int, block: int, resident: bool, device: torch.device
) -> int:
    """Returns the number of parts of a walk, so that few programs do not leave a GPU idle.

    Two programs for each multiprocessor, but at least four tiles a part, since the start of a part
    has a cost. The second kernel, which adds up the parts, takes as long as a walk of 2048 rows
    whose owner is resident.
    """
    wanted = 2 * multiprocessors(device)
    least = max(4 * block, 2048 if resident else 0)
    return max(1, min(wanted // max(programs, 1), walked // least))
