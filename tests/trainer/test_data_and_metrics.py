"""Data sets of every kind, collators and metrics of one's own, and what is measured on what."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from datasets import Dataset, IterableDataset
from peft import get_peft_model
from torch.utils.data import BatchSampler, SequentialSampler
from transformers import BitsAndBytesConfig, EvalPrediction, TrainerCallback

from peft_cartridges import CartridgeConfig, SelfStudyConfig, SelfStudyTrainer, initialize_cartridge
from peft_cartridges.initialization import list_strategies
from peft_cartridges.trainer.batches import EvenRows, EvenStream, SelfStudyCollator
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import CORPUS, TOKENIZER, losses, make_config, make_conversations, make_trainer


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    return make_conversations()


# -- kinds of data -----------------------------------------------------------------------------------------------------


def test_a_stream_gives_the_run_of_the_data_set_in_order(tmp_path: Path, conversations: Dataset) -> None:
    stream = conversations.to_iterable_dataset()
    in_order = {"train_sampling_strategy": "sequential", "max_steps": 3, "max_grad_norm": 0.0}
    runs = []
    for dataset in (conversations, stream):
        trainer = make_trainer(tmp_path, dataset=dataset, arguments={"eval_dataset": dataset}, **in_order)
        trainer.train()
        runs.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert runs[1] == pytest.approx(runs[0], rel=1e-5)
    with pytest.raises(ValueError, match="max_steps has to be specified"):
        make_trainer(tmp_path, dataset=stream, max_steps=-1)
    nothing = IterableDataset.from_generator(lambda: iter(()))
    with pytest.raises(ValueError, match="`train_dataset` has no rows"):
        make_trainer(tmp_path, dataset=nothing)


def test_rows_end_to_end_give_the_run_of_padded_rows(tmp_path: Path, conversations: Dataset) -> None:
    runs = []
    for padding_free in (False, True):
        trainer = make_trainer(
            tmp_path, dataset=conversations, padding_free=padding_free, arguments={"eval_dataset": conversations}
        )
        trainer.train()
        runs.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)


def test_rows_end_to_end_are_refused_where_they_see_each_other(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    dataset = Dataset.from_dict({"input_ids": [[9, 10, 11]] * 8, "completion_mask": [[0, 1, 1]] * 8})
    options = {"loss_type": "cross_entropy", "padding_free": True}
    with pytest.raises(ValueError, match="`padding_free=True`: with `attn_implementation='eager'`, a gpt_oss model"):
        make_trainer(tmp_path, model, dataset, **options).train()


def test_a_collator_of_ones_own_is_used_everywhere(tmp_path: Path, conversations: Dataset) -> None:
    seen: list[set[str]] = []

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        seen.append(set(rows[0]))
        return SelfStudyCollator()(rows)

    arguments = {"data_collator": collate, "eval_dataset": conversations}
    trainer = make_trainer(tmp_path, dataset=conversations, max_steps=2, arguments=arguments)
    trainer.train()
    before = len(seen)
    trainer.evaluate()
    assert 2 <= before < len(seen) and all("seed_type" in columns for columns in seen)


def test_a_quantized_base_asks_answers_and_is_trained_on(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "num_attention_heads": 4, "head_dim": 64}
    model = tiny_model(**sizes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter *= 0.25  # at this width attention would look at one token only
    model.save_pretrained(tmp_path / "model")
    trainer = SelfStudyTrainer(
        str(tmp_path / "model"),
        make_config(tmp_path, max_steps=8),
        CORPUS,
        processing_class=TOKENIZER,
        peft_config=CartridgeConfig(num_tokens=8),
        quantization_config=BitsAndBytesConfig(load_in_8bit=True),
    )
    assert trainer.model.get_base_model().is_quantized
    trainer.train()
    found = losses(trainer)
    assert sum(found[-3:]) < sum(found[:3])
    assert trainer.model.get_kv_prefix().keys[0].dtype == torch.float32


# -- metrics -----------------------------------------------------------------------------------------------------------


def test_metrics_of_ones_own_see_logits_and_labels(tmp_path: Path, conversations: Dataset) -> None:
    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        labels = prediction.label_ids[:, 1:]
        hits = prediction.predictions[:, :-1] == labels
        return {"accuracy": float(hits[labels != -100].mean())}

    held_out = conversations.select(range(5))
    arguments = {
        "compute_metrics": accuracy,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
        "eval_dataset": held_out,
    }
    trainer = make_trainer(tmp_path, dataset=conversations, arguments=arguments, per_device_eval_batch_size=2)
    measured = trainer.evaluate()["eval_accuracy"]
    hits = []
    for row in held_out:
        with torch.no_grad():
            likeliest = trainer.model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1)[:-1].numpy()
        learned = np.array(row["completion_mask"][1:], dtype=bool)
        hits += (likeliest == np.array(row["input_ids"][1:]))[learned].tolist()
    assert measured == pytest.approx(np.mean(hits))


def test_each_data_set_has_its_own_baseline(tmp_path: Path, conversations: Dataset) -> None:
    other = make_conversations(synthesis_seed=7, recitation_share=1.0)
    first = make_trainer(tmp_path, dataset=conversations)
    first.evaluate(conversations)
    second = make_trainer(tmp_path, dataset=conversations)
    expected = second.evaluate(other)
    for name in ("eval_no_context_kl", "eval_conversation_gap_closed"):
        assert first.evaluate(other)[name] == pytest.approx(expected[name], rel=1e-5), name


@pytest.mark.parametrize("size", [5, 8, 1])
def test_no_row_counts_twice_whoever_measures_it(size: int) -> None:
    """Batches as accelerate shares them out among two processes, which repeats rows where it has to fill up."""
    rows = Dataset.from_dict({"input_ids": [[i, i + 1] for i in range(size)], "completion_mask": [[0, 1]] * size})
    even, seen = EvenRows(rows, 4), []
    batches: list[int] = []
    for process in range(2):
        shares = list(BatchSamplerShard(BatchSampler(SequentialSampler(even), 2, False), 2, process))
        batches.append(len(shares))
        for share in shares:
            labels = SelfStudyCollator()([even[index] for index in share])["labels"]
            seen += labels[labels != -100].tolist()
    assert batches[0] == batches[1] and sorted(seen) == list(range(1, size + 1))
    streamed = list(EvenStream(rows, 4))
    assert len(streamed) == len(even) and sum(sum(row["completion_mask"]) for row in streamed) == size


# -- how a cartridge begins --------------------------------------------------------------------------------------------


def _layer(trainer: SelfStudyTrainer) -> Any:
    return trainer.model.base_model.cartridge_layers()[0]


def test_without_a_corpus_the_contexts_initialize_the_cartridge(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, initialization="first_tokens")
    noise = trainer.model.get_kv_prefix()
    trainer.initialize_cartridge()
    text = "\n\n".join(dict.fromkeys(conversations["context"]))
    told = make_trainer(tmp_path, dataset=conversations, initialization="first_tokens", arguments={"corpus": text})
    told.initialize_cartridge()
    assert torch.equal(trainer.model.get_kv_prefix().keys[0], told.model.get_kv_prefix().keys[0])
    assert not torch.equal(trainer.model.get_kv_prefix().keys[0][:, :2], noise.keys[0][:, :2])


@pytest.mark.parametrize("strategy", list_strategies())
def test_every_initialization_is_the_trainers_too(tmp_path: Path, conversations: Dataset, strategy: str) -> None:
    other = get_peft_model(tiny_model(), CartridgeConfig(num_tokens=8))
    other.save_pretrained(tmp_path / "other")
    options = {
        "pretrained": {"cartridge": str(tmp_path / "other")}, "sampled_chunks": {"chunk_tokens": 2, "seed": 5}, "random_tokens": {"seed": 5},
        "random_vectors": {"seed": 5}, "summary": {"request": "w70 ?"}, "attention_matching": {"share_of_queries": 0.5},
    }.get(strategy)  # fmt: skip
    trainer = make_trainer(
        tmp_path, dataset=conversations, initialization=strategy, initialization_kwargs=json.dumps(options or {})
    )
    trainer.initialize_cartridge()
    text = "\n\n".join(dict.fromkeys(conversations["context"]))
    expected = initialize_cartridge(other, trainer.codec, text=text, strategy=strategy, **(options or {}))
    found = trainer.model.get_kv_prefix()
    for have, want in zip(found.keys + found.values, expected.keys + expected.values, strict=True):
        assert torch.equal(have, want)


def test_an_initialization_that_needs_no_text_is_not_random(
    tmp_path: Path, conversations: Dataset, caplog: pytest.LogCaptureFixture
) -> None:
    other = get_peft_model(tiny_model(), CartridgeConfig(num_tokens=8))
    other.save_pretrained(tmp_path / "other")
    options = {"initialization": "pretrained", "initialization_kwargs": {"cartridge": str(tmp_path / "other")}}
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=conversations.remove_columns("context"), max_steps=1, **options)
    assert "begins at random" not in caplog.text and trainer.model.peft_config["default"].num_frozen_tokens == 2
    trainer.train()
    assert torch.equal(trainer.model.get_kv_prefix().keys[0][:, :2], other.get_kv_prefix().keys[0][:, :2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"initialization": "pretrained"}, "`pretrained` needs the option `cartridge`"),
        ({"initialization": "summary", "initialization_kwargs": {"seed": 3}}, "`summary` has no option `seed`"),
        ({"initialization": "none", "initialization_kwargs": {"seed": 3}}, "`initialization` is `none`"),
        ({"initialization_kwargs": "seed"}, "`initialization_kwargs` must be a mapping"),
    ],
)
def test_options_that_an_initialization_does_not_have_are_refused_at_once(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_config(tmp_path, **options)


def test_noise_is_never_frozen(tmp_path: Path, conversations: Dataset, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        trainer = make_trainer(tmp_path, dataset=conversations.remove_columns("context"), max_steps=1)
    assert "The cartridge begins at random" in caplog.text
    before = trainer.model.get_kv_prefix()
    trainer.train()
    assert trainer.model.peft_config["default"].num_frozen_tokens == 0
    assert not torch.equal(trainer.model.get_kv_prefix().keys[0][:, 0], before.keys[0][:, 0])


def test_what_somebody_has_put_into_the_cartridge_stays(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations)
    prefix = trainer.model.get_kv_prefix()
    mine = type(prefix)([keys + 1 for keys in prefix.keys], [values + 1 for values in prefix.values])
    trainer.model.base_model.set_kv_prefix(mine)
    trainer.evaluate(conversations)
    assert torch.equal(trainer.model.get_kv_prefix().keys[0], mine.keys[0])


# -- the work begins when training does --------------------------------------------------------------------------------


def test_conversations_are_written_when_training_starts_and_trackers_are_told(tmp_path: Path) -> None:
    told: list[dict[str, float]] = []

    class Tracker(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            told.append(dict(logs))

    trainer = make_trainer(tmp_path, arguments={"callbacks": [Tracker()]}, num_eval_conversations=4)
    assert not (tmp_path / "_conversations").exists()
    trainer.train()
    assert told[0]["synthesis/conversations"] == 16
    assert trainer.evaluate()["eval_loss"] > 0 and len(trainer.eval_dataset) == 4


def test_conversations_are_kept_by_what_decides_their_content(tmp_path: Path) -> None:
    for options in ({}, {"generation_batch_size": 4}, {"seed": 43}, {"learning_rate": 0.01}):
        make_trainer(tmp_path, **options).write_conversations()
    assert len(list((tmp_path / "_conversations").iterdir())) == 1
    make_trainer(tmp_path, synthesis_seed=43).write_conversations()
    assert len(list((tmp_path / "_conversations").iterdir())) == 2


# -- engines and ways to share the work --------------------------------------------------------------------------------


def test_vllm_options_as_in_trl_choose_the_engine(tmp_path: Path) -> None:
    assert make_config(tmp_path, use_vllm=True).engine == "vllm"
    server = make_config(tmp_path, use_vllm=True, vllm_mode="server", vllm_server_port=8001)
    assert (server.engine, server.base_url) == ("openai", ["http://0.0.0.0:8001/v1"])
    named = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "http://a/v1"}
    assert make_config(tmp_path, **named).base_url == ["http://a/v1"]
    with pytest.raises(ValueError, match="`vllm_mode` must be one of colocate, server, got 'both'"):
        SelfStudyConfig(output_dir=str(tmp_path), vllm_mode="both")


def test_ways_to_share_the_work_that_do_not_go_are_refused_by_name(
    tmp_path: Path, conversations: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="`shard_model=True` needs several processes"):
        make_trainer(tmp_path, dataset=conversations, shard_model=True)
    args = make_config(tmp_path)
    for variables, message in (
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, "ZeRO-3 is not supported"),
        ({"ACCELERATE_USE_FSDP": "true"}, "Set `shard_model=True` instead"),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            with pytest.raises(ValueError, match=message):
                SelfStudyTrainer(
                    tiny_model(),
                    args,
                    conversations,
                    processing_class=TOKENIZER,
                    peft_config=CartridgeConfig(num_tokens=8),
                )
