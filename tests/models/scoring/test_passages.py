"""The most and least surprising passages, against a search of all passages."""

from typing import Any

import numpy as np
import pytest

from fastmem.models.scoring.passages import BIN_BITS, KEPT, LENGTH, Passages, pieces

rng = np.random.default_rng(1)


def tokens_of(lengths: list[int]) -> tuple[np.ndarray[Any, Any], ...]:
    """Documents, positions, tokens and bits of documents of these lengths."""
    documents = np.repeat(np.arange(len(lengths)), lengths)
    positions = np.concatenate([np.arange(n) for n in lengths])
    bits = rng.gamma(0.5, 8.0, len(documents)).astype(np.float32)
    return documents, positions, rng.integers(0, 99, len(documents)), bits


def brute_force(columns: tuple[np.ndarray[Any, Any], ...], lengths: list[int]) -> list[Any]:
    """(mean, document, position) of all passages, by the rule in words."""
    documents, positions, _, bits = columns
    found = []
    for document, length in enumerate(lengths):
        own = bits[documents == document].astype(np.float64)
        begins = positions[documents == document]
        for begin in range(0, length, LENGTH):
            part = own[(begins >= begin) & (begins < begin + LENGTH)]
            if len(part) >= LENGTH // 2 or (begin == 0 and length <= LENGTH):
                found.append((float(part.mean()), document, begin))
    return sorted(found)


@pytest.mark.parametrize("size", [1, 7, 48, 100, 10_000])
def test_passages_of_any_parts(size: int) -> None:
    """Fails if a passage is missed, or cut where a part of the tokens ends."""
    lengths = [*rng.integers(1, 200, 60).tolist(), 48, 96, 1]
    columns = tokens_of(lengths)
    passages = Passages()
    for begin in range(0, len(columns[0]), size):
        passages.add(*(column[begin : begin + size] for column in columns))
    passages.finish()
    passages.name(np.arange(len(lengths)), [f"d{i}" for i in range(len(lengths))])
    found = passages.to_json(None)
    right = brute_force(columns, lengths)
    for name, wanted in (("most", right[-KEPT:][::-1]), ("least", right[:KEPT])):
        places = [(p["document"], p["position"]) for p in found[name]]
        assert places == [(document, begin) for _, document, begin in wanted]
        for passage, (mean, document, _) in zip(found[name], wanted, strict=True):
            assert np.mean(passage["bits"]) == pytest.approx(mean, abs=1e-3)
            assert len(passage["tokens"]) == len(passage["bits"])
            assert passage["source"] == f"d{document}"
            assert passage["texts"] is None
    counts = np.histogram(columns[3], np.arange(len(found["token_counts"])) * BIN_BITS)[0]
    assert found["token_counts"][:-1] == counts.tolist()
    assert sum(found["token_counts"]) == len(columns[0])


def test_the_same_passage_is_shown_once() -> None:
    """Fails if a text that many documents repeat fills the page, or a passage is at both ends."""
    documents = np.repeat(np.arange(20), LENGTH)
    positions = np.tile(np.arange(LENGTH), 20)
    tokens = np.tile(np.arange(LENGTH), 20)
    tokens[:LENGTH] += 1
    bits = np.where(documents == 0, 1.0, 9.0).astype(np.float32)
    passages = Passages()
    passages.add(documents, positions, tokens, bits)
    passages.finish()
    found = passages.to_json(lambda ids: " ".join(map(str, ids)))
    assert [p["document"] for p in found["most"]] == [1, 0]
    assert found["least"] == []
    assert "".join(found["most"][1]["texts"]) == " ".join(map(str, range(1, LENGTH + 1)))


def test_pieces_of_characters() -> None:
    """Fails if the text of a passage is not that of its tokens together."""
    raw = "aé語😀\ufffd!".encode()

    def decode(ids: list[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    for end in range(len(raw) + 1):
        ids = list(raw[:end])
        assert "".join(pieces(ids, decode)) == decode(ids)
    assert pieces(list("é".encode()), decode) == ["", "é"]
