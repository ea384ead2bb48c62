"""A vision–language model with a picture in the conversation, behind a cartridge of a text."""

from __future__ import annotations

import pytest
import torch

from peft_cartridges import KVPrefix
from tests.exactness import assert_close, cartridge_model
from tests.tiny_models import tiny_model, token_ids

IMAGE_TOKEN = 3


@pytest.mark.supports("Architectures", "pictures behind a cartridge", on="smolvlm")
def test_a_picture_in_the_conversation() -> None:
    model = tiny_model("smolvlm")
    prefix = KVPrefix.from_input_ids(model, token_ids(10))
    row = torch.cat([token_ids(3, seed=1), torch.full((4,), IMAGE_TOKEN), token_ids(4, seed=2)])[None]
    picture = torch.rand(1, 1, 3, 8, 8)
    positions = torch.arange(row.shape[1])[None]
    with torch.no_grad():
        expected = model(
            input_ids=row, pixel_values=picture, position_ids=positions + 10, past_key_values=prefix.to_cache()
        ).logits
        blind = model(input_ids=row, pixel_values=picture * 0, past_key_values=prefix.to_cache()).logits
        assert (expected - blind).abs().max() > 1e-3, "the picture makes no difference"
        peft_model = cartridge_model(model, prefix)
        assert_close(peft_model(input_ids=row, pixel_values=picture).logits, expected)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    output = peft_model.generate(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=picture, **options)
    assert output[0, row.shape[1]] == expected[0, -1].index_fill(0, torch.tensor(2), -torch.inf).argmax()
