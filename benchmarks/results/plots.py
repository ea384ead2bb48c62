"""The plots of docs/results.md."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from peft_cartridges.evaluation import Estimate
from peft_cartridges.evaluation.cost import Cost
from peft_cartridges.evaluation.report import pyplot

from .records import Record, Results, Row


@contextmanager
def _axes(path: Path) -> Iterator[Any]:
    plt = pyplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(figsize=(7.5, 4.8))
    axes.grid(alpha=0.3)
    yield axes
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(axes: Any, points: Iterable[tuple[float, Estimate]], **style: Any) -> None:
    """Values with their intervals, in the order of x."""
    drawn = sorted(((x, f) for x, f in points if not math.isnan(f.value)), key=lambda point: point[0])
    spread = [[0.0 if math.isnan(f.low) else f.value - f.low for _, f in drawn]]
    spread += [[0.0 if math.isnan(f.high) else f.high - f.value for _, f in drawn]]
    axes.errorbar([x for x, _ in drawn], [f.value for _, f in drawn], yerr=spread, marker="o", capsize=3, **style)


def plot_baselines(results: Results, rows: Sequence[Row], path: Path) -> None:
    """The gap closed, and how far the model moves off the text, with intervals: a row for each way, the best first, and
    behind its name n, documents / items. What is far off the others is cut, with its figure at the edge."""
    drawn = []
    for label, records, system in rows:
        on, off = (results.figure(records, str(system), metric) for metric in ("gap_closed", "general_kl"))
        if on is not None and off is not None:
            drawn.append((on, off, f"{label}  ({results.count(records, str(system))} / {on.n})"))
    drawn.sort(key=lambda row: row[0].value)
    plt = pyplot()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure, sides = plt.subplots(1, 2, sharey=True, figsize=(10, 1 + 0.24 * len(drawn)))
    edges = {0: (-0.25, 1.15), 1: (0.0, 0.45)}
    for side, axes in enumerate(sides):
        low, high = edges[side]
        for place, row in enumerate(drawn):
            value, ends = row[side].value, (row[side].low, row[side].high)
            color = "tab:orange" if row[2].startswith("**") else "tab:blue"
            axes.barh(place, min(max(value, low), high), color=color, alpha=0.7)
            if low <= value <= high and not any(map(math.isnan, ends)):
                axes.plot(ends, [place, place], color="black", linewidth=1)
            if not low <= value <= high:
                axes.annotate(f" {value:.2f} ", (min(max(value, low), high), place), va="center", fontsize=7,
                              ha="left" if value < low else "right", color="white")  # fmt: skip
        axes.set_xlim(low, high)
        axes.grid(axis="x", alpha=0.3)
    sides[0].axvline(1.0, color="gray", linewidth=0.8)
    sides[0].set_yticks(range(len(drawn)), [label.replace("**", "") for *_, label in drawn], fontsize=8)
    sides[0].set_xlabel("gap closed on the text (more is better)")
    sides[1].set_xlabel("KL off the text, nats a token (less is better)")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_sizes(results: Results, quality: Sequence[Record], sizes: Sequence[Record], path: Path) -> None:
    """The gap closed against the size, a line a document."""
    with _axes(path) as axes:
        for document in dict.fromkeys(r["document"] for r in sizes):
            records = [r for r in [*quality, *sizes] if r["document"] == document]
            found = [(r["params"].get("shrink", 10), results.figure([r], "cartridge", "gap_closed")) for r in records]
            _line(axes, [(s, f) for s, f in found if f is not None], label=document)
        axes.axhline(1.0, color="gray", linewidth=0.8)
        axes.axvline(38.6, linestyle=":", color="gray", label="the paper's 38.6× at parity (published)")
        axes.set(xscale="log", xlabel="times smaller than the text", ylabel="gap closed")
        axes.set_xticks([5, 10, 20, 38], ["5", "10", "20", "38"])
        axes.minorticks_off()
        axes.legend(fontsize=8)


def plot_seconds(results: Results, records: Sequence[Record], path: Path) -> None:
    """The gap closed against seconds of training, each point a run of its own with a schedule of its own."""
    with _axes(path) as axes:
        for document in dict.fromkeys(r["document"] for r in records):
            own = [r for r in records if r["document"] == document]
            found = [(r["train_seconds"], results.figure([r], "cartridge", "gap_closed")) for r in own]
            _line(axes, [(s, f) for s, f in found if f is not None], label=document)
            for record, (seconds, value) in zip(own, found, strict=True):
                if value is not None:
                    axes.annotate(
                        f"{record['steps']} steps",
                        (seconds, value.value),
                        textcoords="offset points",
                        xytext=(6, -10),
                        fontsize=8,
                    )
        axes.margins(x=0.12)  # so that the last one's steps have room
        axes.set(xlabel="seconds of training", ylabel="gap closed")
        axes.legend(fontsize=8)


def plot_rows(results: Results, rows: Sequence[Row], path: Path, metric: str, label: str) -> None:
    """One bar a row, with intervals."""
    with _axes(path) as axes:
        found = [(name.strip("*"), results.figure(records, str(system), metric)) for name, records, system in rows]
        shown = [(name, f) for name, f in found if f is not None and not math.isnan(f.value)]
        spread = [[0.0 if math.isnan(f.low) else f.value - f.low for _, f in shown]]
        spread += [[0.0 if math.isnan(f.high) else f.high - f.value for _, f in shown]]
        axes.barh(
            [name for name, _ in shown],
            [f.value for _, f in shown],
            xerr=spread,
            capsize=3,
            color="tab:blue",
            alpha=0.7,
        )
        axes.invert_yaxis()
        axes.set(xlabel=label)


def plot_costs(costs: Sequence[Cost], path: Path) -> None:
    """Seconds in all against questions, one line a way."""
    with _axes(path) as axes:
        counts = [10 ** (step / 20) for step in range(81)]
        for cost in costs:
            axes.plot(counts, [cost.total(count) for count in counts], label=cost.name)
        axes.set(xscale="log", yscale="log", xlabel="questions", ylabel="machine seconds in all, making included")
        axes.legend(fontsize=8)
