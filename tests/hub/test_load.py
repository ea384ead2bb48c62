"""`load_cartridge`, and the checks of the base model before it."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model

from peft_cartridges import (
    CartridgeConfig,
    HubError,
    KVPrefix,
    check_base_model,
    initialize_cartridge,
    load_cartridge,
    pull_cartridge,
    push_cartridge,
)
from peft_cartridges.cli import main
from peft_cartridges.hub import CardFacts, build_model_card, identify_base_model, load_facts, save_facts
from tests.causal_lms import tiny_causal_lm
from tests.exactness import cartridge_model
from tests.hub.local_hub import LocalHub
from tests.test_adapter_folder import CONFIG, WEIGHTS, edit_config, saved
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

ROW = token_ids(1, 6, seed=1)


def _base_files(folder: Path, **changes: Any) -> dict[str, bytes]:
    tiny_model(**changes).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def _pushed(hub: LocalHub, tmp_path: Path) -> torch.Tensor:
    """A base model and a cartridge on the Hub; the logits that they give together."""
    hub.add_repo("org/base", _base_files(tmp_path / "base"))
    model = tiny_model()
    peft_model = cartridge_model(model, KVPrefix.from_input_ids(model, token_ids(10)))
    push_cartridge(peft_model, "user/handbook", base_model="org/base", facts=CardFacts(question="what is the sea ?"))
    return peft_model(input_ids=ROW).logits


def test_one_line_loads_base_model_cartridge_and_tokenizer(hub: LocalHub, tmp_path: Path) -> None:
    expected = _pushed(hub, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, tokenizer = load_cartridge("user/handbook")
    torch.testing.assert_close(model(input_ids=ROW).logits, expected)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert tokenizer("the sea")["input_ids"] == tiny_tokenizer()("the sea")["input_ids"]
    trainable, _ = load_cartridge("user/handbook", is_trainable=True)
    assert trainable.training and any(p.requires_grad for p in trainable.parameters())


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2"])
def test_states_of_recurrent_layers_come_back_from_the_hub(
    hub: LocalHub, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    model: Any = tiny_causal_lm(name)
    model.save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    hub.add_repo("org/base", {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()})
    prefix = KVPrefix.from_input_ids(model, token_ids(10))
    peft_model = get_peft_model(model, CartridgeConfig(num_tokens=10 if prefix.keys else 0)).eval()
    initialize_cartridge(peft_model, prefix=prefix)
    with torch.no_grad():
        expected = peft_model(input_ids=ROW).logits
        push_cartridge(peft_model, "user/handbook", base_model="org/base")
        torch.testing.assert_close(load_cartridge("user/handbook")[0](input_ids=ROW).logits, expected)
    main(["info", "user/handbook"])
    assert f"of {len(prefix.states)} recurrent layers" in capsys.readouterr().out


def test_the_usage_block_of_the_card_runs(hub: LocalHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pushed(hub, tmp_path)
    card = hub.files("user/handbook")["README.md"].decode()
    (block,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert 'load_cartridge("user/handbook")' in block and "what is the sea ?" in block
    exec(compile(block, "card", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_a_base_model_of_another_shape_or_rope_is_refused(hub: LocalHub, tmp_path: Path) -> None:
    _pushed(hub, tmp_path)
    for number, (changes, message) in enumerate(
        [
            ({"num_hidden_layers": 3}, "2 layers of .* the model 3"),
            ({"name": "qwen3"}, r"\(2, 8, 8\), the model 2 of \(2, 16, 16\)"),
            ({"name": "qwen2"}, "`model_type` is 'qwen2' in the model and 'llama'"),
            ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "`rope_parameters` is .*500000"),
        ]
    ):
        hub.add_repo(f"org/other{number}", _base_files(tmp_path / f"other{number}", **changes))
        with pytest.raises(ValueError, match=message) as caught:
            load_cartridge("user/handbook", base_model=f"org/other{number}")
        assert "\n" not in str(caught.value)


def test_other_weights_are_warned_of_whatever_they_are_called(hub: LocalHub, tmp_path: Path) -> None:
    _pushed(hub, tmp_path)
    hub.add_repo("org/mirror", _base_files(tmp_path / "base"))
    with pytest.warns(UserWarning, match=r"weights of the model are not those that .* \(org/base\)"):
        check_base_model(tiny_model(seed=1), pull_cartridge("user/handbook"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        load_cartridge("user/handbook", base_model="org/mirror")


def test_without_a_hash_names_and_revisions_are_compared(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), tiny_model()
    edit_config(folder, base_model_name_or_path="org/base")
    model.name_or_path = "org/another"
    with pytest.warns(UserWarning, match="trained on 'org/base', the model is 'org/another'"):
        check_base_model(model, folder)
    model.name_or_path = "org/base"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base_model(model, folder)
    identity = identify_base_model(model, hash_weights=False)
    identity.revision = "a" * 40
    save_facts(CardFacts(base_identity=identity), folder)
    model.config._commit_hash = "b" * 40
    with pytest.warns(UserWarning, match="revision aaaa.* the model is bbbb"):
        check_base_model(model, folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_checkpoint_has_one_hash_in_any_dtype(dtype: torch.dtype) -> None:
    stored = tiny_model(dtype=torch.bfloat16)
    expected = identify_base_model(stored).weights_sha256
    assert expected and identify_base_model(stored.to(dtype)).weights_sha256 == expected
    assert identify_base_model(tiny_model(seed=1, dtype=dtype)).weights_sha256 != expected


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "qwen2_5_vl"])
def test_a_cartridge_does_not_change_who_its_base_is(name: str, tmp_path: Path) -> None:
    model = tiny_model(name)
    before = identify_base_model(model)
    peft_model = cartridge_model(model, KVPrefix.from_input_ids(model, token_ids(6)))
    assert identify_base_model(peft_model) == before
    save_facts(CardFacts(base_identity=before), tmp_path)
    assert load_facts(tmp_path).base_identity is not None
    peft_model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_base_model(tiny_model(name), tmp_path)
        check_base_model(peft_model, tmp_path)


def test_a_repository_does_not_choose_a_folder_of_this_machine(hub: LocalHub, tmp_path: Path) -> None:
    _base_files(tmp_path / "base")
    folder = saved(tmp_path / "cartridge")
    edit_config(folder, base_model_name_or_path=str(tmp_path / "base"))
    hub.add_repo("user/handbook", {path.name: path.read_bytes() for path in folder.iterdir()})
    with pytest.raises(ValueError, match="no name on the Hub: pass `base_model=…`"):
        load_cartridge("user/handbook")
    assert load_cartridge("user/handbook", base_model=tmp_path / "base")[0] is not None
    assert load_cartridge(folder)[0] is not None  # a folder of one's own may
    edit_config(folder, base_model_name_or_path=None)
    with pytest.raises(ValueError, match="does not say which base model"):
        load_cartridge(folder)


def test_a_base_model_that_is_not_to_be_had_is_one_line(hub: LocalHub, tmp_path: Path) -> None:
    folder = saved(tmp_path / "cartridge")
    base = _base_files(tmp_path / "base")
    hub.add_repo("org/gated", base, gated=True)
    hub.add_repo(
        "org/pickled", {**{n: d for n, d in base.items() if n != "model.safetensors"}, "pytorch_model.bin": b"!"}
    )
    hub.add_repo(
        "org/code", {**base, "config.json": _with_code(base["config.json"]), "modeling.py": b"raise SystemExit"}
    )
    for name, message in [
        ("org/gated", "'org/gated' is gated: ask for access"),
        ("org/missing", "'org/missing' could not be loaded"),
        ("org/pickled", "'org/pickled' could not be loaded"),
    ]:
        edit_config(folder, base_model_name_or_path=name)
        with pytest.raises(HubError, match=message) as caught:
            load_cartridge(folder)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="`trust_remote_code` is not for here"):
        load_cartridge(folder, trust_remote_code=True)  # house-ok: that it is refused
    edit_config(folder, base_model_name_or_path="org/code")
    with pytest.raises(HubError, match=r"'org/code' could not be loaded: .*`unheard_of`"):
        load_cartridge(folder)


def _with_code(config: bytes) -> bytes:
    changed = {**json.loads(config), "model_type": "unheard_of", "auto_map": {"AutoModelForCausalLM": "modeling.Model"}}
    return json.dumps(changed).encode()


def test_cards_are_the_same_again(tmp_path: Path) -> None:
    facts = CardFacts(base_identity=identify_base_model(tiny_model()))
    save_facts(facts, tmp_path)
    assert str(build_model_card(load_facts(tmp_path))) == str(build_model_card(facts))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({WEIGHTS: None, "adapter_model.bin": b"cos\nsystem\n(S'false'\ntR."}, "pickled weights only"),
        ({WEIGHTS: b"half of it"}, "truncated or damaged"),
        ({WEIGHTS: None}, r"no adapter_model\.safetensors|Can't find weights"),
    ],
)
def test_by_a_name_on_the_hub_too_peft_refuses_what_load_cartridge_refuses(
    changes: dict[str, bytes | None], message: str, hub: LocalHub, tmp_path: Path
) -> None:
    files: dict[str, bytes | None] = {name: (saved(tmp_path) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    files |= changes
    for inside in ("", "deep/"):
        hub.add_repo("user/bad", {inside + name: data for name, data in files.items() if data is not None})
        base = tiny_model()
        modules = list(base.modules())
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            PeftModel.from_pretrained(base, "user/bad", subfolder=inside.rstrip("/") or None)
        assert list(base.modules()) == modules and not hasattr(base, "peft_config")
    assert not any(
        "adapter_model.bin" in path and "/resolve/" in path for method, path, _ in hub.requests if method == "GET"
    )


def test_peft_loads_a_cartridge_from_a_folder_of_a_repository(hub: LocalHub, tmp_path: Path) -> None:
    files = {name: (saved(tmp_path) / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    hub.add_repo("user/many", {f"first/{name}": data for name, data in files.items()})
    expected = PeftModel.from_pretrained(tiny_model(), tmp_path)(input_ids=ROW).logits
    model = PeftModel.from_pretrained(tiny_model(), "user/many", subfolder="first")
    assert torch.equal(model(input_ids=ROW).logits, expected)
    assert sum(WEIGHTS in path and method == "GET" for method, path, _ in hub.requests) == 1
