"""What came of a run: counts, reasons, coverage, of all of it and of each chunk; and conversations as people read them."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ..corpus import Chunk, measure_coverage

# So many lines at most that name a document, or a chunk of which little was kept.
_DOCUMENTS_SHOWN, _CHUNKS_SHOWN = 20, 3
_WIDTH = 100


def new_part_report(chunk: Chunk | None) -> dict[str, Any]:
    """What came of a chunk (or, without one, off context) so far: nothing. `dropped` counts by reason; a `Counter`."""
    place = chunk and {"id": chunk.id, "document": chunk.document_id, "start": chunk.start, "end": chunk.end}
    return {"chunk": place, "made": 0, "kept": 0, "dropped": Counter(), "generated_tokens": 0}


def without(report: Mapping[str, Any], lost: Mapping[str, int]) -> dict[str, Any]:
    """A part's report when further conversations are dropped, `lost` of them for which reason."""
    dropped = Counter(report["dropped"]) + Counter(lost)
    return {**report, "kept": report["kept"] - sum(lost.values()), "dropped": dropped}


def make_report(reports: Iterable[Mapping[str, Any]], lengths: Mapping[str, int]) -> dict[str, Any]:
    """Counts of a whole run, and of each of its parts, JSON-ready.

    Args:
        reports: Of all parts.
        lengths: Tokens of each document, by its id.
    """
    every = list(reports)
    dropped: Counter[str] = Counter()
    for report in every:
        dropped.update(report["dropped"])
    made, kept = sum(r["made"] for r in every), sum(r["kept"] for r in every)
    reports = [report for report in every if report["chunk"] is not None]
    places = {r["chunk"]["id"]: r["chunk"] for r in reports if r["kept"]}
    chunks = [Chunk(place["id"], place["document"], place["start"], place["end"], "") for place in places.values()]
    return {
        "made": made,
        "kept": kept,
        "dropped": dict(sorted((+dropped).items())),
        "acceptance": round(kept / made, 4) if made else None,
        "off_context": kept - sum(r["kept"] for r in reports),
        "generated_tokens": sum(r["generated_tokens"] for r in every),
        "chunks": len({r["chunk"]["id"] for r in reports}),
        "coverage": {name: found.to_dict() for name, found in measure_coverage(chunks, lengths).items()},
        "per_chunk": [
            {
                **r["chunk"],
                "made": r["made"],
                "kept": r["kept"],
                "dropped": dict(sorted((+Counter(r["dropped"])).items())),
            }
            for r in reports
        ],
    }


def format_report(description: Mapping[str, Any]) -> str:
    """A few lines for people, however large the run was."""
    report = description["report"]
    lines = [
        f"{report['kept']} conversations kept of {report['made']} made"
        + (f" ({report['acceptance']:.0%})" if report["acceptance"] is not None else ""),
        *_format_off_context(report),
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


def _format_off_context(report: Mapping[str, Any]) -> list[str]:
    """How many are about no chunk, where any are; sets that were made before have no such number."""
    number = report.get("off_context", 0)
    return [f"  {number} of them off context ({number / report['kept']:.1%})"] if number else []


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


def format_conversation(row: Mapping[str, Any], number: int | None = None) -> str:
    """A row of a self-study data set: where it is from, and who says what."""
    about = row["chunk_id"] or "off context"
    title = f"{'' if number is None else f'{number}. '}{row['seed_type']} · {about}"
    if row.get("usefulness") is not None:
        title += f" · {row['usefulness']:.2f} nats a token over no chunk"
    lines = [title, "─" * min(len(title), _WIDTH)]
    for message in row["messages"]:
        name = {"user": "A", "assistant": "B"}.get(message["role"], message["role"])
        for first, paragraph in enumerate(message["content"].splitlines() or [""]):
            mark = f"{name}: " if first == 0 else "   "
            lines += textwrap.wrap(paragraph, _WIDTH, initial_indent=mark, subsequent_indent="   ") or [mark.rstrip()]
    learned = sum(row["completion_mask"])
    return "\n".join([*lines, f"   ({learned} tokens learned of {len(row['input_ids'])})"])
