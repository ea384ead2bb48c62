"""Generation in process, by the model that is trained: all rows share one copy of the context."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence, Set
from typing import Any

import torch
from peft import PeftModel

from ...attention import shared_prefix
from ...attention.layers import get_text_config
from ...chat import ChatCodec
from ...hidden_states import OutputHead, predicting_states
from ...kv_prefix import KVPrefix
from ..teacher_targets import HiddenStates, Targets, TopK, top_k_divergence, top_k_of_logits
from .base import Generation
from .slot_decoding import SlotDecoder, can_decode_in_slots

# Positions whose logits exist at a time.
_POSITIONS = 512
# At least so many numbers of a weight take part in the fingerprint, if it has them.
_SIGNS = 4096


class TransformersBackend:
    """A transformers causal LM as teacher.

    Args:
        model: The causal LM, or a PEFT model around one (its adapter is disabled meanwhile).
        processing_class: Its tokenizer or processor, or a `ChatCodec` with it.
        batch_size: Rows decoded together.
        refill: Whether a finished row's place is taken by the next prompt (`SlotDecoder`); otherwise, and where the
            model's attention implementation has no mask per row, batches run by `model.generate` to their longest row.
    """

    target_kinds: tuple[str, ...] = ("hidden_states", "top_k")

    def __init__(self, model: Any, processing_class: Any, *, batch_size: int = 64, refill: bool = True) -> None:
        self.model = model
        self.batch_size = batch_size
        self.refill = refill
        codec = ChatCodec.of(model, processing_class)
        self.end_ids: Set[int] = codec.end_ids
        pad = codec.tokenizer.pad_token_id
        self.pad_id = min(self.end_ids) if pad is None else pad
        self.max_length: int | None = getattr(get_text_config(model), "max_position_embeddings", None)
        self._last: tuple[tuple[int, ...], KVPrefix] | None = None  # a chunk is often asked about again
        self.model_name = str(getattr(model.config, "_name_or_path", "") or type(model).__name__)

    @property
    def fingerprint(self) -> str:
        """A hash over the base model's shapes and the signs of some thousand numbers of every weight. It is the same in
        every dtype, since rounding keeps a number's sign, also of what it rounds to zero; digits would differ where one
        dtype was rounded to by way of another. Training, even a little, turns the signs of numbers near zero."""
        model = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        digest = hashlib.sha256()
        for name, parameter in model.state_dict().items():
            if "kv_prefix_" in name or "lora_" in name or parameter.device.type == "meta":
                continue
            step = parameter.numel() // _SIGNS | 1  # odd: not down one column of a matrix
            sample = parameter.detach().reshape(-1)[::step]
            if parameter.is_floating_point():
                sample = sample.float().signbit()
            digest.update(str(tuple(parameter.shape)).encode() + sample.cpu().numpy().tobytes())
        return digest.hexdigest()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """The model without its adapter and in evaluation mode."""
        training = self.model.training
        self.model.eval()
        disabled = self.model.disable_adapter() if isinstance(self.model, PeftModel) else contextlib.nullcontext()
        try:
            with disabled:
                yield
        finally:
            self._last = None
            self.model.train(training)

    @contextlib.contextmanager
    def in_context(self, context_ids: Sequence[int]) -> Iterator[TransformersBackend]:
        """Prefills the context once; meanwhile this back end stands behind it."""
        if not len(context_ids):
            yield self
            return
        key = tuple(context_ids)
        if self._last is None or self._last[0] != key:
            self._last = (key, KVPrefix.from_input_ids(self.model, context_ids))
        with shared_prefix(self.model, self._last[1]):
            yield self

    def generate(
        self, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, temperature: float, seeds: Sequence[int]
    ) -> list[Generation]:
        """As `ContextSession.generate`."""
        if self.refill and can_decode_in_slots(self.model):
            decoder = SlotDecoder(self.model, self.end_ids, slots=self.batch_size)
            rows = decoder.generate(prompts, max_new_tokens=max_new_tokens, temperature=temperature, seeds=seeds)
            return [Generation(row) for row in rows]
        answers: list[Generation] = [Generation([])] * len(prompts)
        # Prompts of like length together: less padding.
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            torch.manual_seed(seeds[batch[0]])
            generated = self._generate([list(prompts[i]) for i in batch], max_new_tokens, temperature)
            for index, answer in zip(batch, generated, strict=True):
                answers[index] = Generation(answer)
        return answers

    def targets(self, rows: Sequence[Sequence[int]], num_predicted: Sequence[int]) -> list[Targets]:
        """As `ContextSession.targets`: hidden states."""
        return [HiddenStates(states) for states in predicting_states(self.model, rows, num_predicted)]

    @torch.no_grad()
    def divergence(self, teacher: Targets, other: Targets) -> float:
        """As `Backend.divergence`, over the whole vocabulary where both are hidden states."""
        if isinstance(teacher, TopK) or isinstance(other, TopK):
            k = 20
            return top_k_divergence(self.top_k(teacher, k, 1.0), self.top_k(other, k, 1.0))
        head, total = OutputHead(self.model), 0.0
        for ours, theirs in zip(teacher.states.split(_POSITIONS), other.states.split(_POSITIONS), strict=True):
            p, q = (head(states).float().log_softmax(-1) for states in (ours, theirs))
            total += float((p.exp() * (p - q)).sum())
        return total / max(len(teacher), 1)

    @torch.no_grad()
    def top_k(self, targets: Targets, k: int, mass: float) -> TopK:
        """As `Backend.top_k`."""
        if isinstance(targets, TopK):
            return targets.cut(k, mass)
        head = OutputHead(self.model)
        parts = [top_k_of_logits(head(states), k) for states in targets.states.split(_POSITIONS)]
        return TopK.concatenate(parts).cut(k, mass)

    @torch.no_grad()
    def _generate(self, prompts: list[list[int]], max_new_tokens: int, temperature: float) -> list[list[int]]:
        width = max(map(len, prompts))
        device = next(self.model.parameters()).device
        input_ids = torch.tensor([[self.pad_id] * (width - len(p)) + p for p in prompts], device=device)
        attention_mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
        sampling: dict[str, Any]
        if temperature > 0:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        else:
            sampling = {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        output = self.model.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            max_new_tokens=max_new_tokens,
            pad_token_id=self.pad_id,
            eos_token_id=sorted(self.end_ids),
            **sampling,
        )
        return [self._cut(row[width:].tolist()) for row in output]

    def _cut(self, tokens: list[int]) -> list[int]:
        for position, token in enumerate(tokens):
            if token in self.end_ids:
                return tokens[: position + 1]
        return tokens
