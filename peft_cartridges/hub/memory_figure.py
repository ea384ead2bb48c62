"""The card's picture of memory: the keys and values of a cartridge against those of its text in context."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .card_facts import CardFacts
from .model_card import size_text

FILE_NAME = "memory.png"
BATCH_SIZES = (1, 8, 32)


def add_memory_figure(facts: CardFacts, folder: str | Path) -> CardFacts:
    """Draws `memory.png` into a cartridge's folder.

    Returns:
        The facts with the picture's name; as they were where they name another picture, or none could be drawn.
    """
    if facts.memory_figure not in (None, FILE_NAME) or not facts.kv_bytes or not facts.in_context_kv_bytes:
        return facts
    if not draw_memory_figure(facts.kv_bytes, facts.in_context_kv_bytes, Path(folder) / FILE_NAME):
        return facts
    return dataclasses.replace(facts, memory_figure=FILE_NAME)


def draw_memory_figure(kv_bytes: int, in_context_kv_bytes: int, path: Path) -> bool:
    """Bars over batch sizes: one copy of the cartridge for all rows, and a copy of the text's keys and values for each.

    Args:
        kv_bytes: Keys and values of the cartridge.
        in_context_kv_bytes: Keys and values of the whole text, for one row.
        path: The PNG file.

    Returns:
        Whether it was drawn: matplotlib is installed (`pip install peft-cartridges[eval]`).
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    bars = {
        "cartridge, one copy for all rows": [kv_bytes] * len(BATCH_SIZES),
        "text in context, one copy a row": [size * in_context_kv_bytes for size in BATCH_SIZES],
    }
    for offset, (label, sizes) in zip((-0.2, 0.2), bars.items(), strict=True):
        drawn = axes.bar([number + offset for number in range(len(BATCH_SIZES))], sizes, width=0.38, label=label)
        axes.bar_label(drawn, labels=[size_text(size) for size in sizes], padding=2, fontsize=8)
    # The two differ by orders of magnitude: on a linear axis the smaller one could not be seen.
    smallest, largest = min(kv_bytes, in_context_kv_bytes), max(kv_bytes, BATCH_SIZES[-1] * in_context_kv_bytes)
    axes.set_yscale("log", base=10)
    axes.set_ylim(smallest / 3, largest * 10)
    axes.set_yticks([])
    axes.minorticks_off()
    axes.set_xticks(range(len(BATCH_SIZES)), [str(size) for size in BATCH_SIZES])
    axes.set(xlabel="rows in the batch", ylabel="keys and values (log scale)")
    axes.legend(loc="upper left", fontsize=8, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return True
