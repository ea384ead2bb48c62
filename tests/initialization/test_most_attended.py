"""The initialization by attention received."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge
from peft_cartridges.chat import ChatCodec
from peft_cartridges.initialization.most_attended import attention_received
from peft_cartridges.initialization.moved_keys import move_prefix
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain says w{number} ." for number in range(50, 80))
ROWS = [[40, 41, 42, 43], [50, 51, 52]]


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gpt_neox", "granite", "mistral", "gemma2", "gemma3", "gpt_oss"]
)
def test_attention_received_is_the_largest_weight_of_the_model_itself(architecture: str) -> None:
    model = tiny_model(architecture)
    model.set_attn_implementation("eager")
    ids = [1, *range(60, 80)]
    scores = attention_received(model, KVPrefix.from_input_ids(model, ids), ROWS)
    expected = [torch.zeros_like(score) for score in scores]
    for row in ROWS:
        attentions = model(input_ids=torch.tensor([ids + row]), output_attentions=True).attentions
        for want, weights in zip(expected, attentions, strict=True):
            heads = weights[0, :, len(ids) :, : len(ids)].amax(1).unflatten(0, (want.shape[0], -1)).amax(1)
            torch.maximum(want, heads, out=want)
    for score, want in zip(scores, expected, strict=True):
        torch.testing.assert_close(score, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2"}))
def test_all_tokens_are_the_whole_text(architecture: str) -> None:
    tokenizer, reference = tiny_tokenizer(), tiny_model(architecture)
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    model = get_peft_model(tiny_model(architecture), CartridgeConfig(num_tokens=len(ids)))
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, strategy="most_attended")
    whole = KVPrefix.from_input_ids(reference, ids)
    for have, want in zip(prefix.keys + prefix.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(have, want, atol=1e-5, rtol=1e-5)


def test_each_head_keeps_its_most_attended_tokens_and_their_distance_from_what_comes_next() -> None:
    tokenizer, model = tiny_tokenizer(), get_peft_model(tiny_model(), CartridgeConfig(num_tokens=12))
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, strategy="most_attended")
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    whole = KVPrefix.from_input_ids(tiny_model(), ids)
    assert prefix.num_tokens == 12
    picks = set()
    # Not the first layer, where the values of a word are the same wherever it stands.
    for values, all_values in zip(prefix.values[1:], whole.values[1:], strict=True):
        for head, all_of_head in zip(values, all_values, strict=True):
            distance = _distances(head, all_of_head)
            kept = distance.argmin(-1)
            assert distance.amin(-1).max() < 1e-5 and kept[0] == 0 and torch.equal(kept, kept.unique())
            picks.add(tuple(kept.tolist()))
    assert len(picks) > 1  # heads differ in what they need
    back = move_prefix(tiny_model(), prefix, len(ids) - 12, ids[:32])
    for keys, all_keys in zip(back.keys, whole.keys, strict=True):
        assert all(_distances(*pair).amin(-1)[1:].max() < 1e-3 for pair in zip(keys, all_keys, strict=True))


def _distances(some: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    return (some[:, None] - others[None]).abs().amax(-1)


def test_a_text_longer_than_the_window_is_read_in_parts_that_share_the_cartridge() -> None:
    tokenizer = tiny_tokenizer()
    model = get_peft_model(tiny_model(max_position_embeddings=160), CartridgeConfig(num_tokens=31))
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, strategy="most_attended")
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    assert prefix.num_tokens == 31 and 160 - 64 - 40 < len(ids) - 1 <= 2 * 56 + 56
    # The last part has the text's end, read behind the first token alone.
    last = KVPrefix.from_input_ids(tiny_model(), [ids[0], *ids[1 + (len(ids) - 1) * 2 // 3 :]])
    assert _distances(prefix.values[1][0][-10:], last.values[1][0]).amin(-1).max() < 1e-5
    assert _distances(prefix.values[1][0][:-10], last.values[1][0][1:]).amin(-1).max() > 1e-2


def test_a_model_with_learned_positions_starts_from_the_first_tokens_and_says_so() -> None:
    tokenizer, model = tiny_tokenizer(), get_peft_model(tiny_model("gpt2"), CartridgeConfig(num_tokens=12))
    with pytest.warns(UserWarning, match="from the first tokens of the text: The keys of layer 0 do not only turn"):
        prefix = initialize_cartridge(model, tokenizer, text=TEXT)
    expected = KVPrefix.from_input_ids(tiny_model("gpt2"), ChatCodec(None, tokenizer).encode_context(TEXT))[:12]
    torch.testing.assert_close(prefix.keys[1], expected.keys[1], atol=1e-5, rtol=1e-5)


def test_a_short_text_is_refused() -> None:
    model = get_peft_model(tiny_model(), CartridgeConfig(num_tokens=12))
    with pytest.raises(ValueError, match=r"fewer than `num_tokens=12`.*Lower `num_tokens`"):
        initialize_cartridge(model, tiny_tokenizer(), text="the sea", strategy="most_attended")


@pytest.mark.parametrize("strategy", ["most_attended", "attention_matching"])
@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_a_text_is_read_only_as_far_as_the_rotary_embeddings_stay_the_same(rope_type: str, strategy: str) -> None:
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "original_max_position_embeddings": 160, "factor": 3.2}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    base, tokenizer, furthest = tiny_model(rope_parameters=rope), tiny_tokenizer(), []
    base.model.rotary_emb.register_forward_pre_hook(
        lambda _, args, kwargs: furthest.append(int(kwargs.get("position_ids", args[-1]).max())), with_kwargs=True
    )
    model = get_peft_model(base, CartridgeConfig(num_tokens=31))
    initialize_cartridge(model, tokenizer, text=TEXT, strategy=strategy)
    assert len(ChatCodec(None, tokenizer).encode_context(TEXT)) > 120 and 80 < max(furthest) < 160
