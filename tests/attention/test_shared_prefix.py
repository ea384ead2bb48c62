"""`shared_prefix` is exact against `past_key_values` and against the whole text in context, for every architecture."""

from __future__ import annotations

import contextlib

import pytest
import torch

from peft_cartridges import KVPrefix, UnsupportedModelError, shared_prefix
from tests.exactness import (
    assert_close,
    cartridge_model,
    pad,
    past_key_values_generate,
    past_key_values_logits,
    unpad,
)
from tests.tiny_models import ARCHITECTURES, tiny_model, token_ids

LENGTHS = (6, 3, 11)
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def _prepared(name: str, num_tokens: int = 12) -> tuple[torch.nn.Module, torch.Tensor, KVPrefix]:
    model = tiny_model(name)
    document = token_ids(num_tokens)
    return model, document, KVPrefix.from_input_ids(model, document)


def _rows() -> list[torch.Tensor]:
    return [token_ids(length, seed=length) for length in LENGTHS]


@pytest.mark.supports("Architectures", "`shared_prefix`", on="{name}")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_forward_is_that_of_past_key_values_and_of_the_whole_text(name: str) -> None:
    model, document, prefix = _prepared(name)
    rows = token_ids(3, 6, seed=1)
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=rows).logits
    for row, row_logits in zip(rows, logits, strict=True):
        assert_close(row_logits, past_key_values_logits(model, prefix, row))
        whole = past_key_values_logits(model, None, torch.cat([document, row]))
        assert_close(row_logits, whole[len(document) :])
    assert (logits - model(input_ids=rows).logits).abs().max() > 0.1, "the prefix makes no difference"


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_padding_on_either_side_changes_nothing(name: str, side: str) -> None:
    model, _, prefix = _prepared(name)
    batch = pad(_rows(), side)
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = unpad(model(**batch).logits, batch)
    for row, row_logits in zip(_rows(), logits, strict=True):
        assert_close(row_logits, past_key_values_logits(model, prefix, row))


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generate(name: str, beams: int) -> None:
    model, _, prefix = _prepared(name)
    rows = token_ids(2, 6, seed=1)
    expected = past_key_values_generate(model, prefix, rows, beams, **GENERATE)
    with shared_prefix(model, prefix):
        output = model.generate(
            rows, attention_mask=torch.ones_like(rows), num_beams=beams, return_dict_in_generate=True,
            output_scores=True, **GENERATE,
        )  # fmt: skip
    assert output.sequences.tolist() == expected.sequences.tolist()
    for step, expected_step in zip(output.scores, expected.scores, strict=True):
        assert_close(step, expected_step)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3", "gpt_oss"])
def test_generate_of_a_left_padded_batch_is_that_of_its_rows(name: str) -> None:
    model, _, prefix = _prepared(name)
    batch = pad(_rows(), "left")
    del batch["position_ids"]
    with shared_prefix(model, prefix):
        together = model.generate(**batch, **GENERATE)[:, max(LENGTHS) :]
    for row, generated in zip(_rows(), together, strict=True):
        alone = past_key_values_generate(model, prefix, row[None], **GENERATE).sequences[0, len(row) :]
        assert generated[: len(alone)].tolist() == alone.tolist()


@pytest.mark.parametrize("all_have_one", [True, False], ids=["all have one", "one has none"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_each_row_behind_a_prefix_of_its_own(name: str, all_have_one: bool) -> None:
    model = tiny_model(name)
    one, other = (KVPrefix.from_input_ids(model, token_ids(length, seed=length)) for length in (12, 7))
    prefixes = [one, other, one if all_have_one else None, one, other]
    rows = token_ids(5, 6, seed=1)
    with torch.no_grad(), shared_prefix(model, prefixes):
        logits = model(input_ids=rows).logits
    for row, prefix, row_logits in zip(rows, prefixes, logits, strict=True):
        assert_close(row_logits, past_key_values_logits(model, prefix, row))
    with shared_prefix(model, prefixes):
        found = model.generate(rows, attention_mask=torch.ones_like(rows), **GENERATE)
    for row, prefix, tokens in zip(rows, prefixes, found, strict=True):
        with contextlib.nullcontext() if prefix is None else shared_prefix(model, prefix):
            alone = model.generate(row[None], attention_mask=torch.ones(1, 6), **GENERATE)
        assert tokens.tolist() == alone[0].tolist()


def test_prefixes_of_rows_add_to_that_of_all() -> None:
    model = tiny_model("mistral")
    first, second = (KVPrefix.from_input_ids(model, token_ids(length, seed=length)) for length in (12, 7))
    rows = token_ids(3, 6, seed=1)
    with torch.no_grad(), shared_prefix(model, first), shared_prefix(model, [None, second, first]):
        logits = model(input_ids=rows).logits
    behind = [first, KVPrefix.concatenate([first, second]), KVPrefix.concatenate([first, first])]
    for row, prefix, row_logits in zip(rows, behind, logits, strict=True):
        with torch.no_grad(), shared_prefix(model, prefix, attention="concatenated"):
            assert_close(row_logits, model(input_ids=row[None]).logits[0])


def test_a_batch_of_another_size_than_the_prefixes_is_refused() -> None:
    model = tiny_model()
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    for prefixes in ([prefix, None], [prefix, prefix], [None, None]):
        with shared_prefix(model, prefixes), pytest.raises(ValueError, match=r"2 prefixes, .* the batch has 3 rows"):
            model(input_ids=token_ids(3, 6))
    with pytest.raises(ValueError, match="one prefix of all rows"):
        shared_prefix(model, [prefix], verify=True)


def test_contexts_nest_in_order() -> None:
    model, _, first = _prepared("llama")
    second = KVPrefix.from_input_ids(model, token_ids(5, seed=7))
    row = token_ids(6, seed=1)
    expected = past_key_values_logits(model, KVPrefix.concatenate([first, second]), row)
    with torch.no_grad(), shared_prefix(model, first), shared_prefix(model, second):
        assert_close(model(input_ids=row[None]).logits[0], expected)


def test_inside_an_active_cartridge_it_adds_to_the_cartridge() -> None:
    model, _, first = _prepared("llama")
    second = KVPrefix.from_input_ids(model, token_ids(5, seed=7))
    row = token_ids(6, seed=1)
    expected = past_key_values_logits(model, KVPrefix.concatenate([first, second]), row)
    peft_model = cartridge_model(model, first)
    with torch.no_grad(), shared_prefix(peft_model, second):
        assert_close(peft_model(input_ids=row[None]).logits[0], expected)
    with torch.no_grad(), peft_model.disable_adapter(), shared_prefix(peft_model, second):
        logits = peft_model(input_ids=row[None]).logits[0]
    peft_model.unload()
    assert_close(logits, past_key_values_logits(model, second, row))


@pytest.mark.parametrize("name", ["llama", "qwen2_5_vl"])
def test_the_model_gives_what_it_gave_afterwards_also_after_an_exception(name: str) -> None:
    model, _, prefix = _prepared(name)
    rows = token_ids(2, 6, seed=1)
    expected = model(input_ids=rows).logits
    with shared_prefix(model, prefix):
        assert not torch.equal(model(input_ids=rows).logits, expected)
    before = _state(model)
    assert torch.equal(model(input_ids=rows).logits, expected)
    with pytest.raises(RuntimeError, match="stop here"), shared_prefix(model, prefix):
        raise RuntimeError("stop here")
    with pytest.raises(Exception), shared_prefix(model, prefix):  # noqa: B017 - whatever the model raises
        model(input_ids="no ids")
    assert _state(model) == before
    assert torch.equal(model(input_ids=rows).logits, expected)


def _state(model: torch.nn.Module) -> list[object]:
    """What a context manager could leave behind: configuration objects, hooks, attributes of instances."""
    return [
        (
            name,
            id(getattr(module, "config", None)),
            str(getattr(module, "config", None)),
            getattr(getattr(module, "config", None), "_attn_implementation", None),
            list(module._forward_pre_hooks),
            list(module._forward_hooks),
            list(module.__dict__),
            list(module._modules),
            module.training,
        )
        for name, module in model.named_modules()
    ]


def test_a_prefix_of_another_model_is_refused_with_its_layer() -> None:
    _, _, prefix = _prepared("qwen3")
    with (
        pytest.raises(ValueError, match=r"`prefix` was made by another model.*16.* in layer 0.*self_attn"),
        shared_prefix(tiny_model("llama"), prefix),
    ):
        pass
    model = tiny_model("gemma3")
    with (
        pytest.raises(ValueError, match=r"`prefix` was made by another model: it has 3 layers, the model 2"),
        shared_prefix(tiny_model("llama"), KVPrefix.from_input_ids(model, token_ids(4))),
    ):
        pass


def test_what_is_no_transformers_model_is_refused() -> None:
    _, _, prefix = _prepared("llama")
    with (
        pytest.raises(UnsupportedModelError, match=r"`model` is a Linear.*pass a transformers causal LM"),
        shared_prefix(torch.nn.Linear(2, 2), prefix),
    ):
        pass
