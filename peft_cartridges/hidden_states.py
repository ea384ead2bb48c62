"""Final hidden states of a causal LM, and its output head apart from the rest.

A next-token distribution over the whole vocabulary is hidden_size numbers and the model's own head: that is what a
teacher's target is kept as, and what lets a loss over the vocabulary be computed in pieces.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from types import CellType, FunctionType, MethodType
from typing import Any, TypeVar

import torch
from accelerate.utils import extract_model_from_parallel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

T = TypeVar("T")


@torch.no_grad()
def predicting_states(
    model: nn.Module, rows: Sequence[Sequence[int]], num_predicted: Sequence[int], *, batch_size: int = 16
) -> list[Tensor]:
    """Final hidden states that predict the last tokens of each row.

    Args:
        model: A causal LM, with whatever prefix or cartridge is active on it.
        rows: Token ids.
        num_predicted: How many last tokens of each row; fewer than the row has.
        batch_size: Rows computed together.

    Returns:
        One tensor `[num_predicted[i], hidden_size]` per row, in the order of `rows`.
    """
    device = next(model.parameters()).device
    results: list[Tensor] = [torch.empty(0)] * len(rows)
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        hidden = forward_hidden_states(model, input_ids=pad_right([rows[i] for i in batch]).to(device))
        for row, index in enumerate(batch):
            end = len(rows[index]) - 1
            results[index] = hidden[row, end - num_predicted[index] : end].clone()
    return results


def pad_right(rows: Sequence[Sequence[int]], value: int = 0) -> Tensor:
    """`[len(rows), longest]`. In a causal model no real token sees padding behind it, so no mask is needed."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def forward_hidden_states(model: nn.Module, **inputs: Any) -> Tensor:
    """Final hidden states `[batch, q_len, hidden_size]` by a forward of the whole `model` (which may be wrapped for
    distributed training), with logits for one position of one row only."""
    causal_lm = _causal_lm(model)
    captured: list[Tensor] = []

    def keep_one(module: nn.Module, args: Any, output: Any) -> Any:
        captured.append(output.last_hidden_state)
        output.last_hidden_state = output.last_hidden_state[:1, -1:].contiguous()
        return output

    handle = causal_lm.get_decoder().register_forward_hook(keep_one)
    try:
        model(**inputs, **keep_last_logit(causal_lm), use_cache=False)
    finally:
        handle.remove()
    return captured[0]


def keep_last_logit(model: Any) -> dict[str, int]:
    """The argument that spares a causal LM the logits nobody asks for, where it knows one."""
    return {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(_causal_lm(model).forward).parameters else {}


class _DecoderOutput(BaseModelOutputWithPastAndCrossAttentions):
    """What a decoder gives, as any causal LM around it reads it. Some ask for more than the states (router logits, keys
    and values that layers share): it is not there, as where nobody has asked the decoder for it."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


class OutputHead:
    """The part of a causal LM behind its final hidden states, with the soft caps and scales that some models have.

    It runs the model's own forward on a twin of the model, in which the decoder merely hands over the states. The
    model itself is not touched, so hooks of accelerate, FSDP and others stay what they are.

    Args:
        model: A transformers causal LM or a PEFT model around one.
    """

    def __init__(self, model: Any) -> None:
        self.model = _causal_lm(model)
        names = {id(module): name for name, module in self.model.named_modules()}
        self._decoder_name = names[id(self.model.get_decoder())]
        self._embeddings_name = names.get(id(self.model.get_output_embeddings()))
        self._gathered: nn.Module | None = None

    @property
    def decoder(self) -> nn.Module:
        return self.model.get_submodule(self._decoder_name)

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits `[..., vocab_size]` of final hidden states `[..., hidden_size]`."""
        rows = hidden.reshape(1, -1, hidden.shape[-1])
        decoder = _twin(self.decoder, hooks=False)
        decoder.__dict__["forward"] = lambda *args, **kwargs: _DecoderOutput(last_hidden_state=rows)
        replaced = {self._decoder_name: decoder}
        embeddings = self._gathered or self._whole_embeddings()
        if embeddings is not None and self._embeddings_name is not None:
            replaced[self._embeddings_name] = embeddings
        logits = _with_submodules(self.model, replaced)(inputs_embeds=rows, use_cache=False).logits
        return logits.reshape(*hidden.shape[:-1], -1)

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Meanwhile the head's weights are whole in this process. Without it, every call gathers them where the model
        is sharded (FSDP 2), and all processes have to make the same calls."""
        outer = self._gathered
        self._gathered = outer or self._whole_embeddings()
        try:
            yield
        finally:
            self._gathered = outer

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Parameters of the output embeddings that want a gradient (none, unless they are in `modules_to_save`)."""
        embeddings = self.model.get_output_embeddings()
        return [] if embeddings is None else [p for p in embeddings.parameters() if p.requires_grad]

    @property
    def linear(self) -> Any:
        """The output embeddings, whole; `None` in a model without any."""
        return self._gathered or self._whole_embeddings() or self.model.get_output_embeddings()

    def _whole_embeddings(self) -> nn.Module | None:
        """A twin of sharded output embeddings with whole weights and without FSDP's hooks; `None` if they are whole.

        FSDP counts the calls of modules that it gathers together (final norm and head), so a call of the head alone
        must not reach its hooks.
        """
        embeddings = self.model.get_output_embeddings()
        if embeddings is None or not (_is_sharded(embeddings) or _has_sharded_parameter(embeddings)):
            return None
        twin = _twin(embeddings, hooks=False)
        twin.__dict__["_parameters"] = {
            name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in embeddings._parameters.items()
        }
        return twin


def _causal_lm(model: Any) -> Any:
    """The transformers causal LM in a PEFT model and in what distributed training wraps around either."""
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    return inner.get_base_model() if hasattr(inner, "get_base_model") else inner


def _is_sharded(module: nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def _has_sharded_parameter(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters())


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _twin(module: T, *, hooks: bool = True) -> T:
    """A second object with the module's class, parameters and submodules. What is bound to the module itself, as the
    forwards that accelerate and TRL put there, is bound to the twin."""
    twin: Any = object.__new__(type(module))
    twin.__dict__.update({name: _rebound(value, module, twin) for name, value in vars(module).items()})
    if not hooks:
        twin.__dict__.update({name: OrderedDict() for name in _HOOKS})
        for name in ("forward", "_hf_hook", "_old_forward"):
            twin.__dict__.pop(name, None)
    return twin


def _rebound(value: Any, module: Any, twin: Any, within: tuple[Any, ...] = ()) -> Any:
    if isinstance(value, MethodType) and value.__self__ is module:
        return MethodType(_rebound(value.__func__, module, twin, within), twin)
    if isinstance(value, FunctionType) and value.__closure__ and value not in within:
        # A forward put around the module's own (TRL's `add_fused_lm_head`) reaches that through its closure.
        cells = tuple(_rebound_cell(cell, module, twin, (*within, value)) for cell in value.__closure__)
        function = FunctionType(value.__code__, value.__globals__, value.__name__, value.__defaults__, cells)
        function.__kwdefaults__ = value.__kwdefaults__
        return function
    if isinstance(value, functools.partial) and value.args and value.args[0] is module:
        return functools.partial(value.func, twin, *value.args[1:], **value.keywords)
    return value


def _rebound_cell(cell: CellType, module: Any, twin: Any, within: tuple[Any, ...]) -> CellType:
    try:
        held = cell.cell_contents
    except ValueError:  # nothing is in it yet
        return cell
    return CellType(twin if held is module else _rebound(held, module, twin, within))


def _with_submodules(module: Any, replaced: dict[str, nn.Module]) -> Any:
    """A twin of the module in which the submodules of these names are others."""
    twin = _twin(module, hooks=not _is_sharded(module))
    twin.__dict__["_modules"] = modules = dict(module._modules)
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, other in replaced.items():
        first, _, rest = name.partition(".")
        if rest:
            inner.setdefault(first, {})[rest] = other
        else:
            modules[first] = other
    for first, below in inner.items():
        modules[first] = _with_submodules(module._modules[first], below)
    return twin
