"""What writes the conversations. The engines' packages are imported when an engine of theirs is made.

A new engine is a file with a subclass of `Engine`, and a row in `ENGINES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from .engine import Engine, EngineError, Generation, Outcome, Request
from .openai import OpenAIEngine
from .transformers import ContextPrefixes, TransformersEngine
from .vllm import VLLMEngine

if TYPE_CHECKING:
    from ..synthesis_config import SynthesisConfig

__all__ = [
    "ENGINES",
    "ContextPrefixes",
    "Engine",
    "EngineError",
    "Generation",
    "OpenAIEngine",
    "Outcome",
    "Request",
    "TransformersEngine",
    "VLLMEngine",
    "check_engines",
    "make_engines",
]


def _transformers(args: SynthesisConfig, model: Any, processing_class: Any, top_k: int) -> list[Engine]:
    if model is None:
        raise ValueError("`model` is missing: pass a causal LM, or set `engine` to `openai` or `vllm`.")
    batch_size, refill = args.generation_batch_size, args.refill_finished_rows
    return [TransformersEngine(model, processing_class, batch_size=batch_size, refill=refill)]


def _vllm(args: SynthesisConfig, model: Any, processing_class: Any, top_k: int) -> list[Engine]:
    options = args.get_engine_options()
    name = args.engine_model or str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if not name:
        raise ValueError("`engine_model` is missing: name the model that vLLM is to load.")
    return [VLLMEngine(name, processing_class, top_k=top_k, **options)]


def _openai(args: SynthesisConfig, model: Any, processing_class: Any, top_k: int) -> list[Engine]:
    name = args.engine_model or str(getattr(getattr(model, "config", None), "_name_or_path", ""))
    if not name:
        raise ValueError("`engine_model` is missing: what is the model called at the server?")
    options: dict[str, Any] = {
        "top_k": top_k,
        "concurrency": args.concurrency,
        "max_retries": args.max_retries,
        "token_ids": args.server_token_ids,
        **args.get_engine_options(),
    }
    return [OpenAIEngine(url, name, processing_class, **options) for url in args.base_url]


# `SynthesisConfig.engine` -> what makes its engines (one or many) of the settings, the model if there is one here, its
# tokenizer, and how many log-probabilities are wanted of each token.
ENGINES: dict[str, Callable[[SynthesisConfig, Any, Any, int], list[Engine]]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "openai": _openai,
}


def make_engines(args: SynthesisConfig, model: Any, processing_class: Any, *, top_k: int = 0) -> list[Engine]:
    """The engines that the settings name.

    Raises:
        ValueError: a package is not installed, or something is missing.
    """
    return ENGINES[args.engine](args, model, processing_class, top_k)


def check_engines(engines: Sequence[Engine]) -> None:
    """Whether a run can begin. One engine of several that is not there is no hindrance: the others do its work.

    Raises:
        EngineError: none of them can be reached.
    """
    with ThreadPoolExecutor(len(engines)) as pool:
        reasons = [reason for reason in pool.map(lambda engine: engine.unreachable(), engines) if reason]
    if len(reasons) == len(engines):
        raise EngineError(f"`base_url`: {'; '.join(reasons)}. Start it (`vllm serve MODEL`), or give another address.")
