"""The exhibits of a text study: their numbers against brute force, their sentences by course."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases.made_text import COUNTS, UNIFORM, S, made_study, text_json
from scipy.stats import spearmanr

from fastmem.report import text_runs, text_sequences
from fastmem.report.figures import by_shape
from fastmem.report.section import Section
from fastmem.report.text_exhibits import double_descent_of, headline, rarity_of, text_sections
from fastmem.report.text_runs import best_runs, flat, fraction_that_holds, loads, ranked
from fastmem.report.text_study import TextRun, TextStudy

NAMES = (
    "unintended",
    "generalization",
    "double_descent",
    "sequences",
    "rarity",
    "reference",
    "canaries",
)


def sections_of(study: TextStudy, show_text: bool = True) -> dict[str, Section]:
    found = text_sections(study, text_json(study), ranked(study), show_text)
    assert tuple(section.name for section in found) == NAMES
    return {section.name: section for section in found}


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> TextStudy:
    return made_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def found(study: TextStudy) -> dict[str, Section]:
    return sections_of(study)


def max_code(target: Any, reference: Any) -> list[float]:
    return [max(r - t, 0.0) for t, r in zip(target, reference, strict=True)]


def mixture(target: Any, reference: Any) -> list[float]:
    return [r + math.log2((2.0**-t + 2.0**-r) / 2) for t, r in zip(target, reference, strict=True)]


def of_run(section: Section, run: TextRun) -> Any:
    width = run.row["model"]["width"]
    (record,) = (
        record
        for record in section.data
        if (record["width"], record["count"], record["seed"]) == (width, run.count, run.seed)
    )
    return record


def test_unintended_memorization(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if a number in the data is not of the run, the code and the sum in its name."""
    assert len(found["unintended"].data) == len(study.runs)
    for run in study.runs:
        record = of_run(found["unintended"], run)
        for code, (ours, theirs) in run.codes.items():
            sums = {
                "max": sum(max_code(run.members, ours)),
                "mixture": sum(mixture(run.members, ours)),
                "held_out_max": sum(max_code(run.held_out, theirs)),
                "held_out_mixture": sum(mixture(run.held_out, theirs)),
            }
            for name, value in sums.items():
                assert record[f"{code}_{name}_bits"] == pytest.approx(value, abs=1e-6)
            net = sums["max"] - sums["held_out_max"]
            assert record[f"{code}_net_estimate"] == pytest.approx(net)
            assert record[f"{code}_net_low"] <= net <= record[f"{code}_net_high"]
            assert record[f"{code}_entropy_bits"] == pytest.approx(sum(ours))
            of_test = sums["max"] - sum(max_code(run.test, run.test_codes[code]))
            assert record[f"{code}_net_test_estimate"] == pytest.approx(of_test)


def test_generalization(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if generalization is not memorization minus unintended memorization, in bits a token,
    or a loss is another."""
    for run in study.runs:
        record = of_run(found["generalization"], run)
        total = sum(UNIFORM - run.members) - sum(max_code(run.members, run.codes["reference"][0]))
        coded = S - 1
        assert record["reference_generalization_bits"] == pytest.approx(total)
        assert record["generalization_bits_per_token"] == pytest.approx(total / run.count / coded)
        assert record["train_bits_per_token"] == pytest.approx(run.members.mean() / coded)
        assert record["held_out_bits_per_token"] == pytest.approx(run.held_out.mean() / coded)
        assert record["test_bits_per_token"] == pytest.approx(run.test.mean() / coded)
    assert (
        "test loss stays near 3.67; train loss rises from 0.09 at N = 10 to 2.43 at N = 270"
        in found["generalization"].sentence
    )


def test_double_descent(tmp_path: Path) -> None:
    """Fails if a ratio is not bits of the data over capacity, or a known peak is not told."""
    peak = made_study(tmp_path, lost=lambda N: 45.0 if N == 90 else 5.0)
    section = sections_of(peak)["double_descent"]
    text = [record for record in section.data if record["data"] == "text"]
    assert len(text) == len(peak.runs)
    for run in peak.runs:
        record = of_run(replace(section, data=text), run)
        capacity = 2.0 * run.parameters
        planted = 4 * UNIFORM  # canaries
        bits = sum(run.codes["reference"][0]) + planted
        assert record["reference_ratio"] == pytest.approx(bits / capacity)
        assert record["uniform_ratio"] == pytest.approx((run.count * UNIFORM + planted) / capacity)
    descent = double_descent_of(peak)
    assert descent.peak_ratio is not None
    first, second = (
        np.exp(
            np.mean(
                [
                    np.log(one["reference_ratio"])
                    for one in text
                    if one["width"] == width and one["count"] == 90
                ]
            )
        )
        for width in (8, 16)
    )
    assert list(descent.peaks) == ["1 × 8", "1 × 16"]
    assert descent.peak_ratio.estimate == pytest.approx(math.sqrt(first * second))
    assert section.sentence.startswith("On text: the test loss peaks where the data hold ")
    of_uniform = "better than 8.00 bits a token: the test loss peaks where the data hold 0.70"
    assert of_uniform in section.sentence
    facts = dict(section.facts)
    assert facts["Capacity from"] == "a folder of made-up capacities"
    assert facts["Text, ratio by the reference model"].startswith("peak at ")
    json.dumps(descent.peak_ratio.to_dict())


def test_double_descent_not_seen(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if a flat loss has a peak, or the page does not say what to run."""
    assert double_descent_of(study).peak_ratio is None
    sentence = found["double_descent"].sentence
    assert sentence.startswith("On text: no peak of the test loss was seen. ")
    assert "Run " in sentence
    assert "--" in sentence


def test_without_a_capacity(study: TextStudy) -> None:
    """Fails if an unknown capacity is an error or a number."""
    unknown = replace(study, capacity_bits={}, uniform=())
    assert loads(unknown) == []
    assert double_descent_of(unknown).peak_ratio is None
    section = sections_of(unknown)["double_descent"]
    assert section.draw is None


def test_the_share_that_holds_90_percent(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if fewer sequences hold as much, the curve is another, or a bin is lost."""
    section = found["sequences"]
    runs = {
        run.count: run for run in study.runs if run.row["model"]["width"] == 16 and not run.seed
    }
    assert {record["count"] for record in section.data} == {10, 90, 270}
    for count in (10, 90, 270):
        bits = sorted(max_code(runs[count].members, runs[count].codes["reference"][0]))[::-1]
        number = next(n for n in range(1, count + 1) if sum(bits[:n]) >= 0.9 * sum(bits))
        said = f"{number / count:.0%} (N = {count})".replace("%", "\N{NO-BREAK SPACE}%")
        assert said in section.sentence
        own = [record for record in section.data if record["count"] == count]
        bins = [record for record in own if record["part"] == "histogram"]
        for name in ("members", "held_out"):
            assert sum(record[name] for record in bins) == pytest.approx(1)
        held = [record for record in own if record["part"] == "held"]
        for record in held:
            first = sum(bits[: round(record["to"] * count)])
            assert record["members"] == pytest.approx(first / sum(bits))
    assert fraction_that_holds(np.zeros(3)) is None
    assert fraction_that_holds(np.ones(10)) == 0.9


def test_rarity(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if the run, the order, rho or the number of sequences is another."""
    top = ranked(study)
    run = top.run
    assert (run.row["model"]["width"], run.count, run.seed) == (16, 90, 0)
    bits = np.array(max_code(run.members, run.codes["reference"][0]))
    assert top.bits[top.order].tolist() == sorted(bits.tolist(), reverse=True)
    above = (bits > 0) & ~np.isnan(top.rarity)
    rho = spearmanr(top.rarity[above], bits[above]).statistic
    assert top.rho is not None
    assert top.rho.estimate == pytest.approx(rho)
    assert rarity_of(study) == {"spearman": top.rho.to_dict(), "sequences": int(above.sum())}
    records = found["rarity"].data
    assert [record["unintended_bits"] for record in records] == sorted(bits[bits > 0])[::-1]
    assert [record["text"] for record in records] == [
        study.texts(run)[r["sequence"]] for r in records
    ]
    assert "Spearman's rho" in found["rarity"].sentence
    most = [top.scripts[i] for i in top.order[:20]]
    assert f"Latin {most.count('LATIN')} (" in found["rarity"].sentence


def test_repeats_are_counted(study: TextStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if texts that differ in case and white space alone are not counted."""
    run = best_runs(study)[-1][0]
    texts = [f"text {i}" for i in range(run.count)]
    texts[3], texts[5] = "Same  words\n", " same words"
    monkeypatch.setattr(TextStudy, "texts", lambda *_: texts)
    assert np.flatnonzero(ranked(study).repeats).tolist() == [3, 5]


def test_rarity_of_many_sequences(study: TextStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a figure of more points than it may have loses the most memorized."""
    monkeypatch.setattr(text_sequences, "POINTS", 40)
    records = sections_of(study)["rarity"].data
    assert len(records) == 40
    order = ranked(study).order
    assert [record["sequence"] for record in records[:20]] == order[:20].tolist()
    assert records[-1]["sequence"] == order[int((ranked(study).bits > 0).sum()) - 1]


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.1, 0.4, "rarer words are memorized more"),
        (-0.4, -0.1, "rarer words are memorized less"),
        (-0.1, 0.4, "no correlation beyond the interval"),
        (None, None, "without an interval"),
    ],
)
def test_the_sign_of_rho(low: float | None, high: float | None, said: str) -> None:
    """Fails if the sentence says more than the interval of rho."""
    assert said in text_sequences._way(low, high)


def test_without_scikit_learn(study: TextStudy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if a missing library stops the page."""

    def missing(texts: list[str]) -> None:
        raise ValueError("rarity needs scikit-learn")

    monkeypatch.setattr(text_runs, "rarity", missing)
    section = sections_of(study)["rarity"]
    assert section.draw is None
    assert section.sentence == "rarity needs scikit-learn"
    assert rarity_of(study) == {"spearman": None, "sequences": 0}


def test_references(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if a code or a strength has the number of another, or its mean leaves out a seed."""
    section = found["reference"]
    codes = [record for record in section.data if record["reference"] is None]
    assert len(codes) == 3 * len(COUNTS)
    largest = [run for run in study.runs if run.row["model"]["width"] == 16]
    for record in codes:
        runs = [run for run in largest if run.count == record["count"]]
        nets = [
            sum(max_code(run.members, run.codes[record["code"]][0]))
            - sum(max_code(run.held_out, run.codes[record["code"]][1]))
            for run in runs
        ]
        assert record["net"] == pytest.approx(np.mean(nets))
    strengths = [record for record in section.data if record["reference"]]
    assert len(strengths) == 4  # two models, two strengths
    for record in strengths:
        weaker = 20.0 if record["bits_per_byte"] == 4.0 else 0.0
        runs = [
            r for r in study.runs if r.count == 90 and r.row["model"]["width"] == record["width"]
        ]
        nets = [
            sum(max_code(run.members, run.codes["reference"][0] + weaker))
            - sum(max_code(run.held_out, run.codes["reference"][1] + weaker))
            for run in runs
        ]
        assert record["net"] == pytest.approx(np.mean(nets))
        assert record["net_low"] < record["net"] < record["net_high"]
    assert "less beyond the intervals" in section.sentence
    assert "bits by the compressors" in section.sentence


def test_one_strength(study: TextStudy) -> None:
    """Fails if one reference is told to show an influence."""
    sentence = sections_of(replace(study, strengths=study.strengths[1:]))["reference"].sentence
    assert "One reference strength was trained" in sentence


def test_canaries(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if the canaries of a run are not counted by the max code against their entropy."""
    section = found["canaries"]
    assert len(section.data) == len(study.runs)
    for run in study.runs:
        record = of_run(section, run)
        for name, bits in zip(("planted", "held_out"), run.canaries, strict=True):
            saved = [max(UNIFORM - b, 0) for b in bits]
            assert record[f"{name}_bits"] == pytest.approx(np.mean(saved))
    assert "hold 7,680 bits; measured are 7,552 [7,543, 7,561]" in section.sentence
    assert section.sentence.endswith("it measures 0 [-9, 9], which holds 0.")


def test_without_canaries(tmp_path: Path) -> None:
    """Fails if a study without canaries is an error, or the flag is not named."""
    section = sections_of(made_study(tmp_path, canaries=0))["canaries"]
    assert section.draw is None
    assert section.flags == "--canaries 64"


Course = Callable[[int], float]
COURSES: dict[str, tuple[Course, str, str]] = {
    "rises": (lambda N: 10.0, "rises with N without a fall for 1 × 8", "--counts 540 1080"),
    "falls": (
        lambda N: {10: 90.0, 30: 20.0, 90: 3.0, 270: 0.0}[N],
        "falls with N from the smallest on for 1 × 8",
        "--counts 2 5",
    ),
    "flat": (lambda N: 900 / N, "does not change with N beyond its noise for 1 × 8", ""),
    "both": (
        lambda N: {10: 90.0, 30: 5.0, 90: 20.0, 270: 20.0}[N],
        "falls and rises again with N for 1 × 8",
        "",
    ),
    "nothing": (lambda N: 0.0, "is nowhere above 0 beyond its 95\N{NO-BREAK SPACE}% interval", ""),
}


@pytest.mark.parametrize("name", COURSES)
def test_the_sentence_follows_the_curve(tmp_path: Path, name: str) -> None:
    """Fails if what is said of unintended memorization is not what was measured."""
    saved, said, flags = COURSES[name]
    lost = 0.0 if name == "nothing" else 30.0
    noise = 3.0 if name == "nothing" else 0.5
    made = made_study(tmp_path, saved, lambda N: lost, noise=noise)
    sentence = sections_of(made)["unintended"].sentence
    assert said in sentence
    assert flags in sentence
    models = by_shape(flat(text_json(made)))
    best, short = headline(models)
    top = max(record["reference_net_estimate"] for model in models for record in model)
    assert best["reference_net_estimate"] == top
    if name != "nothing":
        assert said.split(" with")[0].removesuffix(" again") in short
        assert "in both models" in short


def test_rises_and_falls(study: TextStudy, found: dict[str, Section]) -> None:
    """Fails if the top, its size or the end is another."""
    sentence = found["unintended"].sentence
    assert "rises and falls again with N for 1 × 8 (3," in sentence
    assert "a parameter, at N = 90; 9" in sentence
    for width in (8, 16):
        nets = [
            sum(max_code(run.members, run.codes["reference"][0]))
            - sum(max_code(run.held_out, run.codes["reference"][1]))
            for run in study.runs
            if run.count == 90 and run.row["model"]["width"] == width
        ]
        assert f"1 × {width} ({np.mean(nets):,.0f} bits, " in sentence


def test_no_text_in_the_data(study: TextStudy) -> None:
    """Fails if a record has the text of a sequence that is to stay private."""
    for section in sections_of(study, show_text=False).values():
        assert all("text" not in record for record in section.data)
