"""Membership scores against loops over sequences and tokens, and the traps of published tools."""

import math
import zlib
from typing import Any

import numpy as np
import pytest

import fastmem
from fastmem.memorization import membership
from fastmem.memorization.membership import WIDTHS, auc, tokens_of

K = (5, 20, 50, 100)
V = 30


def test_auc_is_the_fraction_of_pairs() -> None:
    """Fails if the AUC is not the mean over all pairs, with ties counted half."""
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 9, 40) * 1.0, rng.integers(4, 12, 25) * 1.0
    pairs = (members[:, None] < others) + (members[:, None] == others) / 2
    assert auc(members, others) == pytest.approx(pairs.mean())
    assert auc(others, others) == 0.5


def data(dtype: Any = np.float64, seed: int = 0) -> dict[str, Any]:
    """Arguments for all scores of 40 sequences of 20 to 70 tokens, ties and zeros included."""
    rng = np.random.default_rng(seed)
    lengths = [*rng.integers(20, 70, 38), 20, 20]
    draw = {
        "bits": lambda n: np.round(rng.exponential(4, n) * (rng.random(n) < 0.97), 1),
        "entropy": lambda n: rng.exponential(3, n),
        "variance": lambda n: rng.exponential(2, n) * (rng.random(n) < 0.9),
        "reference": lambda n: np.round(rng.exponential(5, n), 1),
    }
    arrays: dict[str, Any] = {
        name: [one(n).astype(dtype) for n in lengths] for name, one in draw.items()
    }
    arrays["tokens"] = [rng.integers(0, V, n) for n in lengths]
    arrays["texts"] = [" ".join(map(str, tokens)) for tokens in arrays["tokens"]]
    return {**arrays, "frequency": rng.integers(0, 50, V), "k": K}


def by_hand(arrays: dict[str, Any], row: int) -> dict[str, float]:
    """The scores of one sequence, token by token in Python's floats."""
    b, h, v, r = (
        [float(x) for x in arrays[name][row]]
        for name in ("bits", "entropy", "variance", "reference")
    )
    tokens, n = arrays["tokens"][row].tolist(), len(b)
    mean, other = sum(b) / n, sum(r) / n
    scores = {"loss": -mean, "reference": other - mean, "reference_ratio": -mean / other}
    scores["zlib"] = -mean / len(zlib.compress(arrays["texts"][row].encode()))
    z = [(h[t] - b[t]) / max(math.sqrt(v[t]), 1e-6 * h[t] + 1e-10) for t in range(n)]
    for k in K:
        m = max(1, k * n // 100)
        scores[f"min_k_{k}"] = -sum(sorted(b)[n - m :]) / m
        scores[f"max_k_{k}"] = -sum(sorted(b)[:m]) / m
        scores[f"min_k_plus_plus_{k}"] = sum(sorted(z)[:m]) / m
        chosen = [t for t in range(n) if b[t] >= sorted(b)[n - m]]
        certain = [b[t] for t in chosen if h[t] < 2 / math.log(2)] or sorted(b)[n - m :]
        scores[f"surp_{k}"] = -sum(certain) / len(certain)
    votes = []
    for width in (min(width, n) for width in WIDTHS):
        begins = range(n - width + 1)
        won = [sum(r[i : i + width]) > sum(b[i : i + width]) + 1e-9 for i in begins]
        votes.append(sum(won) / len(won))
    scores["window_votes"] = sum(votes) / len(votes)
    counts = arrays["frequency"].tolist()
    parts = []
    for t in range(n):
        if tokens[t] not in tokens[:t]:
            q = (counts[tokens[t]] + 1) / (sum(counts) + len(counts))
            parts.append(min(-(2 ** -b[t]) * math.log(q), 0.01))
    scores["dc_pdd"] = sum(parts) / len(parts)
    return scores


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
def test_each_score_is_the_loop(dtype: Any) -> None:
    """Fails if a score differs from its definition by 1e-6, or sums in half precision."""
    arrays = data(dtype)
    scores = fastmem.membership_scores(**arrays)
    expected = [by_hand(arrays, row) for row in range(len(arrays["bits"]))]
    assert scores.keys() == expected[0].keys()
    for name, values in scores.items():
        assert values.dtype == np.float64
        want = [score[name] for score in expected]
        np.testing.assert_allclose(values, want, rtol=1e-6, atol=1e-6, err_msg=name)


def test_the_published_form_of_min_k_plus_plus() -> None:
    """Fails for the other form in use, whose mean and deviation give all tokens equal weight."""
    rng = np.random.default_rng(0)
    log_p = np.log(rng.dirichlet(np.full(V, 0.3), 40))
    targets = rng.integers(0, V, 40)
    p, chosen = np.exp(log_p), log_p[np.arange(40), targets]
    mu = (p * log_p).sum(1)
    sigma = np.sqrt((p * log_p**2).sum(1) - mu**2)  # the authors' code, in nats
    expected = np.sort((chosen - mu) / sigma)[: 40 // 5].mean()
    scores = fastmem.membership_scores(
        -chosen[None] / np.log(2),
        entropy=-mu[None] / np.log(2),
        variance=sigma[None] ** 2 / np.log(2) ** 2,
    )
    assert scores["min_k_plus_plus"][0] == pytest.approx(expected)
    unweighted = np.sort((chosen - log_p.mean(1)) / log_p.std(1))[: 40 // 5].mean()
    assert abs(unweighted - expected) > 0.1


def test_alike_and_sure_tokens_score_zero() -> None:
    """Fails if a deviation of 0 divides: all tokens alike (b = H), or one sure (b = H = 0)."""
    scores = fastmem.membership_scores(
        [[11.0, 0.0]], entropy=[[11.0, 0.0]], variance=[[0.0, 0.0]], k=(100,)
    )
    assert scores["min_k_plus_plus"][0] == 0


def test_widths_of_the_windows_are_the_published_ones() -> None:
    """Fails if the ten widths are not those of the paper: equal ratios from 2 to 40, rounded."""
    assert WIDTHS == (2, 3, 4, 5, 8, 11, 15, 21, 29, 40)


def test_surp_without_a_certain_token_is_min_k() -> None:
    """Fails if ties at the m-th largest bits count where no token is certain."""
    scores = fastmem.membership_scores([[3.0, 2.0, 2.0, 1.0]], entropy=[[9.0] * 4], k=(50,))
    assert scores["surp"].tolist() == scores["min_k"].tolist() == [-2.5]


def test_the_order_of_the_names() -> None:
    """Fails if a score stands elsewhere than in the documentation, or two k interleave."""
    assert list(fastmem.membership_scores(**data() | {"k": (10, 20)})) == [
        *("loss", "min_k_10", "min_k_20", "max_k_10", "max_k_20", "zlib", "surp_10", "surp_20"),
        *("min_k_plus_plus_10", "min_k_plus_plus_20", "reference", "reference_ratio"),
        *("window_votes", "dc_pdd"),
    ]


def test_names_without_a_list_of_k() -> None:
    """Fails if a single k changes the names, or scores appear without their arrays."""
    scores = fastmem.membership_scores(data()["bits"])
    assert list(scores) == ["loss", "min_k", "max_k"]


def test_less_than_one_token_is_one_token() -> None:
    """Fails if k % of a short sequence is no token (0 / 0), or that is not said."""
    with pytest.warns(UserWarning, match="20 % of the tokens of 1 of 2 sequences is less than one"):
        scores = fastmem.membership_scores([[1.0, 5.0, 2.0], [1.0] * 9 + [7.0]], k=(20,))
    assert scores["min_k"].tolist() == [-5.0, -4.0]
    assert [tokens_of(29, 100), tokens_of(20, 4), tokens_of(100, 7)] == [29, 1, 7]


def test_token_zero_and_zero_bits_count() -> None:
    """Fails if token 0 is taken for padding, or a loss of exactly 0 is dropped or divided by."""
    bits = [[0.0] * 5, [1.0, 0.0, 0.0, 0.0, 0.0]]
    scores = fastmem.membership_scores(
        bits,
        reference=[[0.0] * 5] * 2,
        tokens=[[0, 1, 2, 3, 4], [0, 0, 1, 2, 3]],
        frequency=[0] * 5,
        texts=["a", "b"],
    )
    assert scores["loss"].tolist() == [0.0, -0.2]
    assert scores["reference_ratio"][0] == pytest.approx(-1)
    assert all(np.isfinite(values).all() for values in scores.values())
    assert scores["dc_pdd"][0] == pytest.approx(0.01)


def test_order_and_company_change_nothing() -> None:
    """Fails if a sequence's score depends on where it stands or on the others."""
    arrays = data()
    order = np.random.default_rng(1).permutation(len(arrays["bits"]))
    scores = fastmem.membership_scores(**arrays)
    moved = {
        name: values if name in ("frequency", "k") else [values[i] for i in order]
        for name, values in arrays.items()
    }
    alone = {
        name: values if name in ("frequency", "k") else values[3:4]
        for name, values in arrays.items()
    }
    for name, values in fastmem.membership_scores(**moved).items():
        assert np.array_equal(values, scores[name][order]), name
    for name, values in fastmem.membership_scores(**alone).items():
        np.testing.assert_allclose(values, scores[name][3:4], rtol=1e-14, err_msg=name)


def test_blocks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a score depends on the sequences that are scored at once, or one is left out."""
    scores = fastmem.membership_scores(**data())
    for tokens in (1, 50, 150):  # one sequence, or one to seven of a length
        monkeypatch.setattr(membership, "BLOCK_TOKENS", tokens)
        for name, values in fastmem.membership_scores(**data()).items():
            np.testing.assert_allclose(values, scores[name], rtol=1e-14, err_msg=name)


def test_a_rectangle_is_a_list_of_rows() -> None:
    """Fails if an (N, n) array gives another result than its rows."""
    bits = np.random.default_rng(0).exponential(4, (7, 20)).astype(np.float32)
    rows = fastmem.membership_scores(list(bits))
    for name, values in fastmem.membership_scores(bits).items():
        assert np.array_equal(values, rows[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": []}, "bits has no sequences: give at least one"),
        ({"bits": [[1.0], []]}, "bits of sequence 1 has 0 tokens: leave it out"),
        (
            {"bits": [[1.0] * 5, [1, 2, math.nan, 3, math.inf], [1] * 5]},
            r"bits not finite in sequence 1 at token 2 \(1 of 3 sequences\): score again",
        ),
        (
            {"bits": [[1.0, -2.0], [1e-9, -1e-6]]},
            r"bits below 0 in sequence 0 at token 1 \(1 of 2 sequences\): pass -log2 of",
        ),
        ({"reference": [[-1.0] * 5] * 2}, "reference below 0 in sequence 0 at token 0"),
        ({"bits": [["a"]]}, "bits must be one array of numbers for each sequence"),
        ({"bits": [1.0, 2.0]}, "bits must be one array of numbers for each sequence"),
        ({"reference": [[1.0] * 5]}, "reference has 1 sequences, bits 2: score both with one"),
        (
            {"reference": [[1.0] * 5, [1.0] * 4]},
            "reference of sequence 1 has 4 tokens, bits 5: score both with one tokenizer",
        ),
        ({"variance": [[1.0] * 5] * 2}, "variance without entropy: pass entropy too"),
        (
            {"entropy": [[1.0] * 5] * 2, "variance": [[1.0] * 5, [-1.0] * 5]},
            r"variance is negative in sequence 1 at token 0 \(1 of 2 sequences\)",
        ),
        ({"tokens": [[1] * 5] * 2}, "dc_pdd needs tokens and frequency: pass both or neither"),
        (
            {"tokens": [[1] * 5, [0, 0, 0, 0, 9]], "frequency": [1] * 9},
            "a token is outside the vocabulary in sequence 1 at token 4 .* 9 counts",
        ),
        ({"texts": ["a"]}, "1 texts for 2 sequences: give a text for each sequence"),
        ({"k": (0,)}, r"k must be percentages above 0 up to 100, not \(0,\)"),
        ({"k": ()}, r"k must be percentages above 0 up to 100, not \(\)"),
        ({"k": 20}, "k must be percentages above 0 up to 100, not 20"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    """Fails if a wrong argument is taken, or its error lacks both values and the fix."""
    with pytest.raises(ValueError, match=message) as error:
        fastmem.membership_scores(**{"bits": [[1.0] * 5] * 2, **change})
    assert "\n" not in str(error.value)
