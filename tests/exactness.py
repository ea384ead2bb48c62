"""What transformers itself computes for a prefix: the reference that everything is held against."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn

from peft_cartridges import CartridgeConfig, KVPrefix

PAD = 0


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


def cartridge_model(model: nn.Module, prefix: KVPrefix, **options: Any) -> PeftModel:
    """A PEFT model with `prefix` as its cartridge."""
    options = {"num_tokens": prefix.num_tokens, **options}
    peft_model = get_peft_model(model, CartridgeConfig(**options))
    peft_model.base_model.set_kv_prefix(prefix)
    return peft_model.eval()


def pad(rows: list[Tensor], side: str) -> dict[str, Tensor]:
    """Rows of ids as a padded batch with its attention mask and the positions that `generate` would give."""
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for index, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        ids[index, where], mask[index, where] = row, 1
    return {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}


def unpad(logits: Tensor, batch: dict[str, Tensor]) -> list[Tensor]:
    return [row[mask.bool()] for row, mask in zip(logits, batch["attention_mask"], strict=True)]


@torch.no_grad()
def past_key_values_logits(model: nn.Module, prefix: KVPrefix | None, row: Tensor) -> Tensor:
    """Logits `[len(row), vocab]` of one row by itself behind a prefix, by plain transformers."""
    cache = None if prefix is None else prefix.to_cache(1)
    return model(input_ids=row[None], past_key_values=cache).logits[0]


@torch.no_grad()
def past_key_values_generate(model: nn.Module, prefix: KVPrefix, rows: Tensor, beams: int = 1, **options: Any) -> Any:
    """`generate` of plain transformers behind a prefix, for rows of one length; ids without the prefix's."""
    behind = torch.cat([torch.full((len(rows), prefix.num_tokens), 9), rows], dim=1)
    output = model.generate(
        behind,
        attention_mask=torch.ones_like(behind),
        past_key_values=prefix.to_cache(len(rows) * beams),
        num_beams=beams,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    output.sequences = output.sequences[:, prefix.num_tokens :]
    return output


def gradients(loss: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(loss, parameters))
