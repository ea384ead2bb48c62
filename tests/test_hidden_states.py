"""Final hidden states and the output head, against the model's own logits."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from transformers import AutoModelForCausalLM

from peft_cartridges.hidden_states import OutputHead, forward_hidden_states, predicting_states
from tests.tiny_models import ARCHITECTURES, HYBRIDS, tiny_model, token_ids


@pytest.mark.parametrize("name", [*ARCHITECTURES, *HYBRIDS])
def test_the_head_is_the_models_own(name: str) -> None:
    model = tiny_model(name)
    head = OutputHead(model)
    ids = torch.arange(8, 20)[None]
    with torch.no_grad():
        expected = model(ids).logits
        actual = head(head.decoder(ids).last_hidden_state)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("name", ["llama", "qwen3_next", "lfm2"])
def test_states_are_those_that_predict_the_last_tokens(name: str) -> None:
    model = tiny_model(name)
    rows = [[9, 10, 11, 12], [9, 13, 14], [20, 21, 22, 23, 24]]
    found = predicting_states(model, rows, [2, 1, 3], batch_size=2)
    for row, number, states in zip(rows, [2, 1, 3], found, strict=True):
        with torch.no_grad():
            expected = model.get_decoder()(torch.tensor([row])).last_hidden_state[0, -number - 1 : -1]
        torch.testing.assert_close(states, expected)


class _Counting(ModelHook):
    calls = 0

    def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return args, kwargs


def test_accelerates_hooks_outlive_the_head() -> None:
    model, ids, hooks = tiny_model(), token_ids(1, 5), [_Counting(), _Counting(), _Counting()]
    expected = OutputHead(model)(torch.ones(2, model.config.hidden_size))
    for module, hook in zip((model, model.model, model.lm_head), hooks, strict=True):
        add_hook_to_module(module, hook)
    actual = OutputHead(model)(torch.ones(2, model.config.hidden_size))
    torch.testing.assert_close(actual, expected)
    before = [hook.calls for hook in hooks]
    assert before == [1, 0, 1]  # the decoder is not called, what stands around it is
    model(input_ids=ids)
    assert [hook.calls for hook in hooks] == [2, 1, 2]


def test_a_forward_around_the_models_own_outlives_the_head() -> None:
    """TRL's `SFTTrainer` leaves one on the model: a function that holds the model's own forward in its closure."""
    model, hidden = tiny_model(), torch.randn(3, tiny_model().config.hidden_size)
    expected, own, calls = OutputHead(model)(hidden), model.forward, []

    def around(self: Any, *args: Any, extra: bool = False, **kwargs: Any) -> Any:
        calls.append(extra)
        return own(*args, **kwargs)

    model.forward = MethodType(around, model)
    torch.testing.assert_close(OutputHead(model)(hidden), expected)
    assert calls == [False]
    assert own.__self__ is model and model(token_ids(1, 5)).logits.shape[1] == 5  # the model itself is as it was


def test_the_head_works_where_its_weights_are_on_disk(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"model": "cpu", "lm_head": "disk"}, offload_folder=tmp_path / "offload",
        dtype=torch.float32,
    )  # fmt: skip
    hidden = torch.randn(3, model.config.hidden_size)
    with torch.no_grad():
        torch.testing.assert_close(OutputHead(model)(hidden), tiny_model().lm_head(hidden))
        torch.testing.assert_close(model(token_ids(1, 5)).logits, tiny_model()(token_ids(1, 5)).logits)


def test_a_forward_of_the_whole_model_gives_one_logit_and_all_states() -> None:
    model, ids = tiny_model(), token_ids(2, 7)
    expected = model.model(ids).last_hidden_state
    torch.testing.assert_close(forward_hidden_states(model, input_ids=ids), expected)
