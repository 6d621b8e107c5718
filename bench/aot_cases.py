"""The kernels that bench/aot.py compiles: each row of each table of tiles, by width and flags."""

from typing import Any, NamedTuple

WIDE = " wide"
"""Labels the tile of 128 × 128 logits."""


class Case(NamedTuple):
    """One kernel with one row of a shape table."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: str
    warps: int
    stages: int
    logits: int  # of one tile; 0 if the kernel has no logits
    aligned: bool = True
    wide: tuple[str, ...] = ()  # pointers to float32 besides FLOAT_POINTERS
    described: bool = False  # descriptors of hidden and weight


FLAGS = {"HAS_BIAS": False, "HAS_SOFTCAP": False, "MOMENTS": 0, "GREEDY": False, "LSE": False}
ALL_FLAGS = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "MOMENTS": 2, "GREEDY": True, "LSE": True}


ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}


def described(kernels: Any, D: int, dtype: str, depth: int, sm: int) -> bool:
    found: bool = D % 16 == 0 and kernels.tiles.described(D, ITEMSIZE[dtype], depth, sm)
    return found


def cases(kernels: Any, sm: int) -> list[Case]:
    """Returns each row of each table at its width, without flags and with all flags."""
    found = []
    table = kernels.tiles.generation(sm)

    def products(D: int, dtype: str, depth: int) -> dict[str, Any]:
        return kernels.tiles.products(D, ITEMSIZE[dtype], sm, depth)  # type: ignore[no-any-return]

    def add_forward(
        label: str, D: int, V: int, dtype: str, flags: dict[str, Any], tile: Any = None
    ) -> None:
        tile = tile or kernels.tiles.forward_tile(
            D, ITEMSIZE[dtype], sm, D % 16 == 0, flags["GREEDY"], V
        )
        split = D > 512 or "split" in label
        constants = {
            "BLOCK_N": tile.rows, "BLOCK_V": tile.vocab, "EVEN_V": V % tile.vocab == 0,
            "RESIDENT": tile.resident(D), "SPLIT": split, "STAGES": tile.stages, **flags,
            **products(D, dtype, tile.depth),
        }  # fmt: skip
        name = f"forward {dtype} D={D} V={V}{label}"
        found.append(
            Case(
                name, kernels.likelihood.forward_kernel, constants, dtype, tile.warps, tile.stages,
                tile.rows * tile.vocab, D % 16 == 0,
                described=described(kernels, D, dtype, tile.depth, sm) and "models" not in label,
            )
        )  # fmt: skip

    def add_gradient(label: str, D: int, dtype: str, owns_rows: bool, flags: bool) -> None:
        tile = kernels.tiles.gradient_tile(
            D, ITEMSIZE[dtype], sm, D % 16 == 0, flags, flags, owns_rows
        )
        constants = {
            "OWNS_ROWS": owns_rows, "BLOCK_OWN": tile.own, "BLOCK_WALK": tile.walk,
            "BLOCK_OUT": tile.out, "EVEN_OUT": D % tile.out == 0, "EVEN_WALK": not flags,
            "RESIDENT": tile.resident(D), "HAS_BIAS": flags, "HAS_SOFTCAP": flags,
            "HAS_AMPLITUDE": dtype == "fp16" and not owns_rows,
            "WANT_OUT": True, "WANT_BIAS": flags and not owns_rows,
            "STAGES": tile.stages, **products(D, dtype, tile.depth),
        }  # fmt: skip
        name = f"{'dhidden' if owns_rows else 'dweight'} {dtype} D={D}{label}"
        found.append(
            Case(
                name, kernels.likelihood_backward.gradient_kernel, constants, dtype, tile.warps,
                tile.stages, tile.own * tile.walk, D % 16 == 0,
            )
        )  # fmt: skip

    for dtype in ("bf16", "fp32"):
        # 0 is every other width: GPT-2 XL's; 48 is masked, 101 is not aligned, 4096 is summed in
        # pieces. float32 is tf32x3.
        widths = (*kernels.tiles.FORWARD_TILES[table], 48, 101, 4096)
        for D in widths if dtype != "fp32" else (16, 32, 64, 101, 128, 256, 512):
            D, V = (1600, 50257) if D == 0 else (D, 1009 if D == 101 else 2048)
            add_forward("", D, V, dtype, FLAGS)
            add_forward(" all flags", D, V, dtype, ALL_FLAGS)
            for owns_rows in () if kernels.tiles.chunked(D, ITEMSIZE[dtype]) else (True, False):
                add_gradient("", D, dtype, owns_rows, False)
                add_gradient(" all flags", D, dtype, owns_rows, True)
            if dtype == "bf16" and D <= 512:
                add_forward(" split", D, 50257, dtype, FLAGS)
    add_forward("", 64, 2048, "fp16", FLAGS)
    add_forward(" models", 1600, 50257, "bf16", FLAGS)
    add_forward(WIDE, 64, 2048, "bf16", FLAGS, kernels.tiles.HALVED_TILES[table][64])
    for owns_rows in (True, False):
        add_gradient("", 64, "fp16", owns_rows, False)
    for dtype, D, flags in (
        ("bf16", 64, FLAGS), ("bf16", 64, ALL_FLAGS), ("bf16", 1600, FLAGS), ("fp32", 64, FLAGS)
    ):  # fmt: skip
        tile = kernels.tiles.forward_tile(D, ITEMSIZE[dtype], sm, True, flags["GREEDY"])
        constants = {
            "BLOCK_N": kernels.combine.COMBINED_ROWS, **flags, **products(D, dtype, tile.depth)
        }  # fmt: skip
        name = f"combine {dtype} D={D}{' all flags' if flags['LSE'] else ''}"
        found.append(Case(name, kernels.combine.combine_kernel, constants, dtype, 4, 3, 0))
    constants = {"BLOCK": kernels.combine.SUM_BLOCK}
    found.append(Case("sum", kernels.combine.sum_kernel, constants, "bf16", 4, 3, 0))
    found += ahead_cases(kernels, sm) + chunk_cases(kernels, sm)
    found += token_cases(kernels.sequences) + attention_cases(kernels.attention)
    found += adamw_cases(kernels.adamw) + embedding_cases(kernels.embedding)
    return found + mlp_cases(kernels.block, sm)


def ahead_cases(kernels: Any, sm: int) -> list[Case]:
    """Returns bits and dhidden of one walk at each width that has a tile, and its last step."""
    ahead, found = kernels.likelihood_ahead, []
    for dtype, itemsize, widths in (
        ("bf16", 2, (16, 32, 48, 64, 128, 192, 256)), ("fp16", 2, (64, 128, 256)),
        ("fp32", 4, (16, 32, 64, 128)),
    ):  # fmt: skip
        for D in widths:
            kind = D, itemsize, sm
            wide = ("out_ptr",) if dtype == "fp16" else ()
            for label in ("", " all flags") if wide else ("", " repairs", " all flags"):
                repairs = label == " repairs"
                flags = label == " all flags", bool(wide) or repairs, repairs
                tile = kernels.tiles.ahead_tile(*kind, *flags[1:])
                if tile is None:
                    continue
                constants = ahead.constants(50257 if flags[0] else 2048, kind, tile, flags)
                case = Case(
                    f"ahead {dtype} D={D}{label}", ahead.ahead_kernel, constants, dtype,
                    tile.warps, tile.stages, tile.own * tile.walk, True, wide,
                )  # fmt: skip
                found.append(case)
    for dtype, want in (("bf16", (True, True)), ("bf16", (False, True)), ("fp16", (True, True))):
        half = dtype == "fp16"
        constants = kernels.rows.constants(64, want, half)
        name = f"rows {dtype} D=64{'' if want[0] else ' without dhidden'}"
        wide = ("made_ptr",) if half else ()
        case = Case(name, kernels.rows.rows_kernel, constants, dtype, 4, 3, 0, True, wide)
        found.append(case)
    constants = {"BLOCK_N": kernels.rows.SCALED_ROWS, "BLOCK_D": kernels.rows.SCALED_COLUMNS}
    found.append(Case("rows scaled bf16", kernels.rows.scale_kernel, constants, "bf16", 4, 3, 0))
    return found


def chunk_cases(kernels: Any, sm: int) -> list[Case]:
    """Returns the kernels of gradients in chunks, at GPT-2 XL's head and where D is not aligned."""
    chunks, reduced, found = kernels.chunks, kernels.reduced, []

    def add(
        name: str, kernel: Any, constants: dict[str, Any], tile: Any, dtype: str, D: int
    ) -> None:
        launched = {"STAGES": tile.stages, **constants}
        found.append(
            Case(
                name, kernel, launched, dtype, tile.warps, tile.stages,
                tile.rows * tile.vocab, D % 16 == 0,
                described=described(kernels, D, dtype, tile.depth, sm),
            )
        )  # fmt: skip

    for dtype, D, softcap in (
        ("bf16", 1600, False), ("bf16", 1600, True), ("bf16", 4096, False), ("fp16", 512, False),
        ("bf16", 301, False), ("fp32", 768, False), ("fp32", 768, True), ("fp32", 301, False),
    ):  # fmt: skip
        kind = D, ITEMSIZE[dtype], sm
        tile = kernels.tiles.streamed_tile(*kind, D % 16 == 0, softcap)
        shape = {**chunks.constants(tile, *kind), "HAS_BIAS": softcap}
        label = f"{dtype} D={D}{' all flags' if softcap else ''}"
        flags = {**shape, "HAS_SOFTCAP": softcap}
        add(f"chunk gradients {label}", chunks.gradient_kernel, flags, tile, dtype, D)
        if dtype == "fp16":
            continue
        tile = kernels.tiles.streamed_tile(*kind, D % 16 == 0)
        shape = {**chunks.constants(tile, *kind), "HAS_BIAS": softcap}
        add(f"chunk powers {label}", reduced.powers_kernel, shape, tile, dtype, D)
        small = tile._replace(warps=4, stages=3)
        of_targets = {
            "BLOCK_N": reduced.TARGET_ROWS, "BLOCK_D": tile.depth, "EVEN_D": D % tile.depth == 0,
            "SUM": shape["SUM"], "PRECISION": shape["PRECISION"], "HAS_BIAS": softcap,
        }  # fmt: skip
        add(f"chunk targets {label}", reduced.target_kernel, of_targets, small, dtype, D)
    rows = {"BLOCK_N": reduced.ENTRY_ROWS, "BLOCK_V": tile.vocab}
    add("chunk entries", reduced.entry_kernel, rows, small, "bf16", 1600)
    add("chunk totals", reduced.total_kernel, {"BLOCK_N": 128}, small, "bf16", 1600)
    return found


def token_cases(sequences: Any) -> list[Case]:
    """Returns each rule in the dtypes of files and embeddings: by range, by list, and ragged."""
    found = []
    for dtype in ("u16", "i64"):
        for rule in ("halves", "products", "weighted"):
            for label in ("", " list", " ragged"):
                halves, whole = rule == "halves", label != " ragged"
                constants = {
                    "HALVES": halves, "WHOLE": whole, "LIST": label == " list",
                    "WEIGHTED": rule == "weighted",
                    "BLOCKS": sequences.blocks_of_a_program(halves, whole),
                }  # fmt: skip
                name = f"tokens {rule} {dtype}{label}"
                found.append(Case(name, sequences.fill_kernel, constants, dtype, 4, 3, 0))
    return found


def attention_cases(attention: Any) -> list[Case]:
    """Returns narrow, wide and unevenly divided heads, within one panel and over several."""
    found = []
    for dtype, T, H, W in (
        ("bf16", 63, 16, 2), ("bf16", 63, 13, 1), ("bf16", 63, 4, 16), ("bf16", 63, 4, 64),
        ("bf16", 255, 16, 2), ("bf16", 255, 4, 16), ("fp32", 63, 16, 2), ("fp32", 63, 4, 16),
        ("fp32", 255, 16, 2),
    ):  # fmt: skip
        name = f"attention {dtype} T={T} H={H} W={W}"
        itemsize, precision = (4, "tf32x3") if dtype == "fp32" else (2, "ieee")
        constants = attention.constants(T, H, W, attention.fastest_tile(H, W, itemsize), precision)
        warps = constants.pop("num_warps")
        kernels = [(name, attention.forward_kernel, {})]
        kernels.append((f"d{name}", attention.backward_kernel, {"OWNS_QUERIES": False}))
        if T > attention.PANEL:
            queries = {"OWNS_QUERIES": True}
            kernels.append((f"d{name} queries", attention.backward_kernel, queries))
        for label, kernel, owns in kernels:
            found.append(Case(label, kernel, constants | owns, dtype, warps, 3, attention.PANEL**2))
    return found


def mlp_cases(block: Any, sm: int) -> list[Case]:
    """Returns LayerNorm alone, with q, k, v, and of an MLP, in the dtypes of training."""
    found = []
    inputs = ("x_ptr", "residual_ptr", "middle_ptr", "dx_ptr", "scale_ptr")
    inputs += ("proj_bias_ptr", "up_bias_ptr", "down_bias_ptr")
    matrices = dict.fromkeys(("proj_ptr", "up_ptr", "down_ptr"))
    for dtype, D in (
        *(("mixed", D) for D in (32, 64, 128, 256)), ("bf16", 32), ("bf16", 256),
        *(("fp32", D) for D in (32, 64, 256)),
    ):  # fmt: skip
        kind = "fp32" if dtype == "fp32" else "bf16"
        shapes = ("norm", 0), ("mlp", 4 * D), ("norm_qkv", 3 * D), ("proj", D)
        for name, U in shapes[: 1 if dtype == "fp32" and D > 64 else 4]:
            tiles = block.tiles_of(D, U, kind == "fp32", sm)
            down = name == "mlp"
            wide = inputs if dtype == "mixed" else ()
            wide += ("out_ptr",) if wide and down else ()
            wide += ("dout_ptr",) if wide and name in ("mlp", "proj") else ()
            wide += tuple(matrices) if wide and D < 64 else ()
            names = (name, f"d{name} rows", f"d{name} weights")
            kernels = (block.forward_kernel, block.rows_kernel, block.weights_kernel)
            for label, kernel, tile in list(zip(names, kernels, tiles, strict=True))[
                2 * (name == "proj") : 2 + (U > 0)
            ]:
                constants = block.constants(D, U, down, kind == "fp32", tile, sm)
                constants |= {"HAS_RESIDUAL": name != "norm"} | (matrices if U == 0 else {})
                warps = constants.pop("num_warps")
                constants.pop("num_stages")
                case = Case(
                    f"{label} {dtype} D={D}", kernel, constants, kind, warps, tile.stages,
                    tile.rows * tile.hidden, D % 16 == 0, wide,
                )  # fmt: skip
                found.append(case)
    constants = {"SIZE": block.SUM_PARTS, "BLOCK": block.SUM_SIZE // block.SUM_PARTS}
    return [*found, Case("sum of mlp", block.sum_kernel, constants, "bf16", 4, 3, 0)]


def adamw_cases(adamw: Any) -> list[Case]:
    """Returns both kernels, for all weights and for some, with and without stochastic rounding."""
    found = []
    for dtype, frozen, stochastic in (
        ("fp32", False, False), ("bf16", False, False), ("bf16", True, True)
    ):  # fmt: skip
        label = f"{dtype}{' stochastic' * stochastic}{' frozen' * frozen}"
        constants = {"HAS_FROZEN": frozen, "BLOCK": adamw.BLOCK}
        found.append(Case(f"adamw norm {label}", adamw.norm_kernel, constants, dtype, 4, 3, 0))
        constants = constants | {"STOCHASTIC": stochastic, "PIECES": adamw.MOST_PIECES}
        found.append(Case(f"adamw {label}", adamw.update_kernel, constants, dtype, 4, 3, 0))
    return found


def embedding_cases(embedding: Any) -> list[Case]:
    """Returns the kernels that count and place tokens, and gradients of narrow and wide models."""
    size = {"SIZE": embedding.SIZE}
    tile = {"PIECES": embedding.PIECES, "TOKENS": embedding.TOKENS}
    found = [
        Case("embedding count", embedding.count_kernel, size, "fp32", embedding.WARPS, 3, 0),
        Case("embedding sum", embedding.sum_kernel, tile, "fp32", 4, 3, 0),
        Case("embedding place", embedding.place_kernel, size, "fp32", 4, 3, 0),
    ]
    for dtype, D in (("fp32", 32), ("fp32", 256), ("bf16", 32)):
        block = embedding.columns_of_a_program(D)
        tile = {"ROWS": embedding.NUMBERS // block, "BLOCK_D": block}
        name = f"embedding {dtype} D={D}"
        found.append(Case(name, embedding.forward_kernel, tile, dtype, 4, 3, 0))
        name = f"embedding gather {dtype} D={D}"
        tied = tile | {"HAS_RESIDUAL": True}
        found.append(Case(name, embedding.gather_kernel, tied, dtype, 1, 3, 0))
    return found
