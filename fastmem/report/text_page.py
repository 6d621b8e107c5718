"""The page of a text study: text.html, its figures and their data."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastmem.base.storage import Row, write_whole
from fastmem.base.terminal import duration
from fastmem.report.figures import by_shape, write_figure
from fastmem.report.held_out_sections import membership_section
from fastmem.report.html import environment, template, with_figures
from fastmem.report.reproduce import budget
from fastmem.report.score_page import visible
from fastmem.report.section import Section
from fastmem.report.sections import interval
from fastmem.report.text_exhibits import headline, text_sections
from fastmem.report.text_runs import Ranked, flat, net_of_sizes, ranked
from fastmem.report.text_sequences import most_memorized
from fastmem.report.text_study import TextStudy

PAGE = "text.html"
SEQUENCES = 5
"""The exhibits before the table of sequences; the last shows what is memorized most."""


def write_text_page(study: TextStudy, text: Row, folder: Path, show_text: bool = True) -> Path:
    """Writes text.html, and in figures/ each figure as PNG, SVG and PDF and its data as CSV.

    Args:
        study: from `read_text_study`, with at least one finished run.
        text: the content of text.json.
        folder: where to write.
        show_text: False leaves out the text of sequences and the names of their documents, in all
            files.

    Returns:
        The path of text.html.
    """
    top = ranked(study)
    sections = text_sections(study, text, top, show_text)
    if text.get("membership"):
        sections = [*sections, membership_section(text)]
    for section in sections:
        figure = folder / "figures" / section.name
        if section.draw:
            write_figure(section.draw, figure)
        if section.data:
            write_whole(figure.with_suffix(".csv"), section.csv().encode(errors="replace"))
    page = render_text_page(study, text, sections, top, folder.resolve().name, show_text)
    write_whole(folder / PAGE, page.encode(errors="replace"))
    return folder / PAGE


def render_text_page(
    study: TextStudy,
    text: Row,
    sections: Sequence[Section],
    top: Ranked,
    name: str,
    show_text: bool = True,
) -> str:
    """The page as HTML, the same text for the same folder.

    Args:
        study, text, show_text: as in `write_text_page`.
        sections: from `text_sections`.
        top: from `ranked(study)`.
        name: the name of the folder.
    """
    runs = flat(text)
    models = by_shape(runs)
    best, found = headline(models)
    sequences = most_memorized(top, study, show_text)
    return template("text.html").render(
        name=name,
        best=best,
        found=found,
        reference=study.reference,
        compressors=study.compressors,
        facts=_facts(study, runs),
        before=with_figures(sections[:SEQUENCES]),
        after=with_figures(sections[SEQUENCES:]),
        missing=[section for section in sections if not section.draw],
        sequences=[one | {"shown": visible(one.get("text", ""))} for one in sequences],
        show_text=show_text,
        of=top.run,
        corpus=_corpus(study, text),
        models=[_model(study, model) for model in models],
        runs=[one for model in models for one in model],
        environment=environment([run.row for run in study.runs]),
        interval=interval,
    )


def _facts(study: TextStudy, runs: Sequence[Row]) -> list[tuple[str, str]]:
    sizes = sorted({run["parameters"] for run in runs})
    counts, seeds = sorted({run["count"] for run in runs}), len({run["seed"] for run in runs})
    train, rows = study.corpus.train, [run.row for run in study.runs]
    return [
        ("Models", f"{len(by_shape(runs))}"),
        ("Parameters", _span(sizes)),
        ("Training sequences", _span(counts)),
        ("Runs", f"{len(runs):,}, {seeds} seed{'s' * (seeds > 1)}"),
        ("Tokens", f"V = {train.vocab:,}, S = {train.length:,}"),
        (
            "Reference",
            f"{study.reference['name']}: {study.reference['bits_per_byte']:.2f} bits a byte",
        ),
        ("Budget", budget(rows[0])),
        ("Compute", duration(sum(row["seconds"] or 0.0 for row in rows))),
    ]


def _span(values: Sequence[int]) -> str:
    ends = dict.fromkeys((values[0], values[-1]))
    return " to ".join(f"{value:,}" for value in ends)


def _corpus(study: TextStudy, text: Row) -> list[tuple[str, str]]:
    """Counts of the corpus as pairs of a name and a number."""
    corpus, counts = text["corpus"], study.corpus.counts
    named = [
        ("Documents", corpus["documents"]),
        ("Bytes", corpus["bytes"]),
        ("Documents left out: white space alone", counts.get("blank")),
        ("Documents left out: binary", counts.get("binary")),
        ("Near duplicates removed, documents", corpus["near_duplicates"]),
        ("Exact duplicates removed, sequences", corpus["exact_duplicates"]),
        ("Tokens dropped at the ends of documents", counts.get("dropped_tokens")),
        ("Sequences", corpus["sequences"]),
        *((f"Sequences of the split {name}", n) for name, n in corpus["splits"].items()),
    ]
    return [(name, f"{value:,}") for name, value in named if value is not None]


def _model(study: TextStudy, runs: Sequence[Row]) -> dict[str, Any]:
    """A row of the table of models: its net unintended memorization at the best size."""
    first = runs[0]
    net = max(net_of_sizes(runs), key=lambda size: float(size["estimate"]))
    at = [run for run in runs if run["count"] == net["count"]]
    mixture, gross, others, of_mixture = (
        sum(run[f"reference_{name}_bits"] for run in at) / len(at)
        for name in ("mixture", "max", "held_out_max", "held_out_mixture")
    )
    return first | {
        "capacity_bits": study.capacity_bits.get(f"{first['layers']}x{first['width']}"),
        "count": net["count"],
        "net": net,
        "mixture": mixture - of_mixture,
        "gross": gross,
        "others": others,
    }
