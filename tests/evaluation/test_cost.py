"""The cost model against counts of real models, PyTorch's own FLOP counter, and sums by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache

from peft_cartridges import KVPrefix
from peft_cartridges.evaluation import Machine, Making, ModelShape, Traffic, compare_costs, questions_until_cheaper
from peft_cartridges.evaluation.cost import Cost, measure_machine
from peft_cartridges.model_cost import DEVICES, LLAMA_8B, forward_flops
from peft_cartridges.self_study.making_cost import training
from tests.tiny_models import tiny_model

SHAPE = ModelShape(
    parameters=1000, attention_width=10, kv_values_per_token=8, weight_bytes=4000, dtype_bytes=2, head_parameters=100
)
# Compute and memory of a machine on which nothing waits for memory.
FAST = Machine(flops=1e6, bandwidth=1e12)


def test_flops_by_hand() -> None:
    # 3 tokens: 2 * 1000 each; the first attends to 5 + 1, then 5 + 2, 5 + 3: 21 tokens, 4 * 10 each.
    assert SHAPE.forward_flops(3, 5) == 3 * 2000 + 21 * 40
    # Of which one goes through the head.
    assert SHAPE.forward_flops(3, 5, predicted=1) == 3 * 1800 + 200 + 21 * 40
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
    # The question's last token is decided by the head; each token of the answer attends to 10 + 2 + 1.5 and itself.
    question = SHAPE.forward_flops(2, 10, predicted=1) + 3 * SHAPE.forward_flops(1, 13.5)
    assert ours.flops == pytest.approx(question) and ours.seconds == pytest.approx(question / 1e6)
    behind_text = SHAPE.forward_flops(2, 100, predicted=1) + 3 * SHAPE.forward_flops(1, 103.5)
    assert text.flops == pytest.approx(SHAPE.forward_flops(100, predicted=0) + behind_text)
    cached = costs["text, prefix cache 75% hit"]
    read, missed = (SHAPE.forward_flops(tokens, predicted=0) for tokens in (100, 25))
    assert text.flops - cached.flops == pytest.approx(read - missed)
    assert (ours.kv_bytes, text.kv_bytes) == (160, 1600)
    # Two chunks; 10 × 5 tokens written; 10 rows scored.
    written = 2 * SHAPE.forward_flops(20, predicted=0) + 50 * SHAPE.forward_flops(1, 22.5)
    written += 10 * SHAPE.forward_flops(5, 20, predicted=0)

    def learned(num_tokens: int) -> float:
        """Two epochs: layers twice, attention three times, the head three times for each token of an answer."""
        attended = 5 * (num_tokens + 3)
        return 2 * 10 * (2 * 2 * 900 * 5 + 3 * 40 * attended + 3 * 200 * 3)

    assert ours.making_flops == pytest.approx(written + learned(10) + SHAPE.forward_flops(100, predicted=0))
    assert costs["LoRA of equal bytes"].making_flops == pytest.approx(written + learned(0))


def test_a_training_step_takes_the_flops_that_pytorch_counts() -> None:
    """With PyTorch's own attention in eager mode, which it counts: the trainer's kernels are exact, not other sums."""
    model = tiny_model(attn="eager").requires_grad_(False)
    shape, rows, length, learned, num_tokens = ModelShape.of(model.config), 4, 48, 16, 64
    prefix = KVPrefix.from_input_ids(model, list(range(10, 10 + num_tokens)))
    cache = DynamicCache(config=model.config)
    for layer, (keys, values) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        sides = (side.expand(rows, *side.shape[-3:]).clone().requires_grad_() for side in (keys, values))
        cache.update(*sides, layer)
    ids = torch.arange(20, 20 + length).expand(rows, -1)
    # The first layer counts as the others do, which have gradients of their input.
    embedded = model.get_input_embeddings()(ids).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        hidden = model.model(inputs_embeds=embedded, past_key_values=cache).last_hidden_state[:, -learned:]
        student = model.lm_head(hidden)
        with torch.no_grad():
            teacher = model.lm_head(torch.randn_like(hidden)).softmax(-1)
        torch.nn.functional.cross_entropy(student.flatten(0, 1), teacher.flatten(0, 1)).backward()
    told = training(
        shape, FAST, conversations=rows, row_tokens=length, learned_tokens=learned, num_tokens=num_tokens
    ).flops  # fmt: skip
    # Eager attention computes the square of the scores, of which the mask leaves a triangle.
    square = 3 * rows * 4 * shape.attention_width * (length * length - length * (length + 1) / 2)
    assert told + square == pytest.approx(counter.get_total_flops(), rel=0.03)


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


def test_a_machine_of_a_data_sheet() -> None:
    flops, bandwidth, memory = DEVICES["l4"]
    machine = Machine.of("l4", utilization=0.5, devices=2)
    assert (machine.flops, machine.bandwidth, machine.memory) == (flops / 2, bandwidth / 2, memory)
    assert machine.name == "2 × l4 at 50% of its peaks"
    with pytest.raises(ValueError, match="The machine 'abacus' is unknown; there are: h200"):
        Machine.of("abacus")


def test_the_papers_largest_model_is_what_its_configuration_says() -> None:
    config = AutoConfig.for_model(
        "llama", hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128_256, head_dim=128, tie_word_embeddings=False,
    )  # fmt: skip
    assert ModelShape.of(config) == LLAMA_8B


def test_bad_input() -> None:
    with pytest.raises(ValueError, match=r"`num_tokens` \(100\) must be at least 1 and less"):
        compare_costs(SHAPE, FAST, text_tokens=100, num_tokens=100)
    for build, name in (
        (lambda: Making(conversations=-1), "conversations"), (lambda: Making(batch_size=0), "batch_size"),
        (lambda: Traffic(hit_rate=2.0), "hit_rate"), (lambda: Traffic(batch_size=0), "batch_size"),
        (lambda: Machine(0.0, 1.0), "flops"), (lambda: Machine(1.0, 1.0, devices=0), "devices"),
        (lambda: Machine.of("h100", utilization=2.0), "utilization"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"`{name}`"):
            build()
