"""Compaction by attention matching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import get_peft_model

from peft_cartridges import CartridgeConfig, KVPrefix, UnsupportedModelError, initialize_cartridge, shared_prefix
from peft_cartridges.attention.plain_attention import Scoring
from peft_cartridges.chat import ChatCodec
from peft_cartridges.hidden_states import pad_right
from peft_cartridges.initialization.attention_matching import _Queries, _ridge, surprise
from peft_cartridges.initialization.corpus_tokens import recitations
from peft_cartridges.initialization.reference_attention import LayerReading, read_behind
from tests.tiny_models import ARCHITECTURES, tiny_model, tiny_tokenizer

TEXT = " ".join(f"the captain says w{number} ." for number in range(50, 80))


def _matched(architecture: str = "llama", num_tokens: int = 16, text: str = TEXT, **options: Any) -> KVPrefix:
    model = get_peft_model(tiny_model(architecture), CartridgeConfig(num_tokens=num_tokens))
    return initialize_cartridge(model, tiny_tokenizer(), text=text, strategy="attention_matching", **options)


@pytest.mark.parametrize("architecture", sorted(set(ARCHITECTURES) - {"gpt2", "deepseek_v3"}))
def test_all_tokens_are_the_whole_text(architecture: str) -> None:
    ids = ChatCodec(None, tiny_tokenizer()).encode_context(TEXT)
    prefix = _matched(architecture, len(ids))
    whole = KVPrefix.from_input_ids(tiny_model(architecture), ids)
    for have, want in zip(prefix.keys + prefix.values, whole.keys + whole.values, strict=True):
        torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_layers_give_what_they_gave_with_the_text_better_with_fitted_values_and_better_yet_with_steps() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    rows = recitations(model, tokenizer, ids[1:], chat_template=True, piece=64)
    whole = KVPrefix.from_input_ids(model, ids)
    last, outputs = len(model.model.layers) - 1, dict[int, list[torch.Tensor]]()
    for number in (0, last):
        projection = model.model.layers[number].self_attn.o_proj
        projection.register_forward_hook(lambda _, args, output, n=number: outputs.setdefault(n, []).append(args[0]))
    with shared_prefix(model, whole):
        model(pad_right(rows))
    errors: dict[tuple[int, float, int], torch.Tensor] = {}
    for ridge, steps in ((1e6, 0), (1.0, 0), (0.01, 0), (1.0, 40)):
        # Every query counts, so what is fitted is what is compared.
        with shared_prefix(model, _matched(value_ridge=ridge, share_of_queries=1.0, steps=steps)):
            model(pad_right(rows))
        for number, seen in outputs.items():
            errors[number, ridge, steps] = (seen[-1] - seen[0])[pad_right([[1] * len(r) for r in rows]) > 0].norm()
    assert errors[0, 0.01, 0] < errors[0, 1.0, 0] < errors[0, 1e6, 0] and errors[0, 0.01, 0] < 0.8 * errors[0, 1e6, 0]
    for number in (0, last):
        assert errors[number, 1.0, 40] < 0.8 * errors[number, 1.0, 0]


@torch.no_grad()
def test_the_text_gets_its_share_of_attention() -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    rows = recitations(model, tokenizer, ids[1:], chat_template=True)
    masses: list[torch.Tensor] = []

    def observe(layer: LayerReading) -> None:
        if layer.index == 0:
            scores = torch.stack([layer.scores(head) for head in range(len(layer.key))])
            masses.append((scores.logsumexp(-1) - layer.own_lse).sigmoid())

    for prefix in (
        KVPrefix.from_input_ids(model, ids),
        *(_matched(share_of_queries=1.0, steps=steps) for steps in (0, 40)),
    ):
        read_behind(model, prefix, rows, observe)
    assert (masses[2] - masses[0]).square().mean() < 0.8 * (masses[1] - masses[0]).square().mean()


@torch.no_grad()
def test_surprise_is_what_the_model_alone_thinks_of_the_next_token() -> None:
    model, rows = tiny_model(), [[5, 6, 7, 8], [9, 10]]
    expected = []
    for row in rows:
        log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        expected += [-log_probs[at, following].item() for at, following in enumerate(row[1:])] + [0.0]
    torch.testing.assert_close(surprise(model, rows), torch.tensor(expected), atol=1e-5, rtol=1e-5)


def test_the_closed_form_is_what_it_minimizes() -> None:
    torch.manual_seed(0)
    inputs, targets, importance = torch.rand(2, 40, 6), torch.rand(2, 40, 3), torch.rand(2, 40, 1)
    gram = inputs.mT @ (importance * inputs)
    solution = _ridge(gram, inputs.mT @ (importance * targets), 0.1).requires_grad_()
    held = 0.1 * (inputs.square() * importance).sum(1).mean(-1)[:, None, None]
    loss = (importance * (inputs @ solution - targets).square()).sum() + (held * solution.square()).sum()
    assert torch.autograd.grad(loss, solution)[0].abs().max() < 1e-4


def test_the_first_token_stays_and_a_text_beyond_the_window_is_compacted_in_parts() -> None:
    tokenizer = tiny_tokenizer()
    ids = ChatCodec(None, tokenizer).encode_context(TEXT)
    whole, fitted = KVPrefix.from_input_ids(tiny_model(), ids), _matched(steps=3)
    for have, want in zip(fitted.values, whole.values, strict=True):
        torch.testing.assert_close(have[:, 0], want[:, 0])
    assert not torch.allclose(fitted.keys[0], _matched(steps=0).keys[0])
    model = get_peft_model(tiny_model(max_position_embeddings=160), CartridgeConfig(num_tokens=31))
    options: dict[str, Any] = {"strategy": "attention_matching", "value_ridge": 1e9, "steps": 0}
    prefix = initialize_cartridge(model, tokenizer, text=TEXT, **options)
    last = KVPrefix.from_input_ids(tiny_model(), [ids[0], *ids[1 + (len(ids) - 1) * 2 // 3 :]])
    distance = (prefix.values[0][0][-10:, None] - last.values[0][0][None]).abs().amax(-1).amin(-1)
    assert prefix.num_tokens == 31 and distance.max() < 1e-4


def test_references_are_asked_too() -> None:
    assert not torch.equal(_matched().values[1], _matched(references=[list(range(40, 60))]).values[1])


def test_what_cannot_be_matched_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match='share compressed ones: use `strategy="most_attended"`'):
        _matched("deepseek_v3")
    with pytest.raises(ValueError, match="`share_of_queries` must be above 0 and at most 1, got 0"):
        _matched(share_of_queries=0)
    with pytest.raises(ValueError, match="`value_ridge` must be above 0, got 0"):
        _matched(value_ridge=0)
    with pytest.raises(ValueError, match="`steps` must be at least 0, got -1"):
        _matched(steps=-1)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_autograd(softcap: float | None, masked: bool) -> None:
    torch.manual_seed(0)
    heads, asked, in_sight, dim = 2, 12, 9, 4
    mask = torch.zeros(asked, in_sight).masked_fill(torch.rand(asked, in_sight) < 0.3, float("-inf"))
    queries = _Queries(
        LayerReading(
            0, torch.randn(heads, in_sight, dim), torch.randn(heads, in_sight, dim), torch.randn(heads, asked, dim),
            mask if masked else None, torch.randn(heads, asked), torch.randn(heads, asked, dim), Scoring(0.7, softcap), False,
        ),
        torch.arange(asked), torch.rand(asked),
    )  # fmt: skip
    kept = torch.stack([torch.randperm(in_sight)[:5].sort().values for _ in range(heads)])
    key, value = torch.randn(heads, 5, dim).requires_grad_(), torch.randn(heads, 5, dim).requires_grad_()
    some, wanted = torch.tensor([7, 2, 2, 11]), torch.randn(heads, 4, dim)
    scores = queries.scores(key, kept, some)
    own = queries.own_lse[:, some, None]
    weights = (torch.cat([scores, own], -1) * math.log(2)).softmax(-1)  # scores are in bits
    output = weights[..., :-1] @ value + weights[..., -1:] * queries.own_output[:, some]
    have = queries.output(*queries.weights(key.detach(), kept, some), value.detach(), some)
    torch.testing.assert_close(have, output.detach())
    loss = ((output - wanted).square().sum(-1) * queries.importance[some]).sum() / 2
    expected = torch.autograd.grad(loss, [key, value])
    for have, want in zip(queries.gradients(key.detach(), value.detach(), wanted, kept, some), expected, strict=True):
        torch.testing.assert_close(have, want)
