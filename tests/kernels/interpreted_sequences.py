"""kernels/sequences.py on the CPU, by Triton's interpreter, against the C++ core."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cases.triton_interpreted import DEVICE, planted, untouched
from fastmem.kernels import sequences
from torch import Tensor

from fastmem import _core

LAST = 2**64 - 1
DTYPES = (torch.uint16, torch.uint32, torch.int32, torch.int64)
NUMPY = {
    torch.uint16: np.uint16,
    torch.uint32: np.uint32,
    torch.int32: np.int32,
    torch.int64: np.int64,
}

# Each rule from words to tokens, at its limits.
VOCABS = [
    1,  # halves: eight tokens a block, whose mask is empty
    2048,
    65536,  # the greatest vocabulary for halves
    3,
    50257,
    65537,  # the least that uint16 cannot hold
    2**20,  # a power of two that takes whole words and rejects none
    3 * 2**29,  # a quarter of all words is rejected
    2**31,
]
CASES = [(kind, V) for kind in DTYPES for V in VOCABS if kind != torch.uint16 or V <= 65536]


def expected(
    indices: Any, S: int, seed: int, vocab: int, dtype: torch.dtype = torch.int64
) -> Tensor:
    """The C++ core's tokens."""
    out = np.zeros((len(indices), S), NUMPY[dtype])
    index = np.array(indices, np.uint64)
    _core.fill_indices(out, index, seed=seed, vocab=vocab, threads=1)
    return torch.from_numpy(out)


def filled(N: int, S: int, dtype: torch.dtype = torch.int64, **arguments: Any) -> Tensor:
    """Fills memory of bytes 0xAB, and checks a guard on either side."""
    memory = torch.full((N * S + 64,), 0xAB, dtype=torch.uint8).repeat_interleave(dtype.itemsize)
    memory = memory.view(dtype)
    out = memory[32 : 32 + N * S].view(N, S)
    sequences.fill(out, **arguments)
    memory = memory.cpu()
    ends = torch.cat([memory[:32], memory[-32:]]).contiguous().view(torch.uint8)
    assert (ends == 0xAB).all(), "written past the end"
    return memory[32 : 32 + N * S].view(N, S)


@pytest.mark.parametrize(("dtype", "vocab"), CASES)
def test_the_tokens_of_the_core(dtype: torch.dtype, vocab: int) -> None:
    """Fails if a token differs from the core's, in any dtype, by range or by indices."""
    N, S, seed, begin = 61, 37, 0x0123456789ABCDEF, 2**32 - 30  # the index's high word changes
    exact = expected(range(begin, begin + N), S, seed, vocab, dtype)
    ours = filled(N, S, dtype, seed=seed, vocab=vocab, begin=begin)
    assert torch.equal(ours, exact)
    order = torch.arange(N).flip(0) // 2 * 2  # repeats every second index
    ours = filled(N, S, dtype, seed=seed, vocab=vocab, indices=begin + order)
    assert torch.equal(ours.to(torch.int64), exact.to(torch.int64)[order.cpu()])


@pytest.mark.parametrize("vocab", [2048, 50257])
@pytest.mark.parametrize("S", [1, 3, 4, 5, 7, 8, 9, 16, 63, 64, 65])
def test_any_length(S: int, vocab: int) -> None:
    """Fails if the ragged end of a sequence, or of the last program, is cut wrong."""
    for N in (1, 1500 // S, 9000 // S):  # within one program, and over several
        ours = filled(N, S, seed=5, vocab=vocab, begin=7)
        assert torch.equal(ours, expected(range(7, 7 + N), S, 5, vocab))


@pytest.mark.parametrize("vocab", [2048, 50257])
@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1, 2**32, 2**63, LAST])
def test_seeds_and_indices_of_64_bits(seed: int, vocab: int) -> None:
    """Fails if a half of the seed or the index is lost, swapped or taken as signed."""
    edges = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**63 - 1, 2**63, LAST - 1, LAST]
    bits = torch.from_numpy(np.array(edges, np.uint64).view(np.int64)).to(DEVICE)
    ours = filled(10, 9, seed=seed, vocab=vocab, indices=bits)
    assert torch.equal(ours, expected(edges, 9, seed, vocab))
    for i, begin in enumerate(edges[:-1]):
        ours = filled(1, 9, seed=seed, vocab=vocab, begin=begin)
        assert torch.equal(ours[0], expected(edges, 9, seed, vocab)[i])
    ours = filled(2, 9, seed=seed, vocab=vocab, begin=LAST - 1)
    assert torch.equal(ours, expected(edges[-2:], 9, seed, vocab))


@pytest.mark.parametrize("vocab", [2048, 50257])
def test_any_strides(vocab: int) -> None:
    """Fails if a stride is assumed, or a neighbour is overwritten."""
    exact = expected([4, 9, 4], 11, 1, vocab)
    memory = torch.full((11, 2, 3, 2), -1)
    indices = torch.tensor([4, 0, 9, 0, 4])[::2]
    sequences.fill(memory[:, 1, :, 0].T, 1, vocab, indices=indices)
    assert torch.equal(memory[:, 1, :, 0].T.cpu(), exact)
    assert (memory[:, 0] == -1).all()
    assert (memory[:, 1, :, 1] == -1).all()


def test_rows_more_than_2_31_elements_apart() -> None:
    """Fails if an offset has 32 bits. The memory between the rows is never touched."""
    memory = untouched(2**32 + 64, torch.uint16)
    out = memory.as_strided((2, 16), (2**32 + 16, 1))
    sequences.fill(out, 3, 2048, 5)
    assert torch.equal(out.cpu(), expected([5, 6], 16, 3, 2048, torch.uint16))


@pytest.mark.parametrize("halves", [True, False])
def test_a_sequence_of_2_34_tokens(halves: bool) -> None:
    """Fails if a block's number loses bits in a sequence of over 2**31 blocks: its first part."""
    B = 512
    out = torch.zeros(1, 8 * 2 * B, dtype=torch.int64)
    vocab, tokens = (2048, 8) if halves else (50257, 4)
    sequences.fill_kernel[(2,)](
        out, None, None, 9, 4, vocab, 2**32 % vocab, 0, 2**34 // tokens, 2**34, 2 * B,
        0, 1, 0, HALVES=halves, WHOLE=False, BLOCKS=B,
    )  # fmt: skip
    out = out[:, : tokens * 2 * B].cpu()
    assert torch.equal(out, expected([4], tokens * 2 * B, 9, vocab))


def words(index: int, S: int, seed: int) -> list[int]:
    """Returns S words, four a block, from the core's Philox."""
    key = (seed % 2**32, seed >> 32)
    blocks = [
        _core.philox4x32((block, 0, index % 2**32, index >> 32), key) for block in range(-(-S // 4))
    ]
    return [word for block in blocks for word in block][:S]


def tables(drawn: list[int]) -> dict[str, list[int]]:
    """Returns cumulative weights, some with edges on the drawn words."""
    ordered = sorted(drawn)
    return {
        "one token": [0],
        "two": [0, 2**31],
        "edges on words": [0, *ordered[::3]],
        "edges just above words": [0, *(w + 1 for w in ordered[::3])],
        "tokens that never come": [0, 0, 0, 2**30, 2**30, 2**32 - 1, 2**32 - 1],
        "the last alone": [0, 0, 0, 0, 0],
        "many": (np.arange(1000, dtype=np.uint64) ** 2 * 4294).tolist(),
        "as many as a power of two": (np.arange(1024, dtype=np.uint64) * 2**22).tolist(),
    }


@pytest.mark.parametrize("name", tables([0]))
def test_weighted_tokens(name: str) -> None:
    """Fails if a word on the edge between two tokens gives the lower token, or the search is one
    step short, in 64 bits of seed and index."""
    index, S, seed = 2**63 + 5, 150, LAST - 7
    drawn = words(index, S, seed)
    table = np.array(tables(drawn)[name], np.uint32)
    # The rule: the number of C_1 ... C_{V-1} that are at most the word.
    exact = [int((table[1:] <= word).sum()) for word in drawn]
    V, weights = len(table), torch.from_numpy(table).to(DEVICE)
    ours = filled(1, S, seed=seed, vocab=V, begin=index, cumulative=weights)
    assert ours[0].tolist() == exact
    twice = torch.tensor([index - 2**64, index - 2**64])
    ours = filled(2, S, torch.uint16, seed=seed, vocab=V, indices=twice, cumulative=weights)
    assert ours.to(torch.int64).tolist() == [exact, exact]


def test_nothing_to_do() -> None:
    """Fails if an empty grid is launched."""
    sequences.fill(torch.zeros(0, 8, dtype=torch.int64), 0, 2048, LAST)
    none = torch.zeros(0, dtype=torch.int64)
    sequences.fill(torch.zeros(0, 8, dtype=torch.int64), 0, 2048, indices=none)


def passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except AssertionError:
        return False
    return True


PLANTED = {
    "a word out of place": ("tl.join(tl.join(w0, w2)", "tl.join(tl.join(w0, w1)"),
    "the high half first": (
        "tl.join(words & mask, (words >> 16) & mask)",
        "tl.join((words >> 16) & mask, words & mask)",
    ),
    "an attempt left out": ("attempt += 1", "attempt += 2"),
    "nothing rejected": ("2**32 % vocab", "0"),
    "the index's high half lost": ("(index >> 32)", "(index >> 33)"),
    "the next sequence at its second block": ("block = place - over", "block = place + 0 * over"),
    "an edge to the lower token": ("edge <= words", "edge < words"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_errors_are_caught(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if the checks pass a kernel with an error."""
    checks = [
        lambda: test_the_tokens_of_the_core(torch.int64, 2048),
        lambda: test_the_tokens_of_the_core(torch.int64, 3 * 2**29),
        lambda: test_seeds_and_indices_of_64_bits(1, 2048),
        lambda: test_weighted_tokens("edges on words"),
    ]
    assert all(map(passes, checks))
    monkeypatch.setattr(
        sequences, "fill", planted("sequences.py", *PLANTED[name], tmp_path).sequences.fill
    )
    assert not all(map(passes, checks))
