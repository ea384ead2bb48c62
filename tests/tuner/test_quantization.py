"""Cartridges in fewer bytes: the files, what is restored from them, and what a model makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from peft_cartridges import CartridgeConfig, KVPrefix, initialize_cartridge, quantize_cartridge
from peft_cartridges.adapter_folder import read_cartridge
from peft_cartridges.cli.main import main
from peft_cartridges.tuner.quantization import SCHEMES, dequantize_tensors, quantize_tensors
from tests.tiny_models import tiny_model

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


def test_a_damaged_file_and_an_unknown_scheme_are_refused(tmp_path: Path) -> None:
    _save(tmp_path / "whole")
    with pytest.raises(ValueError, match="`quantization` must be one of int8, int4, fp8, got 'int2'"):
        quantize_cartridge(tmp_path / "whole", tmp_path / "small", "int2")  # type: ignore[arg-type]
    quantize_cartridge(tmp_path / "whole", tmp_path / "small", "int8")
    path = tmp_path / "small/adapter_model.safetensors"
    tensors = load_file(path)
    for change, message in (
        ({"layers.0.key.codes": tensors["layers.0.key.codes"].float().half()}, "is torch.float16.*expected torch.int8"),
        ({"layers.1.value.scale": tensors["layers.1.value.scale"] * torch.nan}, "layers.1.value.*NaN or infinite"),
        (
            {"layers.1.key.first": tensors["layers.1.key.first"][:, :, :4].clone()},
            "layers.1.key.first.*belongs to another",
        ),
    ):
        save_file({**tensors, **change}, path)
        for load in (
            lambda: read_cartridge(tmp_path / "small"),
            lambda: PeftModel.from_pretrained(tiny_model(), tmp_path / "small"),
        ):
            with pytest.raises(ValueError, match=message):
                load()
    save_file({name: tensor for name, tensor in tensors.items() if name != "layers.1.key.middle"}, path)
    with pytest.raises(ValueError, match=r"no tensor `layers\.1\.key\.middle`: it is damaged"):
        read_cartridge(tmp_path / "small")
