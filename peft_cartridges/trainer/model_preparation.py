"""The model that is trained: loaded by name if need be, whole, quantized or in shares, with a cartridge."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..attention.probe import get_text_config
from ..hidden_states import forward_hidden_states
from ..kv_prefix import evaluating
from ..tuner import CartridgeConfig, CartridgeModel
from .self_study_config import SelfStudyConfig

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer

logger = logging.getLogger(__name__)


def check_distribution(args: SelfStudyConfig) -> None:
    """Raises:
    ValueError: the processes are to share the work in a way that does not go with a cartridge; before anything is
        loaded.
    """
    shards = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
    by_accelerate = shards and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3"
    own = getattr(args, "hf_deepspeed_config", None)
    if by_accelerate or (own is not None and own.is_zero3()):
        raise ValueError(
            "DeepSpeed's ZeRO-3 is not supported: it takes the weights apart that the teacher, the output head and the "
            "cartridge read. Use ZeRO-2, or `shard_model=True` (FSDP 2) for a model larger than one device."
        )
    if args.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ValueError(
            "FSDP by accelerate's configuration (or `fsdp`) is not supported: it shards a model that each process has "
            "loaded, the cartridge too. Set `shard_model=True` instead, and start the processes without it "
            "(`accelerate launch --multi_gpu --num_processes N …`)."
        )
    if args.shard_model and args.world_size < 2:
        raise ValueError(
            "`shard_model=True` needs several processes: start with `accelerate launch --num_processes N …`, or set it "
            "to False."
        )


def check_settings(trainer: SelfStudyTrainer) -> None:
    """Raises:
    ValueError: settings do not go with the device or the data, now that they are there.
    """
    args, dataset = trainer.args, trainer.train_dataset
    if args.use_liger_kernel and args.device.type != "cuda":
        raise ValueError(f"`use_liger_kernel=True` needs a CUDA device, this is {args.device.type}: set it to False.")
    sharded = "`shard_model`" if is_sharded(trainer.model) else "DeepSpeed" if trainer.is_deepspeed_enabled else None
    if sharded is None:
        return
    remedy = "split the weights or their states, while each process would be at another place of the model"
    names = ["on_policy_fraction", "prompt_loss_weight", *(["ema_decay"] if sharded == "DeepSpeed" else [])]
    for name in names:
        if getattr(args, name):
            raise ValueError(f"`{name}` does not go with {sharded}: {remedy}. Use DDP, or set it to 0.")
    if args.budget is not None:
        raise ValueError(
            f"`budget` does not go with {sharded}: no step can be measured before training. Set `max_steps`."
        )
    if sharded == "`shard_model`" and (trainer.study is not None or trainer._data.is_live(dataset)):
        raise ValueError(
            "`shard_model=True` needs conversations with the teacher's targets as `train_dataset`: writing and "
            "scoring them needs the whole model in each process. Make them first with `cartridges synthesize`."
        )


def load_base_model(
    name: str, args: SelfStudyConfig, quantization_config: Any = None, processing_class: Any = None
) -> tuple[Any, Any]:
    """A model by name, and its tokenizer.

    Args:
        name: On the Hub, or a folder.
        args: `model_init_kwargs` and `shard_model` count.
        quantization_config: As `from_pretrained` takes it.
        processing_class: Instead of the tokenizer that is there.
    """
    given = args.model_init_kwargs or {}
    options = {"dtype": "auto", **(json.loads(given) if isinstance(given, str) else given)}
    if quantization_config is not None:
        options["quantization_config"] = quantization_config
    if options.get("quantization_config") is not None:  # such weights cannot be moved afterwards
        if args.device.type == "cpu" and getattr(options["quantization_config"], "load_in_4bit", False):
            raise ValueError(
                "A base model in 4 bits cannot be trained behind on a CPU: bitsandbytes (0.50) repacks its weights when they "
                "generate, and gives no gradient through them afterwards. Load it in 8 bits, or use a GPU."
            )
        options.setdefault("device_map", {"": args.device})
    if args.shard_model:
        options.setdefault("distributed_config", {"fsdp_size": args.world_size})
        if args.save_strategy != "no" and not args.save_only_model:
            logger.warning(
                "`shard_model=True`: checkpoints hold the cartridge and not the optimizer (`save_only_model=True`), "
                "because transformers resumes no sharded model."
            )
            args.save_only_model = True
    tokenizer_options = {key: options[key] for key in ("revision", "trust_remote_code") if key in options}
    processing_class = processing_class or AutoTokenizer.from_pretrained(name, **tokenizer_options)
    return AutoModelForCausalLM.from_pretrained(name, **options), processing_class


def add_cartridge(
    model: Any, args: SelfStudyConfig, peft_config: CartridgeConfig | None, *, begins_at_random: bool
) -> PeftModel:
    """The model with a cartridge.

    Args:
        model: A causal LM, or a PEFT model that has one already.
        args: `seed` counts.
        peft_config: The cartridge to make.
        begins_at_random: Whether nothing will be put into a new cartridge. Its first tokens are then trained as well:
            frozen noise would be an attention sink for good.

    Raises:
        ValueError: the model has no cartridge and none is configured, or has one and another is configured.
    """
    if isinstance(model, PeftModel):
        if not isinstance(model.base_model, CartridgeModel):
            raise ValueError(
                f"`model` is a PEFT model without a cartridge (its tuner is a {type(model.base_model).__name__}): pass "
                "the base model and `peft_config=CartridgeConfig(num_tokens=…)`."
            )
        if peft_config is not None:
            raise ValueError("`model` has a cartridge already: leave `peft_config` out, or pass the base model.")
        return model
    if peft_config is None:
        raise ValueError("`peft_config` is missing: pass `CartridgeConfig(num_tokens=…)`, or a model with a cartridge.")
    if begins_at_random:
        logger.warning(
            "The cartridge begins at random, because there is no text to initialize it from: pass `corpus`, or "
            "conversations with a `context` column. All of its tokens are trained, the first ones too."
        )
        peft_config = replace(peft_config, num_frozen_tokens=0)
    if is_sharded(model):
        # The look at its attention layers leaves gathered copies of weights behind: PEFT would freeze those.
        model.requires_grad_(False)
    set_seed(args.seed)
    return get_peft_model(model, peft_config)


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Whether rows that are laid end to end stay apart in the model; two short ones show it.

    Raises:
        ValueError: they see each other.
    """
    device = model.get_input_embeddings().weight.device
    rows = [torch.arange(1, 6, device=device)[None], torch.arange(5, 0, -1, device=device)[None]]
    positions = torch.arange(5, device=device)[None]
    with evaluating(model):
        apart = torch.cat([forward_hidden_states(model, input_ids=row) for row in rows], dim=1)
        packed = torch.cat([positions, positions], dim=1)
        together = forward_hidden_states(model, input_ids=torch.cat(rows, dim=1), position_ids=packed)
    if (together - apart).abs().max() > 0.1 * apart.std():  # rounding stays far below, another row's tokens do not
        config = get_text_config(model)
        raise ValueError(
            f"`padding_free=True`: with `attn_implementation={config._attn_implementation!r}`, a {config.model_type} model "
            "does not keep rows apart that are laid end to end. Set it to False, or use flash attention."
        )


def is_sharded(model: Any) -> bool:
    """Whether the weights were split over the processes when they were loaded (`shard_model`)."""
    return bool(getattr(model, "is_distributed_loading_by_transformers", False))


def adapter_state(model: Any) -> dict[str, Tensor] | None:
    """Of a sharded model, what is to be saved: PEFT (0.21) would gather the base model's weights too, whole, in every
    process, only to leave them out. `None` for other models: PEFT looks for itself."""
    if not is_sharded(model):
        return None
    state = model.state_dict()
    return {n: value for n, value in state.items() if not isinstance(value, DTensor) or ".modules_to_save." in n}
