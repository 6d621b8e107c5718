"""Compiles every kernel of the tile tables for GPUs, without one, and reads the machine code.

    python bench/aot.py [--ci] [--json] [--only WORD] [--sass FOLDER]

For sm_80, sm_90 and sm_100 prints registers, spilled bytes, shared memory and the GPU's limit, the
number of matrix instructions, and the instructions per logit of the innermost walk other than
matrix products. Fails if a limit is broken: no spills (but MOST_SPILLED), shared memory that fits,
matrix instructions wherever inputs have 16 bits, at most MOST_SLOTS at D = 64, V = 2048 on sm_90.

Needs only triton: its wheel has the compiler, ptxas and the disassembler. --ci compiles a few
kernels of each kind for each GPU, in about a minute.
"""

import argparse
import collections
import concurrent.futures
import functools
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import types
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from aot_cases import WIDE, Case, cases
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ROOT = Path(__file__).resolve().parent.parent
SHARED_LIMIT = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of one program: sm_80 has 163 KiB, but sm_86 and sm_89 run the same kernels."""
MATRIX = {80: "HMMA", 90: "HGMMA", 100: "UTCHMMA", 120: "HMMA"}
MOST_SLOTS = {
    "forward bf16 D=64 V=2048": 5.3, "forward bf16 D=64 V=2048" + WIDE: 5.0, "ahead bf16 D=64": 7.6,
}  # fmt: skip
"""Issue slots a logit on sm_90, of the tile in the package, which takes less time on an H100, of
the wide one, and with dhidden. An online softmax that selects the target in the loop takes 8."""
MOST_SPILLED = {"dattention bf16": 72, "dattention fp32": 512}
"""Bytes: gradients of narrow heads have the settings measured fastest on an H100 (docs/lab.md), in
which ptxas keeps values outside of the loop over heads in memory. 0 for all other kernels."""
NO_PRODUCTS = (
    "sum", "rows", "tokens", "chunk entries", "chunk totals", "adamw", "embedding", "norm ",
    "dnorm rows",
)  # fmt: skip
IN_CI = {
    "forward bf16 D=64 V=2048", "forward bf16 D=64 V=2048 all flags",
    "forward bf16 D=64 V=2048 wide", "forward bf16 D=1600 V=50257",
    "forward fp32 D=512 V=2048", "combine bf16 D=64", "dhidden bf16 D=64", "dhidden bf16 D=48",
    "ahead bf16 D=64", "ahead bf16 D=64 repairs", "ahead fp16 D=64", "rows bf16 D=64",
    "rows scaled bf16", "chunk powers fp32 D=768", "chunk gradients fp32 D=768",
    "forward fp32 D=64 V=2048", "forward bf16 D=4096 V=2048",
    "dhidden fp32 D=64", "dweight bf16 D=64 all flags", "dweight fp16 D=64", "sum",
    "tokens halves u16", "tokens products i64 list", "tokens weighted u16 ragged",
    "chunk gradients bf16 D=1600", "chunk powers bf16 D=1600", "chunk targets bf16 D=1600",
    "chunk entries", "chunk totals",
    "attention bf16 T=63 H=16 W=2", "dattention bf16 T=63 H=16 W=2",
    "dattention fp32 T=255 H=16 W=2 queries", "mlp mixed D=32", "mlp mixed D=256",
    "dmlp rows mixed D=32", "dmlp rows mixed D=256", "dmlp weights mixed D=32",
    "norm_qkv bf16 D=32", "dnorm_qkv rows fp32 D=64", "sum of mlp",
    "norm mixed D=32", "dnorm rows mixed D=32", "dproj weights mixed D=32",
    "adamw fp32", "adamw bf16 stochastic frozen",
    "embedding count", "embedding sum", "embedding place", "embedding fp32 D=32",
    "embedding gather fp32 D=32",
}  # fmt: skip
"""Every kernel, every kind of input, and the kernel with the limit MOST_SLOTS."""


class Names(types.ModuleType):
    """A module with every name, for annotations that are never evaluated."""

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


@functools.cache
def load_kernels() -> types.SimpleNamespace:
    """Imports fastmem.kernels from this checkout; launchers need torch, compiling does not."""
    if importlib.util.find_spec("torch") is None:
        sys.modules["torch"] = Names("torch")
    for name, path in (("fastmem", "fastmem"), ("fastmem.kernels", "kernels")):
        package = types.ModuleType(name)
        package.__path__ = [str(ROOT / path)]
        sys.modules[name] = package
    names = (
        "tiles", "launch", "likelihood", "combine", "likelihood_backward", "likelihood_ahead",
        "rows", "sequences", "attention", "chunks", "reduced", "mlp", "block", "adamw", "embedding",
    )  # fmt: skip
    return types.SimpleNamespace(
        **{name: importlib.import_module(f"fastmem.kernels.{name}") for name in names}
    )


@dataclass
class Reading:
    """Properties of a compiled kernel."""

    kernel: str
    sm: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    shared_limit: int
    matrix_instructions: int
    slots_per_logit: float | None


SCALARS = {"scale": "fp32", "softcap": "fp32"}
FLOAT_POINTERS = {
    "shift_ptr", "walk_ptr", "bits_ptr", "state_ptr", "lse_ptr", "entropy_ptr", "variance_ptr",
    "grad_ptr", "amplitude_ptr", "parts_ptr", "peak_ptr", "total_ptr", "factor_ptr", "logit_ptr",
    "sums_ptr", "bases_ptr", "rows_ptr", "base_ptr", "upstream_ptr",
    "rates_ptr", "steps_ptr", "corrections_ptr",
}  # fmt: skip
KINDS = {
    **dict.fromkeys(("targets_ptr", "indices_ptr", "seeds_ptr", "tokens_ptr"), "i64"),
    **dict.fromkeys(
        ("column_ptr", "counts_ptr", "ranks_ptr", "ends_ptr", "totals_ptr", "list_ptr"), "i32"
    ),
    "settings_ptr": "fp64", "trained_ptr": "i1", "greedy_ptr": "i1", "cumulative_ptr": "u32",
}  # fmt: skip
NEEDED_BY = {
    "bias_ptr": "HAS_BIAS", "shift_ptr": "HAS_BIAS", "lse_ptr": "LSE", "greedy_ptr": "GREEDY",
    "amplitude_ptr": "HAS_AMPLITUDE", "bias_out_ptr": "WANT_BIAS", "indices_ptr": "LIST",
    "cumulative_ptr": "WEIGHTED", "down_ptr": "HAS_DOWN", "down_bias_ptr": "HAS_DOWN",
    "mixed_ptr": "HAS_DOWN", "proj_ptr": "HAS_DOWN", "proj_bias_ptr": "HAS_DOWN",
    "middle_ptr": "HAS_DOWN", "dmixed_ptr": "HAS_DOWN", "residual_ptr": "HAS_RESIDUAL",
    "trained_ptr": "HAS_FROZEN", "seeds_ptr": "STOCHASTIC",
}  # fmt: skip
LAST_STRIDES = {"stride_hd", "stride_wd", "stride_od", "stride_d"}
ALIGNED = {"D", "part", "N", "P", "size"}


def source(case: Case) -> ASTSource:
    """Returns the source that a launch compiles: contiguous rows, 16-byte aligned if D allows."""
    constants = dict(case.constants)
    flags = case.constants
    if flags.get("MOMENTS", 2) == 0:
        constants["entropy_ptr"] = None
    if flags.get("MOMENTS", 2) < 2:
        constants["variance_ptr"] = None
    if flags.get("SPLIT") is False:
        constants["walk_ptr"] = None
    if not case.described:
        constants |= {"hidden_tiles": None, "weight_tiles": None}
    for name, flag in NEEDED_BY.items():
        if flags.get(flag) is False:
            constants[name] = None
    gradient, tokens = "OWNS_ROWS" in flags, "HALVES" in flags
    signature, attributes = {}, {}
    for i, name in enumerate(case.kernel.arg_names):
        if name in LAST_STRIDES:
            constants[name] = 1
        if name in constants and name in case.kernel.arg_names:
            signature[name] = "constexpr"
            continue
        if name.endswith("_tiles"):
            rows = flags["BLOCK_N" if name == "hidden_tiles" else "BLOCK_V"]
            signature[name] = f"tensordesc<{case.dtype}[{rows}, {flags['BLOCK_D']}]>"
        elif name.endswith("_ptr"):
            if name in KINDS:
                kind = KINDS[name]
            elif name in ("means_ptr", "squares_ptr") and flags["STOCHASTIC"]:
                kind = "fp32"
            elif name == "walk_ptr" and gradient:
                kind = case.dtype  # the walked matrix
            elif name in FLOAT_POINTERS or name in case.wide:
                kind = "fp32"
            else:
                kind = case.dtype
            signature[name] = f"*{kind}"
            attributes[(i,)] = [["tt.divisibility", 16]]
        elif tokens:
            signature[name] = "i32" if name == "blocks" else "i64"
        else:
            signature[name] = SCALARS.get(name, "i32")
            if case.aligned and (name.startswith("stride") or name in ALIGNED):
                attributes[(i,)] = [["tt.divisibility", 16]]
    used = {k: v for k, v in constants.items() if k in case.kernel.arg_names}
    return ASTSource(case.kernel, signature, used, attributes)


def tool(path: str, *arguments: str) -> str:
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)")
LABEL = re.compile(r"\s*(\.L_x_\d+):")
TARGET = re.compile(r"(\.L_x_\d+)")


def loops(sass: str) -> list[collections.Counter[str]]:
    """Counts the instructions of each loop by name."""
    labels: dict[str, int] = {}
    instructions: list[tuple[str, str]] = []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := INSTRUCTION.search(line):
            instructions.append((instruction[1], instruction[2]))
    found = []
    for i, (name, rest) in enumerate(instructions):
        target = TARGET.search(rest) if name == "BRA" else None
        if target and labels.get(target[1], i) < i:
            found.append(collections.Counter(n for n, _ in instructions[labels[target[1]] : i + 1]))
    return found


def slots(sass: str, case: Case, matrix: str) -> float | None:
    """Returns instructions per logit except matrix products, in the loop that sums logits."""
    walks = [loop for loop in loops(sass) if loop[matrix] and loop["MUFU"]]
    if not walks or not case.logits:
        return None
    walk = min(walks, key=lambda loop: loop.total())
    return (walk.total() - walk[matrix]) / (case.logits / (32 * case.warps))


def read(case: Case, sm: int, keep: Path | None) -> Reading:
    compiled = triton.compile(
        source(case),
        target=GPUTarget("cuda", sm, 32),
        options={"num_warps": case.warps, "num_stages": case.stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = tool(knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        sass = tool(knobs.nvidia.nvdisasm.path, "-c", file.name)
    if keep:
        (keep / f"{case.name} sm_{sm}.sass".replace(" ", "_")).write_text(sass)
    registers = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert registers, usage
    # A warp group has four warps, and 64 rows.
    few = " rows " in case.name and case.constants["BLOCK_N"] < 64
    matrix = "HMMA" if few or case.warps < 4 else MATRIX[sm]
    return Reading(
        kernel=case.name,
        sm=sm,
        registers=int(registers[1]),
        spilled_bytes=int(registers[2]) + int(registers[3]),
        shared_bytes=compiled.metadata.shared,
        shared_limit=SHARED_LIMIT[sm],
        matrix_instructions=len(re.findall(rf"\b{matrix}\b", sass)),
        slots_per_logit=slots(sass, case, matrix),
    )


def broken(reading: Reading) -> list[str]:
    """Returns the limits that a kernel breaks, in words."""
    faults = []
    kind = " ".join(reading.kernel.split()[:2])
    if reading.spilled_bytes > MOST_SPILLED.get(kind, 0):
        faults.append(f"spills {reading.spilled_bytes} bytes")
    if reading.shared_bytes > reading.shared_limit:
        faults.append(f"shared memory {reading.shared_bytes} > {reading.shared_limit}")
    is_half = "fp32" not in reading.kernel and not reading.kernel.startswith(NO_PRODUCTS)
    if is_half and not reading.matrix_instructions:
        faults.append(f"no {MATRIX[reading.sm]}")
    most = MOST_SLOTS.get(reading.kernel) if reading.sm == 90 else None
    if most and (reading.slots_per_logit is None or reading.slots_per_logit > most):
        faults.append(f"{reading.slots_per_logit} slots a logit > {most}")
    return faults


def write(readings: list[Reading], wanted: list[tuple[str, int]]) -> None:
    """Writes the JSON file of this Triton version; kernels not compiled now keep their rows."""
    path = ROOT / "bench" / "results" / f"aot-{triton.__version__}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    old = json.loads(path.read_text())["kernels"] if path.exists() else []
    rows = {(row["kernel"], row["sm"]): row for row in [*old, *map(asdict, readings)]}
    kernels = [rows[key] for key in wanted if key in rows]
    path.write_text(json.dumps({"triton": triton.__version__, "kernels": kernels}, indent=1) + "\n")


@functools.cache
def all_cases(sm: int) -> dict[str, Case]:
    return {case.name: case for case in cases(load_kernels(), sm)}


def read_named(task: tuple[int, str, Path | None]) -> Reading:
    """Reads a case by name in a process of a pool: kernels cannot be pickled."""
    sm, name, keep = task
    return read(all_cases(sm)[name], sm, keep)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sm", type=int, nargs="+", default=[80, 90, 100])
    parser.add_argument("--only", default="", help="kernels whose names contain this word")
    parser.add_argument("--ci", action="store_true", help="only the kernels of IN_CI")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="parallel compilations")
    parser.add_argument(
        "--json", action="store_true", help="write or update bench/results/aot-<triton>.json"
    )
    parser.add_argument("--sass", type=Path, help="folder for the disassembly")
    arguments = parser.parse_args()
    if arguments.sass:
        arguments.sass.mkdir(parents=True, exist_ok=True)
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<40} {'sm':>4} {'regs':>4} {'spill':>5} {'shared / limit':>15} {'mma':>5} slots"
    )
    tasks = [
        (sm, name, arguments.sass)
        for sm in arguments.sm
        for name in all_cases(sm)
        if arguments.only in name and (name in IN_CI or not arguments.ci)
    ]
    readings, faults = [], 0
    with concurrent.futures.ProcessPoolExecutor(arguments.jobs) as pool:
        for reading in pool.map(read_named, tasks):
            readings.append(reading)
            wrong = broken(reading)
            faults += len(wrong)
            cost = "" if reading.slots_per_logit is None else f"{reading.slots_per_logit:.2f}"
            print(
                f"{reading.kernel:<40} {reading.sm:>4} {reading.registers:>4} "
                f"{reading.spilled_bytes:>5} {reading.shared_bytes:>6} / {reading.shared_limit} "
                f"{reading.matrix_instructions:>5} {cost:>5}  {'; '.join(wrong)}".rstrip(),
                flush=True,
            )
    missing = len(IN_CI) * len(arguments.sm) - len(tasks) if arguments.ci else 0
    if missing:
        print(f"the tables lack {missing} kernels of IN_CI: rename them there")
    if arguments.json:
        write(readings, [(name, sm) for sm in SHARED_LIMIT for name in all_cases(sm)])
    print(f"{len(readings)} kernels, {faults} limits broken")
    return 1 if faults or missing or not readings else 0


if __name__ == "__main__":
    sys.exit(main())
