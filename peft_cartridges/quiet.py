"""A command shows what it does, and not what the libraries below it have to say to their developers."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path


def quiet_libraries() -> None:
    """Leaves of the warnings this package's own, a line each. `CARTRIDGES_VERBOSE=1` leaves all as they are."""
    if os.environ.get("CARTRIDGES_VERBOSE", "0") not in ("", "0"):
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "torch",
        "torch.utils._pytree",  # torch resets the level of its own logger when it is imported
        "torchao",
        "bitsandbytes",
        "transformers",
        "datasets",
        "accelerate",
        "huggingface_hub",
        "trl",
    ):
        logging.getLogger(name).setLevel(logging.ERROR)
    own = logging.getLogger("peft_cartridges")
    if not own.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("note: %(message)s"))
        own.addHandler(handler)
        own.propagate = False


def is_command() -> bool:
    """Whether this process is the `cartridges` command (or `python -m peft_cartridges`), not a program that imports the
    package: the libraries speak while the package is imported, before the command's own code is."""
    started = sys.argv[0] if getattr(sys, "argv", None) else ""
    if started == "-m":  # while the package of `python -m` is imported
        words = sys.orig_argv
        return "-m" in words and words[words.index("-m") + 1 :][:1] == [__package__]
    return Path(started).name == "cartridges"
