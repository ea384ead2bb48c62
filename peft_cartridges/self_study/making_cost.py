"""What a self-study costs, phase by phase: prefilling chunks, writing, scoring, training. FLOPs and seconds."""

from __future__ import annotations

from dataclasses import dataclass

from ..model_cost import Machine, ModelShape, decoding_step


@dataclass(frozen=True)
class Phase:
    """FLOPs, and seconds on all devices together."""

    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Phase) -> Phase:
        return Phase(self.flops + other.flops, self.seconds + other.seconds)

    @classmethod
    def computing(cls, flops: float, machine: Machine) -> Phase:
        """Large matrix products."""
        return cls(flops, machine.seconds(flops) / machine.devices)


@dataclass(frozen=True)
class Making:
    """A self-study.

    Args:
        conversations: How many.
        question_tokens, answer_tokens: Of each, with what the chat template puts around them.
        generated_share: Of the conversations, those that a model writes; recitations are not.
        chunk_tokens: In the teacher's context.
        conversations_per_chunk: That share one prefill of it.
        epochs: Passes over the conversations.
        batch_size: Conversations that a device decodes together.

    Raises:
        ValueError: a number is negative, or a batch is empty.
    """

    conversations: int = 512
    question_tokens: float = 40
    answer_tokens: float = 80
    generated_share: float = 0.5
    chunk_tokens: float = 768
    conversations_per_chunk: int = 16
    epochs: float = 3.0
    batch_size: int = 16

    def __post_init__(self) -> None:
        for name in ("conversations", "question_tokens", "answer_tokens", "generated_share", "chunk_tokens", "epochs"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` must not be negative, got {getattr(self, name)}.")
        if self.conversations_per_chunk < 1 or self.batch_size < 1:
            raise ValueError("`conversations_per_chunk` and `batch_size` must be at least 1.")


def prefilling(shape: ModelShape, machine: Machine, *, chunks: float, chunk_tokens: float) -> Phase:
    """Chunks are read once."""
    return Phase.computing(chunks * shape.forward_flops(chunk_tokens, predicted=0), machine)


def writing(
    shape: ModelShape, machine: Machine, *, tokens: float, rows: float, chunk_tokens: float, turns: float
) -> Phase:
    """Decoding `tokens` tokens in all, `rows` rows on a device behind one copy of their chunk each, `turns` tokens into
    the conversation on the average."""
    flops, seconds = decoding_step(shape, machine, rows=rows, context=chunk_tokens + turns)
    steps = tokens / max(rows, 1)
    return Phase(steps * flops, steps * seconds / machine.devices)


def scoring(
    shape: ModelShape, machine: Machine, *, conversations: float, row_tokens: float, chunk_tokens: float
) -> Phase:
    """Each conversation goes through the model once behind its chunk; of its final states none needs the head."""
    return Phase.computing(conversations * shape.forward_flops(row_tokens, chunk_tokens, predicted=0), machine)


def training(
    shape: ModelShape,
    machine: Machine,
    *,
    conversations: float,
    row_tokens: float,
    learned_tokens: float,
    num_tokens: float,
) -> Phase:
    """A forward and a backward of each conversation behind the cartridge (`conversations` counts each as often as it is
    learned). Weights are frozen: backward computes gradients of activations alone, as much again for the layers and
    twice as much for attention (of queries, keys and values, and of the weights between). The head turns learned tokens
    alone into distributions, the student's and the teacher's, and gives one gradient."""
    body = 2 * shape.forward_flops(row_tokens, num_tokens, predicted=0) + shape.attention_flops(row_tokens, num_tokens)
    head = 3 * 2 * shape.head_parameters * learned_tokens
    return Phase.computing(conversations * (body + head), machine)


def making_phases(shape: ModelShape, machine: Machine, making: Making, num_tokens: int) -> dict[str, Phase]:
    """`prefill`, `writing`, `scoring` and `training` of a cartridge of `num_tokens` tokens (0: of weights instead)."""
    row = making.question_tokens + making.answer_tokens
    chunks = -(-making.conversations // making.conversations_per_chunk)
    dialogues = making.conversations * making.generated_share
    return {
        "prefill": prefilling(shape, machine, chunks=chunks, chunk_tokens=making.chunk_tokens),
        "writing": writing(
            shape, machine, tokens=row * dialogues, rows=making.batch_size, chunk_tokens=making.chunk_tokens, turns=row / 2
        ),
        "scoring": scoring(
            shape, machine, conversations=making.conversations, row_tokens=row, chunk_tokens=making.chunk_tokens
        ),
        "training": training(
            shape, machine, conversations=making.epochs * making.conversations, row_tokens=row,
            learned_tokens=making.answer_tokens, num_tokens=num_tokens,
        ),
    }  # fmt: skip
