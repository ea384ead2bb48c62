"""The figure of the memory: what its bars say, and when there is one."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from peft_cartridges import push_cartridge
from peft_cartridges.hub import CardFacts, load_facts, save_facts
from peft_cartridges.hub.memory_figure import add_memory_figure, draw_memory_figure
from tests.hub.local_hub import LocalHub
from tests.test_adapter_folder import edit_config, saved

pytest.importorskip("matplotlib")
from matplotlib.axes import Axes

FACTS = CardFacts(kv_bytes=11 * 2**20, in_context_kv_bytes=140 * 2**20)


def test_the_bars_are_one_copy_against_a_copy_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, tuple[list[int], list[str]]] = {}

    def bar(self: Axes, x: Any, height: Any, *, label: str, **options: Any) -> Any:
        drawn[label] = (list(height), [])
        return plain_bar(self, x, height, label=label, **options)

    def bar_label(self: Axes, container: Any, labels: Any, **options: Any) -> Any:
        drawn[container.get_label()][1].extend(labels)
        return plain_label(self, container, labels=labels, **options)

    plain_bar, plain_label = Axes.bar, Axes.bar_label
    monkeypatch.setattr(Axes, "bar", bar)
    monkeypatch.setattr(Axes, "bar_label", bar_label)
    assert draw_memory_figure(11 * 2**20, 140 * 2**20, tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes().startswith(b"\x89PNG")
    cartridge, text = drawn.values()
    assert cartridge == ([11 * 2**20] * 3, ["11.0 MiB"] * 3)
    assert text == ([rows * 140 * 2**20 for rows in (1, 8, 32)], ["140.0 MiB", "1.1 GiB", "4.4 GiB"])


def test_there_is_none_where_the_size_of_the_text_is_unknown_or_matplotlib_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for unknown in ("kv_bytes", "in_context_kv_bytes"):
        facts = dataclasses.replace(FACTS, **{unknown: None})
        assert add_memory_figure(facts, tmp_path) == facts
    own = dataclasses.replace(FACTS, memory_figure="mine.png")
    assert add_memory_figure(own, tmp_path) == own
    for module in ("matplotlib.figure", "matplotlib.backends.backend_agg"):
        monkeypatch.setitem(sys.modules, module, None)
    assert add_memory_figure(FACTS, tmp_path) == FACTS
    assert list(tmp_path.iterdir()) == []


def _folder(tmp_path: Path, **facts: Any) -> Path:
    folder = saved(tmp_path)
    edit_config(folder, base_model_name_or_path="org/base")
    save_facts(CardFacts(**facts), folder)
    return folder


def test_it_is_pushed_with_the_card_that_links_it(hub: LocalHub, tmp_path: Path) -> None:
    push = push_cartridge(_folder(tmp_path, in_context_kv_bytes=2**20), "user/handbook")
    pushed = hub.files("user/handbook")
    assert pushed["memory.png"].startswith(b"\x89PNG") and "memory.png" in push.files
    assert "](memory.png)" in ModelCard(pushed["README.md"].decode()).text
    assert b'"memory_figure": "memory.png"' in pushed["cartridge.json"]
    assert not (tmp_path / "memory.png").exists() and load_facts(tmp_path).memory_figure is None  # it is left as it was


def test_a_card_links_no_picture_that_is_not_pushed(hub: LocalHub, tmp_path: Path) -> None:
    push_cartridge(_folder(tmp_path, training_curve="training_curve.png", memory_figure="gone.png"), "user/handbook")
    pushed = hub.files("user/handbook")
    assert not [name for name in pushed if name.endswith(".png")] and b".png" not in pushed["README.md"]


def test_a_card_that_someone_edited_gets_no_picture_beside_it(hub: LocalHub, tmp_path: Path) -> None:
    folder = _folder(tmp_path, in_context_kv_bytes=2**20)
    (folder / "README.md").write_text("# My own words\n")
    push_cartridge(folder, "user/handbook")
    assert "memory.png" not in hub.files("user/handbook")
