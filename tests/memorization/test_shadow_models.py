"""LiRA and RMIA against plain loops over sequences and 8 shadow models."""

import math
from statistics import NormalDist, fmean
from typing import Any

import numpy as np
import pytest

import fastmem

E, N = 8, 60


def data(seed: int = 0) -> Any:
    """Bits of a target and 8 shadow models, each trained on half; a member costs 3 bits less."""
    rng = np.random.default_rng(seed)
    is_member = np.argsort(rng.random((E + 1, N)), axis=0) < (E + 1) // 2
    bits = rng.normal(20, 4, N) + rng.normal(0, 1, (E + 1, N)) - 3 * is_member
    return bits[0], bits[1:], is_member[1:], is_member[0]


def plain_lira(target: Any, shadows: Any, is_member: Any, online: bool, variance: str) -> Any:
    """One sequence after another, with the distribution of the standard library."""
    groups = [
        [[-shadows[e, i] for e in range(E) if is_member[e, i] == side] for side in (False, True)]
        for i in range(N)
    ]
    deviations = []
    for side in (0, 1):
        squares = [[(x - fmean(g[side])) ** 2 for x in g[side]] for g in groups]
        pooled = math.sqrt(fmean([s for one in squares for s in one]))
        own = [math.sqrt(fmean(one)) for one in squares]
        deviations.append(own if variance == "example" else [pooled] * N)
    scores = []
    for i, g in enumerate(groups):
        out, inside = (NormalDist(fmean(g[s]), deviations[s][i]) for s in (0, 1))
        x = -target[i]
        density = (math.log(inside.pdf(x)), math.log(out.pdf(x))) if online else ()
        scores.append(density[0] - density[1] if online else (x - out.mean) / out.stdev)
    return scores


@pytest.mark.parametrize("variance", ["fixed", "example"])
@pytest.mark.parametrize("online", [False, True])
def test_lira_is_the_plain_form(online: bool, variance: Any) -> None:
    """Fails if a mean, a deviation or a likelihood is over the wrong models."""
    target, shadows, is_member, _ = data()
    scores = fastmem.lira(target, shadows, is_member, online=online, variance=variance)
    expected = plain_lira(target, shadows, is_member, online, variance)
    np.testing.assert_allclose(scores, expected, rtol=1e-6, atol=1e-6)


def test_offline_lira_orders_as_the_published_probability() -> None:
    """Fails if the score is not increasing in 1 - Pr[Z > x], the published offline score."""
    target, shadows, is_member, _ = data()
    scores = fastmem.lira(target, shadows, is_member, online=False)
    x = np.where(is_member, np.nan, -shadows)
    mean = np.nanmean(x, axis=0)
    deviation = math.sqrt(np.nanmean((x - mean) ** 2))
    published = [1 - NormalDist().cdf((target[i] + mean[i]) / deviation) for i in range(N)]
    assert len(set(published)) == N
    assert np.argsort(scores).tolist() == np.argsort(published).tolist()
    far = fastmem.lira(target, shadows + 1000, is_member, online=False)
    assert len(np.unique(far)) == N  # where the probability is 1 for all


def plain_rmia(
    target: Any, shadows: Any, is_member: Any, online: bool, places: Any, a: float, gamma: float
) -> Any:
    """All pairs of sequences, in probabilities."""
    p = 2.0**-shadows
    ratios = []
    for i in range(N):
        out = fmean(p[e, i] for e in range(E) if not is_member[e, i])
        inside = fmean(p[e, i] for e in range(E) if is_member[e, i])
        mean = (out + inside) / 2 if online else ((1 + a) * out + 1 - a) / 2
        ratios.append(2.0 ** -target[i] / mean)
    return [fmean(ratios[i] / ratios[z] >= gamma - 1e-12 for z in places) for i in range(N)]


@pytest.mark.parametrize(
    ("online", "a", "gamma", "places"),
    [(True, 0.3, 1.0, None), (False, 0.3, 1.0, None), (False, 1.0, 1.1, range(5, 45))],
)
def test_rmia_is_the_plain_form(online: bool, a: float, gamma: float, places: Any) -> None:
    """Fails if the ratio, the offline form or the fraction of the population is another."""
    target, shadows, is_member, _ = data()
    target, shadows = target / 10, shadows / 10  # as bits per token
    scores = fastmem.rmia(
        target, shadows, is_member, online=online, a=a, gamma=gamma, population=places
    )
    whole = range(N) if places is None else places
    expected = plain_rmia(target, shadows, is_member, online, whole, a, gamma)
    assert len(set(expected)) > 20
    np.testing.assert_allclose(scores, expected, atol=1e-12)


def test_both_find_members_that_bits_alone_do_not() -> None:
    """Fails if the direction is turned, or the difficulty of sequences is not taken out."""
    target, shadows, is_member, truth = data(1)
    plain = fastmem.roc(-target, truth).auc.estimate
    attacks = [fastmem.lira(target, shadows, is_member, online=o) for o in (False, True)]
    attacks.append(fastmem.rmia(target, shadows, is_member, online=True))
    attacks.append(fastmem.rmia(target, shadows, is_member, online=False, a=1))
    for scores in attacks:
        assert fastmem.roc(scores, truth).auc.estimate > plain + 0.1


def test_whole_sequences_do_not_underflow() -> None:
    """Fails if 2^-bits is computed: 40,000 bits are 0 in float64."""
    target, shadows, is_member, _ = data()
    scores = fastmem.rmia(target, shadows, is_member, online=True)
    moved = fastmem.rmia(target + 40_000, shadows + 40_000, is_member, online=True)
    np.testing.assert_allclose(moved, scores, atol=1 / N)


def test_models_that_agree_do_not_divide_by_zero() -> None:
    """Fails if shadow models with the same bits give inf or nan."""
    is_member = np.arange(4)[:, None] % 2 == np.zeros((1, 3))
    for variance in ("fixed", "example"):
        for online in (False, True):
            scores = fastmem.lira(
                [0.0, 1.0, 2.0], np.ones((4, 3)), is_member, online=online, variance=variance
            )
            assert np.isfinite(scores).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": np.ones(3)}, r"target of shape \(3,\) and shadows of shape \(8, 60\)"),
        ({"is_member": np.ones((E, N))}, r"is_member must be bool of shape \(8, 60\), not float64"),
        ({"is_member": np.ones((E, N), bool)}, "0 of 8 shadow models were not trained on sequence"),
        ({"is_member": np.zeros((E, N), bool)}, "0 of 8 shadow models were trained on sequence 0"),
        (
            {"shadows": np.where(np.arange(N) == 9, np.nan, np.ones((E, N)))},
            r"shadows has bits not finite for sequence 9 \(1 of 60 sequences\)",
        ),
        ({"target": np.full(N, -2.0)}, r"target has -2\.0 bits: pass -log2"),
    ],
)
def test_bad_input_is_one_line(change: dict[str, Any], message: str) -> None:
    """Fails if arrays that do not fit, or a sequence without models on a side, get a score."""
    target, shadows, is_member, _ = data()
    arrays = {"target": target, "shadows": shadows, "is_member": is_member, **change}
    for attack in (fastmem.lira, fastmem.rmia):
        with pytest.raises(ValueError, match=message):
            attack(**arrays, online=True)


def test_a_deviation_needs_two_models() -> None:
    """Fails if the deviation of one model, which is 0, passes for a sequence's own."""
    is_member = np.arange(4)[:, None] != np.zeros((1, 3))  # one shadow model without each
    arrays = np.ones(3), np.ones((4, 3)), is_member
    assert len(fastmem.lira(*arrays, online=True)) == 3
    with pytest.raises(
        ValueError, match=r"1 of 4 shadow models were not trained on sequence 0 \(3"
    ):
        fastmem.lira(*arrays, online=False, variance="example")


def test_bad_settings_are_one_line() -> None:
    """Fails if an unknown variance, a wrong a or population, or a word for online is taken."""
    arrays = data()[:3]
    with pytest.raises(ValueError, match="online must be True or False, not 'no'"):
        fastmem.lira(*arrays, online="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"variance must be one of .* not 'global'"):
        fastmem.lira(*arrays, online=True, variance="global")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a must be from 0 to 1 and gamma above 0, not 2 and 1"):
        fastmem.rmia(*arrays, online=False, a=2, gamma=1)
    with pytest.raises(ValueError, match="is not places among 60 sequences"):
        fastmem.rmia(*arrays, online=True, population=[60])
    with pytest.raises(ValueError, match="the population has 0 of 60 sequences"):
        fastmem.rmia(*arrays, online=True, population=np.zeros(N, bool))
