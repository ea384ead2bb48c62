"""The card: what the Hub indexes, what a person copies, and that nothing in the facts can break out of it."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import peft
import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from peft_cartridges.hub import (
    CARD_TAGS,
    BaseIdentity,
    CardFacts,
    Metric,
    Part,
    build_model_card,
    load_facts,
    save_facts,
    write_model_card,
)
from tests.test_adapter_folder import saved
from tests.tiny_models import tiny_model

FACTS = CardFacts(
    repo_id="user/handbook",
    base_model="org/base",
    base_model_revision="0123abc",
    base_identity=BaseIdentity(name="org/base", num_hidden_layers=2, rope_parameters={"rope_theta": 10000.0}),
    corpus_name="a handbook",
    corpus_tokens=3200,
    corpus_sha256="ab" * 32,
    num_tokens=256,
    num_frozen_tokens=1,
    kv_bytes=11 * 2**20,
    in_context_kv_bytes=140 * 2**20,
    recipe={"learning rate": 0.02, "steps": 80},
    num_conversations=384,
    seed_types={"question": 200, "summarization": 184},
    filters={"empty answer": 3},
    metrics=[Metric("Gold-answer NLL", 3.03, "40 questions", type="nll", command="python quickstart.py", note="4.9 bare")],
    training_curve="training_curve.png",
    license="apache-2.0",
    language=["en"],
    datasets=["org/corpus"],
    package_versions={"peft": peft.__version__, "torch": "2.13.0"},
    parts=[Part("user/a", 128, revision="v1", metrics=[Metric("NLL", 2.0)])],
    limits=["It was trained on a small model."],
    tags=["lighthouses"],
    question="Who keeps the light?",
)  # fmt: skip

PRIVATE = re.compile(r"hf_\w+|/home/|/tmp/")  # house-ok: what no card may hold


def test_the_metadata_is_what_the_hub_indexes() -> None:
    data = yaml.safe_load(re.match(r"---\n(.*?)\n---\n", str(build_model_card(FACTS)), re.DOTALL).group(1))
    assert (data["library_name"], data["base_model"], data["base_model_relation"]) == ("peft", "org/base", "adapter")
    assert {*CARD_TAGS, "base_model:adapter:org/base", "lighthouses"} <= set(data["tags"])
    assert (data["license"], data["language"], data["datasets"]) == ("apache-2.0", ["en"], ["org/corpus"])
    (result,) = data["model-index"][0]["results"]
    assert result["metrics"] == [{"type": "nll", "value": 3.03, "name": "Gold-answer NLL"}]
    assert result["dataset"]["name"] == "40 questions"
    (again,) = ModelCard(str(build_model_card(FACTS))).data.eval_results
    assert again.metric_value == 3.03


def test_the_body_says_what_is_known() -> None:
    text = build_model_card(FACTS).text
    for wanted in [
        "256 tokens, of which 1 not trained (12.5 times shorter)", "11.0 MiB; the text in context: 140.0 MiB",
        "abab", "`0.02`", "question 200", "empty answer 3", "python quickstart.py", "![Training curve](training_curve.png)",
        "[user/a](https://huggingface.co/user/a) at `v1`", "- It was trained on a small model.", f"- PEFT {peft.__version__}",
        'load_cartridge("user/handbook")', "Who keeps the light?",
    ]:  # fmt: skip
        assert wanted in text, wanted
    html = MarkdownIt().enable("table").render(text)
    assert html.count("<table>") == 4 and "<h2>Use</h2>" in html and 'class="language-python"' in html


def test_without_facts_there_are_no_empty_sections() -> None:
    card = build_model_card(CardFacts())
    assert not re.search(r"None|## (Evaluation|Parts|How)", str(card))
    assert card.data.library_name == "peft"


def test_facts_survive_the_file_and_unknown_ones_do_no_harm(tmp_path: Path) -> None:
    path = save_facts(FACTS, tmp_path)
    assert load_facts(tmp_path) == FACTS
    found = json.loads(path.read_text())
    path.write_text(json.dumps({**found, "from_the_future": {"a": 1}}))
    assert load_facts(tmp_path) == FACTS
    assert load_facts(tmp_path / "elsewhere") == CardFacts()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_tokens": "many"}, "`num_tokens` should be int, got str"),
        ({"metrics": [{"name": "NLL"}]}, "value"),
        ({"metrics": {"name": "NLL"}}, "`metrics` should be"),
        ({"base_identity": {"head_dim": [8]}}, "`head_dim` should be int, got list"),
        ({"language": [1]}, "`language` should be str"),
        ({"format_version": 99}, "upgrade peft-cartridges"),
    ],
)
def test_a_file_of_facts_that_lies_is_refused(change: dict[str, object], message: str, tmp_path: Path) -> None:
    path = save_facts(FACTS, tmp_path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        load_facts(tmp_path)


def test_a_huge_or_broken_file_of_facts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cartridge.json").write_text("[" * 500_000)
    with pytest.raises(ValueError, match="not JSON"):
        load_facts(tmp_path)
    (tmp_path / "cartridge.json").write_text(" " * (2**20 + 1))
    with pytest.raises(ValueError, match="larger than"):
        load_facts(tmp_path)


def test_nothing_in_the_facts_breaks_out_of_its_place() -> None:
    evil = "x | y\n\n# Not a heading <script>alert(1)</script> ```\n---\nlicense: mit"
    facts = dataclasses.replace(
        FACTS, corpus_name=evil, title=evil, question=evil, limits=[evil], recipe={evil: evil},
        metrics=[Metric(evil, 1.0, evil, command="echo ```\n````", note=evil)], parts=[Part(evil, corpus_name=evil)],
    )  # fmt: skip
    card = build_model_card(facts)
    assert ModelCard(str(card)).data.license == "apache-2.0"
    html = MarkdownIt().enable("table").render(card.text)
    assert "<script>" not in html
    assert re.findall(r"<h2>(.*?)</h2>", html) == ["Use", "Evaluation", "Parts, in order", "How it was made", "Limits"]
    assert html.count("<h1>") == 1 and html.count("<table>") == 4
    with pytest.raises(ValueError, match="no plain file name"):
        build_model_card(dataclasses.replace(FACTS, training_curve="../../secret.png"))


def test_paths_of_this_machine_are_not_told() -> None:
    facts = CardFacts(base_model="/home/someone/models/base", parts=[Part("/home/someone/a"), Part("./b")])
    card = str(build_model_card(facts))
    assert not PRIVATE.search(card) and "`base`" in card
    assert "base_model" not in build_model_card(facts).data.to_dict()


def test_ours_takes_the_place_of_peft_s_and_peft_leaves_its_text(tmp_path: Path) -> None:
    from peft import PeftModel

    saved(tmp_path)
    assert "Model Card for Model ID" in (tmp_path / "README.md").read_text()
    write_model_card(FACTS, tmp_path)
    ours = (tmp_path / "README.md").read_text()
    assert "Model Card for Model ID" not in ours
    base = tiny_model()
    base.add_model_tags(list(CARD_TAGS))
    PeftModel.from_pretrained(base, tmp_path).save_pretrained(tmp_path)
    again = ModelCard.load(tmp_path / "README.md")
    assert again.text.split("### Framework")[0].strip() == ModelCard(ours).text.split("### Framework")[0].strip()
    assert again.text.count("- PEFT ") == 1
    assert set(CARD_TAGS) <= set(again.data.tags)
