"""Reading a cartridge's folder: what is refused, before a value of it is used."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_cartridges import KVPrefix
from peft_cartridges.adapter_folder import read_cartridge, read_config, write_cartridge
from tests.exactness import cartridge_model
from tests.tiny_models import tiny_model, token_ids

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def saved(folder: Path, name: str = "llama", num_tokens: int = 10, seed: int = 0, **options: Any) -> Path:
    """The folder of a cartridge with the prefix of some token ids."""
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(num_tokens, seed=seed))
    cartridge_model(model, prefix, **options).save_pretrained(folder)
    return folder


def edit_config(folder: Path, **fields: Any) -> None:
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_what_is_written_is_what_peft_writes(name: str, tmp_path: Path) -> None:
    folder = saved(tmp_path / "peft", name)
    config, prefix = read_cartridge(folder)
    write_cartridge(tmp_path / "ours", config, prefix)
    theirs, ours = load_file(folder / WEIGHTS), load_file(tmp_path / "ours" / WEIGHTS)
    assert theirs.keys() == ours.keys() and all(torch.equal(theirs[key], ours[key]) for key in theirs)
    fields = [json.loads((tmp_path / part / CONFIG).read_text()) for part in ("peft", "ours")]
    assert fields[0] == fields[1]
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == [CONFIG, WEIGHTS]


def test_a_folder_without_a_cartridge(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        read_config(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"no cartridge: it has no adapter_config\.json"):
        read_config(tmp_path)
    saved(tmp_path)
    edit_config(tmp_path, peft_type="LORA")
    with pytest.raises(ValueError, match="says peft_type 'LORA', not 'CARTRIDGE'"):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(tmp_path)
    (tmp_path / CONFIG).write_text("[" * 100_000)
    with pytest.raises(ValueError, match="is not JSON"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_layers": None}, "`num_layers` must be a whole number"),
        ({"num_layers": -2}, "`num_layers` must be a whole number"),
        ({"token_dim": "16"}, "`token_dim` must be a whole number"),
        ({"token_dim": 15}, "no multiple"),
        ({"num_virtual_tokens": 10**12}, "ask for"),
        ({"num_virtual_tokens": True}, "`num_virtual_tokens`"),
        ({"num_frozen_tokens": 11}, "`num_frozen_tokens`"),
        ({"layer_shapes": [[2, 8]]}, "`layer_shapes` must be"),
        ({"layer_shapes": [[2, 8, "8"], None]}, "`layer_shapes` must be"),
        ({"layer_shapes": []}, "`layer_shapes` must be"),
        ({"layer_states": [{"conv": [2]}]}, "`layer_states` is given without `layer_shapes`"),
        ({"layer_states": [{"conv": [-2]}], "layer_shapes": [None]}, "`layer_states` must be"),
        ({"layer_states": [], "layer_shapes": [None]}, "`layer_states` must be"),
        ({"num_virtual_tokens": 0}, "`num_virtual_tokens` must be at least 1 where no layer has a state"),
    ],
)
def test_a_configuration_that_lies_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    edit_config(saved(tmp_path), **fields)
    with pytest.raises(ValueError, match=message):
        read_cartridge(tmp_path)


def test_unknown_fields_are_left_out_aloud(tmp_path: Path) -> None:
    edit_config(saved(tmp_path), from_the_future=1)
    with pytest.warns(UserWarning, match="from_the_future"):
        read_config(tmp_path)


def test_pickled_weights_are_refused_and_not_opened(tmp_path: Path) -> None:
    (saved(tmp_path) / WEIGHTS).unlink()
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        read_cartridge(tmp_path)
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(ValueError, match=r"pickled weights only \(adapter_model\.bin\)"):
        read_cartridge(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(keep: int, tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="truncated or damaged"):
        read_cartridge(tmp_path)


def test_tensors_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    good = load_file(saved(tmp_path) / WEIGHTS)["prompt_embeddings"]
    for tensors, message in [
        (
            {"prompt_embeddings": good, "base_model.model.lm_head.weight": good.clone()},
            "`base_model.model.lm_head.weight`",
        ),
        ({"prompt_embeddings": good.to(torch.float8_e4m3fn)}, "dtype F8_E4M3"),
        ({"prompt_embeddings": good.to(torch.int8)}, "dtype I8"),
        ({"prompt_embeddings": good[:, :32].clone()}, re.escape("shape (10, 32)")),
        ({"prompt_embeddings": good.clone().index_fill_(0, torch.tensor(3), torch.nan)}, "NaN"),
        ({"layers.0.key": good}, "no tensor `prompt_embeddings`"),
    ]:
        save_file(tensors, tmp_path / WEIGHTS)
        with pytest.raises(ValueError, match=message):
            read_cartridge(tmp_path)
