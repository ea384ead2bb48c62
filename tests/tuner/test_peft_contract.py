"""What PEFT promises for its adapters (LoRA is the measure) holds for cartridges: adding and deleting, which of them
learns, PEFT's own status and helper functions, other people's wrappers around its methods, and files that are refused
before a model is changed."""

from __future__ import annotations

import copy
import functools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model,
    initialize_kv_prefix_from_past_key_values,
    initialize_kv_prefix_from_text,
)
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import PushToHubMixin

from peft_cartridges import CartridgeConfig, KVPrefix, hub
from peft_cartridges.peft_model import CartridgePeftModel
from tests.exactness import assert_close, cartridge_model
from tests.test_adapter_folder import CONFIG, WEIGHTS, edit_config, saved
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

ROWS = token_ids(2, 6, seed=1)


def _logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=ROWS).logits


def _prefix(num_tokens: int = 9, seed: int = 0) -> KVPrefix:
    return KVPrefix.from_input_ids(tiny_model("llama"), token_ids(num_tokens, seed=seed))


# -- adapters come and go --------------------------------------------------------------------------------------------


def test_the_last_adapter_is_deleted_and_another_added() -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    model.delete_adapter("default")
    assert model.active_adapters == [] and model.peft_config == {}
    model.add_adapter("new", CartridgeConfig(num_tokens=9))
    assert model.active_adapters == []  # as with a LoRA: a new adapter is not made active by itself
    model.base_model.set_kv_prefix(_prefix(), "new")
    model.set_adapter("new")
    assert model.active_adapters == ["new"] and model.active_adapter == "new"
    assert torch.equal(_logits(model), _logits(cartridge_model(tiny_model("llama"), _prefix())))


def test_an_adapter_that_is_deleted_leaves_nothing_behind() -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    expected = _logits(model)
    model.add_adapter("b", CartridgeConfig(num_tokens=3))
    assert any(name.endswith(".b") for name in model.state_dict())
    model.delete_adapter("b")
    assert not any(name.endswith(".b") for name in model.state_dict())
    assert torch.equal(_logits(model), expected)


def test_an_adapter_made_active_twice_counts_once() -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    expected = _logits(model)
    for names in ("default", "default", ["default", "default"]):
        model.set_adapter(names)
        assert model.active_adapters == ["default"]
        assert torch.equal(_logits(model), expected)


@pytest.mark.parametrize(
    "use",
    [
        lambda model: model.set_adapter("nobody"),
        lambda model: model.set_adapter(["default", "nobody"]),
        lambda model: model.set_adapter([]),
        lambda model: model.delete_adapter("nobody"),
        lambda model: model.base_model.get_kv_prefix("nobody"),
        lambda model: model.base_model.set_kv_prefix(_prefix(), "nobody"),
        lambda model: model(input_ids=ROWS, adapter_names=["nobody", "default"]),
    ],
)
def test_a_wrong_adapter_name_is_named_and_changes_nothing(use: Callable[[PeftModel], Any]) -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    expected = _logits(model)
    with pytest.raises(ValueError, match=r"nobody|`adapter_name` is empty"):
        use(model)
    assert model.active_adapters == ["default"] and model.active_adapter == "default"
    assert torch.equal(_logits(model), expected)


def test_a_copy_is_a_cartridge_of_its_own() -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    expected = _logits(model)
    other = copy.deepcopy(model)
    assert isinstance(other, CartridgePeftModel)
    other.base_model.set_kv_prefix(_prefix(seed=5))
    assert not torch.equal(_logits(other), expected) and torch.equal(_logits(model), expected)


# -- who learns ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "unfreeze",
    [
        lambda model: model.requires_grad_(True),
        lambda model: [parameter.requires_grad_(True) for parameter in model.parameters()],
        lambda model: model.set_adapter("default"),
        lambda model: model.set_requires_grad("default", True),
        lambda model: model.base_model._mark_only_adapters_as_trainable(model.base_model.model),
        lambda model: model.add_adapter("b", CartridgeConfig(num_tokens=3)),
        lambda model: model.train(),
        lambda model: model.half().float(),
    ],
)
def test_a_frozen_token_never_learns(unfreeze: Callable[[PeftModel], Any], tmp_path: Path) -> None:
    cartridge_model(tiny_model("llama"), _prefix(), num_frozen_tokens=2).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    unfreeze(model)
    before = model.base_model.get_kv_prefix()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0, weight_decay=0.1)
    model(input_ids=ROWS, labels=ROWS).loss.backward()
    optimizer.step()
    model.save_pretrained(tmp_path / "after")
    after = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "after").base_model.get_kv_prefix()
    for old, new in zip((*before.keys, *before.values), (*after.keys, *after.values), strict=True):
        assert torch.equal(old[:, :2], new[:, :2])
        assert not torch.equal(old[:, 2:], new[:, 2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_and_trainable_tokens_have_one_dtype_and_device(dtype: torch.dtype) -> None:
    model = get_peft_model(tiny_model("llama", dtype=dtype), CartridgeConfig(num_tokens=4, num_frozen_tokens=2))
    tensors = {name: tensor for name, tensor in model.state_dict().items() if "kv_prefix_" in name}
    assert len(tensors) == 8 and {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# -- PEFT's own functions --------------------------------------------------------------------------------------------


def test_status_tells_what_a_lora_s_tells() -> None:
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=4))
    model.add_adapter("b", CartridgeConfig(num_tokens=3))
    layers = model.get_layer_status()
    assert [layer.name for layer in layers] == [f"model.model.layers.{index}.self_attn" for index in range(2)]
    for layer in layers:
        assert layer.enabled and layer.active_adapters == ["default"] and layer.available_adapters == ["b", "default"]
        assert layer.requires_grad == {"default": True, "b": False} and layer.devices["b"] == ["cpu"]
    with model.disable_adapter():
        assert model.get_model_status().enabled is False
    status = model.get_model_status()
    assert status.enabled is True and status.peft_types == {"default": "CARTRIDGE", "b": "CARTRIDGE"}
    assert status.trainable_params == 2 * 2 * 2 * 3 * 8  # layers, keys and values, heads, tokens that learn, width
    assert status.adapter_model_type == "CartridgeModel" and status.num_adapter_layers == 2


@pytest.mark.parametrize("method", ["merge_adapter", "unmerge_adapter", "merge_and_unload"])
def test_merging_is_refused(method: str) -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    expected = _logits(model)
    with pytest.raises(ValueError, match="cannot be merged into the model"):
        getattr(model, method)()
    assert torch.equal(_logits(model), expected)


def test_hotswap_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    model = cartridge_model(tiny_model("llama"), _prefix())
    expected = _logits(model)
    with pytest.raises(ValueError, match=r"Hotswapping only supports .*CARTRIDGE was passed"):
        hotswap_adapter(model, str(saved(tmp_path, seed=4)), "default")
    assert torch.equal(_logits(model), expected)


def test_stock_helpers_fill_our_cartridge(tmp_path: Path) -> None:
    base, tokenizer = tiny_model("llama"), tiny_tokenizer()
    text = "the keeper of the lighthouse wrote down every ship that passed in the night"
    ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    expected = _logits(cartridge_model(base, KVPrefix.from_input_ids(base, ids)[:6])).clone()
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=6, num_frozen_tokens=2))
    embeddings = initialize_kv_prefix_from_text(model, tokenizer, text=text, use_chat_template=False)
    encoder = model.prompt_encoder[model.active_adapter]
    assert torch.equal(encoder.weight, embeddings) and torch.equal(encoder.embedding.weight, embeddings)
    assert torch.equal(encoder.frozen_embedding, embeddings[:2])
    assert torch.equal(encoder.trainable_embedding, embeddings[2:])
    assert_close(_logits(model), expected, 1e-5)
    other = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=6, num_frozen_tokens=0))
    cache = tiny_model("llama")(input_ids=ids[None], use_cache=True).past_key_values
    initialize_kv_prefix_from_past_key_values(other, past_key_values=cache)
    assert other.prompt_encoder["default"].frozen_embedding is None
    assert_close(_logits(other), expected, 1e-5)


def test_gradients_go_through_what_the_stock_view_shows() -> None:
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=4))
    (model.prompt_encoder["default"].trainable_embedding ** 2).sum().backward()
    layer = model.base_model.cartridge_layers()[1]
    key = layer.kv_prefix_key["default"]
    assert_close(key.grad, 2 * key.detach(), 1e-6)
    with pytest.raises(ValueError, match="can't optimize a non-leaf"):  # not silently nothing
        torch.optim.SGD([model.prompt_encoder["default"].trainable_embedding], lr=1.0)


@pytest.mark.parametrize(
    ("embeddings", "message"),
    [
        (torch.zeros(3, 64), "has 3 tokens"),
        (torch.zeros(4, 48), r"prefix.*another model|expected \[num_tokens"),
        (torch.full((4, 64), torch.nan), "NaN"),
    ],
)
def test_the_stock_view_refuses_what_does_not_fit(embeddings: Tensor, message: str) -> None:
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=4))
    before = model.prompt_encoder["default"].weight.detach()
    with pytest.raises(ValueError, match=message):
        model.prompt_encoder["default"].load_prompt_embeddings(embeddings)
    assert torch.equal(model.prompt_encoder["default"].weight, before)


# -- beside others ---------------------------------------------------------------------------------------------------


def _wrapped(function: Any) -> Any:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


def test_foreign_wrappers_around_peft_s_methods_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name in ((PeftModel, "set_adapter"), (PeftModel, "load_adapter"), (PushToHubMixin, "push_to_hub")):
        monkeypatch.setattr(owner, name, _wrapped(getattr(owner, name)))
    monkeypatch.setattr(hub, "push_cartridge", lambda model, repo_id, **options: SimpleNamespace(commit=repo_id))
    model = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=3))
    assert model.push_to_hub("user/x") == "user/x"
    model.add_adapter("b", CartridgeConfig(num_tokens=4))
    model.set_adapter(["default", "b"])
    assert model.active_adapters == ["default", "b"]


_WRAPPED_FIRST = """
import functools, peft
set_adapter = peft.PeftModel.set_adapter
peft.PeftModel.set_adapter = functools.wraps(set_adapter)(lambda *args, **kwargs: set_adapter(*args, **kwargs))
from tests.tuner import test_peft_contract
test_peft_contract.test_foreign_wrappers_around_peft_s_methods_change_nothing(test_peft_contract.pytest.MonkeyPatch())
"""


def test_so_do_wrappers_that_were_there_before_us() -> None:
    run = subprocess.run([sys.executable, "-c", _WRAPPED_FIRST], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-2000:]


def test_other_adapters_get_peft_s_own_class() -> None:
    lora = get_peft_model(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    assert type(lora) is PeftModelForCausalLM
    ours = get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=3))
    assert type(ours) is CartridgePeftModel and isinstance(ours, PeftModelForCausalLM)
    # No method of PEFT's classes is ours.
    for owner in (PeftModel, PeftModelForCausalLM):
        assert not [name for name, value in vars(owner).items() if "cartridges" in getattr(value, "__module__", "")]


# -- files that are refused ------------------------------------------------------------------------------------------


def _rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


def _only_pickled(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()


def _truncated(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-3])


DAMAGED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "10^12 tokens": (lambda folder: edit_config(folder, num_virtual_tokens=10**12), "ask for \\(1000000000000, 64\\)"),
    "10^12 layers": (lambda folder: edit_config(folder, num_layers=10**12), "ask for"),
    "no layers": (lambda folder: edit_config(folder, num_layers=None), "`num_layers` must be a whole number"),
    "pickled": (_only_pickled, r"pickled weights only \(adapter_model.bin\)"),
    "truncated": (_truncated, "truncated or damaged"),
    "foreign tensor": (
        lambda folder: _rewrite(
            folder, lambda tensors: tensors.update({"base_model.model.lm_head.weight": torch.ones(2, 2)})
        ),
        "`base_model.model.lm_head.weight` that is no part",
    ),
    "a layer too many": (
        lambda folder: _rewrite(folder, lambda tensors: tensors.update({"layers.7.key": torch.ones(2, 2)})),
        "`layers.7.key` that is no part",
    ),
    "not finite": (lambda folder: _rewrite(folder, lambda tensors: tensors["prompt_embeddings"][3].fill_(torch.inf)),
                   "NaN or infinite"),
    "no floats": (lambda folder: _rewrite(folder, lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()})),
                  "dtype I8"),
    "8-bit floats": (
        lambda folder: _rewrite(folder, lambda t: t.update({k: v.to(torch.float8_e5m2) for k, v in t.items()})),
        "dtype F8_E5M2",
    ),
    "no tokens": (lambda folder: edit_config(folder, num_virtual_tokens=0), "`num_virtual_tokens` must be"),
    "no JSON": (lambda folder: (folder / CONFIG).write_text("{"), ""),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_what_is_refused_is_refused_on_every_way_into_a_model(name: str, tmp_path: Path) -> None:
    damage, message = DAMAGED[name]
    damage(saved(tmp_path / "bad", seed=4))
    base = tiny_model("llama")
    modules, expected = list(base.modules()), _logits(base)
    for options in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        with pytest.raises(ValueError, match=message):
            PeftModel.from_pretrained(base, tmp_path / "bad", **options)
        assert list(base.modules()) == modules and not hasattr(base, "peft_config")
        assert torch.equal(_logits(base), expected)
    base.save_pretrained(tmp_path / "base")
    if name != "no JSON":
        edit_config(tmp_path / "bad", base_model_name_or_path=str(tmp_path / "base"))
    with pytest.raises(ValueError, match=message):
        AutoPeftModelForCausalLM.from_pretrained(tmp_path / "bad")
    model = cartridge_model(base, _prefix(10))
    expected = _logits(model)
    for adapter in ("default", "second"):
        with pytest.raises(ValueError, match=message):
            model.load_adapter(tmp_path / "bad", adapter)
        assert list(model.peft_config) == ["default"] and model.active_adapters == ["default"]
        assert torch.equal(_logits(model), expected)


def test_weights_without_a_configuration_of_their_own_are_refused_too(tmp_path: Path) -> None:
    """`config=` keeps PEFT from reading the one beside the weights."""
    config = CartridgeConfig.from_pretrained(saved(tmp_path, seed=4))
    _only_pickled(tmp_path)
    with pytest.raises(ValueError, match="pickled weights only"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, config=config)


def test_weights_of_another_length_do_not_go_into_an_adapter(tmp_path: Path) -> None:
    model = cartridge_model(tiny_model("llama"), _prefix(10))
    expected = _logits(model)
    with pytest.raises(ValueError, match=r"shape \(7, 64\).* ask for \(10, 64\)"):
        model.load_adapter(saved(tmp_path, num_tokens=7), "default")
    assert torch.equal(_logits(model), expected)


def test_a_configuration_may_stand_alone(tmp_path: Path) -> None:
    CartridgeConfig(num_tokens=7, num_frozen_tokens=3).save_pretrained(tmp_path)
    config = CartridgeConfig.from_pretrained(tmp_path)
    assert (config.num_tokens, config.num_frozen_tokens) == (7, 3)
    with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
        get_peft_model(tiny_model("llama"), CartridgeConfig(num_tokens=7)).load_adapter(tmp_path, "default")
    base = tiny_model("llama")
    modules, expected = list(base.modules()), _logits(base)
    for options in ({}, {"config": config}):
        with pytest.raises(FileNotFoundError, match=r"no adapter_model\.safetensors"):
            PeftModel.from_pretrained(base, tmp_path, **options)
        assert list(base.modules()) == modules and not hasattr(base, "peft_config")
        assert torch.equal(_logits(base), expected)


def test_a_subfolder_is_checked_and_loaded(tmp_path: Path) -> None:
    expected = _logits(PeftModel.from_pretrained(tiny_model("llama"), saved(tmp_path / "a", seed=4)))
    assert torch.equal(_logits(PeftModel.from_pretrained(tiny_model("llama"), tmp_path, subfolder="a")), expected)
    _truncated(tmp_path / "a")
    with pytest.raises(ValueError, match="truncated or damaged"):
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, subfolder="a")


@pytest.mark.parametrize(("num_tokens", "fits"), [(511, True), (512, False), (10**12, False)])
def test_a_cartridge_leaves_room_in_the_window(num_tokens: int, fits: bool) -> None:
    model = tiny_model("llama")
    modules = list(model.modules())
    if fits:
        assert get_peft_model(model, CartridgeConfig(num_tokens=num_tokens)).base_model.get_kv_prefix()
        return
    with pytest.raises(ValueError, match=rf"`num_tokens={num_tokens}`.* 512 positions .*at most 511"):
        get_peft_model(model, CartridgeConfig(num_tokens=num_tokens))
    assert list(model.modules()) == modules


def test_dynamic_rope_has_no_such_window() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model = tiny_model("llama", rope_parameters=rope, max_position_embeddings=16)
    assert get_peft_model(model, CartridgeConfig(num_tokens=40)).base_model.get_kv_prefix().num_tokens == 40


def test_the_configuration_file_stays_stock_peft_s(tmp_path: Path) -> None:
    """What is checked more is not written more."""
    assert set(json.loads((saved(tmp_path) / CONFIG).read_text())) == {
        "auto_mapping", "base_model_name_or_path", "inference_mode", "modules_to_save", "num_attention_heads",
        "num_frozen_tokens", "num_layers", "num_transformer_submodules", "num_virtual_tokens", "peft_type",
        "peft_version", "revision", "task_type", "token_dim",
    }  # fmt: skip
