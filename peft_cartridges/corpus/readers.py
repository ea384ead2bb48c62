"""The text of a file: plain text of any kind, PDF and HTML."""

from __future__ import annotations

from pathlib import Path

_PDF = {".pdf"}
_HTML = {".html", ".htm", ".xhtml"}
_MISSING = "Reading {what} needs `{package}`: pip install 'peft-cartridges[corpora]'."


def reads(file: Path) -> bool:
    """Whether a file is one whose text can be read: by its ending, or because it looks like text."""
    if file.suffix.lower() in _PDF | _HTML:
        return True
    with file.open("rb") as opened:
        return b"\0" not in (start := opened.read(8192)) and _is_utf8(start)


def read_text(file: Path) -> tuple[str, str]:
    """Text and title of a file; the title is empty where the file names none.

    Raises:
        ValueError: the file is binary, is no valid PDF, holds no text, or its reader is not installed.
    """
    ending = file.suffix.lower()
    if ending in _PDF:
        return _read_pdf(file)
    content = file.read_bytes()
    if b"\0" in content:
        raise ValueError(f"{file} is a binary file: give text, Markdown, source code, PDF or HTML.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text ({error}): convert it, or leave it out.") from None
    return _read_html(file, text) if ending in _HTML else (text, "")


def _is_utf8(start: bytes) -> bool:
    try:
        start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > len(start) - 4  # only the last character is cut
    return True


def _read_pdf(file: Path) -> tuple[str, str]:
    try:
        from pypdf import PdfReader
        from pypdf.errors import PyPdfError
    except ImportError:
        raise ValueError(_MISSING.format(what=f"the PDF {file}", package="pypdf")) from None
    try:
        reader = PdfReader(file)
        text = "\n\n".join(page.extract_text() for page in reader.pages)
        title = (reader.metadata.title if reader.metadata else None) or ""
    except PyPdfError as error:
        raise ValueError(f"{file} is not a PDF that can be read: {error}") from None
    if not text.strip():
        raise ValueError(f"{file} holds no text (a scan?): run it through text recognition first.")
    return text, str(title)


def _read_html(file: Path, page: str) -> tuple[str, str]:
    try:
        import trafilatura
    except ImportError:
        raise ValueError(_MISSING.format(what=f"the page {file}", package="trafilatura")) from None
    text = trafilatura.extract(page, output_format="markdown", include_tables=True, favor_recall=True) or ""
    if not text.strip():
        raise ValueError(f"{file} holds no text that could be told from its navigation: leave it out.")
    metadata = trafilatura.extract_metadata(page)
    return text, (getattr(metadata, "title", None) or "")
