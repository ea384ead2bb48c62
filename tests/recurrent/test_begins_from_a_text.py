"""Hybrid and recurrent models behind a prefix: as with the whole text in context, for every row and in every way to run them."""

from __future__ import annotations

import contextvars
import copy
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import DynamicCache, StaticCache, cache_utils
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.rwkv import modeling_rwkv

from peft_cartridges import KVPrefix, UnsupportedModelError, shared_prefix
from peft_cartridges.attention.probe import find_recurrent_layers, get_text_config
from tests.causal_lms import TYPES, tiny_causal_lm
from tests.exactness import pad, unpad

_TRIED = [
    "bailing_hybrid", "bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "kimi_linear", "lfm2", "lfm2_moe", "lfm3", "mamba", "mamba2",
    "nemotron_h", "olmo_hybrid", "qwen3_5_text", "qwen3_next", "zamba", "zamba2", "zaya",
]  # fmt: skip
NAMES = [name for name in _TRIED if name in TYPES]
if not hasattr(cache_utils, "DummyLayer"):  # since transformers 5.23, by which layers are known that keep nothing
    NAMES.remove("nemotron_h")
# These keep their states past transformers' caches.
OWN = ["rwkv", "xlstm"]
# One of each kind: gated delta rule, Mamba-2 beside attention, short convolution, Mamba-1 and Mamba-2 by themselves.
KINDS = ["qwen3_next", "falcon_h1", "lfm2", "mamba", "mamba2"]
TEXT = torch.randint(8, 120, (12,), generator=torch.Generator().manual_seed(1))
ROWS = [torch.randint(8, 120, (n,), generator=torch.Generator().manual_seed(n)) for n in (7, 11, 4, 11)]
GENERATE: dict[str, Any] = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}


@torch.no_grad()
def in_context(model: Any, row: Tensor) -> Tensor:
    """Logits of a row behind the text, read in one forward."""
    return model(input_ids=torch.cat([TEXT, row])[None]).logits[0, len(TEXT) :]


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    """Within `tolerance` of the largest number."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance * max(1.0, expected.abs().max().item()))


def batch_of(model: Any, side: str) -> dict[str, Tensor]:
    batch = pad(ROWS, side)
    batch.pop("position_ids")
    return batch


@pytest.mark.supports("Hybrid and recurrent models", "`shared_prefix`, padding on either side", on="{name}")
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_logits_of_padded_rows(name: str) -> None:
    model = tiny_causal_lm(name)
    expected = [in_context(model, row) for row in ROWS]
    prefix = KVPrefix.from_input_ids(model, TEXT)
    assert prefix.num_tokens == 12 and prefix.states
    for side in ("left", "right"):
        batch = batch_of(model, side)
        for options in ({}, {"use_cache": False}):
            with torch.no_grad(), shared_prefix(model, prefix):
                logits = model(**batch, **options).logits
            for have, want in zip(unpad(logits, batch), expected, strict=True):
                close(have, want)
    with torch.no_grad():
        assert (model(input_ids=ROWS[1][None]).logits[0] - expected[1]).abs().max() > 0.01
    # A single token first. The own step and scan of some differ: the scan bounds the step size, the step does not.
    with torch.no_grad(), shared_prefix(model, prefix):
        close(
            model(input_ids=ROWS[1][None, :1]).logits[0],
            expected[1][:1],
            1e-3 if name in ("nemotron_h", "zamba2") else 1e-5,
        )


@pytest.mark.supports("Hybrid and recurrent models", "`generate`, padded rows", on="{name}")
@pytest.mark.parametrize("name", [*NAMES, *OWN])
def test_generate(name: str) -> None:
    model = tiny_causal_lm(name)
    prefix = KVPrefix.from_input_ids(model, TEXT)
    expected = []
    for row in ROWS:
        ids = torch.cat([TEXT, row])[None]
        expected.append(
            model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)[0, ids.shape[1] :].tolist()
        )
    batches = [batch_of(model, "left")]
    if name == "rwkv":  # transformers' own steps mix the rows of a batch
        batches = [{"input_ids": row[None], "attention_mask": torch.ones(1, len(row))} for row in ROWS]
    with shared_prefix(model, prefix):
        for options in ({}, {"use_cache": False}):
            found = torch.cat([model.generate(**batch, **options, **GENERATE)[:, -5:] for batch in batches])
            assert found.tolist() == expected
        single = model.generate(ROWS[0][None, :1], attention_mask=torch.ones(1, 1), **GENERATE)[0, 1:].tolist()
    ids = torch.cat([TEXT, ROWS[0][:1]])[None]
    assert single == model.generate(ids, attention_mask=torch.ones_like(ids), **GENERATE)[0, 13:].tolist()


@pytest.mark.supports("Hybrid and recurrent models", "`generate` with beams, and with a static cache", on="{name}")
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
def test_generate_otherwise(name: str, options: dict[str, Any]) -> None:
    model = tiny_causal_lm(name)
    prefix = KVPrefix.from_input_ids(model, TEXT)
    whole = torch.cat([TEXT.expand(2, -1), torch.stack([ROWS[1], ROWS[3]])], 1)
    expected = model.generate(whole, attention_mask=torch.ones_like(whole), **options, **GENERATE)[:, 23:]
    rows = whole[:, 12:]
    with shared_prefix(model, prefix):
        found = model.generate(rows, attention_mask=torch.ones_like(rows), **options, **GENERATE)[:, 11:]
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", KINDS)
def test_every_cache_and_several_turns(name: str) -> None:
    """A second turn of several tokens goes on from the cache of the first."""
    model = tiny_causal_lm(name)
    prefix = KVPrefix.from_input_ids(model, TEXT)
    parameter = "cache_params" if "mamba" in name else "past_key_values"
    expected = in_context(model, torch.cat([ROWS[0], ROWS[1], ROWS[2]]))
    config = get_text_config(model)
    for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=64)):
        logits = []
        with torch.no_grad(), shared_prefix(model, prefix):
            for row in (ROWS[0], ROWS[1], ROWS[2]):
                logits.append(model(input_ids=row[None], use_cache=True, **{parameter: cache}).logits[0])
        close(torch.cat(logits), expected)


def _direction(batch: dict[str, Tensor]) -> Tensor:
    """What the logits of real tokens are weighed with, so that a loss depends on all of them."""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(*batch["input_ids"].shape, 128, generator=generator) * batch["attention_mask"][..., None]


def _gradients(model: Any, prefix: KVPrefix, batch: dict[str, Tensor], **options: Any) -> list[Any]:
    leaves = [tensor.clone().requires_grad_() for tensor in prefix.tensors()]
    each = iter(leaves)
    with shared_prefix(model, prefix.map(lambda tensor: next(each))):
        (model(**batch, **options).logits * _direction(batch)).sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.supports("Hybrid and recurrent models", "gradients of keys, values and states", on="{name}")
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_text_in_context(name: str) -> None:
    """Gradients of what the prefix holds, taken on through the text that left it, are those that reach the text's embeddings
    where it stands in context."""
    model = tiny_causal_lm(name)
    batch = batch_of(model, "left")
    embed = model.get_input_embeddings()
    text = embed(TEXT)[None].detach().requires_grad_()
    cache = DynamicCache(config=get_text_config(model))
    model(inputs_embeds=text, use_cache=True, **{"cache_params" if "mamba" in name else "past_key_values": cache})
    left = [layer.keys[0] for layer in cache.layers if getattr(layer, "keys", None) is not None]
    left += [layer.values[0] for layer in cache.layers if getattr(layer, "keys", None) is not None]
    for layer in cache.layers:
        if hasattr(layer, "conv_states"):
            left += [layer.conv_states[0][0]]
            left += [layer.recurrent_states[0][0]] if layer.is_recurrent_states_initialized[0] else []
    prefix = KVPrefix.from_input_ids(model, TEXT)
    gradients = _gradients(model, prefix, batch)
    assert [index for index, gradient in enumerate(gradients) if gradient.abs().sum() == 0] == []
    through = sum((tensor * gradient).sum() for tensor, gradient in zip(left, gradients, strict=True))
    (ours,) = torch.autograd.grad(through, text)
    theirs = torch.zeros_like(ours)
    for row, towards in zip(ROWS, _direction(batch), strict=True):
        logits = model(inputs_embeds=torch.cat([text, embed(row)[None]], 1), use_cache=False).logits[0, len(TEXT) :]
        theirs = theirs + torch.autograd.grad((logits * towards[-len(row) :]).sum(), text)[0]
    close(ours, theirs, 1e-4)


@pytest.mark.supports("Hybrid and recurrent models", "gradients, held against differences", on="{name}")
@pytest.mark.parametrize("name", OWN)
def test_gradients_are_those_of_differences(name: str) -> None:
    model = tiny_causal_lm(name)
    batch = batch_of(model, "left")
    prefix = KVPrefix.from_input_ids(model, TEXT)
    gradients = _gradients(model, prefix, batch)
    assert sum(bool(gradient.any()) for gradient in gradients) > len(gradients) // 2
    for number, gradient in enumerate(gradients):
        # xLSTM's normalizer counts only where it exceeds a bound: where it does not, nothing may change.
        towards = (
            gradient if gradient.any() else torch.randn(gradient.shape, generator=torch.Generator().manual_seed(5))
        )
        towards = towards / towards.norm()
        slope = (gradient * towards).sum()
        values, size = [], min(1e-2, 1 / max(slope.item(), 1e-6))
        for step in (size, -size):
            moved = iter([t + step * towards if i == number else t for i, t in enumerate(prefix.tensors())])
            with torch.no_grad(), shared_prefix(model, prefix.map(lambda tensor: next(moved))):  # noqa: B023
                values.append((model(**batch).logits * _direction(batch)).sum())
        difference = (values[0] - values[1]) / (2 * size)
        torch.testing.assert_close(difference, slope, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name: str, reentrant: bool) -> None:
    model = tiny_causal_lm(name)
    prefix = KVPrefix.from_input_ids(model, TEXT)
    for side in ("left", "right"):
        batch = batch_of(model, side)
        expected = _gradients(model, prefix, batch, use_cache=False)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model.train()
        for have, want in zip(_gradients(model, prefix, batch, use_cache=False), expected, strict=True):
            close(have, want, 1e-5)
        model.gradient_checkpointing_disable()
        model.eval()


@pytest.mark.parametrize("name", KINDS)
def test_packed_texts_each_begin_from_the_state(name: str) -> None:
    model = tiny_causal_lm(name)
    if "mamba" in name:
        pytest.skip("takes no positions that would tell packed texts apart")
    prefix = KVPrefix.from_input_ids(model, TEXT)
    positions = torch.cat([torch.arange(len(row)) for row in ROWS])[None]
    with torch.no_grad(), shared_prefix(model, prefix):
        logits = model(input_ids=torch.cat(ROWS)[None], position_ids=positions, use_cache=False).logits[0]
        with pytest.raises(ValueError, match="cannot share a cache"):
            model(
                input_ids=torch.cat(ROWS)[None],
                position_ids=positions,
                use_cache=True,
                past_key_values=DynamicCache(config=model.config),
            )
    close(logits, torch.cat([in_context(model, row) for row in ROWS]))


@pytest.mark.filterwarnings("ignore:A model runs without a prefix in a thread")
@pytest.mark.parametrize("name", KINDS)
def test_threads_copies_and_leaving(name: str) -> None:
    model = tiny_causal_lm(name)
    row = ROWS[0][None]
    with torch.no_grad():
        bare = model(input_ids=row).logits
    prefix = KVPrefix.from_input_ids(model, TEXT)
    expected = in_context(model, ROWS[0])
    found: dict[str, Tensor] = {}

    def run(which: str) -> None:
        with torch.no_grad():
            found[which] = model(input_ids=row).logits

    with shared_prefix(model, prefix):
        inside = threading.Thread(target=contextvars.copy_context().run, args=(run, "inside"))
        inside.start()
        inside.join()
        twin = copy.deepcopy(model)
        outside = threading.Thread(target=run, args=("outside",))
        outside.start()
        outside.join()
    close(found["inside"][0], expected)
    assert torch.equal(found["outside"], bare)
    with torch.no_grad():
        assert torch.equal(model(input_ids=row).logits, bare)
        assert torch.equal(twin(input_ids=row).logits, bare)
        with shared_prefix(twin, prefix):
            close(twin(input_ids=row).logits[0], expected)
            assert torch.equal(model(input_ids=row).logits, bare)


@pytest.mark.parametrize("name", ["lfm2", "mamba"])
def test_compiled(name: str) -> None:
    """The graph breaks where a context is read; Mamba-1's scan from a state is no part of it."""
    torch.compiler.reset()
    model = tiny_causal_lm(name)
    row = ROWS[0][None]
    with torch.no_grad():
        bare = model(input_ids=row).logits
    prefix = KVPrefix.from_input_ids(model, TEXT)
    expected = in_context(model, ROWS[0])
    shared_prefix(model, prefix)  # prepares the model
    compiled: Any = torch.compile(model, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            close(compiled(input_ids=row, use_cache=False).logits, bare)
            with shared_prefix(model, prefix):
                close(compiled(input_ids=row, use_cache=False).logits[0], expected)


def test_two_states_do_not_nest() -> None:
    model = tiny_causal_lm("qwen3_next")
    prefix = KVPrefix.from_input_ids(model, TEXT)
    with (
        shared_prefix(model, prefix),
        shared_prefix(model, prefix),
        pytest.raises(ValueError, match="2 prefixes are due that each"),
    ):
        model(input_ids=ROWS[0][None])


@pytest.mark.parametrize("name", KINDS)
def test_verify(name: str) -> None:  # house-ok: `verify` raises where the results differ
    model = tiny_causal_lm(name)
    prefix = KVPrefix.from_input_ids(model, TEXT)
    with torch.no_grad(), shared_prefix(model, prefix, verify=True):
        model(input_ids=ROWS[0][None])


def test_a_prefix_of_another_model() -> None:
    model = tiny_causal_lm("qwen3_next")
    prefix = KVPrefix.from_input_ids(model, TEXT)
    with pytest.raises(ValueError, match=r"states of 0 recurrent layers, the model has 3"):
        shared_prefix(model, prefix.without_states())
    other = KVPrefix(prefix.keys, prefix.values, tuple({"conv": state["conv"]} for state in prefix.states))
    with pytest.raises(ValueError, match=r"`prefix` was made by another model: it has the state"):
        shared_prefix(model, other)
    cut = tuple({name: tensor[:1] for name, tensor in state.items()} for state in prefix.states)
    with pytest.raises(ValueError, match=r"`prefix` was made by another model.*\(1, 8, 8\)"):
        shared_prefix(model, KVPrefix(prefix.keys, prefix.values, cut))


@pytest.mark.supports("Hybrid and recurrent models", "a kernel that ignores the state", on="qwen3_next", refused=True)
def test_a_kernel_that_begins_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    scan = modeling_qwen3_next.torch_chunk_gated_delta_rule
    monkeypatch.setattr(
        modeling_qwen3_next,
        "torch_chunk_gated_delta_rule",
        lambda *args, initial_state=None, **kwargs: scan(*args, **kwargs),
    )
    model = tiny_causal_lm("qwen3_next")
    before = [(name, dict(module.__dict__)) for name, module in model.named_modules()]
    prefix = KVPrefix.from_input_ids(model, TEXT)
    with pytest.raises(UnsupportedModelError, match=r"`model.layers.0.linear_attn` .* begins every text from zero"):
        shared_prefix(model, prefix)
    assert ["forward" in module.__dict__ for _, module in model.named_modules()] == ["forward" in d for _, d in before]


def test_a_kernel_without_a_gradient_of_the_state_is_not_trained_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modeling_rwkv, "rwkv_cuda_kernel", SimpleNamespace(max_seq_length=0))
    layer, *_ = find_recurrent_layers(tiny_causal_lm("rwkv"))

    def run(**options: Any) -> Any:
        begin = {name: torch.empty(1, *state.shape, **options) for name, state in layer.states.items()}
        return layer.memory.run(layer, lambda **_: ("ran",), {}, begin, None)[0]

    with FakeTensorMode():  # a GPU's tensors, without one
        assert run(device="cuda") == run(device="cpu", requires_grad=True) == ("ran",)
        with pytest.raises(ValueError, match=r"RWKV's CUDA kernel, which gives no gradient.*rwkv_cuda_kernel = None"):
            run(device="cuda", requires_grad=True)


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_layers_are_found_in_half_precision(name: str, dtype: torch.dtype) -> None:
    """Where a state that decays within a token makes little difference."""
    wanted, found = (find_recurrent_layers(tiny_causal_lm(name).to(dtype)) for dtype in (torch.float32, dtype))
    assert [layer.layer_idx for layer in found] == [layer.layer_idx for layer in wanted]
