"""`cartridges info PATH_OR_NAME`: what a cartridge is, from its small files; no weights are loaded or fetched."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
from pathlib import Path

from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url
from huggingface_hub.errors import EntryNotFoundError

from ..adapter_folder import CONFIG_FILE, WEIGHTS_FILE, read_config
from ..gate import GATE_FILE
from ..hub import load_facts
from ..hub.card_facts import FACTS_FILE, CardFacts, gate_facts
from ..hub.model_card import is_hub_name
from ..hub_errors import hub_errors
from ..tuner import CartridgeConfig
from ..tuner.file_format import expected_tensors

_RECIPE = (
    "loss_type",
    "optimizer_steps",
    "learning_rate",
    "off_context_share",
    "initialization",
    "per_device_train_batch_size",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("cartridge", help="a folder, or a name on the Hub (user/name)")
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def run(args: argparse.Namespace) -> None:
    folder, num_bytes = _local(args.cartridge) if Path(args.cartridge).is_dir() else _on_the_hub(args)
    facts = dataclasses.replace(load_facts(folder), gate=gate_facts(folder))
    found = describe_cartridge(read_config(folder), facts, num_bytes)
    width = max(len(label) for label, _ in found) + 2
    for label, value in found:
        print(f"{label + ':':<{width}}{value}")


def describe_cartridge(config: CartridgeConfig, facts: CardFacts, num_bytes: int | None) -> list[tuple[str, str]]:
    """Pairs of a label and what stands behind it; what is not known is left out."""
    trained = f", {config.num_frozen_tokens:,} of them frozen" if config.num_frozen_tokens else ""
    corpus = [
        facts.corpus_name,
        facts.corpus_tokens and f"{facts.corpus_tokens:,} tokens",
        facts.corpus_tokens and config.num_tokens and f"{facts.corpus_tokens / config.num_tokens:.1f} times as long",
    ]
    numbers = config.quantization or _kind_of_numbers(config, num_bytes)
    kind = f" ({numbers})" if numbers else ""
    sizes = [
        num_bytes and f"{num_bytes / 1e6:,.2f} MB in its file{kind}",
        facts.kv_bytes and f"{facts.kv_bytes / 1e6:,.2f} MB in memory when it is served",
    ]
    kinds = ", ".join(f"{name} {number:,}" for name, number in facts.seed_types.items())
    conversations = facts.num_conversations and f"{facts.num_conversations:,}" + (f" ({kinds})" if kinds else "")
    recipe = ", ".join(f"{name} {facts.recipe[name]}" for name in _RECIPE if name in facts.recipe)
    base = facts.base_model or config.base_model_name_or_path
    gate = (
        facts.gate and f"rejects {facts.gate.general_rejected:.0%} of {facts.gate.num_general:,} requests off the text"
    )
    found = [
        ("base model", "@".join(filter(None, (base, facts.base_model_revision and facts.base_model_revision[:12])))),
        ("tokens", f"{config.num_tokens or 0:,}{trained}"),
        ("states", _states(config)),
        ("size", ", ".join(str(size) for size in sizes if size)),
        ("corpus", ", ".join(str(part) for part in corpus if part)),
        ("conversations", conversations),
        ("recipe", recipe),
        *((f"{metric.type or metric.name}", _measured(metric.value, metric.note)) for metric in facts.metrics),
        ("gate", gate),
        ("parts", ", ".join(part.name for part in facts.parts)),
        ("licence", facts.license),
    ]
    return [(label, str(value)) for label, value in found if value]


def _kind_of_numbers(config: CartridgeConfig, num_bytes: int | None) -> str | None:
    """By the size of the file, whose header is small beside its numbers."""
    numbers = sum(math.prod(form.shape) for _, form in expected_tensors(config))
    return {4: "float32", 2: "16-bit floats"}.get(num_bytes // numbers) if num_bytes and numbers else None


def _states(config: CartridgeConfig) -> str:
    held = [state for state in config.layer_states or () if state is not None]
    numbers = sum(math.prod(shape) for state in held for shape in state.values())
    how = "" if config.recurrent_state == "train" else ", not trained"
    return f"of {len(held)} recurrent layers, {numbers:,} numbers{how}" if held else ""


def _measured(value: float, note: str | None) -> str:
    return f"{value:.4g}" + (f" ({note})" if note else "")


def _local(name: str) -> tuple[Path, int | None]:
    weights = Path(name) / WEIGHTS_FILE
    return Path(name), weights.stat().st_size if weights.is_file() else None


def _on_the_hub(args: argparse.Namespace) -> tuple[Path, int | None]:
    name = args.cartridge
    if not is_hub_name(name):
        raise ValueError(f"{name!r} is neither a folder nor a name on the Hub (`user/name`).")
    with hub_errors(name, args.revision):
        config = hf_hub_download(name, CONFIG_FILE, revision=args.revision)
        for file in (FACTS_FILE, GATE_FILE):
            with contextlib.suppress(EntryNotFoundError):  # stock PEFT and other tools write none
                hf_hub_download(name, file, revision=args.revision)
        weights = get_hf_file_metadata(hf_hub_url(name, WEIGHTS_FILE, revision=args.revision))
    return Path(config).parent, weights.size
