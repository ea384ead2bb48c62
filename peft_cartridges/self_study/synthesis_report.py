"""What came of a run: counts, reasons, coverage, of all of it and of each chunk."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .chunk_study import ChunkReport
from .chunking import Chunk
from .coverage import measure_coverage

# So many lines at most that name a document, or a chunk of which little was kept.
_DOCUMENTS_SHOWN, _CHUNKS_SHOWN = 20, 3


def make_report(reports: Iterable[ChunkReport], lengths: Mapping[str, int]) -> dict[str, Any]:
    """Counts of a whole run, and of each of its chunks, JSON-ready.

    Args:
        reports: Of all chunks.
        lengths: Tokens of each document, by its id.
    """
    reports = list(reports)
    dropped: Counter[str] = Counter()
    for report in reports:
        dropped.update(report.dropped)
    made, kept = sum(r.made for r in reports), sum(r.kept for r in reports)
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
        "per_chunk": [
            {**r.chunk, "made": r.made, "kept": r.kept, "dropped": dict(sorted((+r.dropped).items()))} for r in reports
        ],
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
    """A few lines for people, however large the run was."""
    report = description["report"]
    lines = [
        f"{report['kept']} conversations kept of {report['made']} made"
        + (f" ({report['acceptance']:.0%})" if report["acceptance"] is not None else ""),
        *(f"  dropped, {reason}: {count}" for reason, count in report["dropped"].items()),
        f"{report['generated_tokens']:,} tokens generated about {report['chunks']} chunks",
        *_format_chunks(report.get("per_chunk", ())),  # data sets of an earlier format have none
        "Coverage (share of tokens in a chunk; chunks a token is in: fewest, mean, most)",
    ]
    for name, cover in list(report["coverage"].items())[:_DOCUMENTS_SHOWN]:
        lines.append(
            f"  {name[:60]}: {cover['covered']:.0%} of {cover['num_tokens']:,} tokens; "
            f"{cover['fewest']}, {cover['mean']:.1f}, {cover['most']}"
        )
    if (more := len(report["coverage"]) - _DOCUMENTS_SHOWN) > 0:
        lines.append(f"  … and {more} more documents")
    return "\n".join(lines)


def _format_chunks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """How many chunks all, most or little of what was made was kept of, and those with the least."""
    if not rows:
        return []
    shares = [row["kept"] / max(row["made"], 1) for row in rows]
    counts = {
        "all": sum(share == 1 for share in shares),
        "half or more": sum(0.5 <= share < 1 for share in shares),
        "less": sum(0 < share < 0.5 for share in shares),
        "none": sum(share == 0 for share in shares),
    }
    lines = ["Chunks by what was kept of them: " + ", ".join(f"{name} {count}" for name, count in counts.items())]
    worst = sorted((share, number) for number, share in enumerate(shares) if share < 1)[:_CHUNKS_SHOWN]
    for _, number in worst:
        row = rows[number]
        reasons = ", ".join(f"{reason} {count}" for reason, count in row["dropped"].items())
        lines.append(
            f"  {row['document'][:60]}, tokens {row['start']}–{row['end']}: {row['kept']} of {row['made']} ({reasons})"
        )
    return lines
