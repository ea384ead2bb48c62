"""On-policy answers and live targets, against the model with the chunk written out in its input."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor

from peft_cartridges import KVPrefix, SelfStudyTrainer
from peft_cartridges.chat import ChatCodec
from peft_cartridges.trainer.row_order import SeededOrder, by_chunk
from tests.tiny_models import tiny_model
from tests.trainer.small_runs import TOKENIZER, losses, make_conversations, make_trainer


@pytest.fixture(scope="module")
def conversations() -> Dataset:
    return make_conversations()


@pytest.fixture(scope="module")
def top_k() -> Dataset:
    return make_conversations(teacher_targets="top_k", teacher_top_k=5)


def _live(trainer: SelfStudyTrainer, dataset: Dataset, seed: str = "0") -> tuple[dict[str, Any], dict[str, Any]]:
    """A batch as it was written, and as the step gets it."""
    trainer.initialize_cartridge()
    rows = [dataset[i] for i in range(6)]
    return trainer.data_collator(rows), trainer.data_collator(trainer._data.live_targets.for_training(rows, seed))


def _rows(batch: dict[str, Any]) -> list[list[int]]:
    ends = [max(torch.nonzero(labels != -100))[0] + 1 for labels in batch["labels"]]
    return [ids[:end].tolist() for ids, end in zip(batch["input_ids"], ends, strict=True)]


@torch.no_grad()
def _teacher_states(context: str, turns: list[int], count: int) -> Tensor:
    ids = ChatCodec(None, TOKENIZER).encode_context(context) + turns
    return tiny_model().model(torch.tensor([ids])).last_hidden_state[0, -count - 1 : -1]


def test_the_student_answers_and_the_teacher_scores(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, on_policy_fraction=0.5, teacher_cache_size=1)
    before, after = _live(trainer, conversations)
    old, new = _rows(before), _rows(after)
    changed = [index for index in range(6) if old[index] != new[index]]
    assert 2 <= len(changed) <= 3
    counts = [(labels != -100).sum().item() for labels in after["labels"]]
    states = after["teacher_hidden_states"].float().split(counts)
    for index in range(6):
        row = conversations[index]
        prompt = row["input_ids"][: row["completion_mask"].index(1)]
        assert new[index][: len(prompt)] == prompt and len(new[index]) == len(prompt) + counts[index]
        turns = new[index][len(ChatCodec(None, TOKENIZER).preamble) :]
        expected = _teacher_states(row["context"], turns, counts[index])
        torch.testing.assert_close(states[index], expected, atol=5e-3, rtol=5e-3)
    assert len(trainer._data.live_targets.teacher.prefixes._kept) == 1


def test_on_policy_answers_are_the_students_own(tmp_path: Path, conversations: Dataset) -> None:
    """At temperature 0 each token is the likeliest of the model with its cartridge."""
    trainer = make_trainer(tmp_path, dataset=conversations, on_policy_fraction=1.0, on_policy_temperature=0.0)
    _, after = _live(trainer, conversations)
    for row, labels in zip(_rows(after), after["labels"], strict=True):
        with torch.no_grad():
            likeliest = trainer.model(torch.tensor([row])).logits[0].argmax(-1)
        first = torch.nonzero(labels != -100)[0].item()
        assert likeliest[first - 1 : -1].tolist() == row[first:]


def test_what_is_drawn_depends_on_the_seed_alone(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, on_policy_fraction=1.0)
    state = torch.get_rng_state()
    first = _rows(_live(trainer, conversations)[1])
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(5)
    assert _rows(_live(trainer, conversations)[1]) == first
    assert _rows(_live(trainer, conversations, "1")[1]) != first
    assert not trainer.model.base_model.cartridge_layers()[0].disable_adapters


def test_on_policy_rows_beside_top_k_targets(tmp_path: Path, top_k: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=top_k, on_policy_fraction=0.5)
    _, after = _live(trainer, top_k)
    exact = after["exact_tokens"]
    kept, live = (~exact).sum().item(), exact.sum().item()
    assert len(exact) == (after["labels"] != -100).sum() and len(after["teacher_hidden_states"]) == live > 0 < kept
    assert after["teacher_top_k_ids"].shape == after["teacher_top_k_logprobs"].shape == (kept, 5)
    trainer.train()
    assert len(losses(trainer)) == 4


def test_questions_with_a_weight_are_learned_too(tmp_path: Path, conversations: Dataset) -> None:
    trainer = make_trainer(tmp_path, dataset=conversations, prompt_loss_weight=0.25)
    _, after = _live(trainer, conversations)
    total, weight = 0.0, 0.0
    for index in range(6):
        row = conversations[index]
        start, first = len(ChatCodec(None, TOKENIZER).preamble), row["completion_mask"].index(1)
        learned = (after["labels"][index] != -100).nonzero().flatten().tolist()
        assert learned == list(range(start + 1, len(row["input_ids"])))
        teacher = _teacher_states(row["context"], row["input_ids"][start:], len(learned))
        with torch.no_grad():
            student = trainer.model(torch.tensor([row["input_ids"]])).logits[0, start:-1].double().log_softmax(-1)
            target = tiny_model().lm_head(teacher).double().log_softmax(-1)
        weights = torch.tensor([0.25 if position < first else 1.0 for position in learned])
        total += (weights * (target.exp() * (target - student)).sum(-1)).sum().item()
        weight += weights.sum().item()
    trainer.model.train()
    loss = trainer.compute_loss(trainer.model, after, num_items_in_batch=weight)
    assert loss.item() == pytest.approx(total / weight, rel=2e-3)


def test_weights_are_counted_over_accumulated_batches(tmp_path: Path, conversations: Dataset) -> None:
    options = {"dataset": conversations, "prompt_loss_weight": 0.25, "max_grad_norm": 0.0, "max_steps": 2}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    parts = make_trainer(tmp_path, **options, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-4)


def test_cross_entropy_on_questions_needs_no_teacher(tmp_path: Path, conversations: Dataset) -> None:
    bare = conversations.remove_columns("teacher_hidden_states")
    plain = make_trainer(tmp_path, dataset=bare, loss_type="cross_entropy")
    plain.train()
    weighted = make_trainer(tmp_path, dataset=bare, loss_type="cross_entropy", prompt_loss_weight=1.0)
    weighted.train()
    assert losses(plain) != losses(weighted)


def test_system_prompts_stand_in_front_of_the_turns(tmp_path: Path) -> None:
    """What precedes the turns is then longer than the chat template's own, and not the same in every row."""
    dataset = make_conversations(system_prompts=["the captain says yes .", "a ship"])
    trainer = make_trainer(tmp_path, dataset=dataset, on_policy_fraction=1.0)
    _, after = _live(trainer, dataset)
    counts = [(labels != -100).sum().item() for labels in after["labels"]]
    states = after["teacher_hidden_states"].float().split(counts)
    for index, row in enumerate(_rows(after)):
        answer = row[len(row) - counts[index] :]
        turns = ChatCodec(None, TOKENIZER).encode_prompt([dataset[index]["messages"][0]["content"]]) + answer
        assert row[-len(turns) :] == turns
        expected = _teacher_states(dataset[index]["context"], turns, counts[index])
        torch.testing.assert_close(states[index], expected, atol=5e-3, rtol=5e-3)


# -- nothing stored ----------------------------------------------------------------------------------------------------


def test_conversations_without_targets_give_the_run_of_those_with_them(tmp_path: Path, conversations: Dataset) -> None:
    bare = conversations.remove_columns("teacher_hidden_states")
    runs = []
    for dataset in (conversations, bare):
        trainer = make_trainer(
            tmp_path, dataset=dataset, train_sampling_strategy="random", arguments={"eval_dataset": dataset}
        )
        trainer.train()
        runs.append([*losses(trainer), trainer.evaluate()["eval_loss"]])
    assert runs[1] == pytest.approx(runs[0], rel=1e-3)  # what is stored is rounded to float16


def test_a_chunk_is_read_once_for_all_its_rows_in_a_batch(
    tmp_path: Path, conversations: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[int, ...]] = []
    prefill = KVPrefix.from_input_ids
    monkeypatch.setattr(
        KVPrefix, "from_input_ids", lambda model, ids, **more: (read.append(ids), prefill(model, ids, **more))[1]
    )
    bare = conversations.remove_columns("teacher_hidden_states")
    assert len(set(bare["chunk_id"])) == 2
    trainer = make_trainer(tmp_path, dataset=bare, max_steps=2, per_device_train_batch_size=8)
    trainer.initialize_cartridge()
    read.clear()
    trainer.train()
    assert len(read) == 2
    alone = make_trainer(tmp_path, dataset=bare, max_steps=2, teacher_cache_size=1, rows_per_chunk=8)
    alone.initialize_cartridge()
    read.clear()
    alone.train()
    assert len(read) == 2  # the order has the rows of a chunk together


def test_rows_of_a_chunk_stand_together_and_every_row_once() -> None:
    chunks = [number % 5 for number in range(43)]
    order = SeededOrder(43, 7, by_chunk(chunks, 4))
    first = list(order)
    runs = [first[i : i + 4] for i in range(0, 40, 4)]
    assert sorted(first) == list(range(43)) and first == list(order)
    changes = sum(chunks[a] != chunks[b] for a, b in itertools.pairwise(first))
    assert changes < 15 < sum(a != b for a, b in itertools.pairwise(chunks)), runs
    order.set_epoch(1)
    assert list(order) != first
