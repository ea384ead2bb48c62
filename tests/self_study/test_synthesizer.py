"""Synthesis with a tiny model: what stands in the rows, and that the teacher's targets are the teacher's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, SelfStudySynthesizer, SynthesisConfig, initialize_cartridge
from peft_cartridges.chat import ChatCodec
from peft_cartridges.conversations import make_features
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = " ".join(f"the captain of w{number} says no . the sea is w{number + 1} ." for number in range(50, 80))
ARGS = SynthesisConfig(
    num_conversations=14, conversations_per_chunk=6, min_chunk_tokens=30, max_chunk_tokens=40,
    max_question_tokens=6, max_answer_tokens=8, generation_batch_size=4,
    off_context_share=0.0,
)  # fmt: skip


def _synthesize(model: torch.nn.Module | None = None, **options: object) -> Dataset:
    args = SynthesisConfig(**{**vars(ARGS), **options})
    return SelfStudySynthesizer(model or tiny_model(), TOKENIZER, args).synthesize(TEXT)


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return _synthesize()


def test_rows_have_what_training_needs(dataset: Dataset) -> None:
    assert dataset.features == make_features("hidden_states")
    assert 10 <= len(dataset) <= 14
    assert len(set(dataset["chunk_id"])) > 1
    assert {"recitation"} < set(dataset["seed_type"])
    for row in dataset:
        learned = [token for token, mask in zip(row["input_ids"], row["completion_mask"], strict=True) if mask]
        answer = TOKENIZER.decode(learned, skip_special_tokens=True)
        assert answer == row["messages"][1]["content"]
        assert len(row["teacher_hidden_states"]) == len(learned) * 32
        preamble = ChatCodec(None, TOKENIZER).preamble
        assert row["input_ids"][: len(preamble)] == preamble


def test_recited_answers_stand_in_the_text(dataset: Dataset) -> None:
    recited = [row for row in dataset if row["seed_type"] == "recitation"]
    assert len(recited) == 7
    without_spaces = TEXT.replace(" ", "")
    assert all(row["messages"][1]["content"].replace(" ", "") in without_spaces for row in recited)


def test_targets_are_the_states_of_the_model_with_the_chunk_in_context(dataset: Dataset) -> None:
    model = tiny_model()
    tokens = TOKENIZER(TEXT, return_offsets_mapping=True)["offset_mapping"]
    for row in dataset.select([0, len(dataset) - 1]):
        start, end = map(int, row["chunk_id"].split(":")[1].split("-"))
        context = ChatCodec(None, TOKENIZER).encode_context(TEXT[tokens[start][0] : tokens[end - 1][1]])
        turns = row["input_ids"][len(ChatCodec(None, TOKENIZER).preamble) :]
        with torch.no_grad():
            hidden = model.model(torch.tensor([context + turns])).last_hidden_state[0]
        predicting = hidden[-sum(row["completion_mask"]) - 1 : -1]
        stored = torch.tensor(np.array(row["teacher_hidden_states"], dtype=np.float32)).reshape(predicting.shape)
        torch.testing.assert_close(stored, predicting, atol=2e-3, rtol=2e-3)


def test_rows_are_what_the_chat_template_gives_without_a_system_role_too() -> None:
    tokenizer, model = tiny_tokenizer(), tiny_model()
    tokenizer.chat_template = (
        "{{ bos_token }} {% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system') }}"
        "{% elif m['role'] == 'user' %}<user> {{ m['content'] }} <end> <assistant> {% else %}{{ m['content'] }} <eos> "
        "{% endif %}{% endfor %}"
    )
    for row in SelfStudySynthesizer(model, tokenizer, ARGS).synthesize(TEXT):
        first = row["completion_mask"].index(1)
        asked = row["messages"][:1]
        prompt = tokenizer.apply_chat_template(asked, tokenize=True, return_dict=False)
        assert row["input_ids"][:first] == prompt
        # The teacher's question stands behind the chunk in the same message, and has the same ids.
        (question,) = asked
        merged = [{**question, "content": f"{row['context']}\n\n{question['content']}"}]
        teacher = tokenizer.apply_chat_template(merged, tokenize=True, return_dict=False) + row["input_ids"][first:]
        with torch.no_grad():
            hidden = model.model(torch.tensor([teacher])).last_hidden_state[0]
        predicting = hidden[-sum(row["completion_mask"]) - 1 : -1]
        stored = torch.tensor(np.array(row["teacher_hidden_states"], dtype=np.float32)).reshape(predicting.shape)
        torch.testing.assert_close(stored, predicting, atol=2e-3, rtol=2e-3)


def test_the_same_seed_gives_the_same_rows(dataset: Dataset) -> None:
    assert _synthesize()["input_ids"] == dataset["input_ids"]
    assert _synthesize(synthesis_seed=7)["input_ids"] != dataset["input_ids"]


def test_a_cartridge_takes_no_part_in_synthesis(dataset: Dataset) -> None:
    model = get_peft_model(tiny_model(), CartridgeConfig(num_tokens=4)).train()
    initialize_cartridge(model, prefix=KVPrefix.from_input_ids(tiny_model(), [9, 10, 11, 12]))
    assert _synthesize(model)["input_ids"] == dataset["input_ids"]
    assert model.training and not model.base_model.cartridge_layers()[0].disable_adapters


def test_all_recitation_or_none(dataset: Dataset) -> None:
    assert set(_synthesize(recitation_share=1.0)["seed_type"]) == {"recitation"}
    assert "recitation" not in _synthesize(recitation_share=0.0)["seed_type"]
