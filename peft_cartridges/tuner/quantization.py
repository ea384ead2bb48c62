"""A cartridge in 8 or 4 bits at rest: tensors to quantized ones, and back once, when they are loaded.

Keys are quantized by channel, values by token, as their outliers lie (KIVI, arXiv 2402.02750), in blocks of
up to 64 numbers that share a middle and a scale. The first token, an attention sink whose keys and values are unlike all
others, stays in bfloat16. For a tensor `T` there are `T.codes`, `T.scale`, `T.middle` and `T.first`; two codes of 4 bits
share a byte.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

# Name -> (largest code, dtype of the codes in the file)
SCHEMES = {
    "int8": (127.0, torch.int8),
    "int4": (7.0, torch.uint8),
    "fp8": (448.0, torch.float8_e4m3fn),
}
SUFFIXES = (".codes", ".scale", ".middle", ".first")
_BLOCK = 64
# Of the blocks that `_quantize` finds no grid in at once, so many may yet have one, whose middle is so many numbers away.
_MOST_OFF = 0.5
_NEIGHBOURS = (1, -1, 2, -2)
_SETTLED_WITHIN = 4  # the third time gave what the second did, over a wide range of middles and spreads


def quantize_tensors(tensors: Mapping[str, Tensor], scheme: str) -> dict[str, Tensor]:
    """Quantizes keys and values.

    Args:
        tensors: `[num_key_value_heads, num_tokens, key_dim | value_dim]` each; names end in `key` or `value`.
        scheme: One of `SCHEMES`.

    Raises:
        ValueError: the scheme is unknown.
        ImportError: torchao is not installed, which quantizes to whole numbers.
    """
    check_scheme(scheme)
    quantized: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        first, rest = tensor[:, :1], tensor[:, 1:].detach().float().cpu()
        codes, scale, middle = _settle(_blocks(rest, by_channel=_by_channel(name)), scheme)
        quantized |= {f"{name}.codes": codes, f"{name}.scale": scale, f"{name}.middle": middle}
        quantized[f"{name}.first"] = first.detach().cpu().to(torch.bfloat16)
    return quantized


def quantized_forms(
    name: str, shape: tuple[int, int, int], scheme: str
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Names, shapes and dtypes of what `quantize_tensors` makes of a tensor of this name and shape.

    Raises:
        ValueError: the scheme is unknown.
    """
    check_scheme(scheme)
    heads, num_tokens, dim = shape
    lines, length = (dim, num_tokens - 1) if _by_channel(name) else (num_tokens - 1, dim)
    number, size = _block_layout(length)
    return {
        f"{name}.codes": ((heads, lines, number, size // 2 if scheme == "int4" else size), SCHEMES[scheme][1]),
        f"{name}.scale": ((heads, lines, number), torch.float16),
        f"{name}.middle": ((heads, lines, number), torch.float16),
        f"{name}.first": ((heads, 1, dim), torch.bfloat16),
    }


def dequantize_tensors(
    tensors: Mapping[str, Tensor], scheme: str, shapes: Mapping[str, tuple[int, int, int]]
) -> dict[str, Tensor]:
    """Keys and values of quantized ones, float32, in the order of `shapes`. Needs nothing but PyTorch.

    Args:
        tensors: As `quantize_tensors` gives them; their forms are `quantized_forms`.
        scheme: One of `SCHEMES`.
        shapes: Of what was quantized, by name.
    """
    restored: dict[str, Tensor] = {}
    for name, (_, num_tokens, dim) in shapes.items():
        codes, scale, middle, first = (tensors[name + suffix] for suffix in SUFFIXES)
        lines = _dequantize(codes, scale, middle, scheme).flatten(-2)
        rest = lines[..., : num_tokens - 1].mT if _by_channel(name) else lines[..., :dim]
        restored[name] = torch.cat([first.float(), rest], dim=1)
    return restored


def check_scheme(scheme: str) -> None:
    """Raises:
    ValueError: there is no such scheme.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"`quantization` must be one of {', '.join(SCHEMES)}, got {scheme!r}.")


def _settle(blocks: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and middles of blocks `[…, size]`, from which these come again: saving a cartridge that was loaded
    changes nothing."""
    parts = _quantize(blocks, scheme)
    for _ in range(_SETTLED_WITHIN if blocks.numel() else 0):
        again = _quantize(_dequantize(*parts, scheme), scheme)
        if all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(again, parts, strict=True)):
            break
        parts = again
    return parts


def _quantize(blocks: Tensor, scheme: str) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and middles of blocks `[…, size]`. What was quantized before is found to lie on a grid, whose middle
    is that of the block or, because the codes at both ends were rounded, a neighbour of it among the half-precision
    numbers; it is quantized without any error."""
    middle = (blocks.amin(-1) + blocks.amax(-1)).div(2).half()
    codes, scale = _encode(blocks - middle.float()[..., None], scheme)
    off = (_dequantize(codes, scale, middle, scheme) != blocks).any(-1)
    if off.sum() > _MOST_OFF * off.numel():
        return codes, scale, middle  # no grid: they are quantized for the first time
    for step in _NEIGHBOURS:
        if off.any():
            chosen, other = blocks[off], (middle[off].view(torch.int16) + step).view(torch.half)
            parts = (*_encode(chosen - other.float()[..., None], scheme), other)
            hit = (_dequantize(*parts, scheme) == chosen).all(-1)
            where = off.nonzero()[hit].unbind(-1)
            codes[where], scale[where], middle[where] = (part[hit] for part in parts)
            off[where] = False
    return codes, scale, middle


def _dequantize(codes: Tensor, scale: Tensor, middle: Tensor, scheme: str) -> Tensor:
    """The numbers `[…, size]`, float32."""
    if scheme == "int4":
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2).to(torch.int8) - 8
    return codes.float() * scale.float()[..., None] + middle.float()[..., None]


def _encode(blocks: Tensor, scheme: str) -> tuple[Tensor, Tensor]:
    """Codes `[…, size]` (int4: `[…, size / 2]` bytes) and scales `[…]` of blocks around zero."""
    largest, dtype = SCHEMES[scheme]
    if scheme == "fp8":
        scale = (blocks.abs().amax(-1, keepdim=True) / largest).clamp_min(torch.finfo(torch.half).tiny).half()
        return (blocks / scale.float()).clamp(-largest, largest).to(dtype), scale[..., 0]
    try:
        from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, quantize_affine
    except ImportError as error:
        raise ImportError(f"Quantizing to {scheme} needs torchao: pip install torchao.") from error
    shape, lowest = (1,) * (blocks.ndim - 1) + blocks.shape[-1:], -int(largest)
    if not blocks.numel():
        return blocks.to(dtype)[..., : blocks.shape[-1] // 2 if scheme == "int4" else None], blocks[..., 0].half()
    scale, _ = choose_qparams_affine(
        blocks,
        MappingType.SYMMETRIC,
        shape,
        torch.int8,
        quant_min=lowest,
        quant_max=int(largest),
        eps=torch.finfo(torch.half).tiny,
        scale_dtype=torch.half,
    )
    scale = scale.reshape(blocks.shape[:-1])
    wide, zero = scale[..., None].float(), torch.zeros(*scale.shape, 1, dtype=torch.int32)
    codes = quantize_affine(blocks, shape, wide, zero, torch.int8, lowest, int(largest))
    if scheme == "int4":
        low, high = (codes + 8).to(torch.uint8).unflatten(-1, (-1, 2)).unbind(-1)
        codes = low | (high << 4)
    return codes, scale


def _blocks(tensor: Tensor, *, by_channel: bool) -> Tensor:
    """`[heads, tokens, dim]` as `[heads, dim, blocks, size]` (of tokens) or `[heads, tokens, blocks, size]` (of
    dimensions), the last one filled up with its last number."""
    lines = tensor.mT if by_channel else tensor
    number, size = _block_layout(lines.shape[-1])
    missing = number * size - lines.shape[-1]
    if missing and lines.numel():
        lines = functional.pad(lines, (0, missing), mode="replicate")
    return lines.reshape(*lines.shape[:-1], number, size)


def _by_channel(name: str) -> bool:
    return name.endswith("key")


def _block_layout(length: int) -> tuple[int, int]:
    """Number of blocks and their size, an even one, for so many numbers."""
    number = -(-length // _BLOCK)
    size = -(-length // number) if number else _BLOCK
    return number, size + size % 2
