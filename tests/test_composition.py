"""Composition: exact where the parts are pieces of one true prefix, and by the documented rules elsewhere."""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from peft_cartridges import CartridgeConfig, KVPrefix, compose
from peft_cartridges.adapter_folder import read_cartridge, write_cartridge
from peft_cartridges.composition import NamedCartridge, join_cartridges
from peft_cartridges.hub import BaseIdentity, CardFacts, Metric, load_facts, save_facts
from tests.exactness import assert_close, cartridge_model, past_key_values_logits
from tests.test_adapter_folder import WEIGHTS, edit_config, saved
from tests.tiny_models import tiny_model, token_ids

ROW = token_ids(6, seed=1)

STOCK_COMPOSITION = """
import sys
from peft.tuners.cartridge.utils import compose_cartridge_adapters
compose_cartridge_adapters(sys.argv[1:3], output_path=sys.argv[3])
"""


def _part(prefix: KVPrefix, frozen: int = 0, name: str = "part", **fields: Any) -> NamedCartridge:
    heads, _, head_dim = prefix.keys[0].shape
    config = CartridgeConfig(
        num_tokens=prefix.num_tokens, num_frozen_tokens=frozen, num_layers=prefix.num_layers,
        num_attention_heads=heads, token_dim=heads * head_dim, **fields,
    )  # fmt: skip
    return NamedCartridge(name, config, prefix)


@pytest.mark.parametrize("pieces", [2, 3, 4])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_pieces_of_a_true_prefix_are_the_whole_prefix(name: str, pieces: int, tmp_path: Path) -> None:
    model = tiny_model(name)
    whole = KVPrefix.from_input_ids(model, token_ids(13))
    cuts = [round(13 * index / pieces) for index in range(pieces + 1)]
    folders = []
    for index in range(pieces):
        piece = whole[cuts[index] : cuts[index + 1]]
        folders.append(tmp_path / str(index))
        cartridge_model(tiny_model(name), piece, num_frozen_tokens=int(index == 0)).save_pretrained(folders[-1])
    composed = compose(folders, output_dir=tmp_path / "composed")
    loaded = PeftModel.from_pretrained(tiny_model(name), composed).eval()
    assert_close(loaded(input_ids=ROW[None]).logits[0], past_key_values_logits(model, whole, ROW))
    assert (loaded.peft_config["default"].num_tokens, loaded.peft_config["default"].num_frozen_tokens) == (13, 1)


def _two_adapters(tmp_path: Path) -> tuple[PeftModel, list[Path]]:
    folders = [saved(tmp_path / "a", num_tokens=10, seed=2), saved(tmp_path / "b", num_tokens=7, seed=3)]
    model = PeftModel.from_pretrained(tiny_model(), folders[0], adapter_name="a")
    model.load_adapter(folders[1], adapter_name="b")
    return model.eval(), folders


def test_without_dropping_it_is_set_adapter_and_peft_s_own_composition(tmp_path: Path) -> None:
    model, folders = _two_adapters(tmp_path)
    model.set_adapter(["a", "b"])
    expected = model(input_ids=ROW[None]).logits
    compose(folders, output_dir=tmp_path / "ours", sinks="all")
    # In a process of its own, where PEFT's utility finds PEFT's configuration class.
    subprocess.run([sys.executable, "-c", STOCK_COMPOSITION, *map(str, folders), str(tmp_path / "peft")], check=True)
    ours, theirs = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / "peft" / WEIGHTS)
    assert torch.equal(ours["prompt_embeddings"], theirs["prompt_embeddings"])
    config, stock = (read_cartridge(tmp_path / name)[0] for name in ("ours", "peft"))
    assert (config.num_tokens, config.num_frozen_tokens) == (stock.num_tokens, stock.num_frozen_tokens) == (17, 1)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "ours").eval()
    assert_close(loaded(input_ids=ROW[None]).logits, expected, 1e-6)


@pytest.mark.parametrize("sinks", ["first", "all"])
@pytest.mark.filterwarnings("ignore:The 1 frozen tokens")
def test_in_memory_and_on_disk_are_the_same(sinks: Any, tmp_path: Path) -> None:
    model, folders = _two_adapters(tmp_path)
    assert compose(model, ["a", "b"], adapter_name="a+b", sinks=sinks) is model
    assert model.active_adapters == ["a"]
    model.set_adapter("a+b")
    in_memory = model(input_ids=ROW[None]).logits
    composed = compose(folders, output_dir=tmp_path / "composed", sinks=sinks)
    on_disk = PeftModel.from_pretrained(tiny_model(), composed).eval()(input_ids=ROW[None]).logits
    assert torch.equal(in_memory, on_disk)
    model.save_pretrained(tmp_path / "again", selected_adapters=["a+b"])
    again = load_file(tmp_path / "again" / "a+b" / WEIGHTS)["prompt_embeddings"]
    assert torch.equal(again, load_file(composed / WEIGHTS)["prompt_embeddings"])


def test_order_is_the_caller_s(tmp_path: Path) -> None:
    model, _ = _two_adapters(tmp_path)
    one, other = (model.get_kv_prefix(name) for name in ("a", "b"))
    _, prefix = join_cartridges([_part(other), _part(one)])
    assert torch.equal(prefix.keys[1], torch.cat([other.keys[1], one.keys[1]], dim=1))


def test_one_sink_is_kept_if_the_parts_froze_theirs() -> None:
    model = tiny_model()
    texts = [torch.cat([torch.tensor([1]), token_ids(5, seed=seed)]) for seed in (1, 2, 3)]
    prefixes = [KVPrefix.from_input_ids(model, text) for text in texts]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the sinks are one token at one place: nothing to warn of
        config, prefix = join_cartridges([_part(p, frozen=1) for p in prefixes])
    assert (config.num_tokens, config.num_frozen_tokens) == (6 + 5 + 5, 1)
    expected = torch.cat([prefixes[0].values[0], prefixes[1].values[0][:, 1:], prefixes[2].values[0][:, 1:]], dim=1)
    assert torch.equal(prefix.values[0], expected)
    assert join_cartridges([_part(p, frozen=1) for p in prefixes], sinks="all")[1].num_tokens == 18


def test_frozen_counts_are_reconciled_by_the_rules() -> None:
    model = tiny_model()
    prefixes = [KVPrefix.from_input_ids(model, token_ids(6, seed=seed)) for seed in (1, 2)]
    none_in_the_first, _ = join_cartridges([_part(prefixes[0]), _part(prefixes[1], frozen=2)])
    assert (none_in_the_first.num_tokens, none_in_the_first.num_frozen_tokens) == (12, 0)
    none_in_the_second, _ = join_cartridges([_part(prefixes[0], frozen=3), _part(prefixes[1])])
    assert (none_in_the_second.num_tokens, none_in_the_second.num_frozen_tokens) == (12, 3)
    with pytest.warns(UserWarning, match=r"The 2 frozen tokens of part are not those of part.*`sinks='all'`"):
        config, _ = join_cartridges([_part(prefixes[0], frozen=1), _part(prefixes[1], frozen=2)])
    assert (config.num_tokens, config.num_frozen_tokens) == (10, 1)
    with pytest.raises(ValueError, match="frozen tokens only"):
        join_cartridges([_part(prefixes[0], frozen=1), _part(prefixes[1], frozen=6)])


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16, torch.bfloat16], torch.bfloat16),
        ([torch.bfloat16, torch.float32], torch.float32),
        ([torch.float16, torch.bfloat16], torch.float32),
    ],
)
def test_the_dtype_holds_all_values(dtypes: list[torch.dtype], expected: torch.dtype, tmp_path: Path) -> None:
    prefix = KVPrefix.from_input_ids(tiny_model(), token_ids(4))
    for index, dtype in enumerate(dtypes):
        part = _part(prefix.to(dtype))
        write_cartridge(tmp_path / str(index), part.config, part.prefix)
    composed = compose([tmp_path / "0", tmp_path / "1"], output_dir=tmp_path / "composed")
    _, joined = read_cartridge(composed)
    assert joined.dtype == expected
    for index, dtype in enumerate(dtypes):
        piece = joined[4 * index : 4 * index + 4]
        assert torch.equal(piece.keys[0], prefix.keys[0].to(dtype).to(expected))


def test_cartridges_of_different_base_models_are_refused(tmp_path: Path) -> None:
    llama, qwen = saved(tmp_path / "llama"), saved(tmp_path / "qwen", "qwen3")
    with pytest.raises(ValueError, match=r"another base model.*\(2, 8, 8\) and \(2, 16, 16\)"):
        compose([llama, qwen], output_dir=tmp_path / "out")
    with pytest.raises(ValueError, match="2 and 3 layers"):
        compose([saved(tmp_path / "mistral", "mistral"), saved(tmp_path / "g", "gemma3")], output_dir=tmp_path / "out")
    other = saved(tmp_path / "other")
    edit_config(llama, base_model_name_or_path="org/one")
    edit_config(other, base_model_name_or_path="org/two")
    with pytest.raises(ValueError, match=r"'org/two' and .* on 'org/one'.*`base_model=…`"):
        compose([llama, other], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    compose([llama, other], output_dir=tmp_path / "out", base_model="org/one", sinks="all")
    assert read_cartridge(tmp_path / "out")[0].base_model_name_or_path == "org/one"


def test_facts_that_contradict_are_refused_and_hashes_prove_one_model(tmp_path: Path) -> None:
    folders = [saved(tmp_path / "a"), saved(tmp_path / "b")]
    edit_config(folders[0], base_model_name_or_path="org/base")
    edit_config(folders[1], base_model_name_or_path="folder/of/mine")
    ropes = [{"rope_type": "default", "rope_theta": theta} for theta in (1e4, 5e5)]
    for folder, rope in zip(folders, ropes, strict=True):
        identity = BaseIdentity(rope_parameters=rope, weights_sha256="f" * 64)
        save_facts(CardFacts(base_model="org/base", base_identity=identity), folder)
    with pytest.raises(ValueError, match=r"`rope_parameters` is .*10000.*500000"):
        compose(folders, output_dir=tmp_path / "out")
    for folder in folders:
        identity = BaseIdentity(rope_parameters=ropes[0], weights_sha256="f" * 64)
        save_facts(CardFacts(base_model="org/base", base_identity=identity), folder)
    compose(folders, output_dir=tmp_path / "out")
    assert read_cartridge(tmp_path / "out")[0].base_model_name_or_path == "org/base"


def test_the_card_names_the_parts_and_their_metrics(tmp_path: Path) -> None:
    folders = [saved(tmp_path / "tides"), saved(tmp_path / "stars")]
    for folder, value in zip(folders, (1.25, 2.5), strict=True):
        metrics = [Metric("Gold-answer NLL", value, dataset=f"questions on {folder.name}")]
        save_facts(CardFacts(corpus_name=folder.name, metrics=metrics, language=["en"], license="mit"), folder)
    composed = compose(folders, output_dir=tmp_path / "out")
    card = (composed / "README.md").read_text()
    assert "# A composition of tides, stars" in card and "license: mit" in card
    assert "| 1 | `tides` | tides | 10 | Gold-answer NLL on questions on tides: 1.25 |" in card
    assert "| 2 | `stars` | stars | 10 | Gold-answer NLL on questions on stars: 2.5 |" in card
    assert str(tmp_path) not in card
    assert [part.metrics[0].value for part in load_facts(composed).parts] == [1.25, 2.5]


def test_bad_calls_say_what_to_write(tmp_path: Path) -> None:
    model, folders = _two_adapters(tmp_path)
    for call, message in [
        (lambda: compose([folders[0]], output_dir=tmp_path / "x"), "at least two"),
        (lambda: compose(folders), r"compose\(\['user/a', './b'\], output_dir='both'\)"),
        (lambda: compose(str(folders[0]), output_dir=tmp_path / "x"), "With files"),
        (lambda: compose(folders, output_dir=tmp_path / "x", sinks="none"), "`sinks` must be"),
        (lambda: compose(model, ["a", "b"]), r"adapter_name='a\+b'"),
        (lambda: compose(model, ["a", "c"], adapter_name="x"), "Not loaded: c. There are: a, b"),
        (lambda: compose(model, ["a", "b"], adapter_name="b"), "is taken"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(FileNotFoundError, match="neither a folder nor a name"):
        compose([folders[0], "./nothing"], output_dir=tmp_path / "x")
    assert not (tmp_path / "x").exists()
