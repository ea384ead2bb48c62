"""`KVPrefix`: where it comes from, where it goes, cutting and joining, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from peft.tuners.cartridge.utils import prompt_embeddings_from_past_key_values
from torch import Tensor
from transformers import DynamicCache, StaticCache

from peft_cartridges import KVPrefix
from tests.exactness import assert_close
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer, token_ids


def _random(num_layers: int = 3, heads: int = 2, num_tokens: int = 7, head_dim: int = 4) -> KVPrefix:
    tensors = torch.randn(2, num_layers, heads, num_tokens, head_dim).unbind()
    return KVPrefix(*(tuple(part) for part in tensors))


def _equal(a: KVPrefix, b: KVPrefix) -> bool:
    return all(torch.equal(x, y) for x, y in zip((*a.keys, *a.values), (*b.keys, *b.values), strict=True))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("piece", [1, 5, 100])
def test_prefill_in_pieces(name: str, piece: int) -> None:
    """Longer than the sliding windows: all tokens are kept, whatever the pieces."""
    model, ids = tiny_model(name), token_ids(21)
    whole = KVPrefix.from_input_ids(model, ids.tolist())
    pieces = KVPrefix.from_input_ids(model, ids[None], prefill_chunk_size=piece)
    assert whole.num_tokens == pieces.num_tokens == len(whole) == 21
    for a, b in zip((*whole.keys, *whole.values), (*pieces.keys, *pieces.values), strict=True):
        assert_close(a, b)


def test_prefill_leaves_the_mode_of_every_module() -> None:
    model = tiny_model("llama").train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    KVPrefix.from_input_ids(model, token_ids(4))
    assert [module.training for module in model.modules()] == before


def test_from_text_is_the_prefill_of_its_system_message() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    text = "the captain tells of the old harbor light"
    ids = tokenizer.apply_chat_template([{"role": "system", "content": text}], tokenize=True, return_dict=False)
    assert _equal(KVPrefix.from_text(model, tokenizer, text), KVPrefix.from_input_ids(model, ids))
    plain = KVPrefix.from_text(model, tokenizer, text, chat_template=False)
    assert _equal(plain, KVPrefix.from_input_ids(model, tokenizer(text)["input_ids"]))
    cut = KVPrefix.from_text(model, tokenizer, text, max_tokens=3)
    assert _equal(cut, KVPrefix.from_input_ids(model, ids[:3]))
    for empty in ("", "  \n"):
        with pytest.raises(ValueError, match="`text` is empty"):
            KVPrefix.from_text(model, tokenizer, empty)
    with pytest.raises(ValueError, match="`input_ids` is empty"):
        KVPrefix.from_input_ids(model, [])


def test_cache_round_trip() -> None:
    prefix = _random()
    cache = prefix.to_cache(batch_size=3)
    assert isinstance(cache, DynamicCache) and cache.get_seq_length() == 7
    assert _equal(KVPrefix.from_cache(cache, row=2), prefix)
    assert _equal(KVPrefix.from_cache(cache, num_tokens=4), prefix[:4])
    cache.layers[0].keys.zero_()
    assert prefix.keys[0].abs().sum() > 0, "the cache shares memory with the prefix"


def test_from_a_static_cache_only_what_was_written() -> None:
    model, ids = tiny_model("llama"), token_ids(1, 6)
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    prefix = KVPrefix.from_cache(cache)
    assert prefix.num_tokens == 6
    assert_close(prefix.keys[1], KVPrefix.from_input_ids(model, ids).keys[1])


def test_from_a_cache_that_does_not_hold_all_tokens() -> None:
    model = tiny_model("mistral")
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=token_ids(1, 20), past_key_values=cache)
    with pytest.raises(
        ValueError, match=r"Layer 0 of the cache \(DynamicSlidingWindowLayer\) has seen 20 tokens but keeps"
    ):
        KVPrefix.from_cache(cache)
    with pytest.raises(ValueError, match="The cache is empty"):
        KVPrefix.from_cache(DynamicCache())
    with pytest.raises(ValueError, match="`num_tokens=9`, but layer 0 of the cache holds 7 tokens"):
        KVPrefix.from_cache(_random().to_cache(), num_tokens=9)


@pytest.mark.parametrize("heads", [1, 3])
def test_prompt_embeddings_are_those_of_stock_peft(heads: int) -> None:
    prefix = _random(heads=heads)
    pairs = [(key[None], value[None]) for key, value in zip(prefix.keys, prefix.values, strict=True)]
    stock = prompt_embeddings_from_past_key_values(pairs, num_virtual_tokens=7)
    assert torch.equal(prefix.to_prompt_embeddings(), stock)
    back = KVPrefix.from_prompt_embeddings(stock, num_layers=3, num_heads=heads)
    assert _equal(back, prefix)
    assert all(tensor.is_contiguous() for tensor in (*back.keys, *back.values))


def test_prompt_embeddings_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"`prompt_embeddings` has shape \(7, 49\)"):
        KVPrefix.from_prompt_embeddings(torch.zeros(7, 49), num_layers=3, num_heads=2)
    uneven = KVPrefix((torch.zeros(2, 3, 4), torch.zeros(2, 3, 8)), (torch.zeros(2, 3, 4), torch.zeros(2, 3, 8)))
    with pytest.raises(ValueError, match="Stock PEFT's format needs layers of one shape"):
        uneven.to_prompt_embeddings()


def test_cut_and_join() -> None:
    prefix = _random()
    joined = KVPrefix.concatenate([prefix[:2], prefix[2:5], prefix[5:]])
    assert _equal(joined, prefix)
    assert _equal(prefix[[3, 0]], KVPrefix.concatenate([prefix[3:4], prefix[:1]]))
    assert _equal(prefix[torch.tensor([3, 0])], prefix[[3, 0]])
    with pytest.raises(ValueError, match="`prefixes` is empty"):
        KVPrefix.concatenate([])
    with pytest.raises(ValueError, match=r"`prefixes\[1\]` belongs to a model of another shape"):
        KVPrefix.concatenate([prefix, _random(heads=4)])


def test_what_it_is() -> None:
    prefix = _random().to(torch.bfloat16)
    assert (prefix.num_layers, prefix.num_tokens, prefix.dtype) == (3, 7, torch.bfloat16)
    assert prefix.nbytes == 2 * 3 * 2 * 7 * 4 * 2
    assert repr(prefix).startswith("KVPrefix(num_tokens=7, num_layers=3, num_key_value_heads=2, head_dim=4")
    leaf = KVPrefix((torch.zeros(1, 2, 3, requires_grad=True),), (torch.zeros(1, 2, 3),))
    assert not leaf.detach().keys[0].requires_grad


def _with_states(prefix: KVPrefix | None = None) -> KVPrefix:
    states = tuple({"conv": torch.randn(6, 4), "recurrent": torch.randn(2, 3, 5)} for _ in range(2))
    if prefix is None:
        return KVPrefix(states=states, num_tokens=5)
    return KVPrefix(prefix.keys, prefix.values, states)


def test_states_are_of_the_whole_text() -> None:
    both, alone = _with_states(_random()), _with_states()
    assert (both.num_tokens, both.num_layers, both.num_recurrent_layers) == (7, 3, 2)
    assert (alone.num_tokens, len(alone), alone.num_layers, alone.dtype) == (5, 5, 0, torch.float32)
    assert both.nbytes == _random().nbytes + alone.nbytes and alone.nbytes == 2 * (24 + 30) * 4
    assert repr(alone) == "KVPrefix(num_tokens=5, num_recurrent_layers=2, dtype=torch.float32, nbytes=432)"
    half = both.to(torch.bfloat16)
    assert {tensor.dtype for tensor in half.tensors()} == {torch.bfloat16} and alone.detach().num_tokens == 5
    assert _equal(both.without_states(), both) and not both.without_states().states
    for cut in (lambda: both[:3], lambda: alone[[0]]):
        with pytest.raises(ValueError, match="A recurrent state is that of the whole text, and cannot be cut"):
            cut()
    with pytest.raises(
        ValueError, match=r"`prefixes\[1\]` has recurrent states, and the state of two texts does not follow"
    ):
        KVPrefix.concatenate([_random(), both])
    with pytest.raises(ValueError, match="Stock PEFT's format holds keys and values only"):
        both.to_prompt_embeddings()
    with pytest.raises(ValueError, match="`config` is needed for a prefix with recurrent states"):
        both.to_cache()
    with pytest.raises(ValueError, match="3 layers with keys and 2 with states, `config` 2 and 2"):
        both.to_cache(config=tiny_model("lfm2").config)
    with pytest.raises(ValueError, match="`num_tokens` has to be given"):
        KVPrefix(states=alone.states)
    with pytest.raises(ValueError, match="`num_tokens=4`, but the keys have 7 tokens"):
        KVPrefix(both.keys, both.values, both.states, 4)
    with pytest.raises(ValueError, match=r"`states\[0\]` holds nothing"):
        KVPrefix(states=({},), num_tokens=1)


@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "falcon_h1"])
def test_cache_of_a_hybrid_round_trip(name: str) -> None:
    model, ids = tiny_model(name), token_ids(1, 12)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    prefix = KVPrefix.from_cache(cache)
    assert prefix.num_recurrent_layers == len([layer for layer in cache.layers if hasattr(layer, "conv_states")])
    again = KVPrefix.from_cache(prefix.to_cache(3, config=model.config), row=2, num_tokens=12)
    pairs = zip(prefix.tensors(), again.tensors(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    with torch.no_grad():
        row = token_ids(1, 5, seed=1)
        expected = model(input_ids=row, past_key_values=cache).logits
        assert_close(model(input_ids=row, past_key_values=prefix.to_cache(1, config=model.config)).logits, expected)
    with pytest.raises(
        ValueError, match="`num_tokens=4`, but the recurrent states of the cache are those of all 12 tokens"
    ):
        KVPrefix.from_cache(prefix.to_cache(config=model.config), num_tokens=4)


@pytest.mark.parametrize(
    ("keys", "values", "message"),
    [
        ((), (), "`keys` and `values` need one tensor per layer each, got 0 and 0"),
        ((torch.zeros(1, 2, 3),), (), "got 1 and 0"),
        ((torch.zeros(1, 2, 3),), (torch.zeros(1, 3, 3),), r"`values\[0\]` has shape \(1, 3, 3\)"),
        ((torch.zeros(2, 3),), (torch.zeros(2, 3),), r"`keys\[0\]` has shape \(2, 3\)"),
        ((torch.zeros(1, 2, 3),) * 2, (torch.zeros(1, 2, 3), torch.zeros(2, 2, 3)), r"`values\[1\]` has shape"),
    ],
)
def test_shapes_that_do_not_fit(keys: tuple[Tensor, ...], values: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KVPrefix(keys, values)
