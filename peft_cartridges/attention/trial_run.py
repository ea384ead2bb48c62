"""Running a token through a model as it was loaded: with its weights on `meta`, or quantized, and unchanged by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextlib.contextmanager
def experts_without_weights(model: Any, on_meta: bool) -> Iterator[None]:
    """Where weights are on `meta`, experts are computed in a way that asks for no values and takes any dtype."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    changed = [c for c in configs if on_meta and getattr(c, "_experts_implementation_internal", None)]
    held = [config._experts_implementation_internal for config in changed]
    for config in changed:
        config._experts_implementation_internal = "batched_mm"
    try:
        yield
    finally:
        for config, implementation in zip(changed, held, strict=True):
            config._experts_implementation_internal = implementation


@contextlib.contextmanager
def inference_untold(model: Any) -> Iterator[None]:
    """bitsandbytes packs 4-bit weights when it sees inference on a CPU, and does not train them after."""
    if getattr(model, "hf_quantizer", None) is None or torch.is_inference_mode_enabled():
        with torch.no_grad():
            yield
        return

    def needs_gradient(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.detach().requires_grad_() * 1

    hook = model.get_input_embeddings().register_forward_hook(needs_gradient)
    try:
        with torch.enable_grad():
            yield
    finally:
        hook.remove()
