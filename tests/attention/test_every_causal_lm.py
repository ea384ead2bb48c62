"""Every causal LM type of the installed transformers: behind a prefix as with the whole text in context, or refused."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_cartridges import KVPrefix, UnsupportedModelError, shared_prefix
from tests.causal_lms import TYPES, NotBuiltError, tiny_causal_lm

GENERATE: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
DOCUMENT = torch.randint(8, 120, (12,), generator=torch.Generator().manual_seed(1))
ROWS = torch.randint(8, 120, (2, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.supports("Every causal LM type of transformers", "held against the whole text in context", on="{name}")
@pytest.mark.parametrize("name", TYPES)
def test_exact_or_refused(name: str, record_property: Callable[[str, object], None]) -> None:
    try:
        model = tiny_causal_lm(name)
    except NotBuiltError as error:
        pytest.skip(str(error))
    before = _modules(model)
    try:
        prefix = KVPrefix.from_input_ids(model, DOCUMENT)
        context = shared_prefix(model, prefix)
    except UnsupportedModelError as error:
        if name != "big_bird":  # changes its own attention when it sees a short text
            assert _modules(model) == before
        record_property("outcome", f"refused ({_reason(str(error))}):")
        return
    padding = torch.ones(2, 11, dtype=torch.long)
    padding[0, :4] = 0
    with torch.no_grad(), context:
        plain = model(input_ids=ROWS).logits
        padded = model(input_ids=ROWS, attention_mask=padding).logits
        generated = model.generate(ROWS, attention_mask=torch.ones_like(ROWS), **GENERATE)[:, 11:]
    whole = torch.cat([DOCUMENT.expand(2, -1), ROWS], 1)
    with torch.no_grad():
        expected = model(input_ids=whole).logits[:, 12:]
        shorter = model(input_ids=torch.cat([DOCUMENT, ROWS[0, 4:]])[None]).logits[0, 12:]
        expected_ids = model.generate(whole, attention_mask=torch.ones_like(whole), **GENERATE)[:, 23:]
        without = model(input_ids=ROWS).logits
    _close(plain, expected)
    _close(padded[0, 4:], shorter)
    _close(padded[1], expected[1])
    assert generated.tolist() == expected_ids.tolist()
    assert (without - expected).abs().max() > 0.01, "the text makes no difference"
    if not prefix.states:  # of those, tests/recurrent
        _check_gradients(model, prefix)


def _check_gradients(model: nn.Module, prefix: KVPrefix) -> None:
    """Of keys and values, against autograd through a cache that holds them."""
    leaves = [tensor.clone().requires_grad_() for tensor in (*prefix.keys, *prefix.values)]
    half = len(leaves) // 2
    learning = KVPrefix(tuple(leaves[:half]), tuple(leaves[half:]))
    direction = torch.randn(1, 11, 128, generator=torch.Generator().manual_seed(3))
    with shared_prefix(model, learning):
        ours = torch.autograd.grad((model(input_ids=ROWS[:1]).logits * direction).sum(), leaves)
    logits = model(input_ids=ROWS[:1], past_key_values=learning.to_cache(1)).logits
    theirs = torch.autograd.grad((logits * direction).sum(), leaves)
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-3, atol=1e-3 * max(1.0, want.abs().max().item()))


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * max(1.0, expected.abs().max().item()))


def _modules(model: nn.Module) -> list[Any]:
    return [
        (name, type(module), id(getattr(module, "config", None)), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


# What an error says of a model -> what the page says of all models like it.
_REASONS = (
    (r"cannot hold a prefix: (.*?)(?: \(\w+\))?[,.]", r"\1"),
    (r"keep no state in its cache", "neither attention through transformers' interface nor a state in its cache"),
    (r"uses cache of its own", "takes no cache but its own class of it"),
    (r"begins every text from zero", "its recurrence begins every text from zero"),
    (r"takes `position_ids`", "takes no `position_ids`"),
    (r"takes no `past_key_values`", "takes no `past_key_values`"),
    (r"could not be probed", "one token by itself does not go through it"),
    (r"(attends several times in one layer)", r"\1"),
    (r"chunked-attention layers", "chunked attention"),
    (r"does not tell its sliding window", "does not tell its sliding window to its attention function"),
)


def _reason(message: str) -> str:
    for pattern, reason in _REASONS:
        if found := re.search(pattern, message):
            return found.expand(reason)
    raise AssertionError(f"The page has no words for this refusal: {message}")
