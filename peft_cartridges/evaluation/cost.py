"""What a cartridge costs to make and to serve, and after how many questions it is cheaper than what one would do
instead: FLOPs, seconds and bytes from a model's configuration, without its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..model_cost import Machine, ModelShape, decoding_step
from ..self_study.making_cost import Making, Phase, making_phases
from .speed import seconds_of, wall_clock


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


def question_cost(shape: ModelShape, machine: Machine, traffic: Traffic, *, front: float, read: float = 0.0) -> Phase:
    """A question and its answer behind `front` tokens, of which `read` are prefilled for it. A step of decoding reads
    the weights once for the whole batch, and each user's own keys and values."""
    question, answer = traffic.question_tokens, traffic.answer_tokens
    prefill = shape.forward_flops(read, predicted=0) + shape.forward_flops(question, front, predicted=1)
    flops, step = decoding_step(
        shape, machine, rows=traffic.batch_size, context=front + question + answer / 2
    )  # fmt: skip
    # Computing waits for memory only while decoding.
    return Phase(
        prefill + answer * flops / traffic.batch_size, machine.seconds(prefill) + answer * step / traffic.batch_size
    )


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

    def cost(name: str, front: int, read: float, made: Phase, held: float) -> Cost:
        served = question_cost(shape, machine, traffic, front=front, read=read)
        return Cost(name, made.flops, made.seconds, served.flops, served.seconds, held)

    start = Phase.computing(shape.forward_flops(text_tokens, predicted=0), machine)
    cartridge = sum(making_phases(shape, machine, making, num_tokens).values(), start)
    lora = sum(making_phases(shape, machine, making, 0).values(), Phase())
    nothing, text = Phase(), shape.kv_bytes(text_tokens)
    missed, passages = (1 - traffic.hit_rate) * text_tokens, traffic.passage_tokens
    return [
        cost("cartridge", num_tokens, 0.0, cartridge, shape.kv_bytes(num_tokens)),
        cost("text in context", text_tokens, text_tokens, nothing, text),
        cost(f"text, prefix cache {traffic.hit_rate:.0%} hit", text_tokens, missed, nothing, text),
        cost("retrieval", passages, passages, nothing, shape.kv_bytes(passages)),
        cost("LoRA of equal bytes", 0, 0.0, lora, shape.kv_bytes(num_tokens)),
    ]


@torch.no_grad()
def measure_machine(
    model: Any, *, tokens: int = 512, steps: int = 8, clock: Callable[[], float] = wall_clock
) -> Machine:
    """FLOPs per second of a prefill, and bytes per second of decoding one row, with a model on its device."""
    shape = ModelShape.of(model.config, dtype_bytes=next(model.parameters()).element_size())
    ids = torch.arange(10, 10 + tokens, device=model.device)[None] % model.config.get_text_config().vocab_size
    prefill = seconds_of(lambda: model(input_ids=ids, use_cache=False, logits_to_keep=1), clock=clock)

    def decode() -> None:
        cache = None
        for _ in range(steps):
            cache = model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True).past_key_values

    step = seconds_of(decode, clock=clock) / steps
    return Machine(
        shape.forward_flops(tokens, predicted=1) / prefill, shape.weight_bytes / step, "this machine, measured"
    )
