"""Chunks that end where sentences, sections and blocks of code do, and still cover everything."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from peft_cartridges import SelfStudySynthesizer
from peft_cartridges.conversations import read_report
from peft_cartridges.corpus import Chunker, Document
from peft_cartridges.corpus.borders import MODES, resolve_mode
from peft_cartridges.corpus.coverage import measure_coverage
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

SENTENCES = " ".join(f"Ship {number} left harbor {number % 7} at dawn. Nobody saw it!" for number in range(60))
SECTIONS = "\n\n".join(
    f"## Ship {number}\n\n" + " ".join(f"It left harbor {number + i} at dawn." for i in range(number % 4 + 2))
    for number in range(30)
)
CODE = "\n\n".join(f"def sail_{n}(ship):\n    wind = {n}\n\n    return ship + wind" for n in range(40))


def _byte_level() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([SENTENCES, SECTIONS, CODE], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|e|>")


TOKENIZER = _byte_level()


def _chunks(text: str, mode: str, number: int = 40, low: int = 40, high: int = 120) -> list[str]:
    chunker = Chunker([Document("d", text)], TOKENIZER, min_tokens=low, max_tokens=high, mode=mode)
    return [chunk.text for chunk in itertools.islice(chunker.chunks(0), number)]


def test_sentences_are_kept_whole() -> None:
    for text in _chunks(SENTENCES, "sentences"):
        assert re.match(r"\s*(Ship \d|Nobody)", text) and text.rstrip()[-1] in ".!"


def test_sections_begin_at_headings_where_they_can() -> None:
    starts = [text.lstrip().startswith("## Ship") for text in _chunks(SECTIONS, "sections")]
    assert sum(starts) > 0.8 * len(starts)
    plain = [text.lstrip().startswith("## Ship") for text in _chunks(SECTIONS, "tokens")]
    assert sum(plain) < 0.3 * len(plain)


def test_a_heading_in_a_code_fence_is_none() -> None:
    text = "# Real\n\n" + "word " * 40 + "\n\n```\n# comment\n" + "code " * 40 + "\n```\n\n" + "word " * 40
    assert not any(chunk.lstrip().startswith("# comment") for chunk in _chunks(text, "sections", 20, 30, 90))


def test_code_is_cut_between_its_blocks() -> None:
    for text in _chunks(CODE, "files", low=60, high=200):
        assert text.lstrip().startswith("def sail_") and text.rstrip().endswith("return ship + wind")


def test_the_mode_goes_by_the_files_ending() -> None:
    found = [resolve_mode("auto", name) for name in ("a.md", "a/b.txt", "src/a.py", "doc0", "x.pdf", "v1.5 of the log")]
    assert found == ["sections", "sentences", "files", "sentences", "sentences", "sentences"]
    assert resolve_mode("tokens", "a.md") == "tokens"


@settings(deadline=None, max_examples=60)
@given(
    text=st.text(alphabet="ab .\n#!?`海-=", min_size=1, max_size=400).filter(lambda text: text.strip()),
    mode=st.sampled_from(MODES),
    low=st.integers(1, 40),
    more=st.integers(0, 40),
)
def test_every_mode_covers_every_token_within_the_bounds(text: str, mode: str, low: int, more: int) -> None:
    chunker = Chunker([Document("d.md", text)], TOKENIZER, min_tokens=low, max_tokens=low + more, mode=mode)
    length = chunker.lengths["d.md"]
    covered: set[int] = set()
    for chunk in itertools.islice(chunker.chunks(0), 1000):
        size = chunk.end - chunk.start
        assert low <= size <= low + more or size == length <= low
        covered.update(range(chunk.start, chunk.end))
        if len(covered) == length:
            break
    assert covered == set(range(length))


def test_an_unknown_mode_and_a_repeated_id_are_refused() -> None:
    with pytest.raises(ValueError, match="`chunking` is 'pages'; there are: tokens, sentences"):
        Chunker([Document("d", "x")], TOKENIZER, min_tokens=1, max_tokens=2, mode="pages")
    with pytest.raises(ValueError, match="Two documents of the corpus have the id `d`"):
        Chunker([Document("d", "x"), Document("d", "y")], TOKENIZER, min_tokens=1, max_tokens=2)


def test_coverage_counts_each_token() -> None:
    chunker = Chunker([Document("d", SENTENCES), Document("e", "Ship")], TOKENIZER, min_tokens=50, max_tokens=50)
    chunks = [chunk for chunk in itertools.islice(chunker.chunks(0), 60) if chunk.document_id == "d"][:3]
    length = chunker.lengths["d"]
    found = measure_coverage(chunks, chunker.lengths)
    tokens = [index for chunk in chunks for index in range(chunk.start, chunk.end)]
    assert found["d"].num_chunks == 3 and found["d"].most == max(map(tokens.count, tokens))
    assert found["d"].covered == pytest.approx(len(set(tokens)) / length, abs=1e-4)
    assert found["d"].mean == pytest.approx(150 / length, abs=1e-3) and found["e"].covered == 0


def _study(num_tokens: int, window: int, **options: int) -> object:
    text = " ".join(f"w{50 + index % 70}" for index in range(num_tokens))
    args = runs.settings(**options)
    return SelfStudySynthesizer(tiny_model(max_position_embeddings=window), tiny_tokenizer(), args).synthesize(text)


def test_a_corpus_four_times_the_window_is_studied_as_a_whole() -> None:
    window = 128
    dataset = _study(
        4 * window, window, num_conversations=16, conversations_per_chunk=1, min_chunk_tokens=40, max_chunk_tokens=48,
        recitation_share=1.0, focus_share=0.0,
    )  # fmt: skip
    cover = read_report(dataset)["report"]["coverage"]["doc0"]
    assert cover["num_tokens"] == 4 * window and cover["covered"] == 1.0 and cover["fewest"] >= 1


def test_a_chunk_larger_than_the_window_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match=r"A chunk of 512 tokens .* the model's window has 128: lower `max_chunk_tok"):
        _study(600, 128, max_chunk_tokens=512)
    # Also where the chunk itself fits: what is asked about it, or recited of it, is looked at before anything runs.
    for share in (0.0, 1.0):
        with pytest.raises(
            ValueError, match=r"A chunk of 118 tokens and a conversation about it need up to 1\d\d tokens"
        ):
            _study(600, 128, min_chunk_tokens=110, max_chunk_tokens=118, num_conversations=2, recitation_share=share)
