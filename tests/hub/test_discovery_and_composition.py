"""Finding cartridges on the Hub by their tags, and composing them by their names."""

from __future__ import annotations

from pathlib import Path

import pytest
from peft import PeftModel

from peft_cartridges import HubError, compose, list_cartridges, push_cartridge
from peft_cartridges.hub import CardFacts, Metric, load_facts
from tests.exactness import assert_close
from tests.hub.local_hub import LocalHub
from tests.test_adapter_folder import saved
from tests.tiny_models import tiny_model, token_ids


@pytest.fixture
def shared(hub: LocalHub, tmp_path: Path) -> LocalHub:
    """Cartridges of two base models, among models that are none."""
    for seed, (name, base, value) in enumerate(
        [("tides", "org/one", 1.5), ("stars", "org/one", 2.5), ("tides-too", "org/two", 3.5)]
    ):
        facts = CardFacts(
            kv_bytes=1000, corpus_name=name, metrics=[Metric("NLL", value)], tags=["sea"] if "tides" in name else []
        )
        push_cartridge(saved(tmp_path / name, seed=seed), f"user/{name}", base_model=base, facts=facts)
    hub.add_repo("user/lora", {"README.md": b"---\nlibrary_name: peft\ntags: [lora]\n---\n"})
    hub.add_repo("other/plain", {"README.md": b"# nothing"})
    return hub


def test_cartridges_are_found_by_base_model_words_author_and_tags(shared: LocalHub) -> None:
    def names(**options: object) -> list[str]:
        return [model.id for model in list_cartridges(**options)]  # type: ignore[arg-type]

    assert names() == ["user/stars", "user/tides", "user/tides-too"]  # more than a page
    assert names(base_model="org/one") == ["user/stars", "user/tides"]
    assert names(base_model="org/one", search="TIDES") == ["user/tides"]
    assert names(tags=["sea"], limit=1) == ["user/tides"]
    assert names(author="other") == [] and names(base_model="org/three") == []
    with shared.fault("GET /api/models$", status=403), pytest.raises(HubError, match="may not do this"):
        names()


def test_composition_by_names_and_folders(shared: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"user/tides-too was trained on 'org/two' and user/tides on 'org/one'"):
        compose(["user/tides", "user/tides-too"], output_dir=tmp_path / "out")
    with pytest.warns(UserWarning, match="frozen tokens of"):
        composed = compose(["user/tides@main", tmp_path / "stars"], output_dir=tmp_path / "out", base_model="org/one")
    row = token_ids(1, 6, seed=1)
    model = PeftModel.from_pretrained(tiny_model(), "user/tides", adapter_name="a")
    model.load_adapter("user/stars", adapter_name="b")
    with pytest.warns(UserWarning, match="frozen tokens of"):
        compose(model, ["a", "b"], adapter_name="a+b")
    model.set_adapter("a+b")
    on_disk = PeftModel.from_pretrained(tiny_model(), composed).eval()
    assert_close(on_disk(input_ids=row).logits, model.eval()(input_ids=row).logits, 1e-6)
    facts = load_facts(composed)
    assert [(part.name, part.revision) for part in facts.parts] == [("user/tides", "main"), ("stars", None)]
    assert facts.num_tokens == 19 and facts.kv_bytes == 1900  # as the first part is served
    push_cartridge(composed, "user/both")
    card = shared.files("user/both")["README.md"].decode()
    assert (
        "[user/tides](https://huggingface.co/user/tides) at `main`" in card
        and "NLL on questions on the corpus: 1.5" in card
    )
    assert "user/both" in [model.id for model in list_cartridges(base_model="org/one", tags=["composition"])]


def test_a_missing_part_is_one_line_and_nothing_is_written(shared: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(HubError, match="There is no `user/missing`"):
        compose(["user/tides", "user/missing"], output_dir=tmp_path / "out")
    with pytest.raises(HubError, match="has no revision `v9`"):
        compose(["user/tides@v9", "user/stars"], output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()
