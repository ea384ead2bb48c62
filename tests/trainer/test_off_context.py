"""General conversations in training: the teacher without a text, stored or live; and budgets, on tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, SelfStudyTrainer, load_self_study
from peft_cartridges.conversations.rows import off_context_rows
from peft_cartridges.self_study.off_context import num_off_context
from peft_cartridges.self_study.sizes import FEWEST_CONVERSATIONS
from peft_cartridges.trainer.budget import RunBudget
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import TEXT, TOKENIZER, losses, make_config, make_conversations, make_trainer


@pytest.fixture(scope="module")
def mixed() -> Dataset:
    return make_conversations(off_context_share=0.2)


@pytest.fixture(scope="module")
def live() -> Dataset:
    return make_conversations(off_context_share=0.2, teacher_targets="live")


def _gradient(folder: Path, dataset: Dataset, **options: Any) -> tuple[list[float], torch.Tensor]:
    """Losses of a run, and the trained cartridge."""
    trainer = make_trainer(folder, dataset=dataset, **options)
    trainer.train()
    return losses(trainer), trainer.model.get_kv_prefix().to_prompt_embeddings()


def test_the_live_teacher_of_a_row_without_a_text_is_the_bare_model(
    tmp_path: Path, mixed: Dataset, live: Dataset
) -> None:
    trainer = make_trainer(tmp_path, dataset=live)
    trainer.initialize_cartridge()
    places = off_context_rows(live)
    assert len(places) == 4
    rows = trainer._data.live_targets.for_evaluation([live[place] for place in (0, *places)])
    for row, place in zip(rows, (0, *places), strict=True):
        stored = torch.tensor(mixed[place]["teacher_hidden_states"]).reshape(row["teacher_hidden_states"].shape)
        torch.testing.assert_close(row["teacher_hidden_states"], stored, atol=5e-3, rtol=5e-3)


def test_live_and_stored_targets_train_alike(tmp_path: Path, mixed: Dataset, live: Dataset) -> None:
    options = {"off_context_share": 0.2, "train_sampling_strategy": "random"}
    stored, _ = _gradient(tmp_path / "stored", mixed, **options)
    computed, _ = _gradient(tmp_path / "live", live, **options)
    assert computed == pytest.approx(stored, rel=5e-3)


def test_without_a_share_training_is_that_of_a_set_without_them(tmp_path: Path, mixed: Dataset) -> None:
    about = mixed.select(range(16))
    plain, first = _gradient(tmp_path / "plain", about, off_context_share=0.2)
    none, second = _gradient(tmp_path / "none", mixed, off_context_share=0.0)
    assert plain == none and torch.equal(first, second)
    some, third = _gradient(tmp_path / "some", mixed, off_context_share=0.2)
    assert some != none and not torch.equal(second, third)


def test_evaluation_sets_are_not_mixed(tmp_path: Path, mixed: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed, off_context_share=0.2)
    whole, about = trainer.evaluate(mixed), trainer.evaluate(mixed.select(range(16)))
    assert whole["eval_loss"] == about["eval_loss"]
    assert whole["eval_conversation_gap_closed"] == about["eval_conversation_gap_closed"]
    # A set of nothing but general conversations tells how far the model is from itself.
    off = trainer.evaluate(mixed.select(off_context_rows(mixed)))
    assert off["eval_loss"] > 0 and off["eval_no_context_kl"] == pytest.approx(0, abs=1e-4)


def test_a_run_on_a_corpus_mixes_its_share_and_its_held_out_set_none(tmp_path: Path) -> None:
    arguments = {"off_context_dataset": [{"prompt": f"is w{number} blue ?"} for number in range(9)]}
    trainer = make_trainer(tmp_path, off_context_share=0.2, num_eval_conversations=4, arguments=arguments)
    trainer.train()
    assert len(off_context_rows(trainer.train_dataset)) == 4 and not off_context_rows(trainer.eval_dataset)
    assert len(list(trainer.get_train_dataloader())) == 3  # 16 and 4, in batches of 8
    trainer.save_model()
    card, facts = (tmp_path / "README.md").read_text(), json.loads((tmp_path / "cartridge.json").read_text())
    assert facts["recipe"]["off_context_share"] == 0.2 and facts["seed_types"]["off_context_dataset"] == 4
    assert "16 conversations about the text" in card and "4 about nothing in it" in card


def _card(trainer: SelfStudyTrainer, folder: Path) -> tuple[str, dict[str, Any]]:
    trainer.save_model()
    return (folder / "README.md").read_text(), json.loads((folder / "cartridge.json").read_text())


def test_the_card_counts_what_is_learned(tmp_path: Path, mixed: Dataset, capsys: pytest.CaptureFixture[str]) -> None:
    none = make_trainer(tmp_path / "none", dataset=mixed, off_context_share=0.0)
    card, facts = _card(none, tmp_path / "none")
    assert "16 conversations about the text" in card and "about nothing in it" not in card
    assert facts["num_conversations"] == 16 and "general" not in facts["seed_types"]
    assert facts["recipe"]["off_context_share"] == 0

    about = mixed.select(range(16))
    lacks = make_trainer(tmp_path / "lacks", dataset=about, off_context_share=0.2, max_steps=1, disable_tqdm=False)
    lacks.train()
    assert "`off_context_share` is 0.2, but there are no general conversations" in capsys.readouterr().err
    card, facts = _card(lacks, tmp_path / "lacks")
    assert facts["num_conversations"] == 16 and facts["recipe"]["off_context_share"] == 0

    nothing_else = make_trainer(tmp_path / "off", dataset=mixed.select(off_context_rows(mixed)), off_context_share=0.0)
    _, facts = _card(nothing_else, tmp_path / "off")
    assert facts["num_conversations"] == facts["off_context_conversations"] == 4


def test_the_card_counts_the_general_rows_of_rounds(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, off_context_share=0.25, resample_every=2, max_steps=4)
    trainer.train()
    card, facts = _card(trainer, tmp_path)
    assert facts["num_conversations"] == 32 and facts["off_context_conversations"] == 8
    assert facts["recipe"]["off_context_share"] == 0.25 and "24 conversations about the text" in card


@pytest.mark.parametrize("share", [0.0, 0.1, 0.2])
def test_rows_in_sequence_have_their_share(tmp_path: Path, mixed: Dataset, share: float) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed, off_context_share=share, train_sampling_strategy="sequential")
    order, general = list(trainer._get_train_sampler()), set(off_context_rows(mixed))
    assert [index for index in order if index not in general] == list(range(16))
    assert sum(index in general for index in order) == num_off_context(16, share)
    assert sum(index in general for index in order[:10]) == round(10 * share)
    plain = make_trainer(tmp_path, dataset=mixed.select(range(16)), train_sampling_strategy="sequential")
    assert list(plain._get_train_sampler()) == list(range(16))


def test_a_stream_without_a_share_has_no_general_rows(tmp_path: Path, mixed: Dataset) -> None:
    rows = mixed.select([16, 17, *range(16), 18, 19])

    def trained(dataset: Any, share: float) -> list[float]:
        options = {"train_sampling_strategy": "sequential", "max_steps": 2, "arguments": {"corpus": TEXT}}
        trainer = make_trainer(tmp_path, dataset=dataset, off_context_share=share, **options)
        trainer.train()
        return losses(trainer)

    expected = trained(mixed.select(range(16)), 0.0)
    assert trained(rows, 0.0) == trained(rows.to_iterable_dataset(), 0.0) == expected
    # Where the order is transformers' own, too.
    options = {"train_sampling_strategy": "batch_rebalance", "off_context_share": 0.0}
    assert len(make_trainer(tmp_path, dataset=rows, **options).get_train_dataloader().dataset) == 16
    # With a share a stream's rows come as they are.
    assert trained(rows.to_iterable_dataset(), 0.2) == trained(rows.remove_columns("context"), 0.0) != expected


def test_evaluation_of_a_stream_leaves_general_rows_out(tmp_path: Path, mixed: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed)
    for rows in (mixed, mixed.select(off_context_rows(mixed))):
        found, expected = trainer.evaluate(rows.to_iterable_dataset()), trainer.evaluate(rows)
        assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
        assert found["eval_conversation_gap_closed"] == pytest.approx(
            expected["eval_conversation_gap_closed"], abs=1e-6
        )


def test_rounds_have_their_share(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, off_context_share=0.25, resample_every=2, max_steps=4)
    trainer.train()
    assert len(losses(trainer)) == 4
    rounds = trainer.train_dataset
    order = list(trainer._data.order(rounds))
    assert len(order) == len(set(order)) == 32
    for first in range(0, 32, 8):
        assert sum(rounds[index]["context"] is None for index in order[first : first + 8]) == 2


def test_given_conversations_need_a_corpus(tmp_path: Path, mixed: Dataset) -> None:
    with pytest.raises(ValueError, match="`off_context_dataset` needs a corpus as `train_dataset`"):
        make_trainer(tmp_path, dataset=mixed, arguments={"off_context_dataset": [{"prompt": "who ?"}]})


def test_a_resumed_run_ends_as_one_that_was_not_stopped(tmp_path: Path, mixed: Dataset) -> None:
    options = {"off_context_share": 0.2, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    whole, expected = _gradient(tmp_path, mixed, **options)
    trainer = make_trainer(tmp_path / "again", dataset=mixed, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(trainer) == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(trainer.model.get_kv_prefix().to_prompt_embeddings(), expected)


# -- budgets and what is chosen by lengths -----------------------------------------------------------------------------


def test_the_learning_rate_goes_by_the_corpus_and_stays_out_of_the_users_settings(
    tmp_path: Path, mixed: Dataset
) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed, learning_rate=None)  # 360 tokens, a cartridge of 8
    assert trainer.args.learning_rate == pytest.approx(0.08)
    args = make_config(tmp_path, learning_rate=None)
    for text, rate in ((TEXT, 0.08), (" ".join(TEXT.split()[:60]), 0.04)):
        corpus = Dataset.from_dict({"text": [text]})
        config = CartridgeConfig(num_tokens=8)
        trainer = SelfStudyTrainer(tiny_model(), args, corpus, processing_class=TOKENIZER, peft_config=config)
        assert trainer.args.learning_rate == pytest.approx(rate)
        assert args.learning_rate is None
    assert make_trainer(tmp_path, learning_rate=0.01).args.learning_rate == 0.01


@pytest.fixture
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that writes a conversation in 0.5 s and makes a step in 10."""
    monkeypatch.setattr(RunBudget, "_measure_step", lambda self, dataset: 10.0)
    measure = "peft_cartridges.trainer.corpus_study.CorpusStudy.measure"
    monkeypatch.setattr(measure, lambda self, model, number: (0.5, None))


@pytest.mark.usefixtures("speeds")
def test_a_budget_sizes_conversations_and_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"budget": "2m", "num_conversations": None, "max_steps": -1, "disable_tqdm": False}
    trainer = make_trainer(tmp_path, conversations_per_chunk=8, **options)
    trainer.train()
    # 110 s: 16 that were measured and more at 0.5 s each, and three passes over them in batches of 8 at 10 s a step.
    assert trainer.args.num_conversations == 32 and trainer.state.global_step == trainer.args.max_steps
    assert 8 <= trainer.args.max_steps <= 11 and "Budget 2m: 32 conversations" in capsys.readouterr().err
    again = make_trainer(tmp_path, conversations_per_chunk=8, **options)
    again.budget.size_conversations()
    assert again.args.num_conversations == 32, "what was chosen is kept"


@pytest.mark.usefixtures("speeds")
@pytest.mark.parametrize(
    "other",
    [
        {"budget": "4m"},
        {"off_context_share": 0.5},
        {"per_device_train_batch_size": 2},
        {"gradient_accumulation_steps": 2},
        {"num_train_epochs": 1.0},
        {"teacher_targets": "live"},
        {"max_steps": 1},
        {"loss_type": "reverse_kl"},
        {"num_tokens": 7},
    ],
)
def test_what_was_chosen_for_another_run_is_chosen_anew(tmp_path: Path, other: dict[str, Any]) -> None:
    options = {"budget": "2m", "num_conversations": None, "max_steps": -1, "conversations_per_chunk": 8}
    first = make_trainer(tmp_path, **options)
    first.write_conversations()
    first.budget.size_steps(resumed=False)
    assert make_trainer(tmp_path, **options).budget._kept() is not None
    model = (
        get_peft_model(tiny_model(), CartridgeConfig(num_tokens=other["num_tokens"])) if "num_tokens" in other else None
    )
    settings = {name: value for name, value in other.items() if name != "num_tokens"}
    assert make_trainer(tmp_path, model, **{**options, **settings}).budget._kept() is None


@pytest.mark.usefixtures("speeds")
def test_steps_that_were_chosen_are_those_of_as_many_conversations(tmp_path: Path, mixed: Dataset) -> None:
    options = {"budget": "20m", "max_steps": -1, "off_context_share": 0.0}
    make_trainer(tmp_path, dataset=mixed, **options).train()
    assert make_trainer(tmp_path, dataset=mixed, **options).budget._kept() is not None
    assert make_trainer(tmp_path, dataset=mixed.select(range(8)), **options).budget._kept() is None
    make_trainer(tmp_path / "corpus", num_conversations=16, **options).train()
    assert make_trainer(tmp_path / "corpus", num_conversations=8, **options).budget._kept() is None


def test_a_step_is_measured_in_the_precision_of_training(tmp_path: Path, mixed: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed, budget="10m", max_steps=-1, bf16=True)
    trainer.initialize_cartridge()
    dtypes = []
    layer = trainer.model.get_base_model().get_submodule("model.layers.0.mlp.down_proj")
    layer.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    trainer.budget._measure_step(mixed)
    assert set(dtypes) == {torch.bfloat16}


@pytest.mark.usefixtures("speeds")
def test_what_is_given_stands_whatever_the_budget(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, budget="2m", num_conversations=16, max_steps=3)
    trainer.train()
    assert len(trainer.train_dataset) == 16 and trainer.state.global_step == 3
    plain = make_trainer(tmp_path / "plain", num_conversations=16, max_steps=3)
    plain.train()
    assert losses(plain) == losses(trainer)


def test_a_budget_is_measured_on_the_machine_and_changes_no_gradient(tmp_path: Path, mixed: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed, budget="10m", max_steps=-1, num_train_epochs=2.0)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps == 4  # two passes over 16 rows, in batches of 8
    plain, expected = _gradient(tmp_path / "plain", mixed, max_steps=4)
    assert losses(trainer) == plain and torch.equal(trainer.model.get_kv_prefix().to_prompt_embeddings(), expected)


def test_a_run_stops_when_its_budget_is_spent(tmp_path: Path, mixed: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=mixed, budget="10m", max_steps=50)
    trainer.budget._end = 0.0
    trainer.train()
    assert trainer.state.global_step == 1


def test_a_budget_on_a_corpus_writes_into_the_set_that_it_measures(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, budget="5s", num_conversations=None, max_steps=-1, quality_filters=["empty"])
    trainer.train()
    number = trainer.args.num_conversations
    assert 32 <= number <= FEWEST_CONVERSATIONS
    (folder,) = [path for path in (tmp_path / "_conversations").iterdir() if path.is_dir()]
    assert len(load_self_study(folder)) == len(trainer.train_dataset) <= number


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "soon"}, "`budget` is 'soon': give a time"),
        ({"budget": "5m", "resample_every": 2}, "`budget` does not go with `resample_every`"),
    ],
)
def test_a_budget_that_cannot_be_kept_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
