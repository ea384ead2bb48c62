"""Whether a data set is one that the trainer can use, with this model and this tokenizer."""

from __future__ import annotations

import itertools
from typing import Any

from datasets import Dataset, IterableDataset

from ..attention.probe import get_text_config
from ..chat import get_tokenizer
from ..conversations import read_provenance
from ..conversations.provenance import FORMAT
from ..conversations.rows import off_context_rows
from ..model_identity import model_fingerprint, tokenizer_fingerprint
from .batches import STATES, has_targets
from .self_study_config import SelfStudyConfig

_ROWS_LOOKED_AT = 8
# So many of a stream's tell what kinds there are.
ROWS_OF_A_STREAM = 256


def first_rows(dataset: Any, number: int = _ROWS_LOOKED_AT) -> list[dict[str, Any]]:
    """The first rows of a data set, also of one that comes row by row."""
    return list(itertools.islice(iter(dataset), number))


def without_off_context(dataset: Any) -> Any:
    """A data set without the general conversations that are among others; one of nothing else stays as it is (of a stream:
    one that begins with so many)."""
    if isinstance(dataset, Dataset) and (general := set(off_context_rows(dataset))):
        about = [index for index in range(len(dataset)) if index not in general]
        return dataset.select(about) if about else dataset
    if isinstance(dataset, IterableDataset) and any(map(_is_about_a_text, itertools.islice(dataset, ROWS_OF_A_STREAM))):
        return dataset.filter(_is_about_a_text)
    return dataset


def _is_about_a_text(row: dict[str, Any]) -> bool:
    return "context" not in row or bool(row["context"])


def check_kind(dataset: Any) -> None:
    """Raises:
    TypeError: `train_dataset` is no data set; the message says how to make it one.
    """
    if isinstance(dataset, str):
        raise TypeError("`train_dataset` is a text: pass `Dataset.from_dict({'text': [text]})`.")
    if isinstance(dataset, dict):
        raise TypeError(
            f"`train_dataset` is a {type(dataset).__name__} of {', '.join(map(repr, dataset))}: pass one of its data sets."
        )


def is_corpus(dataset: Any) -> bool:
    """Whether a data set is texts to write conversations about, and not conversations."""
    if dataset is None:
        return False
    columns = getattr(dataset, "column_names", None) or next(iter(first_rows(dataset, 1)), {})
    return "text" in columns and "input_ids" not in columns


def check_columns(dataset: Any, name: str, *, needs_teacher: bool = True, needs_context: bool = False) -> set[str]:
    """The columns of conversations.

    Args:
        dataset: Conversations; a `Dataset`, an `IterableDataset`, or any other that gives rows.
        name: The argument's name, for messages.
        needs_teacher: Whether the rows have to tell what the teacher says: by its targets, or by the `context` that it
            needs to say it live.
        needs_context: Whether `context` is needed in any case.

    Raises:
        ValueError: the data set lacks columns, or rows; the message names the remedy.
    """
    first = first_rows(dataset, 1)
    if not first:
        raise ValueError(f"`{name}` has no rows: pass at least one conversation.")
    have = set(getattr(dataset, "column_names", None) or first[0])
    missing = [column for column in ("input_ids", "completion_mask") if column not in have]
    if needs_teacher and not has_targets(have) and "context" not in have:
        missing.append("teacher_hidden_states (or teacher_top_k_ids and teacher_top_k_logprobs, or context)")
    elif needs_context and "context" not in have:
        missing.append("context")
    if missing:
        raise ValueError(
            f"`{name}` lacks the columns {', '.join(missing)} (it has {', '.join(sorted(have))}): pass a corpus with a "
            "`text` column, or what `SelfStudySynthesizer.synthesize` gives."
        )
    return have


def check_origin(dataset: Any, name: str, model: Any, processing_class: Any) -> None:
    """Whether the data set was made with this model and tokenizer: by what it says of itself, where it says anything,
    and by its rows.

    Args:
        dataset: Conversations.
        name: The argument's name, for messages.
        model: The PEFT model.
        processing_class: Tokenizer or processor.

    Raises:
        ValueError: it was made with another model or another tokenizer.
    """
    origin = read_provenance(dataset)
    made_by = origin.get("model_fingerprint")
    if made_by and origin.get("format") != FORMAT:
        raise ValueError(
            f"`{name}` was made by another version of peft-cartridges (format {origin.get('format')}, this one has "
            f"{FORMAT}), so it cannot be told whether this is its base model: synthesize it anew, or, if you know that "
            f'it is, set `{name}.info.description = ""` and leave out the column `origin`.'
        )
    if made_by and made_by != model_fingerprint(model):
        raise ValueError(
            f"`{name}` was made with another base model ({origin.get('base_model') or 'unnamed'}, or its weights before "
            f"they were changed) than {getattr(model.config, '_name_or_path', '') or type(model).__name__}, and its "
            "targets mean nothing to this one: load that model, or synthesize the data set anew."
        )
    made_with = origin.get("tokenizer_fingerprint")
    if made_with and made_with != tokenizer_fingerprint(processing_class):
        raise ValueError(
            f"`{name}` was made with another tokenizer or chat template: pass that one as `processing_class`, or "
            "synthesize the data set anew."
        )
    tokenizer = get_tokenizer(processing_class)
    hidden_size = get_text_config(model).hidden_size
    for number, row in enumerate(first_rows(dataset)):
        _check_tokens(row, f"{name}[{number}]", tokenizer)
        learned = sum(row["completion_mask"])
        if len(row["input_ids"]) != len(row["completion_mask"]) or not learned or row["completion_mask"][0]:
            raise ValueError(
                f"`{name}[{number}]` has {len(row['input_ids'])} `input_ids` and {len(row['completion_mask'])} entries "
                f"of `completion_mask`, {learned} of them set: it needs one entry a token, at least one set, and none "
                "for the first token, which nothing predicts."
            )
        states = row.get("teacher_hidden_states")
        if states is not None and len(states) != learned * hidden_size:
            raise ValueError(
                f"`{name}[{number}]` has {len(states)} numbers of `teacher_hidden_states` for {learned} learned tokens, "
                f"but the model's hidden size is {hidden_size}: the data set was made with another base model."
            )


def check_data(train_dataset: Any, eval_dataset: Any, args: SelfStudyConfig, model: Any, processing_class: Any) -> None:
    """Whether conversations have their columns and belong to the model.

    Raises:
        ValueError: as `check_columns` and `check_origin`, or settings do not go with the data.
    """
    named: dict[str, Any] = {}
    if isinstance(eval_dataset, dict):
        named = {f"eval_dataset[{name!r}]": part for name, part in eval_dataset.items()}
    elif eval_dataset is not None:
        named = {"eval_dataset": eval_dataset}
    for name, dataset in named.items():
        check_columns(dataset, name)
    if args.resample_every and not is_corpus(train_dataset):
        raise ValueError("`resample_every` needs a corpus with a `text` column as `train_dataset`.")
    if train_dataset is not None and not is_corpus(train_dataset):
        live = bool(args.on_policy_fraction or (args.prompt_loss_weight and args.needs_teacher))
        columns = check_columns(train_dataset, "train_dataset", needs_teacher=args.needs_teacher, needs_context=live)
        if args.loss_temperature != 1 and args.needs_teacher and has_targets(columns) and STATES not in columns:
            raise ValueError(
                f"`loss_temperature={args.loss_temperature}` needs `teacher_hidden_states`: what a temperature makes of "
                "top-k targets is unknown. Set it to 1, or synthesize with `teacher_targets=hidden_states`."
            )
        named["train_dataset"] = train_dataset
    for name, dataset in named.items():
        check_origin(dataset, name, model, processing_class)


def _check_tokens(row: dict[str, Any], name: str, tokenizer: Any) -> None:
    if max(row["input_ids"], default=0) >= len(tokenizer):
        raise ValueError(
            f"`{name}` has the token id {max(row['input_ids'])}, the tokenizer only {len(tokenizer)} tokens: the data "
            "set was made with another tokenizer. Pass that one as `processing_class`, with its model."
        )
    answers = [message["content"] for message in row.get("messages") or [] if message["role"] == "assistant"]
    if len(answers) != 1:
        return
    learned = [token for token, on in zip(row["input_ids"], row["completion_mask"], strict=False) if on]
    decoded = tokenizer.decode(learned, skip_special_tokens=True)
    if decoded.split() != answers[0].split():
        raise ValueError(
            f"The learned tokens of `{name}` read {decoded[:60]!r} with this tokenizer, but its answer is "
            f"{answers[0][:60]!r}: the data set was made with another tokenizer. Pass that one as `processing_class`, "
            "with its model."
        )
