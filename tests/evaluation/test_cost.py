"""The cost model against counts of real models, PyTorch's own FLOP counter, and sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from peft_cartridges import KVPrefix
from peft_cartridges.evaluation import Machine, Making, ModelShape, Traffic, compare_costs, questions_until_cheaper
from peft_cartridges.evaluation.cost import Cost, forward_flops, measure_machine
from tests.tiny_models import tiny_model

SHAPE = ModelShape(parameters=1000, attention_width=10, kv_values_per_token=8, weight_bytes=4000, dtype_bytes=2)
# Compute and memory of a machine on which nothing waits for memory.
FAST = Machine(flops=1e6, bandwidth=1e12)


def test_flops_by_hand() -> None:
    # 3 tokens: 2 * 1000 each; the first attends to 5 + 1, then 5 + 2, 5 + 3: 21 tokens, 4 * 10 each.
    assert SHAPE.forward_flops(3, 5) == 3 * 2000 + 21 * 40
    assert SHAPE.kv_bytes(5) == 80


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral"])
def test_shapes_are_those_of_the_model(name: str) -> None:
    model = tiny_model(name)
    shape = ModelShape.of(model.config)
    prefix = KVPrefix.from_input_ids(model, [9, 10, 11])
    assert shape.kv_bytes(3) == prefix.nbytes / 2  # the model is in float32
    assert shape.weight_bytes == 2 * sum(p.numel() for p in model.parameters())
    embeddings = model.get_input_embeddings().weight.numel()
    assert shape.parameters == sum(p.numel() for p in model.parameters()) - embeddings


def test_flops_are_those_that_pytorch_counts() -> None:
    model = tiny_model(attn="eager")
    shape = ModelShape.of(model.config)
    ids = torch.arange(10, 74)[None]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    counted = counter.get_total_flops()
    # The counter leaves out the mask (it counts the square) and the norms' few parameters.
    square = shape.forward_flops(64) + 4 * shape.attention_width * (64 * 64 - 64 * 65 / 2)
    assert square == pytest.approx(counted, rel=0.01)
    assert forward_flops(model.config, 64) == shape.forward_flops(64)


def test_experts_count_as_often_as_they_are_chosen() -> None:
    dense, moe = tiny_model("qwen3"), tiny_model("qwen3_moe")
    shape = ModelShape.of(moe.config)
    experts = sum(p.numel() for name, p in moe.named_parameters() if ".experts." in name)
    rest = sum(p.numel() for p in moe.parameters()) - moe.get_input_embeddings().weight.numel() - experts
    assert experts > 0 and shape.parameters == rest + experts * 2 // 4
    assert ModelShape.of(dense.config).parameters != shape.parameters


def test_a_question_by_hand() -> None:
    making = Making(
        conversations=10, question_tokens=2, answer_tokens=3, generated_share=1.0, chunk_tokens=20, conversations_per_chunk=5,
        epochs=2.0, batch_size=5,
    )  # fmt: skip
    traffic = Traffic(question_tokens=2, answer_tokens=3, batch_size=4, hit_rate=0.75, passage_tokens=6)
    costs = {
        c.name: c for c in compare_costs(SHAPE, FAST, text_tokens=100, num_tokens=10, making=making, traffic=traffic)
    }
    ours, text = costs["cartridge"], costs["text in context"]
    question = SHAPE.forward_flops(2, 10) + SHAPE.forward_flops(3, 12)
    assert ours.flops == question and ours.seconds == pytest.approx(question / 1e6)
    assert text.flops == SHAPE.forward_flops(100) + SHAPE.forward_flops(2, 100) + SHAPE.forward_flops(3, 102)
    cached = costs["text, prefix cache 75% hit"]
    assert text.flops - cached.flops == pytest.approx(SHAPE.forward_flops(100) - SHAPE.forward_flops(25))
    assert (ours.kv_bytes, text.kv_bytes) == (160, 1600)
    written = 2 * SHAPE.forward_flops(20) + 2 * 10 * SHAPE.forward_flops(5, 20)  # chunks; written and scored
    trained = 2 * 2 * 10 * SHAPE.forward_flops(5, 10)  # forward and backward, two epochs
    assert ours.making_flops == pytest.approx(written + trained + SHAPE.forward_flops(100))
    assert costs["LoRA of equal bytes"].making_flops == pytest.approx(written + 2 * 2 * 10 * SHAPE.forward_flops(5))


def test_decoding_waits_for_memory() -> None:
    slow = Machine(flops=1e12, bandwidth=1e3)
    traffic = Traffic(question_tokens=1, answer_tokens=10, batch_size=2)
    ours, text = compare_costs(SHAPE, slow, text_tokens=1000, num_tokens=10, traffic=traffic)[:2]
    # A step of two users reads the weights once, and each one's keys and values (5 tokens of the answer on average).
    assert ours.seconds == pytest.approx(10 / 2 * (4000 + 2 * SHAPE.kv_bytes(10 + 1 + 5)) / 1e3, rel=1e-3)
    assert text.seconds > 4 * ours.seconds


def test_break_even() -> None:
    ours, text = Cost("a", 0.0, 600.0, 0.0, 0.5, 0.0), Cost("b", 0.0, 0.0, 0.0, 4.0, 0.0)
    count = questions_until_cheaper(ours, text)
    assert count == 172  # 600 / 3.5 = 171.4
    assert ours.total(172) < text.total(172) and ours.total(171) > text.total(171)
    assert (
        questions_until_cheaper(text, ours) == 0
        if ours.seconds > 4.0
        else math.isinf(questions_until_cheaper(text, ours))
    )
    assert questions_until_cheaper(ours, Cost("c", 0.0, 600.0, 0.0, 0.5, 0.0)) == 0.0
    assert questions_until_cheaper(ours, Cost("d", 0.0, 700.0, 0.0, 0.6, 0.0)) == 0.0


def test_a_measured_machine_predicts_what_it_measured() -> None:
    model = tiny_model()
    machine = measure_machine(model, tokens=32, steps=2)
    assert machine.flops > 0 and machine.bandwidth > 0


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`num_tokens` \(100\) must be at least 1 and less"):
        compare_costs(SHAPE, FAST, text_tokens=100, num_tokens=100)
    for build, name in (
        (lambda: Making(conversations=-1), "conversations"), (lambda: Making(batch_size=0), "batch_size"),
        (lambda: Traffic(hit_rate=2.0), "hit_rate"), (lambda: Traffic(batch_size=0), "batch_size"),
        (lambda: Machine(0.0, 1.0), "flops"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}`"):
            build()
