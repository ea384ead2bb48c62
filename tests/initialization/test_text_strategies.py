"""Cartridges of tokens that the model just reads, of vectors like its own, of a summary, and of other cartridges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge
from peft_cartridges.chat import ChatCodec
from peft_cartridges.initialization import list_strategies
from peft_cartridges.initialization.text_tokens import first_tokens, random_tokens
from tests.tiny_models import tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain says w{number} ." for number in range(50, 80))
NUM_TOKENS = 12


def _initialize(strategy: str, text: str | None = TEXT, num_tokens: int = NUM_TOKENS, **options: Any) -> KVPrefix:
    model = get_peft_model(tiny_model(), CartridgeConfig(num_tokens=num_tokens))
    return initialize_cartridge(model, tiny_tokenizer(), text=text, strategy=strategy, **options)


def _equal(one: KVPrefix, other: KVPrefix) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one.keys + one.values, other.keys + other.values, strict=True))


def _tokens_of(prefix: KVPrefix) -> list[int]:
    """What was read: in the first layer, the values of a token are the same wherever it stands."""
    table = KVPrefix.from_input_ids(tiny_model(), range(128)).values[0][0]
    return [int((table - value).abs().amax(-1).argmin()) for value in prefix.values[0][0]]


@pytest.mark.parametrize("strategy", sorted(set(list_strategies()) - {"pretrained", "last_tokens"}))
def test_every_strategy_fills_the_cartridge_and_draws_the_same_again(strategy: str) -> None:
    first, second = _initialize(strategy), _initialize(strategy)
    assert first.num_tokens == NUM_TOKENS and _equal(first, second)
    assert all(tensor.isfinite().all() for tensor in first.keys + first.values)


@pytest.mark.parametrize("strategy", ["first_tokens", "sampled_chunks"])
def test_as_many_tokens_as_the_text_has_are_the_text(strategy: str) -> None:
    ids = ChatCodec(None, tiny_tokenizer()).encode_context(TEXT)
    prefix = _initialize(strategy, num_tokens=len(ids))
    whole = KVPrefix.from_input_ids(tiny_model(), ids)
    torch.testing.assert_close(prefix.keys[1], whole.keys[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(prefix.values[1], whole.values[1], atol=1e-5, rtol=1e-5)


def test_sampled_chunks_are_pieces_of_the_text_in_its_order_that_do_not_overlap() -> None:
    ids = ChatCodec(None, tiny_tokenizer()).encode_context(TEXT)
    drawn = set()
    for seed in range(8):
        read = _tokens_of(_initialize("sampled_chunks", chunk_tokens=4, seed=seed))
        starts, at = [], 0
        for start in range(0, NUM_TOKENS, 4):
            at = next(i for i in range(at, len(ids)) if ids[i : i + 4] == read[start : start + 4])
            starts.append(at)
            at += 4
        assert starts[0] == 0
        drawn.add(tuple(starts))
    assert len(drawn) > 4


def test_random_tokens_are_no_special_ones_and_need_no_text() -> None:
    tokenizer = tiny_tokenizer()
    first, *rest = _tokens_of(_initialize("random_tokens", None))
    assert first == ChatCodec(None, tokenizer).encode_context(TEXT)[0]
    assert not set(rest) & set(tokenizer.all_special_ids) and len(set(rest)) > 6
    assert _tokens_of(_initialize("random_tokens", None, seed=1))[1:] != rest


@pytest.mark.parametrize("text", [TEXT, None])
def test_random_vectors_have_the_mean_and_spread_of_what_the_model_reads(text: str | None) -> None:
    prefix = _initialize("random_vectors", text, num_tokens=140)
    make, length = (random_tokens, 512) if text is None else (first_tokens, 140)
    read = make(tiny_model(), tiny_tokenizer(), text or "", num_tokens=length, chat_template=True)  # type: ignore[operator]
    for have, want in zip(prefix.keys + prefix.values, read.keys + read.values, strict=True):
        have, want = have[:, 1:], want[:, 1:]
        assert not torch.equal(have[0, 0], want[0, 0])
        spread = want.std(1)
        assert ((have.mean(1) - want.mean(1)).abs() < 0.6 * spread).all()
        assert (have.std(1) / spread).log().abs().max() < 0.4
    torch.testing.assert_close(prefix.values[0][:, 0], read.values[0][:, 0])


def test_a_summary_is_what_the_model_writes_with_the_text_in_context() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    prefix = _initialize("summary", request="what says the captain")
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    asked = tokenizer("\n\nwhat says the captain\n\n", add_special_tokens=False)["input_ids"]
    if tokenizer.chat_template:
        turn = {"role": "user", "content": "what says the captain"}
        asked = ChatCodec(None, tokenizer).encode_request([turn])
    output = model.generate(
        torch.tensor([ids + asked]), max_new_tokens=NUM_TOKENS, min_new_tokens=NUM_TOKENS, do_sample=False
    )
    written = tokenizer.decode(output[0, len(ids + asked) :], skip_special_tokens=True).strip()
    expected = ChatCodec(None, tokenizer).encode_context(f"{written}\n\n{TEXT}")[:NUM_TOKENS]
    assert _tokens_of(prefix) == expected


def test_a_cartridge_goes_on_from_another_one(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    other = get_peft_model(tiny_model(), CartridgeConfig(num_tokens=NUM_TOKENS))
    prefix = initialize_cartridge(other, tokenizer, text=TEXT)
    other.save_pretrained(tmp_path)
    for cartridge in (str(tmp_path), tmp_path, prefix):
        assert _equal(_initialize("pretrained", None, cartridge=cartridge), prefix)
    with pytest.raises(ValueError, match=r"`cartridge` has 12 tokens.*CartridgeConfig\(num_tokens=12\)"):
        _initialize("pretrained", None, num_tokens=8, cartridge=tmp_path)
    with pytest.raises(ValueError, match="needs the option `cartridge`"):
        _initialize("pretrained", None)
    with pytest.raises(FileNotFoundError, match="no folder 'nowhere'"):
        _initialize("pretrained", None, cartridge="nowhere")


def test_an_option_that_a_strategy_does_not_have_is_named() -> None:
    with pytest.raises(ValueError, match="`sampled_chunks` has no option `chunks`; it has: chunk_tokens, seed"):
        _initialize("sampled_chunks", chunks=3)
    with pytest.raises(ValueError, match="`chunk_tokens` must be at least 1, got 0"):
        _initialize("sampled_chunks", chunk_tokens=0)
    with pytest.raises(ValueError, match="Give one of `text`"):
        _initialize("first_tokens", None)
