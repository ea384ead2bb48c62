"""A command shows what it does, and not what the libraries below it have to say to their developers."""

from __future__ import annotations

import logging
import os
import warnings


def quiet_libraries() -> None:
    """Leaves of the warnings this package's own, a line each. `CARTRIDGES_VERBOSE=1` leaves all as they are."""
    if os.environ.get("CARTRIDGES_VERBOSE", "0") not in ("", "0"):
        return
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for name in (
        "torch",
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
