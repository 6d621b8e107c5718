"""Windows all along a document: places, the longest run, and a model that knows half of a text."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from cases.score_cases import byte_tokenizer, small_llama
from numpy.typing import NDArray

import fastmem
from fastmem.base.stats import Interval, clopper_pearson
from fastmem.models.extraction.folder import ExtractionFolder
from fastmem.models.extraction.rates import rate_of
from fastmem.models.extraction.run import extract
from fastmem.models.extraction.slide import heat, least_bits, verbatim_run
from fastmem.report.extraction_page import write_extraction_page

P, SUFFIX = 6, 6
KNOWN, SIZE = 60, 120


@cache
def text() -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(0, 16, SIZE)


@cache
def half_known() -> fastmem.GPT:
    """A model that was trained on all windows of the first half of the text."""
    model = fastmem.GPT(fastmem.GPTConfig(1, 32, 4, vocab=16, length=P + SUFFIX))
    windows = np.lib.stride_tricks.sliding_window_view(text()[:KNOWN], P + SUFFIX)
    data = fastmem.from_array(np.ascontiguousarray(windows), vocab=16)
    fastmem.train(model, data, fastmem.TrainConfig(steps=500))
    return model


def test_a_run_ends_where_knowledge_ends(tmp_path: Path) -> None:
    """Fails if a window is at the wrong place, a run does not go on from window to window, or what
    was never seen comes out."""
    found = extract(
        half_known(), [text()], [text()[KNOWN:]], out=tmp_path, prefixes=(3, P), suffix=SUFFIX,
        slide=True, stride=3,
    )  # fmt: skip
    table = ExtractionFolder(tmp_path).read()
    rows = table["set"] == "train"
    assert table["start"][rows].tolist() == list(range(0, SIZE - P - SUFFIX + 1, 3))
    known = table["start"] + P + SUFFIX <= KNOWN
    assert (table[f"matched_{P}"][rows & known] == SUFFIX).mean() > 0.9
    assert (table["greedy_from"][rows & ~known] > P).all()
    train, test = (
        next(r for r in found["slide"]["longest_runs"] if r["set"] == name)
        for name in ("train", "test")
    )
    assert (train["start"], train["source"]) == (P, "0")
    # Text beyond the known half may be guessed for a token or two.
    assert KNOWN - P <= train["tokens"] <= KNOWN - P + 3
    assert test["tokens"] <= 3
    assert found["prefixes"][1]["train"]["exact"]["low"] is None  # windows of one document
    start = int(table["start"][4])
    x = torch.from_numpy(text()[start : start + P + SUFFIX])[None]
    bits = half_known().token_bits(x)[0].detach()
    assert table[f"bits_{P}"][4] == pytest.approx(float(bits[P - 1 :].sum()), abs=1e-3)
    assert table["bits_3"][4] == pytest.approx(float(bits[2:].sum()), abs=1e-3)


def brute_run(starts: list[int], prefix: int, matched: list[int]) -> int:
    """Decodes on and on: a window may go on if its prefix is known text."""
    best = 0
    for first in range(len(starts)):
        if not matched[first]:
            continue
        begin = starts[first] + prefix
        end = begin + matched[first]
        for later in range(first + 1, len(starts)):
            if starts[later] + prefix <= end and matched[later]:
                end = max(end, starts[later] + prefix + matched[later])
        best = max(best, end - begin)
    return best


def test_runs_and_places_by_brute_force() -> None:
    """Fails if a run joins suffixes with a gap or leaves out one that touches, or a place has bits
    of a suffix that does not hold it."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        stride, prefix, suffix = rng.integers(1, 6, 3).tolist()
        starts = np.arange(8) * stride
        matched = rng.integers(0, suffix + 1, 8) * (rng.random(8) < 0.7)
        begin, tokens = verbatim_run(starts, prefix, matched)
        assert tokens == brute_run(starts.tolist(), prefix, matched.tolist())
        assert not tokens or begin - prefix in starts
        bits = rng.random(8)
        windows = list(zip(starts, bits, strict=True))
        size = int(starts[-1]) + prefix + suffix + 2
        expected = [
            min((b for s, b in windows if 0 <= t - s - prefix < suffix), default=np.inf)
            for t in range(size)
        ]
        assert least_bits(starts, prefix, suffix, bits, size).tolist() == expected


def test_a_heat_map_keeps_the_hottest_place() -> None:
    """Fails if a long document has more places than are drawn, or a place loses its least bits."""
    bits = np.full(100_003, np.inf)
    bits[[7, 100_002]] = 1.2345, 3.0
    found = heat(bits)
    assert len(found["bits"]) <= 400
    assert found["bits"][7 // found["tokens_each"]] == 1.234
    assert found["bits"][-1] == 3.0
    assert sum(value is not None for value in found["bits"]) == 2


def test_page_and_short_documents(tmp_path: Path) -> None:
    """Fails if a document without a window breaks the run or the page, text is not escaped, or
    --no-text shows a token."""
    llama = small_llama()
    texts = ["<b>bold</b> & more text here", "abc", ""]
    found = extract(
        llama, texts, out=tmp_path, tokenizer=byte_tokenizer(), prefixes=(4,), suffix=5, slide=True
    )
    assert found["prefixes"][0]["train"]["sequences"] == 2
    page = write_extraction_page(tmp_path).read_text()
    assert "<b>" not in page
    assert 'class="chance"' in page
    assert "Along the text" in page
    hidden = write_extraction_page(tmp_path, text=False).read_text()
    assert 'class="chance"' not in hidden
    passages = json.loads((tmp_path / "passages.json").read_bytes())
    assert "".join(passages["slide"][0]["texts"]) == texts[0]
    for data, test in ((["abc"], None), (texts, ["abc"])):
        with pytest.raises(ValueError, match="no document of memory has 9 tokens"):
            extract(
                llama, data, test, out=tmp_path / "none", tokenizer=byte_tokenizer(), prefixes=(4,),
                suffix=5, slide=True,
            )  # fmt: skip


def test_windows_that_agree() -> None:
    """Fails if no hit in any window of 30 documents is taken for a rate of 0 without error."""
    documents = np.repeat(np.arange(30), 7)
    for hit in (False, True):
        assert rate_of(np.full(210, hit), documents) == clopper_pearson(30 * hit, 30)
    assert rate_of(np.full(210, False), documents % 19) == Interval(0.0)
    one = rate_of(np.arange(210) == 0, documents)
    assert one.low == 0 < (one.high or 0) < 0.03  # a bootstrap, as the windows differ
