"""What came of a run: counts, reasons, coverage."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .chunk_study import ChunkReport
from .chunking import Chunk
from .coverage import measure_coverage


def make_report(
    reports: Iterable[ChunkReport], across_chunks: Mapping[str, int], lengths: Mapping[str, int]
) -> dict[str, Any]:
    """Counts of a whole run, JSON-ready.

    Args:
        reports: Of all chunks.
        across_chunks: Kept conversations that were dropped in the end because another chunk has their like, by reason.
        lengths: Tokens of each document, by its id.
    """
    reports = list(reports)
    dropped: Counter[str] = Counter(across_chunks)
    for report in reports:
        dropped.update(report.dropped)
    made, kept = sum(r.made for r in reports), sum(r.kept for r in reports) - sum(across_chunks.values())
    chunks = [
        Chunk(r.chunk["id"], r.chunk["document"], r.chunk["start"], r.chunk["end"], "") for r in reports if r.kept
    ]
    return {
        "made": made,
        "kept": kept,
        "dropped": dict(sorted((+dropped).items())),
        "acceptance": round(kept / made, 4) if made else None,
        "generated_tokens": sum(r.generated_tokens for r in reports),
        "chunks": len(reports),
        "coverage": {name: found.to_dict() for name, found in measure_coverage(chunks, lengths).items()},
    }


def read_report(dataset: Any) -> dict[str, Any]:
    """What a self-study data set says of itself: its identity, and under `report` what came of the run.

    Raises:
        ValueError: the data set carries no such description.
    """
    try:
        found = json.loads(dataset.info.description)
    except (json.JSONDecodeError, TypeError):
        found = None
    if not isinstance(found, dict) or "synthesis" not in found:
        raise ValueError("The data set carries no description of a self-study run in `dataset.info.description`.")
    return found


def format_report(description: Mapping[str, Any]) -> str:
    """A few lines for people."""
    report = description["report"]
    lines = [
        f"{report['kept']} conversations kept of {report['made']} made"
        + (f" ({report['acceptance']:.0%})" if report["acceptance"] is not None else ""),
        *(f"  dropped, {reason}: {count}" for reason, count in report["dropped"].items()),
        f"{report['generated_tokens']:,} tokens generated about {report['chunks']} chunks",
        "Coverage (share of tokens in a chunk; chunks a token is in: fewest, mean, most)",
    ]
    for name, cover in list(report["coverage"].items())[:20]:
        lines.append(
            f"  {name[:60]}: {cover['covered']:.0%} of {cover['num_tokens']:,} tokens; "
            f"{cover['fewest']}, {cover['mean']:.1f}, {cover['most']}"
        )
    if (more := len(report["coverage"]) - 20) > 0:
        lines.append(f"  … and {more} more documents")
    return "\n".join(lines)
