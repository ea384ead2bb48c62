"""What a whole project takes, from a corpus to a cartridge: disk, memory and time, by arithmetic.

Times are of an ideal machine at a stated utilization: matrix products at so much of the device's peak (writing's decoding
at so much of its memory bandwidth). Real runs add starts, I/O and stragglers; measure a small one before you trust them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .estimate import SynthesisEstimate, estimate_run, format_bytes
from .synthesis_config import SynthesisConfig

# float32 numbers, their gradients and Adam's two averages.
_TRAINING_BYTES = 16
# Characters of a token, English text; what a row has besides (ids, masks, messages) in bytes of a token.
_CHARACTERS, _ROW_BYTES = 4.5, 12
# What a chat template puts around a question and its answer.
_TEMPLATE_TOKENS = 24
# Activations of a layer that backward needs, bytes a token and hidden unit in bfloat16 with attention that keeps no
# scores (the accounting of arXiv 2205.05198, without its dropout masks and scores).
_ACTIVATION_BYTES = 30


@dataclass(frozen=True)
class ModelShape:
    """What of a model decides sizes and times. The defaults are those of Llama 3.1 8B, the largest in the paper.

    Args:
        parameters: Numbers in its weights.
        hidden_size, num_layers, num_attention_heads, num_key_value_heads, head_dim: As in its configuration.
        weight_bytes: Of a number of its weights and of its cache.
    """

    parameters: float = 8.03e9
    hidden_size: int = 4096
    num_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    weight_bytes: int = 2

    @classmethod
    def of(cls, config: Any, parameters: float) -> ModelShape:
        """Of a transformers configuration."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        return cls(
            parameters=parameters,
            hidden_size=text.hidden_size,
            num_layers=text.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        )

    @property
    def numbers_per_token(self) -> int:
        """Of keys and values."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim

    def forward_flops(self, tokens: float, seen: float) -> float:
        """Of a forward of some tokens that each see `seen` others: twice the weights, and the attention's two products."""
        attention = 4 * self.num_layers * self.num_attention_heads * self.head_dim * seen
        return tokens * (2 * self.parameters + attention)


@dataclass(frozen=True)
class Hardware:
    """The devices. The defaults are NVIDIA's figures for an H100 SXM: dense bfloat16, and HBM3.

    Args:
        devices: How many; each holds a copy of the model.
        flops: Peak of one, per second.
        bandwidth: Of its memory, bytes per second.
        memory: Bytes.
        utilization: Share of either that is reached.
        rows: Conversations that a device decodes together.
    """

    devices: int = 8
    flops: float = 989e12
    bandwidth: float = 3.35e12
    memory: float = 80e9
    utilization: float = 0.4
    rows: int = 256


@dataclass(frozen=True)
class ScaleEstimate:
    """What a project takes.

    Args:
        synthesis: Sizes of the conversation set.
        disk: Bytes by what takes them.
        memory: Bytes of a device by what takes them, while training.
        minutes: By what takes them, on all devices together.
        notes: What does not fit, in words.
    """

    synthesis: SynthesisEstimate
    disk: dict[str, float]
    memory: dict[str, float]
    minutes: dict[str, float]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [str(self.synthesis)]
        for title, values, show in (
            ("Disk", self.disk, format_bytes),
            ("Memory of a device while training", self.memory, format_bytes),
            ("Minutes", self.minutes, lambda value: f"{value:,.1f}"),
        ):
            lines += ["", title, *(f"  {name:<62}{show(value):>10}" for name, value in values.items())]
        return "\n".join([*lines, *("" for _ in self.notes[:1]), *self.notes])


def estimate_scale(
    args: SynthesisConfig,
    *,
    corpus_tokens: int,
    num_tokens: int,
    model: ModelShape | None = None,
    hardware: Hardware | None = None,
    train_batch_size: int = 32,
    epochs: float = 1.0,
) -> ScaleEstimate:
    """The estimate of a project.

    Args:
        args: Settings of the synthesis.
        corpus_tokens: Length of the corpus.
        num_tokens: Length of the cartridge.
        model, hardware: By default Llama 3.1 8B on eight H100s.
        train_batch_size: Conversations in a training step, all devices together.
        epochs: How often each conversation is learned.

    Raises:
        ValueError: a number is below 1.
    """
    model, machine = model or ModelShape(), hardware or Hardware()
    for name, value in (("corpus_tokens", corpus_tokens), ("num_tokens", num_tokens), ("devices", machine.devices)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    run = estimate_run(args, {"corpus": corpus_tokens}, hidden_size=model.hidden_size)
    chunk = run.prefill_tokens / run.chunks
    # A row: question, answer, and what the template puts between; the student sees no chunk.
    dialogues = run.conversations - run.recitations
    asked = dialogues * args.num_rounds * args.max_question_tokens
    row = (asked + run.learned_tokens) / run.conversations + _TEMPLATE_TOKENS
    tokens = run.conversations * row
    speed = machine.devices * machine.flops * machine.utilization
    text = run.conversations * (chunk * _CHARACTERS + row * (_CHARACTERS + _ROW_BYTES))
    cartridge = num_tokens * model.numbers_per_token
    weights = model.parameters * model.weight_bytes

    prefill = model.forward_flops(run.prefill_tokens, chunk / 2) / speed
    # A step of decoding reads the weights once for all rows, and each row's chunk and turns.
    cache = (chunk + row) * model.numbers_per_token * model.weight_bytes
    step = (weights + machine.rows * cache) / (machine.bandwidth * machine.utilization)
    writing = run.generated_tokens / (machine.rows * machine.devices) * step
    scoring = model.forward_flops(tokens, chunk + row) / speed
    # Weights are frozen: backward computes gradients of activations alone, which costs a forward (attention: two).
    training = 2 * epochs * model.forward_flops(tokens, 1.5 * (num_tokens + row)) / speed
    seconds = {
        "writing: chunks are prefilled once": prefill,
        f"writing: {run.generated_tokens:,} tokens, {machine.rows} rows on a device": writing,
        "scoring: chunks are prefilled again, rows go through once": prefill + scoring,
        f"training: {epochs:g} epoch(s), {round(run.conversations * epochs / train_batch_size):,} steps": training,
    }
    if args.teacher_targets == "live":
        # Each device prefills the chunks of its own rows anew in every step; grouped by chunk these are as few as can be.
        of_a_device = -(-train_batch_size // machine.devices)
        chunks_in_a_step = machine.devices * -(-of_a_device // args.conversations_per_chunk)
        again = epochs * run.conversations / train_batch_size * chunks_in_a_step
        teacher = (model.forward_flops(again * chunk, chunk / 2) + epochs * scoring * speed) / speed
        seconds.pop("scoring: chunks are prefilled again, rows go through once")
        seconds["training: the teacher in the step, batches grouped by chunk"] = teacher
    per_device = train_batch_size / machine.devices
    memory = {
        "weights": weights,
        "cartridge, its gradient, Adam (float32)": cartridge * _TRAINING_BYTES,
        f"activations of {per_device:g} rows of {row:,.0f} tokens (no checkpointing)": per_device
        * row
        * model.num_layers
        * model.hidden_size
        * _ACTIVATION_BYTES,
    }
    copies = 1 if args.teacher_targets == "live" else 2  # as written, and with the targets
    disk = {
        f"teacher's targets ({args.teacher_targets})": float(run.target_bytes),
        "texts, token ids, contexts": text * copies,
        "cartridge, as it is saved (float32)": cartridge * 4.0,
    }
    context = corpus_tokens * model.numbers_per_token * model.weight_bytes
    notes = [
        f"The corpus itself in context: {format_bytes(context)} of keys and values for each user; the cartridge: "
        f"{format_bytes(cartridge * model.weight_bytes)}, {context / (cartridge * model.weight_bytes):,.0f} times less."
    ]
    if run.target_bytes:
        rate = run.target_bytes * epochs / training
        notes.append(
            f"Training reads {format_bytes(rate)} of targets a second, {format_bytes(rate / machine.devices)} a device."
        )
    if (needed := sum(memory.values())) > machine.memory:
        notes.append(
            f"This does not fit: a device has {format_bytes(machine.memory)}, training needs {format_bytes(needed)}. Split "
            "the model over devices, use gradient checkpointing, or smaller batches."
        )
    if (needed := weights + machine.rows * cache) > machine.memory:
        fit = int(max(machine.memory - weights, 0) // cache)
        notes.append(
            f"{machine.rows} rows do not fit beside the weights while writing: {fit} do (fewer share a chunk's cache less)."
        )
    return ScaleEstimate(run, disk, memory, {name: value / 60 for name, value in seconds.items()}, tuple(notes))
