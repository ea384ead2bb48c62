"""Corpora by name: what is read, what is left out, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from peft_cartridges.corpus import chunk_corpus, load_corpus
from tests.tiny_models import tiny_tokenizer


@pytest.fixture()
def repository(tmp_path: Path) -> Path:
    files = {
        "README.md": "# Sea\n\nThe sea is blue.",
        "docs/guide.md": "# Guide\n\nHow to sail.",
        "src/sail.py": "def sail():\n    return 'away'\n",
        "src/__init__.py": "",
        "src/blank.py": "\n",
        ".git/config": "secret",
        "node_modules/x/index.js": "no",
        "notes.txt": "Ängström, 海",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "logo.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "latin1.txt").write_bytes("Ängström".encode("latin-1"))
    (tmp_path / "loop").symlink_to(tmp_path)
    return tmp_path


def test_a_folder_gives_its_texts_with_their_paths(repository: Path) -> None:
    documents = load_corpus(repository, description="A sailing library.")
    assert [d.id for d in documents] == ["README.md", "docs/guide.md", "notes.txt", "src/sail.py"]
    assert documents[2].text == "Ängström, 海"
    assert documents[3].heading == "src/sail.py\nA sailing library."
    chunk = next(chunk_corpus(documents[3:], tiny_tokenizer(), min_tokens=50, max_tokens=60, seed=0))
    assert chunk.context.startswith("src/sail.py\nA sailing library.\n\ndef sail():")


def test_files_globs_and_several_of_them(repository: Path) -> None:
    assert [d.id for d in load_corpus(str(repository / "notes.txt"))] == ["notes.txt"]
    assert [d.id for d in load_corpus(f"{repository}/**/*.md")] == ["README.md", "docs/guide.md"]
    both = load_corpus([repository / "notes.txt", f"{repository}/src/*.py"])
    assert [d.id for d in both] == ["notes.txt", "sail.py"]
    assert [d.id for d in load_corpus(repository, exclude=["docs/*", "*.txt"])] == ["README.md", "src/sail.py"]
    assert len(load_corpus(repository, max_documents=2)) == 2
    twice = load_corpus([repository / "notes.txt", repository / "notes.txt"])
    assert [d.id for d in twice] == ["notes.txt", "notes.txt#1"]


def test_saved_data_sets_are_read(tmp_path: Path) -> None:
    rows = {"text": ["the sea", "a ship"], "title": ["Sea", "Ship"], "id": ["a", "b"], "description": ["One.", None]}
    Dataset.from_dict(rows).save_to_disk(tmp_path / "plain")
    DatasetDict({"test": Dataset.from_dict({"body": ["the sea", "a ship"]})}).save_to_disk(tmp_path / "splits")
    first, second = load_corpus(tmp_path / "plain", description="A log.")
    assert (first.id, first.heading, second.heading) == ("a", "Sea\nOne.", "Ship\nA log.")
    found = load_corpus(tmp_path / "splits", split="test", text_column="body")
    assert [(d.id, d.text) for d in found] == [("doc0", "the sea"), ("doc1", "a ship")]
    with pytest.raises(ValueError, match="`text_column` 'text' is not among the data set's columns: body"):
        load_corpus(tmp_path / "splits", split="test")


def test_streams_end_after_so_many_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {}

    def endless(name: str, config: str | None, *, split: str, streaming: bool) -> object:
        asked.update(name=name, config=config, split=split, streaming=streaming)
        return ({"text": f"page {number}"} for number in iter(int, 1))

    monkeypatch.setattr("datasets.load_dataset", endless)
    found = load_corpus("hf://datasets/sea/log:old", streaming=True, max_documents=3, split="test")
    assert [d.id for d in found] == ["doc0", "doc1", "doc2"]
    assert asked == {"name": "sea/log", "config": "old", "split": "test", "streaming": True}


def test_html_is_read_without_its_navigation(tmp_path: Path) -> None:
    pytest.importorskip("trafilatura")
    story = " ".join(["The keeper of the lighthouse kept bees in the lamp room for many years."] * 4)
    page = (
        "<html><head><title>Bees of Vorholm</title></head><body><nav><a href='/'>Home</a><a href='/x'>Shop</a></nav>"
        f"<article><h1>Bees</h1><p>{story}</p><p>He sold the honey.</p></article></body></html>"
    )
    (tmp_path / "bees.html").write_text(page)
    (document,) = load_corpus(tmp_path)
    assert "kept bees" in document.text and "He sold the honey." in document.text and "Shop" not in document.text
    assert document.title.endswith("(bees.html)")
    (tmp_path / "none.html").write_text("<html><body></body></html>")
    with pytest.raises(ValueError, match=r"none\.html holds no text"):
        load_corpus(tmp_path / "none.html")


def test_pdf_is_read_page_by_page(tmp_path: Path) -> None:
    pytest.importorskip("pypdf")
    (tmp_path / "log.pdf").write_bytes(_pdf("The sea is blue."))
    (document,) = load_corpus(tmp_path)
    assert document.text.strip() == "The sea is blue." and document.id == "log.pdf"
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 nothing")
    with pytest.raises(ValueError, match=r"bad\.pdf is not a PDF that can be read"):
        load_corpus(tmp_path / "bad.pdf")
    (tmp_path / "scan.pdf").write_bytes(_pdf(""))
    with pytest.raises(ValueError, match=r"scan\.pdf holds no text \(a scan\?\)"):
        load_corpus(tmp_path / "scan.pdf")


def _pdf(text: str) -> bytes:
    """The smallest PDF that shows a line."""
    stream = f"BT /F1 12 Tf 72 720 Td ({text}) Tj ET".encode()
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 << /Type /Font /Subtype /Type1 /BaseFont /Helvetica >> >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(stream), stream),
    ]
    content, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    trailer = b"trailer << /Root 1 0 R /Size 5 >>\nstartxref\n%d\n%%%%EOF" % len(content)
    return content + b"xref\n0 5\n0000000000 65535 f \n" + table + trailer


def test_bad_input_is_named(repository: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"logo\.png is a binary file: give text"):
        load_corpus(repository / "logo.png")
    with pytest.raises(ValueError, match=r"latin1\.txt is not UTF-8 text .* convert it"):
        load_corpus(repository / "latin1.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"No text was found in .*empty"):
        load_corpus(tmp_path / "empty")
    with pytest.raises(ValueError, match="No file that holds text matches"):
        load_corpus(f"{tmp_path}/*.nothing")
    with pytest.raises(FileNotFoundError, match=r"There is no file or folder .*nowhere.* hf://datasets/OWNER/NAME"):
        load_corpus(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="`source` is empty"):
        load_corpus([])
    with pytest.raises(ValueError, match="`max_documents` must be at least 1"):
        load_corpus(repository, max_documents=0)
