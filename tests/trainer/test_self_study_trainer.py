"""SelfStudyTrainer with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, PeftModel, get_peft_model

from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudyTrainer
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import CORPUS, TEXT, TOKENIZER, losses, make_config, make_conversations, make_trainer


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    return make_conversations()


def test_a_corpus_becomes_a_trained_cartridge(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, max_steps=12)
    trainer.initialize_cartridge()
    before = trainer.model.get_kv_prefix()
    base = tiny_model().state_dict()
    trainer.train()
    found, after = losses(trainer), trainer.model.get_kv_prefix()
    assert sum(found[-4:]) < sum(found[:4])
    assert torch.equal(after.keys[0][:, :2], before.keys[0][:, :2])
    assert not torch.equal(after.keys[0][:, 2:], before.keys[0][:, 2:])
    trained = trainer.model.unload().state_dict()
    assert all(torch.equal(trained[name], tensor) for name, tensor in base.items())


def test_the_loss_is_the_kl_to_the_teacher_with_the_chunk_in_context(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations)
    batch = trainer.data_collator([conversations[i] for i in range(5)])
    loss = trainer.compute_loss(trainer.model, batch).item()
    model, plain, total, count = trainer.model, tiny_model(), 0.0, 0
    offsets = TOKENIZER(TEXT, return_offsets_mapping=True)["offset_mapping"]
    for row in conversations.select(range(5)):
        start, end = map(int, row["chunk_id"].split(":")[1].split("-"))
        system = {"role": "system", "content": TEXT[offsets[start][0] : offsets[end - 1][1]]}
        context = TOKENIZER(TOKENIZER.apply_chat_template([system], tokenize=False))["input_ids"]
        with torch.no_grad():
            student = model(torch.tensor([row["input_ids"]])).logits[0].double().log_softmax(-1)
            teacher = (
                plain(torch.tensor([context + row["input_ids"]])).logits[0, len(context) :].double().log_softmax(-1)
            )
        learned = torch.tensor(row["completion_mask"][1:], dtype=torch.bool)
        total += (teacher.exp() * (teacher - student)).sum(-1)[:-1][learned].sum().item()
        count += int(learned.sum())
    assert loss == pytest.approx(total / count, rel=2e-3)


def test_accumulated_batches_count_as_one(tmp_path: Path, conversations: Dataset) -> None:
    shuffled = {"train_sampling_strategy": "sequential", "max_steps": 2, "max_grad_norm": 0.0}
    whole = make_trainer(tmp_path, dataset=conversations, **shuffled)
    whole.train()
    parts = make_trainer(
        tmp_path, dataset=conversations, per_device_train_batch_size=2, gradient_accumulation_steps=4, **shuffled
    )
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)
    for a, b in zip(whole.model.get_kv_prefix().keys, parts.model.get_kv_prefix().keys, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


def test_a_model_with_a_cartridge_is_trained_on(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path / "first", dataset=conversations)
    trainer.train()
    trainer.save_model()
    model = PeftModel.from_pretrained(tiny_model(), tmp_path / "first", is_trainable=True)
    again = make_trainer(tmp_path / "second", model, conversations)
    again.train()
    assert sum(losses(again)) < sum(losses(trainer))


def test_evaluation_gives_the_kl_of_held_out_conversations(tmp_path: Path, conversations: Dataset) -> None:
    trainer = SelfStudyTrainer(
        model=tiny_model(),
        args=make_config(tmp_path),
        train_dataset=conversations,
        eval_dataset=conversations.select(range(6)),
        processing_class=TOKENIZER,
        peft_config=CartridgeConfig(num_tokens=8),
    )
    assert trainer.evaluate()["eval_loss"] > 0


def test_a_saved_model_is_loaded_by_name(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "base")
    TOKENIZER.save_pretrained(tmp_path / "base")
    trainer = SelfStudyTrainer(
        model=str(tmp_path / "base"),
        args=make_config(tmp_path / "out", max_steps=1, model_init_kwargs={"dtype": torch.float32}),
        train_dataset=CORPUS,
        peft_config=CartridgeConfig(num_tokens=8),
    )
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_bad_input_names_the_argument_and_the_remedy(tmp_path: Path, conversations: Dataset) -> None:
    args, config = make_config(tmp_path), CartridgeConfig(num_tokens=8)
    with pytest.raises(ValueError, match="`peft_config` is missing: pass `CartridgeConfig"):
        SelfStudyTrainer(tiny_model(), args, conversations, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="`processing_class` is missing"):
        SelfStudyTrainer(tiny_model(), args, conversations, peft_config=config)
    with pytest.raises(ValueError, match="PEFT model without a cartridge"):
        lora = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
        SelfStudyTrainer(lora, args, conversations, processing_class=TOKENIZER)
    with pytest.raises(ValueError, match="already: leave `peft_config` out"):
        ready = get_peft_model(tiny_model(), config)
        SelfStudyTrainer(ready, args, conversations, processing_class=TOKENIZER, peft_config=config)
    without = conversations.remove_columns(["teacher_hidden_states", "context"])
    with pytest.raises(ValueError, match="`train_dataset` lacks the columns teacher_hidden_states"):
        SelfStudyTrainer(tiny_model(), args, without, processing_class=TOKENIZER, peft_config=config)
    with pytest.raises(ValueError, match=r"`eval_dataset\['x'\]` lacks the columns"):
        SelfStudyTrainer(
            tiny_model(), args, conversations, {"x": without}, processing_class=TOKENIZER, peft_config=config
        )
    empty = Dataset.from_dict({"text": [""]})
    with pytest.raises(ValueError, match=r"Document 0 of the corpus .* is empty"):
        SelfStudyTrainer(tiny_model(), args, empty, processing_class=TOKENIZER, peft_config=config)
    long = CartridgeConfig(num_tokens=511)
    with pytest.raises(ValueError, match="fewer than `num_tokens=511`"):
        SelfStudyTrainer(tiny_model(), args, CORPUS, processing_class=TOKENIZER, peft_config=long).train()


def test_no_steps_only_initialize(tmp_path: Path, conversations: Dataset) -> None:
    assert make_config(tmp_path).max_steps == 4 and SelfStudyConfig(output_dir=str(tmp_path)).max_steps == -1
    for dataset in (conversations, None):
        trainer = make_trainer(tmp_path, dataset=dataset, max_steps=0, num_eval_conversations=4)
        output = trainer.train()
        assert output.global_step == trainer.state.global_step == 0 and not losses(trainer)
        expected = make_trainer(tmp_path / "expected", dataset=dataset, max_steps=0)
        expected.initialize_cartridge()
        for made, wanted in zip(trainer.model.get_kv_prefix().keys, expected.model.get_kv_prefix().keys, strict=True):
            assert torch.equal(made, wanted)
        assert not list(tmp_path.glob("checkpoint-*"))
    # Of a corpus only what is held out is written, so that the untrained cartridge can be measured.
    assert not trainer.study.is_written and len(trainer.eval_dataset) == 4
    assert "eval_conversation_gap_closed" in trainer.evaluate()
    with pytest.raises(ValueError, match="`max_steps=0` only initializes a cartridge"):
        trainer.train(resume_from_checkpoint=True)


def test_a_budget_needs_steps(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`budget` does not go with `max_steps=0`"):
        make_config(tmp_path, budget="5m", max_steps=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"dataset": DatasetDict({"train": CORPUS})},
            TypeError,
            "`train_dataset` is a DatasetDict of 'train': pass one of",
        ),
        ({"dataset": TEXT}, TypeError, "`train_dataset` is a text: pass `Dataset.from_dict"),
        (
            {"arguments": {"gold_questions": [{"question": "a", "answers": "b"}]}},
            ValueError,
            r"`gold_questions\[0\]` needs",
        ),
    ],
)
def test_data_of_another_form_are_refused_at_once(
    tmp_path: Path, options: dict, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        make_trainer(tmp_path, **options)


def test_evaluation_before_training_measures_or_says_why_not(tmp_path: Path) -> None:
    assert make_trainer(tmp_path, num_eval_conversations=4).evaluate()["eval_loss"] > 0
    with pytest.raises(ValueError, match="nothing to measure on: pass an `eval_dataset`, `gold_questions`"):
        make_trainer(tmp_path).evaluate()
