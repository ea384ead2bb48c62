"""What turns a request to vLLM into one behind a cartridge, and its answer back.

A cartridge travels through vLLM's own code in the place of a LoRA adapter, as `CartridgeAdapter`, up to the door of
the engine. There its placeholders go in front of the prompt, and the adapter is taken off again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput

from .connector import CARTRIDGE
from .store import CartridgeStore, StoredCartridge


class CartridgeAdapter(LoRARequest):
    """Names the cartridge of a request where vLLM expects a LoRA adapter (`lora_path` is its digest)."""


def connector_config(store: CartridgeStore, alphabet: Sequence[int], host_bytes: int) -> dict[str, Any]:
    """The `kv_transfer_config` of an engine that serves cartridges from `store`."""
    return {
        "kv_connector": "CartridgeConnector",
        "kv_connector_module_path": "peft_cartridges.serving.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {
            "store": str(store.folder.resolve()),
            "placeholders": list(alphabet),
            "host_bytes": host_bytes,
        },
    }


def cache_salt(secret: bytes, *parts: str | None) -> str:
    """A salt of vLLM's prefix cache that no client can write down: blocks are shared where all parts agree."""
    digest = hashlib.sha256(secret)
    for part in parts:
        digest.update(b"\\0" if part is None else hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()


def behind_cartridge(
    prompt: Any,
    params: SamplingParams,
    stored: StoredCartridge,
    *,
    name: str,
    alphabet: Sequence[int],
    salt: str,
    max_model_len: int,
) -> tuple[Any, SamplingParams]:
    """Copies of an engine's prompt and sampling parameters, with a cartridge in front.

    Raises:
        VLLMValidationError: the prompt is no plain text, leaves no room, or asks for what cannot be had behind a
            cartridge. Servers answer it with status 400.
    """
    if not isinstance(prompt, dict) or prompt.get("type") != "token":
        kind = prompt.get("type") if isinstance(prompt, dict) else type(prompt).__name__
        raise VLLMValidationError(f"Cartridge {name!r} takes prompts of text (or its token ids) only, got {kind!r}.")
    if params.prompt_logprobs is not None or params.prompt_logprob_token_ids is not None:
        raise VLLMValidationError(
            "Log-probabilities of the prompt (`prompt_logprobs`, or `echo` with `logprobs`) are not to be had behind a "
            "cartridge: vLLM gives them only where it computed all that stands in front. Those of the answer are.",
            parameter="prompt_logprobs",
        )
    own = prompt["prompt_token_ids"]
    room = max_model_len - stored.num_tokens - len(own)
    if not own or room < 1:
        raise VLLMValidationError(
            f"The prompt has {len(own)} tokens and cartridge {name!r} {stored.num_tokens}: with at least one token of "
            f"answer that is {'too little' if not own else 'more than'} for the {max_model_len} that the server takes "
            "(`--max-model-len`). Send a prompt of one token or more that leaves room.",
            parameter="prompt",
        )
    prompt = {**prompt, "prompt_token_ids": stored.placeholder_ids(alphabet) + list(own), "cache_salt": salt}
    prompt.pop("prompt_token_offsets", None)
    params = params.clone()
    params.max_tokens = room if params.max_tokens is None else min(params.max_tokens, room)
    params.min_tokens = min(params.min_tokens, params.max_tokens)
    params.extra_args = {**(params.extra_args or {}), "kv_transfer_params": {CARTRIDGE: stored.digest}}
    return prompt, params


def without_placeholders(output: RequestOutput, num_tokens: int) -> RequestOutput:
    """The output of a request as if its prompt had only had the tokens that the client sent (changed in place)."""
    if output.prompt_token_ids is not None:
        output.prompt_token_ids = output.prompt_token_ids[num_tokens:]
    if output.num_cached_tokens is not None:
        output.num_cached_tokens = max(0, output.num_cached_tokens - num_tokens)
    return output
