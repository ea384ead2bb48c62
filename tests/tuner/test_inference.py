"""Every way of generating text behind a cartridge gives what it gives behind `past_key_values`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import ContinuousBatchingConfig, DynamicCache, GenerationConfig, StaticCache, pipeline

from peft_cartridges import KVPrefix, shared_prefix
from tests.exactness import assert_close, cartridge_model, pad, past_key_values_generate, past_key_values_logits
from tests.tiny_models import tiny_model, tiny_tokenizer, token_ids

NAMES = ["llama", "qwen3", "gemma3", "gpt_oss", "gpt2", "deepseek_v3"]
GREEDY: dict[str, Any] = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def _prefix(name: str = "llama") -> KVPrefix:
    return KVPrefix.from_input_ids(tiny_model(name), token_ids(12))


def _model(name: str = "llama") -> PeftModel:
    return cartridge_model(tiny_model(name), _prefix(name))


def _generate(model: nn.Module, rows: Tensor, **options: Any) -> Any:
    return model.generate(input_ids=rows, attention_mask=torch.ones_like(rows), **{**GREEDY, **options})


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


@pytest.mark.supports("Inference", "sampling, several return sequences", on="{name}")
@pytest.mark.parametrize("name", NAMES)
def test_sampling_with_several_return_sequences(name: str) -> None:
    rows = token_ids(2, 5, seed=1)
    options: dict[str, Any] = {**GREEDY, "do_sample": True, "top_k": 20, "temperature": 2.0}
    plain, prefix, model = tiny_model(name), _prefix(name), _model(name)
    torch.manual_seed(1)
    # Plain transformers expands the rows, but not a cache that is given: it gets one of the size it will need.
    expected = past_key_values_generate(plain, prefix, rows.repeat_interleave(3, dim=0), **options).sequences
    torch.manual_seed(1)
    output = _generate(model, rows, num_return_sequences=3, **options)
    assert output.shape == (6, 13)
    assert output.tolist() == expected.tolist()


@pytest.mark.supports("Inference", "assisted decoding, {how}", on="{name}")
@pytest.mark.parametrize("how", ["by a small model", "by prompt lookup"])
@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt_oss"])
def test_assisted_decoding(name: str, how: str) -> None:
    row = token_ids(1, 5, seed=1).repeat(1, 2)
    expected = past_key_values_generate(tiny_model(name), _prefix(name), row, **GREEDY).sequences
    helper = {"assistant_model": tiny_model(name, seed=1)} if "model" in how else {"prompt_lookup_num_tokens": 3}
    assert _generate(_model(name), row, **helper).tolist() == expected.tolist()


def test_assisted_decoding_by_the_base_model_itself() -> None:
    """Drafts of another model, some of which are taken and some refused: the cache is cropped in between."""
    row = token_ids(1, 5, seed=1)
    model = _model()
    assert _generate(model, row, assistant_model=tiny_model()).tolist() == _generate(model, row).tolist()


@pytest.mark.supports("Inference", "multi-turn on a kept cache", on="{name}")
@pytest.mark.parametrize("name", NAMES)
def test_a_conversation_on_a_kept_cache(name: str) -> None:
    model, turns = _model(name), [token_ids(1, 5, seed=1), token_ids(1, 4, seed=2), token_ids(1, 7, seed=3)]
    cache = DynamicCache(config=model.config)
    conversation = torch.zeros(1, 0, dtype=torch.long)
    for turn in turns:
        conversation = torch.cat([conversation, turn], dim=1)
        anew = _generate(model, conversation)
        conversation = _generate(model, conversation, past_key_values=cache)
        assert conversation.tolist() == anew.tolist()
        assert cache.get_seq_length() == conversation.shape[1] - 1, "the prefix is no part of the cache"


@pytest.mark.supports("Inference", "static cache", on="{name}")
@pytest.mark.parametrize("name", NAMES)
def test_a_static_cache(name: str) -> None:
    rows = token_ids(2, 5, seed=1)
    expected = past_key_values_generate(tiny_model(name), _prefix(name), rows, **GREEDY).sequences
    model = _model(name)
    assert _generate(model, rows, cache_implementation="static").tolist() == expected.tolist()
    batch = pad([token_ids(length, seed=length) for length in (6, 3, 11)], "left")
    del batch["position_ids"]
    static = model.generate(**batch, **GREEDY, cache_implementation="static")
    assert static.tolist() == model.generate(**batch, **GREEDY).tolist()


def test_a_static_cache_by_hand() -> None:
    """A prefill and single steps, as serving loops write them."""
    model, row = _model(), token_ids(1, 6, seed=1)
    expected = past_key_values_logits(tiny_model(), _prefix(), row[0])
    cache = StaticCache(config=model.config, max_cache_len=32)
    with torch.no_grad():
        logits = [model(input_ids=row[:, :4], past_key_values=cache).logits[0]]
        for step in (4, 5):
            logits.append(model(input_ids=row[:, step : step + 1], past_key_values=cache).logits[0])
    assert_close(torch.cat(logits), expected)


@pytest.mark.supports("Inference", "`torch.compile(fullgraph=True)` of the forward", on="{name}")
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_compiled_forward(name: str) -> None:
    model, row = _model(name), token_ids(6, seed=1)
    expected = past_key_values_logits(tiny_model(name), _prefix(name), row)
    compiled = torch.compile(model.base_model.model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert_close(compiled(input_ids=row[None], use_cache=False).logits[0], expected)


def test_compiled_forward_inside_shared_prefix() -> None:
    model, row = tiny_model(), token_ids(6, seed=1)
    expected = past_key_values_logits(model, _prefix(), row)
    with torch.no_grad(), shared_prefix(model, _prefix()):
        compiled = torch.compile(model, backend="aot_eager")
        assert_close(compiled(input_ids=row[None], use_cache=False).logits[0], expected)
    plain = past_key_values_logits(tiny_model(), None, row)
    with torch.no_grad():
        assert_close(compiled(input_ids=row[None], use_cache=False).logits[0], plain)


@pytest.mark.supports("Inference", "`torch.compile` and `generate` with a static cache", on="{name}")
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_compiled_generation_with_a_static_cache(name: str) -> None:
    model, rows = _model(name), token_ids(2, 5, seed=1)
    expected = _generate(model, rows)
    base = model.get_base_model()
    base.forward = torch.compile(base.forward, backend="aot_eager")
    output = _generate(model, rows, cache_implementation="static")
    assert output.tolist() == expected.tolist()


def test_training_a_compiled_model() -> None:
    rows, grads = token_ids(2, 5, seed=1), []
    for compiles in (False, True):
        model = _model().train()
        forward = torch.compile(model, backend="aot_eager") if compiles else model
        forward(input_ids=rows, labels=rows, use_cache=False).loss.backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for expected, actual in zip(*grads, strict=True):
        assert_close(actual, expected, 1e-5)


@pytest.mark.supports("Inference", '`pipeline("text-generation")`')
def test_a_pipeline(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side = "left"
    messages = [[{"role": "user", "content": text}] for text in ("what is the sea", "who tells of the old ship")]
    answers = [
        message["generated_text"][-1]["content"]
        for [message] in pipeline("text-generation", model=_model(), tokenizer=tokenizer)(messages, **GREEDY)
    ]
    for conversation, answer in zip(messages, answers, strict=True):
        ids = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )["input_ids"]
        alone = past_key_values_generate(tiny_model(), _prefix(), ids, **GREEDY).sequences[0, ids.shape[1] :]
        assert answer == tokenizer.decode(alone, skip_special_tokens=True)


@pytest.mark.supports("Inference", "continuous batching (`generate_batch`), {back_end}", on="{name}")
@pytest.mark.parametrize("back_end", ["eager", "sdpa"])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_continuous_batching(name: str, back_end: str) -> None:
    model = cartridge_model(tiny_model(name, attn=back_end), _prefix(name))
    rows = [token_ids(length, seed=length) for length in (6, 3, 11)]
    outputs = model.generate_batch(
        inputs=[row.tolist() for row in rows],
        generation_config=GenerationConfig(max_new_tokens=4, do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
        warmup=False,
    )
    for row, output in zip(rows, outputs.values(), strict=True):
        options = {**GREEDY, "eos_token_id": -1}
        alone = past_key_values_generate(tiny_model(name), _prefix(name), row[None], **options).sequences[0]
        assert output.generated_tokens == alone[len(row) :][:4].tolist()


def test_inference_mode_and_no_grad_can_be_mixed() -> None:
    model, row = _model(), token_ids(1, 6, seed=1)
    with torch.inference_mode():
        first = model(input_ids=row).logits.clone()
    with torch.no_grad():
        assert torch.equal(model(input_ids=row).logits, first)
    model.train()(input_ids=row, labels=row).loss.backward()
    model.eval()
    with torch.inference_mode():
        assert torch.equal(model(input_ids=row).logits, first)


def test_embeddings_instead_of_ids() -> None:
    model, row = _model(), token_ids(6, seed=1)
    expected = past_key_values_logits(tiny_model(), _prefix(), row)
    embeddings = model.get_input_embeddings()(row[None])
    assert_close(model(inputs_embeds=embeddings).logits[0].detach(), expected)
    hidden = model.base_model.model.model(row[None]).last_hidden_state[0]
    assert_close((hidden @ model.lm_head.weight.T).detach(), expected)


def test_decoding_does_not_round_keys_and_values_at_every_step() -> None:
    """Beside the first forward, no step copies anything of the cartridge's length into the model's dtype."""
    model = cartridge_model(tiny_model("llama", dtype=torch.bfloat16), _prefix()).eval()
    assert model.get_kv_prefix().dtype == torch.float32
    copies: list[int] = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            output = function(*args, **(kwargs or {}))
            if function is torch.ops.aten._to_copy.default and output.shape[-2:] == (12, 8):
                copies.append(1)
            return output

    steps = []
    hook = model.base_model.model.model.register_forward_hook(lambda *_: steps.append(len(copies)))
    with Count():
        _generate(model, token_ids(2, 5, seed=1))
    hook.remove()
    assert steps[0] == 4, "keys and values of two layers"
    assert set(steps) == {4}


@pytest.mark.parametrize("through_data", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_change_of_the_cartridge_is_seen_at_once(dtype: torch.dtype, through_data: bool) -> None:
    model, row = cartridge_model(tiny_model("llama", dtype=dtype), _prefix()), token_ids(1, 6, seed=1)
    with torch.no_grad():
        before = model(input_ids=row).logits
        for name, parameter in model.named_parameters():
            if "kv_prefix_value." in name:
                changed = parameter.detach() + 1
                (parameter.data if through_data else parameter).copy_(changed)
        after = model(input_ids=row).logits
    assert (after - before).abs().max() > 0.1
    fresh = cartridge_model(tiny_model("llama", dtype=dtype), model.get_kv_prefix())
    with torch.no_grad():
        assert torch.equal(fresh(input_ids=row).logits, after)


def test_a_single_token_on_another_cache_sees_a_change_through_data() -> None:
    model = tiny_model("llama")
    prefix = KVPrefix.from_input_ids(model, token_ids(8))
    row = token_ids(6, seed=1)
    with torch.no_grad():
        cache = model(input_ids=row[None, :5], use_cache=True).past_key_values
    peft_model = cartridge_model(model, prefix)

    def step() -> Tensor:
        with torch.no_grad():
            return peft_model(input_ids=row[None, 5:], past_key_values=copy.deepcopy(cache)).logits

    before = step()
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.neg_()
    after = step()
    assert not torch.equal(before, after)
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.neg_()
    assert torch.equal(step(), before)
