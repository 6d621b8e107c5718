"""Studies of membership from arrays: passes, ensembles, samples, figures."""

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from fastmem.memorization import blind_baselines
from fastmem.memorization.roc import roc, roc_points
from fastmem.models.scoring.labelled import labelled_documents
from fastmem.report import membership_study as study
from fastmem.report.membership_page import _curves, _edges, _thinned, render_membership_page


def passed(counts: list[int], tokens: list[int]) -> study.Pass:
    """A pass over documents without text, of one bit a token."""
    columns = {
        "token": np.asarray(tokens, np.int32),
        "bits": np.ones(len(tokens), np.float32),
    }
    documents = {
        "bits": np.asarray(counts, float),
        "source": np.asarray([f"doc{i}" for i in range(len(counts))], object),
    }
    return study.Pass(columns, np.asarray(counts), documents, None)


def test_the_first_other_token_is_named() -> None:
    """Fails if a reference with other tokens, or another number of them, is taken, or the wrong
    document is named."""
    target = passed([2, 3], [5, 6, 7, 8, 9])
    study.check_same_tokens(target, passed([2, 3], [5, 6, 7, 8, 9]), "ref")
    for counts, tokens in (
        ([2, 3], [5, 6, 7, 8, 1]),
        ([2, 3], [5, 6, 1, 8, 9]),
        ([2, 2], [5, 6, 7, 8]),
    ):
        other = passed(counts, tokens)
        with pytest.raises(ValueError, match=r"reference ref has another tokenizer .*\(doc1 is"):
            study.check_same_tokens(target, other, "ref")


def test_ragged() -> None:
    """Fails if tokens of one document come into another."""
    assert [len(one) for one in passed([2, 3], [0] * 5).ragged("token")] == [2, 3]
    assert np.shape(passed([2, 2], [0] * 4).ragged("token")) == (2, 2)
    (first, second) = passed([1, 2], [7, 8, 9]).ragged("token")
    assert (first.tolist(), second.tolist()) == ([7], [8, 9])


def test_ensembles_of_two() -> None:
    """Fails if a variance is taken of a single model, or an online form without members."""
    target, models = np.array([1.0, 2.0, 3.0]), np.array([[2.0, 2.5, 2.0], [2.2, 2.4, 2.9]])
    nobody, split = np.zeros((2, 3), bool), np.array([[True] * 3, [False] * 3])
    of_references = study.ensemble_scores(target, models, nobody)
    assert list(of_references) == ["lira_offline", "lira_offline_example", "rmia"]
    of_shadows = study.ensemble_scores(target, models, split)
    assert list(of_shadows) == ["lira_offline", "lira_online", "rmia", "rmia_offline"]


def test_blind_baselines_see_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails if the sample has one side's texts under the other's label, or its size is not told."""
    monkeypatch.setattr(blind_baselines, "TREES", 10)
    old = [f"in {1900 + i % 50} the war of {i}" for i in range(60)]
    new = [f"in {2000 + i % 20} the phone of {i}" for i in range(30)]
    labelled = labelled_documents(old, new)
    values, warning, note = study.blind(labelled, seed=0)
    assert note is None
    monkeypatch.setattr(study, "BLIND_MOST", 40)
    sampled, again, note = study.blind(labelled, seed=0)
    assert note == "the blind baselines see 70 of 90 sequences"
    assert warning is not None
    assert again is not None
    for found in (values, sampled):
        assert all(one["auc"]["estimate"] > 0.95 for one in found.values())


def test_no_blind_baselines_without_words() -> None:
    """Fails if texts that share no word end the study."""
    labelled = labelled_documents([f"a{i}" for i in range(20)], [f"b{i}" for i in range(20)])
    values, warning, note = study.blind(labelled, seed=0)
    assert (values, warning) == ({}, None)
    assert note is not None
    assert note.startswith("no blind baselines: ")


def test_cases() -> None:
    """Fails if a case is under another kind than its label and its place in the order, or a text
    is not its own or not cut."""
    labelled = labelled_documents(["m" * 500] + [f"m{i}" for i in range(1, 20)], ["n"] * 20)
    scores = np.r_[np.arange(20.0, 0, -1), np.arange(-20.0, 0)]
    scores[19], scores[39] = -50, 50
    sources = np.array([f"s{i}" for i in range(40)], object)
    cases = study.confident_cases(labelled, sources, scores)
    chosen = {kind: [case["sequence"] for case in found] for kind, found in cases.items()}
    assert list(chosen.values()) == [[0, 1, 2], [20, 21, 22], [39, 38, 37], [19, 18, 17]]
    first = cases["members, rightly"][0]
    assert (first["text"], first["is_cut"], first["source"]) == ("m" * 400, True, "s0")
    assert first["rank"] == pytest.approx((38 + 0.5) / 40)


def test_a_thinned_curve_keeps_its_ends_and_its_order() -> None:
    """Fails if a curve of many sequences has as many points, or loses the rates that are told."""
    generator = np.random.default_rng(0)
    is_member = np.arange(20_000) < 10_000
    scores = generator.normal(size=20_000) + is_member
    fpr, tpr = roc_points(scores, is_member)
    few = _thinned(fpr, tpr, 0.5e-4)
    assert len(few[0]) < 500
    assert (few[0][0], few[0][-1], few[1][-1]) == (0.5e-4, 1.0, 1.0)
    assert (np.diff(few[0]) >= 0).all()
    assert (np.diff(few[1]) >= 0).all()
    at = np.interp(0.01, *few)
    told = roc(scores, is_member).tpr[0.01].tpr
    assert told is not None
    assert at == pytest.approx(told.estimate, abs=0.01)


def test_equal_scores_have_bins() -> None:
    """Fails if a score that is the same for all sequences breaks its figures."""
    edges = _edges(np.zeros(40))
    assert edges[0] < 0 < edges[-1]
    _curves({"loss": np.zeros(40)}, np.arange(40) < 20)(Figure())


def result_with(**fields: Any) -> dict[str, Any]:
    scores = np.random.default_rng(0).normal(size=60)
    found = study.quality({"loss": scores}, np.arange(60) < 30, seed=0, progress=False)
    return {
        "model": "a/<i>model</i>", "data": {"members": "x/<u>a</u>", "non_members": "b"},
        "members": 30, "non_members": 30, "tokens": 60, "scores": found, "blind": {},
        "warning": None, "best": "loss", "expected": None, "notes": ["a <s>note</s>"],
        "reference": None, "references": [], "shadows": None, "command": ["fastmem", "<b>"],
        **fields,
    }  # fmt: skip


def test_the_page_is_escaped_and_tells_what_it_cannot() -> None:
    """Fails if a name, a note or a text is taken for HTML, a rate that cannot be told is a number,
    or a study at chance does not say so."""
    columns = {
        "sequence": np.arange(60),
        "is_member": np.arange(60) < 30,
        "loss": np.random.default_rng(0).normal(size=60),
    }
    case = {"sequence": 1, "source": "<u>s</u>", "score": 1.0, "rank": 0.5, "is_cut": True}
    cases = {kind: [case | {"text": "<script>evil()</script>"}] for kind in study.KINDS}
    page = render_membership_page(result_with(), columns, cases)
    for tag in ("<i>", "<u>", "<s>", "<b>", "<script>evil"):
        assert tag not in page
    assert page.count("&lt;script&gt;evil()&lt;/script&gt;…") == 4
    assert page.count(">cannot be told<") == 2
    assert "cannot be told: 1 % of 30 non-members is less than one sequence" in page
    assert "At chance" in page
    assert "evil" not in render_membership_page(result_with(), columns, cases, text=False)
