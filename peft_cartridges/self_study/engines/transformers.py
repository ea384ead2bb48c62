"""Generation in process, by the model that is trained: all rows share one copy of the context."""

from __future__ import annotations

import contextlib
import threading
from collections import Counter, OrderedDict, deque
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
# Contexts that rows decoded together may have: their prefixes are all in memory.
_MOST_CONTEXTS = 8


class ContextPrefixes:
    """The prefixes of the contexts that are held, and of the `size` that were used last beside them: a chunk is asked,
    answered, asked again and scored in turn."""

    def __init__(self, model: Any, size: int = 2) -> None:
        self.model, self.size = model, size
        self._kept: OrderedDict[tuple[int, ...], KVPrefix] = OrderedDict()
        self._held: Counter[tuple[int, ...]] = Counter()

    def get(self, context: tuple[int, ...]) -> KVPrefix:
        """The prefix of some token ids, by one prefill if it is not there."""
        if context not in self._kept:
            free = [one for one in self._kept if one not in self._held]
            for one in free[: max(0, len(free) + 1 - self.size)]:
                del self._kept[one]
            self._kept[context] = KVPrefix.from_input_ids(self.model, context)
        self._kept.move_to_end(context)
        return self._kept[context]

    def hold(self, context: tuple[int, ...]) -> KVPrefix | None:
        """The prefix, which is kept until it was released as often; `None` of no context."""
        if not context:
            return None
        self._held[context] += 1
        return self.get(context)

    def release(self, context: tuple[int, ...]) -> None:
        self._held -= Counter([context])

    def behind(self, context: tuple[int, ...]) -> contextlib.AbstractContextManager[Any]:
        """The model with the context in front of every row; without one where it is empty."""
        return shared_prefix(self.model, self.get(context)) if context else contextlib.nullcontext()

    def clear(self) -> None:
        self._kept.clear()
        self._held.clear()


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
    """A transformers causal LM. Rows behind several contexts are decoded together, those behind the same one sharing it;
    where batches run by `model.generate` (see `refill`), all rows under way have one context.

    Args:
        model: The causal LM, or a PEFT model around one (its adapter is disabled meanwhile).
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        batch_size: Rows decoded together.
        refill: Whether a finished row's place is taken by the next prompt (`SlotDecoder`); otherwise, and where the
            model's attention implementation has no mask per row or layers are recurrent, batches run by `model.generate`
            to their longest row.
        prefixes: Shared with whoever scores with the same model.
    """

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
        self.max_contexts = _MOST_CONTEXTS if in_slots else 1
        self._waiting: deque[Request] = deque()  # where batches run by `generate`
        self._under_way: set[Request] = set()
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
                self._end(list(self._under_way))
                self._waiting.clear()
                if self._slots is not None:
                    self._slots.clear()

    def room(self) -> int:
        return self.batch_size - len(self._under_way)

    @property
    def works_here(self) -> bool:
        return bool(self._under_way)

    def begin(self, requests: Sequence[Request]) -> None:
        for request in requests:
            prefix = self.prefixes.hold(request.context)
            self._under_way.add(request)
            if self._slots is not None:
                settings = (request.max_new_tokens, request.temperature, request.seed)
                self._slots.begin(request, request.prompt, *settings, prefix)
        if self._slots is None:
            if requests and self._behind is None:
                self._behind = contextlib.ExitStack()
                self._behind.enter_context(self.prefixes.behind(requests[0].context))
            self._waiting += requests

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
        self._end([outcome.request for outcome in outcomes])
        return outcomes

    def _end(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._under_way.discard(request)
            self.prefixes.release(request.context)
        if not self._under_way and self._behind is not None:
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
