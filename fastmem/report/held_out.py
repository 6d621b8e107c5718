"""Held-out sequences beside members: bits of each, and double descent.

S tokens a sequence, V vocabulary. Bits are those of the S - 1 coded tokens (strict).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import log2
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastmem.base.stats import Floats
from fastmem.base.storage import Row
from fastmem.data.files.parquet import pyarrow_parquet
from fastmem.report.figures import COLOURS, MUTED, key, legend, log_axes, looks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BINS = 48
PANELS = 3
AGAIN = "delete it, and its row in rows/ too if the run is to be trained again for it"


@dataclass(frozen=True)
class Sample:
    """What each sequence costs after one run."""

    row: Row
    members: Floats
    """(N,) bits of the sequences that it was trained on."""
    held_out: Floats
    """(M,) bits of others of the same kind."""

    @property
    def auc(self) -> float:
        """The share of pairs of a member and a held-out sequence where the member costs less.

        Computes `(members[:, None] < held_out).mean()`, equal ones counted half: the area under
        the ROC curve of a threshold on bits.
        """
        others = np.sort(self.held_out)
        above = len(others) - np.searchsorted(others, self.members, "right")
        equal = len(others) - np.searchsorted(others, self.members, "left") - above
        return float((above + equal / 2).mean() / len(others))


def uniform_bits(row: Row) -> float:
    """What a sequence costs where every token is as likely as any other: (S - 1) · log2 V."""
    return float((row["model"]["length"] - 1) * log2(row["model"]["vocab"]))


def read_samples(rows: Sequence[Row], folder: Path) -> list[Sample]:
    """Up to three runs of the largest model that has sequence_bits/: a small data set, the one
    that it memorized most of, and the largest.

    Raises:
        ValueError: pyarrow is not installed, or a file that is not one of sequence bits.
    """
    stored = {path.stem for path in (folder / "sequence_bits").glob("*.parquet")}
    having = [row for row in rows if row["status"] == "done" and row["key"] in stored]
    if not having:
        return []
    largest = max(having, key=lambda row: (row["parameters"], row["precision"] == "fp32"))
    alike = [row for row in having if _model(row) == _model(largest)]
    by_count = {row["sequences"]["count"]: row for row in sorted(alike, key=_seed, reverse=True)}
    best = max(alike, key=lambda row: row["memorized_bits"]["strict"])["sequences"]["count"]
    counts = sorted({min(by_count), best, max(by_count)})
    return [_read(by_count[count], folder) for count in counts]


def _read(row: Row, folder: Path) -> Sample:
    path = folder / "sequence_bits" / f"{row['key']}.parquet"
    parquet = pyarrow_parquet()
    try:
        table = parquet.read_table(path, columns=["bits", "held_out"])
        bits = table["bits"].to_numpy().astype(np.float64)
        held_out = table["held_out"].to_numpy().astype(bool)
    except (OSError, KeyError, ValueError) as error:
        raise ValueError(
            f"{path} has no columns bits and held_out ({str(error).splitlines()[0]}): {AGAIN}"
        ) from None
    if not np.isfinite(bits).all() or held_out.all() or not held_out.any():
        raise ValueError(
            f"{path} must have finite bits of members and of held-out sequences, and has "
            f"{np.isfinite(bits).sum()} finite of {len(bits)}, {held_out.sum()} held out: {AGAIN}"
        )
    return Sample(row, bits[~held_out], bits[held_out])


def histogram(samples: Sequence[Sample]) -> list[Row]:
    """The shares of members and of held-out sequences in each of 48 equal bins."""
    everything = np.concatenate([np.r_[s.members, s.held_out] for s in samples])
    edges = np.linspace(min(0.0, everything.min()), everything.max(), BINS + 1)
    records = []
    for sample in samples:
        shares = [
            np.histogram(bits, edges)[0] / len(bits) for bits in (sample.members, sample.held_out)
        ]
        for low, high, member, other in zip(edges[:-1], edges[1:], *shares, strict=True):
            records.append(
                {
                    "run": sample.row["key"],
                    "count": sample.row["sequences"]["count"],
                    "bits_from": float(low),
                    "bits_to": float(high),
                    "share_of_members": float(member),
                    "share_of_held_out": float(other),
                }
            )
    return records


def bits_of_sequences(figure: "Figure", samples: Sequence[Sample]) -> None:
    """The distribution of bits per sequence, members against held-out, a panel a data set size."""
    records = histogram(samples)
    panels = figure.subplots(len(samples), sharex=True, squeeze=False)[:, 0]
    for axes, sample in zip(panels, samples, strict=True):
        bins = [record for record in records if record["run"] == sample.row["key"]]
        edges = [*(record["bits_from"] for record in bins), bins[-1]["bits_to"]]
        for name, colour, label in (
            ("share_of_members", COLOURS[0], "members"),
            ("share_of_held_out", COLOURS[1], "held-out sequences"),
        ):
            shares = [record[name] for record in bins]
            axes.stairs(shares, edges, fill=True, color=colour, alpha=0.25, linewidth=0)
            axes.stairs(shares, edges, color=colour, linewidth=1.6, label=label)
        axes.axvline(
            uniform_bits(sample.row),
            color=MUTED,
            linewidth=1,
            linestyle=(0, (4, 3)),
            label="every token as likely",
        )
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
        text = f"N = {sample.row['sequences']['count']:,}"
        axes.annotate(
            text, (1, 1), (-6, -4), "axes fraction", "offset points", va="top", ha="right"
        )
    panels[-1].set_xlabel("bits of a sequence, after its first token")
    panels[0].set_title("Bits of a sequence, members and held-out: share of each")
    legend(figure, panels[0].get_legend_handles_labels()[0])


def descent(summary: dict[str, Any], rows: Sequence[Row]) -> list[Row]:
    """Mean bits of a held-out sequence over H(X) / capacity, for the runs that have it.

    capacity is that of the model at its precision, so that 1 is where its data fill it.
    """
    capacities = {
        _model(model | {"model": {name: model[name] for name in rows[0]["model"]}}): model[
            "capacity_bits"
        ]["published"]
        for model in summary["models"]
    }
    records = []
    for row in rows:
        capacity = capacities[_model(row)]
        scored = row["status"] == "done" and row.get("held_out_bits") is not None
        if not scored or not capacity or capacity["estimate"] <= 0:
            continue
        shape = {name: row["model"][name] for name in ("layers", "width", "heads")}
        records.append(
            {
                **shape,
                "parameters": row["parameters"],
                "precision": row["precision"],
                "count": row["sequences"]["count"],
                "seed": row["seed"],
                "entropy_over_capacity": row["entropy_bits"] / capacity["estimate"],
                "held_out_bits": row["held_out_bits"],
                "uniform_bits": uniform_bits(row),
            }
        )
    return records


def held_out_against_load(figure: "Figure", records: Sequence[Row]) -> None:
    """Double descent: mean bits of a held-out sequence over H(X) / capacity."""
    from matplotlib.lines import Line2D

    axes = log_axes(figure, y=False)
    models: dict[tuple[Any, ...], list[Row]] = {}
    for record in sorted(records, key=lambda r: (r["parameters"], r["precision"], r["count"])):
        model = tuple(record[name] for name in ("layers", "width", "heads", "precision"))
        models.setdefault(model, []).append(record)
    firsts = [of_model[0] for of_model in models.values()]
    for of_model, look in zip(models.values(), looks(firsts), strict=True):
        x = [record["entropy_over_capacity"] for record in of_model]
        y = [record["held_out_bits"] for record in of_model]
        axes.plot(x, y, look.marker, color=look.colour, alpha=0.5, markersize=5, markeredgewidth=0)
        sizes = sorted(set(x))
        means = [np.mean([b for a, b in zip(x, y, strict=True) if a == size]) for size in sizes]
        axes.plot(sizes, means, color=look.colour, linestyle=look.dash, linewidth=1.8)
    style: dict[str, Any] = {"color": MUTED, "linewidth": 1.2, "linestyle": (0, (4, 3))}
    axes.axhline(records[0]["uniform_bits"], **style)
    axes.axvline(1.0, color=MUTED, linewidth=0.8)
    axes.set(xlabel="entropy of the data / capacity", ylabel="bits of a held-out sequence")
    axes.set_title("Held-out sequences cost most where the data fill the model")
    legend(figure, [*key(firsts), Line2D([], [], **style, label="every token as likely")])


def _model(row: Row) -> tuple[Any, ...]:
    return (*row["model"].values(), row["precision"])


def _seed(row: Row) -> int:
    return int(row["seed"])
