"""What each layer is seen to do while it reads reference texts behind a prefix."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from peft_cartridges import KVPrefix, shared_prefix
from peft_cartridges.initialization.reference_attention import LayerReading, read_behind
from tests.tiny_models import ARCHITECTURES, tiny_model, token_ids

IDS = [1, *range(60, 80)]
ROWS = [[40, 41, 42, 43, 44], [50, 51, 52]]


def _outputs(reading: LayerReading) -> torch.Tensor:
    """Attention's output, put together from what is shown: `[num_key_value_heads, group * num_queries, value_dim]`."""
    outputs = []
    for head in range(len(reading.key)):
        scores, own = reading.scores(head), reading.own_lse[head]
        total = torch.logaddexp(scores.logsumexp(-1), own)
        weights = (scores - total[:, None]).exp()
        outputs.append(weights @ reading.value[head] + (own - total).exp()[:, None] * reading.own_output[head])
    return torch.stack(outputs)


def _of_the_model(model: Any, prefix: KVPrefix, row: list[int]) -> list[torch.Tensor]:
    """The attention outputs of the model itself with the prefix as `past_key_values`, `[q_len, num_heads, value_dim]`."""
    seen: list[torch.Tensor] = []
    eager = torch.nn.functional.scaled_dot_product_attention

    def record(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(eager(*args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", record)
        model(input_ids=torch.tensor([row]), past_key_values=prefix.to_cache(1))
    return [output[0].transpose(0, 1) for output in seen]


@torch.no_grad()
@pytest.mark.parametrize(
    "architecture", sorted({"llama", "qwen3", "mistral", "gemma3", "deepseek_v3"} & set(ARCHITECTURES))
)
def test_what_is_shown_makes_up_what_attention_gives(architecture: str) -> None:
    model = tiny_model(architecture)
    model.set_attn_implementation("sdpa")
    prefix = KVPrefix.from_input_ids(model, IDS)
    readings: list[LayerReading] = []
    read_behind(model, prefix, ROWS, readings.append)  # type: ignore[arg-type]
    expected = [torch.cat(rows) for rows in zip(*(_of_the_model(model, prefix, row) for row in ROWS), strict=True)]
    assert len(readings) == len(expected) == prefix.num_layers
    for reading, want in zip(readings, expected, strict=True):
        have = _outputs(reading)
        have = have.reshape(want.shape[1], want.shape[0], -1).transpose(0, 1)
        torch.testing.assert_close(have, want[..., : have.shape[-1]], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("compiled", [False, True])
def test_layers_above_see_what_a_layer_is_given_instead(compiled: bool) -> None:
    model = tiny_model()
    prefix = KVPrefix.from_input_ids(model, IDS)
    if compiled:
        for layer in model.model.layers:
            layer.compile(backend="eager")
    queries: dict[int, torch.Tensor] = {}

    def observe(reading: LayerReading) -> tuple[torch.Tensor, torch.Tensor] | None:
        queries[reading.index] = reading.query
        return (prefix.keys[0] * 2, prefix.values[0] * 3) if reading.index == 0 else None

    read_behind(model, prefix, ROWS, observe)
    other = KVPrefix((prefix.keys[0] * 2, *prefix.keys[1:]), (prefix.values[0] * 3, *prefix.values[1:]))
    for given, same in ((other, True), (prefix, False)):
        readings: list[LayerReading] = []
        read_behind(tiny_model(), given, ROWS, readings.append)  # type: ignore[arg-type]
        assert torch.allclose(queries[1], readings[1].query, atol=1e-5) is same


@torch.no_grad()
def test_afterwards_nothing_is_observed() -> None:
    model, calls = tiny_model(), []
    prefix = KVPrefix.from_input_ids(model, IDS)
    expected = model(input_ids=token_ids(1, 4)).logits
    with pytest.raises(RuntimeError, match="stop"):
        read_behind(model, prefix, ROWS, lambda reading: (_ for _ in ()).throw(RuntimeError("stop")))
    read_behind(model, prefix, ROWS, calls.append)  # type: ignore[arg-type]
    number = len(calls)
    with shared_prefix(model, prefix):
        model(input_ids=token_ids(1, 4))
    assert len(calls) == number == prefix.num_layers
    assert torch.equal(model(input_ids=token_ids(1, 4)).logits, expected)
