"""Prefixes at other positions, against the models' own."""

from __future__ import annotations

import pytest
import torch

from peft_cartridges import KVPrefix
from peft_cartridges.attention.probe import UnsupportedModelError
from peft_cartridges.attention.reading import read_prefix
from peft_cartridges.initialization.moved_keys import move_prefix
from tests.tiny_models import ARCHITECTURES, tiny_model

TEXT = [1, *range(40, 60)]
PROBE = list(range(60, 90))


def _read_at(model: torch.nn.Module, position: int) -> KVPrefix:
    return read_prefix(model, TEXT, position=position)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2"}))
@pytest.mark.parametrize(("start", "end"), [(0, 37), (100, 3)])
def test_a_moved_prefix_is_what_the_model_would_have_read_there(architecture: str, start: int, end: int) -> None:
    model = tiny_model(architecture)
    moved, expected = move_prefix(model, _read_at(model, start), end - start, PROBE), _read_at(model, end)
    for have, want in zip(moved.keys + moved.values, expected.keys + expected.values, strict=True):
        torch.testing.assert_close(have, want, atol=1e-3, rtol=1e-3)


def test_rounding_does_not_spoil_what_is_measured() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    moved, expected = move_prefix(model, _read_at(model, 0), 37, PROBE), _read_at(tiny_model("llama"), 37)
    for have, want in zip(moved.keys + moved.values, expected.keys + expected.values, strict=True):
        assert have.dtype == torch.bfloat16
        assert (have.float() - want).norm() < 0.02 * want.norm()


def test_positions_are_not_ignored() -> None:
    model = tiny_model("llama")
    assert not torch.allclose(_read_at(model, 0).keys[0], _read_at(model, 37).keys[0], atol=1e-2)


def test_learned_positions_cannot_be_moved() -> None:
    model = tiny_model("gpt2")
    with pytest.raises(UnsupportedModelError, match=r"layer 0 do not only turn.*first_tokens"):
        move_prefix(model, _read_at(model, 0), 40, PROBE)
