"""Membership and extraction of a sweep: from stored bits, by hand and by a trained model."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases.study_rows import study_row, write_bits
from cases.sweep_rows import TINY, finish

import fastmem
from fastmem.memorization.bits_threshold import threshold_quality
from fastmem.models.score import sequence_bits, sequence_scores
from fastmem.sweeps.membership import membership_rows, prefixes_of
from fastmem.sweeps.rows import report


def test_scores_of_one_pass() -> None:
    """Fails if bits differ from `sequence_bits`, or greedy decoding returns other suffixes."""
    model = fastmem.GPT(fastmem.GPTConfig(1, 16, 4, vocab=16, length=10))
    sequences = fastmem.UniformSequences(30, 10, 16)
    fastmem.train(model, sequences, fastmem.TrainConfig(steps=120))
    bits, starts = sequence_scores(model, sequences)
    np.testing.assert_allclose(bits, sequence_bits(model, sequences), atol=1e-4)
    tokens = sequences.to_torch()
    for prefix in range(1, 10):
        decoded = tokens[:, :prefix]
        with torch.no_grad():
            while decoded.shape[1] < 10:
                best = (model(decoded)[:, -1] @ model.head.T).argmax(-1, keepdim=True)
                decoded = torch.cat([decoded, best], dim=1)
        assert np.array_equal((decoded == tokens).all(1).numpy(), starts <= prefix)
    assert 1 < starts.mean() < 10


def test_a_sweep_stores_what_it_needs(tmp_path: Path) -> None:
    """Fails if a sweep with sequence bits lacks membership or extraction in capacity.json, or one
    without them has any."""
    rows = finish(replace(TINY, out=tmp_path / "bits", seeds=(0,), sequence_bits=True))
    found = report(tmp_path / "bits", rows)["membership"]
    assert {record["run"] for record in found} == {row["key"] for row in rows}
    for record in found:
        S = rows[0]["model"]["length"]
        assert [rate["prefix"] for rate in record["extraction"]] == prefixes_of(S)
        rates = [rate["train"]["estimate"] for rate in record["extraction"]]
        assert rates == sorted(rates)
    plain = finish(replace(TINY, out=tmp_path / "plain", seeds=(0,)))
    assert "membership" not in report(tmp_path / "plain", plain)


def test_records_by_hand(tmp_path: Path) -> None:
    """Fails if a quality is not that of the stored bits, a load not data over parameter bits, or an
    old file without greedy_from is refused."""
    row = study_row(16, 100, 0)
    members, others = np.arange(100.0), np.arange(50.0, 150.0)
    write_bits(tmp_path, row["key"], members, others)
    (record,) = membership_rows(tmp_path, [row, study_row(8, 50, 0)])
    quality = threshold_quality(members, others)
    for name, value in quality.items():
        assert record[name] == (value and value.to_dict())
    assert record["extraction"] is None
    load = row["coded_entropy_bits"] / (32 * row["parameters"])
    assert record["data_bits_per_parameter_bit"] == pytest.approx(load)
    starts = np.r_[np.full(60, 3), np.full(140, 4)]
    write_bits(tmp_path, row["key"], members, others, greedy_from=starts)
    (record,) = membership_rows(tmp_path, [row])
    S = row["model"]["length"]
    for rate in record["extraction"]:
        assert rate["train"]["estimate"] == (0.6 if rate["prefix"] >= 3 else 0) + 0.4 * (
            rate["prefix"] >= 4
        )
        assert rate["test"]["estimate"] == (rate["prefix"] >= 4)
    assert [rate["prefix"] for rate in record["extraction"]] == prefixes_of(S)


def test_text_is_compared_with_its_held_out_half(tmp_path: Path) -> None:
    """Fails if canaries behind the members, or other documents behind the held-out half, count."""
    row = study_row(16, 103, 0)
    row["sequences"] = {"kind": "joined", "count": 103, "first": {"kind": "text", "count": 100}}
    members = np.r_[np.arange(100.0), np.zeros(3)]
    others = np.r_[np.arange(50.0, 150.0), np.zeros(40), np.full(3, 500.0)]
    starts = np.r_[np.full(103, 1), np.full(100, 9), np.full(43, 1)]
    write_bits(tmp_path, row["key"], members, others, greedy_from=starts)
    (record,) = membership_rows(tmp_path, [row])
    quality = threshold_quality(members[:100], others[:100])
    assert quality["auc"] is not None
    assert record["auc"] == quality["auc"].to_dict()
    assert record["count"] == 100
    assert record["extraction"][0]["test"]["estimate"] == 0
