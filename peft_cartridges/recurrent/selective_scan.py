"""Mamba-1's selective scan from a state, which neither its kernels nor transformers' PyTorch code begin from.

The scan is linear in its first state, so what a state adds is added beside it (Gu and Dao, arXiv 2312.00752, equation 2):

    y_t += C_t · exp(A (Δ_1 + … + Δ_t)) h_0

The scan itself stays whichever transformers calls, its kernel (mamba-ssm) included.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# The states of the scans that a module is about to make, in its order.
_STATES: ContextVar[Iterator[Tensor] | None] = ContextVar("kv_prefix_scan_states", default=None)

_NAME = "mamba_selective_scan"


def prepare_selective_scan(module: Any) -> bool:
    """Makes the scan that `module`'s code calls one that can begin from a state; whether it calls one. It is the same
    function as ever where no state is due."""
    code = sys.modules[type(module).__module__]
    forward = inspect.unwrap(type(module).forward)
    if _NAME not in forward.__code__.co_names or not hasattr(code, _NAME):
        return False
    scan = getattr(code, _NAME)
    if not hasattr(scan, "_kv_prefix_scan"):
        setattr(code, _NAME, _from_state(scan))
    return True


@contextlib.contextmanager
def scanning_from(states: Mapping[str, Tensor]) -> Iterator[None]:
    """Scans begin from `recurrent`, `[batch, channels, state_size]`, or `[batch, heads, channels, state_size]` of a module
    that scans head by head."""
    state = states["recurrent"]
    held = _STATES.set(iter([state] if state.ndim == 3 else state.unbind(1)))
    try:
        yield
    finally:
        _STATES.reset(held)


def _from_state(scan: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(scan)
    def selective_scan(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        **kwargs: Any,
    ) -> Any:
        """As mamba-ssm's `selective_scan_fn`: hidden states and dt `[batch, channels, q_len]`, A `[channels, state_size]`,
        B and C `[batch, state_size, q_len]`."""
        states = None if torch.compiler.is_compiling() else _STATES.get()
        options = {"delta_bias": delta_bias, "delta_softplus": delta_softplus, **kwargs}
        if states is None:
            return scan(hidden_states, dt, A, B, C, D=D, z=z, return_last_state=return_last_state, **options)
        state = next(states).to(A.dtype)
        output, last = scan(hidden_states, dt, A, B, C, D=D, z=None, return_last_state=True, **options)
        step = dt if delta_bias is None else dt + delta_bias.to(dt.dtype)[..., None]
        elapsed = (F.softplus(step) if delta_softplus else step).to(A.dtype).cumsum(-1)
        added = torch.zeros_like(elapsed)
        for n in range(
            A.shape[1]
        ):  # one by one: all at once would take state_size times the memory of the hidden states
            added = added + C[:, n, None].to(A.dtype) * torch.exp(A[:, n, None] * elapsed) * state[:, :, n, None]
        output = output + added.to(output.dtype)
        if z is not None:
            output = output * F.silu(z)
        last = last + (torch.exp(A * elapsed[..., -1:]) * state).to(last.dtype)
        return (output, last) if return_last_state else output

    selective_scan._kv_prefix_scan = True  # type: ignore[attr-defined]
    return selective_scan
