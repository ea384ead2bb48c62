"""The model card of a cartridge: metadata that the Hub indexes, and a body that a person can use."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..atomic_files import write_text
from .card_facts import CardFacts, Metric, Part, save_facts

__all__ = ["CARD_TAGS", "CardFacts", "Metric", "Part", "build_model_card", "write_model_card"]

# Every cartridge's card has these; `list_cartridges` looks for the first.
CARD_TAGS = ("cartridge", "kv-cache", "self-study")

# Marks a card that may be written anew. Someone who edits a card removes the line.
GENERATED_CARD = (
    "<!-- This card is written from cartridge.json when the cartridge is saved or pushed. Remove this line to keep "
    "your own changes. -->"
)

# What PEFT's `save_pretrained` writes, before anyone fills it in.
_UNTOUCHED_TEMPLATE = "<!-- Provide a quick summary of what the model is/does. -->"

_USAGE = """\
```python
from peft_cartridges import load_cartridge
from transformers import pipeline

model, tokenizer = load_cartridge({name})
ask = pipeline("text-generation", model=model, tokenizer=tokenizer)
print(ask([{{"role": "user", "content": {question}}}])[0]["generated_text"][-1]["content"])
```

The files are stock [PEFT](https://github.com/huggingface/peft)'s: `PeftModel.from_pretrained(base_model, {name})` \
loads them too, with `peft-cartridges` installed or without."""


def build_model_card(facts: CardFacts) -> ModelCard:
    """The card of a cartridge, with only what `facts` know.

    Metadata: `library_name: peft`, `base_model` (where it is a name on the Hub), the tags of `CARD_TAGS`, licence,
    language, data sets, and the metrics as evaluation results (`model-index`). Body: usage, evaluation, parts of a
    composition, how it was made, limits, versions.
    """
    title = facts.title or (f"Cartridge of {facts.corpus_name}" if facts.corpus_name else "A cartridge")
    base = facts.base_model if facts.base_model and is_hub_name(facts.base_model) else None
    tags = [*CARD_TAGS, "transformers", *(["composition"] if facts.parts else []), *facts.tags]
    if base is not None:
        tags.append(f"base_model:adapter:{base}")
    data = ModelCardData(
        base_model=base,
        library_name="peft",
        pipeline_tag="text-generation",
        license=facts.license,
        language=facts.language or None,
        datasets=facts.datasets or None,
        tags=list(dict.fromkeys(tags)),
        model_name=(facts.repo_id or _one_line(title)) if facts.metrics else None,
        eval_results=[_eval_result(metric, facts) for metric in facts.metrics] or None,
        base_model_relation=None if base is None else "adapter",
    )
    sections = [
        f"{GENERATED_CARD}\n\n# {_text(title)}\n\n{_summary(facts)}",
        _overview(facts),
        _usage(facts),
        _evaluation(facts),
        _parts(facts),
        _making(facts),
        _limits(facts),
        _versions(facts),
    ]
    body = "\n\n".join(section for section in sections if section)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{body}\n")


def write_model_card(facts: CardFacts, folder: str | Path) -> Path:
    """Writes `README.md` and `cartridge.json` into an adapter's folder.

    Call it after `save_pretrained`: PEFT writes a card of its own there, and this one takes its place. Where PEFT saves
    into the folder again later, it keeps this card's text and only drops the tags that it does not know, unless the
    base model was given them (`base_model.add_model_tags(CARD_TAGS)`).
    """
    path = Path(folder) / "README.md"
    write_text(path, str(build_model_card(facts)))
    save_facts(facts, folder)
    return path


def is_edited(folder: str | Path) -> bool:
    """Whether the card in a folder is someone's own: neither PEFT's empty template nor this package's."""
    path = Path(folder) / "README.md"
    card = path.read_text(encoding="utf-8") if path.exists() else _UNTOUCHED_TEMPLATE
    return GENERATED_CARD not in card and _UNTOUCHED_TEMPLATE not in card


def is_hub_name(name: str) -> bool:
    """Whether `name` can be the name of a repository on the Hub, and is no folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def size_text(number: int) -> str:
    """A number of bytes for people."""
    unit, size = next((found for found in (("GiB", 2**30), ("MiB", 2**20)) if number >= found[1]), ("KiB", 2**10))
    return f"{number / size:,.1f} {unit}"


# -- sections ----------------------------------------------------------------------------------------------------------


def _summary(facts: CardFacts) -> str:
    length = f" of {facts.num_tokens:,} tokens" if facts.num_tokens else ""
    base = f" for {_link(facts.base_model)}" if facts.base_model else ""
    if facts.parts:
        return (
            f"A **cartridge**{length}{base}: {len(facts.parts)} cartridges joined into one, so that the model answers "
            "about all of their texts."
        )
    corpus = f"{_text(facts.corpus_name)}" if facts.corpus_name else "a text"
    tokens = f" ({facts.corpus_tokens:,} tokens)" if facts.corpus_tokens else ""
    return (
        f"A **cartridge**{length}{base}: a small trained KV cache that stands in for {corpus}{tokens}. With it loaded, "
        "the model answers as if the text were in its context, at a fraction of the memory."
    )


def _overview(facts: CardFacts) -> str:
    rows: list[tuple[str, str]] = []
    if facts.base_model:
        revision = f" at revision `{_code(facts.base_model_revision)}`" if facts.base_model_revision else ""
        licence = f", under the licence `{_code(facts.base_model_license)}`" if facts.base_model_license else ""
        rows.append(("Base model", _link(facts.base_model) + revision + licence))
    if facts.num_tokens:
        frozen = f", of which {facts.num_frozen_tokens} not trained" if facts.num_frozen_tokens else ""
        ratio = f" ({facts.corpus_tokens / facts.num_tokens:.1f} times shorter)" if facts.corpus_tokens else ""
        rows.append(("Length", f"{facts.num_tokens:,} tokens{frozen}{ratio}"))
    if facts.kv_bytes:
        whole = f"; the text in context: {size_text(facts.in_context_kv_bytes)}" if facts.in_context_kv_bytes else ""
        rows.append(("Memory", size_text(facts.kv_bytes) + whole))
    if facts.gate:
        rejected = f"{facts.gate.general_rejected:.0%} of {facts.gate.num_general:,} requests off the text"
        rows.append(("Gate (`gate.safetensors`)", f"knows {facts.gate.words:,} words of the text; rejects {rejected}"))
    if facts.corpus_sha256:
        rows.append(("SHA-256 of the text", f"`{_code(facts.corpus_sha256)}`"))
    figure = _image("Memory, against the text in context", facts.memory_figure)
    return "\n\n".join(filter(None, [_table(("", ""), rows), figure]))


def _usage(facts: CardFacts) -> str:
    name, question = facts.repo_id or "path/to/this/folder", facts.question or "What is the text about?"
    return "## Use\n\n" + _USAGE.format(name=_quoted(name), question=_quoted(question))


def _evaluation(facts: CardFacts) -> str:
    figure = _image("Training curve", facts.training_curve)
    if not facts.metrics and not figure:
        return ""
    rows = [(_text(m.name), _text(m.dataset), f"{m.value:.4g}", _text(m.note or "")) for m in facts.metrics]
    commands = list(dict.fromkeys(metric.command for metric in facts.metrics if metric.command))
    shown = "Measured with\n\n" + _fenced("\n".join(commands)) if commands else ""
    table = _table(("Metric", "Measured on", "Value", "Compared with"), rows)
    return "\n\n".join(filter(None, ["## Evaluation", table, shown, figure]))


def _parts(facts: CardFacts) -> str:
    if not facts.parts:
        return ""
    rows = []
    for number, part in enumerate(facts.parts, start=1):
        revision = f" at `{_code(part.revision)}`" if part.revision else ""
        metrics = "; ".join(f"{metric.name} on {metric.dataset}: {metric.value:.4g}" for metric in part.metrics)
        tokens = "" if part.num_tokens is None else f"{part.num_tokens:,}"
        rows.append((str(number), _link(part.name) + revision, _text(part.corpus_name or ""), tokens, _text(metrics)))
    table = _table(("", "Cartridge", "Text", "Tokens", "On its own"), rows)
    return "\n\n".join(filter(None, ["## Parts, in order", table, _text(facts.composition_rule or "")]))


def _making(facts: CardFacts) -> str:
    lines = []
    if facts.num_conversations:
        off_context = facts.off_context_conversations or 0
        seeds = ", ".join(f"{_text(name)} {number:,}" for name, number in facts.seed_types.items())
        beside = f" and {off_context:,} about nothing in it, so that it leaves the rest alone" if off_context else ""
        number = facts.num_conversations - off_context
        lines.append(f"{number:,} conversations about the text{beside}{f' ({seeds})' if seeds else ''}.")
    if facts.filters:
        dropped = ", ".join(f"{_text(name)} {number:,}" for name, number in facts.filters.items())
        lines.append(f"Dropped on the way: {dropped}.")
    recipe = _table(("Setting", "Value"), [(_text(key), f"`{_code(value)}`") for key, value in facts.recipe.items()])
    if not lines and not recipe:
        return ""
    method = (
        "[Self-study](https://huggingface.co/papers/2506.06266): the model asks and answers questions about the text "
        "with the text in context, and the cartridge is trained to give the same next-token distributions."
    )
    return "\n\n".join(filter(None, ["## How it was made", method, " ".join(lines), recipe]))


def _limits(facts: CardFacts) -> str:
    limits = [
        "It works with its own base model only: keys and values of one model mean nothing to another.",
        "It holds the gist of its text, not a copy of it: check exact quotes and numbers against the source.",
        *facts.limits,
    ]
    return "## Limits\n\n" + "\n".join(f"- {_text(limit)}" for limit in limits)


def _versions(facts: CardFacts) -> str:
    # Heading and first line are those that PEFT looks for, so that it does not add them again.
    if not facts.package_versions:
        return ""
    names = {"peft": "PEFT"}
    lines = [f"- {names.get(name, _text(name))} {_text(version)}" for name, version in facts.package_versions.items()]
    return "### Framework versions\n\n" + "\n".join(lines)


def _eval_result(metric: Metric, facts: CardFacts) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        task_name="Questions about a text",
        dataset_type=_slug(metric.dataset),
        dataset_name=_one_line(metric.dataset),
        dataset_revision=facts.corpus_sha256,
        metric_type=metric.type or _slug(metric.name),
        metric_name=_one_line(metric.name),
        metric_value=metric.value,
    )


# -- Markdown, from text that may hold anything ------------------------------------------------------------------------


def _one_line(text: Any) -> str:
    return " ".join(str(text).split())


def _text(text: Any) -> str:
    """A text in one line that cannot start markup, a table's cell or HTML."""
    return re.sub(r"([\\`*\[\]<>|])", r"\\\1", _one_line(text))


def _code(text: Any) -> str:
    """For inside of backticks."""
    return _one_line(text).replace("`", "'").replace("|", "¦")


def _quoted(text: str) -> str:
    """A Python string literal that cannot end the block of code it stands in."""
    return json.dumps(_one_line(text), ensure_ascii=False).replace("`", "\\x60")


def _link(name: str) -> str:
    """To its page on the Hub; folders of this machine are called by their last name alone."""
    on_the_hub = "/" in name and is_hub_name(name)
    return f"[{_text(name)}](https://huggingface.co/{name})" if on_the_hub else f"`{_code(Path(name).name)}`"


def _image(alt: str, file_name: str | None) -> str:
    """An image beside the card; the Hub shows only plain relative names."""
    if not file_name:
        return ""
    if not re.fullmatch(r"[\w-][\w.-]*", file_name):
        raise ValueError(f"{file_name!r} is no plain file name: put the image beside the card and name it.")
    return f"![{alt}]({file_name})"


def _table(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _fenced(text: str) -> str:
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text) or [""]))
    return f"{fence}bash\n{text}\n{fence}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "metric"
