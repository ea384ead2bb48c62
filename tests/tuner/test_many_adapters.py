"""Many cartridges in one model: switched, composed, switched off, deleted, and one for each row of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_cartridges import CartridgeConfig, KVPrefix
from tests.exactness import (
    assert_close,
    cartridge_model,
    pad,
    past_key_values_generate,
    past_key_values_logits,
    unpad,
)
from tests.tiny_models import tiny_model, token_ids

NAMES = ["llama", "gemma3", "gpt_oss", "gpt2", "qwen2_5_vl", "deepseek_v3", "gemma4"]
LENGTHS = {"a": 5, "b": 12, "c": 1}
GENERATE = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


def _prefixes(name: str) -> dict[str, KVPrefix]:
    model = tiny_model(name)
    return {
        adapter: KVPrefix.from_input_ids(model, token_ids(length, seed=length)) for adapter, length in LENGTHS.items()
    }


def _saved(name: str, folder: Path) -> dict[str, Path]:
    for adapter, prefix in _prefixes(name).items():
        cartridge_model(tiny_model(name), prefix).save_pretrained(folder / adapter)
    return {adapter: folder / adapter for adapter in LENGTHS}


def _loaded(name: str, folder: Path) -> PeftModel:
    folders = _saved(name, folder)
    model = PeftModel.from_pretrained(tiny_model(name), folders["a"], adapter_name="a")
    model.load_adapter(folders["b"], adapter_name="b")
    model.load_adapter(folders["c"], adapter_name="c")
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, row: Tensor, **options: object) -> Tensor:
    return model(input_ids=row[None], **options).logits[0]


@pytest.mark.supports(
    "Many cartridges", "`load_adapter`, `set_adapter`, `disable_adapter`, `delete_adapter`", on="{name}"
)
@pytest.mark.parametrize("name", NAMES)
def test_switching(name: str, tmp_path: Path) -> None:
    model, plain, prefixes, row = _loaded(name, tmp_path), tiny_model(name), _prefixes(name), token_ids(6, seed=1)
    expected = {adapter: past_key_values_logits(plain, prefix, row) for adapter, prefix in prefixes.items()}
    none = past_key_values_logits(plain, None, row)
    assert_close(_logits(model, row), expected["a"])
    for adapter in ("b", "c", "a"):
        model.set_adapter(adapter)
        assert_close(_logits(model, row), expected[adapter])
        with model.disable_adapter():
            assert torch.equal(_logits(model, row), none)
        assert_close(_logits(model, row), expected[adapter])
    model.delete_adapter("a")
    assert "a" not in model.peft_config
    assert_close(_logits(model, row), expected[model.active_adapters[0]])
    with pytest.raises(ValueError, match="Adapter a not found"):
        model.set_adapter("a")


@pytest.mark.supports("Many cartridges", '`set_adapter(["a", "b"])`, composition in order', on="{name}")
@pytest.mark.parametrize("name", NAMES)
def test_composition(name: str, tmp_path: Path) -> None:
    model, plain, prefixes, row = _loaded(name, tmp_path), tiny_model(name), _prefixes(name), token_ids(6, seed=1)
    for names in (["a", "b"], ["b", "a"], ["c", "a", "b"], ("b",)):
        model.set_adapter(names)
        joined = KVPrefix.concatenate([prefixes[adapter] for adapter in names])
        assert_close(_logits(model, row), past_key_values_logits(plain, joined, row))
        rows = token_ids(2, 4, seed=3)
        # A model of its own: Qwen's vision models remember positions of the batch before.
        expected = past_key_values_generate(tiny_model(name), joined, rows, **GENERATE).sequences
        output = model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **GENERATE)
        assert output.tolist() == expected.tolist()
    model.set_adapter("b")
    assert_close(_logits(model, row), past_key_values_logits(plain, prefixes["b"], row))


def test_a_composition_trains_all_of_its_cartridges(tmp_path: Path) -> None:
    model, ids = _loaded("llama", tmp_path), token_ids(2, 6, seed=1)
    model.set_adapter(["a", "b"])
    model.train()
    model(input_ids=ids, labels=ids).loss.backward()
    layer = model.base_model.cartridge_layers()[0]
    assert all(layer.kv_prefix_key[name].grad.abs().sum() > 0 for name in ("a", "b"))
    assert not layer.kv_prefix_key["c"].requires_grad


def test_deleting_a_part_of_a_composition_leaves_the_rest(tmp_path: Path) -> None:
    model, plain, prefixes, row = _loaded("llama", tmp_path), tiny_model("llama"), _prefixes("llama"), token_ids(6)
    model.set_adapter(["a", "b"])
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert_close(_logits(model, row), past_key_values_logits(plain, prefixes["b"], row))
    assert model.active_peft_config.num_tokens == LENGTHS["b"]


def test_compositions_that_cannot_be(tmp_path: Path) -> None:
    model = _loaded("llama", tmp_path)
    with pytest.raises(ValueError, match="Adapter x, y not found; there are: a, b, c"):
        model.set_adapter(["x", "a", "y"])
    with pytest.raises(ValueError, match="`adapter_name` is empty"):
        model.set_adapter([])
    model.add_adapter("pinned", CartridgeConfig(num_tokens=3, sliding_window="pinned"))
    with pytest.raises(ValueError, match="cannot be composed: their `sliding_window` differs"):
        model.set_adapter(["a", "pinned"])


def test_other_tuners_still_take_one_name() -> None:
    from peft import LoraConfig

    model = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"]))
    model.set_adapter("default")
    with pytest.raises((TypeError, ValueError)):
        model.set_adapter(["default"])


ROWS = ["b", "__base__", "a", "c", "b"]
ROW_LENGTHS = [6, 3, 11, 1, 4]


def _rows() -> list[Tensor]:
    return [token_ids(length, seed=length) for length in ROW_LENGTHS]


def _expected_rows(name: str) -> list[Tensor]:
    plain, prefixes = tiny_model(name), _prefixes(name)
    pairs = zip(ROWS, _rows(), strict=True)
    return [past_key_values_logits(plain, prefixes.get(adapter), row) for adapter, row in pairs]


@pytest.mark.supports("Many cartridges", "`adapter_names=[…]`, one for each row, forward", on="{name}")
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", NAMES)
def test_an_adapter_for_each_row(name: str, side: str, tmp_path: Path) -> None:
    model, batch = _loaded(name, tmp_path), pad(_rows(), side)
    with torch.no_grad():
        logits = unpad(model(**batch, adapter_names=ROWS).logits, batch)
    for row_logits, expected in zip(logits, _expected_rows(name), strict=True):
        assert_close(row_logits, expected)
    plain, row = tiny_model(name), token_ids(6, seed=1)
    assert_close(_logits(model, row), past_key_values_logits(plain, _prefixes(name)["a"], row))
    assert_close(_logits(model, row, adapter_names=["__base__"]), past_key_values_logits(plain, None, row))


@pytest.mark.supports("Many cartridges", "`adapter_names=[…]`, one for each row, `generate`", on="{name}")
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_generate_with_an_adapter_for_each_row(name: str, options: dict[str, int], tmp_path: Path) -> None:
    model, plain, prefixes = _loaded(name, tmp_path), tiny_model(name), _prefixes(name)
    batch = pad(_rows(), "left")
    del batch["position_ids"]
    output = model.generate(**batch, adapter_names=ROWS, **options, **GENERATE)
    output = output.unflatten(0, (len(ROWS), -1))[..., max(ROW_LENGTHS) :]
    for adapter, row, sequences in zip(ROWS, _rows(), output, strict=True):
        if adapter == "__base__":
            alone = plain.generate(row[None], attention_mask=torch.ones(1, len(row)), **options, **GENERATE)
        else:
            beams = options.get("num_beams", 1)
            others = {key: value for key, value in options.items() if key != "num_beams"}
            alone = past_key_values_generate(plain, prefixes[adapter], row[None], beams, **others, **GENERATE).sequences
        alone = alone[:, len(row) :]
        assert sequences[:, : alone.shape[1]].tolist() == alone.tolist()


def test_adapter_names_that_do_not_fit(tmp_path: Path) -> None:
    model, ids = _loaded("llama", tmp_path), token_ids(4, 5)
    with pytest.raises(ValueError, match="`adapter_names` has names that are not loaded: x"):
        model(input_ids=ids, adapter_names=["a", "x", "b", "a"])
    with pytest.raises(ValueError, match="`adapter_names` has 3 names, which does not fit a batch of 4 rows"):
        model(input_ids=ids, adapter_names=["a", "b", "a"])
    with pytest.raises(ValueError, match=r"`adapter_names` is for inference: call `model.eval\(\)` first"):
        model.train()(input_ids=ids, adapter_names=["a", "b", "a", "a"])
    model.eval()
    expected = past_key_values_logits(tiny_model("llama"), _prefixes("llama")["a"], ids[0])
    assert_close(_logits(model, ids[0]), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_more_rows_than_attention_picks_among(name: str) -> None:
    """Twelve cartridges of different lengths, some of several rows, and rows without one: each row as by itself."""
    plain = tiny_model(name)
    prefixes = [KVPrefix.from_input_ids(plain, token_ids(4 + index, seed=index)) for index in range(12)]
    model = get_peft_model(tiny_model(name), CartridgeConfig(num_tokens=4), adapter_name="0")
    for index, prefix in enumerate(prefixes):
        if index:
            model.add_adapter(str(index), CartridgeConfig(num_tokens=prefix.num_tokens))
        model.base_model.set_kv_prefix(prefix, str(index))
    model.eval()
    rows = token_ids(16, 5, seed=99)
    names = [*map(str, range(12)), "__base__", "3", "11", "__base__"]
    with torch.no_grad():
        logits = model(input_ids=rows, adapter_names=names).logits
    for row, of_row, row_logits in zip(rows, names, logits, strict=True):
        prefix = None if of_row == "__base__" else prefixes[int(of_row)]
        assert_close(row_logits, past_key_values_logits(plain, prefix, row))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    together = model.generate(
        input_ids=rows, attention_mask=torch.ones_like(rows), adapter_names=names, **options
    ).tolist()
    for row, of_row, ids in zip(rows, names, together, strict=True):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones(1, 5), adapter_names=[of_row], **options)
        assert alone[0].tolist() == ids
