"""Small blocks and no fsync for all tests of files; no test cuts the power."""

import os

import pytest

from fastmem.data.files import blocks


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few sequences a block, so that a small set has several blocks."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 256)
    monkeypatch.setattr(os, "fsync", lambda fd: None)
