"""The page of a folder of scores: the distribution of bits, and passages coloured by their bits."""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fastmem.base.storage import Row, read_result, write_whole
from fastmem.base.terminal import duration
from fastmem.models.scoring.folder import PAGE, PASSAGES
from fastmem.models.scoring.scores import Scores, read_scores
from fastmem.report.figures import COLOURS, Draw, pictures
from fastmem.report.html import template

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOWN = 200
"""Most documents in the table."""
LEVELS = 8
"""Shades of tokens; each is for as many bits as `LEVEL_BITS`, the last also for more."""
LEVEL_BITS = 2
FEW = 20
"""Documents that have a distribution."""
_PLAIN = {"bos": "auto", "errors": "strict", "dtype": "auto"}
"""Settings that a command leaves out."""
_UNNAMED = ("model", "data", "tokenizer", "own_data")
"""Settings that are not flags."""


def write_score_page(folder: Path, text: bool = True) -> Path:
    """Writes score.html from the files of a folder of scores; gives its path.

    Args:
        folder: with summary.json, documents.parquet and passages.json.
        text: False leaves out the text of passages.

    Raises:
        ValueError: the folder holds no finished scores.
    """
    found = read_scores(folder)
    passages = read_result(folder / PASSAGES, "token_counts")
    page = render_score_page(found, passages, folder.resolve().name, text)
    write_whole(folder / PAGE, page.encode(errors="replace"))
    return folder / PAGE


def render_score_page(found: Scores, passages: Row, name: str, text: bool = True) -> str:
    """The page as HTML, the same text for the same scores.

    Args:
        found: the summary and the documents.
        passages: the content of passages.json.
        name: the name of the folder, for the command that scores again.
        text: False leaves out the text of passages.
    """
    summary, documents = found.summary, found.documents
    per_byte = summary["bits_per_byte"]
    unit = "token" if per_byte is None else "byte"
    return template("score.html").render(
        summary=summary,
        model=last_name(summary["model"]),
        data=last_name(summary["data"]),
        headline=(summary["bits_per_token"] if per_byte is None else per_byte, unit),
        notices=notices(summary),
        facts=_facts(summary),
        figures=_figures(summary, documents, passages),
        passages=[
            (title, [_shown(passage, text) for passage in passages[end]])
            for title, end in (("Most surprising", "most"), ("Least surprising", "least"))
        ],
        with_text=text,
        levels=[(level, level * LEVEL_BITS) for level in range(LEVELS)],
        documents=_rows(documents),
        command=command(summary, name),
        environment=environment_of(summary, model="model", data="data"),
    )


def notices(summary: Row) -> list[str]:
    """Sentences that a reader of the numbers must know."""
    found = [summary["reason"]] if summary["reason"] else []
    if lossy := summary.get("lossy"):  # earlier versions did not look
        of, all_of = ("1 document", "Its") if lossy == 1 else (f"{lossy:,} documents", "Their")
        found.append(
            f"The tokenizer does not give the text of {of} back. {all_of} bits a byte leave out "
            "what it drops."
        )
    return found


def _facts(summary: Row) -> list[tuple[str, str]]:
    facts = [
        ("Documents", f"{summary['documents']:,}"),
        ("Tokens", f"{summary['tokens']:,}"),
        ("Bits", f"{summary['bits']:,.0f}"),
        ("Bits a token", f"{summary['bits_per_token']:.3f}"),
    ]
    if summary["bytes"] is not None:
        zlib = f"{summary['zlib_bits_per_byte']:.3f}"
        facts += [("Bytes of text", f"{summary['bytes']:,}"), ("zlib, bits a byte", zlib)]
    bos, context = summary["bos"], summary["context"]
    first = f"{bos['text']} ({bos['is']}) before it" if bos["text"] else "not coded"
    window = "whole documents" if context is None else f"{context:,} tokens"
    if context and summary["stride"] != context:
        window += f", stride {summary['stride']:,}"
    return [
        *facts,
        ("First token", first),
        ("Context", window),
        ("Parameters", f"{summary['parameters']:,}, {summary['dtype']}"),
        ("Time", f"{duration(summary['seconds'])}, {summary['tokens_per_second']:,.0f} tokens/s"),
    ]


def _figures(
    summary: Row, documents: dict[str, NDArray[Any]], passages: Row
) -> list[tuple[str, str, list[str]]]:
    """Title, sentence and pictures of the distributions over tokens and over documents."""
    found: list[tuple[str, str, Draw]] = []
    counts, width = np.asarray(passages["token_counts"]), passages["bin_bits"]
    if counts.sum():
        half, tenth = (_quantile(counts, q) * width for q in (0.5, 0.9))
        sentence = (
            f"Half of the {summary['coded_tokens']:,} tokens cost less than about {half:.1f} bits, "
            f"a tenth more than {tenth:.1f}."
        )
        last = max(8, int(_quantile(counts, 0.999)) + 1)
        shown = np.append(counts[:last], counts[last:].sum())
        edges = np.arange(last + 2) * width
        found.append(("Bits of tokens", sentence, _histogram(shown, edges, "tokens")))
    coded = documents["coded_tokens"] > 0
    means = documents["bits"][coded] / documents["coded_tokens"][coded]
    if len(means) >= FEW:
        low, middle, high = np.quantile(means, [0.1, 0.5, 0.9])
        sentence = (
            f"The middle document costs {middle:.2f} bits a token; a tenth cost less than "
            f"{low:.2f}, a tenth more than {high:.2f}."
        )
        bins = int(np.clip(np.sqrt(len(means)), 5, 60))
        drawn, edges = np.histogram(means, bins)
        found.append(("Bits of documents", sentence, _histogram(drawn, edges, "documents")))
    return [
        (title, sentence, pictures(draw, title[8:], sentence)) for title, sentence, draw in found
    ]


def _quantile(counts: NDArray[Any], q: float) -> float:
    """The place in the bins below which a fraction q of the tokens are."""
    sums = np.cumsum(counts)
    place = int(np.searchsorted(sums, q * sums[-1]))
    before = sums[place] - counts[place]
    return place + float(q * sums[-1] - before) / max(1, int(counts[place]))


def _histogram(counts: NDArray[Any], edges: NDArray[Any], what: str) -> Draw:
    """Draws the fraction of tokens or documents in bins of bits a token."""

    def draw(figure: "Figure") -> None:
        axes = figure.add_subplot()
        axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=COLOURS[0], linewidth=0)
        axes.set(xlabel="bits a token", ylabel=f"% of {what}", xlim=(edges[0], edges[-1]))
        axes.grid(axis="x", visible=False)

    return draw


def _shown(passage: Row, text: bool) -> Row:
    """A passage with its mean, and its tokens as (text, level, what to say of it)."""
    bits, tokens = passage["bits"], passage["tokens"]
    shown = {
        "source": passage["source"],
        "position": passage["position"],
        "count": len(bits),
        "mean": sum(bits) / len(bits),
        "tokens": [],
    }
    if not text:
        return shown
    texts = passage["texts"] or [f"{token} " for token in tokens]
    waiting: list[float] = []
    ids: list[int] = []
    for place, (piece, token, value) in enumerate(zip(texts, tokens, bits, strict=True)):
        waiting.append(value)
        ids.append(token)
        if not piece and place + 1 < len(bits):
            continue  # part of a character, which is whole with a later token
        mean = sum(waiting) / len(waiting)
        level = min(LEVELS - 1, int(mean / LEVEL_BITS))
        many = f"{len(ids)} tokens {', '.join(map(str, ids))}" if len(ids) > 1 else f"token {token}"
        shown["tokens"].append((visible(piece), level, f"{sum(waiting):.2f} bits, {many}"))
        waiting, ids = [], []
    return shown


def visible(text: str) -> str:
    """Text with signs for characters that cannot be seen.

    >>> visible("a\\tb\\n")
    'a→\\tb↵\\n'
    """
    signs = {code: chr(0x2400 + code) for code in range(32)} | {0x7F: "\u2421"}
    return text.translate(signs | {9: "→\t", 10: "↵\n"})


def _rows(documents: dict[str, NDArray[Any]]) -> list[Row]:
    """The first documents, one dict each; None for what is unknown."""
    rows = []
    for place in range(min(SHOWN, len(documents["document"]))):
        row = {name: column[place] for name, column in documents.items()}
        row = {name: None if value != value else value for name, value in row.items()}
        row["bits_per_token"] = row["bits"] / row["coded_tokens"] if row["coded_tokens"] else None
        row["bits_per_byte"] = row["bits_per_byte"] if row["coded_tokens"] else None
        size = row["bytes"]
        row["zlib_per_byte"] = row["zlib_bits"] / size if size else None
        rows.append(row)
    return rows


def command(summary: Row, out: str) -> str | None:
    """The command that scores again; None if no command can name all that was scored."""
    given = summary["settings"]
    return None if given["in_memory"] else command_of("score", summary, given, _PLAIN, out)


def command_of(name: str, summary: Row, given: Row, plain: Row, out: str) -> str | None:
    """The command that measures documents again; None if its flags cannot name both types.

    Args:
        name: of the command.
        summary: with the model and the data.
        given: values by flag; None, False and [] are left out.
        plain: the defaults of other flags.
        out: the folder.
    """
    if given["dtype"] != "auto" and given["token_dtype"] is not None:
        return None
    words = ["fastmem", name, summary["model"]] + [summary["data"]] * (not given.get("own_data"))
    if given.get("shard"):
        words = ["torchrun", "--nproc-per-node", f"{summary['ranks']}", "-m", *words]
    for flag, value in given.items():
        if flag in _UNNAMED or value in (None, False, [], plain.get(flag)):
            continue
        words.append("--dtype" if flag == "token_dtype" else f"--{flag.replace('_', '-')}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [f"{one:g}" if isinstance(one, float) else f"{one}" for one in values]
    return shlex.join([*words, "--out", out])


def environment_of(summary: Row, **names: str) -> list[tuple[str, str]]:
    """How documents were measured, by name; `names` are those of fields of the summary."""
    through = {"hidden": "hidden states"}.get(summary["through"], summary["through"])
    return [
        *((text, summary[name] or "none") for name, text in names.items()),
        ("measured through", through),
        *([("because", summary["reason"])] if summary["reason"] else []),
        ("device", summary["device"]),
        *([("ranks", f"{summary['ranks']}")] if summary.get("ranks", 1) > 1 else []),
        *summary["versions"].items(),
    ]


def last_name(path: str) -> str:
    """The name of a file or a model, without its folders."""
    return path.rstrip("/").rpartition("/")[2] or path
