"""`CartridgeConfig`: what a cartridge is, as PEFT knows and saves it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import PeftConfig
from peft.utils import PeftType, TaskType

from .file_format import WEIGHTS_FILE, missing_weights, read_prefix
from .quantization import check_scheme

# Fields of ours that stock PEFT does not know. They are written only where they say something, so that stock PEFT
# reads our files without a warning.
_OWN_FIELDS = {
    "attention": "auto",
    "sliding_window": "windowed",
    "recurrent_state": "train",
    "layer_shapes": None,
    "layer_states": None,
    "layer_format": None,
    "quantization": None,
}

# With one tensor per layer: of keys and values alone, and since 2 of states too.
KEYS_AND_VALUES, WITH_STATES = 1, 2


@dataclass
class CartridgeConfig(PeftConfig):
    """Configuration of a cartridge: a small trainable KV cache that stands in for a long text.

    ```python
    model = get_peft_model(model, CartridgeConfig(num_tokens=2048))
    ```

    `num_tokens` and `num_virtual_tokens` are two names of one number: give either, and both read the same.
    `dataclasses.replace` changes both through either.

    It is saved in the format of stock PEFT's CARTRIDGE type. `token_dim`, `num_layers` and `num_attention_heads` belong
    to that format; they are read off the base model and need not be given.

    Raises:
        ValueError: a field is out of its range; the message names it.
    """

    num_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Length of the cartridge in tokens: its memory, and how much it can hold. A tenth to a fortieth of "
            "the corpus is a good start. 0 in a model without attention (Mamba), where a cartridge is states alone, and in "
            "a hybrid one that is to have no more. Saved as `num_virtual_tokens`, the name it has in stock PEFT."
        },
    )
    num_frozen_tokens: int = field(
        default=1,
        metadata={
            "help": "How many first tokens stay as they were initialized. Models lean on their first token as an "
            "attention sink, and moving it makes training unstable; the Cartridges paper freezes one."
        },
    )
    attention: Literal["auto", "merged", "concatenated"] = field(
        default="auto",
        metadata={
            "help": "How attention to the cartridge is computed. `auto`: one copy for the whole batch, merged by "
            "log-sum-exp (fast, exact), except where that cannot be. `concatenated`: the plain way, for debugging."
        },
    )
    sliding_window: Literal["windowed", "pinned"] = field(
        default="windowed",
        metadata={
            "help": "What sliding-window layers make of the cartridge. `windowed`: its tokens leave the window as any "
            "token does, as with `past_key_values` in stock PEFT. `pinned`: they stay visible however long the "
            "conversation grows."
        },
    )
    recurrent_state: Literal["train", "initialize", "skip"] = field(
        default="train",
        metadata={
            "help": "What recurrent layers (linear attention, state spaces, convolutions), if the model has any, begin from. "
            "`train`: a state of the cartridge, which learns as its keys and values do. `initialize`: one that stays as it "
            "was initialized, what the text left. `skip`: nothing; the cartridge is in the attention layers alone, and "
            "layers that can hold none are left as they are instead of being refused."
        },
    )
    layer_shapes: list[list[int] | None] | None = field(
        default=None,
        metadata={
            "help": "Set by itself where the layers of the base model are not all of one shape: (num_key_value_heads, "
            "key_dim, value_dim) of each, null for a layer without any. The adapter is then saved with one tensor "
            "per layer, which stock PEFT cannot load."
        },
    )
    layer_states: list[dict[str, list[int]] | None] | None = field(
        default=None,
        metadata={
            "help": "Set by itself where recurrent layers begin from a state: the shape of each of its parts by name, null "
            "for a layer that has none. Stock PEFT cannot load such an adapter."
        },
    )
    layer_format: int | None = field(
        default=None, metadata={"help": "Version of the format with one tensor per layer; set with `layer_shapes`."}
    )
    quantization: Literal["int8", "int4", "fp8"] | None = field(
        default=None,
        metadata={
            "help": "How keys and values are kept in the file: `int8`, `int4` or `fp8`, a half or a third of the bytes of "
            "bfloat16; they are restored once, when the adapter is loaded. Stock PEFT cannot load such a file. None: "
            "as they are."
        },
    )
    num_virtual_tokens: int | None = field(default=None, metadata={"help": "The name of `num_tokens` in files."})
    token_dim: int | None = field(
        default=None, metadata={"help": "num_key_value_heads * head_dim; read off the model."}
    )
    num_layers: int | None = field(default=None, metadata={"help": "Number of layers; read off the model."})
    num_attention_heads: int | None = field(
        default=None, metadata={"help": "Number of key/value heads (stock PEFT's name for them); read off the model."}
    )
    num_transformer_submodules: int | None = field(default=1, metadata={"help": "Always 1: decoder-only models."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save with the cartridge."}
    )
    # What both names of the length said last. `dataclasses.replace` hands it to the copy, which so can tell the name
    # that was changed from the one that was carried along: stock PEFT changes `num_virtual_tokens` in this way.
    _length: int | None = field(default=None, repr=False, compare=False, metadata={"help": "Set by itself."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.CARTRIDGE
        self._read_from: str | None = None  # where its weights are to come from, until they are loaded
        # Set by the tuner from the model; PEFT's injection looks for it on every configuration.
        self.target_modules: set[str] | None = None
        if self.task_type is None:
            self.task_type = TaskType.CAUSAL_LM
        self._reconcile_lengths()
        for name, allowed in (
            ("attention", ("auto", "merged", "concatenated")),
            ("sliding_window", ("windowed", "pinned")),
            ("recurrent_state", ("train", "initialize", "skip")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}` must be one of {', '.join(allowed)}, got {getattr(self, name)!r}.")

        if self.quantization is not None:
            check_scheme(self.quantization)
        if self.layer_format not in (None, KEYS_AND_VALUES, WITH_STATES):
            raise ValueError(
                f"`layer_format` is {self.layer_format}, this version of peft-cartridges reads {KEYS_AND_VALUES} and "
                f"{WITH_STATES}: the adapter was saved by a newer one. Upgrade peft-cartridges."
            )

    def _reconcile_lengths(self) -> None:
        given = {name: getattr(self, name) for name in ("num_tokens", "num_virtual_tokens")}
        given = {name: value for name, value in given.items() if value is not None}
        if not given:
            raise ValueError(
                "`num_tokens` is missing: give the length of the cartridge, e.g. CartridgeConfig(num_tokens=512)."
            )
        for name, value in given.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"`{name}` must be a whole number of at least 0, got {value!r}.")
        if len(set(given.values())) > 1 and self._length is not None:
            given = {name: value for name, value in given.items() if value != self._length}
        if len(set(given.values())) > 1:
            raise ValueError(
                f"`num_tokens={self.num_tokens}` and `num_virtual_tokens={self.num_virtual_tokens}` disagree: give one."
            )
        self.num_tokens = self.num_virtual_tokens = self._length = next(iter(given.values()))
        if self.num_tokens == 0 and self.num_frozen_tokens == 1:
            self.num_frozen_tokens = 0  # the default, of no token
        frozen = self.num_frozen_tokens
        if not isinstance(frozen, int) or isinstance(frozen, bool) or not 0 <= frozen <= self.num_tokens:
            raise ValueError(
                f"`num_frozen_tokens` must be between 0 and `num_tokens` ({self.num_tokens}), got {frozen!r}."
            )

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str, subfolder: str | None = None, **kwargs: Any
    ) -> CartridgeConfig:
        """As PEFT's. Everything in PEFT that loads an adapter comes here first, so the weights beside the configuration
        are checked too, before a model is changed or memory taken for them. A configuration may also stand alone.

        Raises:
            ValueError: a field is out of its range, the weights are pickled only, damaged, or do not belong to the
                configuration.
        """
        name, hub_options = pretrained_model_name_or_path, cls._split_kwargs(kwargs)[0]
        config = super().from_pretrained(name, subfolder=subfolder, **kwargs)
        folder = Path(name, subfolder or "")
        if folder.is_dir():
            path, beside = folder / WEIGHTS_FILE, [file.name for file in folder.iterdir()]
        else:
            try:
                path, beside = Path(hf_hub_download(name, WEIGHTS_FILE, subfolder=subfolder, **hub_options)), []
            except LocalEntryNotFoundError:
                raise  # no connection
            except EntryNotFoundError:
                options = {option: hub_options.get(option) for option in ("revision", "repo_type", "token")}
                files = [Path(file) for file in HfApi().list_repo_files(name, **options)]
                path, beside = folder / WEIGHTS_FILE, [f.name for f in files if f.parent == Path(subfolder or "")]
        if path.is_file():
            read_prefix(path, config)
        elif isinstance(error := missing_weights(name, beside), ValueError):
            raise error
        config._read_from = str(folder)
        return config

    def check_shape(self) -> None:
        """Raises:
        ValueError: what a base model fills in is missing or out of its range; the message names the field.
        """
        if not self.num_tokens and self.layer_states is None:
            raise ValueError("`num_virtual_tokens` must be at least 1 where no layer has a state, got 0.")
        if self.layer_states is not None and self.layer_shapes is None:
            raise ValueError("`layer_states` is given without `layer_shapes`.")
        if self.layer_shapes is None:
            for name in ("num_layers", "num_attention_heads", "token_dim"):
                if type(value := getattr(self, name)) is not int or value < 1:
                    raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")
            if self.token_dim % self.num_attention_heads:  # type: ignore[operator]
                raise ValueError(f"`token_dim` ({self.token_dim}) is no multiple of `num_attention_heads`.")
            return
        shapes = self.layer_shapes
        held = [shape for shape in shapes if shape is not None] if isinstance(shapes, list) else None
        if held is None or not all(isinstance(shape, list) and len(shape) == 3 and _sizes(shape) for shape in held):
            raise ValueError("`layer_shapes` must be a list of [num_key_value_heads, key_dim, value_dim].")
        states = self.layer_states
        parts = [state for state in states if state is not None] if isinstance(states, list) else None
        if states is not None and not (
            parts
            and len(states) == len(shapes)
            and all(isinstance(part, dict) and part and all(map(_is_part, part.items())) for part in parts)
        ):
            raise ValueError("`layer_states` must be a list of {name: shape}, as long as `layer_shapes`.")
        if not held and not parts:
            raise ValueError("`layer_shapes` must be of at least one layer, or `layer_states`.")

    def check_window(self, model_config: Any) -> None:
        """Holds the length against the positions that a model has.

        Raises:
            ValueError: no position is left for a token behind the cartridge.
        """
        window = getattr(model_config, "max_position_embeddings", None)
        grows = "dynamic" in str(getattr(model_config, "rope_parameters", None))
        if type(window) is int and not grows and self.num_tokens is not None and self.num_tokens >= window:
            raise ValueError(
                f"`num_tokens={self.num_tokens}`, but the model has {window} positions (`max_position_embeddings`), and "
                f"the conversation needs some too: give at most {window - 1}, better far less."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as saved: stock PEFT's, and ours only where they differ from what stock PEFT would do."""
        fields = super().to_dict()
        del fields["num_tokens"], fields["_length"]
        return {name: value for name, value in fields.items() if name not in _OWN_FIELDS or value != _OWN_FIELDS[name]}


def _sizes(shape: Any) -> bool:
    return isinstance(shape, list) and bool(shape) and all(type(size) is int and size > 0 for size in shape)


def _is_part(named: tuple[Any, Any]) -> bool:
    """Whether it is a state's part as a file may name it: its name ends up in a tensor's and in a module's."""
    name, shape = named
    return isinstance(name, str) and name.isidentifier() and _sizes(shape)
