"""The model card that a trainer writes beside its cartridge: what it knows, and nothing of the corpus's text."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import os
import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datasets import Dataset

from ..adapter_folder import CONFIG_FILE, read_cartridge
from ..chat import get_tokenizer
from ..conversations import read_provenance
from ..hub import CardFacts, Metric, save_facts, write_model_card
from ..hub.base_license import read_base_license
from ..hub.card_facts import gate_facts
from ..hub.memory_figure import add_memory_figure
from ..hub.model_card import is_edited
from ..hub.push import complete_facts, state_bytes
from ..model_identity import public_name
from .training_curve import FILE_NAME

if TYPE_CHECKING:
    from .self_study_trainer import SelfStudyTrainer

_RECIPE = (
    "loss_type", "loss_temperature", "prompt_loss_weight", "on_policy_fraction", "resample_every", "learning_rate",
    "key_learning_rate", "value_learning_rate", "lr_scheduler_type", "warmup_steps", "max_grad_norm", "ema_decay",
    "off_context_share", "budget", "per_device_train_batch_size", "gradient_accumulation_steps", "adam_beta1", "adam_beta2", "seed",
)  # fmt: skip
_LENGTH = ("max_steps", "num_train_epochs", "num_conversations", "num_eval_conversations", "initialization")
_SYNTHESIS = (
    "seed_types", "recitation_share", "conversations_per_chunk", "min_chunk_tokens", "max_chunk_tokens", "num_rounds",
    "question_temperature", "answer_temperature", "teacher_targets", "thoughts",
    "default_system_prompt",
)  # fmt: skip
# Metric of `evaluate` -> its name for people, and what it was measured on.
_METRICS = {
    "eval_gold_gap_closed": ("Share of the in-context gap closed", "gold questions"),
    "eval_gold_nll": ("Gold-answer NLL (nats per token)", "gold questions"),
    "eval_conversation_gap_closed": ("Share of the in-context gap closed", "held-out conversations"),
    "eval_loss": ("KL from the teacher (nats per token)", "held-out conversations"),
}


def write_run_card(trainer: SelfStudyTrainer, folder: str, **changes: Any) -> None:
    """Writes `README.md`, `cartridge.json` and (with `args.plot`) the figure of the memory into the folder of the saved
    adapter; the main process only. A card that someone edited stays.

    Args:
        trainer: The trainer.
        folder: The adapter's folder.
        changes: Fields of `CardFacts` that are to be otherwise.
    """
    if not trainer.is_world_process_zero() or not os.path.isfile(os.path.join(folder, CONFIG_FILE)):
        return
    config, prefix = read_cartridge(folder)
    model = trainer.accelerator.unwrap_model(trainer.model)
    facts = complete_facts(dataclasses.replace(_facts(trainer, folder), **changes), config, prefix, model)
    for name in (config.base_model_name_or_path, facts.base_model):
        facts.base_model_license = facts.base_model_license or read_base_license(name, facts.base_model_revision)
    if facts.corpus_tokens and facts.kv_bytes and config.num_tokens:
        states = state_bytes(prefix)  # of one size, however long the text is
        facts.in_context_kv_bytes = states + (facts.kv_bytes - states) // config.num_tokens * facts.corpus_tokens
    if is_edited(folder):
        save_facts(facts, folder)
        return
    write_model_card(add_memory_figure(facts, folder) if trainer.args.plot else facts, folder)


def _facts(trainer: SelfStudyTrainer, folder: str) -> CardFacts:
    args = trainer.args
    data: Any = trainer.train_dataset
    study = trainer.study
    origin = (study.identity if study is not None else None) or read_provenance(data)
    corpus, report = origin.get("corpus", {}), read_provenance(data).get("report", {})
    text, tokens, digest = trainer.corpus, None, corpus.get("sha256")
    if text is not None:
        tokens = len(get_tokenizer(trainer.processing_class)(text, add_special_tokens=False)["input_ids"])
        digest = hashlib.sha256(text.encode()).hexdigest()  # what `sha256sum` says of the file
    recipe = {name: value for name in _RECIPE if (value := getattr(args, name)) is not None}
    recipe["lr_scheduler_type"] = getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type)
    recipe["optimizer_steps"] = trainer.state.global_step
    recipe |= {name: value for name, value in origin.get("synthesis", {}).items() if name in _SYNTHESIS}
    known = hasattr(data, "__len__") and (study is None or study.is_written)
    learned: Any = trainer._data.learned(data) if known else None
    general = trainer._data.num_off_context(data) if known else None
    if general == 0:  # whatever share was asked for
        recipe["off_context_share"] = 0.0
    typed = isinstance(learned, Dataset) and "seed_type" in learned.column_names
    return CardFacts(
        repo_id=getattr(trainer, "hub_model_id", None),
        corpus_name=corpus.get("name"),
        corpus_tokens=tokens,
        corpus_sha256=digest,
        recipe=recipe,
        num_conversations=len(learned) if known else None,
        off_context_conversations=general,
        seed_types=dict(Counter(learned["seed_type"])) if typed else {},
        filters=report.get("dropped", {}),
        metrics=_metrics(trainer),
        training_curve=FILE_NAME if (Path(folder) / FILE_NAME).is_file() else None,
        base_model=args.finetuned_from,
        base_identity=trainer.base_identity,
        license=args.license,
        language=args.language or [],
        gate=gate_facts(folder),
        datasets=trainer.hub_datasets,
    )


def _metrics(trainer: SelfStudyTrainer) -> list[Metric]:
    """Of the last evaluation."""
    found: dict[str, Any] = {}
    for entry in trainer.state.log_history:
        found |= {name: value for name, value in entry.items() if name.startswith("eval_")}
    note = None
    if "eval_gold_nll_full_context" in found:
        none, full = found["eval_gold_nll_no_context"], found["eval_gold_nll_full_context"]
        note = f"{none:.3f} without context, {full:.3f} with the text in context"
    return [
        Metric(
            label,
            round(float(found[name]), 4),
            dataset=dataset,
            type=name.removeprefix("eval_"),
            command=_command(trainer),
            note=note if name == "eval_gold_nll" else None,
        )
        for name, (label, dataset) in _METRICS.items()
        # A share of a gap that is not there is NaN, which neither JSON nor the Hub takes.
        if name in found and math.isfinite(found[name])
    ]


def _command(trainer: SelfStudyTrainer) -> str:
    """The call of `cartridges train` that such a run takes: what was set of `_RECIPE`, `_SYNTHESIS` and the run's
    length, and names instead of paths; of nothing else, since settings may hold keys, addresses and texts."""
    args: Any = trainer.args
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    corpus = (trainer.study.identity if trainer.study is not None else None) or read_provenance(trainer.train_dataset)
    name = Path(corpus.get("corpus", {}).get("name") or "").name
    sources = [f"hf://datasets/{one}" for one in trainer.hub_datasets] or [name if Path(name).suffix else "CORPUS"]
    words = ["cartridges", "train", *sources]
    base = args.finetuned_from or model.active_peft_config.base_model_name_or_path
    words += ["--model", public_name(base) if base else "MODEL"]
    words += ["--num-tokens", str(model.active_peft_config.num_tokens)]
    words += ["--output-dir", Path(os.path.abspath(args.output_dir or ".")).name]
    for field in dataclasses.fields(args):
        factory = field.default_factory
        default = field.default if factory is dataclasses.MISSING else factory()
        value, shown = getattr(args, field.name), field.name in {*_RECIPE, *_SYNTHESIS, *_LENGTH}
        if shown and value is not None and value != default:
            values = value if isinstance(value, list) else [getattr(value, "value", value)]
            words += [f"--{field.name.replace('_', '-')}", *map(str, values)]
    return shlex.join([*words, *(["--gold-questions", "QUESTIONS"] if trainer.has_gold_questions else [])])
