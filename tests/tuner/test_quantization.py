"""Cartridges in fewer bytes: the files, what is restored from them, and what a model makes of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge, load_cartridge, quantize_cartridge
from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.cli.main import main
from peft_cartridges.tuner.quantization import SCHEMES, dequantize_tensors, quantize_tensors
from tests.test_adapter_folder import WEIGHTS, edit_config
from tests.tiny_models import tiny_model, tiny_tokenizer

STEPS = {"int8": 254, "int4": 14}  # between the smallest and the largest code


def _save(folder: Path, num_tokens: int = 70, architecture: str = "llama") -> KVPrefix:
    model = get_peft_model(tiny_model(architecture), CartridgeConfig(num_tokens=num_tokens))
    prefix = initialize_cartridge(
        model, prefix=KVPrefix.from_input_ids(tiny_model(architecture), [10 + i % 100 for i in range(num_tokens)])
    )
    model.save_pretrained(folder)
    return prefix


@pytest.mark.parametrize("num_tokens", [1, 2, 64, 65, 131])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_what_is_restored_is_within_half_a_step(scheme: str, num_tokens: int) -> None:
    torch.manual_seed(0)
    # Channels of keys, and tokens of values, that lie far from zero and differ a hundredfold in their spread.
    tensors = {
        "layers.0.key": torch.randn(2, num_tokens, 10) * torch.logspace(-1, 1, 10) + torch.linspace(-9, 9, 10),
        "layers.0.value": torch.randn(2, num_tokens, 70) * torch.logspace(-1, 1, num_tokens)[:, None],
    }
    quantized = quantize_tensors(tensors, scheme)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    restored = dequantize_tensors(quantized, scheme, shapes)  # type: ignore[arg-type]
    for name, tensor in tensors.items():
        assert restored[name].shape == tensor.shape and restored[name].dtype == torch.float32
        assert torch.equal(restored[name][:, 0], tensor[:, 0].bfloat16().float())
        axis = 1 if name.endswith("key") else 2
        rest = tensor[:, 1:]
        if rest.numel():
            spread = rest.amax(axis, keepdim=True) - rest.amin(axis, keepdim=True)
            step = spread / STEPS.get(scheme, 16)
            assert ((restored[name][:, 1:] - rest).abs() <= 0.51 * step + 2e-2 * spread.clamp_max(0.1) + 1e-2).all()
            assert (restored[name][:, 1:] - rest).norm() <= {"int8": 0.006, "int4": 0.1, "fp8": 0.04}[
                scheme
            ] * rest.norm()


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("spread", [1e-4, 1e-2, 1.0, 30.0])
def test_quantizing_again_changes_no_bit(scheme: str, spread: float) -> None:
    torch.manual_seed(1)
    for offset in (0.0, 1e-6, 1e-3, 0.1, 1.0, 9.0, 100.0, 3000.0):
        tensors = {
            "layers.0.key": torch.randn(2, 150, 32) * spread * torch.logspace(-1, 1, 32) + offset * torch.randn(32),
            "layers.0.value": torch.randn(2, 150, 32) * spread + offset * torch.randn(2, 150, 1),
        }
        shapes: Any = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        once = quantize_tensors(tensors, scheme)
        again = quantize_tensors(dequantize_tensors(once, scheme, shapes), scheme)
        for name, tensor in once.items():
            assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8)), (name, offset)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_saving_a_loaded_cartridge_gives_its_file(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    _save(tmp_path / "whole", 131)
    quantize_cartridge(tmp_path / "whole", tmp_path / "0", scheme)  # type: ignore[arg-type]
    for number in range(2):
        PeftModel.from_pretrained(tiny_model(dtype=dtype), tmp_path / f"{number}").save_pretrained(
            tmp_path / f"{number + 1}"
        )
        assert (tmp_path / f"{number + 1}" / WEIGHTS).read_bytes() == (tmp_path / "0" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("architecture", ["llama", "deepseek_v3"])
@pytest.mark.parametrize(
    ("scheme", "bytes_per_number", "error"), [("int8", 1.2, 0.02), ("int4", 0.75, 0.3), ("fp8", 1.2, 0.1)]
)
def test_a_quantized_cartridge_is_loaded_as_any_other(
    tmp_path: Path, architecture: str, scheme: str, bytes_per_number: float, error: float
) -> None:
    prefix = _save(tmp_path / "whole", 300 if architecture == "llama" else 70, architecture)
    (tmp_path / "whole" / "NOTES.md").write_text("kept")
    before, after = quantize_cartridge(tmp_path / "whole", tmp_path / "small", scheme)  # type: ignore[arg-type]
    assert before > after == (tmp_path / "small/adapter_model.safetensors").stat().st_size
    tensors = load_file(tmp_path / "small/adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in prefix.keys + prefix.values)
    if architecture == "llama":
        # Heads of 8 dimensions make blocks of 8, whose scales and middles weigh as much as the codes of half of them.
        assert (
            sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            < (bytes_per_number + 0.1) * numbers
        )
    assert (tmp_path / "small/NOTES.md").read_text() == "kept"
    assert json.loads((tmp_path / "small/adapter_config.json").read_text())["quantization"] == scheme
    model = PeftModel.from_pretrained(tiny_model(architecture), tmp_path / "small")
    held = model.get_kv_prefix()
    for read in (held, read_cartridge(tmp_path / "small")[1]):
        for have, want in zip(read.keys + read.values, prefix.keys + prefix.values, strict=True):
            assert (have - want).norm() < error * want.norm()
            assert torch.equal(have, have) and not torch.equal(have, want)
    # Saved again, it stays what it is.
    model.save_pretrained(tmp_path / "again")
    again = read_cartridge(tmp_path / "again")[1]
    for have, want in zip(again.keys + again.values, held.keys + held.values, strict=True):
        torch.testing.assert_close(have, want, atol=2e-2 if scheme != "int8" else 5e-3, rtol=0.1)


def test_the_stock_format_comes_back(tmp_path: Path) -> None:
    _save(tmp_path / "whole")
    quantize_cartridge(tmp_path / "whole", tmp_path / "small", "int8")
    assert main(["quantize", str(tmp_path / "small"), "--to", "none", "--output-dir", str(tmp_path / "stock")]) == 0
    (name,) = load_file(tmp_path / "stock/adapter_model.safetensors")
    assert name == "prompt_embeddings"
    assert "quantization" not in json.loads((tmp_path / "stock/adapter_config.json").read_text())
    restored, small = read_cartridge(tmp_path / "stock")[1], read_cartridge(tmp_path / "small")[1]
    assert restored.dtype == torch.bfloat16
    assert torch.equal(restored.keys[0].float(), small.keys[0].bfloat16().float())


def test_the_command_says_how_much_is_saved_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path / "whole")
    command = ["quantize", str(tmp_path / "whole"), "--to", "int4", "--output-dir", str(tmp_path / "small")]
    assert main(command) == 0
    assert "bytes became" in capsys.readouterr().out
    assert main(command) == 1
    assert "holds a cartridge already: give another `output_dir`" in capsys.readouterr().err


def test_an_unknown_scheme_and_further_modules_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "whole")
    with pytest.raises(ValueError, match="`quantization` must be one of int8, int4, fp8, got 'int2'"):
        quantize_cartridge(tmp_path / "whole", tmp_path / "small", "int2")  # type: ignore[arg-type]
    edit_config(tmp_path / "whole", modules_to_save=["lm_head"])
    with pytest.raises(ValueError, match="has `modules_to_save` beside its keys and values"):
        quantize_cartridge(tmp_path / "whole", tmp_path / "small", "int8")


def _with(**changes: Any) -> Callable[[Path], None]:
    """A damage: each tensor whose name is given, with `__` for `.`, as a function makes it of the old one."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        for name, change in changes.items():
            name = name.replace("__", ".")
            made = change(tensors.pop(name, None))
            tensors |= {} if made is None else {name: made}
        save_file(tensors, folder / WEIGHTS)

    return damage


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "codes of another dtype": (_with(layers__0__key__codes=lambda t: t.half()), "key.codes` has dtype F16, expected one of I8"),
    "scales in float32": (_with(layers__0__value__scale=lambda t: t.float()), "value.scale` has dtype F32.*F16"),
    "scales of another shape": (_with(layers__0__key__scale=lambda t: t[:1].clone()), r"key.scale`.*shape \(1, 8, 2\).*ask for \(2, 8, 2\)"),
    "a first token of another shape": (_with(layers__1__key__first=lambda t: t[:, :, :4].clone()), "key.first`.*do not belong"),
    "no middles": (_with(layers__1__key__middle=lambda t: None), "no tensor `layers.1.key.middle`"),
    "NaN": (_with(layers__1__value__scale=lambda t: t * torch.nan), "`layers.1.value`.*NaN or infinite"),
    "a first token that is infinite": (_with(layers__0__key__first=lambda t: t * torch.inf), "`layers.0.key`.*NaN or infinite"),
    "a layer too many": (_with(layers__7__key__codes=lambda _: torch.ones(2, 2, dtype=torch.int8)), "`layers.7.key.codes` that is no part"),
    "the stock tensor": (_with(prompt_embeddings=lambda _: torch.ones(2, 2)), "`prompt_embeddings` that is no part"),
    "another scheme": (lambda folder: edit_config(folder, quantization="int4"), "key.codes`.*ask for"),
    "unquantized": (lambda folder: edit_config(folder, quantization=None), "no tensor `prompt_embeddings`"),
    "unknown scheme": (lambda folder: edit_config(folder, quantization="int2"), "must be one of int8, int4, fp8"),
    "10^12 tokens": (lambda folder: edit_config(folder, num_virtual_tokens=10**12), "ask for"),
    "10^12 layers": (lambda folder: edit_config(folder, num_layers=10**12), "no tensor `layers.2.key.codes`"),
    "truncated": (lambda folder: (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3]), "truncated or"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_damaged_is_refused_before_a_model_is_touched(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    _save(tmp_path / "whole")
    quantize_cartridge(tmp_path / "whole", tmp_path / "small", "int8")
    base = tiny_model()
    base.save_pretrained(tmp_path / "base")
    edit_config(tmp_path / "small", base_model_name_or_path=str(tmp_path / "base"))
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    load_cartridge(tmp_path / "small")
    damage(tmp_path / "small")
    modules = list(base.modules())
    for load in (
        lambda: read_cartridge(tmp_path / "small"),
        lambda: load_cartridge(tmp_path / "small"),
        lambda: PeftModel.from_pretrained(base, tmp_path / "small"),
    ):
        with pytest.raises(ValueError, match=message):
            load()
    assert list(base.modules()) == modules and not hasattr(base, "peft_config")
    model = get_peft_model(base, CartridgeConfig(num_tokens=70))
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path / "small", "second")
    assert list(model.peft_config) == ["default"]
