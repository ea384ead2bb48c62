"""What a cartridge costs to make and to serve, and after how many questions it is cheaper than what one would do
instead: FLOPs, seconds and bytes from a model's configuration, without its weights."""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from .speed import seconds_of


@dataclass(frozen=True)
class ModelShape:
    """What a forward pass costs.

    Args:
        parameters: That a token is multiplied with (of experts, those that are active; embeddings that are looked up are
            none, the output head is).
        attention_width: Query heads times head width, summed over the layers that attend.
        kv_values_per_token: Numbers that a token leaves in the cache.
        weight_bytes: Of all weights, in `dtype_bytes` each.
        dtype_bytes: Of a number.
    """

    parameters: int
    attention_width: int
    kv_values_per_token: int
    weight_bytes: int
    dtype_bytes: int = 2

    def forward_flops(self, tokens: float, context: float = 0.0) -> float:
        """Of `tokens` new ones behind `context` others: two for each parameter, and four for each number of a query and
        each token that it attends to (the scores' product and the values')."""
        attended = tokens * (context + (tokens + 1) / 2)
        return 2.0 * self.parameters * tokens + 4.0 * self.attention_width * attended

    def kv_bytes(self, tokens: float) -> float:
        return float(self.kv_values_per_token * self.dtype_bytes * tokens)

    @classmethod
    def of(cls, config: Any, *, dtype_bytes: int = 2) -> ModelShape:
        """Of a model's configuration; its weights are counted on PyTorch's meta device and never made."""
        text = config.get_text_config(decoder=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
        embeddings = model.get_input_embeddings().weight
        total, active = 0, 0.0
        experts = _first(text, "num_experts", "num_local_experts", "n_routed_experts")
        chosen = _first(text, "num_experts_per_tok", "moe_topk")
        for name, parameter in model.named_parameters():
            total += parameter.numel()
            if parameter is embeddings and not text.tie_word_embeddings:
                continue
            share = chosen / experts if ".experts." in name and experts and chosen else 1.0
            active += parameter.numel() * share
        kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
        layers = sum("attention" in kind and "linear" not in kind for kind in kinds)
        heads = getattr(text, "num_attention_heads", None)
        if not layers or not heads:  # recurrent layers alone, whose memory does not grow with the text
            return cls(round(active), 0, 0, total * dtype_bytes, dtype_bytes)
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        if latent := getattr(text, "kv_lora_rank", None):
            per_layer = latent + text.qk_rope_head_dim
        else:
            per_layer = 2 * (getattr(text, "num_key_value_heads", None) or heads) * width
        keeping = layers - (getattr(text, "num_kv_shared_layers", None) or 0)
        return cls(round(active), layers * heads * width, keeping * per_layer, total * dtype_bytes, dtype_bytes)


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


@functools.lru_cache(maxsize=8)
def _shape_of(kind: str, settings: str) -> ModelShape:
    # transformers writes infinite numbers as {"__float__": "Infinity"}.
    read = json.loads(settings, object_hook=lambda found: float(found["__float__"]) if "__float__" in found else found)
    given = {name: value for name, value in read.items() if name != "model_type"}
    return ModelShape.of(AutoConfig.for_model(kind, **given))


def forward_flops(config: Any, tokens: float, context: float = 0.0) -> float:
    """`ModelShape.forward_flops` of a configuration; the shape is found once."""
    text = config.get_text_config(decoder=True)
    return _shape_of(text.model_type, text.to_json_string(use_diff=False)).forward_flops(tokens, context)


@dataclass(frozen=True)
class Machine:
    """How fast a machine really is.

    Args:
        flops: Per second that it reaches in large matrix products.
        bandwidth: Bytes per second that it reads from memory.
        name: In tables.

    Raises:
        ValueError: one of them is not positive.
    """

    flops: float
    bandwidth: float
    name: str = "this machine"

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    def seconds(self, flops: float, num_bytes: float = 0.0) -> float:
        """The longer of computing and reading (the roofline model)."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


@dataclass(frozen=True)
class Making:
    """What a self-study takes.

    Args:
        conversations: How many.
        question_tokens, answer_tokens: Of each.
        generated_share: Of the conversations, those that a model writes; recitations are not.
        chunk_tokens: In the teacher's context.
        conversations_per_chunk: That share one prefill of it.
        epochs: Passes over the conversations.
        batch_size: Conversations that are decoded together.

    Raises:
        ValueError: a number is negative, or a batch is empty.
    """

    conversations: int = 512
    question_tokens: int = 40
    answer_tokens: int = 80
    generated_share: float = 0.5
    chunk_tokens: int = 768
    conversations_per_chunk: int = 16
    epochs: float = 3.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("conversations", "question_tokens", "answer_tokens", "generated_share", "chunk_tokens", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.conversations_per_chunk < 1 or self.batch_size < 1:
            raise ValueError("`conversations_per_chunk` and `batch_size` must be at least 1.")


@dataclass(frozen=True)
class Traffic:
    """How it is used.

    Args:
        question_tokens, answer_tokens: Of a question and its answer.
        batch_size: Questions that are decoded together, each a user of its own.
        hit_rate: With prefix caching, the share of questions that find the text's keys and values in memory.
        passage_tokens: That retrieval puts in front of a question.

    Raises:
        ValueError: a number is out of range.
    """

    question_tokens: int = 40
    answer_tokens: int = 100
    batch_size: int = 16
    hit_rate: float = 0.9
    passage_tokens: int = 512

    def __post_init__(self) -> None:
        if not 0 <= self.hit_rate <= 1:
            raise ValueError(f"`hit_rate` must be between 0 and 1, got {self.hit_rate}.")
        for name in ("question_tokens", "answer_tokens", "batch_size", "passage_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


@dataclass(frozen=True)
class Cost:
    """Of one way to answer questions about a text.

    Args:
        name: In tables.
        making_flops, making_seconds: Once.
        flops, seconds: Of one question and its answer.
        kv_bytes: That each user's text takes in memory while it is served.
    """

    name: str
    making_flops: float
    making_seconds: float
    flops: float
    seconds: float
    kv_bytes: float

    def total(self, questions: float, unit: str = "seconds") -> float:
        """Making and serving so many questions; `unit` is `seconds` or `flops`."""
        return float(getattr(self, f"making_{unit}") + questions * getattr(self, unit))


def questions_until_cheaper(this: Cost, other: Cost, unit: str = "seconds") -> float:
    """Questions from which on `this` has cost less in all than `other`: 0 where it costs no more to make either,
    infinite where it never does."""
    more_to_make = getattr(this, f"making_{unit}") - getattr(other, f"making_{unit}")
    saved = getattr(other, unit) - getattr(this, unit)
    if saved <= 0:
        return math.inf if more_to_make > 0 or saved < 0 else 0.0
    return float(max(0, math.ceil(more_to_make / saved)))


def compare_costs(
    shape: ModelShape,
    machine: Machine,
    *,
    text_tokens: int,
    num_tokens: int,
    making: Making | None = None,
    traffic: Traffic | None = None,
) -> list[Cost]:
    """A cartridge of `num_tokens` tokens first, then the text in context without and with prefix caching, retrieval, and
    a LoRA of equal bytes on the same conversations.

    Raises:
        ValueError: the cartridge is not smaller than the text.
    """
    if not 0 < num_tokens < text_tokens:
        raise ValueError(f"`num_tokens` ({num_tokens}) must be at least 1 and less than `text_tokens` ({text_tokens}).")
    making, traffic = making or Making(), traffic or Traffic()

    def serve(front: int, read: float) -> tuple[float, float]:
        """FLOPs and seconds of a question behind `front` tokens, of which `read` are prefilled."""
        question, answer = traffic.question_tokens, traffic.answer_tokens
        prefill = shape.forward_flops(read) + shape.forward_flops(question, front)
        decode = shape.forward_flops(answer, front + question)
        middle = front + question + answer / 2
        # A step of the whole batch reads the weights once and each user's keys and values.
        step = machine.seconds(
            traffic.batch_size * decode / answer, shape.weight_bytes + traffic.batch_size * shape.kv_bytes(middle)
        )
        return prefill + decode, machine.seconds(prefill) + answer * step / traffic.batch_size

    def cost(name: str, front: int, read: float, made: tuple[float, float], held: float) -> Cost:
        return Cost(name, *made, *serve(front, read), held)

    written = _writing(shape, machine, making)
    trained = _training(shape, machine, making, num_tokens)
    weights = _training(shape, machine, making, 0)
    start = shape.forward_flops(text_tokens)
    both = (written[0] + trained[0] + start, written[1] + trained[1] + machine.seconds(start))
    lora = (written[0] + weights[0], written[1] + weights[1])
    nothing, text = (0.0, 0.0), shape.kv_bytes(text_tokens)
    missed = (1 - traffic.hit_rate) * text_tokens
    return [
        cost("cartridge", num_tokens, 0.0, both, shape.kv_bytes(num_tokens)),
        cost("text in context", text_tokens, text_tokens, nothing, text),
        cost(f"text, prefix cache {traffic.hit_rate:.0%} hit", text_tokens, missed, nothing, text),
        cost(
            "retrieval", traffic.passage_tokens, traffic.passage_tokens, nothing, shape.kv_bytes(traffic.passage_tokens)
        ),
        cost("LoRA of equal bytes", 0, 0.0, lora, shape.kv_bytes(num_tokens)),
    ]


def _writing(shape: ModelShape, machine: Machine, making: Making) -> tuple[float, float]:
    """Conversations: chunks are prefilled, questions and answers decoded, and the answers scored once more."""
    chunks = math.ceil(making.conversations / making.conversations_per_chunk)
    prefill = chunks * shape.forward_flops(making.chunk_tokens)
    both = making.question_tokens + making.answer_tokens
    one = shape.forward_flops(both, making.chunk_tokens)
    dialogues = making.conversations * making.generated_share
    steps = both * dialogues / making.batch_size
    step = machine.seconds(making.batch_size * one / max(both, 1), shape.weight_bytes)
    scoring = making.conversations * one
    return prefill + dialogues * one + scoring, machine.seconds(prefill + scoring) + steps * step


def _training(shape: ModelShape, machine: Machine, making: Making, num_tokens: int) -> tuple[float, float]:
    """A forward and a backward through a frozen model, which is as much again: no gradients of its weights."""
    tokens = making.question_tokens + making.answer_tokens
    flops = 2 * making.epochs * making.conversations * shape.forward_flops(tokens, num_tokens)
    return flops, machine.seconds(flops)


@torch.no_grad()
def measure_machine(model: Any, *, tokens: int = 512, steps: int = 8) -> Machine:
    """FLOPs per second of a prefill, and bytes per second of decoding one row, with a model on its device."""
    shape = ModelShape.of(model.config, dtype_bytes=next(model.parameters()).element_size())
    ids = torch.arange(10, 10 + tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    prefill = seconds_of(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1))

    def decode() -> None:
        cache = None
        for _ in range(steps):
            cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values

    step = seconds_of(decode) / steps
    return Machine(shape.forward_flops(tokens) / prefill, shape.weight_bytes / step, "this machine, measured")
