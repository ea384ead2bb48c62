"""What settings do: optimization, evaluation, what is shown and written."""

from __future__ import annotations

import json
import math
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub.utils import filter_repo_objects
from transformers import EarlyStoppingCallback
from trl import TrlParser

from peft_cartridges import CartridgeConfig, KVPrefix, SelfStudyConfig, SelfStudyTrainer, gold_answer_nll, shared_prefix
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import GOLD, TEXT, TOKENIZER, losses, make_config, make_conversations, make_trainer


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    return make_conversations()


@pytest.mark.parametrize("loss_type", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
def test_every_loss_comes_down(tmp_path: Path, conversations: Dataset, loss_type: str) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, loss_type=loss_type, max_steps=16)
    trainer.train()
    found = losses(trainer)
    assert sum(found[-4:]) < sum(found[:4])


def test_keys_and_values_learn_at_rates_of_their_own(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, key_learning_rate=0.0, value_learning_rate=0.5, max_steps=2)
    trainer.initialize_cartridge()
    before = trainer.model.get_kv_prefix()
    trainer.train()
    after = trainer.model.get_kv_prefix()
    assert torch.equal(before.keys[0], after.keys[0]) and not torch.equal(before.values[0], after.values[0])
    assert [group["initial_lr"] for group in trainer.optimizer.param_groups] == [0.0, 0.5]


def test_the_average_is_what_is_evaluated_saved_and_left(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(
        tmp_path, dataset=conversations, ema_decay=0.5, max_steps=3, arguments={"eval_dataset": conversations}
    )
    trainer.initialize_cartridge()
    layer = trainer.model.base_model.cartridge_layers()[0]
    seen = [layer.kv_prefix_value["default"].detach().clone()]
    step = trainer.callback_handler.on_optimizer_step

    def remember(*args: object) -> object:
        seen.append(layer.kv_prefix_value["default"].detach().clone())
        return step(*args)

    trainer.callback_handler.on_optimizer_step = remember
    trainer.train()
    expected = seen[0]
    for number, value in enumerate(seen[1:], start=1):
        decay = min(0.5, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * value
    torch.testing.assert_close(layer.kv_prefix_value["default"].detach(), expected)
    trainer.save_model()
    other = make_trainer(tmp_path / "other", dataset=conversations, arguments={"eval_dataset": conversations})
    other.model.load_adapter(tmp_path, "default", is_trainable=True)
    assert other.evaluate()["eval_loss"] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-5)


# -- evaluation --------------------------------------------------------------------------------------------------------


def test_evaluation_gives_the_shares_of_the_gap_closed(tmp_path: Path, conversations: Dataset) -> None:
    arguments = {"eval_dataset": conversations, "gold_questions": GOLD}
    trainer = make_trainer(tmp_path, arguments=arguments, loss_type="reverse_kl", on_policy_fraction=0.1)
    first = trainer.evaluate()
    model = tiny_model()
    none = gold_answer_nll(model, TOKENIZER, GOLD)
    with shared_prefix(model, KVPrefix.from_text(model, TOKENIZER, TEXT)):
        full = gold_answer_nll(model, TOKENIZER, GOLD, in_context=True)
    assert first["eval_gold_nll_no_context"] == pytest.approx(none, abs=1e-4)
    assert first["eval_gold_nll_full_context"] == pytest.approx(full, abs=1e-4)
    share = (none - first["eval_gold_nll"]) / (none - full) if none > full else float("nan")
    assert first["eval_gap_closed"] == pytest.approx(share, abs=1e-3, nan_ok=True)
    assert first["eval_loss"] > 0
    kl_share = 1 - first["eval_loss"] / first["eval_no_context_kl"]
    assert first["eval_conversation_gap_closed"] == pytest.approx(kl_share)
    with trainer.model.disable_adapter():
        assert trainer.evaluate()["eval_loss"] == pytest.approx(first["eval_no_context_kl"], rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_conversation_gap_closed"] > kl_share


def test_gold_questions_alone_are_enough_to_evaluate(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(
        tmp_path, dataset=conversations, eval_strategy="steps", eval_steps=2,
        arguments={"gold_questions": Dataset.from_list(GOLD), "corpus": TEXT},
    )  # fmt: skip
    trainer.train()
    found = [entry for entry in trainer.state.log_history if "eval_gold_nll" in entry]
    assert [entry["step"] for entry in found] == [2, 4] and "eval_gap_closed" in found[0]


def test_a_corpus_that_does_not_fit_gives_no_gap(tmp_path: Path, conversations: Dataset) -> None:
    arguments = {"gold_questions": GOLD, "corpus": TEXT * 3}
    metrics = make_trainer(tmp_path, dataset=conversations, arguments=arguments).evaluate()
    assert "eval_gold_nll" in metrics and "eval_gap_closed" not in metrics


def test_training_stops_when_the_gap_closes_no_further(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(
        tmp_path, dataset=conversations, max_steps=40, learning_rate=1e-9, eval_strategy="steps", eval_steps=2,
        save_strategy="steps", save_steps=2, load_best_model_at_end=True, metric_for_best_model="gap_closed",
        arguments={
            "eval_dataset": conversations,
            "callbacks": [EarlyStoppingCallback(early_stopping_patience=2, early_stopping_threshold=0.01)],
        },
    )  # fmt: skip
    trainer.train()
    assert trainer.args.greater_is_better and trainer.state.global_step < 40


# -- what is shown and written -----------------------------------------------------------------------------------------


def test_logs_tell_speed_memory_and_kl(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations)
    trainer.train()
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert entry["tokens_per_second"] > 0 and 0.01 < entry["memory_gib"] < 100 and entry["kl"] == entry["loss"]
    jsd = make_trainer(tmp_path, dataset=conversations, loss_type="jsd")
    jsd.train()
    assert "kl" not in jsd.state.log_history[0]


def test_plot_and_model_card(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    arguments = {"gold_questions": GOLD, "eval_dataset": make_conversations(synthesis_seed=1)}
    trainer = make_trainer(tmp_path, plot=True, eval_strategy="steps", eval_steps=2, arguments=arguments)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "training_curve.png").read_bytes().startswith(b"\x89PNG")
    card = (tmp_path / "README.md").read_text()
    facts = json.loads((tmp_path / "cartridge.json").read_text())
    assert "training_curve.png" in card and "captain" not in card
    assert facts["num_tokens"] == 8 and facts["corpus_tokens"] == len(TOKENIZER(TEXT)["input_ids"])
    assert facts["num_conversations"] == 16 and sum(facts["seed_types"].values()) == 16
    assert facts["recipe"]["optimizer_steps"] == 4 and facts["corpus_sha256"] == sha256(TEXT.encode()).hexdigest()
    assert {metric["type"] for metric in facts["metrics"]} >= {"gold_nll", "conversation_gap_closed"}


def test_conversations_are_kept_and_never_uploaded(tmp_path: Path) -> None:
    make_trainer(tmp_path).write_conversations()
    kept = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert kept
    # The patterns with which `Trainer.push_to_hub` uploads `output_dir`.
    assert not list(filter_repo_objects(kept, ignore_patterns=["_*", "checkpoint-*"]))
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    make_trainer(tmp_path).write_conversations()
    assert written == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.parquet")}
    make_trainer(tmp_path, num_conversations=8).write_conversations()  # other settings, another folder


# -- conversations on the fly ------------------------------------------------------------------------------------------


def test_each_round_is_written_anew_and_used_once(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, resample_every=2, max_steps=6)
    seen = []
    collate = trainer.data_collator

    class Recording(type(collate)):
        def __call__(self, rows: list[dict]) -> dict:
            seen.append([tuple(row["input_ids"]) for row in rows])
            return super().__call__(rows)

    trainer.data_collator = Recording(collate.pad_token_id)
    trainer.train()
    assert len(losses(trainer)) == 6 and trainer.state.epoch == 1
    rounds = [set(seen[i] + seen[i + 1]) for i in (0, 2, 4)]
    assert all(len(one) > 8 for one in rounds)
    recited = [{row for row in one if len(row) > 20} for one in rounds]
    assert recited[0] != recited[1] != recited[2]


# -- configuration -----------------------------------------------------------------------------------------------------


def test_every_setting_of_ours_is_explained() -> None:
    own = {name for name in vars(SelfStudyConfig) if name in SelfStudyConfig.__dataclass_fields__}
    assert len(own) > 25
    for name in own:
        assert len(SelfStudyConfig.__dataclass_fields__[name].metadata["help"]) > 15, name


def test_yaml_and_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"output_dir: {tmp_path}\nloss_type: jsd\nseed_types: [question, creative]\nlearning_rate: 0.01\nuse_cpu: true\n"
        "model_init_kwargs: {dtype: float32}\n"
    )
    (args,) = TrlParser((SelfStudyConfig,)).parse_args_and_config(
        ["--config", str(path), "--learning_rate", "0.03", "--num_conversations", "7"]
    )
    assert (args.loss_type, args.learning_rate, args.num_conversations) == ("jsd", 0.03, 7)
    assert args.seed_types == ["question", "creative"] and args.model_init_kwargs == {"dtype": "float32"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": "kl"}, "`loss_type` must be one of forward_kl, reverse_kl, jsd, cross_entropy, got 'kl'"),
        ({"jsd_beta": 2}, "`jsd_beta` must be between 0 and 1"),
        ({"on_policy_fraction": -0.1}, "`on_policy_fraction` must be between 0 and 1"),
        ({"prompt_loss_weight": -1}, "`prompt_loss_weight` must not be negative"),
        ({"ema_decay": 1.0}, "`ema_decay` must be at least 0 and below 1"),
        ({"loss_temperature": 0}, "`loss_temperature` must be above 0"),
        ({"loss_chunk_size": 0}, "`loss_chunk_size` must be at least 1"),
        ({"loss_type": "cross_entropy", "on_policy_fraction": 0.5}, "`on_policy_fraction` does not go with"),
        ({"resample_every": 5, "max_steps": -1}, "`resample_every` needs `max_steps`"),
        ({"resample_every": 5, "dataloader_num_workers": 1}, "`resample_every` needs `dataloader_num_workers=0`"),
    ],
)
def test_settings_out_of_range_are_refused(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_settings_that_need_something_else_are_refused(tmp_path: Path, conversations: Dataset) -> None:
    with pytest.raises(ValueError, match="`use_liger_kernel=True` needs a CUDA device"):
        make_trainer(tmp_path, dataset=conversations, use_liger_kernel=True)
    top_k = make_conversations(teacher_targets="top_k", teacher_top_k=3)
    with pytest.raises(ValueError, match=r"`loss_temperature=2\.0` needs `teacher_hidden_states`"):
        make_trainer(tmp_path, dataset=top_k, loss_temperature=2.0)
    with pytest.raises(ValueError, match="`resample_every` needs a corpus"):
        make_trainer(tmp_path, dataset=conversations, resample_every=2)
    with pytest.raises(ValueError, match="`train_dataset` lacks the columns context"):
        make_trainer(tmp_path, dataset=conversations.remove_columns("context"), on_policy_fraction=0.5)


# -- data sets of others -----------------------------------------------------------------------------------------------


def _undescribed(dataset: Dataset) -> Dataset:
    return Dataset.from_list(dataset.to_list(), features=dataset.features)


def test_a_data_set_of_another_base_model_is_refused(tmp_path: Path, conversations: Dataset) -> None:
    with pytest.raises(ValueError, match="`train_dataset` was made with another base model"):
        make_trainer(tmp_path, tiny_model(seed=1), conversations)
    wide = tiny_model(hidden_size=64)
    with pytest.raises(ValueError, match=r"`train_dataset\[0\]` .* hidden size is 64: .* another base model"):
        make_trainer(tmp_path, wide, _undescribed(conversations).remove_columns("origin"))


def test_a_data_set_of_the_same_model_in_another_dtype_is_taken(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, tiny_model(dtype=torch.bfloat16), conversations)
    assert trainer.train_dataset is conversations


def test_a_data_set_whose_fingerprint_cannot_be_compared_is_refused(tmp_path: Path, conversations: Dataset) -> None:
    told = _undescribed(conversations)
    told.info.description = json.dumps({**json.loads(conversations.info.description), "format": 1})
    with pytest.raises(
        ValueError, match=r"`train_dataset` was made by another version .* \(format 1, this one has 3\)"
    ):
        make_trainer(tmp_path, dataset=told)
    told.info.description = ""  # the remedy that the message names
    make_trainer(tmp_path, dataset=told.remove_columns("origin"))


def test_a_data_set_of_another_tokenizer_is_refused(tmp_path: Path, conversations: Dataset) -> None:
    shifted = conversations.map(lambda row: {"input_ids": [(i + 9) % 128 for i in row["input_ids"]]})
    with pytest.raises(ValueError, match=r"with this tokenizer, but its answer is .* another tokenizer"):
        make_trainer(tmp_path, dataset=_undescribed(shifted))
    beyond = conversations.map(lambda row: {"input_ids": [i + 128 for i in row["input_ids"]]})
    with pytest.raises(ValueError, match="the tokenizer only 128 tokens"):
        make_trainer(tmp_path, dataset=_undescribed(beyond))
    told = _undescribed(conversations)
    told.info.description = json.dumps({"format": 3, "model_fingerprint": "", "tokenizer_fingerprint": "0" * 64})
    with pytest.raises(ValueError, match="`eval_dataset` was made with another tokenizer or chat template"):
        make_trainer(tmp_path, dataset=conversations, arguments={"eval_dataset": told})


def test_an_eval_set_without_targets_is_refused_even_where_training_needs_none(
    tmp_path: Path, conversations: Dataset
) -> None:
    bare = conversations.remove_columns(["teacher_hidden_states", "context"])
    with pytest.raises(ValueError, match="`eval_dataset` lacks the columns teacher_hidden_states"):
        make_trainer(tmp_path, dataset=bare, loss_type="cross_entropy", arguments={"eval_dataset": bare})
    make_trainer(
        tmp_path, dataset=bare, loss_type="cross_entropy", arguments={"eval_dataset": conversations}
    ).evaluate()


def test_rows_that_make_no_sense_are_refused(tmp_path: Path, conversations: Dataset) -> None:
    nothing = conversations.map(lambda row: {"completion_mask": [0] * len(row["completion_mask"])})
    with pytest.raises(ValueError, match=r"`train_dataset\[0\]` .* at least one set"):
        make_trainer(tmp_path, dataset=_undescribed(nothing.remove_columns("messages")))
    with pytest.raises(ValueError, match="`train_dataset` has no rows"):
        make_trainer(tmp_path, dataset=conversations.select([]))


def test_a_cartridge_is_initialized_from_the_corpus_beside_conversations(
    tmp_path: Path, conversations: Dataset
) -> None:
    trainers = make_trainer(tmp_path, dataset=conversations, arguments={"corpus": TEXT}), make_trainer(tmp_path)
    for trainer in trainers:
        trainer.initialize_cartridge()
    given, from_corpus = (trainer.model.get_kv_prefix() for trainer in trainers)
    assert torch.equal(given.keys[0], from_corpus.keys[0])
    assert math.isfinite(given.keys[0].sum())


def test_gradient_checkpointing_gives_the_same_run(tmp_path: Path, conversations: Dataset) -> None:
    runs = []
    for enabled in (False, True):
        trainer = SelfStudyTrainer(
            tiny_model(), make_config(tmp_path, gradient_checkpointing=enabled, on_policy_fraction=0.3),
            conversations, processing_class=TOKENIZER, peft_config=CartridgeConfig(num_tokens=8),
        )  # fmt: skip
        trainer.train()
        runs.append(losses(trainer))
    assert runs[0] == pytest.approx(runs[1], rel=1e-5)
