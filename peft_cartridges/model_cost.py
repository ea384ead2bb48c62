"""What a forward pass of a model costs on a machine: FLOPs, bytes, and seconds by the roofline, from the model's
configuration, without its weights."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import Any

import torch

# Dense bfloat16 FLOPs per second, bytes per second and bytes of memory, from the vendor's data sheets.
DEVICES: dict[str, tuple[float, float, float]] = {
    "h200": (989e12, 4.8e12, 141e9),
    "h100": (989e12, 3.35e12, 80e9),
    "a100": (312e12, 2.04e12, 80e9),
    "l4": (121e12, 0.3e12, 24e9),
}


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides its costs. `ModelShape.of` reads it from a configuration.

    Args:
        parameters: That a token is multiplied with (of experts, those that are active; embeddings that are looked up are
            none, the output head is).
        head_parameters: Of the output head, which is among them.
        attention_width: Query heads times head width, summed over the layers that attend.
        kv_values_per_token: Numbers that a token leaves in the cache.
        weight_bytes: Of all weights, in `dtype_bytes` each.
        dtype_bytes: Of a number.
        hidden_size, num_layers: As in its configuration.
    """

    parameters: float
    attention_width: int
    kv_values_per_token: int
    weight_bytes: float
    dtype_bytes: int = 2
    head_parameters: float = 0
    hidden_size: int = 0
    num_layers: int = 0

    def forward_flops(self, tokens: float, context: float = 0.0, *, predicted: float | None = None) -> float:
        """Of `tokens` new ones behind `context` others: two for each parameter, and four for each number of a query and
        each token that it attends to (the scores' product and the values'). `predicted` is how many of them go through
        the output head; by default all."""
        body, head = self.parameters - self.head_parameters, self.head_parameters
        return 2.0 * (body * tokens + head * (tokens if predicted is None else predicted)) + self.attention_flops(
            tokens, context
        )

    def attention_flops(self, tokens: float, context: float = 0.0) -> float:
        """Of the two products of attention alone, each token attending to what stands before it and to itself."""
        return 4.0 * self.attention_width * tokens * (context + (tokens + 1) / 2)

    def kv_bytes(self, tokens: float) -> float:
        return float(self.kv_values_per_token * self.dtype_bytes * tokens)

    @classmethod
    def of(cls, config: Any, *, dtype_bytes: int = 2) -> ModelShape:
        """Of a transformers configuration; the weights are counted on PyTorch's meta device and never made."""
        from transformers import AutoModelForCausalLM

        text = config.get_text_config(decoder=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(text)
        embeddings, head = model.get_input_embeddings().weight, model.get_output_embeddings()
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
        head_parameters = 0 if head is None else head.weight.numel()
        if not layers or not heads:  # recurrent layers alone, whose memory does not grow with the text
            return cls(
                round(active), 0, 0, total * dtype_bytes, dtype_bytes, head_parameters, text.hidden_size,
                text.num_hidden_layers,
            )  # fmt: skip
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        if latent := getattr(text, "kv_lora_rank", None):
            per_layer = latent + text.qk_rope_head_dim
        else:
            per_layer = 2 * (getattr(text, "num_key_value_heads", None) or heads) * width
        keeping = layers - (getattr(text, "num_kv_shared_layers", None) or 0)
        return cls(
            round(active), layers * heads * width, keeping * per_layer, total * dtype_bytes, dtype_bytes,
            head_parameters, text.hidden_size, text.num_hidden_layers,
        )  # fmt: skip


# What `ModelShape.of` reads from its configuration: the largest model of arXiv 2506.06266.
LLAMA_8B = ModelShape(7_504_924_672, 32 * 32 * 128, 32 * 2 * 8 * 128, 2 * 8_030_261_248, 2, 128_256 * 4096, 4096, 32)


def _first(config: Any, *names: str) -> int | None:
    return next((value for name in names if (value := getattr(config, name, None))), None)


@functools.lru_cache(maxsize=8)
def _shape_of(kind: str, settings: str) -> ModelShape:
    from transformers import AutoConfig

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
        flops: Per second that one device reaches in large matrix products.
        bandwidth: Bytes per second that it reads from its memory.
        name: In tables.
        devices: How many; each holds a copy of the model, and work is shared out among them.
        memory: Bytes of one.

    Raises:
        ValueError: one of them is not positive.
    """

    flops: float
    bandwidth: float
    name: str = "this machine"
    devices: int = 1
    memory: float = float("inf")

    def __post_init__(self) -> None:
        for name in ("flops", "bandwidth", "devices", "memory"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be positive, got {getattr(self, name)}.")

    @classmethod
    def of(cls, name: str, *, utilization: float = 0.4, devices: int = 1) -> Machine:
        """One of `DEVICES`, at a share of its peaks.

        Raises:
            ValueError: it is unknown, or the share is not above 0 and at most 1.
        """
        if name not in DEVICES:
            raise ValueError(f"The machine {name!r} is unknown; there are: {', '.join(DEVICES)}.")
        if not 0 < utilization <= 1:
            raise ValueError(f"`utilization` must be above 0 and at most 1, got {utilization}.")
        flops, bandwidth, memory = DEVICES[name]
        told = f"{devices} × {name}" if devices > 1 else name
        return cls(
            flops * utilization, bandwidth * utilization, f"{told} at {utilization:.0%} of its peaks", devices, memory
        )

    def seconds(self, flops: float, num_bytes: float = 0.0) -> float:
        """Of one device: the longer of computing and reading (the roofline model, doi 10.1145/1498765.1498785)."""
        return max(flops / self.flops, num_bytes / self.bandwidth)


def decoding_step(
    shape: ModelShape, machine: Machine, *, rows: float, context: float, shared: bool = False
) -> tuple[float, float]:
    """FLOPs and seconds of one token for each of `rows` rows on one device: the weights are read once, keys and values
    once for each row, or once in all where the rows share their context."""
    flops = rows * shape.forward_flops(1, context)
    read = shape.weight_bytes + (1 if shared else rows) * shape.kv_bytes(context)
    return flops, machine.seconds(flops, read)
