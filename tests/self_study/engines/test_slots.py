"""Decoding in slots is `generate`, row by row, however rows come and go."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch

from peft_cartridges import KVPrefix, shared_prefix
from peft_cartridges.self_study.dispatch import Dispatcher
from peft_cartridges.self_study.engines import (
    ContextPrefixes,
    Outcome,
    Request,
    TransformersEngine,
    slots,
    transformers,
)
from peft_cartridges.self_study.engines.slots import SlotDecoder, can_decode_in_slots
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

ENDS = {2, *range(100, 116)}  # often met, so that rows end at different lengths
NAMES = ("llama", "mistral", "qwen3", "gemma2", "gemma3", "gpt2", "smollm3", "gpt_neox", "gpt_oss", "deepseek_v3")


def _prompts() -> list[list[int]]:
    return [token_ids(length, seed=length).tolist() for length in (1, 9, 4, 17, 3, 12, 6, 2, 5, 8, 11)]


def _one_by_one(model: Any, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """What `generate` gives for each prompt alone, without an end."""
    model.generation_config.eos_token_id = None
    rows = []
    for prompt in prompts:
        output = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), max_new_tokens=max_new_tokens,
            do_sample=False, pad_token_id=0,
        )  # fmt: skip
        rows.append(output[0, len(prompt) :].tolist())
    return rows


def _cut(row: list[int], ends: set[int]) -> list[int]:
    return next((row[: i + 1] for i, token in enumerate(row) if token in ends), row)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("with_prefix", [True, False], ids=["behind a prefix", "alone"])
def test_greedy_rows_are_those_of_generate(name: str, with_prefix: bool) -> None:
    model, prompts = tiny_model(name), _prompts()
    prefix = KVPrefix.from_input_ids(model, token_ids(20, seed=99))
    with shared_prefix(model, prefix) if with_prefix else contextlib.nullcontext():
        endless = _one_by_one(model, prompts, 14)
        ends = {endless[0][3], endless[4][1], endless[7][6]}
        found = SlotDecoder(model, ends, slots=3).generate(prompts, max_new_tokens=14, temperature=0, seeds=range(11))
    assert found == [_cut(row, ends) for row in endless]
    assert len(set(map(len, found))) > 1, "rows of one length would show nothing"


@pytest.mark.parametrize("name", NAMES)
def test_rows_behind_prefixes_of_their_own_are_those_of_generate(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slots, "_PIECE", 8)  # prompts are prefilled in pieces of like length
    model, prompts = tiny_model(name), _prompts()
    prefixes = [KVPrefix.from_input_ids(model, token_ids(length, seed=99)) for length in (20, 13)]
    of_rows = [[*prefixes, None][number % 3] for number in range(len(prompts))]
    expected = {}
    for number, prefix in enumerate(of_rows):
        with contextlib.nullcontext() if prefix is None else shared_prefix(model, prefix):
            expected[number] = _cut(_one_by_one(model, [prompts[number]], 10)[0], ENDS)
    decoder, found = SlotDecoder(model, ENDS, slots=4), {}
    for number, prompt in enumerate(prompts):
        decoder.begin(number, prompt, 10, 0.0, number, of_rows[number])
    while len(found) < len(prompts):
        found.update(decoder.step())
    assert found == expected


class _Asking:
    """Three questions about one context, each followed by another."""

    def __init__(self, number: int) -> None:
        self.context = tuple(token_ids(9 + number, seed=number).tolist())
        self.prompts = [token_ids(3 + turn, seed=50 * number + turn).tolist() for turn in range(3)]
        self.left, self.answers = 6, []

    @property
    def finished(self) -> bool:
        return not self.left

    def begin(self) -> list[Request]:
        return [Request(self.context, prompt, 4 + 3 * turn) for turn, prompt in enumerate(self.prompts)]

    def receive(self, outcome: Outcome) -> list[Request]:
        assert outcome.generation is not None
        self.left -= 1
        self.answers.append((outcome.request.prompt, outcome.generation.token_ids))
        again = len(outcome.request.prompt) < 6
        return [Request(self.context, [*outcome.request.prompt, 7, 8, 9], 5)] if again else []


@pytest.mark.parametrize("most", [1, 2, 8])
def test_conversations_about_many_chunks_are_those_about_one_at_a_time(
    most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model()
    expected = []
    for number in range(7):
        job = _Asking(number)
        Dispatcher([TransformersEngine(model, tiny_tokenizer(), batch_size=2)]).run([job], lambda job: None)
        expected.append(sorted(job.answers))
    read: Counter[int] = Counter()
    monkeypatch.setattr(transformers, "_MOST_CONTEXTS", most)
    from_ids = KVPrefix.from_input_ids
    monkeypatch.setattr(
        KVPrefix, "from_input_ids", lambda model, ids: (read.update([len(ids)]), from_ids(model, ids))[1]
    )
    engine, together = TransformersEngine(model, tiny_tokenizer(), batch_size=10), []
    step = engine.step

    def noted() -> list[Outcome]:
        together.append(len({request.context for request in engine._under_way}))
        return step()

    monkeypatch.setattr(engine, "step", noted)
    jobs, ended = [_Asking(number) for number in range(7)], []
    Dispatcher([engine]).run(jobs, ended.append)
    assert [sorted(job.answers) for job in jobs] == expected and set(ended) == set(jobs)
    assert max(together) == min(most, 6)  # of three conversations each, ten in flight
    assert read == {9 + number: 1 for number in range(7)}, "each context is read once"
    assert not engine.prefixes._held and len(engine.prefixes._kept) <= max(2, most)


def test_prefixes_that_are_held_stay() -> None:
    prefixes = ContextPrefixes(tiny_model(), size=1)
    contexts = [tuple(token_ids(5, seed=seed).tolist()) for seed in range(4)]
    held = [prefixes.hold(context) for context in contexts[:3]]
    prefixes.get(contexts[3])
    assert [prefixes.get(context) for context in contexts[:3]] == held
    again = prefixes.hold(contexts[0])
    for context in contexts[:3]:
        prefixes.release(context)
    prefixes.get(tuple(token_ids(6).tolist()))
    assert prefixes.get(contexts[0]) is again is held[0], "held twice and released once"
    assert prefixes.get(contexts[1]) is not held[1]
    assert prefixes.hold(()) is None


def test_finished_rows_make_room_at_once() -> None:
    model, prompts = tiny_model(), _prompts()
    decoder = SlotDecoder(model, ENDS, slots=4)
    rows = decoder.generate(prompts, max_new_tokens=40, temperature=1.0, seeds=range(11))
    lengths = list(map(len, rows))
    batches = [max(lengths[i] for i in order) for order in _batches(prompts, 4)]
    assert decoder.steps < sum(batches), "batches that run to their longest row take more steps"
    assert decoder.steps >= sum(lengths) / 4


def _batches(prompts: list[list[int]], size: int) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    return [order[start : start + size] for start in range(0, len(order), size)]


def test_a_row_is_drawn_with_its_own_seed_whatever_is_beside_it() -> None:
    model, prompts = tiny_model(), _prompts()
    seeds = list(range(50, 61))
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0}
    together = SlotDecoder(model, ENDS, slots=11).generate(prompts, seeds=seeds, **options)
    few = SlotDecoder(model, ENDS, slots=2).generate(prompts, seeds=seeds, **options)
    one = SlotDecoder(model, ENDS, slots=1)
    alone = [one.generate([prompts[i]], seeds=[seeds[i]], **options)[0] for i in range(11)]
    assert together == few == alone
    others = SlotDecoder(model, ENDS, slots=11).generate(prompts, seeds=range(11), **options)
    assert others != together


def test_draws_follow_the_distribution() -> None:
    model, temperature, number = tiny_model(), 0.7, 4000
    prompt = token_ids(5).tolist()
    with torch.no_grad():
        expected = (model(torch.tensor([prompt])).logits[0, -1] / temperature).softmax(-1)
    rows = SlotDecoder(model, set(), slots=500).generate(
        [prompt] * number, max_new_tokens=1, temperature=temperature, seeds=range(number)
    )
    drawn = torch.bincount(torch.tensor(rows)[:, 0], minlength=len(expected)) / number
    assert (drawn - expected).abs().max() < 4 * (0.25 / number) ** 0.5


def test_nothing_to_do_is_no_error() -> None:
    assert SlotDecoder(tiny_model(), ENDS, slots=2).generate([], max_new_tokens=3, temperature=0, seeds=[]) == []


def test_models_without_masks_per_row_run_by_generate() -> None:
    model, prompts = tiny_model(attn="flex_attention"), _prompts()[:3]
    assert not can_decode_in_slots(model) and can_decode_in_slots(tiny_model())
    requests = [Request((), prompt, 6, 0.0, seed) for seed, prompt in enumerate(prompts)]
    in_slots = TransformersEngine(tiny_model(), tiny_tokenizer(), batch_size=2)
    plain = TransformersEngine(tiny_model(), tiny_tokenizer(), batch_size=2, refill=False)
    expected = [one.token_ids for one in in_slots.sample(requests)]
    assert [one.token_ids for one in plain.sample(requests)] == expected


def test_rows_may_come_while_others_are_under_way_and_each_has_its_own_settings() -> None:
    model, prompts = tiny_model(), _prompts()
    settings = [(6, 0.0), (20, 1.0), (11, 0.5)]
    alone = {}
    for number, prompt in enumerate(prompts):
        length, temperature = settings[number % 3]
        decoder = SlotDecoder(model, ENDS, slots=1)
        (alone[number],) = decoder.generate([prompt], max_new_tokens=length, temperature=temperature, seeds=[number])
    decoder, found, waiting = SlotDecoder(model, ENDS, slots=3), {}, list(enumerate(prompts))
    while len(found) < len(prompts):
        if waiting:  # one more with every step, longer ones too: the buffers grow while rows are in them
            number, prompt = waiting.pop(0)
            decoder.begin(number, prompt, *settings[number % 3], number)
        found.update(decoder.step())
    assert found == alone
