"""What a whole project takes, from a corpus to a cartridge: disk, memory and time, by arithmetic.

Times are of an ideal machine at a stated utilization: matrix products at so much of the device's peak (writing's decoding
at so much of its memory bandwidth). Real runs add starts, I/O and stragglers; measure a small one before you trust them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..model_cost import LLAMA_8B, Machine, ModelShape
from .estimate import SynthesisEstimate, estimate_run, format_bytes
from .making_cost import prefilling, scoring, training, writing
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
    model: ModelShape = LLAMA_8B,
    machine: Machine | None = None,
    rows: int = 256,
    train_batch_size: int = 32,
    epochs: float = 1.0,
) -> ScaleEstimate:
    """The estimate of a project.

    Args:
        args: Settings of the synthesis.
        corpus_tokens: Length of the corpus.
        num_tokens: Length of the cartridge.
        model: By default Llama 3.1 8B.
        machine: By default eight H100s.
        rows: Conversations that a device decodes together.
        train_batch_size: Conversations in a training step, all devices together.
        epochs: How often each conversation is learned.

    Raises:
        ValueError: a number is below 1.
    """
    machine = machine or Machine.of("h100", devices=8)
    for name, value in (("corpus_tokens", corpus_tokens), ("num_tokens", num_tokens), ("rows", rows)):
        if value < 1:
            raise ValueError(f"`{name}` must be at least 1, got {value}.")
    run = estimate_run(args, {"corpus": corpus_tokens}, hidden_size=model.hidden_size)
    chunk = run.prefill_tokens / run.chunks
    # A row: question, answer, and what the template puts between; the student sees no chunk.
    dialogues = run.conversations - run.recitations
    asked = dialogues * args.num_rounds * args.max_question_tokens
    row = (asked + run.learned_tokens) / run.conversations + _TEMPLATE_TOKENS
    text = run.conversations * (chunk * _CHARACTERS + row * (_CHARACTERS + _ROW_BYTES))
    cartridge = num_tokens * model.kv_values_per_token

    read = prefilling(model, machine, chunks=run.chunks, chunk_tokens=chunk)
    written = writing(
        model, machine, tokens=run.generated_tokens, rows=rows, chunk_tokens=chunk, turns=row / 2
    )  # fmt: skip
    scored = scoring(model, machine, conversations=run.conversations, row_tokens=row, chunk_tokens=chunk)
    trained = training(
        model, machine, conversations=epochs * run.conversations, row_tokens=row,
        learned_tokens=run.learned_tokens / run.conversations, num_tokens=num_tokens,
    )  # fmt: skip
    seconds = {
        "writing: chunks are prefilled once": read.seconds,
        f"writing: {run.generated_tokens:,} tokens, {rows} rows on a device": written.seconds,
        "scoring: chunks are prefilled again, rows go through once": (read + scored).seconds,
        f"training: {epochs:g} epoch(s), {round(run.conversations * epochs / train_batch_size):,} steps": trained.seconds,
    }
    if args.teacher_targets == "live":
        # Each device prefills the chunks of its own rows anew in every step; grouped by chunk these are as few as can be.
        of_a_device = -(-train_batch_size // machine.devices)
        chunks_in_a_step = machine.devices * -(-of_a_device // args.conversations_per_chunk)
        again = epochs * run.conversations / train_batch_size * chunks_in_a_step
        teacher = prefilling(model, machine, chunks=again, chunk_tokens=chunk).seconds + epochs * scored.seconds
        seconds.pop("scoring: chunks are prefilled again, rows go through once")
        seconds["training: the teacher in the step, batches grouped by chunk"] = teacher
    per_device = train_batch_size / machine.devices
    memory = {
        "weights": model.weight_bytes,
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
    context, served = model.kv_bytes(corpus_tokens), model.kv_bytes(num_tokens)
    notes = [
        f"The corpus itself in context: {format_bytes(context)} of keys and values for each user; the cartridge: "
        f"{format_bytes(served)}, {context / served:,.0f} times less."
    ]
    if run.target_bytes:
        rate = run.target_bytes * epochs / trained.seconds
        notes.append(
            f"Training reads {format_bytes(rate)} of targets a second, {format_bytes(rate / machine.devices)} a device."
        )
    if (needed := sum(memory.values())) > machine.memory:
        notes.append(
            f"This does not fit: a device has {format_bytes(machine.memory)}, training needs {format_bytes(needed)}. Split "
            "the model over devices, use gradient checkpointing, or smaller batches."
        )
    held = model.kv_bytes(chunk + row)
    if (needed := model.weight_bytes + rows * held) > machine.memory:
        fit = int(max(machine.memory - model.weight_bytes, 0) // held)
        notes.append(
            f"{rows} rows do not fit beside the weights while writing: {fit} do (fewer share a chunk's cache less)."
        )
    return ScaleEstimate(run, disk, memory, {name: value / 60 for name, value in seconds.items()}, tuple(notes))
