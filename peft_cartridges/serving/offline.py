"""`CartridgeLLM`: vLLM's offline engine with cartridges, for work in batches."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm import LLM, RequestOutput, SamplingParams
from vllm.renderers.inputs.preprocess import conversation_to_seq, prompt_to_seq

from .base_model import BaseModelFacts
from .catalog import Catalog, Limits, split_revision
from .engine_requests import CartridgeAdapter, behind_cartridge, cache_salt, connector_config, without_placeholders
from .gating import decide, requests_of
from .store import CartridgeStore


class CartridgeLLM(LLM):
    """vLLM's `LLM`, whose `generate` and `chat` take a cartridge.

    ```python
    llm = CartridgeLLM("HuggingFaceTB/SmolLM2-135M-Instruct", cartridges={"handbook": "user/handbook"})
    outputs = llm.chat(conversations, SamplingParams(max_tokens=64), cartridge="handbook")
    outputs[0].lora_request  # names the cartridge that answered; None: the base, because the gate rejected the request
    ```

    Args:
        model: The base model, as `vllm.LLM` takes it.
        cartridges: What to call them, and their folders or names on the Hub (`user/name@revision`). More can be
            loaded later: `llm.cartridges.load(name, source)`; `a+b` names a composition.
        host_bytes: How many bytes of cartridges each worker keeps in host memory.
        store: A folder for checked copies of the cartridges; default: a temporary one.
        engine_arguments: Of `vllm.LLM`.

    Raises:
        ValueError, FileNotFoundError, HubError: a cartridge is damaged, belongs to another base model, is too long or
            not to be had.
    """

    def __init__(
        self,
        model: str,
        cartridges: Mapping[str, str | Path] | None = None,
        *,
        host_bytes: int = 4 << 30,
        store: str | Path | None = None,
        **engine_arguments: Any,
    ) -> None:
        if engine_arguments.get("kv_transfer_config") is not None:
            raise ValueError("`kv_transfer_config` is taken by the cartridges: leave it out.")
        base = BaseModelFacts(
            model,
            revision=engine_arguments.get("revision"),
            trust_remote_code=engine_arguments.get("trust_remote_code", False),
        )
        if store is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="cartridges-")
            store = self._temporary.name
        checked = CartridgeStore(store)
        self._alphabet = base.placeholder_alphabet()
        super().__init__(
            model, kv_transfer_config=connector_config(checked, self._alphabet, host_bytes), **engine_arguments
        )
        self.max_model_len: int = self.llm_engine.model_config.max_model_len
        self.cartridges = Catalog(checked, base, Limits(num_tokens=self.max_model_len - 2))
        self._behind: dict[str, tuple[CartridgeAdapter, int]] = {}
        for name, source in (cartridges or {}).items():
            path, revision = split_revision(str(source))
            self.cartridges.load(name, path, revision=revision)

    def generate(
        self, prompts: Any, sampling_params: Any = None, *, cartridge: Any = None, gate: bool = True, **options: Any
    ) -> list[RequestOutput]:
        """As `vllm.LLM.generate`, behind `cartridge`: one name for all prompts, or one (or None) for each.

        `gate`: whether the base answers what the gate of a cartridge (if it has one) rejects. It reads words: prompts of
        token ids are never rejected."""
        if cartridge is not None:
            prompts = prompt_to_seq(prompts)
            asked = [prompt if isinstance(prompt, dict) else {"prompt": prompt} for prompt in prompts]
            options["lora_request"] = self._adapters(cartridge, asked, gate)
        return self._restored(super().generate(prompts, sampling_params, **options))

    def chat(
        self, messages: Any, sampling_params: Any = None, *, cartridge: Any = None, gate: bool = True, **options: Any
    ) -> list[RequestOutput]:
        """As `vllm.LLM.chat`, behind `cartridge`: one name for all conversations, or one (or None) for each. Each
        cartridge's own chat template is used, unless `chat_template` is given. `gate`: as in `generate`."""
        if cartridge is None:
            return self._restored(super().chat(messages, sampling_params, **options))
        conversations = conversation_to_seq(messages)
        adapters = self._adapters(cartridge, [{"messages": one} for one in conversations], gate)
        given, priority = options.pop("chat_template", None), options.pop("priority", None)
        alike: dict[str | None, list[int]] = {}  # by template
        for index, adapter in enumerate(adapters):
            alike.setdefault(given or self._template(adapter), []).append(index)
        outputs: dict[int, RequestOutput] = {}
        for template, indices in alike.items():
            answered = super().chat(
                [conversations[index] for index in indices],
                _of_each(sampling_params, indices),
                lora_request=[adapters[index] for index in indices],
                priority=_of_each(priority, indices),
                chat_template=template,
                **options,
            )
            outputs.update(zip(indices, answered, strict=True))
        return self._restored([outputs[index] for index in sorted(outputs)])

    def _add_request(self, prompt: Any, params: Any, lora_request: Any = None, priority: int = 0) -> str:
        if not isinstance(lora_request, CartridgeAdapter) or not isinstance(params, SamplingParams):
            return super()._add_request(prompt, params, lora_request=lora_request, priority=priority)
        entry = self._entry(lora_request.lora_name)
        prompt, params = behind_cartridge(
            prompt,
            params,
            entry.stored,
            name=entry.name,
            alphabet=self._alphabet,
            salt=cache_salt(b"", entry.stored.digest, prompt.get("cache_salt")),
            max_model_len=self.max_model_len,
        )
        request_id = super()._add_request(prompt, params, priority=priority)
        self._behind[request_id.split("-")[0]] = lora_request, entry.stored.num_tokens
        return request_id

    def _restored(self, outputs: list[RequestOutput]) -> list[RequestOutput]:
        for output in outputs:
            adapter, num_tokens = self._behind.pop(output.request_id.split("-")[0], (output.lora_request, 0))
            without_placeholders(output, num_tokens).lora_request = adapter
        return outputs

    def _entry(self, name: str) -> Any:
        entry = self.cartridges.find(name)
        if entry is None:
            known = ", ".join(one.name for one in self.cartridges.entries()) or "none"
            raise ValueError(f"There is no cartridge {name!r}. There are: {known}.")
        return entry

    def _adapters(
        self, cartridge: str | Sequence[str | None], asked: Sequence[Any], gate: bool
    ) -> list[CartridgeAdapter | None]:
        """For each request, as a server would be asked it, what stands in front."""
        names = [cartridge] * len(asked) if isinstance(cartridge, str) else list(cartridge)
        if len(names) != len(asked):
            raise ValueError(
                f"`cartridge` has {len(names)} names for {len(asked)} requests: give one for each, or one."
            )
        entries = [None if name is None else self._entry(name) for name in names]
        return [
            None
            if entry is None or (gate and decide(entry, requests_of(request)) == "rejected")
            else CartridgeAdapter(lora_name=entry.name, lora_int_id=1, lora_path=entry.stored.digest)
            for entry, request in zip(entries, asked, strict=True)
        ]

    def _template(self, adapter: CartridgeAdapter | None) -> str | None:
        return None if adapter is None else self._entry(adapter.lora_name).chat_template


def _of_each(values: Any, indices: Sequence[int]) -> Any:
    """Of one value for all requests, or one for each, those of some requests."""
    return [values[index] for index in indices] if isinstance(values, Sequence) else values
