"""Chunks cover a corpus evenly, whatever it is cut into."""

from __future__ import annotations

import itertools

import pytest
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cartridges.corpus import Document, as_documents, chunk_corpus
from tests.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer()


def _text(num_tokens: int) -> str:
    return " ".join(f"w{50 + index % 70}" for index in range(num_tokens))


@settings(deadline=None, max_examples=50)
@given(
    lengths=st.lists(st.integers(1, 200), min_size=1, max_size=3),
    bounds=st.tuples(st.integers(1, 60), st.integers(0, 60)),
    tilings=st.integers(1, 3),
)
def test_a_tiling_covers_every_token_and_none_much_more_often(
    lengths: list[int], bounds: tuple[int, int], tilings: int
) -> None:
    documents = [Document(f"d{i}", _text(length)) for i, length in enumerate(lengths)]
    low, high = bounds[0], bounds[0] + bounds[1]
    covered = {document.id: [0] * length for document, length in zip(documents, lengths, strict=True)}
    chunks = chunk_corpus(documents, TOKENIZER, min_tokens=low, max_tokens=high, seed=0)
    done = 0
    while done < tilings:  # a tiling is over when every document's last token was covered once more
        chunk = next(chunks)
        assert low <= chunk.end - chunk.start <= high or chunk.end - chunk.start == len(covered[chunk.document_id])
        for index in range(chunk.start, chunk.end):
            covered[chunk.document_id][index] += 1
        if all(counts[-1] > done for counts in covered.values()) and all(min(c) > done for c in covered.values()):
            done += 1
    for counts in covered.values():
        assert min(counts) >= tilings
        assert max(counts) <= 2 * (tilings + 1)  # a last span that would be too short overlaps the one before


def test_a_chunk_is_its_span_of_the_document() -> None:
    text = "the  captain\n\nsays yes . the sea is  blue ."
    chunk = next(chunk_corpus([Document("d", text, "a log")], TOKENIZER, min_tokens=3, max_tokens=3, seed=0))
    assert chunk.text in text
    assert len(TOKENIZER(chunk.text)["input_ids"]) == 3
    assert chunk.context == f"a log\n\n{chunk.text}"
    assert chunk.id == f"d:{chunk.start}-{chunk.end}"


def test_the_same_seed_gives_the_same_chunks() -> None:
    def chunks(seed: int) -> list[str]:
        found = chunk_corpus([Document("d", _text(100))], TOKENIZER, min_tokens=10, max_tokens=30, seed=seed)
        return [chunk.id for chunk in itertools.islice(found, 12)]

    assert chunks(1) == chunks(1) != chunks(2)


def test_corpora_of_every_kind_are_documents() -> None:
    dataset = Dataset.from_dict({"text": ["the sea", "a ship"], "title": ["one", None]})
    assert [(d.id, d.text) for d in as_documents(dataset)] == [("one", "the sea"), ("doc1", "a ship")]
    assert as_documents("the sea") == as_documents(["the sea"]) == [Document("doc0", "the sea")]


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ([], "The corpus is empty"),
        ("", "Document 0 of the corpus .* is empty"),
        (["the sea", "  "], "Document 1 of the corpus .* is empty"),
        ([{"body": "the sea"}], r"no `text` column but the columns \['body'\]"),
        ([3], "rows of type int"),
    ],
)
def test_a_bad_corpus_is_refused(corpus: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_documents(corpus)


def test_bounds_out_of_order_are_refused() -> None:
    with pytest.raises(ValueError, match="`min_chunk_tokens`"):
        next(chunk_corpus([Document("d", "the sea")], TOKENIZER, min_tokens=5, max_tokens=4, seed=0))
