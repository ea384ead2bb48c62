"""What tells a model and a tokenizer from others, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import PureWindowsPath
from typing import Any

from peft import PeftModel
from torch.distributed.tensor import DTensor

from .chat import get_tokenizer

# At least so many numbers of a weight take part in the fingerprint, if it has them.
_SIGNS = 4096


def model_fingerprint(model: Any) -> str:
    """A hash over the base model's shapes and the signs of some thousand numbers of every weight. It is the same in
    every dtype, since rounding keeps a number's sign, also of what it rounds to zero; digits would differ where one
    dtype was rounded to by way of another. Training, even a little, turns the signs of numbers near zero."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    digest = hashlib.sha256()
    for name, parameter in model.state_dict().items():
        if "kv_prefix_" in name or "lora_" in name or parameter.device.type == "meta":
            continue
        if isinstance(parameter, DTensor):  # sharded over processes, all of which come here
            parameter = parameter.full_tensor()
        step = parameter.numel() // _SIGNS | 1  # odd: not down one column of a matrix
        sample = parameter.detach().reshape(-1)[::step]
        if parameter.is_floating_point():
            sample = sample.float().signbit()
        digest.update(str(tuple(parameter.shape)).encode() + sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def tokenizer_fingerprint(processing_class: Any) -> str:
    """sha256 over vocabulary and chat template."""
    tokenizer = get_tokenizer(processing_class)
    content = json.dumps([sorted(tokenizer.get_vocab().items()), str(getattr(tokenizer, "chat_template", None))])
    return hashlib.sha256(content.encode()).hexdigest()


def public_name(name: str) -> str:
    """What a model may be called elsewhere: its name on the Hub or at a server; of a folder of this machine the last
    part alone."""
    is_path = name.startswith((".", "~")) or "\\" in name or name.count("/") > 1 or os.path.isabs(name)
    if not (is_path or os.path.isdir(name)):
        return name
    return PureWindowsPath(os.path.abspath(os.path.expanduser(name))).name  # that kind knows both separators
