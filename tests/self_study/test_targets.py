"""The teacher's targets: the top k are those of the model with the chunk in context, cut at a mass, and sized."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from peft_cartridges import SelfStudySynthesizer
from peft_cartridges.chat import ChatCodec
from peft_cartridges.self_study import estimate_run
from peft_cartridges.self_study.teacher_targets import (
    PADDED_LOGPROB,
    HiddenStates,
    TopK,
    top_k_divergence,
    top_k_of_logits,
    top_k_of_tables,
)
from tests.self_study import runs
from tests.tiny_models import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()


@pytest.mark.parametrize("mass", [1.0, 0.2])
@pytest.mark.parametrize("rounds", [1, 2])
def test_top_k_are_the_likeliest_of_the_model_with_the_chunk_in_context(mass: float, rounds: int) -> None:
    dataset = runs.synthesize(
        None, num_conversations=6, teacher_targets="top_k", teacher_top_k=7, teacher_top_k_mass=mass,
        recitation_share=0.5, num_rounds=rounds,
    )  # fmt: skip
    model, padded = tiny_model(), 0
    for row in dataset:
        turns = row["input_ids"][len(ChatCodec(None, TOKENIZER).preamble) :]
        context = ChatCodec(None, TOKENIZER).encode_context(row["context"])
        with torch.no_grad():
            logprobs = model(torch.tensor([context + turns])).logits[0].log_softmax(-1)
        learned = [i + len(context) for i, mark in enumerate(row["completion_mask"][-len(turns) :]) if mark]
        expected = logprobs[torch.tensor(learned) - 1].topk(7)
        ids = np.array(row["teacher_top_k_ids"]).reshape(-1, 7)
        found = np.array(row["teacher_top_k_logprobs"]).reshape(-1, 7)
        assert len(ids) == len(learned) == sum(row["completion_mask"])
        kept = found > PADDED_LOGPROB
        np.testing.assert_array_equal(ids[kept], expected.indices.numpy()[kept])
        np.testing.assert_allclose(found[kept], expected.values.numpy()[kept], atol=1e-4)
        assert not ids[~kept].any()
        reached = np.exp(np.where(kept, found, -np.inf)).sum(-1)
        without_last = reached - np.exp(np.where(kept, found, np.inf).min(-1))
        assert np.all((reached >= mass - 1e-6) | kept.all(-1)), "cut before the mass was reached"
        assert np.all((without_last < mass) | (kept.sum(-1) == 1)), "kept more than it takes"
        padded += int((~kept).sum())
    assert (padded > 0) == (mass < 1)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.05, 1.0), st.integers(0, 5))
def test_a_cut_keeps_the_likeliest_and_pads_to_k(listed: int, k: int, mass: float, seed: int) -> None:
    logits = torch.randn(4, 12, generator=torch.Generator().manual_seed(seed)) * 3
    cut = top_k_of_logits(logits, listed).cut(k, mass)
    assert cut.token_ids.shape == cut.logprobs.shape == (4, k)
    assert cut.token_ids.dtype == np.int32 and cut.logprobs.dtype == np.float32
    expected = top_k_of_logits(logits, min(k, listed))
    kept = cut.logprobs > PADDED_LOGPROB
    assert kept[:, 0].all() and kept.sum(-1).max() <= min(k, listed)
    for row in range(4):
        number = int(kept[row].sum())
        np.testing.assert_array_equal(cut.token_ids[row, :number], expected.token_ids[row, :number])


def test_tables_of_an_engine_are_sorted_and_padded() -> None:
    found = top_k_of_tables([{5: -2.0, 9: -0.5, 7: -1.0}, {3: -0.1}], 2)
    assert found.token_ids.tolist() == [[9, 7], [3, 0]]
    np.testing.assert_allclose(found.logprobs, [[-0.5, -1.0], [-0.1, PADDED_LOGPROB]], rtol=1e-6)


def test_divergence_of_top_k_is_the_kl_where_all_is_listed_and_less_where_not() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, 20, generator=generator) * 2 for _ in range(2))
    exact = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1).mean().item()
    assert top_k_divergence(top_k_of_logits(p, 20), top_k_of_logits(q, 20)) == pytest.approx(exact, rel=1e-5)
    assert top_k_divergence(top_k_of_logits(p, 20), top_k_of_logits(p, 20)) == pytest.approx(0, abs=1e-6)
    assert 0 < top_k_divergence(top_k_of_logits(p, 8), top_k_of_logits(q, 8).cut(8, 0.9)) < exact * 1.2


def test_hidden_states_that_float16_cannot_hold_are_refused() -> None:
    assert HiddenStates(torch.full((2, 3), 6e4)).columns()["teacher_hidden_states"].dtype == np.float16
    for value in (7e4, float("nan"), float("inf")):
        with pytest.raises(ValueError, match='use `teacher_targets="top_k"`'):
            HiddenStates(torch.full((2, 3), value)).columns()


def test_concatenation_joins_positions() -> None:
    part = top_k_of_logits(torch.randn(3, 9), 4)
    joined = TopK.concatenate([part, part.select([2])])
    assert len(joined) == 4 and joined.token_ids[3].tolist() == part.token_ids[2].tolist()


@pytest.mark.parametrize("options", [{}, {"teacher_targets": "top_k", "teacher_top_k": 5}, {"num_rounds": 2}])
def test_the_estimate_is_an_upper_bound_that_is_not_far_off(options: dict[str, Any]) -> None:
    args = runs.settings(num_conversations=20, conversations_per_chunk=5, **options)
    estimate = estimate_run(args, {"doc0": 600}, hidden_size=32)
    dataset = SelfStudySynthesizer(tiny_model(), TOKENIZER, args).synthesize(runs.TEXT)
    name = "teacher_hidden_states" if args.teacher_targets != "top_k" else "teacher_top_k_ids"
    size = sum(len(row[name]) for row in dataset) * (2 if name == "teacher_hidden_states" else 8)
    assert 0.5 * estimate.target_bytes < size <= estimate.target_bytes
    assert estimate.chunks == 4 and estimate.conversations == 20
    learned = sum(sum(row["completion_mask"]) for row in dataset)
    assert 0.5 * estimate.learned_tokens < learned <= estimate.learned_tokens
    assert estimate.seconds(10) == estimate.generated_tokens / 10
    assert "20 conversations" in str(estimate)


def test_an_estimate_of_hidden_states_needs_their_size() -> None:
    with pytest.raises(ValueError, match="`hidden_size` is missing"):
        estimate_run(runs.settings(), {"doc0": 600})
