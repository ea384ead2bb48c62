"""Loading a corpus by name: files, folders, globs, code repositories, and data sets of the Hub."""

from __future__ import annotations

import fnmatch
import glob
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .chunking import Document, as_documents, iter_documents
from .readers import read_text, reads

# Never part of a text: version control, environments, builds, caches.
_SKIPPED_FOLDERS = {
    ".git", ".hg", ".svn", ".venv", "venv", "node_modules", "__pycache__", "build", "dist", ".mypy_cache",
    ".pytest_cache", ".ruff_cache", ".idea", ".vscode", "target", ".tox", ".eggs",
}  # fmt: skip

_SCHEME = "hf://datasets/"


def load_corpus(
    source: str | Path | Iterable[str | Path],
    *,
    split: str = "train",
    text_column: str = "text",
    streaming: bool = False,
    max_documents: int | None = None,
    description: str = "",
    exclude: Iterable[str] = (),
) -> Iterable[Document]:
    """The documents of a corpus.

    Args:
        source: A file; a folder (all files below it that are text, PDF or HTML; hidden ones, environments and builds
            left out); a glob (`docs/**/*.md`); a data set (`hf://datasets/OWNER/NAME[:CONFIG]` or a folder made by
            `save_to_disk`); or several of these.
        split: Of a data set.
        text_column: Of a data set; it may also have `id`, `title` and `description`.
        streaming: Read as it comes: a data set is not downloaded as a whole, and no more than a document is held.
        max_documents: Stop after so many.
        description: A sentence on the corpus that the model sees in front of each chunk; files add their path.
        exclude: Patterns of paths to leave out, such as `tests/*`.

    Returns:
        Documents whose ids are paths (relative to the folder or the glob's fixed part), or ids of the data set: a
        list, or with `streaming` an iterator that can be read once.

    Raises:
        ValueError: nothing was found, a named file is binary, or a reader is not installed.
        FileNotFoundError: there is no such file or folder.
    """
    sources = [source] if isinstance(source, (str, Path)) else list(source)
    if not sources:
        raise ValueError("`source` is empty: name a file, a folder, a glob or a data set.")
    if max_documents is not None and max_documents < 1:
        raise ValueError(f"`max_documents` must be at least 1, got {max_documents}.")
    found = itertools.chain.from_iterable(
        _load(str(one), split, text_column, streaming, description, tuple(exclude)) for one in sources
    )
    some = itertools.islice(found, max_documents)
    if streaming:
        return iter_documents(some)
    documents = list(some)
    if not documents:
        raise ValueError(f"No text was found in {', '.join(map(str, sources))}: is the folder empty, or all excluded?")
    return as_documents(documents)


def _load(
    source: str, split: str, text_column: str, streaming: bool, description: str, exclude: tuple[str, ...]
) -> Iterator[Document]:
    path = Path(source)
    if source.startswith(_SCHEME):
        yield from _from_dataset(_hub_dataset(source, split, streaming), text_column, description)
    elif (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        from datasets import DatasetDict, load_from_disk

        dataset = load_from_disk(source)
        yield from _from_dataset(
            dataset[split] if isinstance(dataset, DatasetDict) else dataset, text_column, description
        )
    elif path.is_dir():
        yield from _from_files(sorted(_walk(path)), path, description, exclude)
    elif path.is_file():
        yield _from_file(path, path.name, description)
    elif glob.has_magic(source):
        root = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
        found = [Path(name) for name in glob.glob(source, recursive=True) if Path(name).is_file()]
        # Links may lead to one file in many ways: the shortest is taken.
        ways = {file.resolve(): file for file in sorted(found, key=lambda file: len(file.parts), reverse=True)}
        files = sorted(file for file in ways.values() if reads(file))
        if not files:
            raise ValueError(f"No file that holds text matches {source}.")
        yield from _from_files(files, root, description, exclude)
    else:
        raise FileNotFoundError(
            f"There is no file or folder {source}. A data set of the Hub is written {_SCHEME}OWNER/NAME."
        )


def _walk(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith(".") or entry.is_symlink():
            continue
        if entry.is_dir():
            if entry.name not in _SKIPPED_FOLDERS:
                yield from _walk(entry)
        elif reads(entry):
            yield entry


def _from_files(files: list[Path], root: Path, description: str, exclude: tuple[str, ...]) -> Iterator[Document]:
    for file in files:
        name = file.relative_to(root).as_posix()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in exclude) and (file.stat().st_size or len(files) == 1):
            document = _from_file(file, name, description)
            if document.text.strip():  # an `__init__.py` may well be empty
                yield document


def _from_file(file: Path, name: str, description: str) -> Document:
    text, title = read_text(file)
    return Document(name, text, description, f"{title} ({name})" if title else name)


def _hub_dataset(source: str, split: str, streaming: bool) -> Any:
    from datasets import load_dataset

    name, _, config = source[len(_SCHEME) :].partition(":")
    return load_dataset(name, config or None, split=split, streaming=streaming)


def _from_dataset(dataset: Any, text_column: str, description: str) -> Iterator[Document]:
    for number, row in enumerate(dataset):
        if text_column not in row:
            raise ValueError(f"`text_column` {text_column!r} is not among the data set's columns: {', '.join(row)}.")
        document = as_documents([{**row, "text": row[text_column]}])[0]
        about = document.description or description
        name = f"doc{number}" if document.id == "doc0" else document.id
        yield Document(name, document.text, about, document.title)
