"""Where a document may be cut: anywhere, between sentences, at headings, or between the blocks of a source file."""

from __future__ import annotations

import bisect
import re
from collections.abc import Sequence
from pathlib import PurePath

from .sentences import sentence_ends

_HEADING = re.compile(r"^(?:#{1,6}\s.*|.+\n(?:=+|-{3,})\s*)$", re.MULTILINE)
_FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_PARAGRAPH = re.compile(r"\n\s*\n")
_BLOCK = re.compile(r"\n\s*\n(?=\S)")  # a blank line, then a line that is not indented
_LINE = re.compile(r"\n(?=\S)|\n")

MODES = ("tokens", "sentences", "sections", "files", "auto")

_MARKDOWN = {".md", ".markdown", ".rst", ".html", ".htm"}
_PROSE = {"", ".txt", ".pdf"}


def resolve_mode(mode: str, document_id: str) -> str:
    """`auto`, by the document's file ending: sections of Markdown, sentences of prose, blocks of anything else."""
    if mode != "auto":
        return mode
    ending = PurePath(document_id).suffix.lower()
    if ending in _MARKDOWN:
        return "sections"
    return "sentences" if ending in _PROSE or len(ending) > 5 else "files"


def find_borders(text: str, offsets: Sequence[tuple[int, int]], mode: str) -> list[list[int]]:
    """Token indices at which a document may be cut, best kind first; empty where any token will do.

    Args:
        text: The document.
        offsets: Character span of each token, as a fast tokenizer gives them.
        mode: `tokens`, `sentences` (sentence ends), `sections` (headings, else paragraphs, else sentences) or `files`
            (for source code: blocks between blank lines, else lines; no chunk ever holds parts of two documents).
    """
    if mode == "tokens":
        return []
    sentences = sentence_ends(text)
    if mode == "sentences":
        kinds = [sentences]
    elif mode == "sections":
        fenced = [match.span() for match in _FENCE.finditer(text)]
        headings = [
            match.start()
            for match in _HEADING.finditer(text)
            if not any(start <= match.start() < end for start, end in fenced)
        ]
        kinds = [headings, [match.end() for match in _PARAGRAPH.finditer(text)], sentences]
    else:
        kinds = [[m.end() for m in _BLOCK.finditer(text)], [m.end() for m in _LINE.finditer(text)]]
    # A token that ends behind a border belongs to what follows it (the space in front of a word is part of its token).
    ends = [end for _, end in offsets]
    return [sorted({bisect.bisect_right(ends, position) for position in kind}) for kind in kinds]


def choose_border(kinds: Sequence[Sequence[int]], low: int, high: int, wanted: int) -> int:
    """The border in `low … high` that is nearest to `wanted`, of the best kind that has one; else `wanted` itself."""
    for borders in kinds:
        first, last = bisect.bisect_left(borders, low), bisect.bisect_right(borders, high)
        if first < last:
            return min(borders[first:last], key=lambda border: abs(border - wanted))
    return wanted
