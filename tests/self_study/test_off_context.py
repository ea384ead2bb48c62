"""General conversations of a set: written and scored without any text, counted, kept, and of the user's own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from peft_cartridges import SelfStudySynthesizer, load_self_study
from peft_cartridges.chat import ChatCodec
from peft_cartridges.conversations import format_conversation, format_report, read_report, save_self_study
from peft_cartridges.conversations.rows import off_context_rows
from peft_cartridges.self_study import off_context
from peft_cartridges.self_study.off_context import GivenConversations, num_off_context
from peft_cartridges.self_study.quality import Candidate, Refusal, VagueQuestion
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

GIVEN = [
    {"prompt": "who is old ?", "completion": "the captain ."},
    {"messages": [{"role": "user", "content": "what is blue ?"}, {"role": "assistant", "content": "the sea ."}]},
    {"prompt": [{"role": "user", "content": "is this new ?"}], "answer": "yes . the sky is blue . the ship is red ."},
]


@pytest.fixture(scope="module")
def mixed() -> Dataset:
    return runs.synthesize(None, num_conversations=12, off_context_share=0.25)


def _general(dataset: Dataset) -> list[dict[str, Any]]:
    return [dataset[place] for place in off_context_rows(dataset)]


@torch.no_grad()
def _bare_states(row: dict[str, Any]) -> torch.Tensor:
    """What the model that has read nothing predicts the learned tokens with: its own preamble, then the turns."""
    front = ChatCodec(None, tiny_tokenizer()).preamble
    turns = row["input_ids"][row["turns_start"] :]
    states = tiny_model().model(torch.tensor([front + turns])).last_hidden_state[0]
    learned = [len(front) + place for place, on in enumerate(row["completion_mask"][row["turns_start"] :]) if on]
    return states[torch.tensor(learned) - 1]


def test_a_share_of_the_rows_is_about_no_chunk_and_comes_last(mixed: Dataset) -> None:
    assert num_off_context(12, 0.25) == 4 and off_context_rows(mixed) == [12, 13, 14, 15]
    for row in _general(mixed):
        assert row["chunk_id"] is None and row["context"] is None and row["seed_type"] == "general"
        assert any(row["completion_mask"]) and row["messages"][1]["role"] == "assistant"
    plain = runs.synthesize(None, num_conversations=12)
    assert plain.to_dict() == mixed.select(range(12)).to_dict(), "the others are as they were"


def test_their_teacher_is_the_bare_model(mixed: Dataset) -> None:
    for row in _general(mixed):
        expected = _bare_states(row)
        found = torch.tensor(row["teacher_hidden_states"]).reshape(len(expected), -1)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)
    top_k = runs.synthesize(
        None, num_conversations=12, off_context_share=0.25, teacher_targets="top_k", teacher_top_k=3
    )
    for row in _general(top_k):
        logprobs = tiny_model().lm_head(_bare_states(row)).log_softmax(-1).topk(3).values
        found = torch.tensor(row["teacher_top_k_logprobs"]).reshape(-1, 3)
        torch.testing.assert_close(found, logprobs.detach(), atol=2e-3, rtol=2e-3)


def test_their_answers_are_what_the_bare_model_says() -> None:
    dataset = runs.synthesize(None, num_conversations=4, off_context_share=0.5, answer_temperature=0.0)
    for row in _general(dataset):
        likeliest = tiny_model().lm_head(_bare_states(row)).argmax(-1).tolist()
        assert likeliest == [token for token, on in zip(row["input_ids"], row["completion_mask"], strict=True) if on]


def test_the_packages_own_requests_come_first_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    requests = ("who is old ?", "what is blue ?", "is this new ?")
    monkeypatch.setattr(off_context, "GENERAL_REQUESTS", requests)
    settings = {"num_conversations": 5, "off_context_share": 0.5, "quality_filters": []}
    asked = [row["messages"][0]["content"] for row in _general(runs.synthesize(None, **settings))]
    assert len(asked) == 5 and set(asked[:3]) == set(requests), "and then the model asks"
    orders = {tuple(off_context.general_request(i, seed) for i in range(3)) for seed in range(20)}
    assert len(orders) > 1 and all(set(order) == set(requests) for order in orders)


def test_a_system_prompt_stands_in_front_of_them_too() -> None:
    dataset = runs.synthesize(None, num_conversations=4, off_context_share=0.5, system_prompts=["the old captain"])
    codec = ChatCodec(None, tiny_tokenizer())
    for row in _general(dataset):
        front = codec.encode_context("the old captain")
        assert row["input_ids"][: row["turns_start"]] == front
        with torch.no_grad():
            states = tiny_model().model(torch.tensor([row["input_ids"]])).last_hidden_state[0]
        learned = torch.tensor([place for place, on in enumerate(row["completion_mask"]) if on])
        found = torch.tensor(row["teacher_hidden_states"]).reshape(len(learned), -1)
        torch.testing.assert_close(found, states[learned - 1], atol=5e-3, rtol=5e-3)


def test_several_rounds_follow_up_without_a_text() -> None:
    dataset = runs.synthesize(None, num_conversations=2, off_context_share=0.5, num_rounds=2)
    assert max(len(row["messages"]) for row in _general(dataset)) == 4


def test_the_share_is_no_part_of_the_address_and_changes_nothing_that_is_there(tmp_path: Path, mixed: Dataset) -> None:
    runs.synthesize(tmp_path, num_conversations=12)
    more = runs.synthesize(tmp_path, num_conversations=12, off_context_share=0.25)
    assert more.to_dict() == mixed.to_dict()
    fewer = runs.synthesize(tmp_path, num_conversations=12, off_context_share=0.1)
    assert fewer.to_dict() == mixed.select(range(13)).to_dict()
    assert len(runs.synthesize(tmp_path, num_conversations=12)) == 12
    assert load_self_study(tmp_path).num_rows == 16, "what was made is there"


def test_a_killed_run_makes_what_is_missing(tmp_path: Path, mixed: Dataset) -> None:
    runs.synthesize(tmp_path, num_conversations=12, off_context_share=0.25)
    shards = {path: path.read_bytes() for path in tmp_path.rglob("off-context-00000-00004.arrow")}
    assert {path.parent.name for path in shards} == {"written", "hidden_states"}
    for path in shards:
        path.unlink()
    assert runs.synthesize(tmp_path, num_conversations=12, off_context_share=0.25).to_dict() == mixed.to_dict()
    assert {path: path.read_bytes() for path in shards} == shards


def test_they_are_counted_and_shown(mixed: Dataset) -> None:
    told = read_report(mixed)
    assert told["report"]["kept"] == 16 and told["report"]["off_context"] == 4
    assert told["report"]["chunks"] == 6 and len(told["report"]["per_chunk"]) == 6
    assert told["synthesis"]["off_context_share"] == 0.25 and told["synthesis"]["num_conversations"] == 12
    assert "  4 of them off context (25.0%)" in format_report(told).splitlines()
    assert format_conversation(mixed[15]).splitlines()[0] == "general · off context"


def test_no_row_is_lost_on_disk_in_parquet_or_in_a_kept_selection(tmp_path: Path, mixed: Dataset) -> None:
    mixed.to_parquet(tmp_path / "set.parquet")
    back = load_self_study(tmp_path / "set.parquet")
    assert back.to_dict() == mixed.to_dict() and off_context_rows(back) == off_context_rows(mixed)
    folder = save_self_study(mixed.select(range(8, 16)), tmp_path / "kept")
    assert off_context_rows(load_self_study(folder)) == [4, 5, 6, 7]


def test_usefulness_is_not_measured_of_them() -> None:
    dataset = runs.synthesize(
        None, num_conversations=6, off_context_share=0.25, min_usefulness=1e-6, oversampling=2.0, answer_temperature=1.0
    )
    assert [row["usefulness"] for row in _general(dataset)] == [None, None]
    assert all(row["usefulness"] > 0 for row in dataset if row["context"])


def test_filters_of_what_a_text_is_asked_let_them_pass() -> None:
    messages = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "I'm sorry, I cannot help."}]
    about, off = (Candidate(messages, context, "general") for context in ("a text", ""))
    for one in (Refusal(), VagueQuestion()):
        assert one.drops(about) and not one.drops(off)


# -- of the user's own -------------------------------------------------------------------------------------------------


def _synthesizer(source: Any, **options: Any) -> SelfStudySynthesizer:
    settings = runs.settings(**{"num_conversations": 9, "off_context_share": 0.25, "max_answer_tokens": 8, **options})
    return SelfStudySynthesizer(tiny_model(), tiny_tokenizer(), settings, off_context_dataset=source)


def test_conversations_of_a_data_set_are_taken_as_they_are() -> None:
    dataset = _synthesizer(GIVEN).synthesize(runs.TEXT)
    rows = {row["messages"][0]["content"]: row for row in _general(dataset)}
    assert set(rows) == {"who is old ?", "what is blue ?", "is this new ?"}
    assert rows["who is old ?"]["messages"][1]["content"] == "thecaptain.", "as the tokenizer reads it"
    assert sum(rows["is this new ?"]["completion_mask"]) == 8, "cut at `max_answer_tokens`"
    for row in rows.values():
        assert row["seed_type"] == "off_context_dataset" and row["chunk_id"] is None
        expected = _bare_states(row)
        found = torch.tensor(row["teacher_hidden_states"]).reshape(len(expected), -1)
        torch.testing.assert_close(found, expected, atol=5e-3, rtol=5e-3)


def test_prompts_without_an_answer_are_answered_by_the_model(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"is w{number} blue ?"}) for number in range(50, 60)))
    args = runs.settings(num_conversations=9, off_context_share=0.25, off_context_dataset=str(path))
    dataset = SelfStudySynthesizer(tiny_model(), tiny_tokenizer(), args).synthesize(runs.TEXT)
    rows = _general(dataset)
    assert len(rows) == 3 and all(row["messages"][1]["content"] for row in rows)
    assert {row["messages"][0]["content"] for row in rows} <= {f"is w{number} blue ?" for number in range(50, 60)}


def test_what_the_data_set_says_decides_the_address_and_where_it_lies_does_not(tmp_path: Path) -> None:
    plain = SelfStudySynthesizer(tiny_model(), tiny_tokenizer(), runs.settings()).address(runs.TEXT)
    given = _synthesizer(GIVEN).address(runs.TEXT)
    assert given not in (plain, _synthesizer(GIVEN[:2]).address(runs.TEXT))
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, GIVEN)))
        found = _synthesizer(None, off_context_dataset=str(tmp_path / name)).address(runs.TEXT)
        assert found == given


def test_a_small_data_set_gives_what_it_has() -> None:
    assert len(_general(_synthesizer(GIVEN, num_conversations=30).synthesize(runs.TEXT))) == 3


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "`off_context_dataset` has no rows"),
        (
            [{"text": "the sea"}],
            r"`off_context_dataset\[0\]` has no question \(it has text\): give rows with `messages`",
        ),
        (
            [GIVEN[0], {"messages": [{"role": "assistant", "content": "no"}]}],
            r"`off_context_dataset\[1\]` has no question",
        ),
        (
            "no-such-file.jsonl",
            r"`off_context_dataset` is 'no-such-file.jsonl': give a file \(.jsonl, .json, .parquet\)",
        ),
    ],
)
def test_what_is_no_data_set_of_conversations_is_refused(source: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GivenConversations.load(source, 0)


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="`off_context_share` must be at least 0 and below 1"):
        runs.settings(off_context_share=share)
