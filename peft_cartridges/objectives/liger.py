"""Liger's fused divergence: the linear output head and the divergence in one compiled, chunked pass.

Liger (https://github.com/linkedin/Liger-Kernel) multiplies hidden states with the head's weight itself, so it serves
heads that are that product and nothing more (no soft cap, no scaling of logits).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..hidden_states import OutputHead


def liger_jsd(
    student: Tensor,
    teacher: Tensor,
    head: OutputHead,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk_size: int = 512,
    compiled: bool = True,
) -> Tensor:
    """Sum over positions of the generalized Jensen–Shannon divergence; `beta` 0 and 1 are the forward and reverse KL.

    Args:
        student, teacher: Final hidden states `[positions, hidden_size]`.
        head: The model's output head; see `plain_linear_head`.
        beta: Weight of the teacher in the mixture.
        temperature: Divides the logits of both.
        chunk_size: Positions at a time.
        compiled: Whether to compile the pass, which a GPU wants and a test on a CPU does not.
    """
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    with head.gathered():
        linear = plain_linear_head(head)
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=beta, temperature=temperature, compiled=compiled,
        chunk_size=chunk_size,
    )  # fmt: skip
    # No position is masked, so the mean that Liger takes is over all of them.
    labels = torch.zeros(len(student), dtype=torch.long, device=student.device)
    bias = linear.bias
    mean = loss(student, linear.weight, teacher.to(student.dtype), linear.weight, labels, bias, bias)
    return mean * len(student)


def plain_linear_head(head: OutputHead) -> nn.Linear:
    """The head as a linear layer.

    Raises:
        ValueError: it does more than one product; checked on a random state.
    """
    linear = head.linear
    if isinstance(linear, nn.Linear):
        state = torch.randn(2, linear.in_features, device=linear.weight.device, dtype=linear.weight.dtype)
        with torch.no_grad():
            if torch.allclose(linear(state).float(), head(state).float(), atol=1e-3, rtol=1e-3):
                return linear
    raise ValueError(
        f"`use_liger_kernel=True` needs an output head that is one linear layer; {type(head.model).__name__} scales or "
        "caps its logits. Set `use_liger_kernel=False`."
    )
