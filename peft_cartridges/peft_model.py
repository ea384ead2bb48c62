"""`CartridgePeftModel`: what `get_peft_model` and `PeftModel.from_pretrained` give for a cartridge. Importing this
enters it, with configuration and tuner, in PEFT's tables.

PEFT looks every class up in these tables, so none of its methods is replaced, and whoever wraps one of them wraps it for
cartridges too. `peft.utils.register_peft_method` would fill them, but refuses a name that exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import PeftModelForCausalLM
from peft.auto import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, TaskType
from torch import Tensor

from .kv_prefix import KVPrefix
from .tuner import CartridgeConfig, CartridgeModel
from .tuner.file_format import WEIGHTS_FILE, missing_weights

_PUSH_OPTIONS = ("private", "revision", "create_pr", "commit_message", "token", "facts", "base_model")
_causal_lm = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType.CAUSAL_LM]


class CartridgePeftModel(PeftModelForCausalLM):
    """A causal LM with cartridges: PEFT's model class, with what holds for cartridges alone."""

    base_model: CartridgeModel

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        # PEFT looks up one class per task. Every other adapter, a stock `peft.CartridgeConfig` too, gets PEFT's own.
        config = kwargs.get("peft_config", args[1] if len(args) > 1 else None)
        if config is not None and not isinstance(config, CartridgeConfig):
            return _causal_lm(*args, **kwargs)
        return super().__new__(cls)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """As PEFT's; several names are a composition, their prefixes in that order.

        Raises:
            ValueError: a name is not loaded, none is given, or the adapters read sliding windows differently.
        """
        names = [adapter_name] if isinstance(adapter_name, str) else list(adapter_name)
        if unknown := [name for name in names if name not in self.peft_config]:
            loaded = ", ".join(self.peft_config) or "none"
            raise ValueError(f"Adapter {', '.join(unknown)} not found; there are: {loaded}.")
        self.base_model.set_adapter(names, inference_mode=inference_mode)
        if names:
            self.active_adapter = names[0]  # what PEFT looks a configuration up by; the tuner knows all of them

    def load_adapter(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's.

        Raises:
            FileNotFoundError: there are no weights.
            ValueError: as of `CartridgeConfig.from_pretrained`, or the weights do not fit the adapter.
        """
        folder = Path(model_id, kwargs.get("subfolder") or "")
        config = self.peft_config.get(adapter_name)
        # By `PeftModel.from_pretrained`: the weights were checked with the configuration, and nobody else has this model.
        made_for_this = getattr(config, "_read_from", None) == str(folder)
        try:
            if config is not None and not made_for_this:  # for an adapter that is new, PEFT reads the configuration
                CartridgeConfig.from_pretrained(model_id, **self._split_kwargs(dict(kwargs))[0])
            if folder.is_dir() and not (folder / WEIGHTS_FILE).is_file():  # PEFT would go on to look on the Hub
                raise missing_weights(folder, (file.name for file in folder.iterdir()))
            result = super().load_adapter(model_id, adapter_name, *args, **kwargs)
        except Exception:
            if made_for_this:
                self.base_model.unload()
            raise
        self.base_model._config_of(adapter_name)._read_from = None
        return result

    def push_to_hub(self, repo_id: str, **options: Any) -> Any:
        """The same call as ever, with a card that tells what the cartridge is; see `push_cartridge`. transformers'
        own writes an empty template over the card that was saved."""
        # Several adapters are pushed as PEFT does it, each in a folder of its own: no one card fits them.
        if len(self.peft_config) > 1:
            return super().push_to_hub(repo_id, **options)
        from .hub import CardFacts, push_cartridge

        facts = options.pop("facts", None) or CardFacts()
        facts.tags = list(dict.fromkeys([*facts.tags, *(options.pop("tags", None) or [])]))
        passed_on = {name: options[name] for name in _PUSH_OPTIONS if options.get(name) is not None}
        return push_cartridge(self, repo_id, facts=facts, **passed_on).commit

    @property
    def prompt_encoder(self) -> dict[str, PromptEncoderView]:  # type: ignore[override]
        """Each adapter as stock PEFT's functions for cartridges expect it."""
        return {name: PromptEncoderView(self.base_model, name) for name in self.peft_config}


class PromptEncoderView:
    """An adapter as stock PEFT's `CartridgeEncoder` shows it. The tensors are put together when asked for, so gradients
    reach the adapter through them, but what is written into them does not: `load_prompt_embeddings` does that."""

    def __init__(self, tuner: CartridgeModel, adapter_name: str) -> None:
        self._tuner, self._adapter_name = tuner, adapter_name
        self.config = tuner._config_of(adapter_name)

    @property
    def weight(self) -> Tensor:
        """`[num_tokens, num_layers * 2 * token_dim]`.

        Raises:
            ValueError: the layers are not of one shape, which stock PEFT's format cannot express.
        """
        layers = (layer.get_tokens(self._adapter_name) for layer in self._tuner.cartridge_layers())
        keys, values = zip(*layers, strict=True)
        return KVPrefix(tuple(keys), tuple(values)).to_prompt_embeddings()

    @property
    def embedding(self) -> PromptEncoderView:
        return self

    @property
    def frozen_embedding(self) -> Tensor | None:
        """The first `num_frozen_tokens` rows of `weight`, if there are any."""
        return self.weight[: self.config.num_frozen_tokens].detach() if self.config.num_frozen_tokens else None

    @property
    def trainable_embedding(self) -> Tensor:
        """The other rows of `weight`."""
        return self.weight[self.config.num_frozen_tokens :]

    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Puts rows as those of `weight` into the adapter, frozen tokens included.

        Raises:
            ValueError: another shape, or NaN or infinite values.
        """
        if self.config.layer_shapes is not None:
            raise ValueError("The layers of this model are not of one shape: use `initialize_cartridge` instead.")
        assert self.config.num_layers is not None and self.config.num_attention_heads is not None
        prefix = KVPrefix.from_prompt_embeddings(
            prompt_embeddings, num_layers=self.config.num_layers, num_heads=self.config.num_attention_heads
        )
        self._tuner.set_kv_prefix(prefix, self._adapter_name)


CartridgePeftModel.__name__ = PeftModelForCausalLM.__name__  # by which `AutoPeftModelForCausalLM` knows its class

PEFT_TYPE_TO_CONFIG_MAPPING[PeftType.CARTRIDGE] = CartridgeConfig
PEFT_TYPE_TO_TUNER_MAPPING[PeftType.CARTRIDGE] = CartridgeModel
PEFT_TYPE_TO_PREFIX_MAPPING[PeftType.CARTRIDGE] = CartridgeModel.prefix
MODEL_TYPE_TO_PEFT_MODEL_MAPPING[TaskType.CAUSAL_LM] = CartridgePeftModel
