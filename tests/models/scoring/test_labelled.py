"""Members and non-members as one data set."""

from pathlib import Path

import numpy as np
import pytest

import fastmem
from fastmem.data.documents import open_documents
from fastmem.models.scoring.labelled import contents_of, labelled_documents


def test_both_sides_in_order(tmp_path: Path) -> None:
    """Fails if the documents of a side are lost, mixed or named without their side, or another
    non-member has the same identity."""
    (tmp_path / "a").mkdir()
    for i in range(20):
        (tmp_path / "a" / f"{i:02d}.txt").write_text(f"member {i}")
    others = np.arange(42).reshape(21, 2)
    found = labelled_documents(tmp_path / "a", others)
    assert found.counts == (20, 21)
    assert found.labels.tolist() == [True] * 20 + [False] * 21
    documents = list(found.documents)
    assert found.documents.count == len(documents) == 41
    assert [documents[i].source for i in (0, 19, 20)] == [
        "members/00.txt",
        "members/19.txt",
        "non-members:0",
    ]
    assert contents_of(found, [3, 40]) == {3: "member 3", 40: "40 41"}
    assert [one.source for one in found.documents.after(40)] == ["non-members:20"]
    assert open_documents(found.documents) is found.documents
    again = labelled_documents(tmp_path / "a", others + 1)
    assert again.documents.identity != found.documents.identity


def test_overlap_is_of_content() -> None:
    """Fails if equal tokens of another dtype do not overlap, or a text overlaps with tokens."""
    members = fastmem.UniformSequences(30, 8, 16)
    same = members.tokens(slice(0, 25)).astype(np.int64)
    with pytest.raises(
        ValueError, match=r"25 of 25 non-members are members too \(non-members:0 is"
    ):
        labelled_documents(members, same)
    assert labelled_documents(members, same, allow_overlap=True).overlap == 25
    texts = [" ".join(map(str, row)) for row in same]
    assert labelled_documents(members, texts).overlap == 0
    with pytest.raises(ValueError, match="30 members and 19 non-members: give at least 20"):
        labelled_documents(members, texts[:19])
