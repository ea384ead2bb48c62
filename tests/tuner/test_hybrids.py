"""Cartridges of hybrid and recurrent models: keys and values in attention layers, states in recurrent ones."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from peft_cartridges import (
    CartridgeConfig,
    KVPrefix,
    UnsupportedModelError,
    compose,
    initialize_cartridge,
    shared_prefix,
)
from peft_cartridges.adapter_folder import quantize_cartridge, read_cartridge
from peft_cartridges.initialization.corpus_tokens import parts_of_at_most
from peft_cartridges.tuner.states import join_states
from tests.causal_lms import tiny_causal_lm
from tests.exactness import assert_close, pad, unpad
from tests.tiny_models import tiny_model, tiny_tokenizer

NAMES = [
    "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba", "mamba2", "nemotron_h",
    "olmo_hybrid", "qwen3_5_text", "qwen3_next", "rwkv", "xlstm", "zamba", "zamba2", "zaya",
]  # fmt: skip
# Gated delta rule, Mamba-2 beside attention in one layer, Mamba-2 alone.
KINDS = ["qwen3_5_text", "falcon_h1", "mamba2"]
TEXT = torch.randint(8, 120, (12,), generator=torch.Generator().manual_seed(1))
OTHER = torch.randint(8, 120, (12,), generator=torch.Generator().manual_seed(2))
ROWS = [torch.randint(8, 120, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 11, 4)]
ROW = ROWS[0][None]


def cartridge(model: Any, prefix: KVPrefix | None = None, adapter_name: str = "default", **options: Any) -> PeftModel:
    """A cartridge of as many tokens as the prefix of a text, and the text's state."""
    prefix = KVPrefix.from_input_ids(model, TEXT) if prefix is None else prefix
    config = CartridgeConfig(**{"num_tokens": prefix.num_tokens if prefix.keys else 0, **options})
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    initialize_cartridge(peft_model, prefix=prefix, adapter_name=adapter_name)
    return peft_model.eval()


@torch.no_grad()
def logits(model: Any, row: Tensor = ROW, **options: Any) -> Tensor:
    return model(input_ids=row, **options).logits


def states(model: PeftModel) -> list[torch.nn.Parameter]:
    return [p for name, p in model.named_parameters() if ".kv_prefix_state." in name]


@pytest.mark.supports(
    "Hybrid and recurrent models", "cartridge of a whole text: forward, gradients, files", on="{name}"
)
@pytest.mark.parametrize("name", NAMES)
def test_a_whole_text(name: str, tmp_path: Path) -> None:
    model = tiny_causal_lm(name)
    with torch.no_grad():
        expected = [model(input_ids=torch.cat([TEXT, row])[None]).logits[0, len(TEXT) :] for row in ROWS]
    peft_model = cartridge(model)
    for side in ("left", "right"):
        batch = pad(ROWS, side)
        batch.pop("position_ids")
        with torch.no_grad():
            rows = unpad(peft_model(**batch).logits, batch)
        for have, want in zip(rows, expected, strict=True):
            assert_close(have, want)
    peft_model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["layer_format"] == 2 and "recurrent_state" not in fields
    again = PeftModel.from_pretrained(tiny_causal_lm(name), tmp_path)
    assert torch.equal(logits(again), logits(peft_model))
    peft_model.train()(input_ids=ROW, labels=ROW).loss.backward()
    trained = [p for p in peft_model.parameters() if p.requires_grad]
    assert states(peft_model) and all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    assert any(p.grad.abs().max() > 0 for p in states(peft_model))


@pytest.mark.parametrize("name", KINDS)
def test_gradients(name: str) -> None:
    """Those of `shared_prefix`, which are held against the text in context; in float64, and with checkpointing."""
    model = tiny_causal_lm(name).double()
    prefix = KVPrefix.from_input_ids(model, TEXT)
    leaves = [tensor.clone().requires_grad_() for tensor in prefix.tensors()]
    each = iter(leaves)
    with shared_prefix(model, prefix.map(lambda tensor: next(each))):
        expected = torch.autograd.grad(model(input_ids=ROW, labels=ROW, use_cache=False).loss, leaves)
    each = iter(expected)
    wanted = prefix.map(lambda tensor: next(each))
    peft_model = cartridge(model, prefix, num_frozen_tokens=0)

    def check() -> None:
        peft_model.zero_grad()
        peft_model(input_ids=ROW, labels=ROW, use_cache=False).loss.backward()
        tuner = peft_model.base_model
        for layer, key, value in zip(tuner.cartridge_layers(), wanted.keys, wanted.values, strict=True):
            assert_close(layer.kv_prefix_key["default"].grad, key, 1e-10)
            assert_close(layer.kv_prefix_value["default"].grad, value, 1e-10)
        for layer, state in zip(tuner.state_layers(), wanted.states, strict=True):
            for part, gradient in state.items():
                parameter = layer.kv_prefix_state["default"][part]
                assert parameter.dtype == torch.float64 and parameter.grad.abs().max() > 0
                assert_close(parameter.grad, gradient.double(), 1e-6)  # recurrences compute in float32

    check()
    if model.supports_gradient_checkpointing:
        peft_model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        check()


@pytest.mark.parametrize("name", ["falcon_h1", "lfm2", "mamba2"])
def test_states_are_float32_in_a_model_of_half_precision(name: str) -> None:
    peft_model = cartridge(tiny_causal_lm(name).bfloat16())
    assert {p.dtype for p in states(peft_model)} == {torch.float32}
    optimizer = torch.optim.Adam(states(peft_model), 1e-3)
    before = [p.detach().clone() for p in states(peft_model)]
    peft_model.train()(input_ids=ROW, labels=ROW).loss.backward()
    optimizer.step()
    for parameter, old in zip(states(peft_model), before, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert not torch.equal(parameter, old)


@pytest.mark.parametrize("name", KINDS)
def test_several_adapters(name: str) -> None:
    """One for each row, none, both together; off and on; taken away."""
    model = tiny_causal_lm(name)
    bare = logits(model)
    other = KVPrefix.from_input_ids(model, OTHER)
    with shared_prefix(model, other):
        behind_other = logits(model)
    peft_model = cartridge(model, adapter_name="a")
    of_a = logits(peft_model)
    peft_model.add_adapter("b", CartridgeConfig(num_tokens=12 if other.keys else 0))
    initialize_cartridge(peft_model, prefix=other, adapter_name="b")
    rows = logits(peft_model, ROW.expand(3, -1), adapter_names=["b", "__base__", "a"])
    for have, want in zip(rows, (behind_other, bare, of_a), strict=True):
        assert_close(have, want[0])
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), bare)
    peft_model.set_adapter("b")
    assert_close(logits(peft_model), behind_other)
    peft_model.set_adapter(["a", "b"])
    both = logits(peft_model)
    assert min((both - one).abs().max() for one in (of_a, behind_other)) > 1e-3
    peft_model.set_adapter("a")
    compose(peft_model, ["a", "b"], adapter_name="both", sinks="all")
    peft_model.set_adapter("both")
    assert_close(logits(peft_model), both)
    for adapter in ("both", "b"):
        peft_model.delete_adapter(adapter)
    peft_model.set_adapter("a")
    assert torch.equal(logits(peft_model), of_a)
    assert torch.equal(logits(peft_model.unload()), bare)


def test_states_that_do_not_join(tmp_path: Path) -> None:
    model = tiny_causal_lm("rwkv")
    other = KVPrefix.from_input_ids(model, OTHER)
    peft_model = cartridge(model, adapter_name="a")
    peft_model.add_adapter("b", CartridgeConfig(num_tokens=0))
    initialize_cartridge(peft_model, prefix=other, adapter_name="b")
    with pytest.raises(ValueError, match="neither that of a linear recurrence nor of a convolution"):
        compose(peft_model, ["a", "b"], adapter_name="both")
    for name, options in (("a", {}), ("b", {"recurrent_state": "skip"})):
        cartridge(tiny_causal_lm("falcon_h1"), **options).save_pretrained(tmp_path / name)
    with pytest.raises(ValueError, match="one holds states of recurrent layers and the other does not"):
        compose([str(tmp_path / "a"), str(tmp_path / "b")], output_dir=tmp_path / "both")


def test_a_composition_of_files(tmp_path: Path) -> None:
    model = tiny_causal_lm("mamba2")
    prefixes = [KVPrefix.from_input_ids(model, ids) for ids in (TEXT, OTHER)]
    for name, prefix in zip(("a", "b"), prefixes, strict=True):
        cartridge(tiny_causal_lm("mamba2"), prefix).save_pretrained(tmp_path / name)
    compose([str(tmp_path / "a"), str(tmp_path / "b")], output_dir=tmp_path / "both")
    _, both = read_cartridge(tmp_path / "both")
    for joined, one, other in zip(both.states, *(prefix.states for prefix in prefixes), strict=True):
        assert_close(joined["recurrent"], one["recurrent"] + other["recurrent"])
        assert_close(joined["conv"], (one["conv"] + other["conv"]) / 2)
    again = PeftModel.from_pretrained(tiny_causal_lm("mamba2"), tmp_path / "both")
    with shared_prefix(model, both):
        assert_close(logits(again), logits(model))


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_states_that_are_not_trained(name: str, tmp_path: Path) -> None:
    peft_model = cartridge(tiny_causal_lm(name), recurrent_state="initialize")
    assert not states(peft_model)
    expected = logits(peft_model)
    assert torch.equal(expected, logits(cartridge(tiny_causal_lm(name))))
    for parameter in peft_model.parameters():
        parameter.requires_grad_(True)  # as a careless script does
    before = peft_model.base_model.get_kv_prefix().states
    peft_model.train()(input_ids=ROW, labels=ROW).loss.backward()
    torch.optim.SGD(peft_model.parameters(), 0.1).step()
    for old, new in zip(before, peft_model.base_model.get_kv_prefix().states, strict=True):
        assert all(torch.equal(old[part], new[part]) for part in old)
    cartridge(tiny_causal_lm(name), recurrent_state="initialize").save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["recurrent_state"] == "initialize"
    again = PeftModel.from_pretrained(tiny_causal_lm(name), tmp_path)
    assert not states(again) and torch.equal(logits(again), expected)


@pytest.mark.supports("Hybrid and recurrent models", '`recurrent_state="skip"`', on="{name}")
@pytest.mark.parametrize("name", ["qwen3_next", "lfm2", "jamba", "falcon_h1"])
def test_attention_alone(name: str, tmp_path: Path) -> None:
    """As with a cache whose attention layers are filled, and whose other layers are new."""
    model = tiny_causal_lm(name)
    prefix = KVPrefix.from_input_ids(model, TEXT)
    zeros = tuple({part: torch.zeros_like(tensor) for part, tensor in state.items()} for state in prefix.states)
    with shared_prefix(model, dataclasses.replace(prefix, states=zeros)):
        expected = logits(model)
    peft_model = cartridge(model, recurrent_state="skip")
    assert_close(logits(peft_model), expected)
    assert not states(peft_model) and not peft_model.base_model.get_kv_prefix().states
    peft_model.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "adapter_config.json").read_text())
    assert fields["recurrent_state"] == "skip" and fields.get("layer_format", 1) == 1 and "layer_states" not in fields
    assert_close(logits(PeftModel.from_pretrained(tiny_causal_lm(name), tmp_path)), expected)


@pytest.mark.parametrize("name", ["qwen3_next", "falcon_h1"])
def test_states_without_keys_and_values(name: str) -> None:
    model = tiny_causal_lm(name)
    bare, prefix = logits(model), KVPrefix.from_input_ids(model, TEXT)
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=0)).eval()
    assert_close(logits(peft_model), bare)  # a state of no text
    none = peft_model.base_model.get_kv_prefix()
    assert none.num_tokens == 0 and none.keys
    initialize_cartridge(peft_model, prefix=dataclasses.replace(none, states=prefix.states))
    assert (logits(peft_model) - bare).abs().max() > 1e-3
    output = peft_model.generate(ROW, attention_mask=torch.ones_like(ROW), max_new_tokens=3, pad_token_id=0)
    assert output.shape[1] <= 10


def test_what_cannot_be() -> None:
    with pytest.raises(ValueError, match=r"`num_tokens=4`, but Mamba2ForCausalLM has no attention.*num_tokens=0"):
        get_peft_model(tiny_causal_lm("mamba2"), CartridgeConfig(num_tokens=4))
    with pytest.raises(ValueError, match=r"`num_tokens=0`, but LlamaForCausalLM has no recurrent layers"):
        get_peft_model(tiny_model(), CartridgeConfig(num_tokens=0))
    with pytest.raises(UnsupportedModelError, match=r"no attention layers, and `recurrent_state=\"skip\"`"):
        get_peft_model(tiny_causal_lm("mamba2"), CartridgeConfig(num_tokens=0, recurrent_state="skip"))
    with pytest.raises(ValueError, match="`recurrent_state` must be one of train, initialize, skip"):
        CartridgeConfig(num_tokens=4, recurrent_state="none")  # type: ignore[arg-type]
    model = tiny_causal_lm("qwen3_next")
    prefix = KVPrefix.from_input_ids(model, TEXT)
    peft_model = cartridge(model, prefix)
    with pytest.raises(ValueError, match=r"holds no states, which adapter 'default' has in 3"):
        initialize_cartridge(peft_model, prefix=prefix.without_states())
    first, *rest = prefix.states
    changes: dict[str, Any] = {
        "NaN or infinite": {**first, "recurrent": first["recurrent"] * torch.nan},
        "by another model: its state 0": {**first, "recurrent": first["recurrent"][:1]},
    }
    for message, state in changes.items():
        with pytest.raises(ValueError, match=message):
            initialize_cartridge(peft_model, prefix=dataclasses.replace(prefix, states=(state, *rest)))
    with pytest.raises(ValueError, match="it has 1 states, this model 3"):
        initialize_cartridge(peft_model, prefix=dataclasses.replace(prefix, states=(first,)))


def test_files(tmp_path: Path) -> None:
    peft_model = cartridge(tiny_causal_lm("qwen3_next"))
    peft_model.save_pretrained(tmp_path)
    path, config_path = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    tensors, fields = load_file(path), json.loads(config_path.read_text())
    keys_and_values = {
        f"layers.{i}.{part}" for i, s in enumerate(fields["layer_shapes"]) if s for part in ("key", "value")
    }
    of_states = {f"layers.{i}.state.{p}" for i, s in enumerate(fields["layer_states"]) if s for p in s}
    assert set(tensors) == keys_and_values | of_states and len(of_states) == 6
    some = sorted(of_states)[0]
    faults: dict[str, dict[str, Tensor]] = {
        rf"has no tensor `{some}`": {name: tensor for name, tensor in tensors.items() if name != some},
        rf"`{some}`.*has shape": {**tensors, some: tensors[some][:1]},
        rf"`{some}`.*NaN or infinite": {**tensors, some: tensors[some] * torch.inf},
        rf"`{some}` has dtype I8": {**tensors, some: tensors[some].to(torch.int8)},
        "is no part of a cartridge": {**tensors, "layers.0.state.more": tensors[some].clone()},
    }
    for message, changed in faults.items():
        save_file(changed, path)
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny_causal_lm("qwen3_next"), tmp_path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"The cartridge does not fit the model"):
        PeftModel.from_pretrained(tiny_causal_lm("jamba"), tmp_path)
    for change, message in (
        ({"layer_format": 3}, r"`layer_format` is 3.*Upgrade peft-cartridges"),
        ({"layer_states": [{"a.b": [2]}, *fields["layer_states"][1:]]}, r"`layer_states` must be a list"),
        ({"layer_states": fields["layer_states"][:2]}, r"`layer_states` must be a list"),
    ):
        config_path.write_text(json.dumps({**fields, **change}))
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(tiny_causal_lm("qwen3_next"), tmp_path)


def test_quantization_leaves_states_as_they_are(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    peft_model = cartridge(tiny_causal_lm("qwen3_next"))
    peft_model.save_pretrained(tmp_path / "whole")
    whole = peft_model.base_model.get_kv_prefix()
    for scheme in ("int8", "none"):
        quantize_cartridge(tmp_path / "whole", tmp_path / scheme, scheme)  # type: ignore[arg-type]
        _, prefix = read_cartridge(tmp_path / scheme)
        for old, new in zip(whole.states, prefix.states, strict=True):
            assert all(torch.equal(old[part], new[part]) and new[part].dtype == old[part].dtype for part in old)
        assert not torch.equal(prefix.keys[0].float(), whole.keys[0])
        again = PeftModel.from_pretrained(tiny_causal_lm("qwen3_next"), tmp_path / scheme)
        assert_close(logits(again), logits(peft_model), 0.2)
    cartridge(tiny_causal_lm("mamba2")).save_pretrained(tmp_path / "states")
    with pytest.raises(ValueError, match="has no keys and values"):
        quantize_cartridge(tmp_path / "states", tmp_path / "none_of_them", "int8")


# -- initialization ----------------------------------------------------------------------------------------------------

TOKENIZER = tiny_tokenizer()
WORDS = " ".join(f"w{number}" for number in range(50, 110))
IDS = TOKENIZER(WORDS, add_special_tokens=False)["input_ids"]


def same_states(have: KVPrefix, want: KVPrefix) -> None:
    for one, other in zip(have.states, want.states, strict=True):
        for part in one:
            assert_close(one[part], other[part])


@pytest.mark.parametrize(
    "strategy", ["first_tokens", "sampled_chunks", "most_attended", "attention_matching", "summary"]
)
def test_the_state_after_the_text_beside_chosen_tokens(strategy: str) -> None:
    model = tiny_causal_lm("qwen3_next")
    whole = KVPrefix.from_input_ids(model, IDS)
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=10))
    initialize_cartridge(peft_model, TOKENIZER, text=WORDS, strategy=strategy, chat_template=False)
    made = peft_model.base_model.get_kv_prefix()
    assert made.num_tokens == 10
    same_states(made, whole)
    if strategy == "first_tokens":
        assert_close(made.keys[0], whole.keys[0][:, :10])


def test_the_whole_text_is_exact() -> None:
    model = tiny_causal_lm("falcon_h1")
    with torch.no_grad():
        expected = model(input_ids=torch.cat([torch.tensor([IDS]), ROW], 1)).logits[:, len(IDS) :]
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=len(IDS))).eval()
    initialize_cartridge(peft_model, TOKENIZER, text=WORDS, strategy="most_attended", chat_template=False)
    assert_close(logits(peft_model), expected)


def test_a_recurrent_model_reads_a_text_of_any_length() -> None:
    model = tiny_causal_lm("mamba2")
    expected = KVPrefix.from_input_ids(model, IDS * 12)
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=0))
    initialize_cartridge(peft_model, TOKENIZER, text=" ".join([WORDS] * 12), chat_template=False)
    same_states(peft_model.base_model.get_kv_prefix(), expected)
    with pytest.raises(ValueError, match=r"`strategy='first_tokens'` chooses tokens.*num_tokens=0"):
        initialize_cartridge(peft_model, TOKENIZER, text=WORDS, strategy="first_tokens")


@pytest.mark.parametrize("strategy", ["first_tokens", "attention_matching"])
def test_a_text_beyond_the_window_leaves_the_joined_states_of_its_parts(strategy: str) -> None:
    model = tiny_causal_lm("qwen3_next")
    model.config.max_position_embeddings = 32  # of a text of 60 tokens
    first, rest = IDS[:1], IDS[1:]
    cut = parts_of_at_most(31, rest)
    assert len(cut) == 2
    parts = [KVPrefix.from_input_ids(model, [*first, *part]).states for part in cut]
    one = KVPrefix.from_input_ids(model, IDS[:32]).states
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=10))
    initialize_cartridge(peft_model, TOKENIZER, text=WORDS, strategy=strategy, chat_template=False)
    made = peft_model.base_model.get_kv_prefix()
    for layer, found in enumerate(made.states):
        for part, want in join_states([states[layer] for states in parts]).items():
            assert_close(found[part], want)
    assert not torch.allclose(made.states[0]["recurrent"], one[0]["recurrent"])


def test_other_beginnings() -> None:
    model = tiny_causal_lm("qwen3_next")
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=10))
    made = initialize_cartridge(peft_model, TOKENIZER, strategy="random_vectors", chat_template=False)
    assert all(not tensor.any() for state in made.states for tensor in state.values())  # no text
    made = initialize_cartridge(peft_model, TOKENIZER, strategy="random_tokens", chat_template=False)
    assert all(state["recurrent"].any() for state in made.states)  # of those tokens
    again = initialize_cartridge(peft_model, strategy="pretrained", cartridge=made)
    same_states(again, made)


@pytest.mark.parametrize("name", [*KINDS, "zaya"])  # in Zaya, the recurrence lies within the attention
@pytest.mark.parametrize("first", ["train", "skip"])
def test_a_second_adapter_has_states_too(name: str, first: str, tmp_path: Path) -> None:
    if name == "mamba2" and first == "skip":
        return  # without attention nothing would be left
    model = tiny_causal_lm(name)
    text = KVPrefix.from_input_ids(model, TEXT)
    with torch.no_grad():
        expected = model(input_ids=torch.cat([TEXT, ROWS[0]])[None]).logits[:, len(TEXT) :]
    if first == "skip":
        tokens = len(TEXT)
        peft_model = get_peft_model(model, CartridgeConfig(num_tokens=tokens, recurrent_state="skip")).eval()
    else:
        peft_model = cartridge(model, text)
    peft_model.add_adapter("second", CartridgeConfig(num_tokens=peft_model.peft_config["default"].num_tokens))
    initialize_cartridge(peft_model, prefix=text, adapter_name="second")
    peft_model.set_adapter("second")
    assert_close(logits(peft_model), expected)
    peft_model.save_pretrained(tmp_path)
    peft_model.delete_adapter("second")
    peft_model.load_adapter(tmp_path / "second", "third")
    peft_model.set_adapter("third")
    assert_close(logits(peft_model), expected)
