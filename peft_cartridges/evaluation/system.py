"""What stands in front of a question: nothing, a text, passages, a cartridge, other weights. All metrics read through it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from peft import PeftModel
from torch import Tensor, nn

from ..attention import shared_prefix
from ..chat import ChatCodec
from ..kv_prefix import KVPrefix
from ..tuner.model import CartridgeModel

Attach = Callable[[], AbstractContextManager[nn.Module]]


class Engine(Protocol):
    """Another process that reads rows behind what it holds, where this one cannot."""

    def states(self, rows: Sequence[list[int]], lengths: Sequence[int]) -> list[Tensor]: ...

    def generate(self, rows: Sequence[list[int]], max_new_tokens: int, ends: Collection[int]) -> list[list[int]]: ...


class NotApplicable(ValueError):
    """A method cannot be measured here; the message is the reason that stands in the table."""


@dataclass
class System:
    """One way to answer questions about a text.

    Args:
        name: In tables.
        model: The model or PEFT model under it, whose output head turns hidden states into distributions.
        codec: How texts and conversations become its token ids.
        attach: Gives the model with what stands in front, for as long as the context is open.
        preamble: Token ids between that and the turns: the chat template's own where nothing or a cartridge stands in
            front, none behind a text.
        per_question: Instead of `attach`: what stands in front of one question (retrieval).
        engine: Instead of both: a process that reads rows.
        num_tokens: Tokens in front; of retrieval, at most.
        kv_bytes: Bytes of keys and values (of LoRA: of weights) that a server holds for it.
        seconds: To make it, once.
        flops: To make it, once; `None` where that is not counted.
        tokens_to_read: Tokens that each new conversation reads first where nothing is cached.
        note: Of what it is, in the report.
    """

    name: str
    model: nn.Module
    codec: ChatCodec
    attach: Attach | None = None
    preamble: list[int] = field(default_factory=list)
    per_question: Callable[[str], AbstractContextManager[nn.Module]] | None = None
    engine: Engine | None = None
    num_tokens: int = 0
    kv_bytes: int = 0
    seconds: float = 0.0
    flops: float | None = None
    tokens_to_read: int = 0
    note: str = ""

    def parts(self, prompts: Sequence[str]) -> list[tuple[list[int], AbstractContextManager[nn.Module]]]:
        """Indices of `prompts` that share what stands in front of them, with the context that puts it there and gives the
        model. (A generator would open it for itself alone: `shared_prefix` holds for the code inside its `with`.)"""
        if self.per_question is not None:
            return [([index], self.per_question(prompt)) for index, prompt in enumerate(prompts)]
        if self.attach is None:
            raise ValueError(f"The system {self.name!r} has no model in this process.")
        return [(list(range(len(prompts))), self.attach())]


@contextlib.contextmanager
def bare(model: nn.Module) -> Iterator[nn.Module]:
    """The transformers model with no adapter active, whether `model` is one or a PEFT model around one."""
    if isinstance(model, PeftModel):
        with model.disable_adapter():
            yield model.get_base_model()
    else:
        yield model


def bare_system(model: nn.Module, codec: ChatCodec, name: str = "no context") -> System:
    """The model that has read nothing."""
    return System(name, model, codec, lambda: bare(model), codec.preamble)


def prefix_system(name: str, model: nn.Module, codec: ChatCodec, prefix: KVPrefix, **facts: Any) -> System:
    """The bare model behind keys and values; no preamble, as behind a document. `facts`: other fields of `System`."""
    facts = {"num_tokens": prefix.num_tokens, "kv_bytes": prefix.nbytes, **facts}
    return System(name, model, codec, lambda: behind(model, prefix), **facts)


@contextlib.contextmanager
def behind(model: nn.Module, prefix: KVPrefix) -> Iterator[nn.Module]:
    with bare(model) as base, shared_prefix(base, prefix):
        yield base


def cartridge_system(model: PeftModel, processing_class: Any, name: str = "cartridge", **facts: Any) -> System:
    """A PEFT model with its active cartridge, as users call it.

    Raises:
        ValueError: `model` has no active cartridge.
    """
    tuner: Any = getattr(model, "base_model", None)
    if not isinstance(tuner, CartridgeModel):
        raise ValueError(f"`model` is a {type(model).__name__} without a cartridge: load one with `load_cartridge`.")
    prefixes = [tuner.get_kv_prefix(adapter) for adapter in tuner.active_adapters]
    sizes = {"num_tokens": sum(map(len, prefixes)), "kv_bytes": sum(prefix.nbytes for prefix in prefixes)}
    facts = {**sizes, **facts}
    codec = ChatCodec.of(model, processing_class)
    return System(name, model, codec, lambda: contextlib.nullcontext(model), codec.preamble, **facts)
