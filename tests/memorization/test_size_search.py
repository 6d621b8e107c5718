"""Adaptive data set sizes on known capacity curves."""

from collections.abc import Callable

import numpy as np
import pytest

from fastmem import capacity_bits, why_not_saturated
from fastmem.memorization.size_search import Finished, next_runs

P, BITS = 10_000, 105.0  # parameters; bits of a sequence, V = 128 and S = 16
LOADS = (0.75, 1.5, 3.0, 4.0, 6.0)  # of the fixed grid, bits a parameter

Curve = Callable[[int, int], float]


def study(curve: Curve, seeds: tuple[int, ...] = (0, 1), most: int = 100) -> list[Finished]:
    """Runs what the search asks for until it asks for nothing."""
    done: list[Finished] = []
    while wanted := next_runs(done, P, BITS, seeds):
        for count, seed in wanted:
            assert all((count, seed) != (run.count, run.seed) for run in done), "trained twice"
            done.append(Finished(count, seed, curve(count, seed), count * BITS))
        assert len(done) <= most, "no end"
    return done


def saturating(
    capacity: float, noise: float = 0.0, fall: float = 0.0, salt: int = 0, begin: float = 2.0
) -> Curve:
    """A diagonal, a knee, and a plateau of `capacity` bits per parameter that falls again, by a
    fraction per doubling, from `begin` times the capacity on."""

    def curve(count: int, seed: int) -> float:
        H, C = count * BITS, capacity * P
        soft = (H**-8 + C**-8) ** (-1 / 8)
        late = max(0.0, np.log2(H / (begin * C)))
        off = np.random.default_rng((salt, count, seed)).normal(0, noise)
        return float(soft * (1 - fall * late) * (1 + off * min(1.0, (H / C) ** 4)))

    return curve


def verdict(done: list[Finished]) -> str | None:
    return why_not_saturated(
        [run.count for run in done],
        [run.memorized for run in done],
        [run.entropy for run in done],
        [0.0] * len(done),
    )


# With 0.05 and a fall, the first set is too large for its epochs already, and the verdict says so.
CAPACITIES = [(0.05, 0.0)] + [(c, f) for c in (0.5, 1, 2, 2.5, 3, 3.64, 6, 50) for f in (0.0, 0.1)]


@pytest.mark.parametrize(("capacity", "fall"), CAPACITIES)
def test_any_capacity_is_bracketed(capacity: float, fall: float) -> None:
    """Fails if a capacity far from 3.6 is missed, or the runs are not saturated."""
    done = study(saturating(capacity, fall=fall), most=14)
    assert verdict(done) is None
    found = capacity_bits([run.count for run in done], [run.memorized for run in done])
    assert found.estimate == pytest.approx(capacity * P, rel=0.03)
    best = max(done, key=lambda run: run.memorized).count
    assert {run.seed for run in done if run.count == best} == {0, 1}


def test_near_the_published_capacity_it_takes_four_or_five_runs() -> None:
    """Fails if a plain case takes more runs: one on the diagonal, two or three past it, and a
    seed."""
    found = [len(study(saturating(capacity))) for capacity in (2.0, 2.5, 2.8, 3.2, 3.6)]
    assert found == [4, 4, 5, 5, 4]


@pytest.mark.parametrize(("fall", "begin"), [(0.05, 2.0), (0.1, 1.0)])
def test_half_the_runs_for_the_same_interval(fall: float, begin: float) -> None:
    """Fails if, over 200 noisy studies like the laptop preset, the search needs more than half of
    the runs of the fixed grid, its capacity is off by 1.5 %, or its interval is wider."""
    runs, errors, widths = [], [], []
    for salt in range(200):
        curve = saturating(2.55, 0.01, fall, salt, begin)
        flat = saturating(2.55, 0.0, fall, salt, begin)
        top = max(flat(count, 0) for count in range(100, 700))
        auto = study(curve)
        counts = [max(1, int(load * P / BITS)) for load in LOADS]
        fixed = [Finished(n, s, curve(n, s), n * BITS) for n in counts for s in (0, 1)]
        row = []
        for done in (auto, fixed):
            found = capacity_bits([r.count for r in done], [r.memorized for r in done])
            assert found.low is not None
            assert found.high is not None
            row.append((found.estimate / top - 1, found.high - found.low))
        runs.append(len(auto))
        errors.append([error for error, _ in row])
        widths.append([width for _, width in row])
    auto_rms, _ = np.sqrt(np.mean(np.square(errors), axis=0))
    auto_width, fixed_width = np.mean(widths, axis=0)
    assert np.mean(runs) <= 5
    assert auto_rms <= 0.015
    assert auto_width <= 1.1 * fixed_width


def test_decisions_depend_on_the_runs_alone() -> None:
    """Fails if the order of rows, or where a sweep was stopped, changes what comes next."""
    rng = np.random.default_rng(0)
    for salt in range(20):
        done = study(saturating(2.2, noise=0.02, salt=salt), seeds=(0, 1, 2))
        for stop in range(len(done) + 1):
            part = done[:stop]
            shuffled = [part[i] for i in rng.permutation(stop)]
            assert next_runs(part, P, BITS, (0, 1, 2)) == next_runs(shuffled, P, BITS, (0, 1, 2))


def test_seeds_of_the_best_size_come_together() -> None:
    """Fails if seeds that need no decision in between are returned one by one."""
    curve = saturating(2.5)
    done = study(curve, seeds=(0,))
    wanted = next_runs(done, P, BITS, (0, 1, 2, 3))
    assert len(wanted) == 3
    assert len({count for count, _ in wanted}) == 1
    assert [seed for _, seed in wanted] == [1, 2, 3]


def test_a_best_size_that_loses_its_place() -> None:
    """Fails if the size with the highest mean in the end lacks seeds."""

    def curve(count: int, seed: int) -> float:
        bits = saturating(2.5)(count, 0)
        return bits * (1.02 if seed == 0 else 0.9) if count == 430 else bits

    done = study(curve)
    means = {
        n: np.mean([r.memorized for r in done if r.count == n]) for n in {r.count for r in done}
    }
    best = max(means, key=lambda count: means[count])
    assert best != 430
    assert {run.seed for run in done if run.count == best} == {0, 1}


def test_what_is_there_is_used() -> None:
    """Fails if finished runs of a fixed grid, or of other seeds, are trained again."""
    curve = saturating(2.5)
    counts = [max(1, int(load * P / BITS)) for load in LOADS]
    fixed = [Finished(n, s, curve(n, s), n * BITS) for n in counts for s in (0, 1)]
    assert next_runs(fixed, P, BITS, (0, 1)) == []
    assert len(next_runs(fixed, P, BITS, (0, 1, 2))) == 1


@pytest.mark.parametrize(
    "curve",
    [
        lambda count, seed: -5.0,
        lambda count, seed: 0.0,
        lambda count, seed: 0.5 * count * BITS,
        lambda count, seed: count * BITS,
        lambda count, seed: 1e-9,
        lambda count, seed: float(np.random.default_rng((count, seed)).normal(0, 1e5)),
    ],
    ids=["negative", "nothing", "half of all", "no capacity", "tiny", "noise"],
)
def test_curves_without_a_capacity_end(curve: Curve) -> None:
    """Fails if the search never ends for a model that memorizes nothing, or everything."""
    done = study(curve, most=40)
    assert len(done) >= 2


def test_a_model_of_one_parameter() -> None:
    """Fails if the first size is 0."""
    assert next_runs([], 1, BITS, (3,)) == [(1, 3)]


def test_one_sequence_is_the_smallest_size() -> None:
    """Fails if a single sequence that is not memorized is halved, or its slope divides by 0."""
    assert next_runs([Finished(1, 0, 0.9 * BITS, BITS)], 1, BITS, (0,)) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": ()}, "at least one seed"),
        ({"parameters": 0}, "must be above 0, not 0 and 105"),
        ({"sequence_bits": 0.0}, "must be above 0"),
        ({"sequence_bits": float("nan")}, "must be above 0"),
        ({"finished": [Finished(4, 0, float("nan"), 1.0)]}, "is not a finished run"),
        ({"finished": [Finished(0, 0, 1.0, 1.0)]}, "is not a finished run"),
        ({"finished": [Finished(4, 0, 1.0, 0.0)]}, "is not a finished run"),
    ],
)
def test_bad_input(change: dict[str, object], message: str) -> None:
    """Fails if an invalid number gives a decision."""
    given = {"finished": [], "parameters": 10, "sequence_bits": BITS, "seeds": (0,)}
    with pytest.raises(ValueError, match=message):
        next_runs(**given | change)  # type: ignore[arg-type]
