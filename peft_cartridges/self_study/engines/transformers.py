"""Generation in process, by the model that is trained: all rows share one copy of the context."""

from __future__ import annotations

import contextlib
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from peft import PeftModel

from ...attention import shared_prefix
from ...chat import ChatCodec
from ...kv_prefix import KVPrefix
from ...model_identity import model_fingerprint
from .engine import Engine, Generation, Outcome, Request
from .slots import SlotDecoder, can_decode_in_slots

# Decoding goes on for so many steps before other engines are looked after.
_STEPS = 16


class ContextPrefixes:
    """The prefixes of the contexts that were used last: a chunk is asked, answered, asked again and scored in turn."""

    def __init__(self, model: Any, size: int = 2) -> None:
        self.model, self.size = model, size
        self._kept: OrderedDict[tuple[int, ...], KVPrefix] = OrderedDict()

    def get(self, context: tuple[int, ...]) -> KVPrefix:
        """The prefix of some token ids, by one prefill if it is not there."""
        if context not in self._kept:
            while len(self._kept) >= self.size:
                self._kept.popitem(last=False)
            self._kept[context] = KVPrefix.from_input_ids(self.model, context)
        self._kept.move_to_end(context)
        return self._kept[context]

    def behind(self, context: tuple[int, ...]) -> contextlib.AbstractContextManager[Any]:
        """The model with the context in front of every row; without one where it is empty."""
        return shared_prefix(self.model, self.get(context)) if context else contextlib.nullcontext()

    def clear(self) -> None:
        self._kept.clear()


@contextlib.contextmanager
def bare(model: Any) -> Iterator[None]:
    """The model without its adapter and in evaluation mode."""
    training = model.training
    model.eval()
    disabled = model.disable_adapter() if isinstance(model, PeftModel) else contextlib.nullcontext()
    try:
        with disabled:
            yield
    finally:
        model.train(training)


class TransformersEngine(Engine):
    """A transformers causal LM.

    Args:
        model: The causal LM, or a PEFT model around one (its adapter is disabled meanwhile).
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        batch_size: Rows decoded together.
        refill: Whether a finished row's place is taken by the next prompt (`SlotDecoder`); otherwise, and where the
            model's attention implementation has no mask per row, batches run by `model.generate` to their longest row.
        prefixes: Shared with whoever scores with the same model.
    """

    one_context = True

    def __init__(
        self,
        model: Any,
        processing_class: Any,
        *,
        batch_size: int = 64,
        refill: bool = True,
        prefixes: ContextPrefixes | None = None,
    ) -> None:
        self.model = model
        self.batch_size = batch_size
        self.prefixes = prefixes or ContextPrefixes(model)
        codec = ChatCodec.of(model, processing_class)
        self.end_ids = codec.end_ids
        pad = codec.tokenizer.pad_token_id
        self._pad = min(self.end_ids) if pad is None else pad
        config = model.config.get_text_config(decoder=True)
        self.max_length = getattr(config, "max_position_embeddings", None)
        self.model_name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)
        in_slots = refill and can_decode_in_slots(model)
        self._slots = SlotDecoder(model, self.end_ids, slots=batch_size) if in_slots else None
        self._waiting: deque[Request] = deque()  # where batches run by `generate`
        self._under_way = 0
        self._behind: contextlib.ExitStack | None = None

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        """See `model_fingerprint`."""
        return model_fingerprint(self.model)

    @contextlib.contextmanager
    def running(self, wake: threading.Event) -> Iterator[None]:
        with bare(self.model):
            try:
                yield
            finally:
                self._leave()
                self._waiting.clear()
                self._under_way = 0
                if self._slots is not None:
                    self._slots.clear()

    def room(self) -> int:
        return self.batch_size - self._under_way

    @property
    def works_here(self) -> bool:
        return self._under_way > 0

    def begin(self, requests: Sequence[Request]) -> None:
        if requests and self._behind is None:
            self._behind = contextlib.ExitStack()
            self._behind.enter_context(self.prefixes.behind(requests[0].context))
        self._under_way += len(requests)
        if self._slots is None:
            self._waiting += requests
            return
        for request in requests:
            self._slots.begin(request, request.prompt, request.max_new_tokens, request.temperature, request.seed)

    def step(self) -> list[Outcome]:
        if not self._under_way:
            return []
        outcomes: list[Outcome] = []
        if self._slots is None:
            outcomes = self._run_batch()
        else:
            for _ in range(_STEPS):
                outcomes = [Outcome(request, Generation(tokens)) for request, tokens in self._slots.step()]
                if outcomes:
                    break
        self._under_way -= len(outcomes)
        if not self._under_way:
            self._leave()
        return outcomes

    def _leave(self) -> None:
        if self._behind is not None:
            self._behind.close()
            self._behind = None

    @torch.no_grad()
    def _run_batch(self) -> list[Outcome]:
        """A batch of one kind, prompts of like length together: less padding."""
        kind = (self._waiting[0].max_new_tokens, self._waiting[0].temperature)
        same = [one for one in self._waiting if (one.max_new_tokens, one.temperature) == kind]
        batch = sorted(same, key=lambda one: len(one.prompt))[: self.batch_size]
        self._waiting = deque(one for one in self._waiting if one not in batch)
        width = max(len(one.prompt) for one in batch)
        device = self.model.get_input_embeddings().weight.device
        ids = [[self._pad] * (width - len(one.prompt)) + list(one.prompt) for one in batch]
        mask = [[0] * (width - len(one.prompt)) + [1] * len(one.prompt) for one in batch]
        max_new_tokens, temperature = kind
        sampling: dict[str, Any] = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        torch.manual_seed(batch[0].seed)
        output = self.model.generate(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            max_new_tokens=max_new_tokens,
            pad_token_id=self._pad,
            eos_token_id=sorted(self.end_ids),
            **sampling,
        )
        rows = [_cut(row[width:].tolist(), self.end_ids) for row in output]
        return [Outcome(request, Generation(row)) for request, row in zip(batch, rows, strict=True)]


def _cut(tokens: list[int], ends: Set[int]) -> list[int]:
    return next((tokens[: place + 1] for place, token in enumerate(tokens) if token in ends), tokens)
