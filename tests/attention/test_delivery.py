"""Which prefix a forward gets: that of the context it runs in, in every order, thread, task, generator and backward."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import copy
import functools
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from transformers import ContinuousBatchingConfig, GenerationConfig

from peft_cartridges import CartridgeConfig, KVPrefix, UnsupportedModelError, shared_prefix
from peft_cartridges.attention import delivery
from tests.exactness import assert_close, cartridge_model, gradients, pad
from tests.tiny_models import tiny_model, token_ids

ROWS = token_ids(2, 6, seed=1)


@pytest.fixture
def model() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def prefixes(model: nn.Module) -> list[KVPrefix]:
    return [KVPrefix.from_input_ids(model, token_ids(length, seed=length)) for length in (9, 5)]


def _logits(model: nn.Module, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ROWS, **options).logits


def _alone(model: nn.Module, prefixes: list[KVPrefix]) -> list[Tensor]:
    results = []
    for prefix in prefixes:
        with shared_prefix(model, prefix):
            results.append(_logits(model))
    return results


def test_contexts_close_in_any_order(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    bare, alone = _logits(model), _alone(model, prefixes)
    first, second = (shared_prefix(model, prefix) for prefix in prefixes)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(_logits(model), alone[1])
    second.__exit__(None, None, None)
    assert torch.equal(_logits(model), bare)


def test_a_context_is_entered_once(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    context = shared_prefix(model, prefixes[0])
    with context, pytest.raises(RuntimeError, match="is open: call `shared_prefix` again"), context:
        pass
    with pytest.raises(RuntimeError, match="is closed: call `shared_prefix` again"), context:
        pass


def test_threads_have_their_own(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    bare, alone = _logits(model), _alone(model, prefixes)
    barrier = threading.Barrier(3)
    wrong: list[int] = []

    def work(index: int) -> None:
        context = shared_prefix(model, prefixes[index]) if index < 2 else contextlib.nullcontext()
        expected = alone[index] if index < 2 else bare
        for _ in range(10):
            barrier.wait()
            if not torch.equal(_logits(model), bare):
                wrong.append(index)
            with context if index == 2 else shared_prefix(model, prefixes[index]):
                barrier.wait()
                if not torch.equal(_logits(model), expected):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.equal(_logits(model), bare)


def test_adapters_of_rows_are_a_threads_own(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    alone = _alone(model, prefixes)
    peft_model = cartridge_model(model, prefixes[0])
    peft_model.add_adapter("second", CartridgeConfig(num_tokens=5))
    peft_model.base_model.set_kv_prefix(prefixes[1], "second")
    peft_model.eval()
    barrier = threading.Barrier(2)
    wrong: list[int] = []

    def work(index: int, name: str) -> None:
        for _ in range(10):
            barrier.wait()
            if (_logits(peft_model, adapter_names=[name] * 2) - alone[index]).abs().max() > 1e-5:
                wrong.append(index)

    threads = [threading.Thread(target=work, args=pair) for pair in enumerate(("default", "second"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thread_that_is_told(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    """As in streaming: `generate` in a thread that is started inside."""
    alone = _alone(model, prefixes[:1])[0]
    results: list[Tensor] = []
    with shared_prefix(model, prefixes[0]):
        run = contextvars.copy_context().run
        thread = threading.Thread(target=run, args=(lambda: results.append(_logits(model)),))
        thread.start()
        thread.join()
    assert torch.equal(results[0], alone)


def test_a_thread_that_was_started_inside_and_not_told_says_so(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    caught: list[Any] = []

    def work() -> None:
        with pytest.warns(RuntimeWarning, match="copy_context") as warned:
            _logits(model)
        caught.extend(warned)

    with shared_prefix(model, prefixes[0]):
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert len(caught) == 1


def test_tasks_have_their_own(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    alone = _alone(model, prefixes)

    async def task(index: int) -> bool:
        with shared_prefix(model, prefixes[index]):
            right = True
            for _ in range(3):
                await asyncio.sleep(0)
                right = right and torch.equal(_logits(model), alone[index])
            return right

    async def both() -> list[bool]:
        return list(await asyncio.gather(task(0), task(1)))

    assert asyncio.run(both()) == [True, True]


@pytest.mark.filterwarnings("ignore:A model runs without the prefix that the generator")
def test_generators_have_their_own(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    bare, alone = _logits(model), _alone(model, prefixes)

    def stream(prefix: KVPrefix) -> Iterator[Tensor]:
        with shared_prefix(model, prefix):
            for _ in range(3):
                yield _logits(model)

    streams = [stream(prefix) for prefix in prefixes]
    for _ in range(3):
        for index in (0, 1):
            assert torch.equal(next(streams[index]), alone[index])
            assert torch.equal(_logits(model), bare)
    del streams
    assert torch.equal(_logits(model), bare)


def test_a_generator_has_its_own_in_whatever_thread_it_is_asked(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    """As web servers do: each item in a thread of a pool, in a copy of the context."""
    bare, alone = _logits(model), _alone(model, prefixes[:1])[0]

    def stream() -> Iterator[Tensor]:
        with shared_prefix(model, prefixes[0]):
            for _ in range(3):
                yield _logits(model)

    with ThreadPoolExecutor(1) as pool:
        pool.submit(_logits, model).result()  # the thread is there before the context
        rows = stream()
        for _ in range(3):
            assert torch.equal(pool.submit(contextvars.copy_context().run, next, rows).result(), alone)
            assert torch.equal(pool.submit(_logits, model).result(), bare)


def test_a_thread_or_task_that_a_generator_may_have_started_is_refused(
    model: nn.Module, prefixes: list[KVPrefix]
) -> None:
    alone = _alone(model, prefixes[:1])[0]

    def work() -> Tensor:
        with shared_prefix(model, prefixes[0]):
            return _logits(model)

    async def stream(function: Any) -> Any:
        with shared_prefix(model, prefixes[0]):
            yield await asyncio.to_thread(function)

    async def first(function: Any) -> Any:
        rows = stream(function)
        try:
            return await anext(rows)
        finally:
            await rows.aclose()

    with pytest.raises(RuntimeError, match="Open `shared_prefix` in the function that the thread or task runs"):
        asyncio.run(first(functools.partial(_logits, model)))
    inside = functools.partial(contextvars.Context().run, work)
    assert torch.equal(asyncio.run(first(inside)), alone)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_forward_that_was_interrupted_leaves_nothing_due(
    error: type[BaseException], model: nn.Module, prefixes: list[KVPrefix]
) -> None:
    bare, alone = _logits(model), _alone(model, prefixes)

    def interrupt(*_: Any) -> None:
        raise error

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error), shared_prefix(model, prefixes[0]):
        _logits(model)
    hook.remove()
    assert torch.equal(_logits(model), bare)
    with shared_prefix(model, prefixes[1]):
        assert torch.equal(_logits(model), alone[1])


def test_a_context_that_was_made_before_the_cartridge_was_taken_off(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    alone = _alone(model, prefixes)
    peft_model = cartridge_model(model, prefixes[0])
    context = shared_prefix(model, prefixes[1])
    unloaded = peft_model.unload()
    with context:
        assert torch.equal(_logits(unloaded), alone[1])


def test_a_context_manager_around_it_is_the_callers(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    alone = _alone(model, prefixes[:1])[0]

    @contextlib.contextmanager
    def reading(prefix: KVPrefix) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            stack.enter_context(shared_prefix(model, prefix))
            yield

    with reading(prefixes[0]):
        assert torch.equal(_logits(model), alone)

    def stream() -> Iterator[Tensor]:
        with reading(prefixes[0]):
            yield _logits(model)
            yield _logits(model)

    rows = stream()
    assert torch.equal(next(rows), alone)
    with pytest.warns(RuntimeWarning, match="the generator `stream` opened"):
        assert not torch.equal(_logits(model), alone)
    assert torch.equal(next(rows), alone)


@pytest.mark.parametrize("name", ["llama", "mistral"])
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("in_another_thread", [False, True])
def test_checkpointed_layers_are_computed_again_with_what_was_due(
    name: str, reentrant: bool, in_another_thread: bool
) -> None:
    model = tiny_model(name).train()
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with shared_prefix(model, prefix):
        expected = gradients(model(input_ids=ROWS, labels=ROWS, use_cache=False).loss, parameters)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    with shared_prefix(model, prefix):
        loss = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
    if in_another_thread:
        thread = threading.Thread(target=loss.backward)
        thread.start()
        thread.join()
    else:
        loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient, 1e-6)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("how", ["compiled layers", "FSDP's checkpointing"])
def test_so_are_layers_that_are_compiled_or_checkpointed_by_others(how: str, reentrant: bool) -> None:
    torch.compiler.reset()
    model = tiny_model("llama").train()
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with shared_prefix(model, prefix):
        expected = gradients(model(input_ids=ROWS, labels=ROWS, use_cache=False).loss, parameters)
    if how == "compiled layers":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        for layer in model.model.layers:
            layer.compile(backend="eager")
    else:
        impl = CheckpointImpl.REENTRANT if reentrant else CheckpointImpl.NO_REENTRANT
        layers = set(model.model.layers)
        wrapper = functools.partial(checkpoint_wrapper, checkpoint_impl=impl)
        apply_activation_checkpointing(model, checkpoint_wrapper_fn=wrapper, check_fn=layers.__contains__)
    model.enable_input_require_grads()
    with shared_prefix(model, prefix):
        loss = model(input_ids=ROWS, labels=ROWS, use_cache=False).loss
    loss.backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert_close(parameter.grad, gradient, 1e-6)


def test_a_foreign_write_to_a_modules_configuration_switches_nothing_off(prefixes: list[KVPrefix]) -> None:
    model = tiny_model("llama")
    peft_model = cartridge_model(model, prefixes[0])
    expected = _logits(peft_model)
    for layer in model.model.layers:
        layer.self_attn.config._attn_implementation = "eager"
    assert_close(_logits(peft_model), expected, 1e-5)
    model.set_attn_implementation("sdpa")
    assert_close(_logits(peft_model), expected, 1e-5)
    assert model.config._attn_implementation == "sdpa"


def test_a_layer_that_does_not_take_its_prefix_is_an_error(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    peft_model = cartridge_model(model, prefixes[0])
    layer: Any = model.model.layers[1].self_attn.base_layer
    view, layer.config = layer.config, model.config
    with pytest.raises(
        RuntimeError, match=r"prefix was due, but `model.layers.1.self_attn` \(LlamaAttention\) did not"
    ):
        _logits(peft_model)
    layer.config = view
    model.model.layers[1].self_attn = copy.deepcopy(layer)
    assert len({id(module) for module in model.modules()}) == len(list(model.modules())), "a copy of one layer, no more"
    _logits(peft_model)
    model.model.layers[1].self_attn = type(layer)(model.config, 1)
    with pytest.raises(RuntimeError, match=r"`model.layers.1.self_attn` \(LlamaAttention\) did not attend to it"):
        _logits(peft_model)


def test_a_layer_that_is_called_by_itself_is_an_error(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    hidden = torch.randn(1, 3, 32)
    positions = model.model.rotary_emb(hidden, torch.arange(3)[None])
    layer = model.model.layers[0]
    plain = layer(hidden, position_embeddings=positions)
    with shared_prefix(model, prefixes[0]), pytest.raises(RuntimeError, match="called by itself while a prefix is due"):
        layer(hidden, position_embeddings=positions)
    assert torch.equal(layer(hidden, position_embeddings=positions), plain)


def test_a_text_is_not_read_behind_a_prefix(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    with shared_prefix(model, prefixes[0]), pytest.raises(ValueError, match="inside `shared_prefix`"):
        KVPrefix.from_input_ids(model, token_ids(6))
    peft_model = cartridge_model(model, prefixes[0])
    with pytest.raises(ValueError, match="has an active cartridge"):
        KVPrefix.from_input_ids(peft_model, token_ids(6))
    with peft_model.disable_adapter():
        again = KVPrefix.from_input_ids(peft_model, token_ids(9, seed=9))
    assert_close(again.keys[1], prefixes[0].keys[1], 1e-6)


def test_a_copied_model_is_a_model_of_its_own(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    alone = _alone(model, prefixes)
    twin = copy.deepcopy(model)
    with shared_prefix(model, prefixes[0]), shared_prefix(twin, prefixes[1]):
        assert torch.equal(_logits(model), alone[0])
        assert torch.equal(_logits(twin), alone[1])


@pytest.mark.parametrize("fullgraph", [False, True])
def test_a_compiled_model_sees_what_is_due(fullgraph: bool, prefixes: list[KVPrefix]) -> None:
    """Compiled whole, a cartridge is in the graph; contexts are read outside of it, which breaks it."""
    torch.compiler.reset()
    model = tiny_model("llama")
    bare, alone = _logits(model), _alone(model, prefixes)
    if fullgraph:
        peft_model = cartridge_model(model, prefixes[0])
        compiled: Any = torch.compile(peft_model.base_model.model, backend="eager", fullgraph=True)
        assert_close(_logits(compiled, use_cache=False), alone[0], 1e-5)
        with peft_model.disable_adapter():
            assert_close(_logits(compiled, use_cache=False), bare, 1e-5)
        with pytest.raises(Exception, match="disable"), shared_prefix(model, prefixes[1]):
            _logits(compiled, use_cache=False)
        return
    compiled = torch.compile(model, backend="eager")
    for _ in range(2):
        assert_close(_logits(compiled, use_cache=False), bare, 1e-5)
        for prefix, expected in zip(prefixes, alone, strict=True):
            with shared_prefix(model, prefix):
                assert_close(_logits(compiled, use_cache=False), expected, 1e-5)


def test_layers_compiled_one_by_one_see_what_is_due(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    torch.compiler.reset()
    bare, alone = _logits(model), _alone(model, prefixes)
    for layer in model.model.layers:
        layer.compile(backend="eager")
    for _ in range(2):
        assert_close(_logits(model, use_cache=False), bare, 1e-5)
        for prefix, expected in zip(prefixes, alone, strict=True):
            with shared_prefix(model, prefix):
                assert_close(_logits(model, use_cache=False), expected, 1e-5)


def test_two_cartridges_of_one_model(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    """`get_peft_model` twice, as in a notebook whose cell is run twice: the second is what counts."""
    alone = _alone(model, prefixes)
    cartridge_model(model, prefixes[0])
    with pytest.warns(UserWarning, match="second time"):
        again = get_peft_model(model, CartridgeConfig(num_tokens=5), adapter_name="second")
    again.base_model.set_kv_prefix(prefixes[1], "second")
    again.set_adapter("second")
    assert_close(_logits(again.eval()), alone[1], 1e-5)


@pytest.mark.parametrize("name", ["llama", "mistral", "deepseek_v3"])
def test_the_first_forward_can_be_verified(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model(name)
    prefix = KVPrefix.from_input_ids(model, token_ids(12))
    batch = pad([token_ids(length, seed=length) for length in (3, 7)], "left")
    del batch["position_ids"]
    with torch.no_grad(), shared_prefix(model, prefix, verify=True):
        model(**batch)
        model(input_ids=ROWS)
    monkeypatch.setattr(delivery, "positions_behind", lambda inputs, tokens, _: torch.arange(tokens.shape[1])[None])
    with (
        torch.no_grad(),
        shared_prefix(model, prefix, verify=True),
        pytest.raises(UnsupportedModelError, match="gives other hidden states behind the shared prefix"),
    ):
        model(input_ids=ROWS)
    with pytest.raises(ValueError, match="is like"):
        shared_prefix(model, prefix, verify=True, sliding_window="pinned")


def test_continuous_batching_is_refused_inside_a_context(model: nn.Module, prefixes: list[KVPrefix]) -> None:
    """It runs the model in a thread of its own, which nobody can tell."""
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": -1, "pad_token_id": 0}
    with shared_prefix(model, prefixes[0]), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        outputs = model.generate_batch(
            [ROWS[0].tolist()],
            generation_config=GenerationConfig(**options),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=64),
            progress_bar=False,
        )
    for output in outputs.values():
        assert not output.generated_tokens
        assert "`generate_batch` runs the model in a thread of its own" in output.error


def test_layers_that_were_cut_off_are_seen(prefixes: list[KVPrefix]) -> None:
    model = tiny_model("llama", num_hidden_layers=3)
    prefix = KVPrefix.from_input_ids(model, token_ids(5))
    with shared_prefix(model, prefix):
        _logits(model)
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="it has 3 layers, the model 2"):
        shared_prefix(model, prefix)
    shorter = KVPrefix.from_input_ids(model, token_ids(5))
    with shared_prefix(model, shorter, verify=True):
        _logits(model)
