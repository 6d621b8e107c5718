"""The page of a folder of extraction: rates against the prefix, and sequences that come out."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmem.base.storage import Row, read_result, write_whole
from fastmem.base.terminal import duration
from fastmem.memorization.extraction import extraction_probability
from fastmem.models.extraction.folder import PAGE, PASSAGES, RATES
from fastmem.report.figures import COLOURS, MARKERS, Draw, legend, pictures, with_errors
from fastmem.report.html import template
from fastmem.report.score_page import command_of, environment_of, last_name, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_PLAIN = {
    "temperatures": [1.0], "probability": 0.5, "bos": "auto", "errors": "strict", "dtype": "auto"
}  # fmt: skip
"""Settings that a command leaves out."""
STRIP = 0.9
"""Height of a heat map in inches."""
SETS = {"train": "training sequences", "test": "held-out sequences"}


def write_extraction_page(folder: Path, text: bool = True) -> Path:
    """Writes extraction.html from the files of a folder of extraction; gives its path.

    Args:
        folder: with extraction.json and passages.json.
        text: False leaves out the text of sequences.

    Raises:
        ValueError: the folder holds no finished rates.
    """
    if not (folder / RATES).exists():
        raise ValueError(f"{folder} is not finished: give the same fastmem extract command again")
    summary = read_result(folder / RATES, "prefixes", "settings")
    passages = read_result(folder / PASSAGES, "train")
    page = render_extraction_page(summary, passages, folder.resolve().name, text)
    write_whole(folder / PAGE, page.encode(errors="replace"))
    return folder / PAGE


def render_extraction_page(summary: Row, passages: Row, name: str, text: bool = True) -> str:
    """The page as HTML, the same text for the same rates.

    Args:
        summary: the content of extraction.json.
        passages: the content of passages.json.
        name: the name of the folder, for the command that measures again.
        text: False leaves out the text of sequences.
    """
    last = summary["prefixes"][-1]
    return template("extraction.html").render(
        summary=summary,
        model=last_name(summary["model"]),
        data=last_name(summary["data"]),
        headline=(_percent(last["train"]["exact"]["estimate"]), last["prefix"]),
        verdict=verdict(summary),
        facts=_facts(summary),
        figures=_figures(summary),
        rows=_rows(summary),
        ways=last["train"]["sampled"],
        decoded="approximate" in last["train"],
        passages=[
            (SETS[of], [_shown(passage, text) for passage in passages[of]])
            for of in SETS
            if passages.get(of)
        ],
        maps=[_map(one, summary["samples"], text) for one in passages.get("slide", ())],
        with_text=text,
        command=command(summary, name),
        environment=environment_of(
            summary, model="model", data="training sequences", test="held-out sequences"
        ),
        rate=rate,
    )


def verdict(summary: Row) -> str:
    """One sentence on the longest prefix: the rate of the training set beside the held-out set."""
    last = summary["prefixes"][-1]
    train, test = last["train"], last["test"]
    unit = "windows" if summary["slide"] else "sequences"
    sentence = (
        f"After {last['prefix']:,} tokens greedy decoding returns the rest of "
        f"{rate(train['exact'])} of {train['sequences']:,} training {unit} exactly"
    )
    if test is None:
        return f"{sentence}. Without held-out {unit} (--test), part of it may be prediction."
    low, high = train["exact"]["low"], test["exact"]["high"]
    sentence += f", and of {rate(test['exact'])} of {test['sequences']:,} held-out {unit}"
    if low is None or high is None:
        return f"{sentence}. Windows overlap, so fewer than 20 documents have no interval."
    if low > high:
        return f"{sentence}: the intervals are apart, so the model reproduces its training data."
    return f"{sentence}: the intervals overlap, so prediction alone may explain the rate."


def _by_prefix(entries: Sequence[Row]) -> str:
    """The rates of exact extraction, a clause for each prefix."""
    clauses = []
    for entry in entries:
        train, test = (entry[of] and _percent(entry[of]["exact"]["estimate"]) for of in SETS)
        beside = "" if test is None else f" and {test} of the held-out sequences"
        clauses.append(f"after {entry['prefix']:,} tokens {train}{beside}")
    return f"Returned exactly of the training sequences: {'; '.join(clauses)}."


def rate(value: Row) -> str:
    """A rate with its interval as text, such as 12 % [8.6 %, 16 %]."""
    text = _percent(value["estimate"])
    if value["low"] is None:
        return text
    return f"{text} [{_percent(value['low'])}, {_percent(value['high'])}]"


def _percent(value: float) -> str:
    """A fraction in percent to two digits, without an exponent.

    >>> [_percent(x).split()[0] for x in (1.0, 0.0312, 0.0, 0.000021, 1e-9)]
    ['100', '3.1', '0', '0.0021', '<0.0001']
    """
    number = 100 * value
    text = f"{number:.0f}" if number >= 9.95 else f"{number:.2g}"
    return ("<0.0001" if 0 < number < 1e-4 else text) + "\N{NO-BREAK SPACE}%"


def _facts(summary: Row) -> list[tuple[str, str]]:
    first = summary["prefixes"][0]
    facts = []
    for of, what in SETS.items():
        if first[of] is not None:
            short = first[of]["too_short"]
            count = f"{first[of]['sequences']:,}"
            facts.append((what.capitalize(), count + f", {short:,} too short" * bool(short)))
    slide = summary["slide"]
    runs = (
        [run["tokens"] for run in slide["longest_runs"] if run["set"] == "train"] if slide else []
    )
    if runs:
        facts.append(("Longest run verbatim", f"{max(runs):,} tokens"))
    longest = max(entry["train"]["matched_tokens"]["longest"] for entry in summary["prefixes"])
    settings = summary["settings"]
    bos = summary["bos"]
    return [
        *facts,
        ("Longest suffix verbatim", f"{longest:,} tokens"),
        ("Suffix", "the rest" if settings["suffix"] is None else f"{settings['suffix']:,} tokens"),
        ("Samples", f"{summary['samples']:,}"),
        ("First token", f"{bos['text']} ({bos['is']}) before it" if bos["text"] else "as it is"),
        ("Parameters", f"{summary['parameters']:,}, {summary['dtype']}"),
        ("Time", duration(summary["seconds"])),
    ]


def _figures(summary: Row) -> list[tuple[str, str, list[str]]]:
    """Title, sentence and pictures of rates against the prefix."""
    n, p = summary["samples"], summary["prefixes"][0]["train"]["sampled"][0]["discoverable"]
    found = [
        (
            "Rate against prefix",
            _by_prefix(summary["prefixes"]),
            _against_prefix(summary, lambda entry: {"greedy, exact": entry["exact"]}),
        ),
        (
            "Rate with samples",
            f"The fraction of sequences whose suffix {n:,} samples hold with a probability of at "
            f"least {p['probability']:g}.",
            _against_prefix(
                summary,
                lambda entry: {way_in_words(way): way["discoverable"] for way in entry["sampled"]},
            ),
        ),
    ]
    return [
        (title, sentence, pictures(draw, f"x{i}", sentence))
        for i, (title, sentence, draw) in enumerate(found)
    ]


def way_in_words(way: Row) -> str:
    """A way of sampling in words."""
    text = f"temperature {way['temperature']:g}"
    return text + (f", top-k {way['top_k']}" if way["top_k"] else "")


def _against_prefix(summary: Row, rates: Any) -> Draw:
    """Draws rates of both sets against tokens of prefix, with 95 % intervals."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        prefixes = [entry["prefix"] for entry in summary["prefixes"]]
        highest = 0.0
        for of, colour in zip(SETS, COLOURS, strict=False):
            entries = [entry[of] for entry in summary["prefixes"] if entry[of] is not None]
            if not entries:
                continue
            lines = [rates(entry) for entry in entries]
            for place, label in enumerate(lines[0]):
                estimates, errors = with_errors([line[label] for line in lines])
                highest = max(highest, float(100 * (estimates + errors[1]).max()))
                # The sets stand a little apart, so that their bars do not hide each other.
                shift = 0.985 if of == "train" else 1.015
                axes.errorbar(
                    [prefix * shift for prefix in prefixes],
                    100 * estimates,
                    100 * errors,
                    color=colour,
                    marker=MARKERS[place % len(MARKERS)],
                    linestyle=("-", "--", ":", "-.")[place % 4],
                    capsize=3,
                    label=f"{SETS[of]}, {label}",
                )
        axes.set_xscale("log")
        axes.set_xticks(prefixes, [f"{prefix:,}" for prefix in prefixes])
        axes.minorticks_off()
        if len(prefixes) == 1:
            axes.set_xlim(prefixes[0] / 2, prefixes[0] * 2)
        top = min(102.0, max(5.0, 1.1 * highest))
        axes.set(xlabel="tokens of prefix", ylabel="% of sequences", ylim=(-0.02 * top, top))
        legend(figure, axes.get_legend_handles_labels()[0])

    return draw


def _rows(summary: Row) -> list[Row]:
    """The rows of the table: one a prefix and set."""
    rows = []
    for entry in summary["prefixes"]:
        for of, what in SETS.items():
            if entry[of] is not None:
                rows.append({"prefix": entry["prefix"], "what": what, **entry[of]})
    return rows


def _shown(passage: Row, text: bool) -> Row:
    """A sequence with its tokens as (text, class, what to say of it)."""
    shown = {name: passage[name] for name in passage if name not in ("tokens", "texts")}
    shown["tokens"] = []
    if not text:
        return shown
    tokens = passage["tokens"]
    texts = passage["texts"] or [f"{token} " for token in tokens]
    prefix, end = passage["prefix"], passage["prefix"] + passage["matched"]
    for place, (piece, token) in enumerate(zip(texts, tokens, strict=True)):
        kind = "given" if place < prefix else "verbatim" if place < end else "other"
        shown["tokens"].append((visible(piece), kind, f"token {token}, {WORDS[kind]}"))
    shown["more"] = passage["length"] - len(tokens)
    return shown


def _map(one: Row, samples: int, text: bool) -> Row:
    """A document with its heat map, and its text as (text, percent, what to say of it)."""
    shown = {name: one[name] for name in ("source", "length", "run", "start")}
    shown["of"] = SETS[one["set"]]
    heat = one["heat"]
    label = f"probability by place in {one['source']}"
    draw = _strip(_chances(heat["bits"], samples), heat["tokens_each"], one["run"])
    name = f"m{one['set']}{one['start']}{one['length']}"
    shown["pictures"] = pictures(draw, name, label, STRIP)
    shown["end"] = one["start"] + len(one["tokens"])
    shown["tokens"] = []
    if text:
        texts = one["texts"] or [f"{token} " for token in one["tokens"]]
        chances = _chances(one["bits"], samples)
        for piece, chance in zip(texts, chances, strict=True):
            shown["tokens"].append((visible(piece), round(100 * chance), f"{chance:.2%}"))
    return shown


def _chances(bits: list[float | None], samples: int) -> list[float]:
    """The probability that the samples hold a suffix; 0 where none is measured."""
    known = np.array([np.inf if value is None else value for value in bits])
    return [float(chance) for chance in extraction_probability(known, samples)]


def _strip(chances: list[float], each: int, run: Row) -> Draw:
    """Draws a strip along a document, darker where a suffix is more probable."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        for place, chance in enumerate(chances):
            if chance >= 0.005:
                axes.bar(
                    place * each, 1, each, align="edge", color=COLOURS[1], alpha=chance, linewidth=0
                )
        if run["tokens"]:
            ends = [run["start"], run["start"] + run["tokens"]]
            axes.plot(ends, [-0.12, -0.12], color=COLOURS[0], linewidth=3)
        axes.set(xlim=(0, len(chances) * each), ylim=(-0.25, 1), yticks=[], xlabel="token")
        axes.grid(visible=False)

    return draw


WORDS = {
    "given": "in the prefix",
    "verbatim": "returned verbatim",
    "other": "after the first error",
}


def command(summary: Row, out: str) -> str | None:
    """The command that measures again; None if no command can name all that was measured."""
    given = {**summary["settings"], "samples": summary["samples"]}
    given |= {name: summary[name] for name in ("device_map", "trust_remote_code")}
    sampled = summary["prefixes"][0]["train"]["sampled"][0]["discoverable"]
    given["probability"] = sampled["probability"]
    given["own_data"] = summary.get("own_data")
    if summary.get("own_test"):
        given["test"] = None
    return None if summary["in_memory"] else command_of("extract", summary, given, _PLAIN, out)
