"""Random tokens on a CPU against NumPy and PyTorch, in one process.

    python -m pytest bench/sequences_cpu.py --benchmark-only --benchmark-json=sequences.json

Each round times every peer once and then fastmem, so that a busy machine slows all alike. First,
all tokens must be in [0, V), and fastmem's equal to the portable loops'. The table at the end has
medians in billions of tokens a second and the ratio of fastmem to the fastest peer; extra_info of
the JSON has the same and two floors: a memset of the same bytes, and the multiplications of Philox,
20 for each block of 8 tokens (V a power of two) or 24 for 4, at one 512-bit instruction (8 blocks)
a cycle, and CYCLES cycles a second.

Peers make as many tokens of the same dtype in one flat array: NumPy's bounded integers from its
three fast generators; torch.randint; and, if V is a power of two, masked words of the fastest
generator. No peer can make tokens by index.

N sequences, S tokens a sequence, V vocabulary.
"""

import ctypes
import functools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fastmem import _core

TOKENS = 1 << 22
SECONDS = 1.0
"""For all rounds of a case, all peers together."""
CYCLES = 3.5e9
GENERATORS = (np.random.Philox, np.random.PCG64, np.random.SFC64)

Array = NDArray[Any]
table: list[str] = []


def peers(vocab: int, dtype: Any) -> dict[str, Callable[[], Any]]:
    made: dict[str, Callable[[], Any]] = {}
    for bits in GENERATORS:
        draw = np.random.Generator(bits(0))
        integers = functools.partial(draw.integers, 0, vocab, TOKENS, dtype)
        made[f"numpy {bits.__name__}"] = integers
    kind = getattr(torch, np.dtype(dtype).name)
    out = torch.empty(TOKENS, dtype=kind)
    made["torch.randint"] = lambda: torch.randint(vocab, (TOKENS,), out=out)
    return made


def masked(vocab: int, dtype: Any) -> Callable[[], Array]:
    """Masked random words, for V a power of two and a dtype of 16 bits."""
    draw = np.random.Generator(np.random.SFC64(0))

    def words() -> Array:
        raw: Array = draw.integers(0, 2**64, TOKENS // 4, np.uint64, endpoint=False)
        tokens: Array = raw.view(dtype)
        tokens &= dtype(vocab - 1)
        return tokens

    return words


def ours(
    out: Array, vocab: int, shuffled: bool, threads: int = 1, cumulative: Array | None = None
) -> Callable[[str], None]:
    n = len(out)
    order = np.empty(n, np.uint64)
    _core.permutation(order, seed=0, epoch=0, last=n - 1, begin=0, threads=1)

    def fill(isa: str = "best") -> None:
        options: dict[str, Any] = {"seed": 0, "vocab": vocab, "threads": threads, "isa": isa}
        if shuffled:
            _core.fill_indices(out, order, cumulative=cumulative, **options)
        else:
            _core.fill_range(out, begin=0, cumulative=cumulative, **options)

    return fill


@pytest.fixture(scope="module", autouse=True)
def print_table() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    print(f"\nNumPy {np.__version__}, torch {torch.__version__}, {TOKENS} tokens, one thread")
    print("billions of tokens a second, medians; floors: memset, multiplications")
    print("\n".join(table))


def measure(
    benchmark: Any,
    title: str,
    run: Callable[[], Any],
    others: dict[str, Callable[[], Any]],
    tokens: int = TOKENS,
) -> tuple[float, dict[str, float]]:
    """Returns billions of tokens a second: of `run`, and of each peer."""
    times: dict[str, list[float]] = {name: [] for name in others}

    def time_others() -> None:
        for name, other in others.items():
            times[name].append(seconds(other))

    time_others()
    start = time.perf_counter()
    time_others()
    rounds = max(5, min(50, int(SECONDS / (time.perf_counter() - start))))
    times = {name: [] for name in others}
    run()
    benchmark.pedantic(run, setup=time_others, rounds=rounds)
    speeds = {name: tokens / statistics.median(t) / 1e9 for name, t in times.items()}
    mine = tokens / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update(title=title, ours=mine, others=speeds)
    return mine, speeds


# Both rules, with uint16 for storage and int64 for an embedding.
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(2048, np.uint16), (2048, np.int64), (50257, np.uint16), (50257, np.int64)],
)
def test_against_peers(benchmark: Any, vocab: int, dtype: Any) -> None:
    out = np.empty((TOKENS // 64, 64), dtype)
    fill = ours(out, vocab, shuffled=False)
    fill("portable")
    right = out.copy()
    fill("best")
    np.testing.assert_array_equal(out, right)
    others = peers(vocab, dtype)
    bounded = list(others)
    if dtype is np.uint16 and vocab & (vocab - 1) == 0:
        others["masked words"] = masked(vocab, dtype)
    for other in others.values():
        tokens = np.asarray(other())
        assert tokens.dtype == dtype
        assert tokens.size == TOKENS
        assert int(tokens.max()) < vocab
    others["memset"] = functools.partial(ctypes.memset, out.ctypes.data, 1, out.nbytes)

    mine, speeds = measure(benchmark, f"V {vocab} {np.dtype(dtype).name}", fill, others)
    memset = speeds.pop("memset")
    multiplications = CYCLES / ((20 / 64) if vocab & (vocab - 1) == 0 else (24 / 32)) / 1e9
    best = max(speeds[name] for name in bounded)
    benchmark.extra_info.update(memset=memset, multiplications=multiplications, ratio=mine / best)
    table.append(
        f"V {vocab:5} {np.dtype(dtype).name:6} range   ours {mine:5.2f}  {mine / best:5.2f}x  "
        f"floors {memset:5.1f}, {multiplications:4.1f}  "
        + ", ".join(f"{name} {speed:.2f}" for name, speed in speeds.items())
    )


@pytest.mark.parametrize("vocab", [2048, 50257])
@pytest.mark.parametrize("length", [16, 64, 65])
def test_shuffled_against_range(benchmark: Any, vocab: int, length: int) -> None:
    out = np.empty((TOKENS // length, length), np.uint16)
    straight = ours(out, vocab, shuffled=False)
    mine, speeds = measure(
        benchmark, f"V {vocab} S {length} shuffled", ours(out, vocab, True), {"range": straight}
    )
    table.append(
        f"V {vocab:5} uint16 S {length:2} shuffled indices {mine:5.2f}, "
        f"{mine / speeds['range']:4.2f} of the range's {speeds['range']:4.2f}"
    )


@pytest.mark.parametrize("vocab", [2048, 50257])
def test_two_threads_against_one(benchmark: Any, vocab: int) -> None:
    tokens = 16 * TOKENS  # enough to hide the start of a thread
    out = np.empty((tokens // 64, 64), np.uint16)
    mine, speeds = measure(
        benchmark,
        f"V {vocab} two threads",
        ours(out, vocab, False, 2),
        {"one": ours(out, vocab, False)},
        tokens,
    )
    table.append(f"V {vocab:5} uint16 two threads {mine:5.2f}, {mine / speeds['one']:4.2f}x one")


@pytest.mark.parametrize("isa", ["avx512", "avx2", "portable"])
def test_instruction_sets(benchmark: Any, isa: str) -> None:
    if not _core.has_isa(isa):
        pytest.skip(f"this machine has no {isa}")
    out = np.empty((TOKENS // 64, 64), np.uint16)
    run = functools.partial(ours(out, 2048, False), isa)
    other = functools.partial(ours(out, 50257, False), isa)
    mine, speeds = measure(benchmark, isa, run, {"V 50257": other})
    table.append(f"{isa:8} uint16 V 2048 {mine:5.2f}, V 50257 {speeds['V 50257']:5.2f}")


def test_weights(benchmark: Any) -> None:
    """Zipf weights of exponent 1, against NumPy's searchsorted and choice."""
    vocab = 50257
    weights = 1 / np.arange(1, vocab + 1)
    sums = np.concatenate([[0], np.cumsum(weights)[:-1]]) / weights.sum()
    cumulative = np.floor(sums * 2**32).astype(np.uint32)
    out = np.empty((TOKENS // 64, 64), np.uint16)
    draw = np.random.Generator(np.random.SFC64(0))
    few = TOKENS // 8  # the peers would take a second for all

    def search() -> Array:
        words = draw.integers(0, 2**32, few, np.uint32)
        return np.searchsorted(cumulative, words, "right").astype(np.uint16) - np.uint16(1)

    def choice() -> Array:
        return draw.choice(vocab, few, p=weights / weights.sum())

    mine, speeds = measure(
        benchmark,
        "Zipf",
        ours(out, vocab, False, 1, cumulative),
        {"searchsorted": search, "choice": choice},
    )
    speeds = {name: speed * few / TOKENS for name, speed in speeds.items()}
    table.append(
        f"V {vocab:5} uint16 Zipf weights ours {mine:5.2f}  {mine / max(speeds.values()):5.2f}x  "
        + ", ".join(f"{name} {speed:.3f}" for name, speed in speeds.items())
    )


def seconds(f: Callable[[], Any]) -> float:
    start = time.perf_counter()
    f()
    return time.perf_counter() - start
